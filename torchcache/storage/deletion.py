"""Deletions of one transaction: whole segments, or single rows, and what the namespace table says of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import lmdb

from torchcache.storage import budget
from torchcache.storage.contract import Verdict
from torchcache.storage.record import digest_of
from torchcache.storage.table import (
    INDEX,
    INDEX_DIGEST_BYTES,
    NAMESPACES,
    NOTHING,
    SEGMENT_BYTES,
    SEGMENTS,
    Namespace,
    all_namespaces,
    length_at,
    prefix_of,
    use_of,
    walk_records,
    write_namespace,
)


class Deletion:
    """One transaction of deletions, no more than may grow the file by ``room_bytes``.

    ``_gone`` counts what was deleted, for ``carry_out`` to bring the namespace table up to date.

    Attributes:
        places: The index keys that were deleted or are free.
    """

    def __init__(self, txn: lmdb.Transaction, room_bytes: int) -> None:
        self._txn = txn
        self._entries, self._nbytes = budget.deletable(txn, room_bytes)  # how much more
        self._gone: dict[bytes, list[int]] = {}  # namespace number -> rows, bytes
        self._is_nothing = True
        self.places: set[bytes] = set()

    @property
    def rows(self) -> int:
        """How many rows were deleted."""
        return sum(rows for rows, _ in self._gone.values())

    def delete_segments(self, segments: deque[bytes]) -> None:
        """Delete the first segments with all their rows, and take those that are done with off the queue."""
        while segments and self._entries > 0:
            key = segments[0]
            value = self._txn.get(key, NOTHING)
            if len(value) > self._nbytes:
                return

            # Rows that were replaced or deleted before are in it too, and are not the index's any more.
            for digest, nbytes in _records_in(value):
                place = INDEX + key[1:4] + digest[:INDEX_DIGEST_BYTES]
                if not self._points_at(place, key):
                    continue
                if self._entries <= 0:
                    return
                self._delete_row(place, nbytes)
            self._delete_segment(segments.popleft())

    def delete_rows(self, number: int, digests: deque[bytes]) -> None:
        """Delete the rows of the first digests, and take those that are done with off the queue.

        A segment goes with its last row; else the bytes of a deleted row stay in it.
        """
        index_prefix, segment_prefix = prefix_of(INDEX, number), prefix_of(SEGMENTS, number)
        touched: set[bytes] = set()
        while digests and self._entries > 0:
            place = index_prefix + digests[0][:INDEX_DIGEST_BYTES]
            location = self._txn.get(place)
            if location is not None:
                location = bytes(location)
                key = segment_prefix + location[:4]
                size = len(self._txn.get(key, NOTHING))
                if key not in touched:
                    if size > self._nbytes:
                        break
                    # Counted as if the segment went with its mark of use; whether it does turns out below.
                    touched.add(key)
                    self._nbytes -= size
                    self._entries -= 2
                self._delete_row(place, length_at(location, size))
            self.places.add(place)
            digests.popleft()

        for key in touched:
            if not self._is_live(key):
                self._delete_segment(key)

    def carry_out(self) -> bool:
        """Bring the namespace table up to date; without any deletion abort. Returns whether there was one.

        A namespace goes with its last row unless it has a verdict.
        """
        if self._is_nothing:
            self._txn.abort()
            return False
        if not self._gone:
            return True
        # A list, since changes of the tree would end the walk.
        for namespace, entry in list(all_namespaces(self._txn)):
            gone = self._gone.get(entry.number.to_bytes(3, "big"))
            if gone is not None:
                self._write_what_is_left(namespace, entry, *gone)
        return True

    def _write_what_is_left(self, namespace: bytes, entry: Namespace, rows: int, nbytes: int) -> None:
        if entry.rows <= rows and entry.verdict is Verdict.UNKNOWN:
            self._txn.delete(NAMESPACES + namespace)
            return
        left = replace(entry, rows=max(0, entry.rows - rows), nbytes=max(0, entry.nbytes - nbytes))
        write_namespace(self._txn, namespace, left)

    def _delete_row(self, place: bytes, nbytes: int) -> None:
        self._txn.delete(place)
        gone = self._gone.setdefault(place[1:4], [0, 0])
        gone[0] += 1
        gone[1] += nbytes
        self._entries -= 1
        self._is_nothing = False

    def _delete_segment(self, key: bytes) -> None:
        self._nbytes -= len(self._txn.get(key, NOTHING))
        self._txn.delete(key)
        self._txn.delete(use_of(key))
        self._entries -= 2
        self._is_nothing = False

    def _is_live(self, key: bytes) -> bool:
        """Tell whether a segment has a row that the index knows, or bytes that cannot be walked."""
        segment = memoryview(self._txn.get(key, NOTHING))
        for record in walk_records(segment):
            if self._points_at(INDEX + key[1:4] + digest_of(record)[:INDEX_DIGEST_BYTES], key):
                return True
            segment = segment[len(record) :]
        return len(segment) > 0

    def _points_at(self, place: bytes, segment_key: bytes) -> bool:
        """Tell whether the index has an entry at ``place``, and it is of a row in that segment."""
        location = self._txn.get(place)
        return location is not None and bytes(location[:4]) == segment_key[4:]


def _records_in(segment: bytes | memoryview) -> Iterator[tuple[bytes, int]]:
    """Yield digest and length of each record of a segment that is about to be deleted."""
    if len(segment) > SEGMENT_BYTES:  # one record alone: not copied to be walked
        yield digest_of(segment), len(segment)
        return
    for record in walk_records(bytes(segment)):  # a copy: deletions end the views of their transaction
        yield digest_of(record), len(record)
