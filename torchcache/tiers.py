"""Where one cache keeps its rows: in memory, in the write queue, on disk. Their faults become misses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from torchcache import process
from torchcache.errors import StoreError
from torchcache.identity import Function, Look
from torchcache.layout import Found, Layout, Rows
from torchcache.memory import MemoryTier
from torchcache.notices import Notices
from torchcache.options import CacheOptions
from torchcache.own_keys import layout_without_seal
from torchcache.recheck import Verdicts
from torchcache.samples import Batch
from torchcache.storage.access import GROUP, PRIVATE
from torchcache.storage.contract import Verdict, Written
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.lmdb import LmdbStore, StoreSettings
from torchcache.storage.record import MAX_HEADER_BYTES, MAX_VALUE_BYTES
from torchcache.storage.temporary import temporary_directory
from torchcache.storage.writer import (
    DEFAULT_FLUSH_SECONDS,
    DEFAULT_QUEUE_BYTES,
    WORKER_FLUSH_SECONDS,
    WORKER_QUEUE_BYTES,
    writer,
)
from torchcache.structure import KnownClasses

#: What to say of rows that no record on disk can hold.
_TOO_LARGE = {
    "too_large": f"a value is larger than {MAX_VALUE_BYTES} bytes",
    "too_large_to_describe": f"what describes a value takes more than {MAX_HEADER_BYTES} bytes",
}

#: The devices of so many forms of calls are remembered.
_MOST_FORMS = 4096

#: The verdicts that caches of this process handed to the writer, by the path of the store and the namespace: another
#: cache of the same store needs them before they are on disk. Guarded by _judging.
_judged: OrderedDict[tuple[str, bytes], Verdict] = OrderedDict()
_judging = process.ForkLock()
_MOST_JUDGED = 4096


@dataclass(slots=True)
class CachedCall:
    """One cached call under way; ``source`` is where rows are looked up on disk, ``sink`` where they are written."""

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: Batch
    source: LmdbStore | None
    sink: LmdbStore | None
    namespace: bytes
    digests: list[bytes] = field(default_factory=list)
    keys: Sequence[bytes] | None = None  # of the user's own
    landings: int = 0  # of other threads' flights, before the tiers were asked
    is_unchecked: bool = False  # it is not known whether rows depend on their batch

    def rows_at(self, positions: Sequence[int]) -> list[bytes]:
        """Return the digests of the samples at ``positions``."""
        return self.digests if len(positions) == self.batch.n else [self.digests[p] for p in positions]


class ResultDevices:
    """Where computed results had their leaves, by the form of their calls and the devices of what went in.

    Rows say nothing of devices, and a key neither. Of whole calls each has a form of its own; one that was not computed
    here goes by the one computed last.

    Attributes:
        latest: Of the result that was computed last.
    """

    def __init__(self) -> None:
        self.latest: tuple[torch.device, ...] = ()
        self._lock = process.ForkLock()
        self._known: OrderedDict[tuple[object, ...], tuple[torch.device, ...]] = OrderedDict()  # guarded by _lock

    def note(self, call: CachedCall, module_device: torch.device | None, devices: tuple[torch.device, ...]) -> None:
        """Remember where a computed result has its leaves."""
        with self._lock.raw:
            self.latest = devices
            for form in _device_forms(call, module_device):
                self._known[form] = devices
                self._known.move_to_end(form)
                if len(self._known) > _MOST_FORMS:
                    self._known.popitem(last=False)

    def of(self, call: CachedCall, module_device: torch.device | None) -> tuple[torch.device, ...]:
        """Return where results of such a call have their leaves; nothing if none was computed here."""
        for form in _device_forms(call, module_device):
            devices = self._known.get(form)
            if devices is not None:
                return devices
        return ()


def _device_forms(call: CachedCall, module_device: torch.device | None) -> list[tuple[object, ...]]:
    """Return what the devices of a call's result depend on, the narrowest form first."""
    form = (call.namespace, module_device, *[tensor.device for tensor in call.batch.tensors])
    return [form] if call.batch.is_divisible else [(*form, call.digests[0]), form]


class Tiers:
    """Memory, write queue and disk of one cache.

    Args:
        options: Returns the options in force.
        notices: Counts and says what happens.
        verdicts: Learns what other processes found out.
        classes: Returns the user's own classes that results may be of.

    Attributes:
        known: The classes that stored results may be rebuilt from.
        devices: Where computed results had their leaves.
        on_touch: Called with a store now and then while its rows are used.
    """

    def __init__(
        self,
        options: Callable[[], CacheOptions],
        notices: Notices,
        verdicts: Verdicts,
        classes: Callable[[], tuple[type, ...]],
    ) -> None:
        self._options = options
        self._notices = notices
        self._verdicts = verdicts
        self._classes = classes
        self.known = KnownClasses()
        self.devices = ResultDevices()
        self.on_touch: Callable[[LmdbStore], None] | None = None
        self._opening = process.ForkLock()  # guards what is made at first use
        self._memory: MemoryTier | None = None
        self._stores: dict[tuple[str, bool], LmdbStore | None] = {}

    def look_up(self, call: CachedCall) -> tuple[list[Found], list[int]]:
        """Ask memory, the write queue and the disk in turn; what the disk gives goes to memory too."""
        digests = call.digests
        found: list[Found] = []
        missing = [*range(len(digests))]
        if self._memory is not None:
            found, missing = self.fetch("memory", call, missing)
        for tier in ("queue", "store"):
            if not missing or call.source is None:
                break
            # Equal rows are fetched once; the others of their kind are filled in from it.
            unique = sorted({digests[p]: p for p in reversed(missing)}.values()) if len(missing) > 1 else missing
            more, absent = self.fetch(tier, call, unique)
            if not more:
                continue
            for item in more:
                self._remember(call.namespace, Rows([digests[p] for p in item.positions], item.layout, item.data))
            if len(unique) == len(missing):
                found, missing = found + more, absent
            else:
                spread_out, missing = spread(more, digests, missing)
                found = found + spread_out
                filled_in = sum(len(item.positions) for item in spread_out) - sum(len(item.positions) for item in more)
                self._notices.counters.add(duplicates=filled_in)
        return found, missing

    def fetch(self, tier: str, call: CachedCall, positions: Sequence[int]) -> tuple[list[Found], list[int]]:
        """Ask one tier for the samples at ``positions``; faults become misses.

        Rows that were found by keys of the user's own are sealed (see ``own_keys``).
        """
        wanted = call.rows_at(positions)
        found: list[Found] = []
        missing: Sequence[int] = range(len(wanted))
        try:
            if tier == "memory":
                if self._memory is not None:
                    found, missing = self._memory.get_many(call.namespace, wanted)
            elif tier == "queue":
                found, missing = writer.get_many(_needed(call.source), call.namespace, wanted)
            else:
                found, missing = self._fetch_from_store(call, wanted)
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self._notices.error(error, 0)
            return [], list(positions)
        if not found:
            return [], list(positions)
        unknown = [item for item in found if not self._is_known(call, item.layout)]
        if unknown:
            found = [item for item in found if self._is_known(call, item.layout)]
            missing = sorted([*missing, *(p for item in unknown for p in item.positions)])
        self._notices.counters.add(**{f"{tier}_hits": len(wanted) - len(missing)})
        if len(positions) == call.batch.n:
            return found, list(missing)
        return (
            [Found([positions[p] for p in item.positions], item.layout, item.data) for item in found],
            [positions[p] for p in missing],
        )

    def _is_known(self, call: CachedCall, layout: Layout) -> bool:
        """Tell whether this process can rebuild the values of a layout that a tier gave for a call."""
        plain = layout if call.keys is None else layout_without_seal(layout)
        return plain is not None and call.batch.results.is_known(plain, self.known)

    def judge(self, call: CachedCall, verdict: Verdict) -> None:
        """Hand a verdict to the writer."""
        if call.sink is None:
            return
        with _judging.raw:
            _judged[str(call.sink.path), call.namespace] = verdict
            if len(_judged) > _MOST_JUDGED:
                _judged.popitem(last=False)
        self.do(call.sink, partial(call.sink.judge, call.namespace, verdict))

    def learn_verdict(self, call: CachedCall) -> None:
        """Ask the write queue and the disk whether rows of a call's namespace depend on their batch."""
        if call.source is None:
            return
        with _judging.raw:
            queued = _judged.get((str(call.source.path), call.namespace))
        if queued is not None:
            self._verdicts.note(call.namespace, queued)
            return
        try:
            self._fetch_from_store(call, [])
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self._notices.error(error, 0)

    def _fetch_from_store(self, call: CachedCall, digests: Sequence[bytes]) -> tuple[list[Found], list[int]]:
        namespace, sink = call.namespace, call.sink
        lookup = _needed(call.source).get_many(namespace, digests)
        if lookup.corrupt:
            self._notices.fault("corrupt_record", "records fail their check", amount=lookup.corrupt)
        if lookup.verdict is not Verdict.UNKNOWN and self._verdicts.of(namespace) is Verdict.UNKNOWN:
            self._verdicts.note(namespace, lookup.verdict)
        if lookup.found and sink is not None and sink.needs_touch(namespace):
            self.touch(sink, namespace)
            if self.on_touch is not None:
                self.on_touch(sink)
        return lookup.found, lookup.missing

    def replace(self, call: CachedCall, rows: Rows) -> None:
        """Keep rows in place of what is cached for their samples."""
        if self._memory is not None:
            self._memory.delete_many(call.namespace, rows.digests)
        if not self.keep(call, rows, replaces=True):
            self._forget_on_disk(call, rows.digests)

    def forget(self, call: CachedCall, digests: Sequence[bytes]) -> None:
        """Forget what is cached for samples that came out otherwise now and cannot be kept."""
        if self._memory is not None:
            self._memory.delete_many(call.namespace, digests)
        self._forget_on_disk(call, digests)

    def _forget_on_disk(self, call: CachedCall, digests: Sequence[bytes]) -> None:
        if call.sink is not None:
            writer.forget(call.sink, call.namespace, digests)
            self.do(call.sink, partial(call.sink.delete_many, call.namespace, digests))

    def keep(self, call: CachedCall, rows: Rows, *, replaces: bool = False) -> bool:
        """Keep rows in memory and hand them to the writer; return whether it took them."""
        self._remember(call.namespace, rows)
        return call.sink is not None and self.store(call.sink, call.namespace, rows, replaces=replaces)

    def store(self, sink: LmdbStore, namespace: bytes, rows: Rows, *, replaces: bool) -> bool:
        """Hand rows to the writer; return whether it took them."""
        queue_bytes, flush_seconds = self._options().queue_bytes, self._flush_seconds()
        if queue_bytes is None:
            queue_bytes = WORKER_QUEUE_BYTES if process.is_child() else DEFAULT_QUEUE_BYTES
        try:
            accepted = writer.put(
                sink,
                self,
                namespace,
                rows,
                queue_bytes=queue_bytes,
                timeout_seconds=self._options().queue_timeout_seconds,
                flush_seconds=flush_seconds,
                replaces=replaces,
            )
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self._notices.error(error, len(rows.digests))
            return False
        if not accepted:
            self._notices.counters.add_to("dropped_rows", "queue_full", len(rows.digests))
            self._notices.say(
                "queue_full", "the write queue stayed full for queue_timeout_seconds; rows are not stored on disk"
            )
        return accepted

    def touch(self, store: LmdbStore, namespace: bytes) -> None:
        """Note on disk that a namespace is in use."""
        self.do(store, partial(store.touch, namespace))

    def do(self, store: LmdbStore, task: Callable[[Callable[[], bool]], object]) -> None:
        writer.do(store, self, task, flush_seconds=self._flush_seconds())

    def _flush_seconds(self) -> float:
        configured = self._options().flush_timeout_seconds
        if configured is not None:
            return configured
        return WORKER_FLUSH_SECONDS if process.is_child() else DEFAULT_FLUSH_SECONDS

    def _remember(self, namespace: bytes, rows: Rows) -> None:
        latest = self.devices.latest
        if self._memory is None and self._options().memory_cache_device is None and latest:
            self._memory = MemoryTier(self._options().max_memory_cache_size, latest[0])
        if self._memory is None:
            return
        try:
            self._memory.put_many(namespace, rows)
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
            self._notices.fault("memory", f"the memory tier cannot grow ({error})")

    def places(self, look: Look, namespace: bytes, digests: Sequence[bytes]) -> list[str]:
        """Say of each sample which tier has it."""
        store = self.open(look)
        places = ["nowhere"] * len(digests)
        if store is not None:
            try:
                missing = set(store.get_many(namespace, digests).missing)
            except StoreError as error:
                self._notices.error(error, 0)
                missing = set(range(len(digests)))
            places = ["nowhere" if i in missing else "store" for i in range(len(digests))]
            queued = writer.has_many(store, namespace, digests)
            places = ["queue" if here else place for here, place in zip(queued, places, strict=True)]
        if self._memory is not None:
            kept = self._memory.has_many(namespace, digests)
            places = ["memory" if here else place for here, place in zip(kept, places, strict=True)]
        return places

    def on_written(self, written: Written) -> None:
        """Count a commit; called by the writer."""
        self._notices.counters.add(written_rows=written.rows, written_bytes=written.nbytes)
        for reason, amount in written.dropped.items():
            self._notices.counters.add_to("dropped_rows", reason, amount)
            if reason in _TOO_LARGE:
                self._notices.say(reason, f"{_TOO_LARGE[reason]}, so it is not stored on disk ({reason}, said once)")

    def on_fault(self, error: BaseException, rows: int) -> None:
        """Note a fault, and rows that were not stored; called by the writer."""
        self._notices.error(error, rows)

    def open(self, look: Look) -> LmdbStore | None:
        """Return the store for what was looked at, made at its first use; also see to the memory tier."""
        place = look.module_hash, look.is_private
        if place in self._stores:
            return self._stores[place]
        with self._opening.raw:
            if place not in self._stores:
                for cls in self._classes():
                    self.known.learn(cls)
                options = self._options()
                if self._memory is None and options.max_memory_cache_size and options.memory_cache_device is not None:
                    self._memory = MemoryTier(options.max_memory_cache_size, options.memory_cache_device)
                self._stores[place] = self._make_store(look)
            return self._stores[place]

    def _make_store(self, look: Look) -> LmdbStore | None:
        options = self._options()
        if not options.persistent or not options.max_persistent_cache_size or not look.module_hash:
            return None
        is_temporary = look.is_private or options.persistent_cache_dir is None
        if options.mode == "off" or (is_temporary and not options.writes):
            return None
        settings = StoreSettings(
            budget_bytes=options.max_persistent_cache_size,
            eviction=options.eviction,
            zstd_level=options.zstd_compression_level if options.zstd_compression else None,
            lock_timeout_seconds=options.lock_timeout_seconds,
            min_free_bytes=options.min_free_disk,
        )
        try:
            if look.is_private or options.persistent_cache_dir is None:
                directory = CacheDirectory(temporary_directory(), before_turn=temporary_directory)
            else:
                access = GROUP if options.shared else PRIVATE
                directory = CacheDirectory(
                    options.persistent_cache_dir, access if options.writes else access.read_only()
                )
            store = LmdbStore(directory, look.module_hash, settings)
            if options.writes:
                store.announce()
        except Exception as error:  # noqa: BLE001 - a fault of the machine: the run goes on in memory
            self._notices.error(error, 0)
            return None
        return store

    def open_stores(self) -> list[LmdbStore]:
        return [store for store in list(self._stores.values()) if store is not None]

    def forget_namespace(self, call: CachedCall) -> None:
        """Forget all rows of a call's namespace that are not on disk yet."""
        if self._memory is not None:
            self._memory.delete_namespace(call.namespace)
        if call.sink is not None:
            writer.forget(call.sink, call.namespace)

    def usage(self) -> dict[str, int]:
        """Return what is held now, by the names of ``CacheStats``."""
        values: dict[str, int] = {}
        if self._memory is not None:
            values["memory_rows"], values["memory_bytes"] = self._memory.usage()
        for store in self.open_stores():
            rows, nbytes = writer.queued(store)
            values["queued_rows"] = values.get("queued_rows", 0) + rows
            values["queued_bytes"] = values.get("queued_bytes", 0) + nbytes
            values["store_bytes"] = store.used_bytes()
        return values

    def flush(self, timeout_seconds: float | None) -> bool:
        """Wait until every row accepted so far is committed, or dropped and counted; tell whether that was in time."""
        timeout_seconds = self._flush_seconds() if timeout_seconds is None else timeout_seconds
        are_flushed = [writer.flush(timeout_seconds, store) for store in self.open_stores()]
        return all(are_flushed)

    def clear_memory(self) -> None:
        """Forget every row in memory."""
        if self._memory is not None:
            self._memory.clear()

    def clear_disk(self) -> None:
        """Delete every row on disk, for all processes."""
        for store in self.open_stores():
            try:
                store.delete_all()
            except Exception as error:  # noqa: BLE001 - a fault of the machine is a counter and a line
                self._notices.error(error, 0)

    def close(self) -> None:
        """Give up memory and disk handles; the next call opens both again."""
        self.clear_memory()
        for store in self.open_stores():
            store.close()
        self._memory, self._stores = None, {}


def spread(found: Sequence[Found], digests: Sequence[bytes], positions: Sequence[int]) -> tuple[list[Found], list[int]]:
    """Give each of ``positions`` the row that was found for an equal sample; return what is still missing."""
    source = {digests[p]: (k, row) for k, item in enumerate(found) for row, p in enumerate(item.positions)}
    takers: list[tuple[list[int], list[int]]] = [([], []) for _ in found]
    missing: list[int] = []
    for position in positions:
        place = source.get(digests[position])
        if place is None:
            missing.append(position)
        else:
            takers[place[0]][0].append(position)
            takers[place[0]][1].append(place[1])
    spread = [
        Found(where, item.layout, item.data[rows]) for item, (where, rows) in zip(found, takers, strict=True) if where
    ]
    return spread, missing


def _needed(store: LmdbStore | None) -> LmdbStore:
    assert store is not None
    return store
