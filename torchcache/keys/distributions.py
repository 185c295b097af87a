"""What is installed in the folders of libraries, and which files it has. This module does not import torch."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import metadata
from itertools import chain, islice
from pathlib import Path

from torchcache.keys.digest import digest_parts

#: Folders of nothing but libraries.
_SITES = frozenset({"site-packages", "dist-packages"})

#: Most walks meet no others, and to read the metadata of all distributions takes up to a second.
_KNOWN_DISTRIBUTIONS = {"torch": "torch", "functorch": "torch", "torchgen": "torch", "numpy": "numpy"}

#: So many files of a distribution that lists no hashes are looked at.
_MOST_FILES = 20_000


def distributions_of(path: str, search_path: tuple[str, ...]) -> str | None:
    """Return the names of the distributions that a file may belong to; None for a file of the user's own.

    Args:
        path: The file, links resolved.
        search_path: Where modules are looked for: ``sys.path``. A folder of it holds libraries if it is called
            so, or for what pip put there, as it does with ``--target``.
    """
    for folder, has_others in _folders(search_path):
        if not path.startswith(folder):
            continue
        top = path[len(folder) :].partition(os.sep)[0].partition(".")[0]
        if not has_others and top in _KNOWN_DISTRIBUTIONS:
            return _KNOWN_DISTRIBUTIONS[top]
        # A namespace package belongs to several distributions; which one made the file is not asked.
        found = _installed_in(folder).get(top)
        if found or not has_others:
            return ", ".join(found or [top])
    return None


@lru_cache(maxsize=64)
def _folders(search_path: tuple[str, ...]) -> tuple[tuple[str, bool], ...]:
    """Return the folders of libraries, and of each whether files of the user's own may lie there as well."""
    sites = [*sysconfig.get_paths().values(), *(path for path in map(str, search_path) if Path(path).name in _SITES)]
    found = {os.path.realpath(path) + os.sep: False for path in sites if Path(path).name in _SITES}
    for path in map(str, search_path):
        folder = os.path.realpath(path) + os.sep
        if folder not in found and any(_installed_by_pip(folder)):
            found[folder] = True
    # The innermost first: a virtual environment lies in the folder of its project.
    return tuple(sorted(found.items(), key=lambda item: -len(item[0])))


def _installed_by_pip(folder: str) -> Iterator[Path]:
    """Yield where it is said what is installed in a folder; not what a build in the user's own sources leaves there."""
    try:
        names = [*os.scandir(folder)]
    except OSError:
        return
    for entry in names:
        record = {".dist-info": "RECORD", ".egg-info": "installed-files.txt"}.get(Path(entry.name).suffix)
        if record is not None and Path(entry.path, record).is_file():
            yield Path(entry.path)


@lru_cache(maxsize=64)
def _installed_in(folder: str) -> dict[str, list[str]]:
    """Return the distributions in a folder by the names of their packages and modules."""
    found: dict[str, set[str]] = {}
    for distribution in metadata.distributions(path=[folder]):
        name = distribution.metadata["Name"]
        for top in _tops_of(distribution) if name else ():
            found.setdefault(top, set()).add(name)
    return {top: sorted(names) for top, names in found.items()}


def _tops_of(distribution: metadata.Distribution) -> set[str]:
    """Return the names of the packages and modules of a distribution."""
    said = distribution.read_text("top_level.txt")
    if said is not None:
        return set(said.split())
    return {path.partition("/")[0].partition(".")[0] for path, _ in _listed(distribution)}


def _listed(distribution: metadata.Distribution) -> Iterator[tuple[str, str]]:
    """Yield the files that are imported of a distribution, and the hash of each, as its RECORD lists them."""
    for line in (distribution.read_text("RECORD") or "").splitlines():
        path, _, rest = line.rpartition(",")[0].rpartition(",")
        is_imported = path and not path.startswith(("..", "/")) and ".dist-info/" not in path
        if is_imported and "__pycache__" not in path:
            yield path, rest


@lru_cache(maxsize=1024)
def installed_version(name: str) -> str:
    """Return the version of a distribution, with a digest of its files: one may be installed again under its version.

    The RECORD lists their hashes. Without it their sizes and times count. Asked once per process: what is installed
    later is not what this process runs.
    """
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return f" {_digest_of_folders(name)}"
    listed = sorted(_listed(distribution))
    if listed and all(digest for _, digest in listed):
        files = digest_parts(text.encode() for entry in listed for text in entry)
        return f"{distribution.version} {files.hex()}"
    tops = _tops_of(distribution) or {name}
    return f"{distribution.version} {_digest_of_files(Path(str(distribution.locate_file(''))), tops)}"


def _digest_of_folders(top: str) -> str:
    """Return a digest of a package or module that no distribution names, in the first folder that holds it."""
    for folder, _ in _folders(tuple(sys.path)):
        if any(Path(folder, name).exists() for name in (top, f"{top}.py")):
            return _digest_of_files(Path(folder), {top})
    return ""


def _digest_of_files(folder: Path, tops: Iterable[str]) -> str:
    """Return a digest of names, sizes and times of the files of packages and modules."""
    parts: list[bytes] = []
    for top in sorted(tops):
        single = [path for path in folder.glob(f"{top}.*") if path.is_file()]
        inside = (Path(base, name) for base, _, names in os.walk(folder / top) for name in names)
        for path in sorted(islice(chain(single, inside), _MOST_FILES)):
            if path.parent.name != "__pycache__":
                status = path.stat()
                parts.append(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}".encode())
    return digest_parts(parts).hex()
