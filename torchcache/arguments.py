"""The arguments of a call that hold its samples: tensors and texts, alone or in containers."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchcache.errors import UncacheableError
from torchcache.keys.digest import digest_bytes, digest_parts, digest_rows
from torchcache.keys.values import encode_plain
from torchcache.structure import Tree, class_name, flatten
from torchcache.tensors import flat_bytes, unsupported_kind

_WHAT = (
    "tensors with the batch in front or lists of str, also in tuples, lists, dicts, named tuples, dataclasses or "
    "classes registered with torch.utils._pytree, and beside them plain values: int, float, str, bool, None, bytes, "
    "enum, torch.dtype, torch.device or a tuple of these"
)


class Tensors:
    """A tensor whose dimension 0 is the batch: an argument, or one in a container."""

    __slots__ = ("name", "tensor")

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.tensor = tensor

    def describe(self) -> tuple[str, bytes]:
        """Return name and form of its rows."""
        return f"tensor {self.name}", f"{self.tensor.dtype} {tuple(self.tensor.shape[1:])}".encode()

    def digests(self, n: int) -> list[bytes]:
        return digest_rows(flat_bytes(self.tensor), n)

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
        return self.tensor.detach()[position : position + 1].clone()

    def select(self, positions: Sequence[int], extra: torch.Tensor | None, *, is_range: bool) -> torch.Tensor:
        tensor = self.tensor.detach()
        rows = (
            tensor[positions[0] : positions[-1] + 1]
            if is_range
            else tensor.index_select(0, torch.tensor(positions, dtype=torch.int64, device=tensor.device))
        )
        return rows if extra is None else torch.cat([rows, extra.to(tensor.device)])


class Texts:
    """A list with one str, or one tuple of str, for each sample."""

    __slots__ = ("name", "texts")

    def __init__(self, name: str, texts: list[Any]) -> None:
        self.name = name
        self.texts = texts

    def describe(self) -> tuple[str, bytes]:
        return f"texts {self.name}", b""

    def digests(self, n: int) -> list[bytes]:  # noqa: ARG002 - as of Tensors
        return [digest_bytes(encode_plain(text) or b"") for text in self.texts]

    def encode(self) -> bytes:
        return digest_parts([encode_plain(text) or b"" for text in self.texts])

    def row(self, position: int) -> list[Any]:
        return [self.texts[position]]

    def select(self, positions: Sequence[int], extra: list[Any] | None, *, is_range: bool) -> list[Any]:  # noqa: ARG002
        return [self.texts[position] for position in positions] + (extra or [])


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument that holds tensors or texts.

    Attributes:
        name: Of the parameter.
        place: Index into args, or key of kwargs.
        leaves: What it holds.
        tree: The container they hang in; None for a lone leaf.
        wrap: The class to be made of what ``tree`` builds, for a ``UserDict``.
        is_shared: Whether all samples share it.
    """

    name: str
    place: int | str
    leaves: Sequence[Tensors | Texts]
    tree: Tree | None = None
    wrap: type[UserDict[Any, Any]] | None = None
    is_shared: bool = False

    def with_leaves(self, leaves: Iterable[object]) -> object:
        """Return an argument like this one with other leaves."""
        if self.tree is None:
            return next(iter(leaves))
        built: Any = self.tree.build(leaves)
        return built if self.wrap is None else self.wrap(built)


def open_argument(name: str, place: int | str, value: object, *, is_shared: bool) -> tuple[Argument, bytes]:
    """Find the tensors and texts in an argument that is not plain.

    Returns:
        The argument, and what enters the key beside its samples: the form of the container, and all of what is
        shared; empty for a lone leaf.

    Raises:
        UncacheableError: If there are none, or something beside them cannot be named.
    """
    wrap, inner = None, value
    if isinstance(value, torch.nn.Module):
        raise UncacheableError(
            f"argument {name!r} is a {type(value).__qualname__}, which cannot be part of a cache key; decorate "
            "the module's class, the module itself or a method of it instead of a function that takes it",
            argument=name,
        )
    if isinstance(value, UserDict):  # such as transformers' BatchEncoding
        wrap, inner = type(value), dict(value)
        _check_wrap(name, wrap, inner)
    if type(inner) is list and not inner:
        return Argument(name, place, [Texts(name, [])]), b""  # a batch without samples
    tree = flatten(inner, _is_leaf)
    if tree.problem is not None or not tree.leaves:
        raise UncacheableError(
            f"argument {name!r} of type {type(value).__qualname__} cannot be part of a cache key; pass {_WHAT}",
            argument=name,
        )
    leaves = [
        Tensors(path, leaf) if isinstance(leaf, torch.Tensor) else Texts(path, leaf)
        for leaf, path in zip(tree.leaves, (name + path.removeprefix("output") for path in tree.paths), strict=True)
    ]
    form = _form_of(name, tree, wrap)
    if is_shared:
        form = digest_parts([b"unbatched", form, *(leaf.encode() for leaf in leaves)])
    return Argument(name, place, leaves, tree if form else None, wrap, is_shared), form


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


def _is_leaf(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (type(value) is list and all(map(_is_text, value)) and bool(value))


def _is_text(value: object) -> bool:
    return type(value) is str or (type(value) is tuple and bool(value) and all(type(part) is str for part in value))


def _form_of(name: str, tree: Tree, wrap: type | None) -> bytes:
    """Return what tells a container from another one with the same leaves; empty for a lone leaf."""
    try:
        form = tree.encode()
    except UncacheableError as error:
        raise UncacheableError(
            f"argument {name!r} has too many plain values beside its tensors; pass large values as tensors",
            argument=name,
        ) from error
    return form if wrap is None else digest_parts([class_name(wrap).encode(), form])
