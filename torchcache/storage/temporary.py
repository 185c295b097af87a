"""The private temporary cache directory of a program: shared with its workers, removed at its end.

A file lock held for life tells directories of living programs from those of killed ones; the latter are
removed by a later program.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

from torchcache import process
from torchcache.errors import StoreError
from torchcache.storage.directory import check_owned

_PREFIX = "torchcache-tmp-"
_OWNER_LOCK = ".owner.lock"
_VARIABLE = "TORCHCACHE_TEMPORARY_DIR"

#: A directory without a lock may be one that is being made at this moment.
_GRACE_SECONDS = 60.0
_REMOVE_TRIES = 3

_lock = process.ForkLock()
_directory: Path | None = None
_owner: FileLock | None = None


def temporary_directory() -> Path:
    """Return this program's temporary cache directory; made at the first call.

    Processes that multiprocessing started use their parent's: forked ones inherit it, spawned ones find it
    in the environment.

    Raises:
        StoreError: If it cannot be made.
    """
    global _directory, _owner  # noqa: PLW0603 - one a program, that is the point
    with _lock:
        if _directory is not None:
            return _directory
        inherited = os.environ.get(_VARIABLE)
        if inherited and process.is_child():
            with contextlib.suppress(OSError):
                check_owned(Path(inherited), is_private=True)
                _directory = Path(inherited)
                return _directory
        try:
            _remove_dead()
            path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            _owner = FileLock(path / _OWNER_LOCK, mode=0o600, thread_local=False, fallback_to_soft=False)
            _owner.acquire(timeout=0)
        except OSError as error:
            raise StoreError(f"no temporary directory can be made: {error}", kind="directory") from error
        _directory = path
        os.environ[_VARIABLE] = str(path)
        process.at_exit(_remove_own, last=True)
        return path


def _remove_own() -> None:
    if _directory is not None:
        for _ in range(_REMOVE_TRIES):  # a daemon thread may put something into it meanwhile
            shutil.rmtree(_directory, ignore_errors=True)
            if not _directory.exists():
                break
        if os.environ.get(_VARIABLE) == str(_directory):
            del os.environ[_VARIABLE]


def _remove_dead() -> None:
    """Remove directories whose owner no longer holds its lock."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            check_owned(path, is_private=True)
            if time.time() - path.stat().st_mtime < _GRACE_SECONDS:
                continue
            lock = FileLock(path / _OWNER_LOCK, thread_local=False, fallback_to_soft=False)
            lock.acquire(timeout=0)
        except (OSError, Timeout):
            continue
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            lock.release()
