"""The work that both sides of the hit benchmark do: cases, model, rows and passes over them.

The rival's process imports this module too, so it must never import torchcache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

MEMORY_LIMIT_BYTES = 4_000_000_000  # more than any case holds
SEED = 6


class BenchmarkError(Exception):
    """A benchmark could not be carried out; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Case:
    """The shapes and numbers of one case. All tensors are float32."""

    name: str
    row_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    batch_size: int
    n_rows: int


CASES = {
    case.name: case
    for case in (
        Case("small", (3, 32, 32), (768,), 256, 8192),
        Case("image", (3, 224, 224), (768,), 64, 768),
        Case("tokens", (3, 224, 224), (197, 768), 64, 512),
    )
}


class Model(nn.Module):
    """A model of next to no cost whose values tell rows apart, the same bits in every batch.

    Its cost does not matter: what is timed never calls it.
    """

    offsets: Tensor

    def __init__(self, value_shape: tuple[int, ...]) -> None:
        super().__init__()
        *positions, self.width = value_shape
        offsets = torch.arange(prod(positions), dtype=torch.float32)
        self.register_buffer("offsets", offsets.view(*positions, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the first numbers of each row, with another offset at each position."""
        features = x.flatten(1)[:, : self.width]
        return features.view(len(x), *(1,) * (self.offsets.dim() - 1), self.width) + self.offsets


class Passes:
    """Passes over all rows of a case, in one shuffled order that both sides share.

    Standard normal rows are the kindest to the rival, whose hash is a weighted sum of a subsample.
    """

    def __init__(self, case: Case) -> None:
        random = torch.Generator().manual_seed(SEED)
        self._case = case
        self._rows = torch.randn(case.n_rows, *case.row_shape, generator=random)
        self._order = torch.randperm(case.n_rows, generator=random)

    def fill(self, module: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Call ``module`` once on each row; yields after each batch, for the caller to flush."""
        with torch.no_grad():
            for batch in torch.split(self._rows, self._case.batch_size):
                module(batch)
                yield

    def count_wrong(self, module: Callable[[Tensor], Tensor]) -> int:
        """Return how many rows ``module`` answers with other bits than the model."""
        model = Model(self._case.value_shape)
        n_wrong = 0
        with torch.no_grad():
            for _, batch in self.batches():
                is_wrong = module(batch).view(torch.int32) != model(batch).view(torch.int32)
                n_wrong += int(is_wrong.flatten(1).any(1).sum())
        return n_wrong

    def seconds(self, call: Callable[[Tensor, Tensor], object]) -> float:
        """Return the time that ``call(row numbers, batch)`` takes for all rows.

        Putting the batches together is not in it: that is a DataLoader's work, not the cache's.
        """
        total = 0.0
        with torch.no_grad():
            for index, batch in self.batches():
                start = time.perf_counter()
                result = call(index, batch)
                total += time.perf_counter() - start
                del result  # freed outside the clock, and before the next batch needs memory
        return total

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield row numbers ``(n,)`` and rows ``(n, ...)`` of each batch, in fresh memory."""
        for index in torch.split(self._order, self._case.batch_size):
            yield index, self._rows[index]
