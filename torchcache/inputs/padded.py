"""Calls whose samples are sequences, padded to one length.

A mask of shape ``(batch, length)`` says which positions of a sequence are real. A row is what lies from its first real
position to its last one, whatever lies around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from torchcache.errors import UncacheableError
from torchcache.inputs.arguments import Argument
from torchcache.inputs.batch import AnyArgument, Batch, CallArguments
from torchcache.inputs.leaves import Leaf, Tensors
from torchcache.keys.digest import digest_bytes
from torchcache.keys.tensors import flat_bytes, to_numpy
from torchcache.report.reasons import Reason
from torchcache.results.padded import PaddedResults
from torchcache.results.spans import Spans


class PaddedTensors(Tensors):
    """A tensor whose first dimension beside the batch is padded."""

    __slots__ = ("spans",)

    def __init__(self, name: str, tensor: torch.Tensor, batch_dim: int, spans: Spans) -> None:
        super().__init__(name, tensor, batch_dim)
        self.spans: Spans = spans
        if tensor.dim() < 2 or tensor.shape[self.length_dim] != spans.width:
            raise UncacheableError(
                f"argument {name!r} has shape {tuple(tensor.shape)}, and its mask has {spans.width} positions: padded "
                "names arguments whose first dimension beside the batch is as long as their mask",
                argument=name,
            )

    @property
    def length_dim(self) -> int:
        """The dimension that is padded."""
        return 0 if self.batch_dim else 1

    def describe(self) -> tuple[str, bytes]:
        shape = list(self.tensor.shape)
        for dim in sorted((self.batch_dim, self.length_dim), reverse=True):
            del shape[dim]
        return f"padded {self.name}", f"{self.tensor.dtype} {tuple(shape)}".encode()

    def digests(self, n: int) -> list[bytes]:
        data = flat_bytes(self.batch_first())
        item = len(data) // max(1, n * self.spans.width)  # bytes of one position
        digests: list[bytes] = []
        first = 0
        for start, end in zip(self.spans.starts, self.spans.ends, strict=True):
            digests.append(digest_bytes(data[first + start * item : first + end * item]))
            first += self.spans.width * item
        return digests

    def row(self, position: int) -> torch.Tensor:
        row = super().row(position)
        return self._narrow(row, self.spans.starts[position], self.spans.length(position)).clone()

    def select(self, positions: Sequence[int], extra: torch.Tensor | None, *, is_range: bool) -> torch.Tensor:
        low, high = self.spans.window(positions)
        rows = self._narrow(self._rows(positions, is_range=is_range), low, high - low)
        if extra is None:
            return rows.clone()
        width = max(high - low, extra.shape[self.length_dim])
        return torch.cat([self.widen(rows, width), self.widen(extra.to(rows.device), width)], self.batch_dim)

    def widen(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """Return rows with zeros on the side where the batch has its padding, or cut to fewer positions."""
        more = width - rows.shape[self.length_dim]
        if more <= 0:
            return self._narrow(rows, 0, width)
        shape = list(rows.shape)
        shape[self.length_dim] = more
        zeros = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
        parts = [zeros, rows] if self.spans.are_at_the_right else [rows, zeros]
        return torch.cat(parts, self.length_dim)

    def _narrow(self, rows: torch.Tensor, start: int, length: int) -> torch.Tensor:
        return rows.narrow(self.length_dim, start, length)


#: As ``Selection``, of a padded batch.
PaddedSelection = tuple[tuple[object, ...], dict[str, object], PaddedResults]


class PaddedBatch(Batch):
    """One call whose samples are sequences, padded to one length."""

    __slots__ = ()
    results: PaddedResults

    @property
    def spans(self) -> Spans:
        """Where the rows lie."""
        return self.results.spans

    def bypass_reason(self) -> Reason | None:
        reason = super().bypass_reason()
        if reason is None and self.spans.are_empty_somewhere:
            return Reason.FULLY_MASKED_ROW
        return reason

    def select(self, positions: Sequence[int], extra: tuple[Any, ...] | None = None) -> PaddedSelection:
        args, kwargs, _ = super().select(positions, extra)
        length: int | None = None
        for leaf, row in zip(self._leaves, extra or (), strict=False):
            if isinstance(leaf, PaddedTensors):
                length = row.shape[leaf.length_dim]
                break
        return args, kwargs, self.results.at(self.spans.select(positions, length))

    def alone(self, position: int, length: int, width: int) -> PaddedSelection:
        """Return the arguments of a call with one sample, cut to ``length`` positions and padded to ``width``."""
        rows: list[object] = []
        for leaf in self._leaves:
            if isinstance(leaf, PaddedTensors):
                row = leaf.select([position], None, is_range=True)
                rows.append(leaf.widen(leaf.widen(row, length), width))
            else:
                rows.append(leaf.select([position], None, is_range=True))
        return (*self._with_leaves(rows), self.results.at(self.spans.alone(position, length, width)))


def padded_batch(given: CallArguments, names: Iterable[str], mask_name: str, batch_dim: int) -> PaddedBatch | None:
    """Return a call as samples that are padded, or None if it has none of the tensors that may be.

    Args:
        given: The arguments; those with padded tensors are replaced.
        names: Of the tensors that are padded, and of their mask.
        mask_name: Of the mask.
        batch_dim: The dimension of tensors that samples lie along.

    Raises:
        UncacheableError: If the call has no mask, or a tensor does not fit to it.
    """
    tensors = {leaf.name: leaf for argument in given.others if not argument.is_shared for leaf in argument.tensors()}
    padded = tensors.keys() & names
    if not padded:
        return None
    mask = tensors.get(mask_name)
    if mask is None:
        raise UncacheableError(
            f"argument {min(padded)!r} is padded, and the call has no tensor {mask_name!r}, which is its mask; "
            "pass one, of ones where nothing is padded",
            argument=mask_name,
        )

    spans = spans_of_mask(mask)
    arguments: list[AnyArgument] = []
    for argument in given.others:
        if isinstance(argument, Argument):
            leaves = [_padded(leaf, spans) if leaf.name in padded else leaf for leaf in argument.leaves]
            arguments.append(replace(argument, leaves=leaves))
        else:
            arguments.append(argument)
    return PaddedBatch(replace(given, others=arguments), PaddedResults(batch_dim, spans))


def spans_of_mask(mask: Tensors) -> Spans:
    """Read off a mask where the rows are.

    Raises:
        UncacheableError: If it has not the shape of one.
    """
    if mask.tensor.dim() != 2 or mask.batch_dim > 1:
        raise UncacheableError(
            f"argument {mask.name!r} has shape {tuple(mask.tensor.shape)}, and a mask that padded names must have "
            "two dimensions, the batch and the length; pass the plain mask, and make other forms of it inside",
            argument=mask.name,
        )
    if not (mask.tensor >= 0).all():
        raise UncacheableError(
            f"argument {mask.name!r} has values below zero or none at all, and a mask that padded names must be 1 "
            "or True where a position is real, else 0 or False; pass that one, and make others of it inside",
            argument=mask.name,
        )
    is_real = to_numpy(mask.tensor.movedim(mask.batch_dim, 0) != 0)
    n, width = is_real.shape
    if not width:
        return Spans([0] * n, [0] * n, 0)
    starts = is_real.argmax(axis=1)
    ends = np.where(is_real.any(axis=1), width - is_real[:, ::-1].argmax(axis=1), 0)
    return Spans(starts.tolist(), ends.tolist(), width)


def _padded(leaf: Leaf, spans: Spans) -> PaddedTensors:
    assert isinstance(leaf, Tensors)
    return PaddedTensors(leaf.name, leaf.tensor, leaf.batch_dim, spans)
