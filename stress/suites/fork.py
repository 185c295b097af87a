"""Forks beside a writer that commits all the time: from any thread, from children, from inside a cached call.

Invariant: no fork raises or hangs, in parent and child; a child reads what its parent has accepted, committed or
not, and what anybody committed, right in every byte; what a child flushed is there after it; children that are
killed cost nobody else anything. A later process finds everything that was acknowledged.

Each of ``jobs`` programs has a thread that fills the write queue, readers, and two threads that fork, one of them
the main one. All share one directory, which changes when it is large enough. No torch, so that a fork is cheap.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from stress.ledger import Ledger
from stress.members import Members
from stress.values import NAMESPACES, Batch, ViolationError
from stress.verdict import Run, Sampler, StoreTally, Trial
from torchcache.storage.contract import Lookup, StoreSettings, Written
from torchcache.storage.environment import Environment
from torchcache.storage.lmdb import LmdbStore
from torchcache.storage.writer import writer

#: From where a fork is made.
WAYS = ("main thread", "other thread", "inside a call", "child")

_FATES = {"reads": 5, "writes": 1, "killed": 2, "forks": 3}
#: So many siblings of a child end at once, as those do that become another program.
_MOST_LEAVING = 24
_FORKING_THREADS, _READERS, _GENERATIONS = 2, 2, 4
_LINES = 1 + _FORKING_THREADS * _GENERATIONS
_MEMBERS = _READERS + _FORKING_THREADS * _GENERATIONS

_BUDGET_BYTES = 1 << 30
_ENOUGH_BYTES = 200 << 20
_LONGEST_ROUND_SECONDS = 15.0
_QUEUE_BYTES = 1 << 20
_MOST_LIFE_SECONDS = 0.006
_CHILD_SECONDS = 30.0
_END_SECONDS = 60.0
_AUDIT_SECONDS = 120.0
_READ_BATCHES, _LATE_BATCHES = 2, 1
#: Long values and threads that never rest would leave little time for forks.
_LONG_BATCH_SHARE = 0.05
_FEED_PAUSE_SECONDS, _READ_PAUSE_SECONDS = 0.004, 0.02


@dataclass(slots=True)
class ForkTally(StoreTally):
    """What a run did.

    Attributes:
        forks: How many.
        longest_fork_ms: How long the longest kept its caller waiting.
        ways: Forks by where they were made.
    """

    forks: int = 0
    longest_fork_ms: float = 0.0
    ways: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))

    def is_proof(self) -> bool:
        return bool(self.reads and self.forks)

    def take_over(self, ledger: Ledger) -> None:
        """Add what the members of one directory counted."""
        self.add(ledger, is_strict=True)
        counts = ledger.counts()
        self.kills += counts["kills"]
        self.forks += sum(counts[way] for way in WAYS)
        self.ways = {way: count + counts[way] for way, count in self.ways.items()}
        self.longest_fork_ms = max(self.longest_fork_ms, 1000 * ledger.longest_seconds())


TALLY = ForkTally


def run(asked: Run[ForkTally]) -> None:
    """Use up directories until the time is over or something is violated."""
    if asked.plant == "open-handle":
        Environment.at_rest = lambda self: None  # type: ignore[method-assign] # noqa: ARG005
    warnings.simplefilter("ignore", DeprecationWarning)  # that threads run is the point
    deadline = time.monotonic() + asked.seconds
    number = 0
    while time.monotonic() < deadline and not asked.has_failed():
        _use_directory(asked, number, min(deadline, time.monotonic() + _LONGEST_ROUND_SECONDS))
        number += 1


def _use_directory(asked: Run[ForkTally], number: int, deadline: float) -> None:
    settings = StoreSettings(
        max_persistent_cache_size=_BUDGET_BYTES,
        eviction="none",
        zstd_level=asked.rng(number).choice((None, 3)),
        lock_timeout_seconds=30.0,
    )
    ledger = Ledger(asked.jobs * _LINES, asked.jobs * _MEMBERS + 1, ("kills", *WAYS))
    trial = Trial(asked, asked.directory / f"fork-{number}", settings, ledger, is_strict=True)
    sampler = Sampler(asked, trial.root.name, settings.max_persistent_cache_size)
    seconds = max(0.0, deadline - time.monotonic())
    try:
        with contextlib.closing(Members(asked, seconds + _END_SECONDS)) as members:
            running = [members.start(_Program(trial, job, f"{number} {job}").run) for job in range(asked.jobs)]
            while time.monotonic() < deadline and not asked.has_failed() and not _is_used_up(trial):
                sampler.look()
                time.sleep(0.01)
            ledger.end()
            for pid in running:
                members.join(pid, _END_SECONDS, sampler.look)
            auditor = members.start(trial.read_everything, asked.jobs * _MEMBERS)
            members.join(auditor, _AUDIT_SECONDS, sampler.look)
    finally:
        asked.tally.take_over(ledger)
    if not asked.has_failed():
        shutil.rmtree(trial.root)


def _is_used_up(trial: Trial) -> bool:
    return sum(path.stat().st_size for path in trial.root.glob("*/data.mdb")) > _ENOUGH_BYTES


class _Program:
    """A program that writes, reads and forks; also what its children know of it.

    Args:
        trial: The directory and what is known of it.
        job: Its number among the programs.
        life: Names its random numbers.
    """

    def __init__(self, trial: Trial, job: int, life: str) -> None:
        self._trial = trial
        self._ledger = trial.ledger
        self._job = job
        self._life = life
        self._starter = os.getpid()

    def run(self) -> None:
        """Go on until it is over; then everything that was accepted is committed and acknowledged."""
        self._store = _Queued(self._trial.open_store())
        self._members = Members(self._trial.run, _CHILD_SECONDS)
        self._feed = _Line(self._trial, self._store, self._job * _LINES)
        work = [self._fill, *(lambda i=i: self._read_on(i) for i in range(_READERS)), lambda: self._fork_on(1)]
        threads = [threading.Thread(target=self._noting, args=(item,)) for item in work]
        with contextlib.closing(self._members):
            for thread in threads:
                thread.start()
            self._noting(lambda: self._fork_on(0))
            for thread in threads:
                thread.join(_END_SECONDS)
                if thread.is_alive():
                    raise ViolationError("hang", "a thread of a program that forks does not come to its end")
        self._feed.flush()

    def _noting(self, work: Callable[[], object]) -> None:
        """Run the work of a thread: what it raises ends all."""
        try:
            work()
        except BaseException as error:
            self._trial.run.note(error)
            self._ledger.end()

    def _is_over(self) -> bool:
        return self._ledger.is_over() or os.getppid() != self._starter

    def _fill(self) -> None:
        while not self._is_over():
            self._feed.put()
            time.sleep(_FEED_PAUSE_SECONDS)

    def _read_on(self, reader: int) -> None:
        rng = self._trial.run.rng(self._life, "reader", reader)
        while not self._is_over():
            self._read(rng, self._job * _MEMBERS + reader)
            time.sleep(_READ_PAUSE_SECONDS)

    def _fork_on(self, thread: int) -> None:
        rng = self._trial.run.rng(self._life, "forks", thread)
        calls = _Line(self._trial, self._store, self._line(thread, 0))
        while not self._is_over():
            if rng.random() < 0.2:
                calls.put(lambda: self._fork(rng, thread, 0, "inside a call"))
            else:
                self._fork(rng, thread, 0, WAYS[thread])
        calls.flush()

    # -- one fork -----------------------------------------------------------------------------------------------

    def _fork(self, rng: random.Random, thread: int, generation: int, way: str) -> None:
        """Fork a child and some that leave at once, and see them to their end."""
        member = self._member(thread, generation)
        fates = list(_FATES)[: -1 if generation + 2 == _GENERATIONS else None]
        (fate,) = rng.choices(fates, [_FATES[name] for name in fates])
        lives: list[Callable[[], None]] = [lambda: self._live(fate, rng, thread, generation + 1)]
        lives += [lambda: None] * rng.randint(0, _MOST_LEAVING)
        children = []
        for life in rng.sample(lives, len(lives)):
            before = time.monotonic()
            children.append((life, self._members.start(life)))
            self._ledger.time(member, time.monotonic() - before)
            self._ledger.count(member, **{way: 1})
        for life, pid in children:
            if life is lives[0] and fate == "killed":
                time.sleep(rng.uniform(0.0, _MOST_LIFE_SECONDS))
                self._members.kill(pid)
                self._ledger.count(member, kills=1)
            else:
                self._members.join(pid, _CHILD_SECONDS)

    def _live(self, fate: str, rng: random.Random, thread: int, generation: int) -> None:
        """Be a child."""
        self._members = Members(self._trial.run, _CHILD_SECONDS)
        line = _Line(self._trial, self._store, self._line(thread, generation))
        member = self._member(thread, generation)
        self._read(rng, member)
        while fate == "killed":
            line.put()
            self._read(rng, member)
        if fate == "forks":
            self._fork(rng, thread, generation, "child")
            self._read(rng, member)
        if fate == "writes":
            batch = line.put()
            line.flush()
            self._trial.read(self._store, member, [batch])

    def _read(self, rng: random.Random, member: int) -> None:
        """Look up batches of anybody, and the last ones that this program, or the parent before the fork, accepted."""
        namespace = NAMESPACES[-1] if rng.random() < _LONG_BATCH_SHARE else rng.choice(NAMESPACES[:-1])
        batches = [self._ledger.any_batch(rng) for _ in range(_READ_BATCHES * len(NAMESPACES))]
        batches += self._feed.latest()
        batches = [batch for batch in batches if batch.namespace == namespace]
        if batches:
            self._trial.read(self._store, member, batches, own=self._feed)

    def _line(self, thread: int, generation: int) -> int:
        return self._job * _LINES + 1 + thread * _GENERATIONS + generation

    def _member(self, thread: int, generation: int) -> int:
        return self._job * _MEMBERS + _READERS + thread * _GENERATIONS + generation


class _Queued:
    """A store with the write queue of this process in front, as a cached call sees it."""

    def __init__(self, store: LmdbStore) -> None:
        self.store = store

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        found, missing = writer.get_many(self.store, namespace, digests)
        lookup = self.store.get_many(namespace, [digests[position] for position in missing])
        found += [replace(item, positions=[missing[i] for i in item.positions]) for item in lookup.found]
        return Lookup(found, [missing[i] for i in lookup.missing], lookup.corrupt)


class _Line:
    """The batches of one line that this process hands to the writer, as its only one.

    Also the container of what was accepted: all of that has to be found by this process, and by children that are
    forked later, committed or not.
    """

    def __init__(self, trial: Trial, queued: _Queued, line: int) -> None:
        self._trial = trial
        self._queued = queued
        self._line = line
        self._rng = trial.run.rng("line", line)
        self._accepted: set[Batch] = set()
        self._latest: deque[Batch] = deque(maxlen=_LATE_BATCHES * len(NAMESPACES))
        self._waiting: deque[Batch] = deque()  # accepted, and not yet seen to be committed

    def __contains__(self, batch: object) -> bool:
        return batch in self._accepted

    def latest(self) -> list[Batch]:
        """Return the last batches that were accepted."""
        return list(self._latest)

    def put(self, compute: Callable[[], object] | None = None) -> Batch:
        """Look the next batch up, run ``compute`` as a miss would, and hand the batch to the writer."""
        trial, store = self._trial, self._queued.store
        batch = trial.ledger.next_batch(self._line)
        if batch.namespace == NAMESPACES[-1] and self._rng.random() > _LONG_BATCH_SHARE:
            trial.ledger.go_on(self._line)  # leaves one out
            batch = trial.ledger.next_batch(self._line)
        if compute is not None:
            self._queued.get_many(batch.namespace, batch.digests)
            compute()
        if not trial.loses(batch) and not writer.put(
            store, self, batch.namespace, trial.rows(batch),
            queue_bytes=_QUEUE_BYTES, timeout_seconds=_CHILD_SECONDS / 2, flush_seconds=_CHILD_SECONDS / 2,
        ):  # fmt: skip
            raise ViolationError("refused", f"the queue did not take {batch} within {_CHILD_SECONDS / 2} s")
        self._waiting.append(batch)
        self._accepted.add(batch)
        self._latest.append(batch)
        trial.ledger.go_on(self._line)
        self._acknowledge()
        return batch

    def flush(self) -> None:
        """Wait until all of it is committed."""
        if not writer.flush(_CHILD_SECONDS / 2, self._queued.store):
            raise ViolationError("hang", f"a flush did not come to its end within {_CHILD_SECONDS / 2} s")
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Acknowledge what has left the queue: nothing leaves it unwritten without one of the notes below."""
        while self._waiting:
            batch = self._waiting[0]
            if any(writer.has_many(self._queued.store, batch.namespace, batch.digests)):
                break
            self._trial.ledger.acknowledge(self._waiting.popleft())

    # -- what the writer tells ----------------------------------------------------------------------------------

    def on_written(self, written: Written) -> None:
        if written.dropped:
            self._trial.run.note(ViolationError("dropped", f"there is room for all, and yet: {written}"))

    def on_fault(self, error: BaseException, rows: int) -> None:  # noqa: ARG002 - whatever it cost
        self._trial.run.note(error)
