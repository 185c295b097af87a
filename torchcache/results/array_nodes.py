"""Leaves that are NumPy arrays: they are kept as tensors, and come back as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from torchcache.keys.tensor_kinds import NUMPY_DTYPES
from torchcache.results.nodes import LeafNode, Node, Reading, Walk, need

Array = np.ndarray[Any, Any]

#: The dtypes of arrays that torch has too.
_NUMBERS = frozenset(NUMPY_DTYPES.values())

#: Kinds of NumPy dtypes that are 64-bit integers with a unit: dates, and differences of dates.
_DATES = "mM"


@dataclasses.dataclass(frozen=True)
class ArrayNode(LeafNode):
    """A leaf that is an array of NumPy's own class; its dtype is that of the tensor, unless it is one of dates."""

    tag = 13

    dtype: str
    is_writable: bool

    @classmethod
    def take_apart(cls, value: Array, path: str, depth: int, walk: Walk) -> Node:
        if walk.is_inner:
            return walk.refuse_kind(value, path, depth)
        if not _is_kept(value.dtype):
            return walk.refuse(
                value,
                f"the cached call returned an array of {value.dtype} at {path}; return arrays of numbers in the "
                "machine's byte order with the batch in front, or set batch_dim=None to cache each call as one sample",
            )
        walk.leaves.append(value)
        walk.paths.append(path)
        return cls((), value.dtype.str, value.flags.writeable)

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:  # noqa: ARG003 - as of Node
        name, is_writable = rest
        need(type(name) is str and type(is_writable) is bool)
        dtype = np.dtype(name)
        need(_is_kept(dtype) and dtype.str == name)
        return cls((), name, is_writable)

    @cached_property
    def n_leaves(self) -> int:
        return 1

    def pack(self) -> object:
        return [self.tag, self.dtype, self.is_writable]

    def build(self, leaves: Iterator[object]) -> object:
        return self.as_value(next(leaves))

    def as_value(self, leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        array: Array = leaf.detach().cpu().numpy()
        if np.dtype(self.dtype).kind in _DATES:
            need(leaf.dtype is torch.int64)
            array = array.view(self.dtype)
        if not self.is_writable:
            array.flags.writeable = False
        return array


def tensor_of(array: Array) -> torch.Tensor:
    """Return a tensor with the values of an array that a node was made of; a view where torch can have one."""
    viewed: Array = array.view(np.int64) if array.dtype.kind in _DATES else array
    # torch warns of arrays that must not be written, and refuses strides that it does not have.
    has_strides = all(stride >= 0 and stride % viewed.itemsize == 0 for stride in viewed.strides)
    if not viewed.flags.writeable or not has_strides:
        viewed = viewed.copy()
    return torch.from_numpy(viewed)


def _is_kept(dtype: np.dtype[Any]) -> bool:
    """Tell whether arrays of a dtype can be kept."""
    if dtype.metadata is not None or not dtype.isnative:
        return False
    return dtype in _NUMBERS or dtype.kind in _DATES
