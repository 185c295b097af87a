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

Keys are plain values and tuples of these. A class is a name that is compared with the names of classes
the process has already; nothing is imported for it, and no code of it runs, except what it has
registered with torch as the way to make it. This module holds no tensors: what is a leaf, its caller
says.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from types import MemberDescriptorType
from typing import Any

import msgpack
import torch
from torch.utils import _pytree as pytree

from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.keys.code import is_own_class
from torchcache.keys.plain import attributes_of_member, encode_plain
from torchcache.log import warn_once

#: Bounds of one tree. They keep a hostile structure cheap, and end the walk through one that contains itself.
MAX_NODES = 4096
MAX_DEPTH = 32
MAX_STRUCTURE_BYTES = 32768

#: So many decoded structures are remembered by each ``KnownClasses``.
_MOST_DECODED = 256

(_TUPLE, _LIST, _DICT, _ORDERED_DICT, _NAMED_TUPLE, _DATACLASS, _REGISTERED) = range(7)
(_ENUM, _LARGE_INT, _COMPLEX, _DTYPE, _DEVICE, _SIZE) = range(7, 13)

_SEQUENCES: dict[int, type[Any]] = {_TUPLE: tuple, _LIST: list}
_MAPPINGS: dict[int, type[Any]] = {_DICT: dict, _ORDERED_DICT: OrderedDict}

#: What msgpack keeps by type and bit for bit.
_AS_THEY_ARE = (type(None), bool, float, str, bytes)
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

_REMEDY = (
    "return tensors with the batch in front, in tuples, lists, dicts, named tuples, dataclasses or classes "
    "registered with torch.utils._pytree.register_pytree_node, with plain values beside them, or decorate the "
    "part of the model that does"
)

Find = Callable[[str], "type[Any] | None"]


class TooLargeError(UncacheableError):
    """A result is larger or deeper than what can be kept; a cached call returns it and keeps nothing."""


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
        if self.node is _LEAF:
            return b""
        structure = _to_bytes(self.node.pack())
        if len(structure) > MAX_STRUCTURE_BYTES:
            raise TooLargeError(
                f"the plain values of the cached call's result take {len(structure)} bytes, more than "
                f"{MAX_STRUCTURE_BYTES}; return large values as tensors, one row a sample"
            )
        return structure

    def build(self, leaves: Iterable[object]) -> object:
        """Return a tree like this one with other leaves."""
        return self.node.build(iter(leaves))


def flatten(output: object, is_leaf: Callable[[object], bool], remedy: str = _REMEDY) -> Tree:
    """Take a result apart; never raises for what it contains.

    Args:
        output: The result.
        is_leaf: Tells what to leave whole.
        remedy: What to say of a value that cannot be kept.
    """
    if is_leaf(output):
        return Tree(_LEAF, (output,), ("output",), None)
    walk = _Walk(is_leaf, remedy)
    node = walk.visit(output, "output", 0)
    return Tree(node, walk.leaves, walk.paths, walk.problem, walk.sequences)


class KnownClasses:
    """The classes a stored tree may be rebuilt from, found by name; any thread may use it.

    Invariant: names are only ever added. A name that two classes bear is doubtful for good: the latest is
    found, and ``is_certain`` denies a tree that has it.

    Args:
        classes: Known from the start; others are learned from results, or found among those registered
            with ``torch.utils._pytree``.
    """

    def __init__(self, classes: Iterable[type] = ()) -> None:
        self._classes: dict[str, type[Any]] = {}
        self._doubtful: set[str] = set()
        self._decoded: dict[bytes, Node] = {}  # the decodable ones only: what is unknown may be learned
        for cls in classes:
            self.learn(cls)

    def learn(self, cls: type) -> None:
        """Let ``cls`` be found."""
        name = class_name(cls)
        before = self._classes.get(name)
        if before is cls or _is_draft_of(cls, before):
            return
        self._classes[name] = cls
        if before is not None:
            if not _is_draft_of(before, cls):
                self._doubtful.add(name)
            self._decoded = {}  # whose trees would be of the class before

    def learn_from(self, tree: Tree) -> None:
        """Let the classes of a result be found."""
        for cls in tree.node.classes():
            self.learn(cls)
            if class_name(cls) in self._doubtful:
                warn_once(
                    ("doubtful class", class_name(cls)),
                    "results are instances of two classes named %s, so they are computed again at every call; "
                    "define the class once, outside of functions",
                    class_name(cls),
                )

    def find(self, name: str) -> type[Any] | None:
        """Return the class of that name; None if it is not known."""
        cls = self._classes.get(name)
        if cls is not None:
            return cls
        # A copy: another thread may be importing a module that registers its classes.
        registered: list[object] = list(pytree.SUPPORTED_NODES)  # a function stands for all named tuples
        named = [kind for kind in registered if isinstance(kind, type) and class_name(kind) == name]
        return named[0] if len(named) == 1 else None

    def is_certain(self, node: Node) -> bool:
        """Tell whether each class of the tree is the only one of its name."""
        return not self._doubtful or all(class_name(cls) not in self._doubtful for cls in node.classes())

    def decode(self, structure: bytes, stand_ins: Callable[[int], Sequence[object]]) -> Node | None:
        """Return the tree that ``structure`` describes.

        Args:
            structure: Whatever a store gave; not one lone leaf.
            stand_ins: Makes so many leaves to try the tree with, the first time.

        Returns:
            The tree; None if this process cannot rebuild it, or the bytes describe none.
        """
        node = self._decoded.get(structure)
        if node is not None:
            return node
        try:
            node = _decode(structure, self.find)
            _need(node is not _LEAF)  # a lone leaf has no structure
            _check_alike(node, stand_ins(node.n_leaves))
        except Exception:  # noqa: BLE001 - foreign bytes, and what other people registered: the row is computed
            return None
        if len(self._decoded) >= _MOST_DECODED:
            self._decoded = {}
        self._decoded[structure] = node
        return node


def _is_draft_of(cls: type, other: type | None) -> bool:
    """Tell whether ``other`` is what ``dataclass(slots=True)`` made of ``cls``.

    It makes a second class of the first one's parts, and methods of a frozen one still lead to the first.
    """
    fields = vars(cls).get("__dataclass_fields__")
    return (
        fields is not None
        and other is not None
        and vars(other).get("__dataclass_fields__") is fields
        and "__slots__" in vars(other)
    )


def class_name(cls: type) -> str:
    """Name a class; a script's module is ``__main__`` here and ``__mp_main__`` in a spawned worker."""
    module = "" if cls.__module__ in ("__main__", "__mp_main__") else cls.__module__
    return f"{module}.{cls.__qualname__}"


# -- nodes --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Node:
    """One place in a tree. Immutable; ``build`` makes all that is mutable anew."""

    children: tuple[Node, ...]

    @cached_property
    def n_leaves(self) -> int:
        """How many leaves hang below."""
        return sum(child.n_leaves for child in self.children)

    def classes(self) -> Iterator[type[Any]]:
        """Yield every class that a stored tree names."""
        for child in self.children:
            yield from child.classes()

    def numbers(self) -> Iterator[int]:
        """Yield every int among the plain values."""
        for child in self.children:
            yield from child.numbers()

    def pack(self) -> object:
        """Return what msgpack is to pack."""
        raise NotImplementedError

    def build(self, leaves: Iterator[object]) -> object:
        """Return the tree below with the next of ``leaves`` in it."""
        raise NotImplementedError

    def _packed(self) -> list[object]:
        return [child.pack() for child in self.children]

    def _built(self, leaves: Iterator[object]) -> list[Any]:
        return [child.build(leaves) for child in self.children]


@dataclasses.dataclass(frozen=True)
class _Leaf(Node):
    @cached_property
    def n_leaves(self) -> int:
        return 1

    def pack(self) -> object:
        return []

    def build(self, leaves: Iterator[object]) -> object:
        return next(leaves)


@dataclasses.dataclass(frozen=True)
class _Plain(Node):
    """An immutable value without leaves."""

    value: Any
    packed: object

    def classes(self) -> Iterator[type[Any]]:
        if isinstance(self.value, enum.Enum):
            yield type(self.value)

    def numbers(self) -> Iterator[int]:
        if type(self.value) is int:
            yield self.value
        elif isinstance(self.value, torch.Size):
            yield from self.value

    def pack(self) -> object:
        return self.packed

    def build(self, leaves: Iterator[object]) -> object:  # noqa: ARG002 - it has none
        return self.value


@dataclasses.dataclass(frozen=True)
class _Items(Node):
    tag: int

    def pack(self) -> object:
        return [self.tag, *self._packed()]

    def build(self, leaves: Iterator[object]) -> object:
        return _SEQUENCES[self.tag](self._built(leaves))


@dataclasses.dataclass(frozen=True)
class _Pairs(Node):
    tag: int
    keys: tuple[Node, ...]

    def classes(self) -> Iterator[type[Any]]:
        for node in (*self.keys, *self.children):
            yield from node.classes()

    def pack(self) -> object:
        pairs = zip(self.keys, self.children, strict=True)
        return [self.tag, *(node.pack() for pair in pairs for node in pair)]

    def build(self, leaves: Iterator[object]) -> object:
        keys = [key.build(leaves) for key in self.keys]
        return _MAPPINGS[self.tag](zip(keys, self._built(leaves), strict=True))


@dataclasses.dataclass(frozen=True)
class _NamedTuple(Node):
    kind: type[Any]

    def classes(self) -> Iterator[type[Any]]:
        yield self.kind
        yield from super().classes()

    def pack(self) -> object:
        return [_NAMED_TUPLE, class_name(self.kind), list(self.kind._fields), *self._packed()]

    def build(self, leaves: Iterator[object]) -> object:
        # What _make does, unless a subclass has another.
        return tuple.__new__(self.kind, self._built(leaves))


@dataclasses.dataclass(frozen=True)
class _Dataclass(Node):
    """An object by its own attributes: neither its ``__init__`` nor a property of it runs."""

    kind: type[Any]
    names: tuple[str, ...]
    slots: dict[str, MemberDescriptorType]

    def classes(self) -> Iterator[type[Any]]:
        yield self.kind
        yield from super().classes()

    def pack(self) -> object:
        return [_DATACLASS, class_name(self.kind), _fields(self.kind), list(self.names), *self._packed()]

    def build(self, leaves: Iterator[object]) -> object:
        made = object.__new__(self.kind)
        for name, child in zip(self.names, self.children, strict=True):
            value = child.build(leaves)
            if name in self.slots:
                self.slots[name].__set__(made, value)  # also where the class is frozen
            else:
                vars(made)[name] = value
        return made


@dataclasses.dataclass(frozen=True)
class _Registered(Node):
    kind: type[Any]
    context: Node

    def classes(self) -> Iterator[type[Any]]:
        yield self.kind
        yield from self.context.classes()
        yield from super().classes()

    def numbers(self) -> Iterator[int]:
        yield from self.context.numbers()
        yield from super().numbers()

    def pack(self) -> object:
        fields = _fields(self.kind) if dataclasses.is_dataclass(self.kind) else None
        return [_REGISTERED, class_name(self.kind), fields, self.context.pack(), *self._packed()]

    def build(self, leaves: Iterator[object]) -> object:
        return _unflatten(self.kind, self._built(leaves), self.context.build(iter(())))


def _unflatten(kind: type[Any], children: list[object], context: object) -> object:
    made = pytree.SUPPORTED_NODES[kind].unflatten_fn(children, context)
    if isinstance(made, OrderedDict) and isinstance(context, list) and _is_other_order(list(made), context):
        # transformers adds keys to a ModelOutput that it has made; made at once, they are in the fields' order.
        for key in context:
            made.move_to_end(key)
    return made


def _is_other_order(a: list[object], b: list[object]) -> bool:
    return a != b and len(a) == len(b) and all(item in a for item in b)


def _fields(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _slots(kind: type[Any]) -> dict[str, MemberDescriptorType]:
    """Return the slots of a class, of which an object may have values beside its ``__dict__``."""
    return {
        name: slot
        for base in reversed(kind.__mro__)
        for name, slot in vars(base).items()
        if isinstance(slot, MemberDescriptorType)
    }


# -- from an object -------------------------------------------------------------------------------------------


class _Walk:
    """One walk through a result. The first thing that cannot be kept becomes ``problem``."""

    def __init__(self, is_leaf: Callable[[object], bool], remedy: str = _REMEDY) -> None:
        self._is_leaf = is_leaf
        self._remedy = remedy
        self._n_nodes = 0
        self.leaves: list[Any] = []
        self.paths: list[str] = []
        self.problem: UncacheableError | None = None
        self.sequences: list[tuple[str, Sequence[object]]] = []

    def visit(self, value: object, path: str, depth: int) -> Node:
        if self._is_leaf(value):
            self.leaves.append(value)
            self.paths.append(path)
            return _LEAF
        self._n_nodes += 1
        if depth > MAX_DEPTH or self._n_nodes > MAX_NODES:
            return self._refuse(
                value,
                f"the cached call's result has more than {MAX_NODES} plain values or lies more than "
                f"{MAX_DEPTH} deep at {path}; return large values as tensors, one row a sample",
                TooLargeError,
            )
        plain = _plain(value)
        if plain is not None:
            return plain
        kind = type(value)
        if isinstance(value, (tuple, list)) and kind in (tuple, list):
            paths = [f"{path}[{i}]" for i in range(len(value))]
            n_leaves = len(self.leaves)
            children = self._visit_all(value, paths, depth)
            if len(self.leaves) == n_leaves:
                self.sequences.append((path, value))
            return _Items(children, _TUPLE if kind is tuple else _LIST)
        if isinstance(value, dict) and kind in (dict, OrderedDict):
            return self._visit_pairs(value, path, depth)
        fields = _named_fields(kind)
        if isinstance(value, tuple) and fields is not None and len(value) == len(fields):
            if getattr(value, "__dict__", None):
                return self._refuse_attributes(value, path)
            return _NamedTuple(self._visit_all(value, [f"{path}.{name}" for name in fields], depth), kind)
        if _is_plain_dataclass(kind):
            return self._visit_dataclass(value, path, depth)
        if kind in pytree.SUPPORTED_NODES:
            return self._visit_registered(value, path, depth)
        if depth == 0:
            return self._refuse(value, f"the cached call returned {kind.__qualname__}, not a tensor; {self._remedy}")
        return self._refuse(value, f"the cached call returned {_type_of(value)} at {path}, no tensor; {self._remedy}")

    def _visit_all(self, values: Iterable[object], paths: Iterable[str], depth: int) -> tuple[Node, ...]:
        return tuple(self.visit(value, path, depth + 1) for value, path in zip(values, paths, strict=True))

    def _visit_pairs(self, value: dict[object, object], path: str, depth: int) -> Node:
        if getattr(value, "__dict__", None):
            return self._refuse_attributes(value, path)
        keys: list[Node] = []
        paths: list[str] = []
        for key in value:
            walk = _Walk(_nothing)
            node = walk.visit(key, path, depth)
            is_plain = walk.problem is None and _is_key(node)
            if not is_plain:
                problem = f"the cached call returned a dict with a key that is {_type_of(key)} at {path}; use str keys"
                node = self._refuse(key, problem)
            keys.append(node)
            paths.append(f"{path}[{key!r}]" if is_plain else path)
        children = self._visit_all(value.values(), paths, depth)
        return _Pairs(children, _DICT if type(value) is dict else _ORDERED_DICT, tuple(keys))

    def _visit_dataclass(self, value: object, path: str, depth: int) -> Node:
        kind, slots = type(value), _slots(type(value))
        attributes: dict[str, object] = {}
        for name, slot in slots.items():
            try:
                attributes[name] = slot.__get__(value, kind)
            except AttributeError:  # not set
                continue
        attributes.update(getattr(value, "__dict__", {}))
        children = self._visit_all(attributes.values(), [f"{path}.{name}" for name in attributes], depth)
        return _Dataclass(children, kind, tuple(attributes), slots)

    def _visit_registered(self, value: object, path: str, depth: int) -> Node:
        kind = type(value)
        try:
            flat, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
            flat = list(flat)
        except Exception as error:  # noqa: BLE001 - whatever other people registered
            return self._refuse(
                value,
                f"the cached call returned {_type_of(value)} at {path}, whose registration with torch.utils._pytree "
                f"cannot flatten it ({error!r}); {_REMEDY}",
            )
        inner = _Walk(_nothing)
        context_node = inner.visit(context, path, depth + 1)
        lost: str | None = "has a context that is not plain data"
        if inner.problem is None:
            lost = _what_is_lost(value, flat, context_node)
        if lost is not None:
            return self._refuse(
                value,
                f"the cached call returned {_type_of(value)} at {path}, whose registration with torch.utils._pytree "
                f"{lost}; {_REMEDY}",
            )
        # The context may hold one value per sample, too, unless it names the parts of the object.
        self.sequences += [
            (f"{path} (context)", list(items))
            for _, items in inner.sequences
            if isinstance(items, tuple) and not _are_names(items, value)
        ]
        names: Sequence[object] = list(value) if isinstance(value, dict) else ()
        if len(names) != len(flat):
            names = range(len(flat))
        return _Registered(self._visit_all(flat, [f"{path}[{name!r}]" for name in names], depth), kind, context_node)

    def _refuse_attributes(self, value: object, path: str) -> Node:
        return self._refuse(
            value,
            f"the cached call returned {_type_of(value)} at {path}, which has attributes of its own beside its "
            f"items; {_REMEDY}",
        )

    def _refuse(self, value: object, problem: str, kind: type[UncacheableError] = UncacheableError) -> Node:
        if self.problem is None:
            self.problem = kind(problem)
        return _Plain((), value, None)


def _what_is_lost(value: object, flat: list[object], context: Node) -> str | None:
    """Say what flattening an object of a registered class and making it again loses, or return None."""
    kind = type(value)
    try:
        made = _unflatten(kind, list(flat), context.build(iter(())))
        flat_again, context_again = pytree.SUPPORTED_NODES[kind].flatten_fn(made)
        is_same = (
            type(made) is kind
            and [id(child) for child in flat_again] == [id(child) for child in flat]
            and _to_bytes(_Walk(_nothing).visit(context_again, "", 0).pack()) == _to_bytes(context.pack())
        )
    except Exception as error:  # noqa: BLE001 - whatever other people registered
        return f"cannot make it again ({error!r})"
    if not is_same:
        return "does not make it again as it was"
    before, after = getattr(value, "__dict__", {}), getattr(made, "__dict__", {})
    lost = [name for name in before if name not in after or (before[name] is None) != (after[name] is None)]
    return f"loses its attributes {lost}" if lost else None


def _are_names(items: Sequence[object], value: object) -> bool:
    """Tell whether a sequence names attributes or keys of an object."""
    keys = list(value) if isinstance(value, dict) else []
    return all(item in keys or (isinstance(item, str) and hasattr(value, item)) for item in items)


_LEAF = _Leaf(())


def _plain(value: object) -> Node | None:
    """Return the node of an immutable plain value, None for everything else. Subclasses are not plain."""
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return _Plain((), value, value)
    if isinstance(value, int) and kind is int:
        if -(2**63) <= value < 2**64:
            return _Plain((), value, value)
        return _Plain((), value, [_LARGE_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)])
    if isinstance(value, complex) and kind is complex:
        return _Plain((), value, [_COMPLEX, value.real, value.imag])
    if isinstance(value, torch.dtype):
        return _Plain((), value, [_DTYPE, str(value)])
    if isinstance(value, torch.device):
        return _Plain((), value, [_DEVICE, str(value)])
    if isinstance(value, torch.Size):
        return _Plain((), value, [_SIZE, *value])
    if isinstance(value, enum.Enum) and _is_constant_member(value):
        # The value too: a program may be edited between two runs.
        walk = _Walk(_nothing)
        inner = None if isinstance(value.value, enum.Enum) else walk.visit(value.value, "", 1).pack()
        return _Plain((), value, [_ENUM, class_name(kind), value.name, None if walk.problem else inner])
    return None


def _is_constant_member(value: enum.Enum) -> bool:
    """Tell whether an enum member is found by its name, and holds nothing that can change."""
    if type(value).__members__.get(value.name) is not value or encode_plain(value) is None:
        return False
    return not (attributes_of_member(value) and is_own_class(type(value)))


def _nothing(_value: object) -> bool:
    return False


def _named_fields(kind: type[Any]) -> list[str] | None:
    """Return the fields of a class of named tuples, None for another class."""
    fields = getattr(kind, "_fields", None)
    is_named = issubclass(kind, tuple) and isinstance(fields, tuple) and all(type(name) is str for name in fields)
    return list(fields) if is_named and fields is not None else None


def _is_plain_dataclass(kind: type[Any]) -> bool:
    """Tell whether the objects of a class are made of attributes, and of nothing that lies in a base of C."""
    if not dataclasses.is_dataclass(kind):
        return False
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def _is_key(node: Node) -> bool:
    return isinstance(node, _Plain) or (
        isinstance(node, _Items) and node.tag == _TUPLE and all(_is_key(child) for child in node.children)
    )


def _type_of(value: object) -> str:
    return f"a {class_name(type(value))}"


def _to_bytes(packed: object) -> bytes:
    # Strings of Python may hold lone surrogates, of file names for example.
    structure: bytes = msgpack.packb(packed, use_bin_type=True, unicode_errors="surrogatepass")
    return structure


# -- from bytes -----------------------------------------------------------------------------------------------


def _decode(structure: bytes, find: Find) -> Node:
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
    return _unpack(packed, find, 0)


def _unpack(packed: object, find: Find, depth: int) -> Node:
    if not isinstance(packed, list):
        if type(packed) in (*_AS_THEY_ARE, int):
            return _Plain((), packed, packed)
        raise CorruptRecordError("no value of this kind is known")
    if not packed:
        return _LEAF
    tag, *rest = packed
    if type(tag) is not int or depth > MAX_DEPTH:
        raise CorruptRecordError("a node has no tag, or lies too deep")

    def children(of: Iterable[object]) -> tuple[Node, ...]:
        return tuple(_unpack(child, find, depth + 1) for child in of)

    if tag in _SEQUENCES:
        return _Items(children(rest), tag)
    if tag in _MAPPINGS:
        keys = children(rest[::2])
        _need(all(_is_key(key) for key in keys))
        return _Pairs(children(rest[1::2]), tag, keys)
    if tag == _NAMED_TUPLE:
        kind, fields = _class_of(rest, find)
        _need(_named_fields(kind) == fields is not None and len(rest) - 2 == len(kind._fields))
        return _NamedTuple(children(rest[2:]), kind)
    if tag == _DATACLASS:
        kind, fields = _class_of(rest, find)
        names = rest[2]
        _need(_is_plain_dataclass(kind) and _fields(kind) == fields)
        _need(isinstance(names, list) and all(type(name) is str for name in names) and len(set(names)) == len(names))
        _need(len(rest) - 3 == len(names))
        return _Dataclass(children(rest[3:]), kind, tuple(names), _slots(kind))
    if tag == _REGISTERED:
        kind, fields = _class_of(rest, find)
        _need(kind in pytree.SUPPORTED_NODES)
        _need((_fields(kind) if dataclasses.is_dataclass(kind) else None) == fields)
        context = _unpack(rest[2], find, depth + 1)
        _need(context.n_leaves == 0)
        return _Registered(children(rest[3:]), kind, context)
    value = _unpack_plain(tag, rest, find)
    node = _plain(value)
    # One value has one form: a member whose value has changed meanwhile is another one.
    _need(node is not None and _to_bytes(node.pack()) == _to_bytes(packed))
    assert node is not None
    return node


def _unpack_plain(tag: int, rest: list[Any], find: Find) -> object:
    if tag == _SIZE:
        return torch.Size(rest)
    if tag == _ENUM:
        name, member, _value = rest
        kind = find(name)
        _need(kind is not None and issubclass(kind, enum.Enum))
        assert kind is not None
        return kind.__members__[member]
    if tag == _COMPLEX:
        real, imaginary = rest
        return complex(real, imaginary)
    (name,) = rest
    if tag == _LARGE_INT:
        return int.from_bytes(name, "big", signed=True)
    if tag == _DTYPE:
        return _DTYPES[name]
    _need(tag == _DEVICE and type(name) is str)
    return torch.device(name)


def _class_of(rest: list[Any], find: Find) -> tuple[type[Any], object]:
    name, fields = rest[:2]
    kind = find(name)
    if kind is None:
        raise CorruptRecordError(f"no class {name} is known")
    return kind, fields


def _need(holds: bool) -> None:  # noqa: FBT001 - reads as the claim it checks
    if not holds:
        raise CorruptRecordError("the structure describes no tree that this process can build")


def _check_alike(node: Node, leaves: Sequence[object]) -> None:
    """Try a tree once: registered functions may refuse, and a class may have changed.

    Raises:
        CorruptRecordError: If building it gives another tree.
    """
    by_id = {id(leaf) for leaf in leaves}
    tree = flatten(node.build(iter(leaves)), lambda value: id(value) in by_id)
    _need([id(leaf) for leaf in tree.leaves] == [id(leaf) for leaf in leaves])
    _need(_to_bytes(tree.node.pack()) == _to_bytes(node.pack()))
