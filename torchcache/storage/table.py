"""The entries of one environment, and how they are read and written inside a transaction.

By the first byte of the key (numbers are big-endian):

- ``n`` + namespace (16 bytes) -> ``Namespace``, a msgpack array; kept without rows where it has a verdict
- ``i`` + namespace number (3) + first 8 bytes of the digest -> segment, offset, length
- ``s`` + namespace number (3) + segment number (4) -> records one after the other
- ``r`` + the same -> when one of the segment's rows was last used, in nanoseconds (for eviction)
- ``a`` + a name: format, time of creation, next namespace number

LMDB's pages are badly filled by records with random keys (100 B rows take 3.5 times their size, 1 kB rows 2.2
times); grouped into segments of 64 KiB only the index entries are random. The last segment of a namespace is
extended until it is full, whatever the size of the commits. Two samples whose first 8 digest bytes agree would share
an index entry (expected once in about 6e9 rows); the later one is then not stored, and the record's full digest keeps
the answer right.
"""

from __future__ import annotations

import math
import struct
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import lmdb
import msgpack

from torchcache.errors import StoreError
from torchcache.kinds import Fault
from torchcache.storage import budget
from torchcache.storage.contract import Verdict
from torchcache.storage.record import UNREADABLE, length_of

#: The kinds of entries: the first byte of their keys.
NAMESPACES, INDEX, SEGMENTS, USES = b"n", b"i", b"s", b"r"

#: 16 pages less LMDB's page header: a full segment wastes nothing.
SEGMENT_BYTES = 16 * 4096 - 16

#: Segment, offset, length. A record that shares its segment is within 64 KiB; one that is longer has a segment of its
#: own and the length 0.
LOCATION = struct.Struct(">IHH")
INDEX_DIGEST_BYTES = 8
MOST_NAMESPACES = 1 << 24
_MOST_SEGMENTS = 1 << 31
_NEXT_NUMBER = b"a next namespace"

#: How many fields the entry of a namespace has without a verdict.
_LEAST_FIELDS = 6

#: What a segment that is not there is read as.
NOTHING = memoryview(b"")

_VERDICTS = {int(verdict): verdict for verdict in Verdict}


# -- namespaces -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Namespace:
    """One row of the namespace table."""

    number: int
    next_segment: int
    rows: int
    nbytes: int
    created_at: float
    touched_at: float
    verdict: Verdict = Verdict.UNKNOWN


def read_namespace(txn: lmdb.Transaction, namespace: bytes) -> Namespace | None:
    """Return the entry of a namespace, or None."""
    value = txn.get(NAMESPACES + namespace)
    return None if value is None else parse_namespace(bytes(value))


def claim_namespace(txn: lmdb.Transaction, namespace: bytes) -> Namespace:
    """Return the entry, or a new one that the caller has to write.

    Raises:
        StoreError: If the table is full.
    """
    entry = read_namespace(txn, namespace)
    if entry is not None:
        return entry
    # Numbers are never used twice: a reader may still know the number of a deleted namespace.
    number = int.from_bytes(bytes(txn.get(_NEXT_NUMBER, b"")), "big")
    if number >= MOST_NAMESPACES:
        raise StoreError("the namespace table is full; clear() the cache", kind=Fault.NAMESPACES_FULL)
    txn.put(_NEXT_NUMBER, (number + 1).to_bytes(4, "big"))
    now = time.time()
    return Namespace(number, next_segment=0, rows=0, nbytes=0, created_at=now, touched_at=now)


@lru_cache(maxsize=1024)
def parse_namespace(value: bytes) -> Namespace | None:
    """Return the entry; None for one that this version cannot read, which is then as good as absent."""
    try:
        fields = msgpack.unpackb(value, max_array_len=16, max_map_len=0, max_str_len=0, max_bin_len=0, max_ext_len=0)
    except UNREADABLE:
        return None
    if not isinstance(fields, list) or len(fields) < _LEAST_FIELDS:
        return None

    # Fields that a later version adds follow the verdict.
    number, next_segment, rows, nbytes, created_at, touched_at, *more = fields
    are_counts = all(type(count) is int and count >= 0 for count in (number, next_segment, rows, nbytes))
    are_times = all(type(moment) is float and math.isfinite(moment) for moment in (created_at, touched_at))
    if not are_counts or not are_times or number >= MOST_NAMESPACES or next_segment >= _MOST_SEGMENTS:
        return None
    return Namespace(number, next_segment, rows, nbytes, created_at, touched_at, _verdict_in(more))


def _verdict_in(more: list[object]) -> Verdict:
    """Return the verdict that the fields behind the first six begin with; unknown if it is none."""
    if more and type(more[0]) is int:
        return _VERDICTS.get(more[0], Verdict.UNKNOWN)
    return Verdict.UNKNOWN


def write_namespace(txn: lmdb.Transaction, namespace: bytes, entry: Namespace) -> None:
    """Put the entry of a namespace."""
    txn.put(NAMESPACES + namespace, msgpack.packb(astuple(entry)))


def all_namespaces(txn: lmdb.Transaction) -> Iterator[tuple[bytes, Namespace]]:
    """Yield namespace and entry of every namespace that this version can read."""
    for key, value in scan(txn, NAMESPACES):
        entry = parse_namespace(bytes(value))
        if entry is not None:
            yield bytes(key[1:]), entry


# -- rows -------------------------------------------------------------------------------------------------------


def read_records(
    txn: lmdb.Transaction, number: int, digests: Sequence[bytes]
) -> tuple[list[memoryview | None], Collection[bytes]]:
    """Return a view of each digest's record, or None, and the keys of the segments that they are in."""
    index_prefix, segment_prefix = prefix_of(INDEX, number), prefix_of(SEGMENTS, number)
    get, unpack = txn.get, LOCATION.unpack
    records: list[memoryview | None] = []
    loaded: dict[bytes, Any] = {}
    for digest in digests:
        location = get(index_prefix + digest[:INDEX_DIGEST_BYTES])
        if location is None:
            records.append(None)
            continue

        key = segment_prefix + location[:4]
        segment: Any = loaded.get(key)
        if segment is None:
            segment = loaded[key] = get(key, NOTHING)

        try:
            _, offset, length = unpack(location)
        except struct.error:
            offset, length = 0, 1  # a damaged entry: a record of one byte fails every check
        records.append(segment[offset : offset + length] if length else segment[offset:])
    return records, loaded.keys()


def length_at(location: bytes, segment_bytes: int) -> int:
    """Return the length of the record that an index entry points at; 0 for a damaged entry."""
    if len(location) != LOCATION.size:
        return 0
    _, offset, length = LOCATION.unpack(location)
    return int(length) or max(0, segment_bytes - int(offset))


def walk_records(segment: bytes | memoryview) -> Iterator[memoryview]:
    """Yield the records of a segment one after the other, up to the first that cannot be read."""
    view = memoryview(segment)
    while view:
        length = length_of(view)
        if length is None:
            return
        yield view[:length]
        view = view[length:]


def first_segments(txn: lmdb.Transaction, number: int) -> deque[bytes]:
    """Return the keys of a namespace's first segments, as many as one transaction may delete."""
    entries = islice(scan(txn, prefix_of(SEGMENTS, number)), budget.MOST_COMMIT_ROWS)
    return deque(bytes(key) for key, _ in entries)


def now() -> bytes:
    """Return the time as the value of a mark of use."""
    return time.time_ns().to_bytes(8, "big")


def use_of(segment_key: bytes) -> bytes:
    """Return the key of the mark that says when a segment was last used."""
    return USES + segment_key[1:]


def uses_of_live_segments(txn: lmdb.Transaction, uses: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the marks of use of segments that are still there."""
    return {key: when for key, when in uses.items() if txn.get(SEGMENTS + key[1:]) is not None}


# -- keys -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def prefix_of(kind: bytes, number: int) -> bytes:
    """Return what the keys of one kind of entry begin with in one namespace."""
    return kind + number.to_bytes(3, "big")


def scan(txn: lmdb.Transaction, prefix: bytes) -> Iterator[tuple[bytes | memoryview, bytes | memoryview]]:
    """Yield keys that begin with ``prefix`` and their values; views that end with the transaction."""
    with txn.cursor() as cursor:
        if not cursor.set_range(prefix):
            return
        for key, value in cursor:
            if key[: len(prefix)] != prefix:
                return
            yield key, value


def put_sorted(txn: lmdb.Transaction, items: Mapping[bytes, bytes]) -> None:
    """Put entries in the order of their keys."""
    if items:
        with txn.cursor() as cursor:
            cursor.putmulti(sorted(items.items()))
