"""The result of a call that is one sample, as one row: tensors, arrays, images and plain values, by value.

What is a tensor here (a tensor, the bytes of an array or of an image) is a leaf of the layout, whole. The last leaf has
an entry for each value of the result, in order (see ``values``). The structure of the layout is the tree that the
values hang in, empty for a lone value. So results that differ in their values only share a layout, and plain values may
be of any length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgpack
import numpy as np
import torch

from torchcache.errors import CorruptRecordError
from torchcache.layout import Bytes2D, Found, Layout, Leaf, empty_rows
from torchcache.results import tree as trees
from torchcache.results.batches import Results
from torchcache.results.classes import KnownClasses
from torchcache.results.item_reader import ItemReader, unpack
from torchcache.results.leaves import (
    CPU,
    byte_ranges,
    columns,
    copy_leaves,
    has_known_dtypes,
    put_leaf,
    rounded_leaf,
    stored_form,
)
from torchcache.results.nodes import Node
from torchcache.results.tree import Tree
from torchcache.results.values import is_value, kind_of, value_of

#: At most this many layouts are remembered with how to read their rows.
_MOST_READERS = 256

_REMEDY = (
    "return tensors, NumPy arrays, PIL images, plain values, dates, paths and sets, in tuples, lists, dicts, named "
    "tuples, dataclasses or classes registered with torch.utils._pytree.register_pytree_node"
)


class CallResults(Results):
    """Results of calls that are one sample each."""

    def __init__(self) -> None:
        super().__init__()
        # By the identity of a layout, which the values keep alive; what two threads make at once is the same.
        self._readers: dict[int, tuple[Layout, Node | None, ItemReader]] = {}

    def flatten(self, output: object) -> Tree:
        return trees.flatten(output, is_value, _REMEDY, trees.KINDS_OF_WHOLE_CALLS)

    def take_apart(
        self, tree: Tree, n: int, cache_dtype: torch.dtype | None, known: KnownClasses
    ) -> tuple[list[Found], int]:
        assert n == 1
        encoded = tree.encode()

        # An entry for each value, and the bytes of those that are not in their entries.
        entries: list[object] = []
        leaves: list[Leaf] = []
        stored: list[tuple[Leaf, torch.Tensor]] = []
        overflowed = 0
        for value, path in zip(tree.leaves, tree.paths, strict=True):
            entry, tensor = kind_of(value).take_apart(value, path)
            entries.append(entry)
            if tensor is not None:
                leaf, in_order, more = stored_form(tensor.detach().unsqueeze(0), cache_dtype)
                leaves.append(leaf)
                stored.append((leaf, in_order))
                overflowed += more
        packed: bytes = msgpack.packb(entries, use_bin_type=True, unicode_errors="surrogatepass")

        layout = Layout((*leaves, Leaf("uint8", "uint8", (len(packed),))), encoded)
        row = empty_rows(1, layout.nbytes)
        copy_leaves(stored, row)
        row[0, layout.nbytes - len(packed) :] = np.frombuffer(packed, np.uint8)
        if encoded:
            known.learn_from(tree)
        return [Found([0], layout, row)], overflowed

    def devices(self, tree: Tree) -> tuple[torch.device, ...]:
        stored = [value for value in tree.leaves if kind_of(value).has_leaf]
        devices = [value.device if isinstance(value, torch.Tensor) else CPU for value in stored]
        return (*devices, CPU)

    def rounded(self, tree: Tree, cache_dtype: torch.dtype | None) -> object:
        return tree.build(
            [rounded_leaf(leaf, cache_dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in tree.leaves]
        )

    def assemble(self, found: Sequence[Found], n: int, devices: Sequence[torch.device], known: KnownClasses) -> object:
        assert n == 1
        layout = found[0].layout
        values = list(_values(layout, found[0].data, devices))
        if not layout.structure:
            return values[0]
        return trees.rebuild(_node_of(layout, known), values)

    def assemble_each(self, layout: Layout, data: Bytes2D, known: KnownClasses) -> list[object]:
        """Make the results of calls from their rows, in host memory.

        Args:
            layout: Of all of the rows; this process knows its classes.
            data: The rows; nothing in a result shares their memory.
            known: What classes the results may have.

        Raises:
            CorruptRecordError: If one of them cannot be rebuilt after all.
        """
        remembered = self._readers.get(id(layout))
        if remembered is None or remembered[0] is not layout:
            node = _node_of(layout, known) if layout.structure else None
            if layout.structure and node is None:
                raise CorruptRecordError("the result is of classes this process does not know")
            if len(self._readers) >= _MOST_READERS:
                self._readers = {}
            remembered = layout, node, ItemReader(layout, node)
            self._readers[id(layout)] = remembered
        elif layout.structure and _node_of(layout, known) is not remembered[1]:  # a class was defined anew
            self._readers = {}
            return self.assemble_each(layout, data, known)
        return remembered[2].read(data)

    def is_known(self, layout: Layout, known: KnownClasses) -> bool:
        if not has_known_dtypes(layout) or layout.leaves[-1].dtype != "uint8":
            return False
        if not layout.structure:
            return True
        node = _node_of(layout, known)
        return node is not None and known.is_certain(node)

    def plain_numbers(self, layout: Layout, known: KnownClasses) -> frozenset[int]:  # noqa: ARG002 - there is no batch
        return frozenset()

    def leaves(self, layout: Layout, data: Bytes2D, known: KnownClasses) -> list[torch.Tensor]:  # noqa: ARG002
        devices = [CPU] * len(layout.leaves)
        return [kind_of(value).comparable(value) for value in _values(layout, data, devices)]


def _node_of(layout: Layout, known: KnownClasses) -> Node | None:
    """Return the tree that the values of a layout hang in; None if this process cannot rebuild it."""
    return known.decode(layout.structure, _stand_ins)


def _stand_ins(n_leaves: int) -> list[object]:
    return [torch.empty(1, device="cpu") for _ in range(n_leaves)]


def _values(layout: Layout, data: Bytes2D | torch.Tensor, devices: Sequence[torch.device]) -> Iterator[object]:
    """Yield the values of a result.

    Raises:
        CorruptRecordError: If they are not as this module writes them.
    """
    *ranges, (_, start, _) = byte_ranges(layout)
    last = data[0, start:]
    packed = (last if isinstance(last, np.ndarray) else last.cpu().numpy()).tobytes()
    tensors = zip(ranges, devices, strict=False)

    def next_tensor(device: torch.device | None = None) -> torch.Tensor:
        (leaf, begin, end), own_device = next(tensors)
        return put_leaf(leaf, columns(data, begin, end), device or own_device)[0]

    try:
        for entry in unpack(packed):
            yield value_of(entry, next_tensor)
    except CorruptRecordError:
        raise
    except Exception as error:
        raise CorruptRecordError(f"the values of a result cannot be read: {error!r}") from error
