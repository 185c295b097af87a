"""What every kind of node of a tree can do, and the two walks that make nodes: through an object, and through bytes.

The kinds themselves are in ``plain_nodes``, ``container_nodes`` and ``object_nodes``; ``tree`` lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import msgpack

from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.keys.plain import type_name
from torchcache.results.foreign import advice_on

#: Bounds of one tree. They keep a hostile structure cheap, and end the walk through one that contains itself.
MAX_NODES = 4096
MAX_DEPTH = 32

REMEDY = (
    "return tensors or NumPy arrays with the batch in front, in tuples, lists, dicts, named tuples, dataclasses or "
    "classes registered with torch.utils._pytree.register_pytree_node, with plain values beside them, or decorate the "
    "part of the model that does"
)

#: Returns the class of a name, or None.
Find = Callable[[str], "type[Any] | None"]


class TooLargeError(UncacheableError):
    """A result is larger or deeper than what can be kept; a cached call returns it and keeps nothing."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One place in a tree. Immutable; ``build`` makes all that is mutable anew.

    Each kind of node is a subclass. ``take_apart`` makes a node of a value and ``build`` the value again; ``pack``
    gives what msgpack is to write of a node, and ``unpack`` makes the node of what msgpack read.
    """

    #: The number that a packed node starts with.
    tag: ClassVar[int]

    #: Whether it may also be packed as the value itself.
    is_bare: ClassVar[bool] = False

    children: tuple[Node, ...]

    @classmethod
    def fits(cls, value: object) -> bool:
        """Tell whether a value is of this kind; not asked of kinds that are found by the type of the value."""
        raise NotImplementedError

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        """Make a node of a value of this kind, or have ``walk`` refuse the value."""
        raise NotImplementedError

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        """Make a node of what ``pack`` gave, without its tag.

        Raises:
            Exception: Of any kind, if ``pack`` gave no such thing.
        """
        raise NotImplementedError

    def pack(self) -> object:
        """Return what msgpack is to write."""
        raise NotImplementedError

    def build(self, leaves: Iterator[object]) -> object:
        """Return the tree below with the next of ``leaves`` in it."""
        raise NotImplementedError

    @cached_property
    def n_leaves(self) -> int:
        """The number of leaves below."""
        return sum(child.n_leaves for child in self.children)

    @property
    def can_be_key(self) -> bool:
        """Whether a dict may have it as a key."""
        return False

    def leaf_nodes(self) -> Iterator[LeafNode]:
        """Yield the leaves below, in order."""
        for child in self.children:
            yield from child.leaf_nodes()

    def classes(self) -> Iterator[type[Any]]:
        """Yield every class that the packed tree names."""
        for child in self.children:
            yield from child.classes()

    def numbers(self) -> Iterator[int]:
        """Yield every int among the plain values."""
        for child in self.children:
            yield from child.numbers()

    def _packed_children(self) -> list[object]:
        return [child.pack() for child in self.children]

    def _built_children(self, leaves: Iterator[object]) -> list[Any]:
        return [child.build(leaves) for child in self.children]


@dataclasses.dataclass(frozen=True)
class LeafNode(Node):
    """A leaf: the next tensor. It is packed as an empty list."""

    @cached_property
    def n_leaves(self) -> int:
        return 1

    def leaf_nodes(self) -> Iterator[LeafNode]:
        yield self

    def pack(self) -> object:
        return []

    def build(self, leaves: Iterator[object]) -> object:
        return next(leaves)

    def as_value(self, leaf: object) -> object:
        """Return a leaf as ``build`` puts it in the tree."""
        return leaf


LEAF = LeafNode(())


@dataclasses.dataclass(frozen=True)
class RefusedNode(Node):
    """A value that cannot be kept. A tree that has one is built with the very object, and is never stored."""

    value: object

    def pack(self) -> object:
        return None

    def build(self, leaves: Iterator[object]) -> object:  # noqa: ARG002 - it has none
        return self.value


@dataclasses.dataclass(frozen=True, slots=True)
class Kinds:
    """The kinds of nodes there are.

    Attributes:
        by_type: The kind of all objects of a type, without its subclasses.
        others: The kinds of other objects: the first one that fits.
        by_tag: The kind of a packed node.
        of_keys: The kinds of what only a key of a dict may be.
    """

    by_type: Mapping[type, type[Node]]
    others: Sequence[type[Node]]
    by_tag: Mapping[int, type[Node]]
    of_keys: Sequence[type[Node]] = ()

    def of(self, value: object) -> type[Node] | None:
        """Return the kind of a value that is no leaf; None if it cannot be kept."""
        kind = self.by_type.get(type(value))
        if kind is not None:
            return kind
        for other in self.others:
            if other.fits(value):
                return other
        return None


class Walk:
    """One walk through an object. The first thing that cannot be kept becomes ``problem``.

    Args:
        kinds: The kinds of nodes.
        is_leaf: Tells what to leave whole.
        remedy: What to say of a value that cannot be kept.

    Attributes:
        leaves: What was left whole so far.
        paths: Where each leaf is.
        problem: Why the tree cannot be kept, or None.
        sequences: The tuples and lists without a leaf, each with its path.
    """

    def __init__(self, kinds: Kinds, is_leaf: Callable[[object], bool], remedy: str = REMEDY) -> None:
        self._kinds = kinds
        self._is_leaf = is_leaf
        self._remedy = remedy
        self._n_nodes = 0
        self.leaves: list[Any] = []
        self.paths: list[str] = []
        self.problem: UncacheableError | None = None
        self.sequences: list[tuple[str, Sequence[object]]] = []

    def visit(self, value: object, path: str, depth: int) -> Node:
        """Return the node of a value, with all that is below it."""
        if self._is_leaf(value):
            self.leaves.append(value)
            self.paths.append(path)
            return LEAF

        self._n_nodes += 1
        if depth > MAX_DEPTH or self._n_nodes > MAX_NODES:
            problem = (
                f"the cached call's result has more than {MAX_NODES} plain values or lies more than "
                f"{MAX_DEPTH} deep at {path}; return large values as tensors, one row a sample"
            )
            return self.refuse(value, problem, TooLargeError)

        kind = self._kinds.of(value)
        if kind is not None:
            return kind.take_apart(value, path, depth, self)
        return self.refuse_kind(value, path, depth)

    def visit_all(self, values: Iterable[object], paths: Iterable[str], depth: int) -> tuple[Node, ...]:
        """Return the nodes of the parts of a value; ``depth`` is that of the value."""
        return tuple([self.visit(value, path, depth + 1) for value, path in zip(values, paths, strict=True)])

    @property
    def is_inner(self) -> bool:
        """Whether nothing in it is a leaf."""
        return self._is_leaf is _is_never_a_leaf

    def inner(self, *, is_key: bool = False) -> Walk:
        """Return a walk through something beside the children, such as a key, in which nothing is a leaf."""
        kinds = self._kinds
        if is_key and kinds.of_keys:
            kinds = dataclasses.replace(kinds, others=(*kinds.others, *kinds.of_keys), of_keys=())
        return Walk(kinds, _is_never_a_leaf)

    def refuse_kind(self, value: object, path: str, depth: int) -> Node:
        """Refuse a value of a kind that cannot be kept."""
        if depth == 0:
            returned = f"{type(value).__qualname__}, not a tensor"
        else:
            returned = f"{type_of(value)} at {path}, no tensor"
        remedy = advice_on(value, path) or self._remedy
        return self.refuse(value, f"the cached call returned {returned}; {remedy}")

    def refuse_attributes(self, value: object, path: str) -> Node:
        """Refuse a container that has attributes, which its class does not tell us how to put back."""
        at = f"{type_of(value)} at {path}"
        return self.refuse(
            value, f"the cached call returned {at}, which has attributes of its own beside its items; {REMEDY}"
        )

    def refuse(self, value: object, problem: str, error: type[UncacheableError] = UncacheableError) -> Node:
        """Note why a value cannot be kept, and return a node that stands for it."""
        if self.problem is None:
            self.problem = error(problem)
        return RefusedNode((), value)


class Reading:
    """One walk through what msgpack read.

    Args:
        kinds: The kinds of nodes.
        find: Returns the class of a name.
    """

    def __init__(self, kinds: Kinds, find: Find) -> None:
        self._kinds = kinds
        self.find = find

    def node(self, packed: object, depth: int) -> Node:
        """Return the node of a packed one, with all that is below it.

        Raises:
            Exception: Of any kind, if nobody packed that.
        """
        if not isinstance(packed, list):
            bare = self._kinds.by_type.get(type(packed))
            if bare is None or not bare.is_bare:
                raise CorruptRecordError("no value of this kind is known")
            return self.node_of(packed)
        if not packed:
            return LEAF

        tag, *rest = packed
        if type(tag) is not int or depth > MAX_DEPTH:
            raise CorruptRecordError("a node has no tag, or lies too deep")
        return self._kinds.by_tag[tag].unpack(rest, depth, self)

    def nodes(self, packed: Iterable[object], depth: int) -> tuple[Node, ...]:
        """Return the nodes of packed ones below a node of ``depth``."""
        return tuple([self.node(one, depth + 1) for one in packed])

    def node_of(self, value: object) -> Node:
        """Return the node of a plain value."""
        return Walk(self._kinds, _is_never_a_leaf).visit(value, "", 0)

    def class_of(self, name: str) -> type[Any]:
        """Return the class of a name.

        Raises:
            CorruptRecordError: If it is not known.
        """
        kind = self.find(name)
        if kind is None:
            raise CorruptRecordError(f"no class {name} is known")
        return kind


def need(holds: bool) -> None:  # noqa: FBT001 - reads as the claim it checks
    """Raise unless what was read is as it must be.

    Raises:
        CorruptRecordError: If it is not.
    """
    if not holds:
        raise CorruptRecordError("the structure describes no tree that this process can build")


def to_bytes(packed: object) -> bytes:
    """Return what ``pack`` gave as bytes."""
    # Strings of Python may hold lone surrogates, of file names for example.
    structure: bytes = msgpack.packb(packed, use_bin_type=True, unicode_errors="surrogatepass")
    return structure


def class_name(cls: type) -> str:
    """Return the name of a class as a packed tree has it."""
    return type_name(cls).decode()


def type_of(value: object) -> str:
    """Name the type of a value in a message."""
    return f"a {class_name(type(value))}"


def _is_never_a_leaf(_value: object) -> bool:
    return False
