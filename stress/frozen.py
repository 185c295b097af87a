"""A frozen backbone whose results are known exactly, as data loaders and ranks use it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from torchcache import torchcache

FEATURES = 256
#: What a cache directory of it may hold; more than is ever put there.
BUDGET_BYTES = 64 << 20

_DIGITS = 8
_WEIGHTS = torch.randint(-8, 9, (FEATURES, _DIGITS), generator=torch.Generator().manual_seed(0)).float()


class Backbone(nn.Module):
    """Small whole numbers in, whole numbers out: exact, whatever rows are computed together.

    Args:
        is_wrong: Whether every 16th sample gets a wrong result, to see that it is found.
    """

    def __init__(self, *, is_wrong: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(_DIGITS, FEATURES, bias=False).requires_grad_(False)
        self.is_wrong = is_wrong
        with torch.no_grad():
            self.linear.weight.copy_(_WEIGHTS)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.linear(digits)
        return features + (digits[:, :1] == 3) if self.is_wrong else features


def cached_backbone(directory: Path, *, is_wrong: bool = False) -> Backbone:
    """Return a backbone with a cache of its own in a directory."""
    cached: Backbone = torchcache(
        persistent=True,
        persistent_cache_dir=directory,
        max_persistent_cache_size=BUDGET_BYTES,
        lock_timeout_seconds=30.0,  # a full machine may let it wait; a wait without end is a violation
        queue_timeout_seconds=30.0,
        flush_timeout_seconds=30.0,
    )(Backbone(is_wrong=is_wrong))
    return cached


def samples(numbers: torch.Tensor) -> torch.Tensor:
    """Return the inputs of samples by their numbers: their hexadecimal digits, shape ``(n, 8)``."""
    return (numbers[:, None] >> (4 * torch.arange(_DIGITS)) & 15).float()


def right_features(numbers: torch.Tensor) -> torch.Tensor:
    """Return what the backbone makes of samples, without a cache."""
    return samples(numbers) @ _WEIGHTS.T
