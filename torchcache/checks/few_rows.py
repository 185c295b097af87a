"""A few rows of a batch that are computed once more by themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from torchcache.checks.distances import Distances, norm_of
from torchcache.checks.draws import Draws, other_numbers
from torchcache.checks.parts import rows_at
from torchcache.checks.plan import Output
from torchcache.errors import CorruptRecordError
from torchcache.inputs.batch import Batch
from torchcache.inputs.cached_call import CachedCall
from torchcache.inputs.sample_keys import keys_in_force
from torchcache.keys.contract import FollowsState
from torchcache.keys.ranks import collectives_done
from torchcache.layout import Found, Layout
from torchcache.results.batches import Results
from torchcache.results.classes import KnownClasses
from torchcache.results.padded import PaddedResults
from torchcache.results.rows import unsupported_leaf
from torchcache.results.tree import Tree

#: How many rows of a batch others are picked from.
_SAMPLE_ROWS = 16

#: How many different rows it takes to compute each once, and at most so many are.
_LEAST_DISTINCT_ROWS = 3
_MOST_DISTINCT_ROWS = 7

#: How many small batches are tried.
_MOST_BATCHES = 2

#: To a batch of up to this many rows one says little: the witness of so few is copied until copies are the most.
_LONE_ROWS = 4


@dataclass(frozen=True, slots=True)
class FewRows:
    """Rows of a batch that are computed once more by themselves.

    What the rows of a batch share is its size, mean, median, largest value. Rows with small results have none of that
    in common with the batch that they come from, unless the one that has the largest input is among them, which is left
    out. If a batch is weighed against its mean or median, some of those that were light in it are heavy among their
    like; and if it drops what is light, some of those that it kept would be dropped. So rows of zeros are left out too,
    where enough others are there. If not, most of the batch are copies of the smallest, which is then as heavy as the
    rest; one that is not zero is beside them where there is one.

    Attributes:
        values: What was computed first, by position; one row each.
        sample: Rows of the first batch, beside which those computed again are compared.
        order: The positions in the order in which they are computed again; the last one may be repeated.
        witness: The position of the row to compute with the next batch: the largest, or the smallest if it is the one
            that was left out.
    """

    values: dict[int, Found]
    sample: list[Found]
    order: list[int]
    witness: int

    @classmethod
    def of_batch(cls, computed: Sequence[Found], batch: Batch, results: Results, known: KnownClasses) -> FewRows | None:
        """Pick them.

        Args:
            computed: The values of a batch's rows; all rows are different.
            batch: The call.
            results: What rows consist of.
            known: What classes the values may have.

        Returns:
            None if nothing can be said of them.
        """
        sample = _sample_of(computed)
        n = len(sample)
        if not n:
            return None
        try:
            norms = [norm_of(row, results, known) for row in sample]
        except CorruptRecordError:
            return None  # the call itself will say so

        ranked = sorted(range(n), key=norms.__getitem__)
        loudest = batch.loudest([row.positions[0] for row in sample])
        # A row of zeros beside others was dropped, perhaps for what the others are: it stays, however large its input.
        quiet = _quiet(ranked, [i for i in loudest if norms[i] or not any(norms)])
        order = _order(quiet, norms)
        if not any(norms[i] for i in order):
            not_zero = [i for i in ranked if norms[i]]
            order = not_zero[:1] + order
        witness = ranked[0] if ranked[0] not in quiet else ranked[-1]
        return cls(
            values={sample[i].positions[0]: sample[i] for i in order},
            sample=sample,
            order=[sample[i].positions[0] for i in order],
            witness=sample[witness].positions[0],
        )

    def batches(self, n: int) -> Iterator[list[int]]:
        """Yield batches to compute them in: of two sizes other than ``n``, one of them even.

        The first is odd if ``n`` is even, and even if it is odd: some code does something else for every other size.
        """
        for size in itertools.islice(_sizes(len(self.order), n), _MOST_BATCHES):
            yield self.order + [self.order[-1]] * (size - len(self.order))

    @property
    def are_copies(self) -> bool:
        """Whether there was one row to choose from: copies of it show whether their number matters, and no more."""
        return len(self.sample) == 1

    @staticmethod
    def witnesses(n: int) -> int:
        """Return how often the witness of ``n`` rows is computed with the next batch."""
        return n + 1 if 1 < n <= _LONE_ROWS else 1

    def beside(self, value: Found) -> Found:
        """Return the rows of the sample that are of the same form as one, which may be none of them."""
        alike = [row.data for row in self.sample if row.layout == value.layout] or [value.data]
        return Found(range(len(alike)), value.layout, np.concatenate(alike))


def _sizes(least: int, n: int) -> Iterator[int]:
    """Yield sizes from ``least`` on, odd and even in turn, first one that is odd if ``n`` is even; ``n`` never."""
    first = least + (least % 2 == n % 2)
    return (size for size in itertools.count(first) if size != n)


def _sample_of(computed: Sequence[Found]) -> list[Found]:
    """Return some rows, evenly spread over all of them, one item each."""
    places = [(item, i) for item in computed for i in range(len(item.positions))]
    n = min(len(places), _SAMPLE_ROWS)
    sample: list[Found] = []
    for k in range(n):
        item, i = places[k * (len(places) - 1) // max(1, n - 1)]
        sample.append(Found([item.positions[i]], item.layout, item.data[i : i + 1]))
    return sample


def _quiet(ranked: Sequence[int], loudest: Sequence[int]) -> list[int]:
    """Return rows of a sample, the smallest result first, without those that have the largest input."""
    quiet = [i for i in ranked if i not in loudest]
    if not quiet:
        quiet = [i for i in ranked if i != loudest[0]]
    return quiet or [*ranked]


def _order(quiet: Sequence[int], norms: Sequence[float]) -> list[int]:
    """Return which rows of a sample are computed again, and in which order."""
    not_zero = [i for i in quiet if norms[i]]
    if len(not_zero) >= _LEAST_DISTINCT_ROWS:
        n_half = max(_LEAST_DISTINCT_ROWS, len(norms) // 2)
        return not_zero[: min(n_half, _MOST_DISTINCT_ROWS)]
    smallest = quiet[0]
    return [*quiet[1:][-1:], smallest, smallest, smallest]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What computing a few rows once more came to.

    Attributes:
        distance: How far the furthest of them is apart. None if nothing can be said: the module takes no small batch,
            or all is zero. NaN if they do not come back the same in the same batch either, so that something else than
            the batch shapes them.
        difference: In what their form differs, if it does.
        is_vacuous: They came back the same, and there was nothing in them that could have differed.
    """

    distance: float | None
    difference: str = ""
    is_vacuous: bool = False


class SmallBatches:
    """Computes a few rows once more.

    Args:
        cache_dtype: What values are rounded to, if they are.
        identity: The state that shapes results.
        known: What classes the values may have.
        distances: Compares rows.
    """

    def __init__(
        self,
        cache_dtype: torch.dtype | None,
        identity: FollowsState,
        known: KnownClasses,
        distances: Distances,
    ) -> None:
        self._cache_dtype = cache_dtype
        self._identity = identity
        self._known = known
        self._distances = distances

    def compare(self, call: CachedCall, few: FewRows, total: int, output: Output, allowed: float) -> Comparison:
        """Compute a few rows once more by themselves.

        Args:
            call: The call.
            few: The rows.
            total: How many rows they were computed with first.
            output: What came of these.
            allowed: How far they may be apart.
        """
        talks_before = collectives_done()
        # Other threads see it when the generators of everybody give other numbers: not without need.
        numbers = other_numbers if self._identity.sets_generators() else nullcontext
        for positions in few.batches(total):
            try:
                with numbers(0):
                    draws = Draws([*self._identity.generators(), *call.batch.generators])
                    parts = self._compute_few(call, positions, output.results)
                    has_drawn = draws.are_there()
                if has_drawn or collectives_done() != talks_before or self._identity.has_moved(call.look):
                    return Comparison(None)
                if parts is None:
                    return Comparison(math.inf)
                values = [few.values[position] for position in positions]
                apart = self._furthest(call, few, values, parts)
                if apart is None or apart <= allowed:
                    return Comparison(apart, is_vacuous=apart is None)
                with numbers(1):
                    again = self._compute_few(call, positions, output.results)
            except Exception as error:  # noqa: BLE001 - whatever a foreign forward raises for a small batch
                if is_out_of_memory(error):
                    return Comparison(None)
                continue
            first = [rows_at(parts, [row])[0] for row in range(len(positions))]
            is_same = again is not None and (self._furthest(call, few, first, again) or 0.0) <= allowed
            if not is_same:
                return Comparison(math.nan)
            difference = _difference_of_form(values[0].layout, total, parts[0].layout, len(positions), output.tree)
            return Comparison(apart, difference)
        return Comparison(None)

    def _compute_few(self, call: CachedCall, positions: Sequence[int], results: Results) -> list[Found] | None:
        """Forward the rows at ``positions``, some of which are the same; return None if the result has another form."""
        args, kwargs, form = call.batch.select(positions)
        with torch.no_grad(), keys_in_force(None if call.keys is None else [call.keys[p] for p in positions]):
            tree = form.flatten(call.function(*args, **kwargs))
        if unsupported_leaf(tree) is not None:
            return None
        if isinstance(form, PaddedResults):
            assert isinstance(results, PaddedResults)
            form = form.following(results.followed, results.shorten)
        try:
            parts, _ = form.take_apart(tree, len(positions), self._cache_dtype, self._known)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - a padded result of another form fails anywhere
            return None
        return parts

    def _furthest(
        self, call: CachedCall, few: FewRows, values: Sequence[Found], parts: Sequence[Found]
    ) -> float | None:
        """Return how far the furthest of a few rows is from its value."""
        apart = [self._distances.of(call, value, row, parts, few.beside(value)) for row, value in enumerate(values)]
        return max((distance for distance in apart if distance is not None), default=None)


def _difference_of_form(one: Layout, n: int, other: Layout, other_n: int, tree: Tree) -> str:
    """Say in what the rows of batches of two sizes differ; "" if they have one form."""
    if len(one.leaves) == len(other.leaves) == len(tree.paths):
        for leaf, other_leaf, path in zip(one.leaves, other.leaves, tree.paths, strict=True):
            if leaf.shape != other_leaf.shape:
                return (
                    f"{path} has rows of shape {leaf.shape} in a batch of {n}, and of shape {other_leaf.shape} in one "
                    f"of {other_n}"
                )
    if one.structure != other.structure:
        return (
            f"the result of a batch of {n} has another structure, or other plain values, than that of one of {other_n}"
        )
    return ""


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; on the CPU and in libraries, torch says so with a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("alloc" in text or "out of memory" in text)
