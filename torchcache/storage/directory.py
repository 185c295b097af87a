"""The cache directory: who may use it, how many bytes lie under it, and the file-locked turn to write."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout

from torchcache.errors import StoreError
from torchcache.kinds import Fault
from torchcache.process import ForkLock
from torchcache.report.log import warn_once
from torchcache.storage.access import PRIVATE, Access
from torchcache.storage.filesystems import check_file_system

logger: logging.Logger = logging.getLogger(__name__)

LOCK_NAME = ".torchcache.lock"
TRASH_PREFIX = ".torchcache-trash-"

#: Lies in each subdirectory that we made: nothing else below a cache directory is ours to remove.
MARKER_NAME = ".torchcache"

#: How often who waits for the lock tries to take it; more often after ``_LATE_SECONDS``, since whoever tries most often
#: gets it first: of four processes that write all the time, one would else wait for seconds now and then.
_POLL_SECONDS, _LATE_POLL_SECONDS, _LATE_SECONDS = 0.005, 0.001, 0.5

#: While others get the lock in turn, it is waited for this many times as long as a stuck one.
_MOST_WAITS = 5

#: What torchcache 0.6 called the file of a value; so many names tell whose a directory is.
_NAME_IN_0_6 = re.compile(r"-?\d+\.pt\.br")
_MOST_NAMES_LOOKED_AT = 64


class TurnCancelledError(Exception):
    """A wait for the turn was given up because a fork is about to happen."""


class CacheDirectory:
    """One ``persistent_cache_dir``, made if need be: private and not somebody else's, or a group's.

    Who only reads makes none: it may come to be later, so it is checked whenever something in it is opened.

    The turn (a file lock and a lock of this process) is held around every change of anything under the
    directory, so that the budget counts all processes and nobody ever waits inside LMDB.

    Args:
        path: The directory.
        access: Who may use it.
        before_turn: Called in each turn first: makes a temporary directory anew that somebody swept away.

    Raises:
        StoreError: If the directory cannot be made or must not be used; not if it is only to be read.
    """

    def __init__(self, path: Path, access: Access = PRIVATE, before_turn: Callable[[], object] | None = None) -> None:
        self.path = path
        self.access = access
        self._before_turn = before_turn
        self._mine = ForkLock()
        self._used_bytes = 0
        if access.is_read_only:
            return
        check_file_system(path)
        try:
            access.make_directories(path)
            access.check_root(path)
            access.open_file(path / LOCK_NAME)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path} cannot be used as persistent_cache_dir: {error}", kind=Fault.DIRECTORY) from error

    def check(self) -> None:
        """Check again whether the directory may be used.

        Raises:
            OSError: If it is not there.
            StoreError: If it must not be used.
        """
        check_file_system(self.path)
        self.access.check_root(self.path)

    @contextmanager
    def turn(self, timeout_seconds: float, cancel: Callable[[], bool] | None = None) -> Iterator[None]:
        """Hold the directory's lock; nobody else changes anything under it meanwhile.

        Raises:
            StoreError: If it stayed with one process for ``timeout_seconds``, or with others for five times that;
                if it cannot be locked, or the directory is only to be read.
            TurnCancelledError: If ``cancel`` said so while waiting.
        """
        if self.access.is_read_only:
            raise StoreError(f"{self.path} is only read", kind=Fault.READ_ONLY)
        wait = _Wait(self.path, timeout_seconds, cancel)
        mine = self._mine.raw
        while not mine.acquire(timeout=0.05):
            wait.check()
        try:
            if self._before_turn is not None:
                self._before_turn()
            # A new lock object each time: an inherited one refuses to work in a forked child.
            lock = FileLock(
                self.path / LOCK_NAME,
                mode=self.access.file_mode,
                thread_local=False,
                is_singleton=False,
                fallback_to_soft=False,
            )
            self._acquire(lock, wait)
            try:
                with contextlib.suppress(OSError):
                    os.utime(self.path)  # shows those who wait that the lock is not stuck
                yield
            finally:
                lock.release()
        finally:
            mine.release()

    def _acquire(self, lock: FileLock, wait: _Wait) -> None:
        while True:
            try:
                lock.acquire(timeout=0.05, poll_interval=wait.poll_seconds())
            except Timeout:
                wait.check()
            except OSError as error:
                raise StoreError(
                    f"{self.path / LOCK_NAME} cannot be locked: {error}; if another user made it for a private cache, "
                    "name another directory, or let its owner remove it",
                    kind=Fault.LOCK,
                ) from error
            else:
                return

    def measure(self) -> int:
        """Count the bytes of everything under the directory, itself included."""
        self._used_bytes = _count_bytes(self.path)
        return self._used_bytes

    def used_bytes(self) -> int:
        """Return what ``measure`` last counted."""
        return self._used_bytes

    def free_disk_bytes(self) -> tuple[int, int]:
        """Return how many bytes of the file system are free for us, and how many it has; zeros if it does not say."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize

    def place_for(self, name: str) -> str:
        """Return the name of the subdirectory for a module hash: itself, or one beside the files of torchcache 0.6.

        Once made, that one stays in use when those files are removed.
        """
        beside = f"{name}.beside-0.6"
        try:
            if self.is_ours(name):
                return name
        except PermissionError:  # who opens it says whose it is
            return name
        if _holds_files_of_0_6(self.path / name):
            warn_once(
                ("beside", str(self.path / name)),
                "%s holds files of torchcache 0.6, which this version does not read; the new cache is beside them, in "
                "%s. Remove the old files if nothing needs them.",
                self.path / name, beside,
            )  # fmt: skip
            return beside
        return beside if self.is_ours(beside) else name

    def is_ours(self, name: str) -> bool:
        """Tell whether a subdirectory was made by torchcache."""
        return (self.path / name / MARKER_NAME).is_file()

    def check_ours(self, name: str) -> None:
        """Check that a subdirectory may be set aside and made anew.

        Raises:
            StoreError: If it was not made by torchcache.
        """
        if not self.is_ours(name):
            raise StoreError(
                f"{self.path / name} was not made by torchcache and is left alone; choose another "
                "persistent_cache_dir or persistent_module_hash",
                kind=Fault.FOREIGN,
            )

    def set_aside(self, name: str, suffix: str) -> None:
        """Rename a subdirectory of ours out of the way, replacing an earlier one set aside; the turn is held."""
        self.check_ours(name)
        target = self.path / f"{name}.{suffix}"
        self.remove(target.name)
        os.rename(self.path / name, target)

    def remove(self, name: str) -> None:
        """Remove a subdirectory that is ours; the turn is held. Processes that have it open keep what they have."""
        if not self.is_ours(name):
            return
        source = self.path / name
        trash = self.path / f"{TRASH_PREFIX}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(source, trash)  # at once for everybody else, whatever happens to us meanwhile
            shutil.rmtree(trash, ignore_errors=True)

    def empty_trash(self) -> None:
        """Remove what a killed process left of a removal; the turn is held."""
        for entry in self.path.glob(f"{TRASH_PREFIX}*"):
            shutil.rmtree(entry, ignore_errors=True)


class _Wait:
    """One wait for the turn: a lock that others get in turn is waited for longer than one that is stuck."""

    def __init__(self, path: Path, timeout_seconds: float, cancel: Callable[[], bool] | None) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._cancel = cancel
        self._begun = time.monotonic()
        self._deadline = self._begun + timeout_seconds
        self._seen = self._latest_turn()

    def poll_seconds(self) -> float:
        """Return how long to pause between two tries."""
        return _POLL_SECONDS if time.monotonic() - self._begun < _LATE_SECONDS else _LATE_POLL_SECONDS

    def check(self) -> None:
        """Go on waiting, or raise."""
        if self._cancel is not None and self._cancel():
            raise TurnCancelledError
        now = time.monotonic()
        if now <= self._deadline:
            return
        latest = self._latest_turn()
        if latest == self._seen or now - self._begun > _MOST_WAITS * self._timeout_seconds:
            raise StoreError(f"the lock of {self._path} stayed with another process", kind=Fault.LOCK_TIMEOUT)
        self._seen, self._deadline = latest, now + self._timeout_seconds

    def _latest_turn(self) -> int:
        """Return when somebody got the turn last, in nanoseconds; 0 if the directory is gone."""
        try:
            return os.stat(self._path).st_mtime_ns
        except OSError:
            return 0


def _holds_files_of_0_6(path: Path) -> bool:
    """Tell whether a directory has what torchcache 0.6 put into it, and nothing else as far as a look shows."""
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in islice(entries, _MOST_NAMES_LOOKED_AT)]
    except OSError:
        return False
    return bool(names) and all(_NAME_IN_0_6.fullmatch(name) for name in names)


def _count_bytes(path: Path | str) -> int:
    # What is removed between listing and looking, or is not for us to see, must not hide the rest.
    total = 0
    try:
        total += os.lstat(path).st_size
        entries = list(os.scandir(path))
    except (FileNotFoundError, PermissionError):
        return total
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                total += _count_bytes(entry.path)
            else:
                total += entry.stat(follow_symlinks=False).st_size
        except (FileNotFoundError, PermissionError):
            continue
    return total
