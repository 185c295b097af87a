"""A crowd on one directory: writers and readers, one of them killed every 100 ms and replaced.

Invariant: every value that is found is right, byte by byte; a row that was acknowledged is found as long as
nothing is evicted; the bytes under the directory never exceed the budget (counted every 10 ms, from
outside); no member fails, waits for ever or finds the store damaged.

The time is split into rounds, each with a new directory: the eviction policies in turn, budget and
compression by the seed. The seed chooses victims and batches; when each process runs, the machine chooses.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time

from stress.ledger import Ledger
from stress.members import Members
from stress.values import NAMESPACES
from stress.verdict import Run, Sampler, StoreTally, Trial
from torchcache.storage.lmdb import StoreSettings

TALLY = StoreTally

KILL_SECONDS = 0.1
SAMPLE_SECONDS = 0.01
EVICTIONS = ("stale", "lru", "none")
BUDGETS = (8 << 20, 16 << 20, 64 << 20)

_LONGEST_ROUND_SECONDS = 60.0
_END_SECONDS = 60.0
_AUDIT_SECONDS = 120.0
_OWN_SHARE = 0.75  # a writer writes batches of the others as well, at the time they do
_READ_BATCHES = 8


def run(asked: Run[StoreTally]) -> None:
    """Run rounds until the time is over or something is violated."""
    n = math.ceil(max(len(EVICTIONS), asked.seconds / _LONGEST_ROUND_SECONDS))
    for number in range(n):
        if not asked.has_failed():
            _round(asked, number, asked.seconds / n)


def _round(asked: Run[StoreTally], number: int, seconds: float) -> None:
    rng = asked.rng(number)
    eviction = EVICTIONS[number % len(EVICTIONS)]
    settings = StoreSettings(
        budget_bytes=rng.choice(BUDGETS),
        eviction=eviction,
        zstd_level=rng.choice((None, 3)),
        lock_timeout_seconds=30.0,  # a crowd on few cores may have to wait; a wait without end is a violation
    )
    places = 2 * asked.jobs
    ledger = Ledger(asked.jobs, places + 1)
    trial = Trial(asked, asked.directory / f"crowd-{number}", settings, ledger, is_strict=eviction != "lru")
    sampler = Sampler(trial)
    try:
        with contextlib.closing(Members(asked, seconds + _END_SECONDS + _AUDIT_SECONDS)) as members:
            works = [_write if place < asked.jobs else _read for place in range(places)]
            running = [members.start(works[place], trial, place, f"{number} 0") for place in range(places)]
            start = time.monotonic()
            kills = 0
            while (now := time.monotonic() - start) < seconds and not asked.has_failed():
                sampler.look()
                if now >= KILL_SECONDS * (kills + 1):
                    place = rng.randrange(places)
                    members.kill(running[place], sampler.look)
                    kills += 1
                    asked.tally.kills += 1
                    running[place] = members.start(works[place], trial, place, f"{number} {kills}")
                time.sleep(max(0.0, SAMPLE_SECONDS - (time.monotonic() - start - now)))
            ledger.end()
            for pid in running:
                members.join(pid, _END_SECONDS, sampler.look)
            members.join(members.start(trial.read_everything, places), _AUDIT_SECONDS, sampler.look)
            sampler.look()
    finally:
        asked.tally.add(ledger, is_strict=trial.is_strict)
    if not asked.has_failed():
        shutil.rmtree(trial.root)


def _write(trial: Trial, place: int, life: str) -> None:
    """Commit batch after batch of the own line, and sometimes what another writer is at."""
    rng, store, ledger = trial.run.rng(life, place), trial.open_store(), trial.ledger
    program = os.getppid()
    while not ledger.is_over() and os.getppid() == program:
        if rng.random() < _OWN_SHARE:
            batch = ledger.next_batch(place)
            trial.put(store, batch)
            ledger.go_on(place)
        else:
            batch = ledger.next_batch(rng.randrange(ledger.n_lines))
            trial.put(store, batch)
        trial.read(store, place, [batch])


def _read(trial: Trial, place: int, life: str) -> None:
    """Look up batches, most of which are there."""
    rng, store, ledger = trial.run.rng(life, place), trial.open_store(), trial.ledger
    program = os.getppid()
    while not ledger.is_over() and os.getppid() == program:
        namespace = rng.choice(NAMESPACES)
        batches = [ledger.any_batch(rng) for _ in range(_READ_BATCHES * len(NAMESPACES))]
        batches = [batch for batch in batches if batch.namespace == namespace]
        if batches:
            trial.read(store, place, batches)
