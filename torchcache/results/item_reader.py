"""Rows of whole calls read back many at a time: each is a result of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import msgpack
import torch

from torchcache.errors import CorruptRecordError
from torchcache.keys.tensor_kinds import NUMPY_DTYPES
from torchcache.layout import Bytes2D, Layout, Leaf
from torchcache.results import tree as trees
from torchcache.results.container_nodes import DictNode, ListNode, TupleNode
from torchcache.results.leaves import CPU, DTYPES, byte_ranges, put_leaf
from torchcache.results.nodes import LEAF, Node
from torchcache.results.plain_nodes import BareNode
from torchcache.results.values import TENSOR_ENTRY, value_of

#: Makes a tensor of the bytes of one leaf in one row, which become its own.
ToTensor = Callable[[Bytes2D], torch.Tensor]

#: Where a leaf is in a row, and what makes a tensor of it.
_Part = tuple[int, int, ToTensor]

#: Makes the result of its values.
Build = Callable[[list[object]], object]


#: Returns the entries of the values of a result; raises, or returns something else, if bytes are none.
unpack: Callable[[bytes], Any] = partial(
    msgpack.unpackb, raw=False, use_list=True, unicode_errors="surrogatepass", max_map_len=0
)


class ItemReader:
    """Makes results of rows of one layout. What is the same for all of them is found out once.

    Args:
        layout: Of the rows; this process can rebuild it.
        node: The tree that the values hang in; None for a lone one.
    """

    def __init__(self, layout: Layout, node: Node | None) -> None:
        *tensors, (_, start, end) = byte_ranges(layout)
        self._start = start
        self._width = end - start
        self._tensors: list[_Part] = [(begin, stop, _tensor_maker(leaf)) for leaf, begin, stop in tensors]
        self._build, self._n_values = _builder(node)

    def read(self, data: Bytes2D) -> list[object]:
        """Return the result of each row; nothing in one shares memory with ``data``, or with another one.

        Raises:
            CorruptRecordError: If a row is not as ``whole_calls`` writes it.
        """
        packed = data[:, self._start :].tobytes()
        width = self._width
        try:
            return [self._result(unpack(packed[i * width : (i + 1) * width]), row) for i, row in enumerate(data)]
        except CorruptRecordError:
            raise
        except Exception as error:
            raise CorruptRecordError(f"the values of a result cannot be read: {error!r}") from error

    def _result(self, entries: list[object], row: Bytes2D) -> object:
        tensors = iter(self._tensors)
        values: list[object] = []
        for entry in entries:
            if type(entry) is not list:
                values.append(entry)
            elif entry == TENSOR_ENTRY:
                begin, stop, make = next(tensors)
                values.append(make(row[begin:stop].copy()))
            else:
                values.append(value_of(entry, partial(_next_tensor, tensors, row)))
        if len(values) != self._n_values:
            raise CorruptRecordError("a result has more or fewer values than its structure")
        return self._build(values)


def _next_tensor(tensors: Iterator[_Part], row: Bytes2D, device: torch.device | None = None) -> torch.Tensor:  # noqa: ARG001 - all are in host memory
    """Return the next leaf of a row as a tensor with memory of its own."""
    begin, stop, make = next(tensors)
    return make(row[begin:stop].copy())


def _tensor_maker(leaf: Leaf) -> ToTensor:
    """Return what makes a tensor of the bytes of a leaf."""
    dtype = DTYPES[leaf.dtype]
    shape = leaf.shape
    numpy_dtype = NUMPY_DTYPES.get(dtype)
    if leaf.memory_format or leaf.output_dtype != leaf.dtype or numpy_dtype is None or not leaf.nbytes:
        return lambda row: put_leaf(leaf, row.reshape(1, -1), CPU)[0]
    return lambda row: torch.from_numpy(row.view(numpy_dtype).reshape(shape))


def _builder(node: Node | None) -> tuple[Build, int]:
    """Return what makes a result of its values, and how many it takes."""
    if node is None:
        return _lone, 1
    n = node.n_leaves
    if all(child is LEAF for child in node.children):  # most are flat, and need no walk through a tree
        if type(node) is TupleNode:
            return tuple, n
        if type(node) is ListNode:
            return list, n
        if type(node) is DictNode and all(type(key) is BareNode for key in node.keys):
            names: Sequence[Any] = [key.value for key in node.keys]  # type: ignore[attr-defined]
            return lambda values: dict(zip(names, values, strict=True)), n
    return lambda values: trees.rebuild(node, values), n


def _lone(values: list[object]) -> object:
    return values[0]
