"""Data loaders of every kind over a cached module, ended in every way, their workers killed now and then.

Invariant: every value that a loader gives is right; after an orderly end (all was read, an early break, an exception
in the data set, an iterator that nobody read) a second run computes nothing that was computed before; of a killed
worker it computes only what that had not flushed. No loader hangs, and no worker outlives its loader.

Each of ``jobs`` programs goes through cases: start method, persistent workers, pinned memory, number of workers,
whether the parent used the cache before, the ending and the kill are drawn at random.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing import util
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from stress.frozen import BUDGET_BYTES, Backbone, cached_backbone, right_features, samples
from stress.ledger import Ledger
from stress.members import Members, say_into
from stress.values import ViolationError
from stress.verdict import Run, Sampler, SharedTally
from torchcache import cache_of

METHODS = ("fork", "forkserver", "spawn")
ENDINGS = ("all", "break", "exception", "unread")

_ROWS = 48
_BATCH_ROWS = 4
_FLUSH_CHANCE = 0.1
_DEATH_CHANCE = 0.2
_MOST_DYING_SECONDS = 0.005
_ANSWER_SECONDS = 30  # of a worker; the loader raises then
_CASE_SECONDS = 90.0
_DEATH_SECONDS = 10.0
_SAID_SECONDS = 1.0
_RECORD = struct.Struct("<qq")
_FLUSHED, _DIES = -1, -2
_LOST = 5


@dataclass(slots=True)
class LoaderTally(SharedTally):
    """What a run did; expected are rows that a second run, or a child of the one that computed them, looked up.

    Attributes:
        cases: How many.
        methods: Cases by start method.
        endings: Cases by how they ended.
    """

    cases: int = 0
    methods: dict[str, int] = field(default_factory=lambda: dict.fromkeys(METHODS, 0))
    endings: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDINGS, 0))

    def is_proof(self) -> bool:
        return bool(self.reads and self.expected)

    def add(self, ledger: Ledger) -> None:
        """Add what the programs counted."""
        counts = ledger.counts()
        for name in ("reads", "expected", "hits", "kills", "second_run_rows_computed", "cases"):
            setattr(self, name, counts[name])
        self.methods = {name: counts[name] for name in METHODS}
        self.endings = {name: counts[name] for name in ENDINGS}


TALLY = LoaderTally

_COUNTED = ("kills", "second_run_rows_computed", "cases", *METHODS, *ENDINGS)


def run(asked: Run[LoaderTally]) -> None:
    """Let ``jobs`` programs go through cases until the time is over or something is violated."""
    torch.set_num_threads(1)
    util.get_temp_dir()  # made here, so that it is removed at the end, whoever is killed
    ledger = Ledger(1, asked.jobs, _COUNTED)
    sampler = Sampler(asked, "loader-*/case-*/cache", BUDGET_BYTES)
    deadline = time.monotonic() + asked.seconds
    try:
        with contextlib.closing(Members(asked, asked.seconds + 2 * _CASE_SECONDS)) as members:
            running = [members.start(_Program(asked, ledger, job).run) for job in range(asked.jobs)]
            last = dict.fromkeys(range(asked.jobs), (0, time.monotonic()))
            while time.monotonic() < deadline and not asked.has_failed():
                sampler.look()
                time.sleep(0.01)
                for job, (cases, since) in last.items():
                    if ledger.counts(job)["cases"] != cases:
                        last[job] = ledger.counts(job)["cases"], time.monotonic()
                    elif time.monotonic() - since > _CASE_SECONDS:
                        raise ViolationError("hang", f"case {cases} of job {job} takes more than {_CASE_SECONDS} s")
            ledger.end()
            for pid in running:
                members.join(pid, _CASE_SECONDS, sampler.look)
    finally:
        asked.tally.add(ledger)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One loader and its end.

    Attributes:
        stop: The sample that fails, or the row to break at.
        dies_at: The sample at which a worker is killed, or None. By itself, because one that is killed while it
            asks whether it should end leaves torch waiting for a lock for ever.
    """

    method: str
    ending: str
    workers: int
    is_persistent: bool
    is_pinned: bool
    used_rows: int
    stop: int
    dies_at: int | None

    @classmethod
    def deal(cls, rng: random.Random, method: str) -> _Case:
        return cls(
            method=method,
            ending=rng.choice(ENDINGS),
            workers=1 if method == "spawn" else rng.randint(1, 3),
            is_persistent=rng.random() < 0.4,
            is_pinned=rng.random() < 0.3,
            used_rows=rng.choice((0, 0, 1, 8)),
            stop=rng.randrange(_ROWS),
            dies_at=rng.randrange(_ROWS) if rng.random() < _DEATH_CHANCE else None,
        )


class _Program:
    """A program that makes one loader after the other."""

    def __init__(self, run: Run[LoaderTally], ledger: Ledger, job: int) -> None:
        self._run = run
        self._ledger = ledger
        self._job = job
        self._directory = run.directory / f"loader-{job}"

    def run(self) -> None:
        """Go through cases until it is over."""
        self._directory.mkdir()
        say_into(self._directory / "said.txt")
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than there are cores
        multiprocessing.set_forkserver_preload([__name__])
        program, number = os.getppid(), 0
        rng = self._run.rng(self._job)
        deck: list[str] = []
        while not self._ledger.is_over() and os.getppid() == program:
            deck = deck or self._deck(rng)
            case = _Case.deal(rng, deck.pop())
            print(f"case {number}: {case}", flush=True)
            self._try(case, number, rng)
            number += 1

    def _deck(self, rng: random.Random) -> list[str]:
        """Return start methods, the last one first: forks are cheap, the others wait until torch is imported.

        A fork server pays that once, so one program has it; each spawned worker pays anew.
        """
        if self._job:
            return ["fork"]
        return [*rng.sample(METHODS, 12, counts=(2, 9, 1)), "fork", "fork", "fork"]

    def _try(self, case: _Case, number: int, rng: random.Random) -> None:
        directory = self._directory / f"case-{number}"
        directory.mkdir()
        root, log = directory / "cache", _Log(directory / "computed")
        module = cached_backbone(root, is_wrong=self._run.plant == "wrong-value")
        data = _Samples(module, log, case, is_lossy=self._run.plant == "lost-record")
        used = set(range(case.used_rows))
        for i in used:
            self._check([data[i]])
        if case.method != "fork":
            cache_of(module).flush()  # only a forked child has what its parent has not committed
        try:
            self._go_through(case, data, used, rng)
        except (ConnectionError, EOFError) as error:  # to a killed worker
            # Torch says so in a signal handler too, but what that raises may be lost in some callback of Python's
            # own, or come only now; and no signal comes to us for a fork server's child.
            with contextlib.suppress(RuntimeError):
                time.sleep(_SAID_SECONDS)
            if not log.has_death():
                raise
            traceback.clear_frames(error.__traceback__)
        except RuntimeError as error:
            if case.dies_at is None or "DataLoader worker" not in str(error):
                raise
            traceback.clear_frames(error.__traceback__)
        self._end_workers(are_left=log.has_death())
        if not cache_of(module).flush():
            raise ViolationError("hang", "a flush did not come to its end")
        cache_of(module).close()
        self._run_again(root, log.kept(os.getpid()), rng)
        self._ledger.count(self._job, **{"cases": 1, case.method: 1, case.ending: 1, "kills": log.has_death()})
        shutil.rmtree(directory)

    def _go_through(self, case: _Case, data: _Samples, used: set[int], rng: random.Random) -> None:
        """Read from a loader and end it as the case says."""
        loader = DataLoader(
            data, batch_size=_BATCH_ROWS, num_workers=case.workers, multiprocessing_context=case.method,
            persistent_workers=case.is_persistent, pin_memory=case.is_pinned, timeout=_ANSWER_SECONDS,
            shuffle=True, generator=torch.Generator().manual_seed(rng.randrange(1 << 32)),
        )  # fmt: skip
        for _ in range(1 + case.is_persistent):
            rows, iterator = 0, iter(loader)
            try:
                while case.ending != "unread" and (batch := next(iterator, None)) is not None:
                    rows += self._check_batch(batch, used)
                    if case.ending == "break" and rows > case.stop:
                        break
            except RuntimeError as error:
                if case.ending != "exception" or "fails on purpose" not in str(error):
                    raise
                # Its frames hold the iterator in a cycle. When such a cycle is collected, the queues end before
                # the workers have been told, and torch waits five seconds for each and terminates it.
                traceback.clear_frames(error.__traceback__)
            del iterator

    def _end_workers(self, *, are_left: bool = False) -> None:
        """See that there are no workers; where one was killed, torch may have left some to themselves."""
        deadline = time.monotonic() + _DEATH_SECONDS
        while left := multiprocessing.active_children():
            if are_left:
                left[0].kill()
            elif time.monotonic() > deadline:
                raise ViolationError("left", f"workers outlive their loader: {left}")
            left[0].join(0.01)

    def _run_again(self, root: Path, kept: set[int], rng: random.Random) -> None:
        """Be a second run over the same directory, with another loader."""
        module = cached_backbone(root, is_wrong=self._run.plant == "wrong-value")
        data = _Samples(module)
        workers = rng.randint(0, 2)
        loader = DataLoader(
            data, batch_size=_BATCH_ROWS, num_workers=workers, multiprocessing_context="fork" if workers else None,
            timeout=_ANSWER_SECONDS if workers else 0,
        )  # fmt: skip
        for batch in loader:
            self._check_batch(batch, kept, is_second=True)
        del loader
        self._end_workers()
        cache_of(module).close()

    def _check_batch(self, batch: list[torch.Tensor], expected: set[int], *, is_second: bool = False) -> int:
        """Check the rows of a batch, and that those expected to be there were not computed; return how many came."""
        numbers, features, computed = batch
        self._check(zip(numbers, features, computed, strict=True))
        wanted = [bool(is_computed) for i, is_computed in zip(numbers.tolist(), computed, strict=True) if i in expected]
        lost = sum(wanted)
        self._ledger.count(self._job, expected=len(wanted), hits=len(wanted) - lost)
        if is_second:
            self._ledger.count(self._job, second_run_rows_computed=lost)
        if lost:
            when = "a second run" if is_second else "a worker"
            raise ViolationError("lost", f"{when} computes {lost} rows of {numbers.tolist()} that were there")
        return len(numbers)

    def _check(self, rows: Iterable[tuple[Any, torch.Tensor, Any]]) -> None:
        for i, features, _ in rows:
            if not torch.equal(features, right_features(torch.tensor([int(i)]))[0]):
                raise ViolationError("wrong", f"sample {int(i)} has the features of something else")
            self._ledger.count(self._job, reads=1)


class _Log:
    """Which process computed what, and when it had flushed; appended to by all of them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, number: int) -> None:
        """Note that this process computed a sample, or flushed."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, _RECORD.pack(os.getpid(), number))
        finally:
            os.close(descriptor)

    def has_death(self) -> bool:
        """Tell whether somebody was killed."""
        return any(number == _DIES for _, number in self._records())

    def kept(self, parent: int) -> set[int]:
        """Return the samples that have to be there: computed by who ended well, or flushed by who may not have.

        Where a worker was killed, torch may terminate the others; never the parent.
        """
        kept: set[int] = set()
        later: dict[int, set[int]] = {}
        for pid, number in self._records():
            if number == _FLUSHED:
                kept |= later.pop(pid, set())
            elif number != _DIES:
                later.setdefault(pid, set()).add(number)
        has_death = self.has_death()
        return kept.union(*(rows for pid, rows in later.items() if pid == parent or not has_death))

    def _records(self) -> list[tuple[int, int]]:
        return list(_RECORD.iter_unpack(self._path.read_bytes())) if self._path.exists() else []


class _Samples(Dataset[tuple[int, torch.Tensor, bool]]):
    """Sample ``i``: its number, its features and whether they had to be computed.

    Args:
        module: Computes them.
        log: Where it is noted what was computed.
        case: Says where it fails and dies, if so.
        is_lossy: Whether every fifth sample goes around the cache, to see that it is found.
    """

    def __init__(
        self, module: Backbone, log: _Log | None = None, case: _Case | None = None, *, is_lossy: bool = False
    ) -> None:
        self._module = module
        self._log = log
        self._fails_at = case.stop if case is not None and case.ending == "exception" else None
        self._dies_at = case.dies_at if case is not None else None
        self._parent = os.getpid()
        self._is_lossy = is_lossy

    def __len__(self) -> int:
        return _ROWS

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor, bool]:
        is_worker = os.getpid() != self._parent
        if is_worker and i == self._fails_at:
            raise RuntimeError("the data set fails on purpose")
        if is_worker and i == self._dies_at and self._log is not None:
            self._log.note(_DIES)
            time.sleep(random.uniform(0.0, _MOST_DYING_SECONDS))  # while its writer is at work
            os.kill(os.getpid(), signal.SIGKILL)
        numbers = torch.tensor([i])
        if self._is_lossy and i % _LOST == 0 and self._log is not None:
            self._log.note(i)
            return i, right_features(numbers)[0], True
        cache = cache_of(self._module)
        before = cache.stats().misses
        features = self._module(samples(numbers))[0]
        is_computed = cache.stats().misses > before
        if self._log is not None and is_computed:
            self._log.note(i)
            if torch.rand(()) < _FLUSH_CHANCE and cache.flush():
                self._log.note(_FLUSHED)
        return i, features, is_computed
