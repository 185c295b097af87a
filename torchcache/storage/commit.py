"""One write transaction: where each record goes, how much the file grows by that at most, and the puts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import lmdb

from torchcache.kinds import Drop
from torchcache.storage import budget
from torchcache.storage.contract import Packed, Verdict, Written
from torchcache.storage.table import (
    INDEX,
    INDEX_DIGEST_BYTES,
    LOCATION,
    SEGMENT_BYTES,
    SEGMENTS,
    Namespace,
    claim_namespace,
    now,
    prefix_of,
    put_sorted,
    use_of,
    uses_of_live_segments,
    write_namespace,
)


class Commit:
    """One write transaction: planned, measured against the budget, carried out.

    Args:
        txn: The transaction; it is the caller's to commit or abort.
        doubtful: Index keys whose record failed a check: they are overwritten, and taken out once they are.
        uses: Marks of use to note beside the rows.
    """

    def __init__(self, txn: lmdb.Transaction, doubtful: set[bytes], uses: Mapping[bytes, bytes]) -> None:
        self._txn = txn
        self._doubtful = doubtful
        self._uses = uses
        # What is planned:
        self._segments: dict[bytes, list[bytes]] = {}  # key -> the records in it
        self._index: dict[bytes, bytes] = {}
        self._namespaces: dict[bytes, Namespace] = {}
        self._found: set[bytes] = set()  # keys of segments that have some of the rows already
        self._present = 0
        self._refused = 0
        self._nbytes = 0

    @property
    def is_nothing(self) -> bool:
        """Whether there is nothing to commit, not even a time of use: all rows are refused."""
        return not self._namespaces

    @property
    def refused(self) -> dict[Drop, int]:
        """How many rows must not be stored, and why."""
        return {Drop.ROWS_DEPEND_ON_BATCH: self._refused} if self._refused else {}

    @property
    def planned_rows(self) -> int:
        """How many rows are new."""
        return len(self._index)

    @property
    def present_rows(self) -> int:
        """How many rows are there already, or planned twice."""
        return self._present

    def plan(self, packed: Sequence[Packed]) -> None:
        """Decide where each record goes; what is there already, or twice, is left out.

        Raises:
            StoreError: If the namespace table is full.
        """
        for item in packed:
            entry = self._namespaces.get(item.namespace)
            if entry is None:
                entry = claim_namespace(self._txn, item.namespace)
            if entry.verdict is Verdict.DEPENDENT:
                self._refused += len(item.digests)
                continue
            self._namespaces[item.namespace] = self._plan_rows(item, entry)

    def growth_bytes(self) -> int:
        """Return a strict bound of how much the file can grow by ``carry_out``."""
        sizes = [_bytes_of(records) for records in self._segments.values()]
        marks = len(self._segments) + len(self._found) + len(self._uses)
        small = len(self._index) + len(self._namespaces) + marks
        return budget.growth_bytes(self._txn, sizes, small)

    def carry_out(self) -> Written:
        """Put everything; the caller's transaction commits it."""
        for key, records in self._segments.items():
            self._txn.put(key, b"".join(records))

        # A segment that is written, or was asked to hold what it holds, is in use now, whatever was noted of it before:
        # what comes next in the same call must not have its room.
        entries = {**self._index, **uses_of_live_segments(self._txn, self._uses)}
        entries.update(dict.fromkeys(map(use_of, [*self._segments, *self._found]), now()))
        put_sorted(self._txn, entries)

        for namespace, entry in self._namespaces.items():
            write_namespace(self._txn, namespace, entry)
        self._doubtful.difference_update(self._index)
        return Written(rows=len(self._index) + self._present, nbytes=self._nbytes, dropped=self.refused)

    def _plan_rows(self, item: Packed, entry: Namespace) -> Namespace:
        """Plan the rows of one namespace; return its entry as it is afterwards."""
        index_prefix, segment_prefix = prefix_of(INDEX, entry.number), prefix_of(SEGMENTS, entry.number)
        number, records = self._tail(segment_prefix, entry)
        size = _bytes_of(records)
        rows = nbytes = 0
        for digest, record in zip(item.digests, item.records, strict=True):
            key = index_prefix + digest[:INDEX_DIGEST_BYTES]
            is_planned = key in self._index
            if not item.replaces and (is_planned or self._finds(key, segment_prefix)):
                self._present += 1
                continue

            # A segment that is full is ended, also one with a single long record in it.
            if size and size + len(record) > SEGMENT_BYTES:
                number += 1
                records, size = [], 0
            length = len(record) if len(record) <= SEGMENT_BYTES else 0  # it does not fit the entry
            self._index[key] = LOCATION.pack(number, size, length)
            self._segments[segment_prefix + number.to_bytes(4, "big")] = records
            records.append(record)

            size += len(record)
            nbytes += len(record)
            if is_planned:
                self._present += 1
            else:
                rows += 1

        self._nbytes += nbytes
        return replace(
            entry,
            next_segment=max(entry.next_segment, number + 1 if records else number),
            rows=entry.rows + rows,
            nbytes=entry.nbytes + nbytes,
            touched_at=time.time(),
        )

    def _finds(self, key: bytes, segment_prefix: bytes) -> bool:
        """Tell whether the index has a row whose record failed no check, and note its segment as found."""
        location = None if key in self._doubtful else self._txn.get(key)
        if location is None:
            return False
        if len(location) == LOCATION.size:
            number, _, _ = LOCATION.unpack(location)
            self._found.add(segment_prefix + number.to_bytes(4, "big"))
        return True

    def _tail(self, prefix: bytes, entry: Namespace) -> tuple[int, list[bytes]]:
        """Return number and records of the segment to fill: the last one if it has room, or a new one."""
        last = entry.next_segment - 1
        if last >= 0:
            key = prefix + last.to_bytes(4, "big")
            if key in self._segments:
                return last, self._segments[key]
            value = self._txn.get(key)
            if value is not None and len(value) < SEGMENT_BYTES:
                return last, [bytes(value)]
        return entry.next_segment, []


def cut(packed: Sequence[Packed], most_rows: int, most_bytes: int) -> Iterator[list[Packed]]:
    """Cut packed rows into commits of at most so many rows and bytes, one row at least in each."""
    part: list[Packed] = []
    rows = nbytes = 0
    for item in packed:
        start = 0
        for i, record in enumerate(item.records):
            is_full = rows == most_rows or nbytes + len(record) > most_bytes
            if rows and is_full:
                yield [*part, item.between(start, i)]
                part, start, rows, nbytes = [], i, 0, 0
            rows += 1
            nbytes += len(record)
        part.append(item.between(start, len(item.records)))
    if rows:
        yield part


def _bytes_of(records: Sequence[bytes]) -> int:
    return sum(map(len, records))
