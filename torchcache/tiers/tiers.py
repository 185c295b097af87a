"""Where one cache keeps its rows: tiers that are asked in order, whose faults become misses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torchcache import process
from torchcache.errors import StoreError
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.identity import Look
from torchcache.kinds import Drop, Fault
from torchcache.layout import Found, Layout, Rows, at_positions
from torchcache.options import CacheOptions
from torchcache.report.notices import Notices
from torchcache.results.classes import KnownClasses
from torchcache.results.devices import ResultDevices
from torchcache.results.seals import layout_without_seal
from torchcache.storage.contract import Lookup, Verdict, Written
from torchcache.storage.key_parts_file import KeptState, Row
from torchcache.storage.lmdb import LmdbStore
from torchcache.storage.record import MAX_HEADER_BYTES, MAX_VALUE_BYTES
from torchcache.tiers.disk import StoreTier, make_store
from torchcache.tiers.memory import MemoryTier
from torchcache.tiers.queue import WriteQueue
from torchcache.tiers.tier import Tier

#: What to say of rows that no record on disk can hold.
_TOO_LARGE = {
    Drop.TOO_LARGE: f"a value is larger than {MAX_VALUE_BYTES} bytes",
    Drop.TOO_LARGE_TO_DESCRIBE: f"what describes a value takes more than {MAX_HEADER_BYTES} bytes",
}


@dataclass(frozen=True, slots=True)
class _Disk:
    """One store as tiers, the first of which takes what is written."""

    queue: WriteQueue
    store: StoreTier

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Both, in the order in which they are asked."""
        return self.queue, self.store


class Tiers:
    """The tiers of one cache: memory, then for each store its write queue and the store itself.

    A row that is found below memory is put into it.

    Args:
        options: Those in force.
        notices: Counts and says what happens.

    Attributes:
        known: The classes that stored results may be rebuilt from.
        devices: Where computed results had their leaves.
    """

    def __init__(self, options: CacheOptions, notices: Notices) -> None:
        self._options = options
        self._notices = notices
        self.known: KnownClasses = KnownClasses()
        self.devices: ResultDevices = ResultDevices()
        self._notes: tuple[bytes, Collection[bytes]] | None = None  # what ``keep_in_use`` was told last
        self._opening = process.ForkLock()
        # Made at first use, and taken away by close() at any time, so whoever uses them reads them once:
        self._memory: MemoryTier | None = None
        self._stores: dict[tuple[str, bool], LmdbStore | None] = {}  # by module hash, and whether that is private
        self._disks: dict[LmdbStore, _Disk] = {}

    # -- looking up -------------------------------------------------------------------------------------------------

    def look_up(self, call: CachedCall) -> Lookup:
        """Ask the tiers in turn for the rows of a call.

        Rows that were found by keys of the user's own are sealed (see ``sample_keys``).

        Returns:
            What was found and what is missing, by positions in the call; and the verdict that a tier had.
        """
        every = range(call.batch.n)
        memory = self._memory
        lookup = Lookup([], list(every)) if memory is None else self._ask(memory, call, every)
        if lookup.missing and call.source is not None:
            return self._look_below(call, call.source, lookup)
        return lookup

    def look_in_memory(self, call: CachedCall, positions: Sequence[int]) -> list[Found]:
        """Ask memory alone for some rows of a call, which another thread may have put there since ``look_up``."""
        memory = self._memory
        if memory is None:
            return []
        return self._ask(memory, call, positions).found

    def find_verdict(self, call: CachedCall) -> Verdict:
        """Ask the write queue and the disk whether rows of a call's namespace depend on their batch."""
        if call.source is None:
            return Verdict.UNKNOWN
        disk = self._disk_of(call.source)
        queued = disk.queue.judged(call.namespace)
        if queued is not Verdict.UNKNOWN:
            return queued
        return self._ask(disk.store, call, ()).verdict

    def places(self, look: Look, namespace: bytes, digests: Sequence[bytes]) -> list[str]:
        """Say of each sample which tier has it."""
        places = ["nowhere"] * len(digests)
        for tier in reversed(self._tiers_of(self.open(look))):
            try:
                here = tier.has_many(namespace, digests)
            except StoreError as error:
                self._notices.error(error, 0)
                continue
            for position, is_here in enumerate(here):
                if is_here:
                    places[position] = tier.name
        return places

    def _look_below(self, call: CachedCall, source: LmdbStore, above: Lookup) -> Lookup:
        """Ask the tiers below memory for what it does not have; what they have goes to memory too."""
        digests = call.digests
        found, missing = list(above.found), above.missing
        verdict = Verdict.UNKNOWN
        for tier in self._disk_of(source).tiers:
            if not missing:
                break
            # Equal rows are fetched once; the others of their kind are filled in from it.
            unique = _first_of_equals(digests, missing)
            lookup = self._ask(tier, call, unique)
            if lookup.verdict is not Verdict.UNKNOWN:
                verdict = lookup.verdict
            if not lookup.found:
                continue
            for item in lookup.found:
                of_item = [digests[p] for p in item.positions]
                self._remember(call.namespace, Rows(of_item, item.layout, item.data))

            if len(unique) == len(missing):
                found += lookup.found
                missing = lookup.missing
            else:
                spread_out, missing = spread(lookup.found, digests, missing)
                found += spread_out
                self._notices.counters.add(duplicates=_count(spread_out) - _count(lookup.found))
        return Lookup(found, missing, verdict=verdict)

    def _ask(self, tier: Tier, call: CachedCall, positions: Sequence[int]) -> Lookup:
        """Ask one tier for some rows of a call; its faults become misses, and its hits are counted.

        Returns:
            What it has, by positions in the call.
        """
        is_whole = len(positions) == call.batch.n
        wanted = call.digests
        if not is_whole:
            wanted = [call.digests[p] for p in positions]
        try:
            lookup = tier.get_many(call.namespace, wanted)
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self._notices.error(error, 0)
            return Lookup([], list(positions))
        if lookup.corrupt:
            self._notices.fault(Fault.CORRUPT_RECORD, "records fail their check", amount=lookup.corrupt)

        for item in lookup.found:
            if not self._is_known(call, item.layout):
                lookup = self._without_unknown(call, lookup)
                break
        if not lookup.found:
            return Lookup([], list(positions), verdict=lookup.verdict)
        n_hits = len(wanted) - len(lookup.missing)
        self._notices.counters.add(**{f"{tier.name}_hits": n_hits})
        if is_whole:
            return lookup
        missing = [positions[i] for i in lookup.missing]
        return Lookup(at_positions(lookup.found, positions), missing, verdict=lookup.verdict)

    def _is_known(self, call: CachedCall, layout: Layout) -> bool:
        """Tell whether this process can rebuild the values of a layout that a tier gave for a call."""
        plain: Layout | None = layout
        if call.keys is not None:
            plain = layout_without_seal(layout)
        if plain is None:
            return False
        return call.batch.results.is_known(plain, self.known)

    def _without_unknown(self, call: CachedCall, lookup: Lookup) -> Lookup:
        """Count as missing what this process cannot rebuild."""
        found: list[Found] = []
        missing = list(lookup.missing)
        for item in lookup.found:
            if self._is_known(call, item.layout):
                found.append(item)
            else:
                missing += item.positions
        return Lookup(found, sorted(missing), verdict=lookup.verdict)

    # -- keeping and forgetting -------------------------------------------------------------------------------------

    def keep(self, call: CachedCall, rows: Rows, *, replaces: bool = False) -> bool:
        """Keep rows in memory and hand them to the writer; return whether it took them."""
        self._remember(call.namespace, rows, replaces=replaces)
        if call.sink is None:
            return False
        return self.store(call.sink, call.namespace, rows, replaces=replaces)

    def replace(self, call: CachedCall, rows: Rows) -> None:
        """Keep rows in place of what is cached for their samples."""
        is_handed_over = self.keep(call, rows, replaces=True)
        if not is_handed_over and call.sink is not None:
            self._disk_of(call.sink).queue.delete_many(call.namespace, rows.digests)

    def forget(self, call: CachedCall, digests: Sequence[bytes]) -> None:
        """Forget what is cached for samples that came out otherwise now and cannot be kept."""
        memory = self._memory
        if memory is not None:
            memory.delete_many(call.namespace, digests)
        if call.sink is not None:
            self._disk_of(call.sink).queue.delete_many(call.namespace, digests)

    def forget_namespace(self, call: CachedCall) -> None:
        """Forget all rows of a call's namespace that are not on disk yet."""
        memory = self._memory
        if memory is not None:
            memory.delete_namespace(call.namespace)
        if call.sink is not None:
            self._disk_of(call.sink).queue.forget_namespace(call.namespace)

    def judge(self, call: CachedCall, verdict: Verdict) -> None:
        """Hand a verdict to the writer."""
        if call.sink is not None:
            self._disk_of(call.sink).queue.judge(call.namespace, verdict)

    def store(self, sink: LmdbStore, namespace: bytes, rows: Rows, *, replaces: bool) -> bool:
        """Hand rows to the writer; return whether it took them."""
        try:
            is_accepted = self._disk_of(sink).queue.put_many(namespace, rows, replaces=replaces)
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self._notices.error(error, len(rows.digests))
            return False
        if not is_accepted:
            self._notices.drop(Drop.QUEUE_FULL, len(rows.digests))
            self._notices.say(
                Drop.QUEUE_FULL, "the write queue stayed full for queue_timeout_seconds; rows are not stored on disk"
            )
        return is_accepted

    def touch(self, store: LmdbStore, namespace: bytes) -> None:
        """Note on disk that a namespace is in use."""
        self._disk_of(store).queue.touch(namespace)

    def note_parts(self, store: LmdbStore, target: str, module: tuple[Row, ...], state: KeptState) -> None:
        """Keep the parts of a key on disk, for programs that find nothing."""
        self._disk_of(store).queue.note_parts(target, module, state)

    def keep_in_use(self, namespace: bytes, digests: Collection[bytes]) -> None:
        """Let notes be in use on disk as long as rows of their store are; those named before no longer count.

        Args:
            namespace: Of the notes.
            digests: Theirs; read whenever rows are in use, so it may grow.
        """
        self._notes = namespace, digests

    def _remember(self, namespace: bytes, rows: Rows, *, replaces: bool = False) -> None:
        """Put rows into memory, which is made where the latest result was if no device is configured."""
        memory = self._memory
        if memory is None:
            latest = self.devices.latest
            if self._options.memory_cache_device is not None or not latest:
                return
            memory = MemoryTier(self._options.max_memory_cache_size, latest[0])
            self._memory = memory
        try:
            memory.put_many(namespace, rows, replaces=replaces)
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
            self._notices.fault(Fault.MEMORY, f"the memory tier cannot grow ({error})")

    # -- what the tiers tell ----------------------------------------------------------------------------------------

    def on_written(self, written: Written) -> None:
        """Count a commit; called by the writer."""
        self._notices.counters.add(written_rows=written.rows, written_bytes=written.nbytes)
        for kind, amount in written.dropped.items():
            self._notices.drop(kind, amount)
            if kind in _TOO_LARGE:
                self._notices.say(kind, f"{_TOO_LARGE[kind]}, so it is not stored on disk ({kind}, said once)")

    def on_fault(self, error: BaseException, rows: int) -> None:
        """Note a fault, and rows that were not stored; called by the writer."""
        self._notices.error(error, rows)

    def on_used(self, store: LmdbStore) -> None:
        """Let the notes on which rows of a store depend be in use as well."""
        if self._notes is None:
            return
        namespace, digests = self._notes
        self.touch(store, namespace)
        try:
            store.get_many(namespace, list(digests))  # which notes the use of their segments
        except StoreError as error:
            self._notices.error(error, 0)

    # -- opening and closing ----------------------------------------------------------------------------------------

    def open(self, look: Look) -> LmdbStore | None:
        """Return the store for what was looked at, made at its first use; also see to the memory tier."""
        place = look.module_hash, look.is_private
        if place in self._stores:
            return self._stores[place]
        with self._opening.raw:
            if place not in self._stores:
                for cls in look.classes:
                    self.known.learn(cls)
                self._make_memory()
                self._stores[place] = self._make_store(look)
            return self._stores[place]

    def _make_memory(self) -> None:
        """Make the memory tier if there is to be one, and it is known where."""
        limit = self._options.max_memory_cache_size
        device = self._options.memory_cache_device
        if self._memory is None and limit and device is not None:
            self._memory = MemoryTier(limit, device)

    def _make_store(self, look: Look) -> LmdbStore | None:
        try:
            return make_store(look.module_hash, self._options, self._counts, is_private=look.is_private)
        except Exception as error:  # noqa: BLE001 - a fault of the machine: the run goes on in memory
            self._notices.error(error, 0)
            return None

    def _counts(self) -> tuple[int, int]:
        """Return how many samples were found so far, and how many were not."""
        values = self._notices.counters.values()
        numbers = {name: amount for name, amount in values.items() if isinstance(amount, int)}
        found = sum(numbers.get(f"{tier}_hits", 0) for tier in ("memory", "queue", "store"))
        return found, numbers.get("misses", 0)

    def _disk_of(self, store: LmdbStore) -> _Disk:
        """Return the tiers of a store; a call under way may ask for them after ``close``."""
        disk = self._disks.get(store)
        if disk is None:
            queue = WriteQueue(store, self, self._options)
            marks = queue if self._options.writes else None
            disk = _Disk(queue, StoreTier(store, marks, self))
            self._disks[store] = disk
        return disk

    def _tiers_of(self, store: LmdbStore | None) -> list[Tier]:
        """Return all tiers that a call of a store asks, in order."""
        tiers: list[Tier] = []
        memory = self._memory
        if memory is not None:
            tiers.append(memory)
        if store is not None:
            tiers += self._disk_of(store).tiers
        return tiers

    def open_stores(self) -> list[LmdbStore]:
        """Return the stores that were made."""
        return [store for store in list(self._stores.values()) if store is not None]

    def usage(self) -> dict[str, int]:
        """Return what is held now, by the names of ``CacheStats``."""
        values: Counter[str] = Counter()
        memory = self._memory
        if memory is not None:
            rows, nbytes = memory.usage()
            values["memory_rows"] = rows
            values["memory_bytes"] = nbytes
        for store in self.open_stores():
            rows, nbytes = self._disk_of(store).queue.usage()
            values["queued_rows"] += rows
            values["queued_bytes"] += nbytes
            values["store_bytes"] = store.used_bytes()
        return values

    def flush(self, timeout_seconds: float | None) -> bool:
        """Wait until every row accepted so far is committed, or dropped and counted; tell whether that was in time."""
        is_flushed = True
        for store in self.open_stores():
            is_flushed = self._disk_of(store).queue.flush(timeout_seconds) and is_flushed
        return is_flushed

    def clear_memory(self) -> None:
        """Forget every row in memory."""
        memory = self._memory
        if memory is not None:
            memory.clear()

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
        self._memory = None
        self._stores = {}
        self._disks = {}


def spread(found: Sequence[Found], digests: Sequence[bytes], positions: Sequence[int]) -> tuple[list[Found], list[int]]:
    """Give each of ``positions`` the row that was found for an equal sample; return what is still missing."""
    source: dict[bytes, tuple[int, int]] = {}  # digest -> which item, and which of its rows
    for k, item in enumerate(found):
        for row, position in enumerate(item.positions):
            source[digests[position]] = k, row

    takers: list[tuple[list[int], list[int]]] = [([], []) for _ in found]  # positions, and the rows they take
    missing: list[int] = []
    for position in positions:
        place = source.get(digests[position])
        if place is None:
            missing.append(position)
        else:
            k, row = place
            takers[k][0].append(position)
            takers[k][1].append(row)

    spread_out: list[Found] = []
    for item, taken in zip(found, takers, strict=True):
        where, rows = taken
        if where:
            spread_out.append(Found(where, item.layout, item.data[rows]))
    return spread_out, missing


def _first_of_equals(digests: Sequence[bytes], positions: Sequence[int]) -> Sequence[int]:
    """Return those of ``positions`` whose sample is the first of its kind there, in order."""
    if len(positions) < 2:
        return positions
    first: dict[bytes, int] = {}
    for position in positions:
        first.setdefault(digests[position], position)
    return positions if len(first) == len(positions) else list(first.values())


def _count(found: Sequence[Found]) -> int:
    return sum(len(item.positions) for item in found)
