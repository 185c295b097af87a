"""Rows of results of padded batches: cut from their padding, and padded again to the length of another batch.

In results the dimensions that follow the length are cut as the mask says; positions outside of a row come back as
zeros. A row is stored as a pair: a string that names the dimensions that were cut, and the result itself.

A model may shorten its input, as wav2vec 2.0 does. Dimensions that are as long as what it makes of the mask are named
with a minus. Such a row begins at the first position and is as long as what the model makes of its own length. How long
the result of another batch is, the longest row tells if it fills the mask; if none does, the batch is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import msgpack
import torch

from torchcache.errors import CorruptRecordError
from torchcache.layout import Found, Layout
from torchcache.results import rows
from torchcache.results.batches import Results
from torchcache.results.classes import KnownClasses
from torchcache.results.leaves import byte_ranges, columns, put_leaf
from torchcache.results.spans import Spans
from torchcache.results.tree import Tree, rebuild

T = TypeVar("T")

#: Returns how many positions a model makes of so many.
Shorten = Callable[[int], int]


class OtherLengthsError(Exception):
    """Something in a result depends on the length of its batch, and is not as long as the mask."""


class PaddedResults(Results):
    """Results of padded batches; a value is its row, cut, with what of it was cut.

    Args:
        batch_dim: The dimension of tensors that samples lie along.
        spans: Where the rows lie.
        followed: For each leaf, the dimensions behind the batch that follow the length, as ``follow_length`` returns
            them; None where nothing is computed.
        shorten: How long what the model makes of a row is, where a dimension in ``followed`` is negative.
    """

    returns_as_given = False  # but with zeros outside of the rows

    def __init__(
        self,
        batch_dim: int,
        spans: Spans,
        followed: Sequence[Sequence[int]] | None = None,
        shorten: Shorten | None = None,
    ) -> None:
        super().__init__(batch_dim)
        self.spans = spans
        self.followed = followed
        self.shorten = shorten

    def at(self, spans: Spans) -> PaddedResults:
        """Return the same for rows that lie elsewhere."""
        return PaddedResults(self._batch_dim, spans)

    def following(self, followed: Sequence[Sequence[int]] | None, shorten: Shorten | None) -> PaddedResults:
        """Return the same for results whose leaves follow the length in these dimensions."""
        return PaddedResults(self._batch_dim, self.spans, followed, shorten)

    def take_apart(
        self, tree: Tree, n: int, cache_dtype: torch.dtype | None, known: KnownClasses
    ) -> tuple[list[Found], int]:
        assert self.followed is not None
        rows.check_leaves(self._as_given(tree), n, self._batch_dim)

        # Rows of one start and end have one layout.
        found: list[Found] = []
        overflowed = 0
        for (start, end), members in _by_value(zip(self.spans.starts, self.spans.ends, strict=True)):
            short = 0 if self.shorten is None else self.shorten(end - start)
            leaves: list[torch.Tensor] = []
            for leaf, dims in zip(tree.leaves, self.followed, strict=True):
                leaves.append(_narrowed(_shortened(leaf[members], dims, short), dims, start, end - start))
            cut = rows.flatten((_encode(self.followed), tree.build(leaves)))
            layout, data, more = rows.take_apart(cut, len(members), cache_dtype, known)
            found.append(Found(members, layout, data))
            overflowed += more
        return found, overflowed

    def do_stack(self, found: Sequence[Found]) -> bool:
        forms = [_form(item.layout) for item in found]
        if not all(form == forms[0] for form in forms[1:]):
            return False
        if not found or not are_shortened(_followed(found[0].layout.structure)):
            return True
        return self.spans.are_filled_from_the_left

    def assemble(self, found: Sequence[Found], n: int, devices: Sequence[torch.device], known: KnownClasses) -> object:
        layout = found[0].layout
        leaves: list[torch.Tensor] = []
        for number, (dims, device) in enumerate(zip(_followed(layout.structure), devices, strict=True)):
            leaves.append(self._filled(n, dims, _leaf_of_each(found, number, device)))
        _, result = rebuild(rows.node_of(layout, known), leaves)
        return self._put_back(result) if self._batch_dim else result

    def is_known(self, layout: Layout, known: KnownClasses) -> bool:
        try:
            followed = _followed(layout.structure)
        except CorruptRecordError:
            return False
        if len(followed) != len(layout.leaves):
            return False
        for leaf, dims in zip(layout.leaves, followed, strict=True):
            if not all(0 < abs(dim) <= len(leaf.shape) for dim in dims):
                return False
        return rows.is_known(layout, known)

    def _filled(self, n: int, dims: Sequence[int], parts: Iterator[tuple[Found, torch.Tensor]]) -> torch.Tensor:
        """Return one leaf of the result: zeros, with each row where it lies."""
        rest = list(parts)
        first = rest[0][1]
        shape = [n, *first.shape[1:]]
        for dim in dims:
            shape[abs(dim)] = self.spans.width if dim > 0 else max(part.shape[-dim] for _, part in rest)

        full = torch.zeros(shape, dtype=first.dtype, device=first.device)
        for item, part in rest:
            if dims:
                self._fill(full, dims, item.positions, part)
            else:
                full[list(item.positions)] = part
        return full

    def _fill(self, full: torch.Tensor, dims: Sequence[int], positions: Sequence[int], part: torch.Tensor) -> None:
        """Copy rows of one length to where they lie."""
        as_mask = [dim for dim in dims if dim > 0]
        for dim in dims:
            if dim < 0:
                full = full.narrow(-dim, 0, part.shape[-dim])
        if not as_mask:
            full[list(positions)] = part
            return

        length = part.shape[as_mask[0]]
        for start, members in _by_value(self.spans.starts[p] for p in positions):
            places = [positions[i] for i in members]
            if any(self.spans.length(p) != length for p in places):
                raise CorruptRecordError("a row has not the length of its sample")
            _narrowed(full, as_mask, start, length)[places] = part[members]


def follow_length(
    tree: Tree, length: int, other: Tree, other_length: int, shorten: Shorten | None = None
) -> list[list[int]]:
    """Compare the results of batches of two lengths: which dimensions of each leaf follow it.

    Args:
        tree: The result of a batch of ``length`` positions.
        length: Of the mask.
        other: The result of one of ``other_length`` positions.
        other_length: Of its mask.
        shorten: Returns how much the model makes of so many positions, if it says so.

    Returns:
        The dimensions that are as long as the mask; those as long as what the model shortens it to are negative.

    Raises:
        OtherLengthsError: If something else depends on the length, such as a dimension of half of it.
    """
    if len(tree.leaves) != len(other.leaves):
        raise OtherLengthsError(
            f"it has {len(tree.leaves)} tensors for a mask of {length} positions, and {len(other.leaves)} for one of "
            f"{other_length}"
        )
    short = None if shorten is None else (shorten(length), shorten(other_length))
    followed: list[list[int]] = []
    for one, two, path in zip(tree.leaves, other.leaves, tree.paths, strict=True):
        dims = _following_dims(one.shape, two.shape, (length, other_length), short)
        if dims is None:
            raise OtherLengthsError(
                f"{path} has rows of shape {tuple(one.shape[1:])} for a mask of {length} positions, and "
                f"{tuple(two.shape[1:])} for one of {other_length}"
            )
        followed.append(dims)
    return followed


def check_followed(
    tree: Tree, followed: Sequence[Sequence[int]], other: Tree, other_length: int, shorten: Shorten | None
) -> None:
    """Check the result of another length against what two others have shown.

    Raises:
        OtherLengthsError: If a dimension has another size than it should.
    """
    if len(tree.leaves) != len(other.leaves):
        raise OtherLengthsError(f"it has {len(other.leaves)} tensors for a mask of {other_length} positions")
    for one, two, dims, path in zip(tree.leaves, other.leaves, followed, tree.paths, strict=True):
        expected = list(one.shape[1:])
        for dim in dims:
            expected[abs(dim) - 1] = other_length if dim > 0 or shorten is None else shorten(other_length)
        if list(two.shape[1:]) != expected:
            raise OtherLengthsError(
                f"{path} has rows of shape {tuple(two.shape[1:])} for a mask of {other_length} positions, where "
                f"{tuple(expected)} was expected"
            )


def _following_dims(
    shape: Sequence[int], other: Sequence[int], lengths: tuple[int, int], short: tuple[int, int] | None
) -> list[int] | None:
    """Return the dimensions behind the batch that follow the length; None if others differ, or may follow it."""
    if len(shape) != len(other):
        return None
    dims: list[int] = []
    for dim in range(1, len(shape)):
        sizes = shape[dim], other[dim]
        if sizes == lengths:
            dims.append(dim)
        elif sizes == short:
            if sizes[0] == sizes[1]:
                return None
            dims.append(-dim)
        elif sizes[0] != sizes[1]:
            return None
    return dims


def _encode(followed: Sequence[Sequence[int]]) -> str:
    """Return as a string what dimensions follow the length: an int could be taken for the batch's size."""
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
    dtypes: list[tuple[str, str]] = []
    shapes: list[list[int]] = []
    for leaf, dims in zip(layout.leaves, _followed(layout.structure), strict=True):
        dtypes.append((leaf.dtype, leaf.output_dtype))
        shapes.append([-1 if dim in dims or -dim in dims else size for dim, size in enumerate(leaf.shape, start=1)])
    return layout.structure, dtypes, shapes


def _leaf_of_each(found: Sequence[Found], number: int, device: torch.device) -> Iterator[tuple[Found, torch.Tensor]]:
    """Yield one leaf of all rows of each item."""
    for item in found:
        leaf, start, end = byte_ranges(item.layout)[number]
        yield item, put_leaf(leaf, columns(item.data, start, end), device)


def _narrowed(tensor: torch.Tensor, dims: Sequence[int], start: int, length: int) -> torch.Tensor:
    """Return a view of some positions along the dimensions that are as long as the mask."""
    for dim in dims:
        if dim > 0:
            tensor = tensor.narrow(dim, start, length)
    return tensor


def _shortened(tensor: torch.Tensor, dims: Sequence[int], length: int) -> torch.Tensor:
    """Return a view of the first positions along the dimensions that follow what the model makes of the mask."""
    for dim in dims:
        if dim < 0:
            tensor = tensor.narrow(-dim, 0, length)
    return tensor


def are_shortened(followed: Sequence[Sequence[int]]) -> bool:
    """Tell whether some dimensions of a result follow what the model makes of the length of a row."""
    return any(dim < 0 for dims in followed for dim in dims)


def _by_value(values: Iterable[T]) -> list[tuple[T, list[int]]]:
    """Return each value with the numbers of those that are equal to it."""
    numbers: dict[T, list[int]] = {}
    for i, value in enumerate(values):
        numbers.setdefault(value, []).append(i)
    return list(numbers.items())
