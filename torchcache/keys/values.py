"""Python values to bytes that say what they are: arguments of a call, of a constructor, plain state.

Two values have the same bytes exactly if they are the same by type and by value (1, True, 1.0 and "1"
differ, and so do 0.0 and -0.0). The bytes do not depend on the process, on addresses or on the hash
seed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import pathlib
import re
import struct
import types
from collections import deque
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from torchcache.keys.code import is_own_module, unwrap, walk_code
from torchcache.keys.digest import digest_bytes, digest_parts

#: Subclasses of these count by their type and the plain value.
_PLAIN_BASES: tuple[type[Any], ...] = (int, float, str, bytes)

_PLAIN_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class UnnamedValueError(Exception):
    """A value has no stable name; ``path`` says where it lies inside what was encoded."""

    def __init__(self, path: str, value: object) -> None:
        super().__init__(path)
        self.path = path
        self.type_name = type(value).__qualname__


def encode_plain(value: object) -> bytes | None:
    """Return the bytes of an immutable plain value, or None if it is not one.

    Plain are int, float, complex, str, bool, None, bytes, enum members, torch dtypes, devices, layouts
    and memory formats, slices, Ellipsis, and tuples (named ones too) of these.
    """
    kind = type(value)
    if kind is int or kind is bool or value is None or value is ...:
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
        # The value too: a program may be edited between two runs.
        return digest_parts([b"enum", _type_name(kind), value.name.encode(), encode_plain(value.value) or b""])
    if isinstance(value, _PLAIN_TORCH):
        return f"{kind.__name__} {value}".encode()
    if isinstance(value, slice):
        parts = [encode_plain(part) for part in (value.start, value.stop, value.step)]
        return None if None in parts else digest_parts([b"slice", *parts])  # type: ignore[list-item]
    if isinstance(value, tuple):
        items = [encode_plain(item) for item in value]
        return None if None in items else digest_parts([b"tuple", _type_name(kind), *items])  # type: ignore[list-item]
    return None


Refer = Callable[[torch.nn.Module | torch.Tensor], bytes]


def encode_argument(value: object, path: str) -> bytes:
    """Return the bytes of a construction argument.

    Args:
        value: Plain values, containers, tensors and arrays (all bytes), functions (their code),
            classes, dataclasses, enums, paths, partials; a module counts by its class and the shapes of
            its tensors (its weights count wherever it is used); an object with a ``__repr__`` of its
            own counts by its type and that.
        path: What to call the value in an error.

    Raises:
        UnnamedValueError: If the value, or one inside it, is known by its address only.
    """
    return _Encoder(_by_value, unnamed=None).encode(value, path)


def encode_state(value: object, path: str, refer: Refer) -> bytes:
    """Return the bytes of a plain attribute, a global or a closure variable.

    As ``encode_argument``, but objects of the user's own classes count by their attributes and other
    objects that have no stable name by their type.

    Args:
        value: The value.
        path: What to call it in an error.
        refer: What to say of a module or a tensor found in it.
    """
    return _Encoder(refer, unnamed=_attributes_or_type).encode(value, path)


def _by_value(value: torch.nn.Module | torch.Tensor) -> bytes:
    if isinstance(value, torch.Tensor):
        return encode_tensor(value)
    return _architecture(value)


def _attributes_or_type(value: object) -> object:
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and is_own_module(type(value).__module__):
        return attributes
    return None


class _Encoder:
    """One encoding; remembers which containers it is inside of, for values that contain themselves."""

    def __init__(self, refer: Refer, unnamed: Callable[[object], object] | None) -> None:
        self._refer = refer
        self._unnamed = unnamed
        self._inside: dict[int, int] = {}

    def encode(self, value: object, path: str) -> bytes:
        plain = encode_plain(value)
        if plain is not None:
            return plain
        if id(value) in self._inside:
            return f"cycle {self._inside[id(value)]}".encode()
        self._inside[id(value)] = len(self._inside)
        try:
            return self._encode_composite(value, path)
        finally:
            del self._inside[id(value)]

    def _encode_composite(self, value: object, path: str) -> bytes:
        name = _type_name(type(value))
        if isinstance(value, torch.nn.Module):
            return digest_parts([b"module", name, self._refer(value)])
        if isinstance(value, torch.Tensor):
            return digest_parts([b"tensor", name, self._refer(value)])
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return self._items(b"objects", value.ravel().tolist(), path)
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            return digest_parts(
                [b"array", str(array.dtype).encode(), str(array.shape).encode(), digest_bytes(array.tobytes())]
            )
        if isinstance(value, (tuple, list, deque)):
            return self._items(name, list(value), path)
        if isinstance(value, (set, frozenset)):
            return digest_parts([name, *sorted(self.encode(item, f"{path}{{}}") for item in value)])
        if isinstance(value, Mapping):
            return self._pairs(name, value, path)
        if isinstance(value, (bytearray, memoryview)):
            return b"bytearray " + bytes(value)
        if isinstance(value, functools.partial):
            return self._items(b"partial", (value.func, value.args, value.keywords), path)
        if isinstance(value, types.MethodType):
            return self._items(b"method", (value.__func__, value.__self__), path)
        if isinstance(value, types.FunctionType):
            return self._function(value, path)
        if isinstance(value, (type, types.BuiltinFunctionType, np.ufunc, types.ModuleType)):
            return digest_parts([b"named", _type_name(value) if isinstance(value, type) else _own_name(value)])
        if dataclasses.is_dataclass(value):
            pairs = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return self._pairs(name, pairs, path)
        if isinstance(value, pathlib.PurePath):
            return b"path " + str(value).encode()
        if isinstance(value, (date, datetime, time, timedelta, range, re.Pattern, np.dtype)):
            return name + b" " + repr(value).encode()
        for base in _PLAIN_BASES:
            if isinstance(value, base):
                return digest_parts([name, encode_plain(base(value)) or b""])
        if self._unnamed is not None and (attributes := self._unnamed(value)) is not None:
            return digest_parts([b"object", name, self.encode(attributes, path)])
        if type(value).__repr__ is object.__repr__ or " at 0x" in (shown := repr(value)):
            if self._unnamed is None:
                raise UnnamedValueError(path, value)
            return digest_parts([b"object", name])
        return digest_parts([b"repr", name, shown.encode()])

    def _items(self, name: bytes, values: tuple[Any, ...] | list[Any], path: str) -> bytes:
        return digest_parts([name, *(self.encode(item, f"{path}[{i}]") for i, item in enumerate(values))])

    def _pairs(self, name: bytes, pairs: Mapping[Any, Any], path: str) -> bytes:
        encoded = [(self.encode(k, f"{path} key"), self.encode(v, f"{path}[{k!r}]")) for k, v in pairs.items()]
        return digest_parts([name, *(part for pair in sorted(encoded) for part in pair)])

    def _function(self, function: types.FunctionType, path: str) -> bytes:
        function = unwrap(function)  # type: ignore[assignment]
        parts = [b"function", _code_of(function)]
        parts += [self.encode(default, f"{path} default") for default in function.__defaults__ or ()]
        for name, default in sorted((function.__kwdefaults__ or {}).items()):
            parts += [name.encode(), self.encode(default, f"{path} default {name}")]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                parts.append(self.encode(cell.cell_contents, f"{path} closure {name}"))
            except ValueError:
                parts.append(b"empty")
        return digest_parts(parts)


@lru_cache(maxsize=4096)
def _code_of(function: Callable[..., object]) -> bytes:
    """Return the fingerprint of a function with the helpers it calls."""
    return walk_code(function).fingerprint


def encode_tensor(tensor: torch.Tensor) -> bytes:
    """Return dtype, shape and content digest of a tensor on any device, as bytes.

    Content is read in pieces of 64 MiB, so that a large tensor of an accelerator is never held on
    the host as a whole. Tensors without bytes of their own (meta, sparse, quantized, subclasses)
    count by their type and shape.
    """
    head = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode()
    view = byte_view(tensor)
    if view is None:
        return digest_parts([b"opaque", type(tensor).__qualname__.encode(), head])
    piece = 1 << 26
    parts = [digest_bytes(memoryview(view[i : i + piece].cpu().numpy().data)) for i in range(0, view.numel(), piece)]
    return digest_parts([head, *parts])


def byte_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor's values as a flat uint8 tensor on its device; None if it has no plain bytes."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return None
    plain = tensor.detach().resolve_conj().resolve_neg()
    try:
        if not plain.numel():
            return plain.new_empty(0, dtype=torch.uint8)
        return plain.reshape(-1).contiguous().view(torch.uint8)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _architecture(module: torch.nn.Module) -> bytes:
    """Say what a module is but not its weights: they count wherever the module is used."""
    parts = [repr(module).encode() if " at 0x" not in repr(module) else b""]
    for name, child in module.named_modules():
        parts += [name.encode(), _type_name(type(child))]
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return digest_parts(parts)


def _type_name(kind: type) -> bytes:
    """Name a type; a script's module is ``__main__`` here and ``__mp_main__`` in a spawned worker."""
    module = "" if kind.__module__ in ("__main__", "__mp_main__") else kind.__module__
    return f"{module}.{kind.__qualname__}".encode()


def _own_name(value: object) -> bytes:
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{getattr(value, '__module__', '')}.{name}".encode()
