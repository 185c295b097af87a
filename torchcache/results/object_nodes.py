"""Nodes that are objects of a class: named tuples, dataclasses, tensors, and what is registered with torch's pytrees.

No code of a class runs, except what it has registered with torch.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from types import MemberDescriptorType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchcache.results.nodes import REMEDY, Node, Reading, Walk, class_name, need, to_bytes, type_of
from torchcache.results.tensor_classes import (
    attributes_on,
    is_kept_whole,
    is_plain_with_attributes,
    plain_part,
    with_class,
)


@dataclasses.dataclass(frozen=True)
class ObjectNode(Node):
    """An object; its class is packed as a name, which is compared with names of known classes."""

    kind: type[Any]

    def classes(self) -> Iterator[type[Any]]:
        yield self.kind
        yield from super().classes()


@dataclasses.dataclass(frozen=True)
class NamedTupleNode(ObjectNode):
    """A named tuple."""

    tag = 4

    @classmethod
    def fits(cls, value: object) -> bool:
        if not isinstance(value, tuple):
            return False
        fields = _names_of_items(type(value))
        return fields is not None and len(value) == len(fields)

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        if getattr(value, "__dict__", None):
            return walk.refuse_attributes(value, path)
        paths = [f"{path}.{name}" for name in value._fields]
        return cls(walk.visit_all(value, paths, depth), type(value))

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        name, fields, *items = rest
        kind = reading.class_of(name)
        need(_names_of_items(kind) == fields is not None)
        need(len(items) == len(fields))
        return cls(reading.nodes(items, depth), kind)

    def pack(self) -> object:
        return [self.tag, class_name(self.kind), list(self.kind._fields), *self._packed_children()]

    def build(self, leaves: Iterator[object]) -> object:
        # What _make does, unless a subclass has another.
        return tuple.__new__(self.kind, self._built_children(leaves))


@dataclasses.dataclass(frozen=True)
class DataclassNode(ObjectNode):
    """An object by its own attributes: neither its ``__init__`` nor a property of it runs."""

    tag = 5

    names: tuple[str, ...]
    slots: dict[str, MemberDescriptorType]

    @classmethod
    def fits(cls, value: object) -> bool:
        return _is_plain_dataclass(type(value))

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        kind = type(value)
        slots = _slots_of(kind)
        attributes: dict[str, object] = {}
        for name, slot in slots.items():
            try:
                attributes[name] = slot.__get__(value, kind)
            except AttributeError:  # not set
                continue
        attributes.update(getattr(value, "__dict__", {}))

        paths = [f"{path}.{name}" for name in attributes]
        children = walk.visit_all(attributes.values(), paths, depth)
        return cls(children, kind, tuple(attributes), slots)

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        name, fields, names, *values = rest
        kind = reading.class_of(name)
        need(_is_plain_dataclass(kind))
        need(_field_names(kind) == fields)
        need(isinstance(names, list) and all(type(name) is str for name in names))
        need(len(set(names)) == len(names) == len(values))
        return cls(reading.nodes(values, depth), kind, tuple(names), _slots_of(kind))

    def pack(self) -> object:
        fields = _field_names(self.kind)
        return [self.tag, class_name(self.kind), fields, list(self.names), *self._packed_children()]

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
class RegisteredNode(ObjectNode):
    """An object of a class that is registered with ``torch.utils._pytree``, taken apart and built by its functions."""

    tag = 6

    context: Node

    @classmethod
    def fits(cls, value: object) -> bool:
        return type(value) in pytree.SUPPORTED_NODES

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        registration = f"{type_of(value)} at {path}, whose registration with torch.utils._pytree"
        try:
            children, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
            children = list(children)
        except Exception as error:  # noqa: BLE001 - whatever other people registered
            problem = f"the cached call returned {registration} cannot flatten it ({error!r}); {REMEDY}"
            return walk.refuse(value, problem)

        inner = walk.inner()
        context_node = inner.visit(context, path, depth + 1)
        if inner.problem is None:
            lost = _what_is_lost(value, children, context_node, walk)
        else:
            lost = "has a context that is not plain data"
        if lost is not None:
            return walk.refuse(value, f"the cached call returned {registration} {lost}; {REMEDY}")

        # The context may hold one value per sample, too, unless it names the parts of the object.
        for _, items in inner.sequences:
            if isinstance(items, tuple) and not _are_names(items, value):
                walk.sequences.append((f"{path} (context)", list(items)))

        names: Sequence[object] = list(value) if isinstance(value, dict) else ()
        if len(names) != len(children):
            names = range(len(children))
        paths = [f"{path}[{name!r}]" for name in names]
        return cls(walk.visit_all(children, paths, depth), type(value), context_node)

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        name, fields, packed_context, *children = rest
        kind = reading.class_of(name)
        need(kind in pytree.SUPPORTED_NODES)
        need(_field_names_or_none(kind) == fields)
        context = reading.node(packed_context, depth + 1)
        need(context.n_leaves == 0)
        return cls(reading.nodes(children, depth), kind, context)

    def classes(self) -> Iterator[type[Any]]:
        yield from self.context.classes()
        yield from super().classes()

    def numbers(self) -> Iterator[int]:
        yield from self.context.numbers()
        yield from super().numbers()

    def pack(self) -> object:
        fields = _field_names_or_none(self.kind)
        return [self.tag, class_name(self.kind), fields, self.context.pack(), *self._packed_children()]

    def build(self, leaves: Iterator[object]) -> object:
        return _unflatten(self.kind, self._built_children(leaves), self.context.build(iter(())))


@dataclasses.dataclass(frozen=True)
class TensorNode(ObjectNode):
    """A tensor of a derived class: a plain one, the first child, and its attributes."""

    tag = 17

    names: tuple[str, ...]

    @classmethod
    def fits(cls, value: object) -> bool:
        return isinstance(value, torch.Tensor) and is_kept_whole(value)

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401 - of this kind
        attributes = attributes_on(value)
        paths = [path, *[f"{path}.{name}" for name in attributes]]
        children = walk.visit_all([plain_part(value), *attributes.values()], paths, depth)
        return cls(children, type(value), tuple(attributes))

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:
        name, names, plain, *values = rest
        kind = reading.class_of(name)
        need(is_plain_with_attributes(kind))
        need(isinstance(names, list) and all(type(name) is str for name in names))
        need(len(set(names)) == len(names) == len(values) and plain == [])
        return cls(reading.nodes([plain, *values], depth), kind, tuple(names))

    def pack(self) -> object:
        return [self.tag, class_name(self.kind), list(self.names), *self._packed_children()]

    def build(self, leaves: Iterator[object]) -> object:
        plain, *values = self._built_children(leaves)
        return with_class(plain, self.kind, dict(zip(self.names, values, strict=True)))


def _names_of_items(kind: type[Any]) -> list[str] | None:
    """Return the fields of a class of named tuples, None for another class."""
    fields = getattr(kind, "_fields", None)
    if not issubclass(kind, tuple) or not isinstance(fields, tuple):
        return None
    return list(fields) if all(type(name) is str for name in fields) else None


def _is_plain_dataclass(kind: type[Any]) -> bool:
    """Tell whether the objects of a class are made of attributes, and of nothing that lies in a base of C."""
    if not dataclasses.is_dataclass(kind):
        return False
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def _field_names(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _field_names_or_none(kind: type[Any]) -> list[str] | None:
    return _field_names(kind) if dataclasses.is_dataclass(kind) else None


def _slots_of(kind: type[Any]) -> dict[str, MemberDescriptorType]:
    """Return the slots of a class, of which an object may have values beside its ``__dict__``."""
    slots: dict[str, MemberDescriptorType] = {}
    for base in reversed(kind.__mro__):
        slots.update({name: slot for name, slot in vars(base).items() if isinstance(slot, MemberDescriptorType)})
    return slots


def _unflatten(kind: type[Any], children: list[object], context: object) -> object:
    made = pytree.SUPPORTED_NODES[kind].unflatten_fn(children, context)
    if isinstance(made, OrderedDict) and isinstance(context, list) and _is_other_order(list(made), context):
        # transformers adds keys to a ModelOutput that it has made; made at once, they are in the fields' order.
        for key in context:
            made.move_to_end(key)
    return made


def _is_other_order(a: list[object], b: list[object]) -> bool:
    return a != b and len(a) == len(b) and all(item in a for item in b)


def _what_is_lost(value: object, children: list[object], context: Node, walk: Walk) -> str | None:
    """Say what flattening an object of a registered class and making it again loses, or return None."""
    kind = type(value)
    try:
        made = _unflatten(kind, list(children), context.build(iter(())))
        is_same = type(made) is kind and _is_flattened_alike(made, children, context, walk)
    except Exception as error:  # noqa: BLE001 - whatever other people registered
        return f"cannot make it again ({error!r})"
    if not is_same:
        return "does not make it again as it was"

    before = getattr(value, "__dict__", {})
    after = getattr(made, "__dict__", {})
    lost = [name for name in before if name not in after or (before[name] is None) != (after[name] is None)]
    return f"loses its attributes {lost}" if lost else None


def _is_flattened_alike(made: object, children: list[object], context: Node, walk: Walk) -> bool:
    """Tell whether an object of a registered class has these very children and a context like this one."""
    children_again, context_again = pytree.SUPPORTED_NODES[type(made)].flatten_fn(made)
    if [id(child) for child in children_again] != [id(child) for child in children]:
        return False
    packed_again = walk.inner().visit(context_again, "", 0).pack()
    return to_bytes(packed_again) == to_bytes(context.pack())


def _are_names(items: Sequence[object], value: object) -> bool:
    """Tell whether a sequence names attributes or keys of an object."""
    keys = list(value) if isinstance(value, dict) else []
    return all(item in keys or (isinstance(item, str) and hasattr(value, item)) for item in items)
