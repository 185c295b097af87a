"""A cached module and a data set that calls it, importable by spawned workers."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.utils.data import Dataset

import torchcache


@torchcache.torchcache(persistent=True, persistent_cache_dir=os.environ.get("TEST_CACHE_DIR"))
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1000)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Encoded(Dataset):
    """Sample ``i`` encoded, with how many rows this process had to compute so far and where it caches."""

    def __init__(self, n: int, fails_at: int | None = None) -> None:
        self.encoder = Encoder().requires_grad_(False)
        self.n = n
        self.fails_at = fails_at

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, str]:
        if i == self.fails_at:
            raise RuntimeError("the worker fails on purpose")
        x = torch.full((1, 8), float(i))
        y = self.encoder(x)[0]
        assert torch.equal(y[:8], x[0])
        cache = self.encoder.cache_instance
        return y, cache.stats().misses, str(cache.cache_dir)
