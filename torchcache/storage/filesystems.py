"""Which file systems LMDB cannot work on, and where else to go.

LMDB maps its file and locks it between processes; its documentation excludes remote file systems, where
neither is coherent. FUSE counts with them: a failed read of a mapped page there kills the process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torchcache.errors import StoreError

#: Types as in /proc/self/mountinfo; "fuse.*" with any subtype is refused as well.
REFUSED = frozenset(
    {
        "9p",
        "acfs",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "fuse",
        "gfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "prl_fs",
        "pvfs2",
        "smb3",
        "smbfs",
        "vboxsf",
        "wekafs",
    }
)

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}


def check_file_system(path: Path) -> None:
    """Refuse a cache directory on a file system of other machines.

    Args:
        path: The directory; it need not exist.

    Raises:
        StoreError: If it lies on one; the message names a place that does not.
    """
    kind = file_system_of(path)
    if is_refused(kind):
        raise StoreError(
            f"{path} lies on a network file system ({kind}), where LMDB does not work; set persistent_cache_dir to "
            f"a disk of this machine{_alternative()}. Until then nothing is kept on disk",
            kind="file_system",
        )


def is_refused(kind: str) -> bool:
    """Tell whether LMDB cannot work on this type of file system."""
    return kind in REFUSED or kind.startswith("fuse.")


def file_system_of(path: Path) -> str:
    """Return the type of the file system that holds ``path``; an empty string where that cannot be known."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    real = os.path.realpath(path)
    best, found = "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        place = fields[4]
        for escape, character in _ESCAPES.items():
            place = place.replace(escape, character)
        is_above = real == place or real.startswith(place.rstrip("/") + "/")
        if is_above and len(place) >= len(best):  # a later mount covers an earlier one
            best, found = place, after.split(" ")[0]
    return found


def _alternative() -> str:
    for place in (tempfile.gettempdir(), "/var/tmp", "/dev/shm"):  # noqa: S108 - named to the user, not used
        if os.access(place, os.W_OK) and not is_refused(file_system_of(Path(place))):
            return f", such as {Path(place) / 'torchcache'}"
    return ""
