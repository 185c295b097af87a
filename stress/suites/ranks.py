"""Ranks that train a head behind a cached backbone, with samples dealt anew each epoch, and ranks killed midway.

Invariant: every rank gets the right features for every sample; once all ranks have flushed and met, nobody computes a
sample again that anybody has had, whichever rank it is dealt to; the same after one rank, or all, were killed in an
epoch and started again on the directory, and for a later process. No group hangs.

A group has two or four ranks (gloo on the loopback device, ``DistributedDataParallel``, ``DistributedSampler``) and a
directory of its own. Where one rank is killed, the others notice, flush and end, and all are started again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DistributedDataParallel would import it in every rank, for two seconds
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from stress.frozen import BUDGET_BYTES, FEATURES, Backbone, cached_backbone, right_features, samples
from stress.ledger import Ledger
from stress.members import Members, say_into
from stress.values import Batch, ViolationError
from stress.verdict import Run, Sampler, SharedTally
from torchcache import cache_of

_SIZES = (2, 4)
_ROWS = 96
_BATCH_ROWS = 8
_LAST_EPOCHS = 2
_STEP_SECONDS = 60.0  # until a group has come as far as it should
_COLLECTIVE_SECONDS = 45.0
_END_SECONDS = 60.0
_GROUP_SECONDS = 300.0
_LOST = 5


@dataclass(slots=True)
class RankTally(SharedTally):
    """What a run did; expected are samples that had been committed when a rank looked them up.

    Attributes:
        groups: Groups of ranks.
        restarts: How often ranks met again after a kill.
        epochs: Epochs of a rank.
    """

    groups: int = 0
    restarts: int = 0
    epochs: int = 0

    def is_proof(self) -> bool:
        return bool(self.reads and self.expected)

    def add(self, ledger: Ledger) -> None:
        """Add what the ranks of one group counted."""
        counts = ledger.counts()
        for name in ("reads", "expected", "hits", "second_run_rows_computed", "epochs"):
            setattr(self, name, getattr(self, name) + counts[name])


TALLY = RankTally

#: Gives logits and features.
_Call = Callable[[], tuple[torch.Tensor, ...]]
_COUNTED = ("second_run_rows_computed", "epochs", "steps", "restarts")


def run(asked: Run[RankTally]) -> None:
    """Let one group train after the other, until the time is over or something is violated."""
    torch.set_num_threads(1)
    deadline = time.monotonic() + asked.seconds
    number = 0
    while time.monotonic() < deadline and not asked.has_failed():
        _Group(asked, number).run()
        number += 1


class _Group:
    """A group of ranks on a directory of its own, seen from outside."""

    def __init__(self, asked: Run[RankTally], number: int) -> None:
        self._asked = asked
        self._rng = asked.rng(number)
        self._size = _SIZES[number % len(_SIZES)]
        self._directory = asked.directory / f"ranks-{number}"
        self._ledger = Ledger(1, self._size + 1, _COUNTED)
        self._sampler = Sampler(asked, f"{self._directory.name}/cache", BUDGET_BYTES)
        self._members = Members(asked, _GROUP_SECONDS)

    def run(self) -> None:
        """Train, with a kill or without, and look what a later process finds."""
        self._directory.mkdir()
        ranks = range(self._size)
        try:
            with contextlib.closing(self._members):
                running = self._start_all()
                for _ in range(self._rng.choice((0, 1, 1, 2))):
                    self._wait_for("steps", self._rng.randint(1, 2 * _ROWS // _BATCH_ROWS))
                    victims = ranks if self._rng.random() < 0.4 else [self._rng.choice(ranks)]
                    self._kill(running, victims)
                self._wait_for("epochs", _LAST_EPOCHS * self._size)
                self._ledger.end()
                for pid in running:
                    self._members.join(pid, _END_SECONDS, self._sampler.look)
                self._members.join(self._members.start(self._read_everything), _END_SECONDS, self._sampler.look)
        finally:
            self._asked.tally.add(self._ledger)
            self._asked.tally.groups += 1
        if not self._asked.has_failed():
            shutil.rmtree(self._directory)

    def _kill(self, running: list[int], victims: Sequence[int]) -> None:
        """Kill ranks; the others notice and come to their end, and all are started again."""
        self._ledger.count(self._size, restarts=1)
        for rank in victims:
            os.kill(running[rank], signal.SIGSTOP)  # else one may notice the death of another, and end by itself
        for rank in victims:
            self._members.strike(running[rank])
        for rank in victims:
            while not self._members.is_gone(running[rank]):
                self._sampler.look()
                time.sleep(0.01)
            self._asked.tally.kills += 1
        for rank in set(range(self._size)).difference(victims):
            self._members.join(running[rank], _END_SECONDS, self._sampler.look)
        self._asked.tally.restarts += 1
        running[:] = self._start_all()

    def _start_all(self) -> list[int]:
        generation = self._ledger.counts()["restarts"]
        ranks = (_Rank(self._asked, self._ledger, self._directory, rank, self._size) for rank in range(self._size))
        return [self._members.start(rank.run, generation) for rank in ranks]

    def _wait_for(self, count: str, more: int) -> None:
        """Wait until all ranks together have counted ``more`` since now."""
        start, since = self._ledger.counts()[count], time.monotonic()
        while self._ledger.counts()[count] < start + more and not self._asked.has_failed():
            if time.monotonic() - since > _STEP_SECONDS:
                raise ViolationError("hang", f"a group of {self._size} made no {more} {count} in {_STEP_SECONDS} s")
            self._sampler.look()
            time.sleep(0.01)

    def _read_everything(self) -> None:
        """Be a later process: whatever was acknowledged is there."""
        rank = _Rank(self._asked, self._ledger, self._directory, self._size, self._size)
        numbers = torch.arange(_ROWS)
        rank.look_up(numbers, lambda: 2 * (rank.module(samples(numbers)),))


class _Rank:
    """One rank; it ends when the group is asked to, or when another one was killed."""

    def __init__(self, asked: Run[RankTally], ledger: Ledger, directory: Path, rank: int, size: int) -> None:
        self._asked = asked
        self._ledger = ledger
        self._directory = directory
        self._rank = rank
        self._size = size
        self._looked_up: list[int] = []

    @property
    def module(self) -> Backbone:
        """The backbone of this process, made when it is first asked for."""
        if "_module" not in self.__dict__:
            self._module = cached_backbone(self._directory / "cache", is_wrong=self._asked.plant == "wrong-value")
        return self._module

    def run(self, generation: int) -> None:
        """Train until the group is asked to end."""
        say_into(self._directory / "said.txt")  # gloo says who it is connected to
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        if self._asked.plant == "lost-record":
            for number in range(0, _ROWS, _LOST):
                self._ledger.acknowledge(Batch(0, number))
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{self._directory / f'rendezvous-{generation}'}", rank=self._rank,
                world_size=self._size, timeout=timedelta(seconds=_COLLECTIVE_SECONDS),
            )  # fmt: skip
            self._train(100 * generation)
        except RuntimeError:
            if self._ledger.counts()["restarts"] == generation:  # nobody was killed
                raise
            self._commit()

    def _train(self, epoch: int) -> None:
        model = DistributedDataParallel(_Model(self.module))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        numbers: Any = range(_ROWS)
        sampler: Any = DistributedSampler(numbers, self._size, self._rank, seed=self._asked.seed)
        while not self._is_over():
            sampler.set_epoch(epoch)
            self._train_an_epoch(model, optimizer, torch.tensor(list(sampler)))
            epoch += 1

    def _is_over(self) -> bool:
        """Tell whether one of the ranks was asked to end."""
        is_over = torch.tensor(int(self._ledger.is_over()))
        dist.all_reduce(is_over, dist.ReduceOp.MAX)
        return bool(is_over)

    def _train_an_epoch(
        self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, numbers: torch.Tensor
    ) -> None:
        """Go through the own samples; then everything is committed, and everybody knows."""
        for part in numbers.split(_BATCH_ROWS):
            optimizer.zero_grad()
            logits = self.look_up(part, lambda part=part: model(samples(part)))
            nn.functional.cross_entropy(logits, part % 2).backward()
            optimizer.step()
            self._ledger.count(self._rank, steps=1)
        self._commit()
        dist.barrier()
        self._ledger.count(self._rank, epochs=1)

    def _commit(self) -> None:
        """Flush, and acknowledge what was looked up so far."""
        if not cache_of(self.module).flush():
            raise ViolationError("hang", "a flush did not come to its end")
        for number in self._looked_up:
            self._ledger.acknowledge(Batch(0, number))
        self._looked_up.clear()

    def look_up(self, numbers: torch.Tensor, call: _Call) -> torch.Tensor:
        """Call and check the features that come back; return the logits.

        Raises:
            ViolationError: If features are wrong, or samples were computed that had been committed.
        """
        expected = sum(self._ledger.is_acknowledged(Batch(0, number)) for number in numbers.tolist())
        before = cache_of(self.module).stats().misses
        logits, features = call()
        computed = cache_of(self.module).stats().misses - before
        if not torch.equal(features, right_features(numbers)):
            raise ViolationError("wrong", f"some of samples {numbers.tolist()} have the features of something else")
        lost = max(0, computed - (len(numbers) - expected))
        self._ledger.count(
            self._rank, reads=len(numbers), expected=expected, hits=expected - lost, second_run_rows_computed=lost
        )
        if lost:
            raise ViolationError("lost", f"{lost} of samples {numbers.tolist()} were computed again")
        self._looked_up += numbers.tolist()
        return logits


class _Model(nn.Module):
    """A head behind a backbone; also gives what the backbone gave."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(FEATURES, 2)

    def forward(self, digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone(digits)
        return self.head(features), features
