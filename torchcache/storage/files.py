"""The files of one environment: made, checked, opened, given their length. What is open here is ``environment``'s."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import lmdb

from torchcache.errors import StoreError
from torchcache.kinds import Fault
from torchcache.storage.contract import StoreSettings
from torchcache.storage.directory import MARKER_NAME, TRASH_PREFIX, CacheDirectory
from torchcache.storage.faults import translated

#: The layout of the databases and of the records in them; another one is never touched.
FORMAT = b"torchcache-1"
FORMAT_KEY = b"a format"

_LEAST_MAP_BYTES = 64 << 30
_SMALLEST_MAP_BYTES = 64 << 20

#: How many times at most an environment is opened that this process still has open, and the pause between two tries.
_MOST_OPENINGS = 5
_OPENING_SECONDS = 0.01

_MOST_READERS = 4096
_LEAST_READERS = 126
_READER_BYTES = 64
_LOCK_HEADER_BYTES = 4096

#: The table of readers may take this share of the budget.
_READERS_SHARE = 64

#: What an empty environment takes besides its reader table: directory, first pages, format record.
_NEW_ENVIRONMENT_BYTES = 64 << 10


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


class EnvironmentFiles:
    """The subdirectory of one environment, as the stores of this process use it.

    The largest budget of those that write it decides how large its map and its table of readers are.

    Attributes:
        directory: The cache directory; the one of a store that writes as soon as there is one.
        name: Of the subdirectory.
        path: Of the subdirectory.
    """

    def __init__(self, directory: CacheDirectory, name: str, settings: StoreSettings) -> None:
        self.directory: CacheDirectory = directory
        self.name = name
        self.path: Path = directory.path / name
        self._users: set[StoreSettings] = set()
        self._add(settings)

    @property
    def is_read_only(self) -> bool:
        """Whether no store of this process writes it."""
        return self.directory.access.is_read_only

    def serve(self, directory: CacheDirectory, settings: StoreSettings) -> None:
        """Suit one store more, which writes; see ``Environment.serve``."""
        if self.is_read_only:  # the first store that writes: the others' budgets do not count
            self.directory = directory
            self._users.clear()
        self._add(settings)

    def _add(self, settings: StoreSettings) -> None:
        self._users.add(settings)
        self._map_bytes = max(_LEAST_MAP_BYTES, 1 << (4 * self._max_persistent_cache_size() - 1).bit_length())

    def _max_persistent_cache_size(self) -> int:
        """Return the largest budget of those that use it."""
        return max(settings.max_persistent_cache_size for settings in self._users)

    # -- what is on disk --------------------------------------------------------------------------------------------

    def exist(self) -> bool:
        """Tell whether the environment was made."""
        try:
            os.stat(self.path / "data.mdb")
        except PermissionError:
            return True  # somebody else's: opening it says whose
        except OSError:
            return False
        return True

    def is_vacant(self) -> bool:
        """Tell whether nothing is lost if the name is taken; another process may announce it at any time."""
        if self.path.is_symlink():
            return False
        try:
            return not os.listdir(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def are_open_as(self, handles: Handles) -> bool:
        """Tell whether the files on disk are those that are open, and open as they are wanted."""
        is_writable = not handles.is_read_only or self.is_read_only
        is_large_enough = handles.wanted_map_bytes >= self._map_bytes  # a store with a larger budget may have come
        return is_writable and is_large_enough and self._are_of(handles)

    def _are_of(self, handles: Handles) -> bool:
        try:
            return os.stat(self.path / "data.mdb").st_ino == handles.inode
        except OSError:
            return False

    def lengthen(self, handles: Handles) -> None:
        """Give the file the length that LMDB says it has.

        Pages that a transaction took at the end and freed again are counted and never written (seen with
        lmdb 3.0 and deletions), and a file that is too short is taken for truncated when it is opened.
        """
        last_byte = _last_byte(handles.env)
        if last_byte > _file_bytes(self.path / "data.mdb") and self._are_of(handles):
            os.truncate(self.path / "data.mdb", last_byte)

    # -- making -----------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Make the empty directory that the environment will take the place of.

        So its name can be seen before the first commit.

        Raises:
            StoreError: If it cannot be made.
        """
        with translated(self.path):
            self.directory.access.make_directory(self.path)

    def creation_bytes(self) -> int:
        """Return a bound of the bytes that a new environment takes."""
        return self._lock_file_bytes() + _NEW_ENVIRONMENT_BYTES

    def create(self) -> None:
        """Make an environment under another name and move it into place: what is there is whole.

        Raises:
            StoreError: If it cannot be made.
        """
        access = self.directory.access
        with translated(self.path):
            unfinished = self.directory.path / f"{TRASH_PREFIX}{uuid.uuid4().hex}"
            access.make_directory(unfinished)
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

            os.chmod(marker, access.file_mode)
            os.chmod(unfinished / "data.mdb", access.file_mode)  # LMDB obeys the umask
            os.rename(unfinished, self.path)

    # -- opening ----------------------------------------------------------------------------------------------------

    def open(self) -> Handles:
        """Open the environment, for writing unless no store of this process writes it.

        Raises:
            StoreError: If it is not there (``Fault.ABSENT``), must not be used, or cannot be read (``Fault.DAMAGED``).
        """
        access, is_read_only = self.directory.access, self.is_read_only
        wanted_map_bytes = self._map_bytes
        with translated(self.path):
            if is_read_only:
                self.directory.check()

            # Pinned by descriptor: both files come from the directory that was checked, even if somebody
            # renames it meanwhile.
            try:
                descriptor = os.open(self.path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_RDONLY)
            except PermissionError:
                access.check_directory(self.path)  # says whose it is
                raise
            try:
                access.check_directory(self.path)
                if not is_read_only:
                    self._allocate_lock_file(self.path)
                for name in ("data.mdb", "lock.mdb"):
                    access.check_file(self.path / name)
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
                    mode=self.directory.access.file_mode,
                )
            except lmdb.MemoryError:
                map_bytes //= 2  # an address space limit; the budget still has to fit twice
                if map_bytes < max(2 * self._max_persistent_cache_size(), _SMALLEST_MAP_BYTES):
                    raise
            except lmdb.Error as error:
                # An interrupted opening leaves a handle in the frames of its exception, until that was handled.
                if "already open" not in str(error) or tries >= _MOST_OPENINGS:
                    raise
                time.sleep(_OPENING_SECONDS)

    def _check(self, env: lmdb.Environment) -> None:
        """Check that what was opened is whole, and ours."""
        if _last_byte(env) > _file_bytes(self.path / "data.mdb"):
            raise StoreError(f"{self.path} is truncated", kind=Fault.DAMAGED)  # a read of it would be a SIGBUS
        with env.begin() as txn:
            found = txn.get(FORMAT_KEY)
        if found is None:
            raise StoreError(f"{self.path} holds another program's environment", kind=Fault.DAMAGED)
        if found != FORMAT:
            raise StoreError(f"{self.path} has format {found!r}, this version reads {FORMAT!r}", kind=Fault.FORMAT)

    # -- the table of readers, lock.mdb -----------------------------------------------------------------------------

    def _readers(self) -> int:
        # It is part of the budget: a 64th of a small one, 4,096 readers from 16 MiB on.
        affordable = self._max_persistent_cache_size() // (_READERS_SHARE * _READER_BYTES)
        return max(_LEAST_READERS, min(_MOST_READERS, affordable))

    def _noted_readers(self) -> int:
        """Return how many readers there is room for in the table, which a process that only reads must not extend.

        It is 0 where there is no table, or none that we may write: on a read-only file system, or in files of root.
        """
        name = self.path / "lock.mdb"
        if not os.access(name, os.R_OK | os.W_OK):
            return 0
        room = (_file_bytes(name) - _LOCK_HEADER_BYTES) // _READER_BYTES
        return max(0, min(self._readers(), room))

    def _lock_file_bytes(self) -> int:
        return _LOCK_HEADER_BYTES + self._readers() * _READER_BYTES

    def _allocate_lock_file(self, path: Path) -> None:
        """Allocate lock.mdb in full: LMDB maps it, and on a full disk that would be a SIGBUS.

        Only while this process has the environment closed: closing a descriptor of lock.mdb gives up all
        locks that LMDB holds on it.
        """
        name = path / "lock.mdb"
        size = self._lock_file_bytes()
        access = self.directory.access
        access.check_file(name)
        is_new = not name.exists()
        if not is_new and name.stat().st_size >= size:
            return
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            if is_new:
                os.fchmod(descriptor, access.file_mode)
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            if is_new:
                name.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def _last_byte(env: lmdb.Environment) -> int:
    """Return where the file ends by LMDB's count of its pages."""
    return int((env.info()["last_pgno"] + 1) * env.stat()["psize"])


def _pinned(descriptor: int, path: Path) -> str:
    """Return a name of an open directory that nobody can take away, and that LMDB can read whatever is in ``path``."""
    pinned = f"/proc/self/fd/{descriptor}"
    return pinned if os.path.isdir(pinned) else str(path)


def _file_bytes(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
