"""Rows of sequences: cut from their padding, and padded again to the length of another batch.

A mask of shape ``(batch, length)`` says which positions of a sequence are real. A row is what lies from its first real
position to its last one, whatever lies around it. In results the dimensions that follow the length are cut in the same
way; positions outside of a row come back as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import msgpack
import numpy as np
import torch

from torchcache import outputs
from torchcache.arguments import Tensors
from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.keys.digest import digest_bytes
from torchcache.layout import Found, Layout
from torchcache.results import Results
from torchcache.structure import KnownClasses, Tree
from torchcache.tensors import flat_bytes, to_numpy

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the rows of a batch lie in its ``width`` positions, each from a start to before an end."""

    starts: Sequence[int]
    ends: Sequence[int]
    width: int

    @classmethod
    def of_mask(cls, mask: Tensors) -> Spans:
        """Read them off a mask.

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
            return cls([0] * n, [0] * n, 0)
        starts = is_real.argmax(axis=1)
        ends = np.where(is_real.any(axis=1), width - is_real[:, ::-1].argmax(axis=1), 0)
        return cls(starts.tolist(), ends.tolist(), width)

    @property
    def are_empty_somewhere(self) -> bool:
        """Whether a row has no real position at all."""
        return any(end <= start for start, end in zip(self.starts, self.ends, strict=True))

    @property
    def are_at_the_right(self) -> bool:
        """Whether there is padding in front of a row."""
        return any(self.starts)

    def length(self, position: int) -> int:
        """Return the length of a row."""
        return self.ends[position] - self.starts[position]

    def select(self, positions: Sequence[int], extra: int | None = None) -> Spans:
        """Return where some rows lie once they are alone, with one of ``extra`` positions at their end."""
        low, high = self.window(positions)
        width = max(high - low, extra or 0)
        first = low - (width - (high - low) if self.are_at_the_right else 0)
        starts = [self.starts[p] - first for p in positions]
        ends = [self.ends[p] - first for p in positions]
        if extra is not None:
            start = width - extra if self.are_at_the_right else 0
            starts, ends = [*starts, start], [*ends, start + extra]
        return Spans(starts, ends, width)

    def alone(self, position: int, width: int) -> Spans:
        """Return where a row lies by itself in ``width`` positions, of which it may have more."""
        length = min(self.length(position), width)
        start = width - length if self.are_at_the_right else 0
        return Spans([start], [start + length], width)

    def window(self, positions: Sequence[int]) -> tuple[int, int]:
        """Return the positions from the first start to the last end of some rows."""
        return min(self.starts[p] for p in positions), max(self.ends[p] for p in positions)


class PaddedTensors(Tensors):
    """A tensor whose first dimension beside the batch is padded."""

    __slots__ = ("spans",)

    def __init__(self, name: str, tensor: torch.Tensor, batch_dim: int, spans: Spans) -> None:
        super().__init__(name, tensor, batch_dim)
        self.spans = spans
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
        del shape[max(self.batch_dim, self.length_dim)], shape[min(self.batch_dim, self.length_dim)]
        return f"padded {self.name}", f"{self.tensor.dtype} {tuple(shape)}".encode()

    def digests(self, n: int) -> list[bytes]:
        data = flat_bytes(self._batch_first())
        item = len(data) // max(1, n * self.spans.width)
        row = self.spans.width * item
        places = enumerate(zip(self.spans.starts, self.spans.ends, strict=True))
        return [digest_bytes(data[i * row + start * item : i * row + end * item]) for i, (start, end) in places]

    def row(self, position: int) -> torch.Tensor:
        return self._narrow(super().row(position), self.spans.starts[position], self.spans.length(position)).clone()

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
        return torch.cat([zeros, rows] if self.spans.are_at_the_right else [rows, zeros], self.length_dim)

    def _narrow(self, rows: torch.Tensor, start: int, length: int) -> torch.Tensor:
        return rows.narrow(self.length_dim, start, length)


class PaddedResults(Results):
    """Results of padded batches; a value is its row, cut, with what of it was cut.

    Args:
        batch_dim: The dimension of tensors that samples lie along.
        spans: Where the rows lie.
        followed: For each leaf, the dimensions behind the batch that are as long as the mask; None where nothing is
            computed.
    """

    returns_as_given = False  # but with zeros outside of the rows

    def __init__(self, batch_dim: int, spans: Spans, followed: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(batch_dim)
        self.spans = spans
        self.followed = followed

    def at(self, spans: Spans) -> PaddedResults:
        """Return the same for rows that lie elsewhere."""
        return PaddedResults(self._batch_dim, spans)

    def following(self, followed: Sequence[Sequence[int]]) -> PaddedResults:
        """Return the same for results whose leaves follow the length in these dimensions."""
        return PaddedResults(self._batch_dim, self.spans, followed)

    def take_apart(
        self, tree: Tree, n: int, cache_dtype: torch.dtype | None, known: KnownClasses
    ) -> tuple[list[Found], int]:
        assert self.followed is not None
        outputs.check_leaves(self._as_given(tree), n, self._batch_dim)
        found: list[Found] = []
        overflowed = 0
        for (start, end), rows in _by_value(zip(self.spans.starts, self.spans.ends, strict=True)):
            leaves = [
                _narrowed(leaf[rows], dims, start, end - start)
                for leaf, dims in zip(tree.leaves, self.followed, strict=True)
            ]
            cut = outputs.flatten((_encode(self.followed), tree.build(leaves)))
            layout, data, more = outputs.take_apart(cut, len(rows), cache_dtype, known)
            found.append(Found(rows, layout, data))
            overflowed += more
        return found, overflowed

    def do_stack(self, found: Sequence[Found]) -> bool:
        forms = [_form(item.layout) for item in found]
        return all(form == forms[0] for form in forms[1:])

    def assemble(self, found: Sequence[Found], n: int, devices: Sequence[torch.device], known: KnownClasses) -> object:
        layout = found[0].layout
        node = known.decode(layout.structure, lambda _: outputs.stand_ins(layout))
        if node is None:
            raise CorruptRecordError("the result is of classes this process does not know")
        leaves = [
            self._filled(n, dims, _columns(found, number, device))
            for number, (dims, device) in enumerate(zip(_followed(layout.structure), devices, strict=True))
        ]
        try:
            result: Any = node.build(iter(leaves))
        except Exception as error:
            raise CorruptRecordError(f"a class of the result refuses to be rebuilt: {error!r}") from error
        return self._put_back(result[1])

    def is_known(self, layout: Layout, known: KnownClasses) -> bool:
        try:
            followed = _followed(layout.structure)
        except CorruptRecordError:
            return False
        fits = len(followed) == len(layout.leaves) and all(
            0 < dim <= len(leaf.shape) for leaf, dims in zip(layout.leaves, followed, strict=True) for dim in dims
        )
        return fits and outputs.is_known(layout, known)

    def _filled(self, n: int, dims: Sequence[int], columns: Iterator[tuple[Found, torch.Tensor]]) -> torch.Tensor:
        """Return one leaf of the result: zeros, with each row where it lies."""
        full: torch.Tensor | None = None
        for item, rows in columns:
            if full is None:
                shape = [n, *rows.shape[1:]]
                for dim in dims:
                    shape[dim] = self.spans.width
                full = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
            if not dims:
                full[list(item.positions)] = rows
                continue
            length = rows.shape[dims[0]]
            for start, members in _by_value(self.spans.starts[p] for p in item.positions):
                positions = [item.positions[i] for i in members]
                if any(self.spans.length(p) != length for p in positions):
                    raise CorruptRecordError("a row has not the length of its sample")
                _narrowed(full, dims, start, length)[positions] = rows[members]
        assert full is not None
        return full


def follow_length(tree: Tree, length: int, other: Tree, other_length: int) -> list[list[int]] | None:
    """Compare the results of batches of two lengths: which dimensions of each leaf are as long.

    Returns:
        None if something else depends on the length, such as a dimension of half of it, or a plain value.
    """
    if len(tree.leaves) != len(other.leaves):
        return None
    if tree.problem is None and other.problem is None and tree.encode() != other.encode():
        return None
    followed: list[list[int]] = []
    for one, two in zip(tree.leaves, other.leaves, strict=True):
        if one.dim() != two.dim():
            return None
        dims = [dim for dim in range(1, one.dim()) if (one.shape[dim], two.shape[dim]) == (length, other_length)]
        if any(one.shape[dim] != two.shape[dim] for dim in range(1, one.dim()) if dim not in dims):
            return None
        followed.append(dims)
    return followed


def _encode(followed: Sequence[Sequence[int]]) -> str:
    """Return as a text what dimensions follow the length: an int could be taken for the batch's size."""
    return ";".join(",".join(map(str, dims)) for dims in followed)


@lru_cache(maxsize=1024)
def _followed(structure: bytes) -> list[list[int]]:
    """Return what ``_encode`` wrote, from the structure of a layout.

    Raises:
        CorruptRecordError: If it is none that ``take_apart`` made.
    """
    try:
        _, text, _ = msgpack.unpackb(structure, raw=False, use_list=True, unicode_errors="surrogatepass")
        return [[int(dim) for dim in dims.split(",") if dim] for dims in text.split(";")]
    except Exception as error:
        raise CorruptRecordError("a row of a padded batch does not say what of it follows the length") from error


def _form(layout: Layout) -> tuple[object, ...]:
    """Return what rows that go into one result have in common."""
    followed = _followed(layout.structure)
    shapes = [
        [-1 if dim in dims else size for dim, size in enumerate(leaf.shape, start=1)]
        for leaf, dims in zip(layout.leaves, followed, strict=True)
    ]
    return layout.structure, [(leaf.dtype, leaf.output_dtype) for leaf in layout.leaves], shapes


def _columns(found: Sequence[Found], number: int, device: torch.device) -> Iterator[tuple[Found, torch.Tensor]]:
    """Yield one leaf of all rows of each item."""
    for item in found:
        start = sum(leaf.nbytes for leaf in item.layout.leaves[:number])
        leaf = item.layout.leaves[number]
        yield item, outputs.put_leaf(leaf, outputs.columns(item.data, start, start + leaf.nbytes), device)


def _narrowed(tensor: torch.Tensor, dims: Sequence[int], start: int, length: int) -> torch.Tensor:
    """Return a view of some positions along several dimensions."""
    for dim in dims:
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _by_value(values: Iterable[T]) -> list[tuple[T, list[int]]]:
    """Return each value with the numbers of those that are equal to it."""
    places: dict[T, list[int]] = {}
    for i, value in enumerate(values):
        places.setdefault(value, []).append(i)
    return list(places.items())
