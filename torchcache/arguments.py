"""The arguments of a call that are not plain: tensors, arrays and texts, alone or in containers."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from torchcache.errors import UncacheableError
from torchcache.keys.digest import digest_bytes, digest_parts, digest_rows
from torchcache.keys.values import encode_array, encode_plain
from torchcache.structure import Tree, class_name, flatten
from torchcache.tensors import flat_bytes, unsupported_kind

_WHAT = (
    "tensors with the batch in front or lists of str, also in tuples, lists, dicts, named tuples, dataclasses or "
    "classes registered with torch.utils._pytree, and beside them plain values: int, float, str, bool, None, bytes, "
    "enum, torch.dtype, torch.device or a tuple of these"
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

    def encode(self) -> bytes:
        """Return the bytes of all of it, for one that all samples share."""
        kind = unsupported_kind(self.tensor)
        if kind is not None:
            raise UncacheableError(
                f"argument {self.name!r} is unbatched and a {kind.replace('_', ' ')}, whose values have no plain "
                "bytes; convert it before the call",
                argument=self.name,
            )
        form = f"{self.tensor.dtype} {tuple(self.tensor.shape)}".encode()
        return digest_parts([form, digest_bytes(flat_bytes(self.tensor))])

    def row(self, position: int) -> torch.Tensor:
        return self.tensor.detach().narrow(self.batch_dim, position, 1).clone()

    def select(self, positions: Sequence[int], extra: torch.Tensor | None, *, is_range: bool) -> torch.Tensor:
        tensor, dim = self.tensor.detach(), self.batch_dim
        rows = (
            tensor.narrow(dim, positions[0], len(positions))
            if is_range
            else tensor.index_select(dim, torch.tensor(positions, dtype=torch.int64, device=tensor.device))
        )
        return rows if extra is None else torch.cat([rows, extra.to(tensor.device)], dim)


class Texts:
    """A list with one str, or one tuple of str, for each sample."""

    __slots__ = ("name", "texts")

    def __init__(self, name: str, texts: list[Any]) -> None:
        self.name = name
        self.texts = texts

    def describe(self) -> tuple[str, bytes]:
        return f"texts {self.name}", b""

    def digests(self, n: int) -> list[bytes]:  # noqa: ARG002 - as of Tensors
        return [self.digest(position) for position in range(len(self.texts))]

    def digest(self, position: int) -> bytes:
        return digest_bytes(encode_plain(self.texts[position]) or b"")

    def encode(self) -> bytes:
        return digest_parts([encode_plain(text) or b"" for text in self.texts])

    def row(self, position: int) -> list[Any]:
        return [self.texts[position]]

    def select(self, positions: Sequence[int], extra: list[Any] | None, *, is_range: bool) -> list[Any]:  # noqa: ARG002
        return [self.texts[position] for position in positions] + (extra or [])


class Value:
    """A NumPy array or scalar or a path that all samples share."""

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: object) -> None:
        self.name = name
        self.value = value

    def encode(self) -> bytes:
        return encode_array(self.value) if isinstance(self.value, np.ndarray) else encode_plain(self.value) or b""


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument that holds tensors, texts or, where all samples share it, arrays.

    Attributes:
        name: Of the parameter.
        place: Index into args, or key of kwargs.
        leaves: What it holds.
        tree: The container they hang in; None for a lone leaf.
        wrap: The class to be made of what ``tree`` builds, for a ``UserDict``.
        attributes: Plain attributes of that, beside its items.
        form: What tells its container from others with the same leaves; empty for a lone leaf.
        is_shared: Whether all samples share it.
    """

    name: str
    place: int | str
    leaves: Sequence[Any]  # Tensors, Texts or Value
    tree: Tree | None = None
    wrap: type[UserDict[Any, Any]] | None = None
    form: bytes = b""
    is_shared: bool = False
    attributes: Mapping[str, object] = field(default_factory=dict)

    def tensors(self) -> list[Tensors]:
        """Return those of its leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensors)]

    def encode(self) -> bytes:
        """Return what all samples share of it: the form of its container, and all of it if it is shared."""
        return (
            digest_parts([b"unbatched", self.form, *(leaf.encode() for leaf in self.leaves)])
            if self.is_shared
            else self.form
        )

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


def open_argument(name: str, place: int | str, value: object, batch_dim: int | None) -> Argument:
    """Find the tensors and texts in an argument that is not plain.

    Args:
        name: Of the parameter.
        place: Index into args, or key of kwargs.
        value: The argument.
        batch_dim: The dimension of its tensors that samples lie along; None if all samples share it, which may then
            hold arrays and what is made of plain values alone.

    Raises:
        UncacheableError: If there are no samples in it, or something beside them cannot be named.
    """
    is_shared = batch_dim is None
    wrap, inner = None, value
    attributes: dict[str, object] = {}
    if isinstance(value, torch.nn.Module):
        raise UncacheableError(
            f"argument {name!r} is a {type(value).__qualname__}, which cannot be part of a cache key; decorate "
            "the module's class, the module itself or a method of it instead of a function that takes it",
            argument=name,
        )
    if isinstance(value, UserDict):  # such as transformers' BatchEncoding
        wrap, inner = type(value), dict(value)
        _check_wrap(name, wrap, inner)
        attributes = _attributes_of(name, value)
    if type(inner) is list and not inner and not is_shared:
        return Argument(name, place, [Texts(name, [])])  # a batch without samples
    tree = flatten(inner, _is_shared_leaf if is_shared else _is_leaf)
    if tree.problem is not None or not (tree.leaves or is_shared):
        raise UncacheableError(
            f"argument {name!r} of type {type(value).__qualname__} cannot be part of a cache key; pass {_WHAT}",
            argument=name,
        )
    paths = [name + path.removeprefix("output") for path in tree.paths]
    leaves = [_leaf(path, leaf, batch_dim or 0) for leaf, path in zip(tree.leaves, paths, strict=True)]
    form = _form_of(name, tree, wrap, attributes)
    return Argument(name, place, leaves, tree if form else None, wrap, form, is_shared, attributes)


def _leaf(name: str, value: Any, batch_dim: int) -> Tensors | Texts | Value:  # noqa: ANN401 - told apart here
    if isinstance(value, torch.Tensor):
        return Tensors(name, value, batch_dim)
    return Texts(name, value) if isinstance(value, list) else Value(name, value)


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
    return isinstance(value, torch.Tensor) or (type(value) is list and all(map(_is_text, value)) and bool(value))


def _is_shared_leaf(value: object) -> bool:
    if isinstance(value, (np.generic, PurePath)):
        return encode_plain(value) is not None
    return _is_leaf(value) or (isinstance(value, np.ndarray) and not value.dtype.hasobject)


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
