"""The arguments of a call that hold samples: tensors and lists of values, alone or in containers."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch

from torchcache.errors import UncacheableError
from torchcache.inputs.foreign import advice_for
from torchcache.inputs.leaves import Leaf, Tensors, Values
from torchcache.inputs.tuples import is_text, plain_sequences
from torchcache.keys.digest import digest_parts
from torchcache.keys.plain import encode_plain, type_name
from torchcache.results.tree import Tree, flatten

#: The types of most plain values.
FREQUENT = frozenset({str, int, float, bool, type(None), bytes})

_WHAT = (
    "tensors with the batch in front or lists with one plain value per sample, also in tuples, lists, dicts, named "
    "tuples, dataclasses or classes registered with torch.utils._pytree, and beside them plain values: int, float, "
    "str, bool, None, bytes, enum, torch.dtype, torch.device or a tuple of these"
)


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument with samples: it holds tensors or lists of values.

    Attributes:
        name: Of the parameter.
        place: Index into args, or key of kwargs.
        leaves: What it holds.
        tree: The container they hang in; None for a lone leaf.
        wrap: The class to be made of what ``tree`` builds, for a ``UserDict``.
        form: What tells its container from others with the same leaves; empty for a lone leaf.
        attributes: Plain attributes of a ``UserDict``, beside its items.
        sequences: The tuples and lists of plain values in its container, by path: each may hold one per sample.
    """

    is_shared: ClassVar[bool] = False

    name: str
    place: int | str
    leaves: Sequence[Leaf]
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
    refuse_module(name, value)
    wrap: type[UserDict[Any, Any]] | None = None
    inner = value
    attributes: dict[str, object] = {}
    if isinstance(value, UserDict):  # such as transformers' BatchEncoding
        wrap = type(value)
        inner = dict(value)
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

    leaves: list[Leaf] = []
    for leaf, path in zip(tree.leaves, tree.paths, strict=True):
        leaves.append(_leaf(_renamed(path, name), leaf, batch_dim))
    form = _form_of(name, tree, wrap, attributes)

    sequences = [(_renamed(path, name), items) for path, items in tree.sequences]
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


def _renamed(path: str, name: str) -> str:
    """Return a path in a tree as one in the argument of that name."""
    return name + path.removeprefix("output")


def _leaf(name: str, value: Any, batch_dim: int) -> Leaf:  # noqa: ANN401 - told apart here
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
    plain: dict[str, object] = {}
    for key, item in vars(value).items():
        if key == "data":
            continue
        if encode_plain(item) is not None:
            plain[key] = item
        elif not key.startswith("_"):
            raise UncacheableError(
                f"argument {name!r} is a {type(value).__qualname__} with an attribute {key!r} of type "
                f"{type(item).__qualname__} beside its items; pass dict({name})",
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
    if not value:
        return False
    if not all(type(item) is list and _is_batch(item) for item in value):
        return False
    return not all(is_text(text) for item in value for text in item)


def _is_value(value: object) -> bool:
    kind = type(value)
    if kind in FREQUENT:
        return True
    if kind is tuple:
        return all(map(_is_value, cast("tuple[object, ...]", value)))
    return not isinstance(value, np.generic) and encode_plain(value) is not None


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
    parts = [type_name(wrap), form]
    for key in sorted(attributes):
        parts.append(key.encode())
        parts.append(encode_plain(attributes[key]) or b"")
    return digest_parts(parts)
