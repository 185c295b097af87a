"""A writer is killed at a random instant, 0 to 60 ms after it started, again and again.

Invariant: every row that a returned ``put_many`` acknowledged is found afterwards, right in every byte; of
the batch under way either all rows are there or none; the next process reads and writes at once; nothing is
found damaged, and the bytes under the directory stay within the budget.

Directories change after a number of kills, and in half of them the first writer is killed within 6 ms, while
it makes the store. The seed chooses the instants; what the writer is doing then, the machine chooses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time

from stress.ledger import Ledger
from stress.members import Members
from stress.values import BATCH_ROWS, ViolationError
from stress.verdict import Run, Sampler, StoreTally, Trial
from torchcache.storage.contract import StoreSettings

TALLY = StoreTally

MOST_SECONDS = 0.06
CREATION_SECONDS = 0.006
MOST_KILLS_A_DIRECTORY = 40

_BUDGET_BYTES = 1 << 30
_ENOUGH_BYTES = 300 << 20
_AFTER_SECONDS = 30.0
_AUDIT_SECONDS = 120.0
_OLDER_BATCHES = 16


def run(asked: Run[StoreTally]) -> None:
    """Use up directories until the time is over or something is violated."""
    deadline = time.monotonic() + asked.seconds
    number = 0
    while time.monotonic() < deadline and not asked.has_failed():
        _use_directory(asked, number, deadline)
        number += 1


def _use_directory(asked: Run[StoreTally], number: int, deadline: float) -> None:
    """Kill writers on one directory; after each kill, another process looks and writes."""
    rng = asked.rng(number)
    ledger = Ledger(asked.jobs + 1, asked.jobs + 1)  # the last line is that of the process after
    settings = StoreSettings(
        max_persistent_cache_size=_BUDGET_BYTES,
        eviction="none",
        zstd_level=rng.choice((None, 3)),
        lock_timeout_seconds=20.0,
    )
    trial = Trial(asked, asked.directory / f"kill-{number}", settings, ledger, is_strict=True)
    sampler = Sampler(asked, trial.root.name, settings.max_persistent_cache_size)
    is_killed_early = rng.random() < 0.5
    try:
        with contextlib.closing(Members(asked, deadline - time.monotonic() + _AUDIT_SECONDS)) as members:
            for kill in range(rng.randint(1, MOST_KILLS_A_DIRECTORY)):
                first = [ledger.next_batch(line).number for line in range(asked.jobs)]
                running = [members.start(_write, trial, line) for line in range(asked.jobs)]
                time.sleep(rng.uniform(0.0, CREATION_SECONDS if is_killed_early and not kill else MOST_SECONDS))
                for pid in running:
                    members.kill(pid, sampler.look)
                    asked.tally.kills += 1
                members.join(members.start(_look_after, trial, first, f"{number} {kill}"), _AFTER_SECONDS, sampler.look)
                sampler.look()
                if time.monotonic() > deadline or _is_used_up(trial):
                    break
            members.join(members.start(trial.read_everything, asked.jobs), _AUDIT_SECONDS)
    finally:
        asked.tally.add(ledger, is_strict=True)
    if not asked.has_failed():
        shutil.rmtree(trial.root)


def _is_used_up(trial: Trial) -> bool:
    return sum(path.stat().st_size for path in trial.root.glob("*/data.mdb")) > _ENOUGH_BYTES


def _write(trial: Trial, line: int) -> None:
    """Commit one batch after the other; each is one transaction."""
    store, program = trial.open_store(), os.getppid()
    while os.getppid() == program:
        if not trial.put(store, trial.ledger.next_batch(line)):
            raise ViolationError("dropped", "a row was dropped, although there is room for all")
        trial.ledger.go_on(line)


def _look_after(trial: Trial, first: list[int], life: str) -> None:
    """Be the process that comes after a kill: read what was acknowledged, write, read that."""
    ledger, own = trial.ledger, len(first)
    rng, store = trial.run.rng(life), trial.open_store()
    for line, start in enumerate(first):
        under_way = ledger.next_batch(line)
        rows = trial.read(store, own, [under_way])
        if rows not in {0, BATCH_ROWS}:
            raise ViolationError("torn", f"{rows} of {BATCH_ROWS} rows of one commit are there: {under_way}")
        earlier = ledger.acknowledged(line)
        late = [batch for batch in earlier if batch.number >= start]
        for batch in [*late, *rng.sample(earlier, min(_OLDER_BATCHES, len(earlier)))]:
            trial.read(store, own, [batch])
    batch = ledger.next_batch(own)
    if not trial.put(store, batch):
        raise ViolationError("dropped", "the process after a kill cannot write")
    ledger.go_on(own)
    if trial.read(store, own, [batch]) != BATCH_ROWS:
        raise ViolationError("lost", "what the process after a kill wrote is not there")
