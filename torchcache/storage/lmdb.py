"""The store contract on LMDB: rows in append-ordered segments, found through a small index.

This is the order of things: who may write now (the directory's turn), whether there is room (the budget), what makes
room (eviction), what is read again. The entries themselves are in ``table``, one write transaction in ``commit``, one
transaction of deletions in ``deletion``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lmdb

from torchcache.errors import StoreError
from torchcache.kinds import Drop, Fault
from torchcache.layout import Rows
from torchcache.storage import budget
from torchcache.storage.budget import Budget, Counts
from torchcache.storage.commit import Commit, cut
from torchcache.storage.contract import Lookup, Packed, StoreSettings, Verdict, Written, nothing_of
from torchcache.storage.deletion import Deletion
from torchcache.storage.directory import CacheDirectory, TurnCancelledError
from torchcache.storage.environment import shared_environment
from torchcache.storage.eviction import Eviction
from torchcache.storage.key_parts_file import (
    KeptParts,
    KeptState,
    Row,
    pack_parts,
    read_parts,
    relatives,
    write_parts,
)
from torchcache.storage.record import pack_rows, refusal_of, unpack_many
from torchcache.storage.table import (
    INDEX,
    INDEX_DIGEST_BYTES,
    claim_namespace,
    first_segments,
    now,
    prefix_of,
    put_sorted,
    read_namespace,
    read_records,
    use_of,
    uses_of_live_segments,
    write_namespace,
)

logger: logging.Logger = logging.getLogger(__name__)

#: At most this many segments that were read since the last commit are noted as used (for eviction="lru").
_MOST_USES = 4096

#: How many times at most a lookup is tried whose pages a writer used again.
_MOST_READS = 5

#: How many bytes one commit may have at most, whatever the budget.
_MOST_COMMIT_BYTES = 32 << 20

#: How often room is made for one commit before it is dropped: freed pages can be used two transactions later
#: only, and only in runs that are long enough.
_MOST_ROUNDS = 6

#: A namespace that is read is marked as used this often, so that others can tell stale from used.
_TOUCH_SECONDS = 600.0


class LmdbStore:
    """One module hash's values in an LMDB environment; see ``contract.Store``.

    Args:
        directory: The cache directory.
        name: The module hash, a plain file name.
        settings: Budget and waits.
        counts: As of ``Budget``.
    """

    def __init__(
        self, directory: CacheDirectory, name: str, settings: StoreSettings, counts: Counts = lambda: (1, 0)
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._environment = shared_environment(directory, directory.place_for(name), settings)
        self._budget = Budget(directory, settings, counts)
        self._eviction = Eviction(directory, self._environment, self._budget, settings.eviction)
        self._doubtful: set[bytes] = set()  # index keys whose record failed a check: overwritten
        self._uses: dict[bytes, bytes] = {}  # marks of use of segments read here; noted with the next commit
        self._touched: dict[bytes, float] = {}  # namespaces read here and when that was last noted

    @property
    def path(self) -> Path:
        """The subdirectory of the environment."""
        return self._environment.path

    @property
    def most_commit_bytes(self) -> int:
        """How large a commit should be at most: small against the budget."""
        return min(_MOST_COMMIT_BYTES, self._budget.slack_bytes() or 1)

    def is_present(self) -> bool:
        """Tell whether there is anything to read."""
        return self._environment.is_present()

    def announce(self) -> None:
        """Show the name of the subdirectory before anything is stored in it."""
        self._environment.files.announce()

    def knows(self, namespace: bytes) -> bool:
        """Tell whether rows or a verdict were ever stored in a namespace, and are there."""
        if not self._environment.is_present():
            return False
        try:
            with self._environment.reading() as txn:
                return read_namespace(txn, namespace) is not None
        except StoreError as error:
            if error.kind is Fault.ABSENT:
                return False
            raise

    def kept_parts(self) -> KeptParts | None:
        """Return what is kept of the keys that rows of this store have."""
        return read_parts(self.path, self._directory.access)

    def relatives(self, target: str) -> list[KeptParts]:
        """Return what is kept of a target's keys in other subdirectories; waits for nobody, and opens none."""
        return relatives(self._directory.path, self._directory.access, target, self._environment.name)

    def note_parts(
        self, target: str, module: tuple[Row, ...], state: KeptState, cancel: Callable[[], bool] | None = None
    ) -> None:
        """Keep the parts of a key beside the rows, if there is room for it."""
        with self._turn(cancel):
            if not self._has_environment():
                return
            kept = self.kept_parts()
            if kept is None or kept.target != target or kept.module != module:
                kept = KeptParts(target, module, ())
            data = pack_parts(kept.with_state(state))
            self._directory.measure()
            if self._budget.allows_new(2 * len(data)):  # until it is moved into place, there are two
                write_parts(self.path, self._directory.access, data)

    def shortage(self) -> Drop | None:
        """Say what is short, if writing is pointless for now, so that packing can be saved."""
        return self._budget.shortage()

    def used_bytes(self) -> int:
        return self._directory.used_bytes()

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        for _ in range(_MOST_READS - 1):
            try:
                return self._get_many(namespace, digests)
            except StoreError as error:
                if error.kind is not Fault.OVERWRITTEN:
                    raise
        return self._get_many(namespace, digests)

    def _get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        if not self._environment.is_present():
            return nothing_of(digests)
        try:
            with self._environment.reading() as txn:
                entry = read_namespace(txn, namespace)
                if entry is None:
                    return nothing_of(digests)
                if entry.verdict is Verdict.DEPENDENT:  # what is left of its rows answers nothing
                    return nothing_of(digests, entry.verdict)
                records, segments = read_records(txn, entry.number, digests)

                found, missing, corrupt = unpack_many(namespace, digests, records)
                if corrupt:
                    self._doubt(entry.number, [digests[p] for p in missing if records[p] is not None])
                del records  # views end with the transaction
        except StoreError as error:
            if error.kind is Fault.ABSENT:
                return nothing_of(digests)
            raise
        if self._settings.eviction == "lru" and len(self._uses) < _MOST_USES:
            self._uses.update(dict.fromkeys(map(use_of, segments), now()))
        return Lookup(found, missing, corrupt, entry.verdict)

    def _doubt(self, number: int, digests: Sequence[bytes]) -> None:
        """Remember records that failed a check: the next write of their samples replaces them."""
        prefix = prefix_of(INDEX, number)
        self._doubtful.update(prefix + digest[:INDEX_DIGEST_BYTES] for digest in digests)

    def needs_touch(self, namespace: bytes) -> bool:
        """Tell whether a read of ``namespace`` should be noted on disk; at most once in ten minutes."""
        moment = time.time()
        if moment - self._touched.get(namespace, 0.0) < _TOUCH_SECONDS:
            return False
        self._touched[namespace] = moment
        return True

    def touch(self, namespace: bytes, cancel: Callable[[], bool] | None = None) -> None:
        """Note that ``namespace`` is in use, so that it does not count as stale."""
        moment = time.time()
        with self._turn(cancel):
            if not self._has_environment():
                return
            with self._environment.writing() as txn:
                entry = read_namespace(txn, namespace)
                if entry is None or moment - entry.touched_at <= _TOUCH_SECONDS / 2:
                    txn.abort()
                    return
                uses, self._uses = self._uses, {}
                if self._allows_marks(txn, 1 + len(uses)):
                    put_sorted(txn, uses_of_live_segments(txn, uses))
                else:  # the times of use wait for the next commit
                    self._uses.update(uses)
                    if not self._allows_marks(txn, 1):
                        txn.abort()
                        self._budget.say_if_over()
                        return
                write_namespace(txn, namespace, replace(entry, touched_at=moment))

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
                entry = read_namespace(txn, namespace)
                self._directory.measure()
                deletion = Deletion(txn, self._budget.room_bytes())
                if entry is not None:
                    deletion.delete_segments(first_segments(txn, entry.number))
                return deletion.carry_out()

    def _note_verdict(self, namespace: bytes, verdict: Verdict) -> None:
        with self._environment.writing() as txn:
            entry = claim_namespace(txn, namespace)
            if not verdict.replaces(entry.verdict) or not self._allows_marks(txn, 2):
                txn.abort()
                return
            write_namespace(txn, namespace, replace(entry, verdict=verdict, touched_at=time.time()))

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
        dropped: Counter[Drop] = Counter()
        n, is_replacing = 0, False
        for item in packed:
            dropped.update(item.dropped)
            n += len(item.digests)
            is_replacing = is_replacing or bool(item.replaces)
        if not n and not is_replacing:
            return Written(dropped=dict(dropped))

        rows = nbytes = 0
        with self._turn(cancel):
            if n and not self._ensure_environment():
                dropped[self._budget.rest(self._environment.files.creation_bytes())] += n
                return Written(dropped=dict(dropped))
            self._follow_file()
            for item in packed:
                self._delete_replaced(item)

            started = now()  # what is used from now on is not evicted
            for part in cut(packed, self._budget.commit_rows(), self.most_commit_bytes):
                written = self._commit(part, started)
                rows += written.rows
                nbytes += written.nbytes
                dropped.update(written.dropped)
        return Written(rows, nbytes, {kind: count for kind, count in dropped.items() if count})

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
            entry = read_namespace(txn, namespace)
            if entry is None:
                txn.abort()
                waiting.clear()
                return 0
            # Until it is committed, and for good where there is no room: the next write replaces them.
            self._doubt(entry.number, waiting)
            self._directory.measure()
            deletion = Deletion(txn, self._budget.room_bytes())
            deletion.delete_rows(entry.number, waiting)
            deletion.carry_out()
        self._doubtful -= deletion.places
        return deletion.rows

    def _delete_replaced(self, item: Packed) -> None:
        """Delete what rows take the place of: overwritten, it would stay in its segment. Requires the turn."""
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
            uses, self._uses = self._uses, {}
            written, growth = self._try_commit(packed, uses)
            if not growth:
                return written
            self._uses.update(uses)
            if attempt == _MOST_ROUNDS - 1:
                break  # room that nobody takes would cost the rows in it
            if self._settings.eviction == "lru" and self._budget.room_bytes() < growth:
                self._start_afresh()
            elif not self._eviction.make_room(growth << attempt, keep, before=started, uses=self._uses):
                break

        # The reason may be the disk rather than the budget.
        dropped = dict(written.dropped)
        dropped[self._budget.rest(growth)] = dropped.pop(Drop.BUDGET, 0)
        return replace(written, dropped=dropped)

    def _start_afresh(self) -> None:
        """Replace a file that has grown into the reserve: LMDB's files do not shrink, so deleting does not help."""
        logger.info("%s has grown to its budget and is started afresh (eviction='lru')", self.path)
        self._remove_environment()
        self._ensure_environment()

    def _remove_environment(self) -> None:
        """Remove the environment with all that is remembered of it. Requires the turn."""
        self._environment.close()
        self._directory.remove(self._environment.name)
        self._directory.measure()
        self._doubtful.clear()
        self._uses.clear()

    def _has_environment(self) -> bool:
        """Tell whether there is anything to change. Requires the turn."""
        self._follow_file()
        return self._environment.is_present()

    def _follow_file(self) -> None:
        """See to it that what is written goes to the file that is on disk now. Requires the turn."""
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
            if not self._eviction.make_room_outside(self._environment.files.creation_bytes()):
                return False
        return False

    def _try_commit(self, packed: Sequence[Packed], uses: Mapping[bytes, bytes]) -> tuple[Written, int]:
        """Commit if the budget allows it; otherwise say what was dropped and how much room it needs."""
        with self._environment.writing() as txn:
            commit = Commit(txn, self._doubtful, uses)
            commit.plan(packed)
            if commit.is_nothing:
                txn.abort()
                return Written(dropped=commit.refused), 0
            growth = commit.growth_bytes()
            if self._budget.allows(growth, budget.free_bytes(txn, self._environment.last_page())):
                return commit.carry_out(), 0
            txn.abort()
        return Written(rows=commit.present_rows, dropped={Drop.BUDGET: commit.planned_rows, **commit.refused}), growth

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
            raise StoreError(f"{self._directory.path}: {error}", kind=Fault.DIRECTORY) from error


def _check(cancel: Callable[[], bool] | None) -> None:
    """Give up between two turns if a fork is about to happen.

    Raises:
        TurnCancelledError: If ``cancel`` says so.
    """
    if cancel is not None and cancel():
        raise TurnCancelledError
