"""The memory tier: an LRU by bytes over slabs of equal rows.

Rows of one layout share slabs, so a batch of hits is one gather a slab and a batch of inserts one
scatter: 0.2-0.3 us a row, against 2.8 us for stacking row tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from torchcache.layout import Bytes2D, Found, Layout, Rows, empty_rows
from torchcache.process import ForkLock

#: What the key and the bookkeeping of one row cost, measured with 1 M rows.
ROW_OVERHEAD_BYTES = 200

#: So much bookkeeping is not charged, so that small limits mean the values themselves.
FREE_OVERHEAD_BYTES = 1 << 20

#: The first slab of a layout has about this size; each further one is twice as large, up to a share
#: of the limit, so that one layout gives memory back to another in small steps.
_FIRST_SLAB_BYTES = 1 << 18
_SLAB_SHARE = 16

#: Rows from this size on are copied one by one, which saves the second copy of a scatter.
_LARGE_ROW_BYTES = 4096

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1


class MemoryTier:
    """Values in memory, least recently used out first.

    Invariants: ``_places`` has exactly the keys of all used slots of all slabs; ``_slab_bytes`` is the sum
    of the slabs' sizes. Both change in ``_insert`` and ``_evict`` only, under ``_lock``, which also covers
    gathering: a slot must not be evicted between lookup and copy.

    Args:
        limit: Bytes the tier may hold, values and bookkeeping (of which 1 MiB is free).
        device: Where the rows lie.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self._limit = limit
        self._device = device
        self._lock = ForkLock(on_broken=self._forget)
        self._places: dict[bytes, int] = {}  # guarded by _lock; key -> slab number << 32 | slot
        self._slabs: dict[int, _Slab] = {}  # guarded by _lock
        self._shelves: dict[Layout, list[_Slab]] = {}  # guarded by _lock
        self._next_slab = 0  # guarded by _lock
        self._slab_bytes = 0  # guarded by _lock
        self._slots = 0  # guarded by _lock; of all slabs, used or not
        self._clock = 0  # guarded by _lock; one tick a batch
        self._oldest: Iterator[tuple[_Slab, int]] = iter(())  # guarded by _lock
        self._oldest_until = 0  # guarded by _lock; the latest use in that line

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._device

    def usage(self) -> tuple[int, int]:
        """Return the number of rows and the bytes charged for them."""
        with self._lock:
            return len(self._places), self._used_bytes()

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> tuple[list[Found], list[int]]:
        """Copy out what is there.

        Returns:
            The values found, one item a layout, and the positions that were not found.
        """
        with self._lock:
            get = self._places.get
            places = [get(namespace + digest, -1) for digest in digests]
            if not self._places:
                return [], list(range(len(places)))
            codes = np.array(places, dtype=np.int64)
            missing = np.flatnonzero(codes < 0)
            if missing.size == codes.size:
                return [], missing.tolist()
            self._clock += 1
            if not missing.size:
                return self._gather(codes, np.arange(codes.size)), []
            present = np.flatnonzero(codes >= 0)
            return self._gather(codes[present], present), missing.tolist()

    def put_many(self, namespace: bytes, rows: Rows) -> None:
        """Keep a copy of the rows, evicting older ones; rows that cannot fit are passed by."""
        fits = self._rows_that_fit(rows.layout, 0, 0)
        if fits <= 0 or not rows.digests:
            return
        start = max(0, len(rows.digests) - fits)
        with self._lock:
            new: dict[bytes, int] = {}
            for i in range(start, len(rows.digests)):
                key = namespace + rows.digests[i]
                if key not in self._places:
                    new[key] = i
            if new:
                self._clock += 1
                self._insert(new, rows)

    def clear(self) -> None:
        """Forget everything and free the slabs."""
        with self._lock:
            self._forget()

    # -- everything below runs under the lock -------------------------------------------------------------

    def _forget(self) -> None:
        self._places, self._slabs, self._shelves = {}, {}, {}
        self._slab_bytes = self._slots = 0
        self._oldest = iter(())

    def _used_bytes(self) -> int:
        return self._slab_bytes + max(0, self._slots * ROW_OVERHEAD_BYTES - FREE_OVERHEAD_BYTES)

    def _rows_that_fit(self, layout: Layout, slab_bytes: int, slots: int) -> int:
        """Return how many rows more keep ``_used_bytes`` within the limit."""
        row_bytes = max(layout.nbytes, 1)
        room = self._limit - slab_bytes
        charged = room + FREE_OVERHEAD_BYTES - slots * ROW_OVERHEAD_BYTES
        return min(room // row_bytes, charged // (row_bytes + ROW_OVERHEAD_BYTES))

    def _gather(self, codes: NDArray[np.int64], positions: NDArray[np.int64]) -> list[Found]:
        numbers = codes >> _SLOT_BITS
        slots = codes & _SLOT_MASK
        first = int(numbers[0])
        if (numbers == first).all():
            slab = self._slabs[first]
            slab.used_at[slots] = self._clock
            return [Found(positions.tolist(), slab.layout, slab.gather(slots))]
        found: list[Found] = []
        by_layout: dict[Layout, list[int]] = {}
        for number in np.unique(numbers).tolist():
            by_layout.setdefault(self._slabs[number].layout, []).append(number)
        for layout, its_numbers in by_layout.items():
            members = np.flatnonzero(np.isin(numbers, its_numbers))
            data = empty_rows(members.size, layout.nbytes)
            for number in its_numbers:
                slab = self._slabs[number]
                here = np.flatnonzero(numbers[members] == number)
                its_slots = slots[members[here]]
                slab.used_at[its_slots] = self._clock
                slab.gather_into(data, here, its_slots)
            found.append(Found(positions[members].tolist(), layout, data))
        return found

    def _insert(self, new: dict[bytes, int], rows: Rows) -> None:
        keys = list(new)
        sources = np.fromiter(new.values(), dtype=np.int64, count=len(new))
        done = 0
        while done < len(keys):
            slab = self._slab_with_room(rows.layout, len(keys) - done)
            if slab is None:
                return
            count = min(len(slab.free), len(keys) - done)
            slots = [slab.free.pop() for _ in range(count)]
            part = keys[done : done + count]
            slab.scatter(slots, _pick(rows.data, sources[done : done + count]))
            slab.used_at[slots] = self._clock
            base = slab.number << _SLOT_BITS
            for key, slot in zip(part, slots, strict=True):
                slab.keys[slot] = key
                self._places[key] = base | slot
            done += count

    def _slab_with_room(self, layout: Layout, wanted: int) -> _Slab | None:
        """Return a slab with a free slot, made or emptied if need be; None if there is no room at all."""
        shelf = self._shelves.setdefault(layout, [])
        for slab in reversed(shelf):
            if slab.free:
                return slab
        while True:
            made = self._new_slab(layout, wanted, shelf)
            if made is not None:
                return made
            evicted = self._evict_oldest()
            if evicted is None:
                return None
            if evicted.layout == layout and evicted.number in self._slabs:
                return evicted

    def _new_slab(self, layout: Layout, wanted: int, shelf: list[_Slab]) -> _Slab | None:
        fits = self._rows_that_fit(layout, self._slab_bytes, self._slots)
        if fits <= 0:
            return None
        row_bytes = max(layout.nbytes, 1)
        size = max(_FIRST_SLAB_BYTES, wanted * row_bytes, 2 * max((s.nbytes for s in shelf), default=0))
        capacity = max(1, min(size, self._limit // _SLAB_SHARE) // row_bytes)
        slab = _Slab(self._next_slab, layout, min(capacity, fits, _SLOT_MASK), self._device)
        self._next_slab += 1
        self._slabs[slab.number] = slab
        shelf.append(slab)
        self._slab_bytes += slab.nbytes
        self._slots += slab.capacity
        return slab

    def _evict_oldest(self) -> _Slab | None:
        """Evict the least recently used row; free its slab if that was the last one. None if empty."""
        while True:
            for slab, slot in self._oldest:
                key = slab.keys[slot]
                if key is None or slab.number not in self._slabs or slab.used_at[slot] > self._oldest_until:
                    continue
                if slab.used_at[slot] == self._clock:
                    return None  # only rows of the batch at hand are left
                del self._places[key]
                slab.keys[slot] = None
                slab.free.append(slot)
                if len(slab.free) == slab.capacity:
                    del self._slabs[slab.number]
                    self._shelves[slab.layout].remove(slab)
                    self._slab_bytes -= slab.nbytes
                    self._slots -= slab.capacity
                return slab
            if not self._places:
                return None
            self._find_oldest()

    def _find_oldest(self) -> None:
        """Line up the oldest sixteenth of all rows, so that each eviction is cheap and still exact.

        A row that is used meanwhile gets a newer time than any in the line and is passed over.
        """
        slabs = list(self._slabs.values())
        times = np.concatenate([slab.times_in_use() for slab in slabs])
        count = min(max(1024, len(self._places) // 16), len(self._places))
        chosen = np.argpartition(times, count - 1)[:count]
        chosen = chosen[np.argsort(times[chosen], kind="stable")]
        self._oldest_until = int(times[chosen[-1]])
        starts = np.cumsum([0, *(slab.capacity for slab in slabs)])
        owners = np.searchsorted(starts, chosen, side="right") - 1
        line = [(slabs[o], int(c - starts[o])) for o, c in zip(owners.tolist(), chosen.tolist(), strict=True)]
        self._oldest = iter(line)


class _Slab:
    """Rows of one layout side by side, on one device."""

    def __init__(self, number: int, layout: Layout, capacity: int, device: torch.device) -> None:
        self.number = number
        self.layout = layout
        self.capacity = capacity
        self.nbytes = capacity * layout.nbytes
        self.keys: list[bytes | None] = [None] * capacity
        self.free = list(range(capacity - 1, -1, -1))
        self.used_at: NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)
        self._host: Bytes2D | None = None
        self._rows: torch.Tensor | None = None
        if device.type == "cpu":
            self._host = empty_rows(capacity, layout.nbytes)
        else:
            self._rows = torch.empty((capacity, layout.nbytes), dtype=torch.uint8, device=device)

    def gather(self, slots: NDArray[np.int64]) -> Bytes2D | torch.Tensor:
        """Return copies of the rows at ``slots``, on the slab's device."""
        if self._host is None:
            assert self._rows is not None
            return self._rows.index_select(0, torch.from_numpy(slots).to(self._rows.device))
        out = empty_rows(slots.size, self.layout.nbytes)
        # mode="clip" lets take() write into out directly; the slots are known to be in range.
        np.take(self._host, slots, axis=0, out=out, mode="clip")
        return out

    def gather_into(self, out: Bytes2D, members: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Copy the rows at ``slots`` to the rows ``members`` of ``out``."""
        if self._host is None:
            out[members] = self.gather(slots).cpu().numpy()  # type: ignore[union-attr]
        elif self.layout.nbytes < _LARGE_ROW_BYTES:
            out[members] = self.gather(slots)
        else:
            for member, slot in zip(members.tolist(), slots.tolist(), strict=True):
                out[member] = self._host[slot]

    def scatter(self, slots: list[int], data: Bytes2D) -> None:
        """Copy ``data`` to the rows at ``slots``."""
        if self._host is None:
            assert self._rows is not None
            index = torch.tensor(slots, dtype=torch.int64, device=self._rows.device)
            self._rows.index_copy_(0, index, torch.from_numpy(data).to(self._rows.device))
        elif slots == list(range(slots[0], slots[0] + len(slots))):
            self._host[slots[0] : slots[0] + len(slots)] = data
        else:
            self._host[slots] = data

    def times_in_use(self) -> NDArray[np.int64]:
        """Return the time each slot was last used, the end of time for free slots."""
        times: NDArray[np.int64] = self.used_at.copy()
        times[self.free] = np.iinfo(np.int64).max
        return times


def _pick(data: Bytes2D, rows: NDArray[np.int64]) -> Bytes2D:
    """Return the rows of ``data``, without a copy where they lie side by side."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first == rows.size - 1:
        return data[first : last + 1]  # keys are unique and in order, so the rows are too
    picked: Bytes2D = data[rows]
    return picked
