"""The store contract on LMDB: rows in append-ordered segments, found through a small index.

Entries of one environment, by the first byte of the key (numbers are big-endian):

- ``n`` + fingerprint (16 bytes) -> ``Namespace``, a msgpack array; kept without rows where it has a verdict
- ``i`` + namespace number (3) + first 8 bytes of the digest -> segment, offset, length
- ``s`` + namespace number (3) + segment number (4) -> records one after the other
- ``r`` + the same -> when one of the segment's rows was last used, in nanoseconds (for eviction)
- ``a`` + a name: format, time of creation, next namespace number

LMDB's pages are badly filled by records with random keys (100 B rows take 3.5 times their size, 1 kB
rows 2.2 times); grouped into segments of 64 KiB only the index entries are random. The last segment of a
namespace is extended until it is full, whatever the size of the commits. The index holds half a digest;
two samples that share it (one pair in 10^10 rows is likely at a probability of 1e-8 a million) would
share a place, so the later one is not stored, and the record's full digest keeps the answer right.
"""

from __future__ import annotations

import logging
import math
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from torchcache.errors import StoreError
from torchcache.layout import Rows
from torchcache.storage import budget
from torchcache.storage.contract import Lookup, Packed, Verdict, Written
from torchcache.storage.directory import CacheDirectory, TurnCancelledError
from torchcache.storage.environment import ABSENT, OVERWRITTEN, shared_environment
from torchcache.storage.record import digest_of, length_of, pack_rows, refusal_of, unpack_many

logger = logging.getLogger(__name__)

#: 16 pages less LMDB's page header: a full segment wastes nothing.
SEGMENT_BYTES = 16 * 4096 - 16

#: Segment, offset, length. A record that shares its segment lies within 64 KiB; one that is longer has a
#: segment of its own and the length 0.
_LOCATION = struct.Struct(">IHH")
_INDEX_DIGEST_BYTES = 8
_NEXT_NUMBER = b"a next namespace"
_MOST_NAMESPACES = 1 << 24
_MOST_SEGMENTS = 1 << 31

#: Segments read since the last commit whose time is remembered (for eviction="lru").
_MOST_RECENT = 4096

#: How often a lookup that a writer got ahead of is tried again.
_MOST_READS = 5

#: How many bytes one commit may have at most, whatever the budget.
_MOST_COMMIT_BYTES = 32 << 20

#: How often room is made for one commit before it is dropped: freed pages can be used two transactions later
#: only, and only in runs that are long enough.
_MOST_ROUNDS = 6

#: A namespace that is read is marked as used this often, so that others can tell stale from used.
_TOUCH_SECONDS = 600.0

_VERDICTS = {int(verdict): verdict for verdict in Verdict}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """What one cache asks of its store."""

    budget_bytes: int
    eviction: str = "stale"
    zstd_level: int | None = None
    lock_timeout_seconds: float = 2.0
    min_free_bytes: int | None = None


class LmdbStore:
    """One module hash's values in an LMDB environment; see ``contract.Store``.

    Args:
        directory: The cache directory.
        name: The module hash, a plain file name.
        settings: Budget and waits.
    """

    def __init__(self, directory: CacheDirectory, name: str, settings: StoreSettings) -> None:
        self._directory = directory
        self._settings = settings
        self._environment = shared_environment(directory, directory.place_for(name), settings.budget_bytes)
        self._budget = budget.Budget(directory, settings.budget_bytes, settings.min_free_bytes)
        self._doubtful: set[bytes] = set()  # index keys whose record failed a check: overwritten
        self._recent: dict[bytes, bytes] = {}  # segments read here -> when; noted with the next commit
        self._touched: dict[bytes, float] = {}  # namespaces read here and when that was last noted

    @property
    def path(self) -> Path:
        """The subdirectory of the environment."""
        return self._environment.path

    @property
    def most_commit_bytes(self) -> int:
        """How large a commit should be at most: small against the budget."""
        return min(_MOST_COMMIT_BYTES, max(1, self._settings.budget_bytes // budget.COMMIT_SHARE))

    def is_present(self) -> bool:
        """Tell whether there is anything to read."""
        return self._environment.is_present()

    def announce(self) -> None:
        """Show the name of the subdirectory before anything is stored in it."""
        self._environment.announce()

    def shortage(self) -> str | None:
        """Say what is short, if writing is pointless for now, so that packing can be saved."""
        return self._budget.shortage()

    def used_bytes(self) -> int:
        return self._directory.used_bytes()

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        for _ in range(_MOST_READS - 1):
            try:
                return self._get_many(namespace, digests)
            except StoreError as error:
                if error.kind != OVERWRITTEN:
                    raise
        return self._get_many(namespace, digests)

    def _get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        if not self._environment.is_present():
            return Lookup([], list(range(len(digests))))
        try:
            with self._environment.reading() as txn:
                entry = _read_namespace(txn, namespace)
                if entry is None:
                    return Lookup([], list(range(len(digests))))
                if entry.verdict is Verdict.DEPENDENT:  # what is left of its rows answers nothing
                    return Lookup([], list(range(len(digests))), verdict=entry.verdict)
                records, segments = _read_records(txn, entry.number, digests)
                found, missing, corrupt = unpack_many(namespace, digests, records)
                if corrupt:
                    self._doubt(entry.number, [digests[p] for p in missing if records[p] is not None])
                del records  # views end with the transaction
        except StoreError as error:
            if error.kind == ABSENT:
                return Lookup([], list(range(len(digests))))
            raise
        if self._settings.eviction == "lru" and len(self._recent) < _MOST_RECENT:
            self._recent.update(dict.fromkeys((b"r" + key[1:] for key in segments), _now()))
        return Lookup(found, missing, corrupt, entry.verdict)

    def _doubt(self, number: int, digests: Sequence[bytes]) -> None:
        """Remember records that failed a check: the next write of their samples replaces them."""
        prefix = _prefix(b"i", number)
        self._doubtful.update(prefix + digest[:_INDEX_DIGEST_BYTES] for digest in digests)

    def needs_touch(self, namespace: bytes) -> bool:
        """Tell whether a read of ``namespace`` should be noted on disk; at most once in ten minutes."""
        now = time.time()
        if now - self._touched.get(namespace, 0.0) < _TOUCH_SECONDS:
            return False
        self._touched[namespace] = now
        return True

    def touch(self, namespace: bytes, cancel: Callable[[], bool] | None = None) -> None:
        """Note that ``namespace`` is in use, so that it does not count as stale."""
        now = time.time()
        with self._turn(cancel):
            if not self._has_environment():
                return
            with self._environment.writing() as txn:
                entry = _read_namespace(txn, namespace)
                if entry is None or now - entry.touched_at <= _TOUCH_SECONDS / 2:
                    txn.abort()
                    return
                recent, self._recent = self._recent, {}
                if self._allows_marks(txn, 1 + len(recent)):
                    _put_sorted(txn, _of_live_segments(txn, recent))
                else:  # the times of use wait for the next commit
                    self._recent.update(recent)
                    if not self._allows_marks(txn, 1):
                        txn.abort()
                        self._budget.say_if_over(self._settings.eviction)
                        return
                _write_namespace(txn, namespace, replace(entry, touched_at=now))

    def judge(self, namespace: bytes, verdict: Verdict, cancel: Callable[[], bool] | None = None) -> None:
        assert verdict is not Verdict.UNKNOWN
        while self._judge_some(namespace, verdict, cancel):
            _check(cancel)

    def _judge_some(self, namespace: bytes, verdict: Verdict, cancel: Callable[[], bool] | None) -> bool:
        """Record the verdict and delete one transaction's worth of rows, in one turn; return whether to go on.

        The verdict comes first: from then on no process reads a row or adds one.
        """
        with self._turn(cancel):
            if not self._environment.ensure(self._allows_new):
                return False
            self._follow_file()
            self._note_verdict(namespace, verdict)
            if verdict is not Verdict.DEPENDENT:
                return False
            with self._environment.writing() as txn:
                entry = _read_namespace(txn, namespace)
                self._directory.measure()
                deletion = _Deletion(txn, self._budget.room_bytes())
                if entry is not None:
                    deletion.delete_segments(_first_segments(txn, entry.number))
                return deletion.carry_out()

    def _note_verdict(self, namespace: bytes, verdict: Verdict) -> None:
        with self._environment.writing() as txn:
            entry = _find_namespace(txn, namespace)
            if entry.verdict in (verdict, Verdict.DEPENDENT) or not self._allows_marks(txn, 2):
                txn.abort()
                return
            _write_namespace(txn, namespace, replace(entry, verdict=verdict, touched_at=time.time()))

    def _allows_marks(self, txn: lmdb.Transaction, entries: int) -> bool:
        """Tell whether so many small entries may be put, by the strict bound of their growth."""
        self._directory.measure()
        growth = budget.growth_bytes(txn, (), entries)
        return self._budget.allows_mark(growth, budget.free_bytes(txn, self._environment.last_page()))

    def pack(self, namespace: bytes, rows: Rows) -> Packed:
        refusal = refusal_of(rows.layout)
        if refusal is not None:
            return Packed(namespace, (), (), {refusal: len(rows.digests)})
        records = pack_rows(namespace, rows, self._settings.zstd_level)
        return Packed(namespace, rows.digests, records)

    def put_many(self, packed: Sequence[Packed], cancel: Callable[[], bool] | None = None) -> Written:
        dropped: Counter[str] = Counter()
        for item in packed:
            dropped.update(item.dropped)
        n = sum(len(item.digests) for item in packed)
        if not n and not any(item.replaces for item in packed):
            return Written(dropped=dict(dropped))
        with self._turn(cancel):
            if n and not self._ensure_environment():
                dropped[self._rest(self._environment.creation_bytes())] += n
                return Written(dropped=dict(dropped))
            self._follow_file()
            for item in packed:
                self._delete_replaced(item)
            rows = budget.commit_rows(self._settings.budget_bytes)
            started = _now()
            done = [self._commit(part, started) for part in _cut(packed, rows, self.most_commit_bytes)]
        for written in done:
            dropped.update(written.dropped)
        return Written(
            rows=sum(written.rows for written in done),
            nbytes=sum(written.nbytes for written in done),
            dropped={reason: rows for reason, rows in dropped.items() if rows},
        )

    def delete_many(self, namespace: bytes, digests: Sequence[bytes], cancel: Callable[[], bool] | None = None) -> int:
        waiting = deque(dict.fromkeys(digests))
        deleted = 0
        while waiting:
            _check(cancel)
            before = len(waiting)
            deleted += self._delete_some(namespace, waiting, cancel)
            if len(waiting) == before:
                break  # no room even for that
        return deleted

    def _delete_some(self, namespace: bytes, waiting: deque[bytes], cancel: Callable[[], bool] | None) -> int:
        """Delete one transaction's worth of rows, in one turn, and take them off ``waiting``; return how many."""
        with self._turn(cancel):
            return self._delete_in_turn(namespace, waiting)

    def _delete_in_turn(self, namespace: bytes, waiting: deque[bytes]) -> int:
        if not self._has_environment():
            waiting.clear()
            return 0
        with self._environment.writing() as txn:
            entry = _read_namespace(txn, namespace)
            if entry is None:
                txn.abort()
                waiting.clear()
                return 0
            # Until it is committed, and for good where there is no room: the next write replaces them.
            self._doubt(entry.number, waiting)
            self._directory.measure()
            deletion = _Deletion(txn, self._budget.room_bytes())
            deletion.delete_rows(entry.number, waiting)
            deletion.carry_out()
        self._doubtful -= deletion.places
        return deletion.rows

    def _delete_replaced(self, item: Packed) -> None:
        """Delete what rows take the place of: overwritten, it would stay in its segment; the turn is held."""
        waiting = deque(item.replaces)
        while waiting:
            before = len(waiting)
            self._delete_in_turn(item.namespace, waiting)
            if len(waiting) == before:
                break

    def _commit(self, packed: Sequence[Packed], started: bytes) -> Written:
        """Commit one transaction's worth, making room for it where the policy allows that."""
        keep = {item.namespace for item in packed}
        written, growth = Written(), 0
        for attempt in range(_MOST_ROUNDS):
            self._directory.measure()
            recent, self._recent = self._recent, {}
            written, growth = self._try_commit(packed, recent)
            if not growth:
                return written
            self._recent.update(recent)
            if self._settings.eviction == "lru" and self._budget.room_bytes() < growth:
                self._start_afresh()
            elif not self._make_room(growth << attempt, keep, started):
                break
        short = self._rest(growth)
        dropped = {short if reason == "budget" else reason: rows for reason, rows in written.dropped.items()}
        return replace(written, dropped=dropped)

    def _rest(self, growth_bytes: int) -> str:
        return self._budget.rest(growth_bytes, self._settings.eviction)

    def _start_afresh(self) -> None:
        """Replace a file that has grown into the reserve: LMDB's files do not shrink, so deleting does not help."""
        logger.info("%s has grown to its budget and is started afresh (eviction='lru')", self.path)
        self._remove_environment()
        self._ensure_environment()

    def _remove_environment(self) -> None:
        """Remove the environment with all that is remembered of it; the turn is held."""
        self._environment.close()
        self._directory.remove(self._environment.name)
        self._directory.measure()
        self._doubtful.clear()
        self._recent.clear()

    def _has_environment(self) -> bool:
        """Tell whether there is anything to change; the turn is held."""
        self._follow_file()
        return self._environment.is_present()

    def _follow_file(self) -> None:
        """See to it that what is written goes to the file that is on disk now; the turn is held."""
        if not self._environment.is_current():
            self._environment.close()

    def _allows_new(self, nbytes: int) -> bool:
        self._directory.measure()
        return self._budget.allows_new(nbytes)

    def _ensure_environment(self) -> bool:
        """Make the environment if it is not there, and room for it where the policy allows that."""
        for _ in range(_MOST_ROUNDS):
            if self._environment.ensure(self._allows_new):
                return True
            if not self._make_room_outside(self._environment.creation_bytes()):
                return False
        return False

    def _try_commit(self, packed: Sequence[Packed], recent: Mapping[bytes, bytes]) -> tuple[Written, int]:
        """Commit if the budget allows it; otherwise say what was dropped and how much room it needs."""
        with self._environment.writing() as txn:
            write = _Write(txn, self._doubtful, recent)
            write.plan(packed)
            if write.is_nothing:
                txn.abort()
                return Written(dropped=write.refused), 0
            growth = write.growth_bytes()
            if self._budget.allows(growth, budget.free_bytes(txn, self._environment.last_page())):
                return write.carry_out(), 0
            txn.abort()
        return Written(rows=write.present_rows, dropped={"budget": write.planned_rows, **write.refused}), growth

    def delete_all(self) -> None:
        with self._turn(None):
            self._remove_environment()
        self._budget.wake()

    def close(self) -> None:
        """Close the environment, unless somebody is inside; whoever uses it next in this process opens it again."""
        self._environment.close()

    @contextmanager
    def _turn(self, cancel: Callable[[], bool] | None) -> Iterator[None]:
        try:
            with self._directory.turn(self._settings.lock_timeout_seconds, cancel):
                yield
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self._directory.path}: {error}", kind="directory") from error

    # -- making room --------------------------------------------------------------------------------------------

    def _make_room(self, needed_bytes: int, keep: set[bytes], started: bytes) -> bool:
        """Empty the trash, or evict by the settings' policy; return whether there is more room now."""
        if self._make_room_outside(needed_bytes):
            return True
        if self._settings.eviction == "none":
            return False
        if self._settings.eviction == "stale":
            is_more = self._delete_slices(self._stale_segments(keep), needed_bytes)
            self._delete_stale_entries(keep)
            return is_more
        return self._delete_slices(self._oldest_segments(started), max(needed_bytes, self._budget.slack_bytes()))

    def _make_room_outside(self, needed_bytes: int) -> bool:
        """Empty the trash, or remove other environments that nobody uses; return whether there is more room."""
        before = self._directory.used_bytes()
        self._directory.empty_trash()
        if self._directory.measure() < before:
            return True
        return self._settings.eviction != "none" and budget.remove_stale_environments(
            self._directory, self._environment.name, needed_bytes, self._budget
        )

    def _stale_segments(self, keep: set[bytes]) -> list[bytes]:
        """Return the segments of namespaces nobody touched for an hour, oldest first."""
        limit = time.time() - budget.STALE_SECONDS
        with self._environment.reading() as txn:
            stale = {
                _prefix(b"s", entry.number): entry.touched_at
                for fingerprint, entry in _all_namespaces(txn)
                if entry.touched_at < limit and fingerprint not in keep
            }
            keys = [bytes(key) for key, _ in _scan(txn, b"s")]
        return sorted((key for key in keys if key[:4] in stale), key=lambda key: (stale[key[:4]], key))

    def _delete_stale_entries(self, keep: set[bytes]) -> None:
        """Delete the entries of namespaces that have a verdict and no rows, and nobody touched for an hour."""
        limit = time.time() - budget.STALE_SECONDS
        with self._environment.writing() as txn:
            stale = [
                fingerprint
                for fingerprint, entry in _all_namespaces(txn)
                if entry.touched_at < limit and not entry.rows and fingerprint not in keep
            ]
            most, _ = budget.deletable(txn, self._budget.room_bytes()) if stale else (0, 0)
            if not most:
                txn.abort()
            for fingerprint in stale[:most]:
                txn.delete(b"n" + fingerprint)

    def _oldest_segments(self, before: bytes) -> list[bytes]:
        """Return the half of all segments that were used longest ago, oldest first; none used since ``before``."""
        with self._environment.reading() as txn:
            used = sorted((bytes(when), b"s" + bytes(key[1:])) for key, when in _scan(txn, b"r"))
        used = sorted((self._recent.get(b"r" + key[1:], when), key) for when, key in used)
        return [key for when, key in used[: max(1, len(used) // 2)] if when < before]

    def _delete_slices(self, segments: Sequence[bytes], needed_bytes: int) -> bool:
        """Delete segments, a small transaction at a time, until enough pages are free."""
        waiting = deque(segments)
        rows = 0
        while waiting:
            with self._environment.writing() as txn:
                is_enough = budget.free_bytes(txn, self._environment.last_page()) >= budget.FREE_FACTOR * needed_bytes
                if is_enough and rows:
                    txn.abort()
                    break
                deletion = _Deletion(txn, self._budget.room_bytes())
                deletion.delete_segments(waiting)
                if not deletion.carry_out():
                    break
                rows += deletion.rows
            self._directory.measure()
        if rows:
            logger.info(
                "the cache under %s is full; %d rows of %s were evicted (eviction=%r)",
                self._directory.path, rows, self._environment.name, self._settings.eviction,
            )  # fmt: skip
        return rows > 0


def _cut(packed: Sequence[Packed], most_rows: int, most_bytes: int) -> Iterator[list[Packed]]:
    """Cut packed rows into commits of at most so many rows and bytes, one row at least in each."""
    part: list[Packed] = []
    rows = nbytes = 0
    for item in packed:
        start = 0
        for i, record in enumerate(item.records):
            if rows and (rows == most_rows or nbytes + len(record) > most_bytes):
                yield [*part, item.between(start, i)]
                part, start, rows, nbytes = [], i, 0, 0
            rows += 1
            nbytes += len(record)
        part.append(item.between(start, len(item.records)))
    if rows:
        yield part


class _Write:
    """One write transaction: planned, measured against the budget, carried out."""

    def __init__(self, txn: lmdb.Transaction, doubtful: set[bytes], recent: Mapping[bytes, bytes]) -> None:
        self._txn = txn
        self._doubtful = doubtful
        self._recent = recent
        self._segments: dict[bytes, list[bytes]] = {}
        self._index: dict[bytes, bytes] = {}
        self._namespaces: dict[bytes, Namespace] = {}
        self._present = 0
        self._refused = 0
        self._nbytes = 0

    @property
    def is_nothing(self) -> bool:
        """Whether there is nothing to commit, not even a time of use: all rows are refused."""
        return not self._namespaces

    @property
    def refused(self) -> dict[str, int]:
        """How many rows must not be stored, by reason."""
        return {"rows_depend_on_batch": self._refused} if self._refused else {}

    @property
    def planned_rows(self) -> int:
        """How many rows are new."""
        return len(self._index)

    @property
    def present_rows(self) -> int:
        """How many rows are there already, or planned twice."""
        return self._present

    def plan(self, packed: Sequence[Packed]) -> None:
        """Decide where each record goes; what is there already, or twice, is left out."""
        for item in packed:
            entry = self._namespaces.get(item.namespace) or _find_namespace(self._txn, item.namespace)
            if entry.verdict is Verdict.DEPENDENT:
                self._refused += len(item.digests)
                continue
            self._namespaces[item.namespace] = self._plan_rows(item, entry)

    def growth_bytes(self) -> int:
        """Return a strict bound of how much the file can grow by ``carry_out``."""
        sizes = [sum(map(len, parts)) for parts in self._segments.values()]
        small = len(self._index) + len(self._segments) + len(self._recent) + len(self._namespaces)
        return budget.growth_bytes(self._txn, sizes, small)

    def carry_out(self) -> Written:
        """Put everything; the caller's transaction commits it."""
        for key, parts in self._segments.items():
            self._txn.put(key, b"".join(parts))
        used = dict.fromkeys((b"r" + key[1:] for key in self._segments), _now())
        _put_sorted(self._txn, {**self._index, **_of_live_segments(self._txn, self._recent), **used})
        for fingerprint, entry in self._namespaces.items():
            _write_namespace(self._txn, fingerprint, entry)
        self._doubtful.difference_update(self._index)
        return Written(rows=len(self._index) + self._present, nbytes=self._nbytes, dropped=self.refused)

    def _plan_rows(self, item: Packed, entry: Namespace) -> Namespace:
        prefix, segment_prefix = _prefix(b"i", entry.number), _prefix(b"s", entry.number)
        number, parts = self._tail(segment_prefix, entry)
        size = sum(map(len, parts))
        rows = nbytes = 0
        for digest, record in zip(item.digests, item.records, strict=True):
            key = prefix + digest[:_INDEX_DIGEST_BYTES]
            is_planned = key in self._index
            if not item.replaces and (is_planned or (key not in self._doubtful and self._is_there(key))):
                self._present += 1
                continue
            if size and size + len(record) > SEGMENT_BYTES:  # also ends one with a long record in it
                number, parts, size = number + 1, [], 0
            self._index[key] = _LOCATION.pack(number, size, len(record) if len(record) <= SEGMENT_BYTES else 0)
            parts.append(record)
            self._segments[segment_prefix + number.to_bytes(4, "big")] = parts
            size += len(record)
            rows += not is_planned
            self._present += is_planned
            nbytes += len(record)
        self._nbytes += nbytes
        return replace(
            entry,
            next_segment=max(entry.next_segment, number + 1 if parts else number),
            rows=entry.rows + rows,
            nbytes=entry.nbytes + nbytes,
            touched_at=time.time(),
        )

    def _is_there(self, key: bytes) -> bool:
        return self._txn.get(key) is not None

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


class _Deletion:
    """One transaction of deletions, no more than may grow the file by ``room_bytes``.

    ``_gone`` counts what was deleted, for ``carry_out`` to bring the namespace table up to date.
    """

    def __init__(self, txn: lmdb.Transaction, room_bytes: int) -> None:
        self._txn = txn
        self._entries, self._nbytes = budget.deletable(txn, room_bytes)  # how much more
        self._gone: dict[bytes, list[int]] = {}  # namespace number -> rows, bytes
        self._is_nothing = True
        self.places: set[bytes] = set()  # index keys that were deleted or are free

    @property
    def rows(self) -> int:
        """How many rows were deleted."""
        return sum(rows for rows, _ in self._gone.values())

    def delete_segments(self, segments: deque[bytes]) -> None:
        """Delete the first segments with all their rows, and take those that are done with off the queue."""
        while segments and self._entries > 0:
            key = segments[0]
            value = self._txn.get(key, _NOTHING)
            if len(value) > self._nbytes:
                return
            if len(value) > SEGMENT_BYTES:  # one record alone: not copied to be walked
                records = [(digest_of(value), len(value))]
            else:
                records = [(digest_of(record), len(record)) for record in _walk_records(bytes(value))]
            for digest, nbytes in records:
                place = b"i" + key[1:4] + digest[:_INDEX_DIGEST_BYTES]
                location = self._txn.get(place)
                if location is None or bytes(location[:4]) != key[4:]:
                    continue
                if self._entries <= 0:
                    return
                self._delete_row(place, nbytes)
            self._delete_segment(segments.popleft())

    def delete_rows(self, number: int, digests: deque[bytes]) -> None:
        """Delete the rows of the first digests, and take those that are done with off the queue.

        A segment goes with its last row; else the bytes of a deleted row stay in it.
        """
        prefix = _prefix(b"i", number)
        touched: set[bytes] = set()
        while digests and self._entries > 0:
            place = prefix + digests[0][:_INDEX_DIGEST_BYTES]
            location = self._txn.get(place)
            if location is not None:
                location = bytes(location)
                key = _prefix(b"s", number) + location[:4]
                size = len(self._txn.get(key, _NOTHING))
                if key not in touched:
                    if size > self._nbytes:
                        break
                    touched.add(key)
                    self._nbytes -= size  # as if it went; whether it does turns out below
                    self._entries -= 2
                self._delete_row(place, _length_at(location, size))
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
        for fingerprint, entry in list(_all_namespaces(self._txn)) if self._gone else ():
            rows, nbytes = self._gone.get(entry.number.to_bytes(3, "big"), (0, 0))
            if not rows:
                continue
            if entry.rows <= rows and entry.verdict is Verdict.UNKNOWN:
                self._txn.delete(b"n" + fingerprint)
            else:
                left = replace(entry, rows=max(0, entry.rows - rows), nbytes=max(0, entry.nbytes - nbytes))
                _write_namespace(self._txn, fingerprint, left)
        return True

    def _delete_row(self, place: bytes, nbytes: int) -> None:
        self._txn.delete(place)
        gone = self._gone.setdefault(place[1:4], [0, 0])
        gone[0] += 1
        gone[1] += nbytes
        self._entries -= 1
        self._is_nothing = False

    def _delete_segment(self, key: bytes) -> None:
        self._nbytes -= len(self._txn.get(key, _NOTHING))
        self._txn.delete(key)
        self._txn.delete(b"r" + key[1:])
        self._entries -= 2
        self._is_nothing = False

    def _is_live(self, key: bytes) -> bool:
        """Tell whether a segment has a row that the index knows, or bytes that cannot be walked."""
        segment = memoryview(self._txn.get(key, _NOTHING))
        for record in _walk_records(segment):
            location = self._txn.get(b"i" + key[1:4] + digest_of(record)[:_INDEX_DIGEST_BYTES])
            if location is not None and bytes(location[:4]) == key[4:]:
                return True
            segment = segment[len(record) :]
        return len(segment) > 0


def _check(cancel: Callable[[], bool] | None) -> None:
    """Give up between two turns if a fork is about to happen."""
    if cancel is not None and cancel():
        raise TurnCancelledError


def _length_at(location: bytes, segment_bytes: int) -> int:
    """Return the length of the record that an index entry points at; 0 for a damaged entry."""
    if len(location) != _LOCATION.size:
        return 0
    _, offset, length = _LOCATION.unpack(location)
    return int(length) or max(0, segment_bytes - int(offset))


def _find_namespace(txn: lmdb.Transaction, fingerprint: bytes) -> Namespace:
    """Return the entry, or a new one that the caller has to write."""
    entry = _read_namespace(txn, fingerprint)
    if entry is not None:
        return entry
    # Numbers are never used twice: a reader may still know the number of a deleted namespace.
    number = int.from_bytes(bytes(txn.get(_NEXT_NUMBER, b"")), "big")
    if number >= _MOST_NAMESPACES:
        raise StoreError("the namespace table is full; clear() the cache", kind="namespaces_full")
    txn.put(_NEXT_NUMBER, (number + 1).to_bytes(4, "big"))
    now = time.time()
    return Namespace(number, 0, 0, 0, now, now)


def _read_records(
    txn: lmdb.Transaction, number: int, digests: Sequence[bytes]
) -> tuple[list[memoryview | None], Collection[bytes]]:
    """Return a view of each digest's record, or None, and the keys of the segments they lie in."""
    prefix, segment_prefix = _prefix(b"i", number), _prefix(b"s", number)
    get, unpack = txn.get, _LOCATION.unpack
    records: list[memoryview | None] = []
    loaded: dict[bytes, Any] = {}
    for digest in digests:
        location = get(prefix + digest[:_INDEX_DIGEST_BYTES])
        if location is None:
            records.append(None)
            continue
        key = segment_prefix + location[:4]
        segment: Any = loaded.get(key)
        if segment is None:
            segment = loaded[key] = get(key, _NOTHING)
        try:
            _, offset, length = unpack(location)
        except struct.error:
            offset, length = 0, 1  # a damaged entry: a record of one byte fails every check
        records.append(segment[offset : offset + length] if length else segment[offset:])
    return records, loaded.keys()


_NOTHING = memoryview(b"")


def _read_namespace(txn: lmdb.Transaction, fingerprint: bytes) -> Namespace | None:
    value = txn.get(b"n" + fingerprint)
    return None if value is None else _parse_namespace(bytes(value))


@lru_cache(maxsize=1024)
def _parse_namespace(value: bytes) -> Namespace | None:
    """Return the entry; None for one that this version cannot read, which is then as good as absent."""
    try:
        match msgpack.unpackb(value, max_array_len=16, max_map_len=0, max_str_len=0, max_bin_len=0, max_ext_len=0):
            case [number, next_segment, rows, nbytes, created_at, touched_at, *more] if (
                all(type(v) is int and v >= 0 for v in (number, next_segment, rows, nbytes))
                and all(type(v) is float and math.isfinite(v) for v in (created_at, touched_at))
                and number < _MOST_NAMESPACES
                and next_segment < _MOST_SEGMENTS
            ):
                verdict = _VERDICTS.get(more[0], Verdict.UNKNOWN) if more and type(more[0]) is int else Verdict.UNKNOWN
                return Namespace(number, next_segment, rows, nbytes, created_at, touched_at, verdict)
    except (ValueError, msgpack.exceptions.UnpackException):
        pass
    return None


def _write_namespace(txn: lmdb.Transaction, fingerprint: bytes, entry: Namespace) -> None:
    txn.put(b"n" + fingerprint, msgpack.packb(astuple(entry)))


def _all_namespaces(txn: lmdb.Transaction) -> Iterator[tuple[bytes, Namespace]]:
    for key, value in _scan(txn, b"n"):
        entry = _parse_namespace(bytes(value))
        if entry is not None:
            yield bytes(key[1:]), entry


def _scan(txn: lmdb.Transaction, prefix: bytes) -> Iterator[tuple[bytes | memoryview, bytes | memoryview]]:
    """Yield keys that begin with ``prefix`` and their values; views that end with the transaction."""
    with txn.cursor() as cursor:
        if cursor.set_range(prefix):
            for key, value in cursor:
                if key[: len(prefix)] != prefix:
                    return
                yield key, value


def _first_segments(txn: lmdb.Transaction, number: int) -> deque[bytes]:
    """Return the keys of a namespace's first segments, as many as one transaction may delete."""
    return deque(bytes(key) for key, _ in islice(_scan(txn, _prefix(b"s", number)), budget.MOST_COMMIT_ROWS))


def _of_live_segments(txn: lmdb.Transaction, recent: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the marks of use of segments that are still there."""
    return {key: when for key, when in recent.items() if txn.get(b"s" + key[1:]) is not None}


def _put_sorted(txn: lmdb.Transaction, items: Mapping[bytes, bytes]) -> None:
    if items:
        with txn.cursor() as cursor:
            cursor.putmulti(sorted(items.items()))


def _walk_records(segment: bytes | memoryview) -> Iterator[memoryview]:
    view = memoryview(segment)
    while view:
        length = length_of(view)
        if length is None:
            return
        yield view[:length]
        view = view[length:]


@lru_cache(maxsize=4096)
def _prefix(kind: bytes, number: int) -> bytes:
    return kind + number.to_bytes(3, "big")


def _now() -> bytes:
    return time.time_ns().to_bytes(8, "big")
