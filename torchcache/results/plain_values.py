"""The values of a whole call's result that need no leaf: plain values, dates, paths, sets and their like.

Their entries are listed in ``values``. Each is of the very class that is named: one derived from it may hold more.
What lies in a set, a slice or a fraction is of these kinds too.
"""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import pathlib
import uuid
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch

from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.keys.plain import encode_plain
from torchcache.results.dates import (
    DateTimeValue,
    DateValue,
    TimeDeltaValue,
    TimeValue,
    TimeZoneValue,
    ZoneInfoValue,
    is_zone,
)
from torchcache.results.dtypes import check_dtype, dtype_of, pack_structure, unpack_structure
from torchcache.results.value_kinds import PlainValue, canonical, comparable_array, digest_row, name_of

#: Values in values are kept to this depth.
_MAX_DEPTH = 32

_PATHS: dict[str, type[pathlib.PurePath]] = {
    kind.__name__: kind
    for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath)
}


class BareValue(PlainValue):
    """None, a bool, int, float, str or bytes: its own entry."""

    @classmethod
    def take_apart(cls, value: Any, path: str) -> tuple[object, torch.Tensor | None]:  # noqa: ANN401, ARG003
        return value, None

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401
        if isinstance(value, str):
            return digest_row(value.encode("utf-8", "surrogatepass"))
        if isinstance(value, bytes):
            return digest_row(value)
        return comparable_array(np.asarray(value))


class IntValue(BareValue):
    """An int; it has a tag only where it does not fit into the 64 bits that msgpack has."""

    tag = 4

    @classmethod
    def take_apart(cls, value: Any, path: str) -> tuple[object, torch.Tensor | None]:  # noqa: ANN401, ARG003
        return ([cls.tag, large_int_bytes(value)] if is_large_int(value) else value), None

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        (data,) = rest
        return int.from_bytes(data, "big", signed=True)

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401
        return digest_row(large_int_bytes(value)) if is_large_int(value) else super().comparable(value)


class ComplexValue(PlainValue):
    """A complex number."""

    tag = 5

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        return value.real, value.imag

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        return complex(*rest)

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401
        return comparable_array(np.asarray(value))


class ScalarValue(PlainValue):
    """A NumPy scalar."""

    tag = 2

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        array = np.asarray(value)
        check_dtype(array.dtype, path)
        return array.dtype.str, array.tobytes()

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        dtype, item = rest
        return np.frombuffer(item, dtype_of(dtype), count=1)[0]

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401
        return comparable_array(np.asarray(value))


class StructureValue(PlainValue):
    """An item of a structured array."""

    tag = 7
    can_be_key = False

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        return pack_structure(value.dtype, path), value.tobytes()

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        dtype, item = rest
        return np.frombuffer(bytearray(item), unpack_structure(dtype), count=1)[0]


class PathValue(PlainValue):
    """A path of ``pathlib``."""

    tag = 8

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        return type(value).__name__, str(value)

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        kind, text = rest
        return _PATHS[kind](text)


class DecimalValue(PlainValue):
    """A ``Decimal``, whose text says all of it."""

    tag = 15

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        return (str(value),)

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        (text,) = rest
        return decimal.Decimal(text)


class UuidValue(PlainValue):
    """A ``UUID``."""

    tag = 16

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        return value.bytes, value.is_safe.value

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        data, is_safe = rest
        return uuid.UUID(bytes=data, is_safe=uuid.SafeUUID(is_safe))


class FractionValue(PlainValue):
    """A ``Fraction``."""

    tag = 17

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401
        return [_int_entry(part, path, depth) for part in (value.numerator, value.denominator)]

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:
        numerator, denominator = [_int_of(part, depth) for part in rest]
        return fractions.Fraction(numerator, denominator)


class RangeValue(PlainValue):
    """A range."""

    tag = 18

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401
        return [_int_entry(part, path, depth) for part in (value.start, value.stop, value.step)]

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:
        start, stop, step = [_int_of(part, depth) for part in rest]
        return range(start, stop, step)


class SliceValue(PlainValue):
    """A slice."""

    tag = 19
    can_be_key = False  # before Python 3.12

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401
        return [inner_entry(part, path, depth) for part in (value.start, value.stop, value.step)]

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:
        start, stop, step = [inner_value(part, depth) for part in rest]
        return slice(start, stop, step)


class SetValue(PlainValue):
    """A set. What it holds is kept in the order in which it was gone through."""

    tag = 20
    can_be_key = False
    kind: ClassVar[type[Any]] = set

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401
        return [inner_entry(item, path, depth) for item in value]

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:
        items = [inner_value(item, depth) for item in rest]
        made = cls.kind(items)
        if len(made) != len(items):
            raise CorruptRecordError("a set in a result has one item twice")
        return made


class FrozenSetValue(SetValue):
    """A frozenset; its entries are sorted, so that equal ones are the same bytes where they are keys of a dict."""

    tag = 21
    can_be_key = True
    kind = frozenset

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401
        return sorted(super().parts(value, path, depth), key=canonical)


class InnerTupleValue(SetValue):
    """A tuple in a set; any other is a node of the tree."""

    tag = 22
    can_be_key = True
    kind = tuple


class ByteArrayValue(PlainValue):
    """A bytearray."""

    tag = 23
    can_be_key = False

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        return (bytes(value),)

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        (data,) = rest
        return bytearray(data)


_BARE = (type(None), bool, float, str, bytes)

#: The kinds of values without a leaf, by their very class. Tuples and None are nodes of the tree where they are in
#: no other value.
BY_TYPE: dict[type[Any], type[PlainValue]] = {
    **dict.fromkeys(_BARE, BareValue),
    int: IntValue,
    complex: ComplexValue,
    **dict.fromkeys(_PATHS.values(), PathValue),
    dt.date: DateValue,
    dt.datetime: DateTimeValue,
    dt.time: TimeValue,
    dt.timedelta: TimeDeltaValue,
    dt.timezone: TimeZoneValue,
    decimal.Decimal: DecimalValue,
    uuid.UUID: UuidValue,
    fractions.Fraction: FractionValue,
    range: RangeValue,
    slice: SliceValue,
    set: SetValue,
    frozenset: FrozenSetValue,
    tuple: InnerTupleValue,
    bytearray: ByteArrayValue,
}

_KINDS: tuple[type[PlainValue], ...] = (*BY_TYPE.values(), ScalarValue, StructureValue, ZoneInfoValue)
BY_TAG: dict[int, type[PlainValue]] = {kind.tag: kind for kind in _KINDS if kind is not BareValue}


def kind_by_type(value: object) -> type[PlainValue] | None:
    """Return the kind of a value without a leaf; None for any other value."""
    kind = BY_TYPE.get(type(value))
    if kind is not None:
        return kind
    if isinstance(value, np.generic):
        if type(value) is np.void and value.dtype.names is not None:
            return StructureValue
        return None if encode_plain(value) is None else ScalarValue
    return ZoneInfoValue if is_zone(value) else None


def inner_entry(value: object, path: str, depth: int) -> object:
    """Return the entry of a value that lies in another one, which is at ``path``.

    Raises:
        UncacheableError: If it cannot be kept.
    """
    kind = kind_by_type(value)
    if kind is None or not kind.can_be_key or depth > _MAX_DEPTH:
        raise UncacheableError(
            f"the cached call returned a {name_of(value)} inside of what is at {path}; a set or a slice may hold "
            "plain values, numbers, dates, paths, and tuples and frozensets of these; return a list in its place"
        )
    if kind in (BareValue, IntValue):
        return kind.take_apart(value, path)[0]
    return [kind.tag, *kind.parts(value, path, depth + 1)]


def inner_value(entry: object, depth: int) -> object:
    """Return the value of an entry without a leaf.

    Raises:
        CorruptRecordError: If there is no such kind of values.
        Exception: Of any other kind, if nobody wrote such an entry.
    """
    if not isinstance(entry, list):
        return entry
    tag, *rest = entry
    kind = BY_TAG.get(tag)
    if kind is None or depth > _MAX_DEPTH:
        raise CorruptRecordError("a result has a value of an unknown kind")
    return kind.value_of(rest, depth + 1)


def is_large_int(value: int) -> bool:
    """Tell whether an int does not fit into the 64 bits that msgpack has."""
    return not -(2**63) <= value < 2**64


def large_int_bytes(value: int) -> bytes:
    """Return an int as bytes: signed, big-endian."""
    return value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


def _int_entry(value: object, path: str, depth: int) -> object:
    """Return the entry of an int, or of a bool.

    Raises:
        UncacheableError: If it is of another class.
    """
    if type(value) not in (int, bool):
        raise UncacheableError(
            f"the cached call returned a {name_of(value)} inside of what is at {path}; make it of ints"
        )
    return inner_entry(value, path, depth)


def _int_of(entry: object, depth: int) -> int:
    value = inner_value(entry, depth)
    if not isinstance(value, int):
        raise CorruptRecordError("a result has a range or a fraction that is not of ints")
    return value
