"""Jobs of several ranks: importable, so that torchrun and spawned processes find them.

Weights and inputs are small integers, so that a row comes out the same in any batch and values are compared exactly.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import get_rank as my_rank
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from torchcache import cache_of, torchcache

SAMPLES, FEATURES, EPOCHS, BATCH = 96, 6, 3, 4

#: No wait for another rank is longer: a rank that waits in vain fails.
PATIENCE = timedelta(seconds=20)


class Backbone(nn.Module):
    """Two layers of small whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Samples(Dataset):
    """Sample ``i`` is made of whole numbers that only ``i`` decides."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor]:
        return i, sample(i)


def sample(i: int) -> torch.Tensor:
    return torch.randint(-9, 10, (FEATURES,), generator=torch.Generator().manual_seed(i)).float()


def batch(first: int = 0, n: int = 4) -> torch.Tensor:
    return torch.stack([sample(i) for i in range(first, first + n)])


class Lines(logging.Handler):
    """Keeps what torchcache says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("torchcache").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(root: str, report: str, *, dies: bool = False) -> None:
    """Train a head behind a cached backbone, beside the same one behind an undecorated backbone.

    Each rank writes what it saw to a file of its own. The first time round, rank 1 may be killed in the first
    epoch: what every rank had committed by then is written to a file before.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    options = {"persistent": True, "persistent_cache_dir": root, "max_memory_cache_size": 0}
    cached, plain = torchcache(**options)(Backbone()), Backbone()
    torch.manual_seed(0)
    heads = [nn.Linear(5, 2), nn.Linear(5, 2)]
    heads[1].load_state_dict(heads[0].state_dict())
    models = [
        nn.parallel.DistributedDataParallel(nn.Sequential(backbone, head))
        for backbone, head in zip((cached, plain), heads, strict=True)
    ]
    optimizers = [torch.optim.SGD(head.parameters(), lr=1e-4) for head in heads]
    cache = cache_of(cached)
    sampler = DistributedSampler(Samples(), shuffle=True)
    loader = DataLoader(Samples(), batch_size=BATCH, sampler=sampler)
    epochs = []
    handles = None
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        before, seen = cache.stats(), []
        for number, (indices, x) in enumerate(loader):
            seen += indices.tolist()
            assert torch.equal(cached(x), plain(x))
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            if dies and number == 3:
                assert cache.flush(timeout_seconds=10)
                Path(report, f"committed-{rank}.json").write_text(json.dumps(seen))
                dist.barrier()
            if dies and number == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        assert cache.flush(timeout_seconds=10)
        dist.barrier()
        after = cache.stats()
        epochs.append(
            {"seen": seen, "misses": after.misses - before.misses, "hits": after.store_hits - before.store_hits}
        )
        (store,) = cache._core.tiers.open_stores()
        assert handles in (None, store._environment._handles), "the environment was opened again"
        handles = store._environment._handles
    assert torch.equal(heads[0].weight, heads[1].weight), "the head was trained with other values"
    stats = cache.stats()
    assert not stats.bypasses, stats
    assert not stats.faults, stats
    Path(report, f"rank-{rank}-of-{world}.json").write_text(json.dumps(epochs))


# -- collectives ------------------------------------------------------------------------------------------------


class ByChain(Backbone):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if dist.is_initialized():
            dist.all_reduce(y)
        return y


class ByHelper(Backbone):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return add_up(super().forward(x))


def add_up(y: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        from torch.distributed import broadcast, reduce

        reduce(y, 0)
        broadcast(y, 0)
    return y


class Inner(nn.Module):
    """A submodule whose gradient function does it."""

    class AddUp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: torch.Tensor) -> torch.Tensor:
            if not torch.distributed.is_initialized():
                return y.clone()
            parts = [torch.empty_like(y) for _ in range(2)]
            torch.distributed.all_gather(parts, y)
            return sum(parts)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.AddUp.apply(y)


class BySubmodule(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.third = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(super().forward(x))


class Hidden(Backbone):
    """Calls one in a way that no walk can see, as a library's code would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if dist.is_initialized():
            operator.attrgetter("all_reduce")(dist)(y)
        return y


FORWARDED: list[int] = []


class Noted(Backbone):
    """Notes how many rows it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        FORWARDED.append(len(x))
        return super().forward(x)


class Ranked(Backbone):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (100 * dist.get_rank() if dist.is_initialized() else 0)


class RankedByAnotherName(Backbone):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 100 * my_rank()


class RankedByGroup(Backbone):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 100 * dist.group.WORLD.rank()


def check_collectives(rank: int, start: Callable[[], None], root: str) -> None:
    """Rank 0 has everything cached and rank 1 nothing: both compute, and nobody waits in vain."""
    x = batch()
    said = Lines()
    made = {kind: torchcache()(kind()) for kind in (ByChain, ByHelper, BySubmodule)}
    for module in made.values() if rank == 0 else ():
        for _ in range(2):
            module(x)
        assert cache_of(module).stats().memory_hits == 4, "it is cached where there is no other rank"
    alone = torchcache(persistent=True, persistent_cache_dir=root)(Hidden())
    if rank == 0:
        assert torch.equal(alone(x), Backbone()(x))
        assert cache_of(alone).flush()
    start()
    for kind, module in made.items():
        for _ in range(2):
            assert torch.equal(module(x), Backbone()(x) * 2), kind
        stats = cache_of(module).stats()
        assert stats.bypasses == {"collectives": 2}, (kind, stats)
        assert stats.misses == (4 if rank == 0 else 0)
        assert sum(f"{kind.__name__}: the cache is bypassed" in line for line in said.lines) == 1, said.lines
    assert any("(collectives: all_reduce)" in line for line in said.lines), said.lines
    named = torchcache(persistent_module_hash="mine")(ByHelper())
    assert torch.equal(named(x), Backbone()(x) * 2)
    assert cache_of(named).stats().bypasses == {"collectives": 1}, "a name of the user's own does not hide it"
    assert torch.equal(alone(x), Backbone()(x) * 2), "rows of a run without other ranks are none of a job's"
    check_hidden(x)
    check_first_call(x)
    for options in ({}, {"persistent_module_hash": "ranked"}):
        check_rank(x, Ranked, persistent_cache_dir=root, **options)
    check_rank(x, RankedByAnotherName, persistent_cache_dir=root)
    check_rank(x, RankedByGroup, persistent_cache_dir=root)
    check_shared(x, root)


def check_hidden(x: torch.Tensor) -> None:
    """A collective that only shows while the call runs: nothing of it is ever kept, and all rows take part in it."""
    module = torchcache()(Hidden())
    mine, other = (x, x[[0, 1, 1, 1]])[:: 1 if dist.get_rank() == 0 else -1]
    for _ in range(5):
        assert torch.equal(module(mine), Backbone()(mine) + Backbone()(other))
    stats = cache_of(module).stats()
    assert (stats.memory_hits, stats.memory_rows) == (0, 0)
    assert stats.dropped_rows == {"collectives": 3 * len(mine.unique(dim=0))}, stats
    assert stats.bypasses == {"collectives": 5}, stats


def check_first_call(x: torch.Tensor) -> None:
    """Only the first computed call is forwarded as it is given: it shows that no other rank takes part."""
    module = torchcache(check_rows=False)(Noted())
    for rows in (x[[0, 0, 1]], x[[0, 1]], x[[1, 2, 2, 3]]):
        assert torch.equal(module(rows), Backbone()(rows))
    assert FORWARDED == [3, 2]
    stats = cache_of(module).stats()
    assert (stats.misses, stats.duplicates, stats.memory_hits, stats.memory_rows) == (4, 2, 3, 4), stats


def check_rank(x: torch.Tensor, kind: type[nn.Module], **options: str) -> None:
    """Ranks that share a cache do not share what depends on the rank."""
    module = torchcache(persistent=True, max_memory_cache_size=0, **options)(kind())
    for turn in range(2):
        if dist.get_rank() == turn:  # one after the other: the second could find what the first computed
            assert torch.equal(module(x), Backbone()(x) + 100 * dist.get_rank()), kind
        cache_of(module).flush()
        dist.barrier()
    assert torch.equal(module(x), Backbone()(x) + 100 * dist.get_rank()), kind
    assert (cache_of(module).stats().misses, cache_of(module).stats().store_hits) == (4, 4)


def check_shared(x: torch.Tensor, root: str) -> None:
    """They do share what does not."""
    module = torchcache(persistent=True, persistent_cache_dir=root, max_memory_cache_size=0)(Backbone())
    for turn in range(2):
        if dist.get_rank() == turn:
            module(x)
        cache_of(module).flush()
        dist.barrier()
    assert cache_of(module).stats().misses == (4 if dist.get_rank() == 0 else 0)


# -- sharding ---------------------------------------------------------------------------------------------------


def check_sharding() -> None:
    """Weights that lie in parts on all ranks: outside of the cached call they may, inside it they may not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    x = batch()
    expected = Backbone()(x)
    shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    # Sharded itself: torch gathers the weights in hooks around what is cached.
    module = torchcache()(Backbone())
    name = cache_of(torchcache()(Backbone())).module_hash
    shard(module)
    for _ in range(3):
        assert torch.equal(module(x), expected)
    assert cache_of(module).module_hash == name, "the ranks, and a run without sharding, share it"
    assert (cache_of(module).stats().misses, cache_of(module).stats().memory_hits) == (4, 8)

    # A head beside it is trained, also if only one rank has the rows.
    for is_whole_sharded in (False, True):
        module, head = half_cached(x), nn.Linear(5, 2)
        model = nn.Sequential(module, head)
        shard(head)
        if is_whole_sharded:
            shard(module)
            shard(model)
        before = head.weight.full_tensor().clone()
        optimizer = torch.optim.SGD(head.parameters(), lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        stats = cache_of(module).stats()
        assert (stats.bypasses, stats.misses) == ({}, 4), stats
        assert not torch.equal(head.weight.full_tensor(), before), "the head was not trained"

    # Sharded inside, in whichever way: the gathering is part of the call.
    def shard_inside(module: nn.Module) -> None:
        shard(module.first)

    def shard_all(module: nn.Module) -> None:
        shard(module.first)
        shard(module)

    def wrap_inside(module: nn.Module) -> None:
        module.first = FullyShardedDataParallel(module.first, device_id=torch.device("cpu"))

    def replicate_inside(module: nn.Module) -> None:
        module.first = nn.parallel.DistributedDataParallel(module.first.requires_grad_(True))

    for change in (shard_inside, shard_all, wrap_inside, replicate_inside):
        module = half_cached(x)
        change(module)
        for _ in range(2):
            assert torch.equal(module(x), expected), change.__name__
        assert cache_of(module).stats().bypasses == {"collectives": 2}, (change.__name__, cache_of(module).stats())

    # A model that FSDP 1 wraps as a whole gets its weights before the cached call.
    module = torchcache()(Backbone())
    wrapped = FullyShardedDataParallel(module, device_id=torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(wrapped(x), expected)
    assert cache_of(module).stats().memory_hits == 4

    # A batch norm that asks the other ranks; on the CPU torch refuses to run it.
    norm = torchcache()(nn.Sequential(nn.Linear(FEATURES, 5), nn.SyncBatchNorm(5)).requires_grad_(False))
    assert cache_of(norm).explain(x).bypass_reason == "batch_norm_in_training_mode"


def half_cached(x: torch.Tensor) -> nn.Module:
    """Return a cached backbone whose rows of ``x`` rank 0 has, and no other rank."""
    module = torchcache()(Backbone())
    if dist.get_rank() == 0:
        module(x)
    return module


def check_gradients() -> None:
    """Trainable cached parameters under DDP: what fails is said before it does."""
    said = Lines()
    x = batch()
    model = nn.Sequential(torchcache()(Backbone().requires_grad_(True)), nn.Linear(5, 2))
    replicated = nn.parallel.DistributedDataParallel(model)
    replicated(x).sum().backward()
    try:
        replicated(x).sum().backward()
    except RuntimeError as error:
        assert "Expected to have finished reduction in the prior iteration" in str(error)  # noqa: PT017
    else:
        raise AssertionError("this DDP does not wait for the gradients any more: the line says so in vain")
    (line,) = [line for line in said.lines if "parameters require grad" in line]
    for word in ("DistributedDataParallel", "requires_grad_(False)", "when_grad='bypass'"):
        assert word in line, line
    model = nn.Sequential(torchcache(when_grad="bypass")(Backbone().requires_grad_(True)), nn.Linear(5, 2))
    replicated = nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        replicated(x).sum().backward()
    assert model[0].first.weight.grad is not None


# -- entries ----------------------------------------------------------------------------------------------------


def join(rank: int, world: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world, timeout=PATIENCE
    )


def rank_that_trains(rank: int, world: int, meeting_point: str, root: str, report: str) -> None:
    join(rank, world, meeting_point)
    train(root, report)
    dist.destroy_process_group()


def rank_that_talks(rank: int, world: int, meeting_point: str, root: str) -> None:
    warnings.simplefilter("ignore")  # FSDP 1 is deprecated, and used all the same
    torch.set_num_threads(1)
    check_collectives(rank, lambda: join(rank, world, meeting_point), root)
    check_sharding()
    check_gradients()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":  # by torchrun
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=PATIENCE)
    train(sys.argv[1], sys.argv[2], dies=os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
    dist.destroy_process_group()
