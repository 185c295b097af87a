"""Nodes that are containers of the very types that Python and NumPy have."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from torchcache.errors import UncacheableError
from torchcache.results.nodes import Node, Reading, Walk, need, type_of
from torchcache.results.plain_nodes import BareNode, PlainNode
from torchcache.results.plain_values import inner_entry, inner_value, kind_by_type

#: What a defaultdict may make its values with.
_FACTORIES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        int, float, complex, bool, str, bytes, bytearray, list, tuple, set, frozenset, dict, Counter, OrderedDict, deque
    )
}  # fmt: skip

#: The most items an array of objects may have: each is a node or a leaf.
_MOST_OBJECTS = 4096


@dataclasses.dataclass(frozen=True)
class ItemsNode(Node):
    """A tuple or a list."""

    kind: ClassVar[type[Any]]

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        n_leaves = len(walk.leaves)
        paths = [f"{path}[{i}]" for i in range(len(value))]
        children = walk.visit_all(value, paths, depth)
        if len(walk.leaves) == n_leaves:
            walk.sequences.append((path, value))
        return cls(children)

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        return cls(reading.nodes(rest, depth))

    def pack(self) -> object:
        return [self.tag, *self._packed_children()]

    def build(self, leaves: Iterator[object]) -> object:
        return self.kind(self._built_children(leaves))


@dataclasses.dataclass(frozen=True)
class TupleNode(ItemsNode):
    """A tuple."""

    tag = 0
    kind = tuple

    @property
    def can_be_key(self) -> bool:
        return all(child.can_be_key for child in self.children)


@dataclasses.dataclass(frozen=True)
class ListNode(ItemsNode):
    """A list."""

    tag = 1
    kind = list


@dataclasses.dataclass(frozen=True)
class PairsNode(Node):
    """A mapping; its children are the values."""

    kind: ClassVar[type[Any]]

    keys: tuple[Node, ...]

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        if getattr(value, "__dict__", None):
            return walk.refuse_attributes(value, path)
        keys, children = cls._visit_pairs(value, path, depth, walk)
        return cls(children, keys)

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        keys, children = cls._read_pairs(rest, depth, reading)
        return cls(children, keys)

    def classes(self) -> Iterator[type[Any]]:
        for key in self.keys:
            yield from key.classes()
        yield from super().classes()

    def pack(self) -> object:
        return [self.tag, *self._packed_pairs()]

    def build(self, leaves: Iterator[object]) -> object:
        return self.kind(self._built_pairs(leaves))

    @staticmethod
    def _visit_pairs(
        value: Any,  # noqa: ANN401 - a mapping
        path: str,
        depth: int,
        walk: Walk,
    ) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """Return the nodes of the keys of a mapping, and those of the values."""
        keys: list[Node] = []
        paths: list[str] = []
        for key in value:
            node = _node_of_key(key, path, depth, walk)
            if node is None:
                problem = f"the cached call returned a dict with a key that is {type_of(key)} at {path}; use str keys"
                keys.append(walk.refuse(key, problem))
                paths.append(path)
            else:
                keys.append(node)
                paths.append(f"{path}[{key!r}]")
        return tuple(keys), walk.visit_all(value.values(), paths, depth)

    @staticmethod
    def _read_pairs(pairs: list[Any], depth: int, reading: Reading) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """Return the nodes of packed keys, and those of the values behind them."""
        keys = reading.nodes(pairs[::2], depth)
        need(all(key.can_be_key for key in keys))
        return keys, reading.nodes(pairs[1::2], depth)

    def _packed_pairs(self) -> list[object]:
        packed: list[object] = []
        for key, child in zip(self.keys, self.children, strict=True):
            packed.append(key.pack())
            packed.append(child.pack())
        return packed

    def _built_pairs(self, leaves: Iterator[object]) -> list[tuple[Any, Any]]:
        keys = [key.build(leaves) for key in self.keys]
        return list(zip(keys, self._built_children(leaves), strict=True))


@dataclasses.dataclass(frozen=True)
class DictNode(PairsNode):
    """A dict."""

    tag = 2
    kind = dict


@dataclasses.dataclass(frozen=True)
class OrderedDictNode(PairsNode):
    """An ``OrderedDict``."""

    tag = 3
    kind = OrderedDict


@dataclasses.dataclass(frozen=True)
class CounterNode(PairsNode):
    """A ``Counter``."""

    tag = 14

    def build(self, leaves: Iterator[object]) -> object:
        made: Counter[Any] = Counter()
        dict.update(made, self._built_pairs(leaves))
        return made


@dataclasses.dataclass(frozen=True)
class DefaultDictNode(PairsNode):
    """A ``defaultdict`` whose factory is a type of Python's own; torch registers those without one."""

    tag = 15

    factory: str

    @classmethod
    def fits(cls, value: object) -> bool:
        return type(value) is defaultdict and value.default_factory is not None

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        factory = value.default_factory
        name = getattr(factory, "__name__", "")
        if not isinstance(name, str) or _FACTORIES.get(name) is not factory:
            problem = (
                f"the cached call returned a defaultdict at {path} whose default_factory is {factory!r}, which nothing "
                "stored may lead to; use a type of Python's own such as list, or return dict(...)"
            )
            return walk.refuse(value, problem)
        keys, children = cls._visit_pairs(value, path, depth, walk)
        return cls(children, keys, name)

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        name, *pairs = rest
        need(name in _FACTORIES)
        keys, children = cls._read_pairs(pairs, depth, reading)
        return cls(children, keys, name)

    def pack(self) -> object:
        return [self.tag, self.factory, *self._packed_pairs()]

    def build(self, leaves: Iterator[object]) -> object:
        return defaultdict(_FACTORIES[self.factory], self._built_pairs(leaves))


@dataclasses.dataclass(frozen=True)
class ObjectArrayNode(Node):
    """A NumPy array of objects; others are leaves."""

    tag = 16

    shape: tuple[int, ...]

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        if value.size > _MOST_OBJECTS:
            problem = (
                f"the cached call returned an array of {value.size} objects at {path}, more than {_MOST_OBJECTS}; "
                "return an array of numbers or of strings, or tensors"
            )
            return walk.refuse(value, problem)
        paths = [f"{path}.flat[{i}]" for i in range(value.size)]
        return cls(walk.visit_all(list(value.flat), paths, depth), value.shape)

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        shape, *items = rest
        need(isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape))
        need(math.prod(shape) == len(items))
        return cls(reading.nodes(items, depth), tuple(shape))

    def pack(self) -> object:
        return [self.tag, list(self.shape), *self._packed_children()]

    def build(self, leaves: Iterator[object]) -> object:
        made = np.empty(len(self.children), dtype=object)
        for i, item in enumerate(self._built_children(leaves)):
            made[i] = item
        return made.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class KeyNode(PlainNode):
    """A key that is no plain value of the tree, such as a path or a date: by its entry (see ``values``)."""

    tag = 18

    entry: object

    @classmethod
    def fits(cls, value: object) -> bool:
        kind = kind_by_type(value)
        return kind is not None and kind.can_be_key

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        try:
            return cls((), value, inner_entry(value, path, depth))
        except UncacheableError as error:
            return walk.refuse(value, str(error))

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:  # noqa: ARG003
        (entry,) = rest
        value = inner_value(entry, depth)
        need(cls.fits(value))
        return cls((), value, entry)

    def pack(self) -> object:
        return [self.tag, self.entry]


def _node_of_key(key: object, path: str, depth: int, walk: Walk) -> Node | None:
    """Return the node of a key; None if it is neither a plain value nor a tuple of these."""
    if type(key) is str:  # most are, and they need no walk
        return BareNode((), key)
    inner = walk.inner(is_key=True)
    node = inner.visit(key, path, depth)
    return node if inner.problem is None and node.can_be_key else None
