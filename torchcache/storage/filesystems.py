"""Which file systems LMDB cannot work on, and where else to go.

LMDB maps its file and locks it between processes; its documentation excludes remote file systems, where
neither is coherent. FUSE counts with them: a failed read of a mapped page there kills the process. So do the
folders that a virtual machine shares with its host.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from torchcache.errors import StoreError
from torchcache.kinds import Fault

#: Types as in /proc/self/mountinfo; "fuse.*" with any subtype is refused as well. "autofs" is what is still not
#: mounted after it was asked for: what will be there cannot be known.
REFUSED = frozenset(
    {
        "9p",
        "acfs",
        "afs",
        "autofs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "drvfs",
        "fakeowner",
        "fuse",
        "fuseblk",
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
        "virtiofs",
        "vmhgfs",
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
            f"{path} lies on a file system of the network, of FUSE or of a virtual machine's host ({kind}), where "
            f"LMDB does not work; set persistent_cache_dir to a disk of this machine{_alternative()}. Until then "
            "nothing is kept on disk",
            kind=Fault.FILE_SYSTEM,
        )


def is_refused(kind: str) -> bool:
    """Tell whether LMDB cannot work on this type of file system."""
    return kind in REFUSED or kind.startswith("fuse.")


def file_system_of(path: Path) -> str:
    """Return the type of the file system that holds ``path``; an empty string where that cannot be known.

    What is mounted on demand is mounted for it.
    """
    kind = _mounted_type(os.path.realpath(path))
    if kind == "autofs":
        _mount_on_demand(path)
        kind = _mounted_type(os.path.realpath(path))
    return kind


def _mount_on_demand(path: Path) -> None:
    """Reach for the directory, or for the nearest parent that there is, so that autofs mounts it."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            os.stat(os.path.join(place, "."))  # the last name of a path is not mounted by stat (Linux 4.11)
            return


def _mounted_type(real: str) -> str:
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
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
    places = ["/var/tmp", "/dev/shm"]  # noqa: S108 - named to the user, not used
    with contextlib.suppress(OSError):  # there may be no directory for temporary files
        places.insert(0, tempfile.gettempdir())
    for place in places:
        if os.access(place, os.W_OK) and not is_refused(file_system_of(Path(place))):
            return f", such as {Path(place) / 'torchcache'}"
    return ""
