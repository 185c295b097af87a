"""Filling the cache of a data set before it is used."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from torchcache.cache import Cache
from torchcache.errors import SampleError
from torchcache.report.progress import progress_bar
from torchcache.report.stats import CacheStats

T = TypeVar("T")

#: How long the queue and a flush wait for the disk while a cache is filled.
WARM_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Warmed:
    """What ``CachedDataset.warm`` came to, in samples.

    Attributes:
        found: Were there before.
        computed: Were computed and stored.
        not_stored: Were computed and could not be stored: they draw random numbers, or disk or budget are full.
    """

    found: int = 0
    computed: int = 0
    not_stored: int = 0

    def __add__(self, other: Warmed) -> Warmed:
        return Warmed(self.found + other.found, self.computed + other.computed, self.not_stored + other.not_stored)


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a dataset raised, in words: an exception of a worker need not survive the way to its parent."""

    index: Any
    error: str
    trace: str


class Filling(Dataset[Any]):
    """Computes samples where it is asked for them, in a worker or here, and returns only what became of each batch.

    Args:
        sample: Returns the sample at an index, from a cache where it can.
        make_cache: Makes the cache to fill, in the process that fills it.
    """

    def __init__(self, sample: Callable[[Cache, Any], object], make_cache: Callable[[], Cache]) -> None:
        self._sample = sample
        self._make_cache = make_cache
        self._cache: Cache | None = None  # of this process; a copy in another one makes its own

    def __getitems__(self, indices: list[Any]) -> tuple[Warmed, _Failure | None]:
        if self._cache is None:
            self._cache = self._make_cache()
        cache = self._cache
        before = cache.stats()
        failure: _Failure | None = None
        for index in indices:
            try:
                self._sample(cache, index)
            except Exception as error:  # noqa: BLE001 - whatever a dataset raises; told to the parent
                failure = _Failure(index, repr(error), traceback.format_exc())
                break
        cache.flush(WARM_SECONDS)
        return _difference(before, cache.stats()), failure

    def __getitem__(self, index: Any) -> object:  # noqa: ANN401 - as of Dataset
        return self.__getitems__([index])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": None}


def fill(
    filling: Filling, indices: Sequence[Any], name: str, *, batch_size: int, num_workers: int, progress: bool
) -> Warmed:
    """Compute and store the samples at ``indices`` that are not there yet; see ``CachedDataset.warm``.

    Args:
        filling: Computes them.
        indices: What to compute.
        name: What to call the dataset.
        batch_size: How many samples are computed between two flushes.
        num_workers: How many workers compute; 0 to do it here.
        progress: Whether to show a bar.

    Raises:
        SampleError: If the dataset raised; samples before it are kept.
    """
    loader = DataLoader(
        filling,
        batch_size=batch_size,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # the global one is the user's
    )
    total = Warmed()
    with progress_bar(len(indices), f"warming {name}", is_wanted=progress) as advance:
        for outcome, failure in loader:
            total += outcome
            advance(outcome.found + outcome.computed + outcome.not_stored)
            if failure is not None:
                raise SampleError(
                    f"the sample at index {failure.index!r} of {name} raised {failure.error}\n\n{failure.trace}",
                    index=failure.index,
                )
    return total


def _difference(before: CacheStats, after: CacheStats) -> Warmed:
    dropped = sum(after.dropped_rows.values()) - sum(before.dropped_rows.values())
    lost = dropped + after.queued_rows  # what the flush left is not on disk
    bypassed = after.bypassed_rows - before.bypassed_rows
    return Warmed(
        found=after.hits - before.hits,
        computed=after.misses - before.misses - lost,
        not_stored=lost + bypassed,
    )


def _as_it_is(batch: T) -> T:
    return batch
