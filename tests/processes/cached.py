"""A cached module and a data set that calls it, importable by spawned workers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import torchcache


@torchcache.torchcache(persistent=True)
class Encoder(nn.Module):
    def __init__(self, cache_dir: Path | None) -> None:
        super().__init__()
        self.torchcache_persistent_cache_dir = cache_dir
        self.linear = nn.Linear(8, 1000)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Encoded(Dataset):
    """Sample ``i`` encoded, and where it is cached; what had to be computed is noted in a file.

    Args:
        n: How many samples there are.
        cache_dir: Where they are cached; None for the temporary directory.
        notes: The file, one line a sample.
        fails_at: Asking for this sample raises.
    """

    def __init__(self, n: int, cache_dir: Path | None, notes: Path, fails_at: int | None = None) -> None:
        self.encoder = Encoder(cache_dir).requires_grad_(False)
        self.n = n
        self.notes = notes
        self.fails_at = fails_at

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        if i == self.fails_at:
            raise RuntimeError("the worker fails on purpose")
        cache = self.encoder.cache_instance
        before = cache.stats().misses
        x = torch.full((1, 8), float(i))
        y = self.encoder(x)[0]
        assert torch.equal(y[:8], x[0])
        assert not y[8:].any()
        if cache.stats().misses > before:
            with self.notes.open("a") as file:
                file.write(f"{i}\n")
        return y, str(cache.cache_dir)


class Towers(nn.Module):
    """Stands for a model with several ways in, such as CLIP; of whole numbers, so that a row is the same in any batch.

    Args:
        cache_dir: Where results are cached.
        factor: Multiplies the weights.
    """

    def __init__(self, cache_dir: Path | None = None, factor: float = 1.0) -> None:
        super().__init__()
        self.torchcache_persistent = cache_dir is not None
        self.torchcache_persistent_cache_dir = cache_dir
        self.vision, self.text = nn.Linear(10, 4), nn.Linear(10, 4)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = (torch.arange(parameter.numel()).reshape(parameter.shape) + number) * factor
        self.requires_grad_(False)
        self.calls = 0

    @torchcache.torchcache()
    def encode_image(self, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        """Encode images."""
        self.calls += 1
        return self.vision(x) + shift

    @torchcache.torchcache()
    def encode_text(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x)

    def get_text_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode_image(x) * self.encode_text(x)


def encode_in_a_process(towers: Towers, name: str, x: torch.Tensor, answer: Path) -> None:
    """Call a method of towers that came from another process, and note what was found on disk."""
    method = getattr(towers, name)
    y = method(x)
    cache = method.cache_instance
    torch.save((y, cache.module_hash, cache.stats().store_hits), answer)
