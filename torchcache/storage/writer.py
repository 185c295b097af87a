"""The background writer: a bounded queue in front of the stores, one thread a process.

Callers hand over rows and go on. The thread packs and compresses them outside every lock and commits
many at once; it starts with the first write, ends when it has been idle for a second, and comes to rest
for a fork. What is queued or being committed is a hit for this process. Other changes of a store (marks
of use, verdicts, deletions) go through the same queue, so that they keep their place among the rows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torchcache import exits, process
from torchcache.errors import StoreError
from torchcache.kinds import Drop
from torchcache.layout import Found, Layout, Rows, empty_rows
from torchcache.storage.backlogs import Backlog
from torchcache.storage.budget import MOST_COMMIT_ROWS
from torchcache.storage.contract import Packed, Written
from torchcache.storage.directory import TurnCancelledError

logger: logging.Logger = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0

#: How often whoever waits for the thread looks whether there is one.
_LOOK_SECONDS = 0.25

#: At most this many jobs make one commit.
_MOST_JOBS = 64

#: Tasks are small and rare; more than this many wait only if a store is stuck.
_MOST_TASKS = 1024

#: Bounds of the queue; a worker has less, which it can commit in the time that torch gives it to end.
DEFAULT_QUEUE_BYTES, WORKER_QUEUE_BYTES = int(64e6), int(16e6)


#: A change of a store that gets a function to ask whether to give up (``TurnCancelledError``); it is run
#: again then, so doing it twice must be doing it once.
Task = Callable[[Callable[[], bool]], object]


class WritableStore(Protocol):
    """What the writer needs of a store beyond the contract."""

    @property
    def path(self) -> Path: ...
    @property
    def most_commit_bytes(self) -> int: ...
    def shortage(self) -> Drop | None: ...
    def pack(self, namespace: bytes, rows: Rows) -> Packed: ...
    def put_many(self, packed: Sequence[Packed], cancel: Callable[[], bool] | None = None) -> Written: ...


class WriteObserver(Protocol):
    """Who is told what became of rows; called on the writer's thread, must not block."""

    def on_written(self, written: Written) -> None: ...
    def on_fault(self, error: BaseException, rows: int) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Rows of a namespace to write, in place of what is there or beside it, or a task."""

    store: WritableStore
    observer: WriteObserver
    namespace: bytes = b""
    rows: Rows | None = None
    replaces: bool = False
    task: Task | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.nbytes

    @property
    def packed_bytes(self) -> int:
        """About how many bytes its records have: the structure is in each of them."""
        return 0 if self.rows is None else self.n * _packed_bytes(self.rows)

    @property
    def n(self) -> int:
        return 0 if self.rows is None else len(self.rows.digests)


class Writer:
    """The queue and the thread of one process.

    Invariants: ``_bytes`` and ``_tasks`` are the sums of the jobs in ``_waiting`` and ``_under_way``, and
    ``_pending`` has exactly their rows less those that ``forget`` took out (and, in a forked child, those
    its parent had not committed yet).
    """

    def __init__(self) -> None:
        # Said ``with`` to instead of the condition, whose own __enter__ Ctrl-C could leave with the lock taken.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        self._waiting: deque[_Job] = deque()  # guarded by _mutex
        self._under_way: list[_Job] = []  # guarded by _mutex
        self._bytes = 0  # guarded by _mutex
        self._tasks = 0  # guarded by _mutex
        self._pending: dict[tuple[Path, bytes], tuple[Rows, int]] = {}  # guarded by _mutex
        self._thread: threading.Thread | None = None  # guarded by _mutex
        self._is_parked = False  # guarded by _mutex
        self._is_ended = False  # guarded by _mutex
        self._backlog = Backlog()  # guarded by _mutex
        process.listen_to_forks(self)

    # -- callers' side ------------------------------------------------------------------------------------------

    def put(
        self,
        store: WritableStore,
        observer: WriteObserver,
        namespace: bytes,
        rows: Rows,
        *,
        queue_bytes: int,
        timeout_seconds: float,
        flush_seconds: float | None = None,
        replaces: bool = False,
    ) -> bool:
        """Accept rows for the store; they must not change afterwards.

        Waits at most ``timeout_seconds`` while the queue holds more than ``queue_bytes``; rows that are
        larger than the whole queue are accepted when it is empty.

        Args:
            store: Where they go.
            observer: Told what became of them.
            namespace: Of all of them.
            rows: The rows.
            queue_bytes: Bound of the queue.
            timeout_seconds: How long to wait for room in it.
            flush_seconds: How long the end of the program may wait for it; None for the default.
            replaces: Whether they take the place of what is in the store or in the queue.

        Returns:
            Whether they were accepted.
        """
        job = _Job(store, observer, namespace=namespace, rows=rows, replaces=replaces)

        def has_room() -> bool:
            return self._bytes == 0 or self._bytes + job.nbytes <= queue_bytes or self._is_ended

        deadline = time.monotonic() + timeout_seconds
        with self._mutex:
            while not has_room():
                self._start()  # again after a fork, which ends the thread
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _LOOK_SECONDS))
            if self._is_ended:
                return False
            self._waiting.append(job)
            self._bytes += job.nbytes
            self._backlog.wait.add(flush_seconds)
            self._backlog.accept(job.n)
            for i, digest in enumerate(rows.digests):
                self._pending[store.path, namespace + digest] = (rows, i)
            self._start()
            self._changed.notify_all()
        exits.at_exit(self.end)
        return True

    def do(
        self, store: WritableStore, observer: WriteObserver, task: Task, *, flush_seconds: float | None = None
    ) -> bool:
        """Run a task on the writer's thread, after the rows accepted before it and before those after it.

        Never waits. The task changes the store and nothing else: no user code, no wait without a bound.

        Args:
            store: The one it changes.
            observer: Told if the task raises.
            task: What to run; see ``Task``.
            flush_seconds: How long the end of the program may wait for it; None for the default.

        Returns:
            Whether it was accepted: a task that finds too many waiting is dropped.
        """
        with self._mutex:
            if self._is_ended or self._tasks >= _MOST_TASKS:
                return False
            self._waiting.append(_Job(store, observer, task=task))
            self._tasks += 1
            self._backlog.wait.add(flush_seconds)
            self._backlog.accept(0)
            self._start()
            self._changed.notify_all()
        exits.at_exit(self.end)
        return True

    def forget(self, store: WritableStore, namespace: bytes, digests: Sequence[bytes] | None = None) -> None:
        """Let rows that are accepted and not committed be hits no longer; all of the namespace without digests.

        They may still be committed: a task behind them has to delete them.
        """
        with self._mutex:
            path = store.path
            if digests is None:
                keys = [key for key in self._pending if key[0] == path and key[1].startswith(namespace)]
            else:
                keys = [(path, namespace + digest) for digest in digests]
            for key in keys:
                self._pending.pop(key, None)

    def has_many(self, store: WritableStore, namespace: bytes, digests: Sequence[bytes]) -> list[bool]:
        """Tell of each digest whether its row is accepted and not committed yet."""
        if not self._pending:
            return [False] * len(digests)
        with self._mutex:
            path = store.path
            return [(path, namespace + digest) in self._pending for digest in digests]

    def get_many(
        self, store: WritableStore, namespace: bytes, digests: Sequence[bytes]
    ) -> tuple[list[Found], list[int]]:
        """Copy out rows that are accepted and not committed yet; also say which are not there."""
        if not self._pending:
            return [], list(range(len(digests)))
        by_layout: dict[Layout, list[tuple[int, Rows, int]]] = {}
        missing: list[int] = []
        with self._mutex:
            path = store.path
            for position, digest in enumerate(digests):
                place = self._pending.get((path, namespace + digest))
                if place is None:
                    missing.append(position)
                else:
                    by_layout.setdefault(place[0].layout, []).append((position, *place))
            self._resume()
        found = []
        for layout, places in by_layout.items():
            data = empty_rows(len(places), layout.nbytes)
            positions: list[int] = []
            for out, (position, rows, i) in zip(data, places, strict=True):
                out[:] = rows.data[i]
                positions.append(position)
            found.append(Found(positions, layout, data))
        return found, missing

    def queued(self, store: WritableStore) -> tuple[int, int]:
        """Return how many rows and bytes of a store are accepted and not committed."""
        with self._mutex:
            jobs = [job for job in (*self._waiting, *self._under_way) if job.store is store]
            return sum(job.n for job in jobs), sum(job.nbytes for job in jobs)

    def flush_seconds(self) -> float:
        """Return the longest that a caller let the end of the program wait; 0 if nothing was accepted."""
        return self._backlog.wait.seconds()

    def flush(self, timeout_seconds: float, store: WritableStore | None = None) -> bool:
        """Wait until everything accepted so far is committed or dropped; return whether it is.

        Without a thread (none can be started while the interpreter ends) the caller does the work.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._mutex:
            targets = {id(j) for j in (*self._waiting, *self._under_way) if store is None or j.store is store}

            def is_done() -> bool:
                return not any(id(job) in targets for job in (*self._waiting, *self._under_way))

            while not is_done():
                self._resume()
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if self._thread is None and not self._is_parked:  # a fork does not wait for a caller that works
                    self._mutex.release()
                    try:
                        self._work(until=deadline)
                    finally:
                        self._mutex.acquire()
                else:
                    self._changed.wait(min(left, _LOOK_SECONDS))
            return True

    def end(self) -> None:
        """Commit what is accepted, within the flush timeout; accept nothing more. Says what was lost."""
        flush_seconds = self.flush_seconds()
        deadline = time.monotonic() + flush_seconds
        self.flush(flush_seconds)
        with self._mutex:
            self._is_ended = True
            lost = sum(job.n for job in self._waiting)
            self._settle(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            # Another thread may have gone on writing: its last commit must not meet the removal of a
            # temporary directory.
            self._changed.wait_for(lambda: not self._under_way, timeout=max(0.0, deadline - time.monotonic()))
            lost += sum(job.n for job in self._under_way)
        if lost:
            logger.warning(
                "%d rows were not committed within flush_timeout_seconds=%g at the end of the program and "
                "are lost; they will be computed again", lost, flush_seconds,
            )  # fmt: skip

    # -- forks --------------------------------------------------------------------------------------------------

    def before_fork(self, deadline: float) -> bool:
        """Park the thread: it puts back what it has not committed and ends."""
        with self._mutex:
            self._is_parked = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))
        taken = self._mutex.acquire(timeout=process.FORK_LOCK_SECONDS)
        if taken:
            self._mutex.release()
        return taken and (thread is None or not thread.is_alive())

    def at_rest(self) -> None:
        pass

    def after_fork_in_parent(self) -> None:
        with self._mutex:
            self._is_parked = False
            # Else it starts with the next call, which may not come for long.
            if process.lets_threads_start():
                self._resume()

    def after_fork_in_child(self) -> None:
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        self._waiting, self._under_way, self._bytes, self._tasks = deque(), [], 0, 0
        self._thread, self._is_parked, self._is_ended = None, False, False
        self._backlog.renew()

    # -- the thread's side --------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the thread if there is none. Requires ``_mutex``."""
        if self._thread is not None or self._is_parked:
            return
        thread = threading.Thread(target=self._run, name="torchcache-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return  # the interpreter is ending; end() does the work itself
        self._thread = thread

    def _resume(self) -> None:
        if self._waiting:
            self._start()

    def _run(self) -> None:
        try:
            self._work(until=None)
        except BaseException:
            logger.exception("the writer thread failed; it starts again with the next write")
        finally:
            with self._mutex:
                if self._thread is threading.current_thread():
                    self._thread = None
                self._changed.notify_all()

    def _work(self, until: float | None) -> None:
        """Commit batches until there are none for a while, or until the time ``until``."""
        while until is None or time.monotonic() < until:
            with self._mutex:
                if until is None:
                    self._changed.wait_for(lambda: self._waiting or self._is_parked, timeout=_IDLE_SECONDS)
                if not self._waiting or self._is_parked:
                    if until is None:
                        self._thread = None  # under the lock: a put after this starts another
                    return
                batch = self._under_way = self._take_jobs()
            done: Sequence[_Job] = batch
            try:
                self._commit(batch)
            except TurnCancelledError:
                done = ()
            finally:
                with self._mutex:
                    if not done:
                        self._waiting.extendleft(reversed(batch))
                    self._under_way = []
                    self._settle(done)
                    self._changed.notify_all()

    def _take_jobs(self) -> list[_Job]:
        """Take the first job, and if it has rows those behind it that make a commit of the store's size."""
        batch = [self._waiting.popleft()]
        rows, nbytes = batch[0].n, batch[0].packed_bytes
        while batch[0].task is None and self._waiting and len(batch) < _MOST_JOBS:
            job = self._waiting[0]
            rows, nbytes = rows + job.n, nbytes + job.packed_bytes
            is_full = rows > MOST_COMMIT_ROWS or nbytes > job.store.most_commit_bytes
            if job.task is not None or job.store is not batch[0].store or is_full:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _commit(self, batch: list[_Job]) -> None:
        """Run a task, or pack and commit rows of one store; the observer is told what became of it.

        Raises:
            TurnCancelledError: If a fork is about to happen: all of it is to be done again.
            BaseException: What is no ``Exception``; it costs these rows as well.
        """
        store, observer, task = batch[0].store, batch[0].observer, batch[0].task
        left = sum(job.n for job in batch)
        try:
            if task is not None:
                task(self._cancels)
                return

            is_replacing = any(job.replaces for job in batch)  # what is there goes, room or not
            shortage = store.shortage() if left and not is_replacing else None
            if shortage:
                observer.on_written(Written(dropped={shortage: left}))
                return
            for packed in _commits_of(batch, store):
                observer.on_written(store.put_many(packed, self._cancels))
                left -= sum(len(item.digests) + sum(item.dropped.values()) for item in packed)
        except TurnCancelledError:
            raise
        except BaseException as error:  # whatever it is, it costs these rows
            observer.on_fault(error, left)
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, StoreError):
                logger.exception("a write failed in an unexpected way")

    def _cancels(self) -> bool:
        return self._is_parked

    def _settle(self, jobs: Collection[_Job]) -> None:
        """Remove finished jobs from the counters. Requires ``_mutex``."""
        for job in jobs:
            self._bytes -= job.nbytes
            self._tasks -= job.task is not None
            if job.rows is None:
                continue
            for digest in job.rows.digests:
                place = self._pending.get((job.store.path, job.namespace + digest))
                if place is not None and place[0] is job.rows:
                    del self._pending[job.store.path, job.namespace + digest]
        self._backlog.settle(len(jobs), sum(job.n for job in jobs))


def _commits_of(batch: Sequence[_Job], store: WritableStore) -> Iterator[list[Packed]]:
    """Pack the rows of a batch; yield what goes into one commit. Packs no more before that is asked for."""
    packed: list[Packed] = []
    for job in batch:
        if job.rows is None:
            continue
        is_large = job.packed_bytes > store.most_commit_bytes  # it is packed in parts
        for part in _parts(job.rows, store.most_commit_bytes):
            if packed and is_large:
                yield packed
                packed = []
            item = store.pack(job.namespace, part)
            packed.append(replace(item, replaces=part.digests) if job.replaces else item)
    if packed:
        yield packed


def _packed_bytes(rows: Rows) -> int:
    """Return about how many bytes one record of ``rows`` has."""
    return rows.layout.nbytes + len(rows.layout.structure)


def _parts(rows: Rows, most_bytes: int) -> list[Rows]:
    """Cut rows into pieces that a commit may have."""
    step = max(1, min(MOST_COMMIT_ROWS, most_bytes // max(1, _packed_bytes(rows))))
    if step >= len(rows.digests):
        return [rows]
    return [
        Rows(rows.digests[i : i + step], rows.layout, rows.data[i : i + step])
        for i in range(0, len(rows.digests), step)
    ]


writer: Writer = Writer()
