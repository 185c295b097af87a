"""A crowd on one directory: 16 writers and 64 readers, one of them killed every 100 ms and replaced.

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
from torchcache.storage.contract import StoreSettings

TALLY = StoreTally

READERS_A_WRITER = 4
KILL_SECONDS = 0.1
SAMPLE_SECONDS = 0.01
EVICTIONS = ("stale", "lru", "none")
BUDGETS = (8 << 20, 16 << 20, 64 << 20)

_LONGEST_ROUND_SECONDS = 60.0
_END_SECONDS = 60.0
_AUDIT_SECONDS = 120.0
_OWN_SHARE = 0.75  # a writer writes batches of the others as well, at the time they do
_READ_BATCHES = 4
#: Where there are fewer cores than members, readers leave some for writers, and both for who counts the bytes.
_WRITERS_NICENESS, _READERS_NICENESS = 5, 10


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
        max_persistent_cache_size=rng.choice(BUDGETS),
        eviction=eviction,
        zstd_level=rng.choice((None, 3)),
        lock_timeout_seconds=30.0,  # a crowd on few cores may have to wait; a wait without end is a violation
    )
    places = (1 + READERS_A_WRITER) * asked.jobs
    ledger = Ledger(asked.jobs, places + 1)
    trial = Trial(asked, asked.directory / f"crowd-{number}", settings, ledger, is_strict=eviction != "lru")
    sampler = Sampler(asked, trial.root.name, settings.max_persistent_cache_size)
    try:
        with contextlib.closing(Members(asked, seconds + _END_SECONDS + _AUDIT_SECONDS)) as members:
            works = [_write if place < asked.jobs else _read for place in range(places)]
            running = []
            for place, work in enumerate(works):
                running.append(members.start(work, trial, place, f"{number} 0"))
                sampler.look()
            start = time.monotonic()
            kills = 0
            dying: dict[int, int] = {}
            while (now := time.monotonic() - start) < seconds and not asked.has_failed():
                sampler.look()
                if now >= KILL_SECONDS * (kills + 1) and len(dying) < places:
                    place = rng.choice([place for place in range(places) if place not in dying])
                    members.strike(running[place])
                    dying[place] = kills = kills + 1
                for place in [place for place in dying if members.is_gone(running[place])]:
                    running[place] = members.start(works[place], trial, place, f"{number} {dying.pop(place)}")
                    asked.tally.kills += 1
                time.sleep(max(0.0, SAMPLE_SECONDS - (time.monotonic() - start - now)))
            ledger.end()
            for place, pid in enumerate(running):
                if place in dying:
                    members.kill(pid, sampler.look)
                else:
                    members.join(pid, _END_SECONDS, sampler.look)
            members.join(members.start(trial.read_everything, places), _AUDIT_SECONDS, sampler.look)
            sampler.look()
    finally:
        asked.tally.add(ledger, is_strict=trial.is_strict)
    if not asked.has_failed():
        shutil.rmtree(trial.root)


def _write(trial: Trial, place: int, life: str) -> None:
    """Commit batch after batch of the own line, and sometimes what another writer is at."""
    os.nice(_WRITERS_NICENESS)
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
    os.nice(_READERS_NICENESS)
    rng, store, ledger = trial.run.rng(life, place), trial.open_store(), trial.ledger
    program = os.getppid()
    while not ledger.is_over() and os.getppid() == program:
        namespace = rng.choice(NAMESPACES)
        batches = [ledger.any_batch(rng) for _ in range(_READ_BATCHES * len(NAMESPACES))]
        batches = [batch for batch in batches if batch.namespace == namespace]
        if batches:
            trial.read(store, place, batches)
