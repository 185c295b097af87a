"""What LMDB and the system raise, as the errors of a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import lmdb

from torchcache.errors import StoreError
from torchcache.kinds import Fault

_KINDS: dict[type[BaseException], Fault] = {
    lmdb.CorruptedError: Fault.DAMAGED,
    lmdb.InvalidError: Fault.DAMAGED,
    lmdb.PageNotFoundError: Fault.DAMAGED,
    lmdb.PanicError: Fault.DAMAGED,
    lmdb.DiskError: Fault.DISK,
    lmdb.MapFullError: Fault.MAP_FULL,
    lmdb.MapResizedError: Fault.MAP_RESIZED,
    lmdb.ReadersFullError: Fault.READERS_FULL,
    lmdb.LockError: Fault.LMDB_LOCK,
}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn what LMDB and the system raise in the body into ``StoreError``."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what is not theirs is raised as it is
        raise_translated(path, error)


def raise_translated(path: Path, error: BaseException) -> NoReturn:
    """Raise an error as a ``StoreError`` if it is LMDB's or the system's, else as it is.

    Args:
        path: The environment that was in use.
        error: What was raised.
    """
    if isinstance(error, FileNotFoundError):
        raise StoreError(f"{path} is gone", kind=Fault.ABSENT) from error
    if isinstance(error, lmdb.Error):
        raise StoreError(f"{path}: {error}", kind=_KINDS.get(type(error), Fault.LMDB)) from error
    if isinstance(error, (OSError, MemoryError, RuntimeError)) and not isinstance(error, StoreError):
        raise StoreError(f"{path}: {error}", kind=Fault.DISK) from error
    raise error
