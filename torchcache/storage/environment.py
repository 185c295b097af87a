"""One LMDB environment of this process: opened with every check, reopened when it has to be.

There is one ``Environment`` a directory and process, shared by all stores on it (LMDB refuses a second
handle). Transactions run inside the process gate and hold nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import lmdb

from torchcache import process
from torchcache.errors import StoreError
from torchcache.kinds import Fault
from torchcache.storage.contract import StoreSettings
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.faults import raise_translated, translated
from torchcache.storage.files import EnvironmentFiles, Handles

logger: logging.Logger = logging.getLogger(__name__)

#: After a failure, how long an environment is not opened again.
_RETRY_SECONDS = 1.0

#: How often it is looked whether the files on disk are still those that are open.
_INODE_CHECK_SECONDS = 1.0

#: A damaged environment gets this suffix; one such is kept.
_SET_ASIDE = "damaged"

_environments: dict[str, Environment] = {}
_environments_lock = process.ForkLock()


class Environment:
    """The environment in one subdirectory of a cache directory.

    ``_handles`` is None while it is closed: before the first use, after a fork, after a fault. It is
    opened again by the next use, not sooner than a second after a failure.

    It is opened for writing as soon as one store of this process writes, and else only for reading: then
    nothing is made, neither files nor bytes in them, but for marks in a reader table that is there.
    """

    def __init__(self, directory: CacheDirectory, name: str, settings: StoreSettings) -> None:
        self.files: EnvironmentFiles = EnvironmentFiles(directory, name, settings)
        self.name = name
        self.path: Path = self.files.path
        self._lock = process.ForkLock(on_broken=self._forsake)  # guards opening
        self._handles: Handles | None = None
        self._is_forsaken = False  # inherited through a fork that did not come to rest
        self._retry_at = 0.0
        self._failure: StoreError | None = None
        self._checked_at = 0.0
        process.listen_to_forks(self)

    def serve(self, directory: CacheDirectory, settings: StoreSettings) -> None:
        """Suit one store more: open it for writing and with a larger map from the next use on, if the store needs that.

        Stores that read, or have a smaller budget, go on with the same handle. It is opened anew and not resized, since
        that would end transactions that are under way.
        """
        if directory.access.is_read_only:
            return
        with self._lock.raw:
            self.files.serve(directory, settings)

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
            with translated(self.path):
                handles.env.reader_check()  # readers killed in a transaction pin pages for ever
                with handles.env.begin(write=True, buffers=True) as txn:
                    yield txn
                self.files.lengthen(handles)
        finally:
            passage.leave()

    def last_page(self) -> int:
        """Return the number of the file's last page; inside a transaction only."""
        handles = self._handles
        return 0 if handles is None else int(handles.env.info()["last_pgno"])

    def is_present(self) -> bool:
        """Tell whether there is anything to read."""
        return self._handles is not None or self.files.exist()

    def ensure(self, allow: Callable[[int], bool]) -> bool:
        """Make the environment on disk if it is not there or is damaged. Requires the turn.

        Args:
            allow: Measures, and tells whether so many bytes more are within the budget.

        Returns:
            Whether it is there now.

        Raises:
            StoreError: If it cannot be made, or must not be touched.
        """
        files = self.files
        try:
            if files.exist():
                self._ready(at_once=True)
                return True
        except StoreError as error:
            if error.kind is not Fault.DAMAGED or self._is_forsaken:
                raise
            files.directory.check_ours(self.name)
            logger.warning("%s; it is set aside and started afresh", error)

        # The name has to be free: what is in the way is empty, or damaged.
        with translated(self.path):
            with contextlib.suppress(OSError):
                os.rmdir(self.path)  # the empty place that announce() made
            if not files.is_vacant():
                self.close()
                files.directory.set_aside(self.name, _SET_ASIDE)

        if not allow(files.creation_bytes()):
            # What nobody can read must not keep the budget full.
            files.directory.remove(f"{self.name}.{_SET_ASIDE}")
            if not allow(files.creation_bytes()):
                return False
        files.create()
        self._failure, self._retry_at = None, 0.0
        return True

    def close(self) -> None:
        """Close the handle if nobody is inside; the next use opens it again."""
        with process.gate.alone(process.FORK_DRAIN_SECONDS) as is_alone:
            if is_alone:
                self.at_rest()

    def is_current(self) -> bool:
        """Tell whether the files on disk are still those that are open, and open as they are wanted."""
        handles = self._handles
        return handles is None or self.files.are_open_as(handles)

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
                raise StoreError("a fork interrupted a transaction; this process goes on in memory", kind=Fault.FORK)
            if self._handles is not None:
                return self._handles
            if not at_once and now < self._retry_at and self._failure is not None:
                raise self._failure
            try:
                self._handles = self.files.open()
            except StoreError as error:
                if error.kind is not Fault.ABSENT:
                    self._failure, self._retry_at = error, now + _RETRY_SECONDS
                raise
            self._checked_at = now
            return self._handles


def shared_environment(directory: CacheDirectory, name: str, settings: StoreSettings) -> Environment:
    """Return this process's environment for a subdirectory, writable unless the directory is only read.

    Args:
        directory: The cache directory.
        name: Of the subdirectory.
        settings: Of the store that is going to use it.
    """
    key = os.path.realpath(directory.path / name)
    with _environments_lock.raw:
        environment = _environments.get(key)
        if environment is None:
            environment = _environments[key] = Environment(directory, name, settings)
        else:
            environment.serve(directory, settings)
        return environment


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
            raise_translated(self._environment.path, error)
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
            raise StoreError(f"{path} was overwritten while it was read", kind=Fault.OVERWRITTEN) from error
        if error is not None:
            raise_translated(self._environment.path, error)

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
