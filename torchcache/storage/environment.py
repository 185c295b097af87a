"""One LMDB environment of this process: opened with every check, reopened when it has to be.

There is one ``Environment`` a directory and process, shared by all stores on it (LMDB refuses a second
handle). Transactions run inside the process gate and hold nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import lmdb

from torchcache import process
from torchcache.errors import StoreError
from torchcache.storage.directory import MARKER_NAME, TRASH_PREFIX, CacheDirectory

logger = logging.getLogger(__name__)

#: The layout of the databases and of the records in them; another one is never touched.
FORMAT = b"torchcache-1"

#: The kind of fault of an environment that another process removed a moment ago.
ABSENT = "absent"

#: The kind of fault of a read during which a writer may have used the pages again: it is worth another try.
OVERWRITTEN = "overwritten"

FORMAT_KEY = b"a format"
_LEAST_MAP_BYTES = 64 << 30
_SMALLEST_MAP_BYTES = 64 << 20
_RETRY_SECONDS = 1.0

#: So often an environment is opened that is still open in this process, so far apart.
_MOST_OPENINGS = 5
_OPENING_SECONDS = 0.01
_INODE_CHECK_SECONDS = 1.0
#: A damaged environment gets this suffix; one such is kept.
_SET_ASIDE = "damaged"
_MOST_READERS = 4096
_READER_BYTES = 64
_LOCK_HEADER_BYTES = 4096

#: What an empty environment takes besides its reader table: directory, first pages, format record.
_NEW_ENVIRONMENT_BYTES = 64 << 10

_environments: dict[str, Environment] = {}
_environments_lock = process.ForkLock()


@dataclass(frozen=True, slots=True)
class Handles:
    """An open environment and the file it was opened from. Not to be kept beyond one passage of the gate.

    Attributes:
        env: The environment.
        inode: Of its data file.
        is_read_only: Whether it can only be read.
        is_noted: Whether readers stand in the table in ``lock.mdb``, so that no writer uses their pages again.
        wanted_map_bytes: What was asked for as its map; an address space limit may have given less.
    """

    env: lmdb.Environment
    inode: int
    is_read_only: bool
    is_noted: bool
    wanted_map_bytes: int


class Environment:
    """The environment in one subdirectory of a cache directory.

    ``_handles`` is None while it is closed: before the first use, after a fork, after a fault. It is
    opened again by the next use, not sooner than a second after a failure.

    It is opened for writing as soon as one store of this process writes, and else only for reading: then
    nothing is made, neither files nor bytes in them, but for marks in a reader table that is there.
    """

    def __init__(self, directory: CacheDirectory, name: str, budget: int) -> None:
        self.directory = directory
        self._access = directory.access
        self.name = name
        self.path = directory.path / name
        self._size_for(budget)
        self._lock = process.ForkLock(on_broken=self._forsake)  # guards opening
        self._handles: Handles | None = None
        self._is_forsaken = False  # inherited through a fork that did not come to rest
        self._retry_at = 0.0
        self._failure: StoreError | None = None
        self._checked_at = 0.0
        process.listen_to_forks(self)

    def _size_for(self, budget: int) -> None:
        self._budget = budget
        self._map_bytes = max(_LEAST_MAP_BYTES, 1 << (4 * budget - 1).bit_length())

    def serve(self, directory: CacheDirectory, budget: int) -> None:
        """Suit one store more: open it for writing and with a larger map from the next use on, if the store needs that.

        Stores that read, or have a smaller budget, go on with the same handle. It is opened anew and not resized, since
        that would end transactions that are under way.
        """
        if directory.access.is_read_only:
            return
        with self._lock.raw:
            if self._access.is_read_only:
                self.directory, self._access = directory, directory.access
                self._size_for(budget)
            elif budget > self._budget:
                self._size_for(budget)

    def reading(self) -> _Reading:
        """Be inside one read transaction whose values are views that end with it.

        Raises:
            StoreError: If the environment cannot be used now.
        """
        return _Reading(self)

    @contextmanager
    def writing(self) -> Iterator[lmdb.Transaction]:
        """Be inside one write transaction; the directory's turn is held, so nobody waits here.

        Raises:
            StoreError: If it cannot be begun, or if the commit fails: nothing of it is stored then.
        """
        handles, passage = self.enter()
        try:
            with _translated(self.path):
                handles.env.reader_check()  # readers killed in a transaction pin pages for ever
                with handles.env.begin(write=True, buffers=True) as txn:
                    yield txn
                self._lengthen(handles)
        finally:
            passage.leave()

    def _lengthen(self, handles: Handles) -> None:
        """Give the file the length that LMDB says it has.

        Pages that a transaction took at the end and freed again are counted and never written (seen with
        lmdb 3.0 and deletions), and a file that is too short is taken for truncated when it is opened.
        """
        last_byte = (handles.env.info()["last_pgno"] + 1) * handles.env.stat()["psize"]
        if last_byte > _file_bytes(self.path / "data.mdb") and self._is_on_disk(handles):
            os.truncate(self.path / "data.mdb", last_byte)

    def last_page(self) -> int:
        """Return the number of the file's last page; inside a transaction only."""
        handles = self._handles
        return 0 if handles is None else int(handles.env.info()["last_pgno"])

    def is_present(self) -> bool:
        """Tell whether there is anything to read."""
        return self._handles is not None or self._exists()

    def ensure(self, allow: Callable[[int], bool]) -> bool:
        """Make the environment on disk if it is not there or is damaged; the turn is held.

        Args:
            allow: Measures, and tells whether so many bytes more are within the budget.

        Returns:
            Whether it is there now.

        Raises:
            StoreError: If it cannot be made, or must not be touched.
        """
        try:
            if self._exists():
                self._ready(at_once=True)
                return True
        except StoreError as error:
            if error.kind != "damaged" or self._is_forsaken:
                raise
            self.directory.check_ours(self.name)
            logger.warning("%s; it is set aside and started afresh", error)
        with _translated(self.path):
            with contextlib.suppress(OSError):
                os.rmdir(self.path)  # the empty place that announce() made
            if not self._is_vacant():
                self.close()
                self.directory.set_aside(self.name, _SET_ASIDE)
        if not allow(self.creation_bytes()):
            # What nobody can read must not keep the budget full.
            self.directory.remove(f"{self.name}.{_SET_ASIDE}")
            if not allow(self.creation_bytes()):
                return False
        self._create()
        return True

    def _is_vacant(self) -> bool:
        """Tell whether nothing is lost if the name is taken; another process may announce it at any time."""
        if self.path.is_symlink():
            return False
        try:
            return not os.listdir(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def announce(self) -> None:
        """Make the empty directory that the environment will take the place of.

        So its name can be seen before the first commit.

        Raises:
            StoreError: If it cannot be made.
        """
        with _translated(self.path):
            self._access.make_directory(self.path)

    def creation_bytes(self) -> int:
        """Return a bound of the bytes that a new environment takes."""
        return _LOCK_HEADER_BYTES + self._readers() * _READER_BYTES + _NEW_ENVIRONMENT_BYTES

    def _create(self) -> None:
        """Make an environment under another name and move it into place: what is there is whole."""
        with _translated(self.path):
            unfinished = self.directory.path / f"{TRASH_PREFIX}{uuid.uuid4().hex}"
            self._access.make_directory(unfinished)
            marker = unfinished / MARKER_NAME
            marker.touch()
            self._allocate_lock_file(unfinished)
            descriptor = os.open(unfinished, os.O_DIRECTORY | os.O_RDONLY)
            try:
                env = self._open_env(_pinned(descriptor, unfinished), self._readers())
            finally:
                os.close(descriptor)
            try:
                with env.begin(write=True) as txn:
                    txn.put(FORMAT_KEY, FORMAT)
                    txn.put(b"a created", str(int(time.time())).encode())
            finally:
                env.close()
            os.chmod(marker, self._access.file_mode)
            os.chmod(unfinished / "data.mdb", self._access.file_mode)  # LMDB obeys the umask
            os.rename(unfinished, self.path)
        self._failure, self._retry_at = None, 0.0

    def _exists(self) -> bool:
        try:
            os.stat(self.path / "data.mdb")
        except PermissionError:
            return True  # somebody else's: opening it says whose
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the handle if nobody is inside; the next use opens it again."""
        with process.gate.alone(process.FORK_DRAIN_SECONDS) as is_alone:
            if is_alone:
                self.at_rest()

    def is_current(self) -> bool:
        """Tell whether the files on disk are still those that are open, and open as they are wanted."""
        handles = self._handles
        if handles is None:
            return True
        is_writable = not handles.is_read_only or self._access.is_read_only
        is_large_enough = handles.wanted_map_bytes >= self._map_bytes  # a store with a larger budget may have come
        return is_writable and is_large_enough and self._is_on_disk(handles)

    def _is_on_disk(self, handles: Handles) -> bool:
        try:
            return os.stat(self.path / "data.mdb").st_ino == handles.inode
        except OSError:
            return False

    # -- forks ------------------------------------------------------------------------------------------------

    def before_fork(self, deadline: float) -> bool:  # noqa: ARG002 - the gate waits for transactions
        return True

    def at_rest(self) -> None:
        handles, self._handles = self._handles, None  # first: nobody may find it closed
        if handles is not None:
            handles.env.close()

    def after_fork_in_parent(self) -> None:
        pass

    def after_fork_in_child(self) -> None:
        if self._handles is not None:
            self._forsake()

    def _forsake(self) -> None:
        """Never touch what is open here, or was just being opened, at the fork."""
        self._is_forsaken = True

    # -- opening ----------------------------------------------------------------------------------------------

    def enter(self) -> tuple[Handles, process.Passage]:
        """Go through the gate with open handles; the caller leaves it."""
        handles = self._ready()
        passage = process.gate.enter()
        if handles is self._handles:
            return handles, passage
        try:
            return self._opened(), passage  # closed between the two, by a fork; inside the gate it stays open
        except BaseException:
            passage.leave()
            raise

    def _ready(self, *, at_once: bool = False) -> Handles:
        handles = self._handles
        now = time.monotonic()
        if handles is not None and not self._is_forsaken:
            if now - self._checked_at < _INODE_CHECK_SECONDS:
                return handles
            self._checked_at = now
            if self.is_current():
                return handles
            self.close()  # another process removed or replaced it
        return self._opened(at_once=at_once)

    def _opened(self, *, at_once: bool = False) -> Handles:
        now = time.monotonic()
        with self._lock.raw:
            if self._is_forsaken:
                raise StoreError("a fork interrupted a transaction; this process goes on in memory", kind="fork")
            if self._handles is not None:
                return self._handles
            if not at_once and now < self._retry_at and self._failure is not None:
                raise self._failure
            try:
                self._handles = self._open()
            except StoreError as error:
                if error.kind != ABSENT:
                    self._failure, self._retry_at = error, now + _RETRY_SECONDS
                raise
            self._checked_at = now
            return self._handles

    def _open(self) -> Handles:
        is_read_only = self._access.is_read_only
        wanted_map_bytes = self._map_bytes
        with _translated(self.path):
            if is_read_only:
                self.directory.check()
            # Pinned by descriptor: both files come from the directory that was checked, even if somebody
            # renames it meanwhile.
            try:
                descriptor = os.open(self.path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_RDONLY)
            except PermissionError:
                self._access.check_directory(self.path)  # says whose it is
                raise
            try:
                self._access.check_directory(self.path)
                if not is_read_only:
                    self._allocate_lock_file(self.path)
                for name in ("data.mdb", "lock.mdb"):
                    self._access.check_file(self.path / name)
                readers = self._noted_readers() if is_read_only else self._readers()
                try:
                    env = self._open_env(_pinned(descriptor, self.path), readers, is_read_only=is_read_only)
                except lmdb.Error as error:
                    if os.fstat(descriptor).st_nlink:
                        raise
                    raise FileNotFoundError(str(self.path)) from error  # removed while it was being opened
                inode = os.stat("data.mdb", dir_fd=descriptor).st_ino
            finally:
                os.close(descriptor)
            try:
                self._check(env)
            except BaseException:
                env.close()
                raise
            return Handles(env, inode, is_read_only, readers > 0, wanted_map_bytes)

    def _open_env(self, path: str, readers: int, *, is_read_only: bool = False) -> lmdb.Environment:
        map_bytes = max(self._map_bytes, _file_bytes(self.path / "data.mdb") * 2)
        tries = 0
        while True:
            tries += 1
            try:
                return lmdb.open(
                    path,
                    map_size=map_bytes,
                    subdir=True,
                    max_dbs=0,  # opening a named database takes LMDB's write mutex; the main one is enough
                    readonly=is_read_only,
                    lock=readers > 0,
                    max_readers=max(1, readers),
                    max_spare_txns=1,  # 0 takes a mutex shared between processes at every read
                    sync=True,
                    metasync=False,  # power loss costs at most the last commit, and half the fsyncs are saved
                    writemap=False,  # a full disk would be a SIGBUS
                    mode=self._access.file_mode,
                )
            except lmdb.MemoryError:
                map_bytes //= 2  # an address space limit; the budget still has to fit twice
                if map_bytes < max(2 * self._budget, _SMALLEST_MAP_BYTES):
                    raise
            except lmdb.Error as error:
                # An interrupted opening leaves a handle in the frames of its exception, until that was handled.
                if "already open" not in str(error) or tries >= _MOST_OPENINGS:
                    raise
                time.sleep(_OPENING_SECONDS)

    def _check(self, env: lmdb.Environment) -> None:
        last_byte = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if last_byte > _file_bytes(self.path / "data.mdb"):
            raise StoreError(f"{self.path} is truncated", kind="damaged")  # a read of it would be a SIGBUS
        with env.begin() as txn:
            found = txn.get(FORMAT_KEY)
        if found is None:
            raise StoreError(f"{self.path} holds another program's environment", kind="damaged")
        if found != FORMAT:
            raise StoreError(f"{self.path} has format {found!r}, this version reads {FORMAT!r}", kind="format")

    def _readers(self) -> int:
        # The table is part of the budget: a 64th of a small one, 4,096 readers from 16 MiB on.
        return max(126, min(_MOST_READERS, self._budget // (64 * _READER_BYTES)))

    def _noted_readers(self) -> int:
        """Return how many readers there is room for in the table, as who only reads must not make it longer.

        It is 0 where there is no table, or none that we may write: on a read-only file system, or in files of root.
        """
        name = self.path / "lock.mdb"
        if not os.access(name, os.R_OK | os.W_OK):
            return 0
        return max(0, min(self._readers(), (_file_bytes(name) - _LOCK_HEADER_BYTES) // _READER_BYTES))

    def _allocate_lock_file(self, path: Path) -> None:
        """Allocate lock.mdb in full: LMDB maps it, and on a full disk that would be a SIGBUS.

        Only while this process has the environment closed: closing a descriptor of lock.mdb gives up all
        locks that LMDB holds on it.
        """
        name = path / "lock.mdb"
        size = _LOCK_HEADER_BYTES + self._readers() * _READER_BYTES
        self._access.check_file(name)
        is_new = not name.exists()
        if not is_new and name.stat().st_size >= size:
            return
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            if is_new:
                os.fchmod(descriptor, self._access.file_mode)
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            if is_new:
                name.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def shared_environment(directory: CacheDirectory, name: str, budget: int) -> Environment:
    """Return this process's environment for a subdirectory, writable unless the directory is only read."""
    key = os.path.realpath(directory.path / name)
    with _environments_lock.raw:
        if key not in _environments:
            _environments[key] = Environment(directory, name, budget)
        else:
            _environments[key].serve(directory, budget)
        return _environments[key]


class _Reading:
    """A read transaction inside the gate; a class, since generators would double the cost of a single read.

    Of a reader that no table notes, a writer knows nothing: it uses pages of transaction ``n`` again from ``n + 3``
    on. What was read until then is right; afterwards bytes change under the reader's hands, so that not even
    a checksum helps.
    """

    __slots__ = ("_environment", "_handles", "_passage", "_txn")

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def __enter__(self) -> lmdb.Transaction:
        try:
            try:
                self._enter()
            except lmdb.MapResizedError:  # another process has a larger map; opened again, ours fits the file
                self._environment.close()
                self._enter()
        except BaseException as error:  # noqa: BLE001 - what is not LMDB's or the system's is raised as it is
            _raise_translated(self._environment.path, error)
        return self._txn

    def _enter(self) -> None:
        self._handles, self._passage = self._environment.enter()
        try:
            self._txn = self._begin(self._handles.env)
        except BaseException:
            self._passage.leave()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            is_overwritten = not self._handles.is_noted and self._was_overwritten()
            self._txn.abort()
        finally:
            self._passage.leave()
        if is_overwritten and (error is None or isinstance(error, Exception)):
            path = self._environment.path
            raise StoreError(f"{path} was overwritten while it was read", kind=OVERWRITTEN) from error
        if error is not None:
            _raise_translated(self._environment.path, error)

    def _was_overwritten(self) -> bool:
        # A transaction that is not committed yet may have written its pages.
        return int(self._handles.env.info()["last_txnid"]) + 1 >= self._txn.id() + 3

    @staticmethod
    def _begin(env: lmdb.Environment) -> lmdb.Transaction:
        try:
            return env.begin(buffers=True)
        except lmdb.ReadersFullError:
            env.reader_check()  # killed readers keep their slots until somebody looks
            return env.begin(buffers=True)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn what LMDB and the system raise into ``StoreError``."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what is not theirs is raised as it is
        _raise_translated(path, error)


_KINDS: dict[type[BaseException], str] = {
    lmdb.CorruptedError: "damaged",
    lmdb.InvalidError: "damaged",
    lmdb.PageNotFoundError: "damaged",
    lmdb.PanicError: "damaged",
    lmdb.DiskError: "disk",
    lmdb.MapFullError: "map_full",
    lmdb.MapResizedError: "map_resized",
    lmdb.ReadersFullError: "readers_full",
    lmdb.LockError: "lmdb_lock",
}


def _raise_translated(path: Path, error: BaseException) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise StoreError(f"{path} is gone", kind=ABSENT) from error
    if isinstance(error, lmdb.Error):
        raise StoreError(f"{path}: {error}", kind=_KINDS.get(type(error), "lmdb")) from error
    if isinstance(error, (OSError, MemoryError, RuntimeError)) and not isinstance(error, StoreError):
        raise StoreError(f"{path}: {error}", kind="disk") from error
    raise error


def _pinned(descriptor: int, path: Path) -> str:
    """Return a name of an open directory that nobody can take away, and that LMDB can read whatever is in ``path``."""
    pinned = f"/proc/self/fd/{descriptor}"
    return pinned if os.path.isdir(pinned) else str(path)


def _file_bytes(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
