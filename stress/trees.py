"""Arguments of a call as trees: containers and what lies in them, from which the same call can be built again.

A tree is a ``Node``, a leaf (``Rows``, ``Sequences``, ``Values``, ``Whole``, a NumPy array) or a plain value. What is
built from it shares nothing with what was built from it before.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch


class Pair(NamedTuple):
    """A named tuple."""

    a: Any
    b: Any


class Couple(NamedTuple):
    """Another one with the same fields."""

    a: Any
    b: Any


@dataclass(eq=False)
class Inputs:
    """A dataclass."""

    a: Any
    b: Any


@dataclass(frozen=True, slots=True, eq=False)
class FrozenInputs:
    """Another one with the same fields."""

    a: Any
    b: Any


class Encoding(UserDict[Any, Any]):
    """A mapping such as a tokenizer returns."""


@dataclass(frozen=True, slots=True)
class Node:
    """A container.

    Attributes:
        kind: One of ``KINDS``.
        keys: Of a mapping; others have none.
        children: What lies in it.
        note: An attribute of an ``Encoding``, beside its items; None for none.
    """

    kind: str
    children: tuple[Any, ...]
    keys: tuple[Any, ...] = ()
    note: Any = None


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor of samples.

    Attributes:
        tensor: The samples, the batch in front, contiguous.
        lie: One of ``LIES``: how it lies in memory once it is built.
    """

    tensor: torch.Tensor
    lie: str = ""


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that all samples share, or of a call that is one sample."""

    tensor: torch.Tensor
    lie: str = ""


@dataclass(frozen=True, slots=True)
class Sequences:
    """One tensor a sample, of shape ``(length, ...)``, to be padded."""

    rows: tuple[torch.Tensor, ...]
    is_mask: bool = False


@dataclass(frozen=True, slots=True)
class Values:
    """One plain value per sample, such as a ``str`` or a tuple of ``str``: a list."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """How sequences are padded: where each starts in ``width`` positions, and the byte the padding is filled with."""

    width: int
    starts: tuple[int, ...]
    fill: int = 0


#: Containers: how each is made of keys and values, and whether it has keys, two fields, or neither.
KINDS: dict[str, tuple[Callable[[Sequence[Any], list[Any]], Any], str]] = {
    "tuple": (lambda _, values: tuple(values), ""),
    "list": (lambda _, values: values, ""),
    "dict": (lambda keys, values: dict(zip(keys, values, strict=True)), "keys"),
    "OrderedDict": (lambda keys, values: OrderedDict(zip(keys, values, strict=True)), "keys"),
    "UserDict": (lambda keys, values: UserDict(dict(zip(keys, values, strict=True))), "outermost keys"),
    "Encoding": (lambda keys, values: Encoding(dict(zip(keys, values, strict=True))), "outermost keys"),
    "Pair": (lambda _, values: Pair(*values), "fields"),
    "Couple": (lambda _, values: Couple(*values), "fields"),
    "Inputs": (lambda _, values: Inputs(*values), "fields"),
    "FrozenInputs": (lambda _, values: FrozenInputs(*values), "fields"),
}


def fits(kind: str, n_children: int, *, is_outermost: bool) -> bool:
    """Tell whether a container of a kind may have so many children, and lie there."""
    form = KINDS[kind][1]
    return (form != "fields" or n_children == 2) and (is_outermost or not form.startswith("outermost"))


def has_keys(kind: str) -> bool:
    """Tell whether it is a mapping."""
    return KINDS[kind][1].endswith("keys")


def build(tree: object, batch_dim: int, frame: Frame | None) -> Any:  # noqa: ANN401 - any argument
    """Return the argument that a tree stands for."""
    if isinstance(tree, Node):
        made = KINDS[tree.kind][0](tree.keys, [build(child, batch_dim, frame) for child in tree.children])
        if tree.note is not None:
            made.note = tree.note
        return made
    if isinstance(tree, Rows):
        return lay(tree.tensor.movedim(0, batch_dim), tree.lie)
    if isinstance(tree, Sequences):
        assert frame is not None
        return _pad(tree, frame).movedim(0, batch_dim).contiguous()
    if isinstance(tree, Whole):
        return lay(tree.tensor, tree.lie)
    if isinstance(tree, Values):
        return list(tree.values)
    return tree.copy(order="K") if isinstance(tree, np.ndarray) else tree


def _pad(sequences: Sequences, frame: Frame) -> torch.Tensor:
    first = sequences.rows[0]
    nbytes = len(sequences.rows) * frame.width * first[0].numel() * first.itemsize
    fill = 0 if sequences.is_mask else frame.fill % 2 if first.dtype is torch.bool else frame.fill
    padded = torch.full((nbytes,), fill, dtype=torch.uint8).view(first.dtype)
    padded = padded.reshape(len(sequences.rows), frame.width, *first.shape[1:])
    for i, (row, start) in enumerate(zip(sequences.rows, frame.starts, strict=True)):
        padded[i].narrow(0, start, len(row)).copy_(row)
    return padded


# -- how tensors lie in memory --------------------------------------------------------------------------------------


def lay(tensor: torch.Tensor, lie: str) -> torch.Tensor:
    """Return a copy of a tensor that lies in memory in some way."""
    plain = tensor.clone(memory_format=torch.contiguous_format)
    return plain if not lie else LIES[lie](plain)


def _with_neighbours(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.empty(*tensor.shape, 3, dtype=tensor.dtype)
    wide[..., 1].copy_(tensor)
    return wide[..., 1]


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 2:
        return _with_neighbours(tensor)
    return tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.channels_last) if tensor.dim() == 4 else _turned(tensor)


def _from_the_middle(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(tensor.numel() + 5, dtype=tensor.dtype)
    flat[3 : 3 + tensor.numel()].copy_(tensor.flatten())
    return flat[3 : 3 + tensor.numel()].view(tensor.shape)


LIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neighbours": _with_neighbours, "turned": _turned, "channels last": _channels_last, "middle": _from_the_middle,
}  # fmt: skip


# -- places in trees ------------------------------------------------------------------------------------------------


def places(tree: object, at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield every place in a tree and what is there, containers before what lies in them."""
    yield at, tree
    if isinstance(tree, Node):
        for i, child in enumerate(tree.children):
            yield from places(child, (*at, i))


def put(tree: Any, at: tuple[int, ...], value: object) -> Any:  # noqa: ANN401 - any tree
    """Return a tree with something else at a place."""
    if not at:
        return value
    children = list(tree.children)
    children[at[0]] = put(children[at[0]], at[1:], value)
    return replace(tree, children=tuple(children))


def choose_rows(tree: object, positions: Sequence[int]) -> Any:  # noqa: ANN401 - any tree
    """Return a tree with some of its samples."""
    if isinstance(tree, Node):
        return replace(tree, children=tuple(choose_rows(child, positions) for child in tree.children))
    if isinstance(tree, Rows):
        raw = raw_of(tree.tensor)
        return replace(tree, tensor=from_raw(raw[list(positions)], tree.tensor.dtype, tree.tensor.shape[1:]))
    if isinstance(tree, Sequences):
        return replace(tree, rows=tuple(tree.rows[p] for p in positions))
    if isinstance(tree, Values):
        return Values(tuple(tree.values[p] for p in positions))
    return tree


def raw_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a copy of the bytes of a tensor, a row for each step of its first dimension.

    Not every dtype can be indexed.
    """
    flat = tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy()
    raw: np.ndarray[Any, Any] = flat.reshape(len(tensor) if tensor.dim() else 1, -1).copy()
    return raw


def from_raw(raw: np.ndarray[Any, Any], dtype: torch.dtype, row_shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor of some rows of bytes."""
    return torch.from_numpy(np.ascontiguousarray(raw)).view(-1).view(dtype).reshape(len(raw), *row_shape)


# -- what a function sees of an argument, said without the library ----------------------------------------------------


def parts_of(value: Any, path: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - any argument
    """Yield what an argument or a result is made of, each with its place.

    A container says what it is and how its parts are called; its parts come next. A list of plain values is one part.
    """
    kind = type(value).__qualname__
    if isinstance(value, (dict, UserDict)):
        yield path, (kind, repr(getattr(value, "note", None)), *(repr(key) for key in value))
        for key, child in value.items():
            yield from parts_of(child, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        yield path, (kind, *names)
        for name in names:
            yield from parts_of(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, (tuple, list)) and not _are_values(value):
        names = [f".{name}" for name in getattr(value, "_fields", ())] or [f"[{i}]" for i in range(len(value))]
        yield path, (kind, *names)
        for name, child in zip(names, value, strict=True):
            yield from parts_of(child, path + name)
    else:
        yield path, value


def _are_values(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_plain, value))


def is_plain(value: object) -> bool:
    """Tell whether a value that was built is plain."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN) or value is None


_PLAIN = (int, float, complex, str, bytes, slice, Enum, torch.dtype, torch.device)
