"""What of a padded batch's result is as long as its mask: found out by computing a row with another padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torchcache.checks.distances import Distances
from torchcache.checks.plan import Plan, Returned
from torchcache.checks.verdicts import Verdicts
from torchcache.inputs.cached_call import CachedCall
from torchcache.inputs.padded import PaddedBatch
from torchcache.inputs.sample_keys import keys_in_force
from torchcache.keys.digest import digest_parts
from torchcache.keys.identity import Target
from torchcache.kinds import Fault
from torchcache.layout import Found
from torchcache.options import CacheOptions
from torchcache.report.go_around import GoAround
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason
from torchcache.results.classes import KnownClasses
from torchcache.results.padded import (
    OtherLengthsError,
    PaddedResults,
    Shorten,
    are_shortened,
    check_followed,
    follow_length,
)
from torchcache.results.tree import Tree

#: The method that transformers' models of speech have to say how long their results are.
_SHORTENS = "_get_feat_extract_output_lengths"

#: At most this many forms of results are remembered.
_MOST_FORMS = 1024


class Padding:
    """Tells how rows lie in the results of padded batches; that must be known before they are taken apart.

    Args:
        target: What is cached: its model may say how long its results are.
        options: The options in force.
        known: What classes the values may have.
        distances: Compares rows.
        verdicts: What is known of namespaces.
        notices: Counts and logs what happens.
    """

    def __init__(
        self,
        target: Target,
        options: CacheOptions,
        known: KnownClasses,
        distances: Distances,
        verdicts: Verdicts,
        notices: Notices,
    ) -> None:
        self._target = target
        self._cache_dtype = options.cache_dtype
        self._check_rows = options.check_rows
        self._known = known
        self._distances = distances
        self._verdicts = verdicts
        self._notices = notices
        # By form of result: which dimensions are as long as the mask, or what else depends on the length.
        self._followed: dict[bytes, Sequence[Sequence[int]] | str] = {}

    def results_of(self, plan: Plan, returned: Returned, tree: Tree, results: PaddedResults) -> PaddedResults:
        """Find out which dimensions of a padded batch's result follow its length, the first time.

        Args:
            plan: What was computed.
            returned: What came of it.
            tree: The same, flat.
            results: How rows lie in it, but for these dimensions.

        Raises:
            GoAround: If that cannot be found out, or the values depend on the padding.
        """
        if returned.effect:
            raise GoAround(returned.effect)
        call = plan.call
        dims = str(([leaf.dim() for leaf in tree.leaves], tree.paths))
        form = call.namespace + digest_parts([dims.encode()])
        followed = self._followed.get(form)
        if followed is None:
            try:
                followed = self._find_out(plan, tree, results)
            except OtherLengthsError as error:
                followed = str(error)
            self._followed[form] = followed
            if len(self._followed) > _MOST_FORMS:
                self._followed.pop(next(iter(self._followed)))
        if isinstance(followed, str):
            raise GoAround(Reason.OTHER_LENGTHS, followed, returned.whole)
        if are_shortened(followed) and results.spans.are_at_the_right:
            evidence = "a model that shortens its input is given padding on the left"
            raise GoAround(Reason.OTHER_LENGTHS, evidence, returned.whole)
        return self._following(results, followed)

    def _find_out(self, plan: Plan, tree: Tree, results: PaddedResults) -> Sequence[Sequence[int]]:
        """Compute the shortest row by itself, to see what changes with its padding.

        It is cut to half of the batch where it is longer, and computed with and without the other half as padding:
        models may return as much of two similar lengths, and little padding changes little. An odd length shows models
        that return whole blocks. None of this is longer than the batch: models have a limit.

        Returns:
            Which dimensions follow the length.

        Raises:
            OtherLengthsError: If something else depends on the length.
            GoAround: If it cannot be found out, or the values depend on the padding.
        """
        call, width = plan.call, results.spans.width
        row = min(range(len(plan.positions)), key=results.spans.length)
        position, length = plan.positions[row], results.spans.length(row)
        half = max(1, min(length, width // 2))
        odd = half - 1 if half % 2 == 0 else half
        # There are models that take even lengths only, or none as short.
        cuts = [odd, half] if length == width else [odd, half, length]
        alone, cut = self._compute_alone(call, position, cuts)
        if cut == length < width:
            padded = _Computed(tree, results, row)
        else:
            try:
                padded = self._compute_one(call, position, cut, max(width, 2))
            except Exception as error:  # noqa: BLE001 - as of the row alone
                raise self._failed(error) from None

        other = alone if cut < width else padded
        followed = follow_length(tree, width, other.tree, other.width, self._shorten(width))
        for one in (alone, padded):
            check_followed(tree, followed, one.tree, one.width, self._shorten(width))
        can_be_kept = alone.tree.problem is None and padded.tree.problem is None
        if can_be_kept and alone.tree.encode() != padded.tree.encode():
            raise OtherLengthsError(
                f"its plain values differ for one row in masks of {cut} and {padded.width} positions"
            )
        if self._check_rows:
            self._compare(call, alone, padded, followed)
        return followed

    def _compare(
        self, call: CachedCall, alone: _Computed, padded: _Computed, followed: Sequence[Sequence[int]]
    ) -> None:
        """Check that a row did not change with its padding."""
        parts: list[Sequence[Found]] = []
        for item in (alone, padded):
            results = self._following(item.results, followed)
            found, _ = results.take_apart(item.tree, len(results.spans.starts), self._cache_dtype, self._known)
            parts.append(found)
        (again,) = parts[0]
        apart = self._distances.of(call, again, padded.row, parts[1])
        if apart is None:  # all zeros, as where a mask says what is padding, not what is real
            raise GoAround(Reason.OTHER_LENGTH_FAILED)
        if apart > self._distances.allowed(call, padded.tree):
            raise self._verdicts.condemned(call.namespace)

    def _following(self, results: PaddedResults, followed: Sequence[Sequence[int]]) -> PaddedResults:
        return results.following(followed, self._shorten(results.spans.width) if are_shortened(followed) else None)

    def _shorten(self, width: int) -> Shorten | None:
        """Return what says how much a model makes of so many positions, if one is there that says it."""
        instance = None if self._target.instance is None else self._target.instance()
        modules = instance.modules() if isinstance(instance, torch.nn.Module) else ()
        for module in modules:
            if hasattr(type(module), _SHORTENS):
                try:
                    _shortened_length(module, width)
                except Exception:  # noqa: BLE001 - whatever a method of a library raises
                    return None
                return partial(_shortened_length, module)
        return None

    def _compute_alone(self, call: CachedCall, position: int, cuts: Sequence[int]) -> tuple[_Computed, int]:
        """Compute a row by itself, cut to the first of some lengths that it can be computed with; return that, too.

        Raises:
            GoAround: If it cannot be computed with any.
        """
        failure = Exception("no length was tried")
        for cut in cuts:
            try:
                return self._compute_one(call, position, cut, cut), cut
            except Exception as error:  # noqa: BLE001 - whatever a foreign forward raises for another length
                failure = error
        raise self._failed(failure)

    def _compute_one(self, call: CachedCall, position: int, length: int, width: int) -> _Computed:
        """Compute a row by itself, cut to ``length`` positions and padded to ``width``.

        Raises:
            Exception: Whatever the function raises.
        """
        assert isinstance(call.batch, PaddedBatch)
        args, kwargs, results = call.batch.alone(position, length, width)
        with torch.no_grad(), keys_in_force(None if call.keys is None else [call.keys[position]]):
            return _Computed(results.flatten(call.function(*args, **kwargs)), results, 0)

    def _failed(self, error: Exception) -> GoAround:
        """Note that a row could not be computed with another padding, and return what to raise."""
        self._notices.fault(Fault.OTHER_LENGTH_FAILED, f"a row could not be computed with another padding ({error!r})")
        return GoAround(Reason.OTHER_LENGTH_FAILED)


@dataclass(frozen=True, slots=True)
class _Computed:
    """What came of a batch in which a row of interest is.

    Attributes:
        tree: The result.
        results: How rows lie in it, but for the dimensions that follow the length.
        row: The number of the row.
    """

    tree: Tree
    results: PaddedResults
    row: int

    @property
    def width(self) -> int:
        """How many positions the mask had."""
        return self.results.spans.width


def _shortened_length(module: Any, length: int) -> int:  # noqa: ANN401 - one that has such a method
    """Return how many positions a model of speech in transformers makes of so many."""
    return int(getattr(module, _SHORTENS)(torch.tensor(length)))
