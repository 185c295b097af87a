"""The tree that the tensors of a result hang in, as bytes and back.

One msgpack object, in which a node is::

    nil, bool, int, float, str, bin           the plain value itself
    []                                        a leaf: the next tensor
    [0, item...]                              tuple
    [1, item...]                              list
    [2, key, value, ...]                      dict
    [3, key, value, ...]                      OrderedDict
    [4, class, [field...], item...]           named tuple
    [5, class, [field...], [name...], item...]    dataclass: the attributes the object has
    [6, class, [field...] | nil, context, item...]    class registered with torch.utils._pytree
    [7, class, member, value | nil]           enum member
    [8, bin]                                  int beyond 64 bits, signed, big-endian
    [9, real, imaginary]                      complex
    [10, name], [11, name]                    torch.dtype, torch.device
    [12, int...]                              torch.Size
    [13, dtype, is writable]                  a leaf that is a NumPy array

and, in the results of whole calls::

    [14, key, value, ...]                     Counter
    [15, factory, key, value, ...]            defaultdict
    [16, [size...], item...]                  NumPy array of objects
    [17, class, [name...], [], value...]      tensor of a derived class, with its attributes
    [18, entry]                               a key that is a date, a path or the like (see ``values``)

Keys are plain values and tuples of these. A class is a name that is compared with the names of classes
the process has already; nothing is imported for it, and no code of it runs, except what it has
registered with torch as the way to make it. This module holds no tensors: what is a leaf, its caller
says.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgpack
import numpy as np
import torch

from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.results.array_nodes import ArrayNode
from torchcache.results.container_nodes import (
    CounterNode,
    DefaultDictNode,
    DictNode,
    KeyNode,
    ListNode,
    ObjectArrayNode,
    OrderedDictNode,
    TupleNode,
)
from torchcache.results.nodes import LEAF, REMEDY, Find, Kinds, Node, Reading, TooLargeError, Walk, need, to_bytes
from torchcache.results.object_nodes import DataclassNode, NamedTupleNode, RegisteredNode, TensorNode
from torchcache.results.plain_nodes import BareNode, ComplexNode, DeviceNode, DtypeNode, EnumNode, IntNode, SizeNode

#: Bound of one structure, beside those of the walk that makes it.
MAX_STRUCTURE_BYTES = 32768

_BY_TYPE: dict[type[Any], type[Node]] = {
    type(None): BareNode,
    bool: BareNode,
    float: BareNode,
    str: BareNode,
    bytes: BareNode,
    int: IntNode,
    complex: ComplexNode,
    torch.dtype: DtypeNode,
    torch.device: DeviceNode,
    torch.Size: SizeNode,
    tuple: TupleNode,
    list: ListNode,
    dict: DictNode,
    OrderedDict: OrderedDictNode,
}

#: Subclasses of the types above are of one of these kinds, or cannot be kept.
_OTHERS: tuple[type[Node], ...] = (EnumNode, NamedTupleNode, DataclassNode, RegisteredNode)

#: What only the result of a batch may be made of.
_OF_BATCHES: dict[type[Any], type[Node]] = {np.ndarray: ArrayNode}

#: What only the result of a whole call may be made of.
_MORE_BY_TYPE: dict[type[Any], type[Node]] = {
    Counter: CounterNode,
    np.ndarray: ObjectArrayNode,
}
_MORE_OTHERS: tuple[type[Node], ...] = (DefaultDictNode, TensorNode)
_OF_KEYS: tuple[type[Node], ...] = (KeyNode,)

_ALL = (*_BY_TYPE.values(), *_OTHERS, *_OF_BATCHES.values(), *_MORE_BY_TYPE.values(), *_MORE_OTHERS, *_OF_KEYS)
_BY_TAG = {kind.tag: kind for kind in _ALL if kind is not BareNode}

KINDS = Kinds(_BY_TYPE, _OTHERS, _BY_TAG)
KINDS_OF_BATCHES = Kinds({**_BY_TYPE, **_OF_BATCHES}, _OTHERS, _BY_TAG)
KINDS_OF_WHOLE_CALLS = Kinds({**_BY_TYPE, **_MORE_BY_TYPE}, (*_MORE_OTHERS, *_OTHERS), _BY_TAG, _OF_KEYS)


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """A result taken apart into its leaves and what they hang in.

    Attributes:
        node: The root.
        leaves: In the order in which ``build`` wants them.
        paths: Where each leaf lies, such as ``output['hidden'][2]``.
        problem: Why the tree cannot be kept, or None. What cannot be is built as the object itself.
        sequences: The tuples and lists in it that hold no leaf, each with its path.
    """

    node: Node
    leaves: Sequence[Any]
    paths: Sequence[str]
    problem: UncacheableError | None
    sequences: Sequence[tuple[str, Sequence[object]]] = ()

    def encode(self) -> bytes:
        """Return the tree as bytes, none for a lone leaf.

        Raises:
            UncacheableError: If it cannot be kept.
        """
        if self.problem is not None:
            raise self.problem
        if self.node is LEAF:
            return b""
        structure = to_bytes(self.node.pack())
        if len(structure) > MAX_STRUCTURE_BYTES:
            raise TooLargeError(
                f"the plain values of the cached call's result take {len(structure)} bytes, more than "
                f"{MAX_STRUCTURE_BYTES}; return large values as tensors, one row a sample"
            )
        return structure

    def build(self, leaves: Iterable[object]) -> object:
        """Return a tree like this one with other leaves."""
        return self.node.build(iter(leaves))


def flatten(output: object, is_leaf: Callable[[object], bool], remedy: str = REMEDY, kinds: Kinds = KINDS) -> Tree:
    """Take a result apart; never raises for what it contains.

    Args:
        output: The result.
        is_leaf: Tells what to leave whole.
        remedy: What to say of a value that cannot be kept.
        kinds: What it may be made of.
    """
    if is_leaf(output):
        return Tree(LEAF, (output,), ("output",), None)
    walk = Walk(kinds, is_leaf, remedy)
    node = walk.visit(output, "output", 0)
    return Tree(node, walk.leaves, walk.paths, walk.problem, walk.sequences)


def decode(structure: bytes, find: Find, stand_ins: Callable[[int], Sequence[object]]) -> Node:
    """Return the tree that ``structure`` describes, after trying it once.

    Args:
        structure: Whatever a store gave; not one lone leaf.
        find: Returns the class of a name.
        stand_ins: Makes that many leaves to try the tree with.

    Raises:
        Exception: Of any kind, if this process cannot rebuild the tree, or the bytes describe none.
    """
    if len(structure) > MAX_STRUCTURE_BYTES:
        raise CorruptRecordError("the structure is too long")
    packed = msgpack.unpackb(
        structure,
        raw=False,
        use_list=True,
        unicode_errors="surrogatepass",
        max_array_len=MAX_STRUCTURE_BYTES,
        max_str_len=MAX_STRUCTURE_BYTES,
        max_bin_len=MAX_STRUCTURE_BYTES,
        max_map_len=0,
        max_ext_len=0,
    )
    node = Reading(KINDS_OF_WHOLE_CALLS, find).node(packed, 0)
    need(node is not LEAF)  # a lone leaf has no structure
    _check_alike(node, stand_ins(node.n_leaves))
    return node


def rebuild(node: Node | None, leaves: Sequence[object]) -> Any:  # noqa: ANN401 - whatever was stored
    """Return the result of a known tree with these leaves in it.

    Args:
        node: What ``KnownClasses.decode`` gave for the structure of the rows.
        leaves: All of them, in order.

    Raises:
        CorruptRecordError: If this process cannot rebuild it after all.
    """
    if node is None or node.n_leaves != len(leaves):
        raise CorruptRecordError("the result is of classes this process does not know")
    try:
        return node.build(iter(leaves))
    except Exception as error:
        raise CorruptRecordError(f"a class of the result refuses to be rebuilt: {error!r}") from error


def _check_alike(node: Node, leaves: Sequence[object]) -> None:
    """Try a tree once: registered functions may refuse, and a class may have changed.

    Raises:
        CorruptRecordError: If building it gives another tree.
    """
    places = list(node.leaf_nodes())
    values = [place.as_value(leaf) for place, leaf in zip(places, leaves, strict=True)]
    marks = [_mark(value) for value in values]
    known = frozenset(mark for mark, value in zip(marks, values, strict=True) if not isinstance(value, np.ndarray))
    kinds = KINDS_OF_BATCHES if ArrayNode in map(type, places) else KINDS_OF_WHOLE_CALLS

    tree = flatten(node.build(iter(values)), lambda value: _mark(value) in known, kinds=kinds)
    need([_mark(leaf) for leaf in tree.leaves] == marks)
    need(to_bytes(tree.node.pack()) == to_bytes(node.pack()))


def _mark(leaf: object) -> tuple[str, int]:
    """Return what tells a leaf from all others: a tensor by its memory, which one of a derived class shares."""
    if type(leaf) is torch.Tensor and leaf.numel():
        return "memory", leaf.data_ptr()
    return "object", id(leaf)
