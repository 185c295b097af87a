"""The private temporary cache directory of a program: shared with its workers, removed at its end.

Its name is derived from multiprocessing's authentication key, which a program draws at random and every
process that it starts with multiprocessing has, by whatever start method and however early. So a worker that
starts before its parent uses the cache comes to the same directory. Every process that uses it holds a
shared lock on a file in it for life; a directory that nobody locks is a dead program's, and a later one
removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

from torchcache import process
from torchcache.errors import StoreError
from torchcache.storage.access import PRIVATE

_PREFIX = "torchcache-tmp-"
_NAME_BYTES = 16
_LOCK_NAME = ".in-use.lock"

#: Without a lock by the program itself, its directory counts as dead only so long after the last worker took
#: it into use: it may be between two rounds of workers, or just being made.
_GRACE_SECONDS = 3600.0
_JOIN_TRIES = 10
_REMOVE_TRIES = 3

_lock = process.ForkLock()
_directory: Path | None = None
_descriptor: int | None = None  # holds the lock until the process ends


def reserve() -> None:
    """Remove the directory at the end of this program, even if only its workers come to use it.

    For a program that may start workers before it uses the cache itself; workers remove nothing.
    """
    if not process.is_child() and not process.generation():  # a forked child may end before its parent
        process.at_exit(_remove_own, last=True)


def temporary_directory() -> Path:
    """Return this program's temporary cache directory; made at the first call.

    Raises:
        StoreError: If it cannot be made.
    """
    global _directory, _descriptor  # noqa: PLW0603 - one a program, that is the point
    with _lock.raw:
        if _directory is None:
            reserve()
            path = _path()
            try:
                _remove_dead(path)
                _descriptor = _join(path)
            except OSError as error:
                raise StoreError(f"no temporary directory can be made: {error}", kind="directory") from error
            _directory = path
        return _directory


def _path() -> Path:
    key = bytes(multiprocessing.current_process().authkey)
    name = hashlib.blake2b(key, digest_size=_NAME_BYTES, person=b"torchcache").hexdigest()
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{name}"


def _join(path: Path) -> int:
    """Make the directory if need be and lock it as in use; return the descriptor that holds the lock."""
    for _ in range(_JOIN_TRIES):
        PRIVATE.make_directory(path)
        PRIVATE.check_directory(path)
        descriptor = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _is_same_file(descriptor, path / _LOCK_NAME):
                if process.is_child():
                    os.utime(descriptor)
                else:  # from now on the lock alone says whether the program lives
                    os.truncate(descriptor, 1)
                return descriptor
        except BlockingIOError:
            time.sleep(0.01)  # somebody is removing it
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise StoreError(f"{path} is removed again and again", kind="directory")


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_own() -> None:
    path = _directory or _path()
    for _ in range(_REMOVE_TRIES):  # a daemon thread may put something into it meanwhile
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return


def _remove_dead(own: Path) -> None:
    """Remove directories that no living process uses."""
    for path in own.parent.glob(_PREFIX + "[0-9a-f]" * 2 * _NAME_BYTES):
        if path == own:
            continue
        try:
            PRIVATE.check_directory(path)
            is_waiting = time.time() - path.stat().st_mtime < _GRACE_SECONDS
            try:
                descriptor = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                if not is_waiting:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(descriptor)
                if status.st_size or time.time() - status.st_mtime > _GRACE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
        except OSError:
            continue
