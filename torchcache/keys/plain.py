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
from typing import Any

import numpy as np
import torch

from torchcache.keys.digest import digest_parts

_PLAIN_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)

#: The scalar types of NumPy itself; a class derived from one may hold more.
_SCALARS = frozenset({np.dtype(code).type for code in np.typecodes["All"] if code not in "OV"})

#: A class of the user's own that is derived from one of these may hold more than a path.
_PATHS = frozenset({
    pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.Path, pathlib.PosixPath,
    pathlib.WindowsPath,
})  # fmt: skip

#: What every enum member has beside the attributes that a class gives it.
_OF_MEMBERS = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_", "_order_", "_inverted_"})


def encode_plain(value: object) -> bytes | None:
    """Return the bytes of an immutable plain value, or None if it is not one.

    Plain are int, float, complex, str, bool, None, bytes, enum members, NumPy scalars, torch dtypes, devices,
    layouts and memory formats, slices, Ellipsis, paths, and tuples (named ones too) of these. Classes derived from
    one of these may hold more than it does, and are not plain.
    """
    kind = type(value)
    if isinstance(value, int) and kind is int:
        return f"int {value:x}".encode()  # in decimal, Python refuses long ones
    if kind is bool or value is None or value is ... or value is NotImplemented:
        return f"{kind.__name__} {value!r}".encode()
    if kind is float:
        return b"float" + struct.pack("<d", value)
    if isinstance(value, complex) and kind is complex:
        return b"complex" + struct.pack("<dd", value.real, value.imag)
    if isinstance(value, str) and kind is str:
        return b"str " + value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes) and kind is bytes:
        return b"bytes " + value
    if isinstance(value, enum.Enum):
        return _encode_member(value)
    if isinstance(value, _PLAIN_TORCH):
        return f"{kind.__name__} {value}".encode()
    if isinstance(value, slice):
        parts = [encode_plain(part) for part in (value.start, value.stop, value.step)]
        return None if None in parts else digest_parts([b"slice", *parts])  # type: ignore[list-item]
    if isinstance(value, tuple):
        if kind is not torch.Size and (kind.__basicsize__ != tuple.__basicsize__ or kind.__dictoffset__):
            return None  # it has attributes beside its items
        items = [encode_plain(item) for item in value]
        return None if None in items else digest_parts([b"tuple", type_name(kind), *items])  # type: ignore[list-item]
    if kind in _PATHS:
        return b"path " + kind.__name__.encode() + b" " + str(value).encode("utf-8", "surrogateescape")
    if kind in _SCALARS and isinstance(value, np.generic):
        return digest_parts([b"numpy", str(value.dtype).encode(), value.tobytes()])
    return None


def _encode_member(value: enum.Enum) -> bytes | None:
    """Return the bytes of an enum member; None if its value, or an attribute that its class gives it, is not plain."""
    # The value too: a program may be edited between two runs.
    parts = [encode_plain(value.value)]
    for name in attributes_of_member(value):
        parts += [name.encode(), encode_plain(vars(value)[name])]
    if None in parts:
        return None
    return digest_parts([b"enum", type_name(type(value)), str(value.name).encode(), *(part or b"" for part in parts)])


def attributes_of_member(value: enum.Enum) -> list[str]:
    """Return the names of the attributes that a class gives its member, as ``http.HTTPStatus`` does."""
    return sorted(vars(value).keys() - _OF_MEMBERS)


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
