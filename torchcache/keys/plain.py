"""Immutable plain values to bytes, and what to call types.

Two values have the same bytes exactly if they are the same by type and by value (1, True, 1.0 and "1"
differ, and so do 0.0 and -0.0). The bytes do not depend on the process, on addresses or on the hash
seed.
"""

from __future__ import annotations

import ctypes
import enum
import pathlib
import struct
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from torchcache.keys.digest import digest_parts
from torchcache.keys.origins import is_own_class

#: The scalar types of NumPy itself; a class derived from one may hold more.
_SCALARS = frozenset({np.dtype(code).type for code in np.typecodes["All"] if code not in "OV"})

#: A class of the user's own that is derived from one of these may hold more than a path.
_PATHS = frozenset({
    pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.Path, pathlib.PosixPath,
    pathlib.WindowsPath,
})  # fmt: skip

#: What every enum member has beside the attributes that a class gives it.
_OF_MEMBERS = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_", "_order_", "_inverted_"})

#: Plain values of these may be of a class with methods of the user's own, or hold such a value.
BRINGS_CODE = (enum.Enum, tuple)


def encode_plain(value: object) -> bytes | None:
    """Return the bytes of an immutable plain value, or None if it is not one.

    Plain are int, float, complex, str, bool, None, bytes, enum members, NumPy scalars, torch dtypes, devices,
    layouts and memory formats, slices, Ellipsis, paths, and tuples (named ones too) of these. Classes derived from
    one of these may hold more than it does, and are not plain.
    """
    # Long lists are made of these two: they are told apart without a call.
    if type(value) is str:
        return b"str " + value.encode("utf-8", "surrogatepass")
    if type(value) is int:
        return f"int {value:x}".encode()  # in decimal, Python refuses long ones

    encode = _ENCODERS.get(type(value))
    if encode is not None:
        return encode(value)
    if isinstance(value, enum.Enum):
        return _encode_member(value)
    if isinstance(value, tuple):
        return _encode_tuple(value)
    return None


def _encode_constant(value: object) -> bytes:
    return f"{type(value).__name__} {value!r}".encode()


def _encode_float(value: float) -> bytes:
    return b"float" + struct.pack("<d", value)


def _encode_complex(value: complex) -> bytes:
    return b"complex" + struct.pack("<dd", value.real, value.imag)


def _encode_bytes(value: bytes) -> bytes:
    return b"bytes " + value


def _encode_of_torch(value: object) -> bytes:
    return f"{type(value).__name__} {value}".encode()


def _encode_path(value: pathlib.PurePath) -> bytes:
    return b"path " + type(value).__name__.encode() + b" " + str(value).encode("utf-8", "surrogateescape")


def _encode_scalar(value: np.generic) -> bytes:
    return digest_parts([b"numpy", str(value.dtype).encode(), value.tobytes()])


def _encode_slice(value: slice) -> bytes | None:
    return _encode_all([b"slice"], (value.start, value.stop, value.step))


def _encode_tuple(value: tuple[object, ...]) -> bytes | None:
    """Return the bytes of a tuple, or of one of a derived class; None if it has attributes beside its items."""
    kind = type(value)
    if kind is not torch.Size and (kind.__basicsize__ != tuple.__basicsize__ or kind.__dictoffset__):
        return None
    if kind is not tuple:
        value = items_of_tuple(value)
    return _encode_all([b"tuple", type_name(kind)], value)


def items_of_tuple(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the items of a tuple, and the further fields that one of a class of C has by name alone.

    As ``os.stat_result`` has nanoseconds, and ``time.struct_time`` the offset of its time zone.
    """
    kind: Any = type(value)
    items = tuple(tuple.__iter__(value))
    if kind.__flags__ & _CAN_BE_DERIVED_FROM or not hasattr(kind, "n_sequence_fields"):
        return items
    reduced: Any = value.__reduce__()
    hidden: dict[str, object] = reduced[1][1]
    return (*items, *sorted(hidden.items())) if hidden else items


#: A flag of classes (Include/object.h); those of C that are made like named tuples do not have it.
_CAN_BE_DERIVED_FROM = 1 << 10


def _encode_member(value: enum.Enum) -> bytes | None:
    """Return the bytes of an enum member; None if its value, or an attribute that its class gives it, is not plain."""
    front = [b"enum", type_name(type(value)), str(value.name).encode()]
    # The value too: a program may be edited between two runs.
    encoded = encode_plain(value.value)
    if encoded is None:
        return None
    front.append(encoded)
    for name in attributes_of_member(value):
        encoded = encode_plain(vars(value)[name])
        if encoded is None:
            return None
        front += [name.encode(), encoded]
    return digest_parts(front)


def _encode_all(front: list[bytes], values: Iterable[object]) -> bytes | None:
    """Return the bytes of several values behind ``front``, or None if one of them is not plain."""
    for value in values:
        encoded = encode_plain(value)
        if encoded is None:
            return None
        front.append(encoded)
    return digest_parts(front)


_ENCODERS: dict[type, Callable[[Any], bytes | None]] = {
    **dict.fromkeys((bool, type(None), type(...), type(NotImplemented)), _encode_constant),
    float: _encode_float,
    complex: _encode_complex,
    bytes: _encode_bytes,
    **dict.fromkeys((torch.dtype, torch.device, torch.layout, torch.memory_format), _encode_of_torch),
    slice: _encode_slice,
    tuple: _encode_tuple,
    **dict.fromkeys(_PATHS, _encode_path),
    **dict.fromkeys(_SCALARS, _encode_scalar),
}


def attributes_of_member(value: enum.Enum) -> list[str]:
    """Return the names of the attributes that a class gives its member, as ``http.HTTPStatus`` does."""
    return sorted(vars(value).keys() - _OF_MEMBERS)


def classes_in(value: object) -> Iterator[type]:
    """Yield the classes in a plain value whose methods code may call: of enum members and one's own named tuples."""
    if isinstance(value, enum.Enum):
        yield type(value)
    elif isinstance(value, tuple):
        if type(value) not in (tuple, torch.Size) and is_own_class(type(value)):
            yield type(value)
        for item in value:
            yield from classes_in(item)


def type_name(kind: type | types.FunctionType) -> bytes:
    """Name a type or a function.

    A script's module is ``__main__`` here and ``__mp_main__`` in a spawned worker.
    """
    is_nobodys = kind.__module__ in ("__main__", "__mp_main__") or _is_made_by_ctypes(kind)
    module = "" if is_nobodys else kind.__module__
    return f"{module}.{kind.__qualname__}".encode()


def _is_made_by_ctypes(kind: Any) -> bool:  # noqa: ANN401 - a type or a function
    """Tell whether a type is ``c_char * 2`` or like it: its module is the first in this process that asked for it."""
    if type(kind) is not type(ctypes.Array) or kind is ctypes.Array:
        return False
    return bool(kind.__qualname__ == f"{kind._type_.__name__}_Array_{kind._length_}")
