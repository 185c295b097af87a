"""The private temporary cache directory of a program: shared with its workers, removed by its last user.

Its name is derived from multiprocessing's authentication key, which a program draws at random and every
process that it starts with multiprocessing has, by whatever start method and however early. So a worker that
starts before its parent uses the cache comes to the same directory. A program that sets a key of its own does
so before it decorates anything: what it decorated earlier stays where it is, in forked children too, but
spawned ones know only the new key and have a directory of their own.

Every process that uses it holds a shared lock on a file in it for life. Workers of multiprocessing never remove
it: their parent may start more of them, and need not use the cache itself. A main program and what it forked by
hand do at their end, if nobody else holds the lock: programs with the same key share it, and a forked
child may outlive its parent. What nobody locks any more was left by processes that were killed, or by
workers of a program that never imported this; a later program removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable
from multiprocessing import util as multiprocessing_util
from pathlib import Path

from torchcache import process, starters
from torchcache.errors import StoreError
from torchcache.kinds import Fault
from torchcache.storage.access import PRIVATE

_PREFIX = "torchcache-tmp-"
_NAME_BYTES = 16
_LOCK_NAME = ".in-use.lock"

#: Everybody can see the name, and a key of the user's own may be a word: guessing it takes this many hashes a
#: word (2 ms here, once a process).
_NAME_ROUNDS = 4000

#: Without a lock by the program itself, its directory counts as dead only so long after the last worker took
#: it into use: it may be between two rounds of workers, or just being made.
_GRACE_SECONDS = 3600.0
_JOIN_TRIES = 10
_REMOVE_TRIES = 3

#: At the end of a program multiprocessing ends its children before it runs finalizers below 0, so that a data
#: loader's workers hold no lock any more. Exit handlers, such as the writer's, have run before.
_EXIT_PRIORITY = -50
#: How long the end waits for a thread that is just making the directory.
_EXIT_LOCK_SECONDS = 1.0


def reserve() -> None:
    """Remove the directory at the end of this program, even if only its workers come to use it.

    From now on it stays the same one in this process, whatever becomes of multiprocessing's key.
    """
    _use.reserve()


def temporary_directory() -> Path:
    """Return this program's temporary cache directory, locked as in use by this process.

    Made if it is not there: also again, where somebody took it away while it was in use. Costs two system calls
    if it is.

    Raises:
        StoreError: If it cannot be made, or is not ours any more.
    """
    return _use.join()


class _Use:
    """What this process has to do with the directory.

    Its lock is its own: one that is shared with the parent through a fork could not be given up alone.
    """

    def __init__(self) -> None:
        self._mine = process.ForkLock()  # guards all that follows
        self._is_reserved = False  # the end of this process will look after it
        self._key = b""  # what the name is derived from; empty: not settled yet
        self._seen_key = b""  # multiprocessing's when that was settled, or when this process was forked
        self._path: Path | None = None
        self._descriptor: int | None = None  # holds the lock

    def reserve(self) -> None:
        with self._mine.raw:
            self._reserve()

    def join(self) -> Path:
        with self._mine.raw:
            try:
                self._reserve()
                if self._path is None:
                    self._path = _path_of(self._key)
                if self._descriptor is None or not _is_same_file(self._descriptor, self._path / _LOCK_NAME):
                    self._close()
                    _remove_dead(self._path)
                    self._descriptor = _join(self._path)
            except StoreError:
                raise
            except OSError as error:
                raise StoreError(f"no temporary directory can be made: {error}", kind=Fault.DIRECTORY) from error
            return self._path

    def _reserve(self) -> None:
        key = starters.program_key()
        # A worker's key is its starter's word: a fork server has one of its own, which its children inherit.
        if not self._key or (starters.is_child() and key != self._seen_key):
            self._key = self._seen_key = key
            self._path = None
        if not self._is_reserved:
            self._is_reserved = True
            multiprocessing_util.Finalize(None, self._leave, exitpriority=_EXIT_PRIORITY)

    def _leave(self) -> None:
        """Give up the lock, and remove the directory if that was the last; silent whatever happens."""
        if not self._mine.raw.acquire(timeout=_EXIT_LOCK_SECONDS):
            return
        try:
            self._close()
            if starters.is_child():
                return
            with contextlib.suppress(OSError):  # there may be no directory for temporary files at all
                # Workers that were started after the key was changed, or by another library, have used another one.
                others = {_path_of(key) for key in starters.keys_of_children()}
                for path in {self._path or _path_of(self._key), *others}:
                    _remove_own(path)
        finally:
            self._mine.raw.release()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    # -- forks --------------------------------------------------------------------------------------------------

    def before_fork(self, deadline: float) -> bool:  # noqa: ARG002 - there is nothing to wait for
        return True

    def at_rest(self) -> None:
        pass

    def after_fork_in_parent(self) -> None:
        pass

    def after_fork_in_child(self) -> None:
        """Lock anew before the parent's lock is let go, and see to the end of this process too.

        A worker of multiprocessing forgets about its end: it drops the finalizers it was forked with.
        """
        inherited, self._descriptor = self._descriptor, None
        if inherited is not None:
            if self._path is not None:
                self._descriptor = _try_to_lock(self._path)
            os.close(inherited)
        if self._is_reserved:
            self._is_reserved = False
            self._seen_key = starters.program_key()
            self._reserve()


_use = _Use()
process.listen_to_forks(_use)


def _path_of(key: bytes) -> Path:
    name = hashlib.pbkdf2_hmac("sha256", key, b"torchcache", _NAME_ROUNDS, _NAME_BYTES).hex()
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{name}"


def _join(path: Path) -> int:
    """Make the directory if need be and lock it as in use; return the descriptor that holds the lock."""
    for _ in range(_JOIN_TRIES):
        PRIVATE.make_directory(path)
        try:
            PRIVATE.check_directory(path)
            descriptor = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # somebody has just removed it
        try:
            if _lock_shared(descriptor, path):
                if starters.is_child():
                    os.utime(descriptor)
                else:  # from now on the lock alone says whether the program lives
                    os.truncate(descriptor, 1)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.01)  # somebody is removing it
    raise StoreError(f"{path} is removed again and again", kind=Fault.DIRECTORY)


def _try_to_lock(path: Path) -> int | None:
    """Lock the directory as in use if it is there; return the descriptor that holds the lock."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
        with contextlib.suppress(OSError):
            if _lock_shared(descriptor, path):
                return descriptor
        os.close(descriptor)
    return None


def _lock_shared(descriptor: int, path: Path) -> bool:
    """Return whether the lock was free, and still is the one of ``path``."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_same_file(descriptor, path / _LOCK_NAME)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _remove_own(path: Path) -> None:
    for _ in range(_REMOVE_TRIES):  # a daemon thread may put something into it meanwhile
        if not _remove_unless_used(path, lambda _: True):
            return


def _remove_dead(own: Path) -> None:
    """Remove directories that no living process uses."""
    for path in own.parent.glob(_PREFIX + "[0-9a-f]" * 2 * _NAME_BYTES):
        if path != own:
            _remove_unless_used(path, _is_dead)


def _is_dead(status: os.stat_result) -> bool:
    was_programs = stat.S_ISREG(status.st_mode) and status.st_size > 0
    return was_programs or time.time() - status.st_mtime > _GRACE_SECONDS


def _remove_unless_used(path: Path, is_dead: Callable[[os.stat_result], bool]) -> bool:
    """Remove a directory of ours that nobody locks; return whether there was one, and it is gone.

    Args:
        path: The directory.
        is_dead: Asked about the lock file, or about the directory if it has none.
    """
    try:
        PRIVATE.check_directory(path)
        try:
            descriptor = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return is_dead(os.lstat(path)) and _remove(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = _is_same_file(descriptor, path / _LOCK_NAME)
            return is_current and is_dead(os.fstat(descriptor)) and _remove(path)
        finally:
            os.close(descriptor)
    except OSError:
        return False


def _remove(path: Path) -> bool:
    """Remove the directory, at once for everybody else; what a kill leaves of it counts as dead."""
    trash = path.with_name(f"{_PREFIX}{uuid.uuid4().hex}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)
    return True
