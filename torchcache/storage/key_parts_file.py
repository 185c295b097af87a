"""What keys are made of, in a small file beside the rows: for programs that find nothing and ask which part differs.

It holds names and digests and decides nothing: it may be missing, old or of another version. It is a file and not an
entry of the environment, so that it can be read in a subdirectory that another program uses, without opening anything.
It is written in the directory's turn under another name and moved into place, so it is whole whenever it is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
from xxhash import xxh3_128_digest

from torchcache.errors import StoreError
from torchcache.storage.access import Access
from torchcache.storage.directory import MARKER_NAME
from torchcache.storage.record import UNREADABLE

FILE_NAME = "key_parts"
_UNFINISHED_NAME = "key_parts.unfinished"

#: What the file begins with, and the length of the checksum that follows it.
_MAGIC = b"torchcache-parts-1\n"
_CHECKSUM_BYTES = 16

#: At most this many bytes are written and read, and so many states kept, the latest first.
MOST_BYTES = 16384
_MOST_STATES = 4

#: At most this many subdirectories are looked at, and so many files read, for so long.
_MOST_ENTRIES = 1024
_MOST_FILES = 32
_MOST_SECONDS = 0.1

#: One part of a key: kind, name, digest, and whether it stands for several.
Row = tuple[str, str, bytes, bool]


@dataclass(frozen=True, slots=True)
class KeptState:
    """The parts of one key that rows were kept under.

    Attributes:
        namespace: Of the rows.
        noted_at: When that was, in seconds since 1970.
        rows: The parts.
    """

    namespace: bytes
    noted_at: float
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class KeptParts:
    """What is kept of the keys of one module hash.

    Attributes:
        target: What is cached.
        module: The parts of the module hash.
        states: Of the latest states, the latest first.
    """

    target: str
    module: tuple[Row, ...]
    states: tuple[KeptState, ...]

    def with_state(self, state: KeptState) -> KeptParts:
        """Return the same with a state in front."""
        others = [other for other in self.states if other.namespace != state.namespace]
        return KeptParts(self.target, self.module, (state, *others)[:_MOST_STATES])


def read_parts(directory: Path, access: Access) -> KeptParts | None:
    """Return what is kept in a subdirectory; None where there is nothing that this version can read."""
    path = directory / FILE_NAME
    try:
        access.check_file(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, StoreError):
        return None
    try:
        data = os.read(descriptor, MOST_BYTES + 1)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return _unpacked(data)


def pack_parts(parts: KeptParts) -> bytes:
    """Return the bytes of a file, with as many of the states as there is room for."""
    states = list(parts.states)
    while True:
        content = [parts.target, list(parts.module), [[s.namespace, s.noted_at, list(s.rows)] for s in states]]
        body: bytes = msgpack.packb(content)
        data = _MAGIC + xxh3_128_digest(body) + body
        if len(data) <= MOST_BYTES or not states:
            return data
        states.pop()


def write_parts(directory: Path, access: Access, data: bytes) -> None:
    """Put a file in the place of what is there. Requires the turn.

    Raises:
        OSError: If it cannot be written.
    """
    unfinished = directory / _UNFINISHED_NAME
    with contextlib.suppress(FileNotFoundError):
        os.unlink(unfinished)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, access.file_mode)
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(unfinished))
    finally:
        os.close(descriptor)
    os.replace(unfinished, directory / FILE_NAME)


def relatives(root: Path, access: Access, target: str, own: str) -> list[KeptParts]:
    """Return what is kept of the same target under other module hashes, the latest first.

    Args:
        root: The cache directory.
        access: Who may use it.
        target: What is cached.
        own: The subdirectory to leave out.
    """
    deadline = time.monotonic() + _MOST_SECONDS
    found: list[tuple[float, Path]] = []
    try:
        with os.scandir(root) as entries:
            for number, entry in enumerate(entries):
                if number >= _MOST_ENTRIES or time.monotonic() > deadline:
                    break
                if entry.name == own or entry.name.startswith("."):
                    continue
                with contextlib.suppress(OSError):
                    if not os.path.islink(entry.path) and os.path.isfile(os.path.join(entry.path, MARKER_NAME)):
                        found.append((os.stat(os.path.join(entry.path, FILE_NAME)).st_mtime, Path(entry.path)))
    except OSError:
        return []

    kept: list[KeptParts] = []
    for _, path in sorted(found, reverse=True)[:_MOST_FILES]:
        if time.monotonic() > deadline:
            break
        parts = read_parts(path, access)
        if parts is not None and parts.target == target:
            kept.append(parts)
    return kept


def _unpacked(data: bytes) -> KeptParts | None:
    start = len(_MAGIC) + _CHECKSUM_BYTES
    body = data[start:]
    if len(data) > MOST_BYTES or data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : start] != xxh3_128_digest(body):
        return None
    try:
        content = msgpack.unpackb(body, max_map_len=0, max_ext_len=0)
        target, module, states = content
        kept = [KeptState(_bytes(namespace), float(at), _rows(rows)) for namespace, at, rows in states]
        return KeptParts(_text(target), _rows(module), tuple(kept))
    except (*UNREADABLE, TypeError):
        return None


def _rows(rows: Sequence[Sequence[object]]) -> tuple[Row, ...]:
    found: list[Row] = []
    for kind, name, digest, is_group in rows:
        found.append((_text(kind), _text(name), _bytes(digest), bool(is_group)))
    return tuple(found)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError
    return value
