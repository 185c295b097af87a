"""Counters of one cache and the immutable snapshot a user sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchcache.process import ForkLock


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a cache did in this process since it was made. Rows are samples.

    Attributes:
        memory_hits: Rows answered by the memory tier.
        queue_hits: Rows answered by the write queue (accepted, not yet committed).
        store_hits: Rows answered by the LMDB tier.
        misses: Rows that were computed because no tier had them.
        duplicates: Rows equal to another row of their batch; computed or fetched once.
        shared_rows: Rows that another thread was computing at that moment, and that came from it.
        bypasses: Calls that went around the cache, by reason.
        bypassed_rows: Rows of those calls, but for those that were looked up first and count as misses.
        memory_rows: Rows in the memory tier now.
        memory_bytes: Bytes the memory tier holds now, at most ``max_memory_cache_size``.
        store_bytes: Bytes under ``persistent_cache_dir`` at this process's last look.
        queued_rows: Rows accepted for the store and not yet committed.
        queued_bytes: Bytes of those rows.
        written_rows: Rows this process committed.
        written_bytes: Bytes of the records it committed, after compression.
        dropped_rows: Rows that were not stored, by kind.
        faults: Faults of the machine that were turned into misses, by kind.
        verified_rows: Hits that were computed again because of ``verify_hits``.
        mismatched_rows: How many of these differed; their values were replaced.
        overflowed_values: Finite numbers that ``cache_dtype`` made infinite.
        moved: Attributes and weights that moved at each call, or while rows were computed, so that these were not
            cached: how often, by path.
    """

    memory_hits: int = 0
    queue_hits: int = 0
    store_hits: int = 0
    misses: int = 0
    duplicates: int = 0
    shared_rows: int = 0
    bypasses: Mapping[str, int] = field(default_factory=dict)
    bypassed_rows: int = 0
    memory_rows: int = 0
    memory_bytes: int = 0
    store_bytes: int = 0
    queued_rows: int = 0
    queued_bytes: int = 0
    written_rows: int = 0
    written_bytes: int = 0
    dropped_rows: Mapping[str, int] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)
    verified_rows: int = 0
    mismatched_rows: int = 0
    overflowed_values: int = 0
    moved: Mapping[str, int] = field(default_factory=dict)

    @property
    def hits(self) -> int:
        """Rows answered by any tier."""
        return self.memory_hits + self.queue_hits + self.store_hits


class Counters:
    """Thread-safe counters: plain ones by field name, grouped ones by field and kind.

    ``lock`` guards both maps; it is a leaf, nothing else is taken under it.
    """

    def __init__(self) -> None:
        self._lock = ForkLock()
        self._plain: Counter[str] = Counter()
        self._grouped: dict[str, Counter[str]] = {}

    def add(self, **amounts: int) -> None:
        with self._lock.raw:
            for name, amount in amounts.items():  # Counter.update() costs three times as much
                self._plain[name] += amount

    def add_to(self, group: str, kind: str, amount: int = 1) -> None:
        """Add to one kind of a group; who asks for the counts gets plain strings."""
        with self._lock.raw:
            counts = self._grouped.setdefault(group, Counter())
            counts[str(kind)] += amount

    def kinds_of(self, group: str) -> set[str]:
        """Return which kinds of a group were counted."""
        with self._lock.raw:
            return set(self._grouped.get(group, ()))

    def values(self) -> dict[str, int | Mapping[str, int]]:
        """Return copies of all counters, by the names of ``CacheStats``."""
        with self._lock.raw:
            grouped = {name: dict(counts) for name, counts in self._grouped.items()}
            return {**self._plain, **grouped}
