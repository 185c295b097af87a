"""The arguments of a call that are not plain: tensors, arrays and lists of values, alone or in containers."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch

from torchcache.errors import UncacheableError
from torchcache.foreign_values import advice_for
from torchcache.keys.digest import digest_bytes, digest_parts, digest_rows
from torchcache.keys.plain import encode_plain
from torchcache.structure import Tree, class_name, flatten
from torchcache.tensors import flat_bytes

#: The types of most plain values.
_FREQUENT = frozenset({str, int, float, bool, type(None), bytes})

_WHAT = (
    "tensors with the batch in front or lists with one plain value per sample, also in tuples, lists, dicts, named "
    "tuples, dataclasses or classes registered with torch.utils._pytree, and beside them plain values: int, float, "
    "str, bool, None, bytes, enum, torch.dtype, torch.device or a tuple of these"
)


class Tensors:
    """A tensor: an argument, or one in a container. ``batch_dim`` is the dimension its samples lie along."""

    __slots__ = ("batch_dim", "name", "tensor")

    def __init__(self, name: str, tensor: torch.Tensor, batch_dim: int = 0) -> None:
        self.name = name
        self.tensor = tensor
        self.batch_dim = batch_dim

    def describe(self) -> tuple[str, bytes]:
        """Return name and form of its rows."""
        shape = tuple(self.tensor.shape)
        row_shape = shape[: self.batch_dim] + shape[self.batch_dim + 1 :]
        return f"tensor {self.name}", f"{self.tensor.dtype} {row_shape}".encode()

    def digests(self, n: int) -> list[bytes]:
        return digest_rows(flat_bytes(self._batch_first()), n)

    def _batch_first(self) -> torch.Tensor:
        return self.tensor.movedim(self.batch_dim, 0) if self.batch_dim else self.tensor

    def digest(self, position: int) -> bytes:
        """Return the digest of one row."""
        return digest_bytes(flat_bytes(self.row(position)))

    def row(self, position: int) -> torch.Tensor:
        return self.tensor.detach().narrow(self.batch_dim, position, 1).clone()

    def peaks(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the largest number of each of some rows, and the largest magnitude beside it."""
        rows = self._rows(positions, is_range=False).movedim(self.batch_dim, 0)
        numbers = rows.reshape(len(positions), -1).double().nan_to_num().cpu()
        return torch.stack([numbers.amax(1), numbers.abs().amax(1)], 1)

    def select(self, positions: Sequence[int], extra: torch.Tensor | None, *, is_range: bool) -> torch.Tensor:
        """Return copies of some rows: what is written into them must not reach the caller."""
        rows = self._rows(positions, is_range=is_range)
        if extra is not None:
            return torch.cat([rows, extra.to(rows.device)], self.batch_dim)
        return rows.clone() if is_range else rows

    def _rows(self, positions: Sequence[int], *, is_range: bool) -> torch.Tensor:
        """Return some rows, as a view where they are next to each other."""
        tensor, dim = self.tensor.detach(), self.batch_dim
        if is_range:
            return tensor.narrow(dim, positions[0], len(positions))
        return tensor.index_select(dim, torch.tensor(positions, dtype=torch.int64, device=tensor.device))


class Values:
    """A list with one plain value for each sample, such as a str; or a tuple that is the only batch of its call."""

    __slots__ = ("name", "values")

    def __init__(self, name: str, values: list[Any] | tuple[Any, ...]) -> None:
        self.name = name
        self.values = values

    def describe(self) -> tuple[str, bytes]:
        return f"values {self.name}", type(self.values).__name__.encode()

    def digests(self, n: int) -> list[bytes]:  # noqa: ARG002 - as of Tensors
        return [self.digest(position) for position in range(len(self.values))]

    def digest(self, position: int) -> bytes:
        return digest_bytes(encode_plain(self.values[position]) or b"")

    def select(self, positions: Sequence[int], extra: Sequence[Any] | None, *, is_range: bool) -> Sequence[Any]:  # noqa: ARG002
        rows = [*(self.values[position] for position in positions), *(extra or ())]
        return rows if isinstance(self.values, list) else tuple(rows)


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument with samples: it holds tensors or lists of values.

    Attributes:
        name: Of the parameter.
        place: Index into args, or key of kwargs.
        leaves: What it holds.
        tree: The container they hang in; None for a lone leaf.
        wrap: The class to be made of what ``tree`` builds, for a ``UserDict``.
        attributes: Plain attributes of that, beside its items.
        sequences: The tuples and lists of plain values in its container, by path: each may hold one per sample.
        form: What tells its container from others with the same leaves; empty for a lone leaf.
    """

    is_shared: ClassVar[bool] = False

    name: str
    place: int | str
    leaves: Sequence[Any]  # Tensors or Values
    tree: Tree | None = None
    wrap: type[UserDict[Any, Any]] | None = None
    form: bytes = b""
    attributes: Mapping[str, object] = field(default_factory=dict)
    sequences: Sequence[tuple[str, Sequence[object]]] = ()

    def tensors(self) -> list[Tensors]:
        """Return those of its leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensors)]

    def encode(self) -> bytes:
        """Return what all samples share of it: the form of its container."""
        return self.form

    def with_leaves(self, leaves: Iterable[object]) -> object:
        """Return an argument like this one with other leaves."""
        if self.tree is None:
            return next(iter(leaves))
        built: Any = self.tree.build(leaves)
        if self.wrap is None:
            return built
        made = self.wrap(built)
        vars(made).update(self.attributes)
        return made


def open_argument(name: str, place: int | str, value: object, batch_dim: int) -> Argument:
    """Find the tensors and lists of values in an argument that is not plain.

    Args:
        name: Of the parameter.
        place: Index into args, or key of kwargs.
        value: The argument.
        batch_dim: The dimension of its tensors that samples lie along.

    Raises:
        UncacheableError: If there are no samples in it, or something beside them cannot be named.
    """
    wrap, inner = None, value
    attributes: dict[str, object] = {}
    refuse_module(name, value)
    if isinstance(value, UserDict):  # such as transformers' BatchEncoding
        wrap, inner = type(value), dict(value)
        _check_wrap(name, wrap, inner)
        attributes = _attributes_of(name, value)
    if type(inner) is list and not inner:
        return Argument(name, place, [Values(name, [])])  # a batch without samples
    tree = flatten(inner, _is_leaf)
    if tree.problem is not None or not tree.leaves:
        raise UncacheableError(
            advice_for(value, name)
            or f"argument {name!r} of type {type(value).__qualname__} cannot be part of a cache key; pass {_WHAT}",
            argument=name,
        )
    paths = [name + path.removeprefix("output") for path in tree.paths]
    leaves = [_leaf(path, leaf, batch_dim) for leaf, path in zip(tree.leaves, paths, strict=True)]
    form = _form_of(name, tree, wrap, attributes)
    sequences = [(name + path.removeprefix("output"), items) for path, items in tree.sequences]
    for key, item in attributes.items():
        sequences += plain_sequences(f"{name}.{key}", item)
    return Argument(name, place, leaves, tree if form else None, wrap, form, attributes, sequences)


def refuse_module(name: str, value: object) -> None:
    """Raise if an argument is a module: its weights would have to be compared at each call."""
    if issubclass(type(value), torch.nn.Module):
        raise UncacheableError(
            f"argument {name!r} is a {type(value).__qualname__}, which cannot be part of a cache key; decorate "
            "the module's class, the module itself or a method of it instead of a function that takes it",
            argument=name,
        )


def plain_sequences(path: str, value: object) -> Iterator[tuple[str, Sequence[object]]]:
    """Yield the tuples in a plain value by path, without named ones: each may hold one value per sample."""
    if not isinstance(value, tuple) or isinstance(value, torch.Size):
        return
    if not hasattr(value, "_fields") and not hasattr(value, "n_sequence_fields"):
        yield path, value
    for i, item in enumerate(value):
        yield from plain_sequences(f"{path}[{i}]", item)


def is_batch_of_texts(value: object) -> bool:
    """Tell whether a plain value is a tuple of str, or of tuples of str."""
    return type(value) is tuple and bool(value) and all(map(_is_text, value))


def _leaf(name: str, value: Any, batch_dim: int) -> Tensors | Values:  # noqa: ANN401 - told apart here
    if isinstance(value, torch.Tensor):
        return Tensors(name, value, batch_dim)
    if _is_table(value):
        raise UncacheableError(advice_for(value, name) or "", argument=name)
    return Values(name, value)


def _check_wrap(name: str, wrap: type[UserDict[Any, Any]], items: dict[Any, Any]) -> None:
    """Check that a mapping can be made of some of its rows."""
    try:
        is_same = list(wrap(items)) == list(items)
    except Exception:  # noqa: BLE001 - whatever a foreign class raises
        is_same = False
    if not is_same:
        raise UncacheableError(
            f"argument {name!r} is a {wrap.__qualname__} that cannot be made of a dict; pass dict({name})",
            argument=name,
        )


def _attributes_of(name: str, value: UserDict[Any, Any]) -> dict[str, object]:
    """Return the attributes that a mapping has beside its items; private ones count if they are plain.

    BatchEncoding keeps in a private one what its tokenizer made, which models do not read.
    """
    attributes = {key: item for key, item in vars(value).items() if key != "data"}
    plain = {key: item for key, item in attributes.items() if encode_plain(item) is not None}
    public = [key for key in attributes if key not in plain and not key.startswith("_")]
    if public:
        raise UncacheableError(
            f"argument {name!r} is a {type(value).__qualname__} with an attribute {public[0]!r} of type "
            f"{type(attributes[public[0]]).__qualname__} beside its items; pass dict({name})",
            argument=name,
        )
    return plain


def _is_leaf(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (type(value) is list and (_is_batch(value) or _is_table(value)))


def _is_batch(value: list[object]) -> bool:
    """Tell whether a list may hold one plain value per sample."""
    return bool(value) and all(map(_is_value, value))


def _is_table(value: list[Any]) -> bool:
    """Tell whether a list holds lists of plain values, which may be rows or columns; those of str are columns."""
    if not value or not all(type(item) is list and _is_batch(item) for item in value):
        return False
    return not all(_is_text(text) for item in value for text in item)


def _is_value(value: object) -> bool:
    kind = type(value)
    if kind in _FREQUENT:
        return True
    if kind is tuple:
        return all(map(_is_value, cast("tuple[object, ...]", value)))
    return not isinstance(value, np.generic) and encode_plain(value) is not None


def _is_text(value: object) -> bool:
    return type(value) is str or (type(value) is tuple and bool(value) and all(type(part) is str for part in value))


def _form_of(name: str, tree: Tree, wrap: type | None, attributes: Mapping[str, object]) -> bytes:
    """Return what tells a container from another one with the same leaves; empty for a lone leaf."""
    try:
        form = tree.encode()
    except UncacheableError as error:
        raise UncacheableError(
            f"argument {name!r} has too many plain values; pass large ones as tensors",
            argument=name,
        ) from error
    if wrap is None:
        return form
    beside = [part for key in sorted(attributes) for part in (key.encode(), encode_plain(attributes[key]) or b"")]
    return digest_parts([class_name(wrap).encode(), form, *beside])
