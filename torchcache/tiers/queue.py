"""The write queue as a tier: rows on their way to one store, which are hits until they are committed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torchcache import process, starters
from torchcache.layout import Rows
from torchcache.options import CacheOptions
from torchcache.storage.backlogs import default_flush_seconds
from torchcache.storage.contract import Lookup, Verdict
from torchcache.storage.key_parts_file import KeptState, Row
from torchcache.storage.lmdb import LmdbStore
from torchcache.storage.writer import DEFAULT_QUEUE_BYTES, WORKER_QUEUE_BYTES, Task, WriteObserver, writer

#: The verdicts that caches of this process handed to the writer, by the path of the store and the namespace: another
#: cache of the same store needs them before they are on disk. Guarded by _judging.
_judged: OrderedDict[tuple[str, bytes], Verdict] = OrderedDict()
_judging = process.ForkLock()
_MOST_JUDGED = 4096


class WriteQueue:
    """What one cache hands to this process's writer for one store.

    Every change of the store goes through it, so that it keeps its place among the rows.

    Args:
        store: Where rows end up.
        observer: Is told what became of them, on the writer's thread.
        options: How much may wait, and how long.
    """

    name = "queue"

    def __init__(self, store: LmdbStore, observer: WriteObserver, options: CacheOptions) -> None:
        self._store = store
        self._observer = observer
        self._options = options

    # -- as a tier --------------------------------------------------------------------------------------------------

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        found, missing = writer.get_many(self._store, namespace, digests)
        return Lookup(found, missing)

    def has_many(self, namespace: bytes, digests: Sequence[bytes]) -> list[bool]:
        return writer.has_many(self._store, namespace, digests)

    def put_many(self, namespace: bytes, rows: Rows, *, replaces: bool = False) -> bool:
        """Hand rows to the writer; waits at most ``queue_timeout_seconds`` while the queue is full."""
        return writer.put(
            self._store,
            self._observer,
            namespace,
            rows,
            queue_bytes=self._queue_bytes(),
            timeout_seconds=self._options.queue_timeout_seconds,
            flush_seconds=self._options.flush_timeout_seconds,
            replaces=replaces,
        )

    def delete_many(self, namespace: bytes, digests: Sequence[bytes]) -> None:
        """Let rows that wait be hits no longer, and delete them from the store when their turn comes."""
        writer.forget(self._store, namespace, digests)
        self._do(partial(self._store.delete_many, namespace, digests))

    # -- other changes of the store ---------------------------------------------------------------------------------

    def forget_namespace(self, namespace: bytes) -> None:
        """Let all rows of a namespace that wait be hits no longer; what is in the store stays."""
        writer.forget(self._store, namespace)

    def touch(self, namespace: bytes) -> None:
        """Note in the store that a namespace is in use."""
        self._do(partial(self._store.touch, namespace))

    def note_parts(self, target: str, module: tuple[Row, ...], state: KeptState) -> None:
        """Keep the parts of a key beside the rows of the store."""
        self._do(partial(self._store.note_parts, target, module, state))

    def judge(self, namespace: bytes, verdict: Verdict) -> None:
        """Record in the store whether rows of a namespace depend on their batch."""
        key = str(self._store.path), namespace
        with _judging.raw:
            if verdict.replaces(_judged.get(key, Verdict.UNKNOWN)):
                _judged[key] = verdict
            if len(_judged) > _MOST_JUDGED:
                _judged.popitem(last=False)
        self._do(partial(self._store.judge, namespace, verdict))

    def judged(self, namespace: bytes) -> Verdict:
        """Return the verdict that any cache of this process handed over for a namespace."""
        with _judging.raw:
            return _judged.get((str(self._store.path), namespace), Verdict.UNKNOWN)

    # -- what waits -------------------------------------------------------------------------------------------------

    def usage(self) -> tuple[int, int]:
        """Return how many rows and bytes wait to be committed."""
        return writer.queued(self._store)

    def flush(self, timeout_seconds: float | None) -> bool:
        """Wait until every row accepted so far is committed, or dropped and counted; tell whether that was in time."""
        if timeout_seconds is None:
            timeout_seconds = self._options.flush_timeout_seconds
        if timeout_seconds is None:
            timeout_seconds = default_flush_seconds()
        return writer.flush(timeout_seconds, self._store)

    def _do(self, task: Task) -> None:
        writer.do(self._store, self._observer, task, flush_seconds=self._options.flush_timeout_seconds)

    def _queue_bytes(self) -> int:
        configured = self._options.queue_bytes
        if configured is not None:
            return configured
        return WORKER_QUEUE_BYTES if starters.is_child() else DEFAULT_QUEUE_BYTES  # it may have become one by a fork
