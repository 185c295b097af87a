"""Nodes that are plain values: they are immutable and have no leaves."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import torch

from torchcache.keys.origins import is_own_class
from torchcache.keys.plain import attributes_of_member, encode_plain
from torchcache.results.nodes import Node, Reading, Walk, class_name, need, to_bytes
from torchcache.results.plain_values import is_large_int, large_int_bytes

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


@dataclasses.dataclass(frozen=True)
class PlainNode(Node):
    """A plain value."""

    value: Any

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401, ARG003
        return cls((), value)

    @classmethod
    def unpack(cls, rest: list[Any], depth: int, reading: Reading) -> Node:  # noqa: ARG003
        node = reading.node_of(cls.read(rest, reading))
        # Each value has one form. An enum member whose value was edited since is another one.
        need(to_bytes(node.pack()) == to_bytes([cls.tag, *rest]))
        return node

    @classmethod
    def read(cls, rest: list[Any], reading: Reading) -> object:
        """Return the value that ``pack`` gave this for.

        Raises:
            Exception: Of any kind, if ``pack`` gave no such thing.
        """
        raise NotImplementedError

    @property
    def can_be_key(self) -> bool:
        return True

    def build(self, leaves: Iterator[object]) -> object:  # noqa: ARG002 - it has none
        return self.value


@dataclasses.dataclass(frozen=True)
class BareNode(PlainNode):
    """None, a bool, float, str or bytes: msgpack keeps it by type and bit for bit."""

    is_bare = True

    def pack(self) -> object:
        return self.value


@dataclasses.dataclass(frozen=True)
class IntNode(PlainNode):
    """An int; it has a tag only where it does not fit into the 64 bits that msgpack has."""

    tag = 8
    is_bare = True

    @classmethod
    def read(cls, rest: list[Any], reading: Reading) -> object:  # noqa: ARG003
        (data,) = rest
        return int.from_bytes(data, "big", signed=True)

    def numbers(self) -> Iterator[int]:
        yield self.value

    def pack(self) -> object:
        return [self.tag, large_int_bytes(self.value)] if is_large_int(self.value) else self.value


@dataclasses.dataclass(frozen=True)
class ComplexNode(PlainNode):
    """A complex number."""

    tag = 9

    @classmethod
    def read(cls, rest: list[Any], reading: Reading) -> object:  # noqa: ARG003
        real, imaginary = rest
        return complex(real, imaginary)

    def pack(self) -> object:
        return [self.tag, self.value.real, self.value.imag]


@dataclasses.dataclass(frozen=True)
class DtypeNode(PlainNode):
    """A ``torch.dtype``."""

    tag = 10

    @classmethod
    def read(cls, rest: list[Any], reading: Reading) -> object:  # noqa: ARG003
        (name,) = rest
        return _DTYPES[name]

    def pack(self) -> object:
        return [self.tag, str(self.value)]


@dataclasses.dataclass(frozen=True)
class DeviceNode(PlainNode):
    """A ``torch.device``."""

    tag = 11

    @classmethod
    def read(cls, rest: list[Any], reading: Reading) -> object:  # noqa: ARG003
        (name,) = rest
        need(type(name) is str)
        return torch.device(name)

    def pack(self) -> object:
        return [self.tag, str(self.value)]


@dataclasses.dataclass(frozen=True)
class SizeNode(PlainNode):
    """A ``torch.Size``."""

    tag = 12

    @classmethod
    def read(cls, rest: list[Any], reading: Reading) -> object:  # noqa: ARG003
        return torch.Size(rest)

    def numbers(self) -> Iterator[int]:
        yield from self.value

    def pack(self) -> object:
        return [self.tag, *self.value]


@dataclasses.dataclass(frozen=True)
class EnumNode(PlainNode):
    """A member of an enum, found again by its name.

    Its value is packed too, since a program may be edited between two runs; None if it is not plain.
    """

    tag = 7

    packed_value: object

    @classmethod
    def fits(cls, value: object) -> bool:
        return isinstance(value, enum.Enum) and _is_constant_member(value)

    @classmethod
    def take_apart(cls, value: Any, path: str, depth: int, walk: Walk) -> Node:  # noqa: ANN401, ARG003
        if isinstance(value.value, enum.Enum):
            return cls((), value, None)
        inner = walk.inner()
        packed = inner.visit(value.value, "", 1).pack()
        return cls((), value, packed if inner.problem is None else None)

    @classmethod
    def read(cls, rest: list[Any], reading: Reading) -> object:
        name, member, _ = rest
        kind = reading.class_of(name)
        need(issubclass(kind, enum.Enum))
        members: dict[str, object] = kind.__members__
        return members[member]

    def classes(self) -> Iterator[type[Any]]:
        yield type(self.value)

    def pack(self) -> object:
        return [self.tag, class_name(type(self.value)), self.value.name, self.packed_value]


def _is_constant_member(value: enum.Enum) -> bool:
    """Tell whether an enum member is found by its name, and holds nothing that can change."""
    if type(value).__members__.get(value.name) is not value:
        return False
    if encode_plain(value) is None:
        return False
    return not (attributes_of_member(value) and is_own_class(type(value)))
