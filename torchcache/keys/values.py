"""Python values to bytes that say what they are: arguments of a call, of a constructor, plain state.

Two values have the same bytes exactly if they are the same by type and by value (1, True, 1.0 and "1"
differ, and so do 0.0 and -0.0). The bytes do not depend on the process, on addresses or on the hash
seed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import logging
import pathlib
import random
import re
import socket
import struct
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from datetime import date, datetime, time, timedelta
from typing import Any, cast

import numpy as np
import torch

from torchcache.keys.code import StandIn, fingerprint_code, unwrap, walk_code
from torchcache.keys.digest import digest_bytes, digest_parts
from torchcache.keys.tensor_digest import digest_tensor

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

    Plain are int, float, complex, str, bool, None, bytes, enum members, NumPy scalars, torch dtypes, devices,
    layouts and memory formats, slices, Ellipsis, paths, and tuples (named ones too) of these.
    """
    kind = type(value)
    if isinstance(value, int) and kind is int:
        return f"int {value:x}".encode()  # in decimal, Python refuses long ones
    if kind is bool or value is None or value is ...:
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
        return digest_parts([b"enum", type_name(kind), str(value.name).encode(), encode_plain(value.value) or b""])
    if isinstance(value, _PLAIN_TORCH):
        return f"{kind.__name__} {value}".encode()
    if isinstance(value, slice):
        parts = [encode_plain(part) for part in (value.start, value.stop, value.step)]
        return None if None in parts else digest_parts([b"slice", *parts])  # type: ignore[list-item]
    if isinstance(value, tuple):
        items = [encode_plain(item) for item in value]
        return None if None in items else digest_parts([b"tuple", type_name(kind), *items])  # type: ignore[list-item]
    if isinstance(value, pathlib.PurePath):
        return b"path " + str(value).encode("utf-8", "surrogateescape")
    if isinstance(value, np.generic) and not isinstance(value, (np.void, np.object_)):
        return digest_parts([b"numpy", str(value.dtype).encode(), value.tobytes()])
    return None


Refer = Callable[[torch.nn.Module | torch.Tensor], bytes]
#: Told of each function and each class of an object that a value holds: code that may run.
OnCode = Callable[[object], None]
#: Told where something without a stable name lies, and of what type it is.
OnUnnamed = Callable[[str, str], None]


def encode_argument(value: object, path: str) -> bytes:
    """Return the bytes of a construction argument.

    Args:
        value: Plain values, containers, tensors and arrays (all bytes), functions (their code),
            classes, dataclasses, enums, paths, partials; a module counts by its class and the shapes of
            its tensors (its weights count wherever it is used); an object with a ``__repr__`` of its
            own counts by its type, that, and the attributes that can be named.
        path: What to call the value in an error.

    Raises:
        UnnamedValueError: If the value, or one inside it, is known by its address only.
    """
    return _ArgumentEncoder().encode(value, path)


def encode_state(
    value: object,
    path: str,
    refer: Refer,
    on_code: OnCode | None = None,
    on_unnamed: OnUnnamed | None = None,
    *,
    owner: object = None,
) -> bytes:
    """Return the bytes of a plain attribute, a global or a closure variable.

    As ``encode_argument``, but objects count by their attributes, those without any by what pickle would
    keep of them, and the order of a dict counts: code may go through it in order.

    Args:
        value: The value.
        path: What to call it.
        refer: What to say of a module or a tensor found in it.
        on_code: Called with each function found in it, and with the class of each object.
        on_unnamed: Called with path and type of whatever has no stable name; it counts by its type then.
        owner: The object whose attribute it is; found in it, it counts by its place and not once more by value.
    """
    encoder = _StateEncoder(refer, on_code or _ignore, on_unnamed or _ignore)
    return encoder.encode_inside(owner, value, path)


#: Asked about each attribute, with the class of its object: whether it shapes nothing.
LeavesOut = Callable[[type, str, object], bool]


def encode_whole(value: object, path: str, on_code: OnCode, on_unnamed: OnUnnamed, leaves_out: LeavesOut) -> bytes:
    """Return the bytes of an object that is looked at once: all that it holds, by value, however large.

    As ``encode_state``, but modules and tensors count by all they hold too, an object with a ``__getstate__`` of its
    own by what that returns, and what is open (files, sockets) has no stable name.

    Args:
        value: The value.
        path: What to call it.
        on_code: Called with each function found in it, and with the class of each object.
        on_unnamed: Called with path and type of whatever has no stable name; it counts by its type then.
        leaves_out: Tells which attributes do not count.
    """
    return _WholeEncoder(on_code, on_unnamed, leaves_out).encode(value, path)


def _ignore(*_: object) -> None:
    """Tell nobody."""


class _Encoder:
    """One encoding; the same value is encoded once, and one that contains itself comes to an end."""

    is_order_kept = False  # of dicts
    most_values = 100_000  # what lies beyond this bound has no name

    def __init__(self, refer: Refer, on_code: OnCode) -> None:
        self.refer = refer
        self.on_code = on_code
        self._inside: dict[int, int] = {}
        self._done: dict[int, bytes] = {}
        self._kept: list[object] = []  # ids stay unique while the objects live

    def encode(self, value: object, path: str) -> bytes:
        if isinstance(value, enum.Enum):
            self.on_code(type(value))
        plain = encode_plain(value)
        if plain is not None:
            return plain
        number = id(value)
        if number in self._inside:
            return f"cycle {self._inside[number]}".encode()
        known = self._done.get(number)
        if known is not None:
            return known
        if len(self._done) >= self.most_values or len(self._inside) >= _DEEPEST:
            return self.unnamed(value, path)
        self._inside[number] = len(self._inside)
        try:
            encoded = self._encode_composite(value, path)
        finally:
            del self._inside[number]
        self._done[number] = encoded
        self._kept.append(value)
        return encoded

    def encode_inside(self, owner: object, value: object, path: str) -> bytes:
        """Encode what lies in ``owner``, which is a cycle where it is found again."""
        if owner is not None:
            self._inside[id(owner)] = 0
        return self.encode(value, path)

    # -- what the two kinds of encoding do differently

    def encode_object(self, value: object, path: str) -> bytes:
        """Encode an object of a class that has no entry here."""
        raise NotImplementedError

    def unnamed(self, value: object, path: str) -> bytes:
        """Encode what has no stable name."""
        raise NotImplementedError

    def code_of(self, function: types.FunctionType) -> bytes:
        """Encode a function's code."""
        raise NotImplementedError

    def extend(self, encoded: bytes, value: object, path: str) -> bytes:  # noqa: ARG002 - one of two kinds uses it
        """Add to a container what its class adds to the built-in one."""
        return encoded

    # -- what they share

    def _encode_composite(self, value: object, path: str) -> bytes:
        if isinstance(value, StandIn):
            return self.encode(unwrap(value), path)
        name = type_name(type(value))
        if isinstance(value, torch.nn.Module):
            return digest_parts([b"module", name, self.refer(value)])
        if isinstance(value, torch.Tensor):
            return digest_parts([b"tensor", name, self.refer(value)])
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return self._items(b"objects", [value.shape, *value.ravel().tolist()], path)
        if isinstance(value, (np.ndarray, np.generic)):
            return encode_array(np.asarray(value))
        if isinstance(value, (tuple, list, deque)):
            return self.extend(self._items(name, list(value), path), value, path)
        if isinstance(value, (set, frozenset)):
            items = sorted(self.encode(item, f"{path}{{}}") for item in value)
            return self.extend(digest_parts([name, *items]), value, path)
        if isinstance(value, Mapping):
            return self.extend(self._pairs(name, value, path), value, path)
        if isinstance(value, (bytearray, memoryview)):
            return b"bytearray " + bytes(value)
        if isinstance(value, (functools.partial, functools.partialmethod)):
            self.on_code(value.func)
            return self._items(b"partial", [value.func, value.args, value.keywords], path)
        if isinstance(value, types.MethodType):
            return self._items(b"method", [value.__func__, value.__self__], path)
        if isinstance(value, types.FunctionType):
            return self._function(value, path)
        if isinstance(value, (staticmethod, classmethod)):
            return digest_parts([name, self.encode(value.__func__, path)])
        if isinstance(value, _NAMED):
            self.on_code(value)
            return digest_parts([b"named", type_name(value) if isinstance(value, type) else _own_name(value)])
        if isinstance(value, GENERATORS):
            return digest_parts([name, self.encode(_generator_state(value), path)])
        if dataclasses.is_dataclass(value):
            self.on_code(type(value))
            # Also those that are no fields, which __post_init__ may have set.
            return self._pairs(name, attributes_of(value) or {}, path)
        if isinstance(value, (date, datetime, time, timedelta, range, re.Pattern, np.dtype)):
            return name + b" " + repr(value).encode()
        for base in _PLAIN_BASES:
            if isinstance(value, base):
                self.on_code(type(value))
                return digest_parts([name, encode_plain(base(value)) or b""])
        if isinstance(value, threading.Event):
            return digest_parts([name, self.encode(value.is_set(), path)])
        if isinstance(value, ContextVar):
            return digest_parts([name, value.name.encode(), self.encode(value.get(None), path)])
        if isinstance(value, weakref.ref):
            return digest_parts([b"weak", self.encode(value(), path)])
        if isinstance(value, _PROCESS_GROUP):
            self.on_code(type(value))  # what is asked of it shows in the code
        if isinstance(value, _WITHOUT_VALUE):
            return digest_parts([b"object", name])
        return self.encode_object(value, path)

    def _items(self, name: bytes, values: Sequence[Any], path: str) -> bytes:
        return digest_parts([name, *(self.encode(item, f"{path}[{i}]") for i, item in enumerate(values))])

    def _pairs(self, name: bytes, pairs: Mapping[Any, Any], path: str) -> bytes:
        encoded = [(self.encode(k, f"{path} key"), self.encode(v, f"{path}[{k!r}]")) for k, v in pairs.items()]
        if not self.is_order_kept:
            encoded.sort()
        return digest_parts([name, *(part for pair in encoded for part in pair)])

    def _function(self, function: types.FunctionType, path: str) -> bytes:
        function = unwrap(function)  # type: ignore[assignment]
        compiled = vars(function).get("_torchdynamo_orig_callable")
        if compiled is not None:  # the wrapper's closure notes what was compiled so far
            closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
            callback = closure["callback"].cell_contents if "callback" in closure else None
            return digest_parts([b"compiled", encode_compiler(callback), self.encode(compiled, path)])
        self.on_code(function)
        parts = [b"function", self.code_of(function)]
        parts += [self.encode(default, f"{path} default") for default in function.__defaults__ or ()]
        for name, default in sorted((function.__kwdefaults__ or {}).items()):
            parts += [name.encode(), self.encode(default, f"{path} default {name}")]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                parts.append(self.encode(cell.cell_contents, f"{path} closure {name}"))
            except ValueError:
                parts.append(b"empty")
        return digest_parts(parts)


def _by_value(value: torch.nn.Module | torch.Tensor) -> bytes:
    return encode_tensor(value) if isinstance(value, torch.Tensor) else _architecture(value)


class _ArgumentEncoder(_Encoder):
    def __init__(self) -> None:
        super().__init__(_by_value, _ignore)

    def encode_object(self, value: object, path: str) -> bytes:
        shown = _own_repr(value)
        if shown is None:
            return self.unnamed(value, path)
        # A repr may leave out what tells two objects apart.
        attributes = encode_state(attributes_of(value) or {}, path, self.refer)
        return digest_parts([b"repr", type_name(type(value)), shown.encode("utf-8", "backslashreplace"), attributes])

    def code_of(self, function: types.FunctionType) -> bytes:
        return walk_code(function).fingerprint  # with the helpers it calls

    def unnamed(self, value: object, path: str) -> bytes:
        raise UnnamedValueError(path, value)


class _StateEncoder(_Encoder):
    is_order_kept = True

    def __init__(self, refer: Refer, on_code: OnCode, on_unnamed: OnUnnamed) -> None:
        super().__init__(refer, on_code)
        self._on_unnamed = on_unnamed

    def code_of(self, function: types.FunctionType) -> bytes:
        return fingerprint_code(function.__code__)  # its helpers are walked for those who ask on_code

    def extend(self, encoded: bytes, value: object, path: str) -> bytes:
        if type(value) in _BUILT_IN_CONTAINERS:
            return encoded
        self.on_code(type(value))
        return self._attributes(encoded, attributes_of(value) or {}, path)

    def encode_object(self, value: object, path: str) -> bytes:
        name = type_name(type(value))
        self.on_code(type(value))
        attributes = attributes_of(value)
        return self._reduced(value, path) if attributes is None else self._attributes(name, attributes, path)

    def _reduced(self, value: object, path: str) -> bytes:
        """Encode an object by what pickle would keep of it."""
        name = type_name(type(value))
        if isinstance(value, torch.jit.ScriptFunction):
            return digest_parts([b"script", str(value.code).encode()])
        try:
            reduced = value.__reduce_ex__(2)
        except Exception:  # noqa: BLE001 - a foreign __reduce__ may raise anything: then there is no name
            return self.unnamed(value, path)
        if isinstance(reduced, str):
            return digest_parts([b"global", name, reduced.encode()])
        function, *rest = reduced
        parts = [list(part) if isinstance(part, Iterator) else part for part in rest]
        return digest_parts([b"reduced", name, _own_name(function), self._items(b"parts", parts, path)])

    def unnamed(self, value: object, path: str) -> bytes:
        name = type_name(type(value))
        shown = None if hasattr(value, "__dict__") else _own_repr(value)
        if shown is not None:
            return digest_parts([b"repr", name, shown.encode("utf-8", "backslashreplace")])
        self._on_unnamed(path, type(value).__qualname__)
        return digest_parts([b"object", name])

    def _attributes(self, head: bytes, attributes: Mapping[str, object], path: str) -> bytes:
        pairs = [(k.encode(), self.encode(v, f"{path}.{k}")) for k, v in sorted(attributes.items())]
        return digest_parts([b"object", head, *(part for pair in pairs for part in pair)])


class _WholeEncoder(_StateEncoder):
    most_values = 10_000_000  # a list of samples may hold a dict for each

    def __init__(self, on_code: OnCode, on_unnamed: OnUnnamed, leaves_out: LeavesOut) -> None:
        super().__init__(_by_value, on_code, on_unnamed)  # modules and tensors do not get that far
        self._leaves_out = leaves_out
        self._ways: dict[type, Callable[[object], object]] = {}

    def _encode_composite(self, value: object, path: str) -> bytes:
        if isinstance(value, torch.Tensor):
            content = encode_content(value)
            if content is None:
                return self.unnamed(value, path)
            notes = self.encode(vars(value), path) if getattr(value, "__dict__", None) else b""
            return digest_parts([b"tensor", type_name(type(value)), content, notes])
        if isinstance(value, _OPEN):
            return self.unnamed(value, path)
        if isinstance(value, type) or not (
            isinstance(value, torch.nn.Module) or dataclasses.is_dataclass(value) or _is_mapping_of_its_own(value)
        ):
            return super()._encode_composite(value, path)
        return self.encode_object(value, path)

    def encode_object(self, value: object, path: str) -> bytes:
        kind = type(value)
        self.on_code(kind)
        if kind not in self._ways:  # asking the class costs more than the rest, and a list may hold many of one
            self._ways[kind] = _way_to_state(kind)
        state = self._ways[kind](value)
        if state is None:
            return self._reduced(value, path)
        if not isinstance(state, dict) or not all(type(key) is str for key in state):
            return digest_parts([b"object", type_name(kind), self.encode(state, path)])
        kept = {key: item for key, item in state.items() if not self._leaves_out(kind, key, item)}
        return self._attributes(type_name(kind), kept, path)

    def _items(self, name: bytes, values: Sequence[Any], path: str) -> bytes:
        # Most items of a long list are plain, and saying where they lie would cost more than they do.
        return digest_parts([name, *(
            encode_plain(item) or self.encode(item, f"{path}[{i}]")
            if type(item) in _FREQUENT else self.encode(item, f"{path}[{i}]")
            for i, item in enumerate(values)
        )])  # fmt: skip


def _way_to_state(kind: type) -> Callable[[object], object]:
    """Return what gives the state of objects of a class: by its own ``__getstate__``, else all their attributes.

    It gives None for an object that holds more than attributes.
    """
    attributes: Callable[[object], object] = _no_state
    if has_attributes_only(kind):
        attributes = attributes_of if slots_of(kind) or not kind.__dictoffset__ else vars
    own: Callable[[object], object] | None = getattr(kind, "__getstate__", None)
    if own is None or own is getattr(object, "__getstate__", None):
        return attributes

    def state(value: object) -> object:
        try:
            return own(value)
        except Exception:  # noqa: BLE001 - a foreign one may raise anything: then the attributes say it
            return attributes(value)

    return state


def _no_state(_: object) -> None:
    """Say that an object holds more than attributes."""


def _is_mapping_of_its_own(value: object) -> bool:
    """Tell whether a mapping makes its items when it is asked for them, as a data set may."""
    return isinstance(value, Mapping) and not isinstance(value, dict) and attributes_of(value) is not None


def encode_tensor(tensor: torch.Tensor) -> bytes:
    """Return dtype, shape and content digest of a tensor on any device, as bytes.

    Tensors without bytes of their own (meta, sparse, quantized, subclasses) count by their type and shape.
    """
    return encode_content(tensor) or digest_parts([b"opaque", type_name(type(tensor)), _form(tensor)])


def encode_compiler(callback: object) -> bytes:
    """Return the name and the options of the back end that a callback of torch.compile leads to."""
    for _ in range(_MOST_CALLBACKS):
        callback = getattr(callback, "_torchdynamo_orig_backend", callback)
    name = getattr(callback, "compiler_name", None)
    if not isinstance(name, str) or not name.isidentifier():  # an object's address
        name = type(callback).__qualname__
    options = {key: getattr(callback, key, None) for key in ("config", "kwargs", "dynamic")}
    plain = {key: shown for key, value in options.items() if " at 0x" not in (shown := repr(value))}
    return digest_parts([b"compiler", name.encode(), *(f"{key} {shown}".encode() for key, shown in plain.items())])


#: Callbacks of torch.compile lie in each other so deep.
_MOST_CALLBACKS = 8


def encode_content(tensor: torch.Tensor) -> bytes | None:
    """Return what ``encode_tensor`` does; None for a tensor without bytes of its own."""
    content = digest_tensor(tensor)
    return None if content is None else digest_parts([_form(tensor), content])


def _form(tensor: torch.Tensor) -> bytes:
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode()


def _architecture(module: torch.nn.Module) -> bytes:
    """Say what a module is but not its weights: they count wherever the module is used."""
    parts = [repr(module).encode() if " at 0x" not in repr(module) else b""]
    for name, child in module.named_modules():
        parts += [name.encode(), type_name(type(child))]
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return digest_parts(parts)


def type_name(kind: type | types.FunctionType) -> bytes:
    """Name a type or a function; a script's module is ``__main__`` here and ``__mp_main__`` in a spawned worker."""
    module = "" if kind.__module__ in ("__main__", "__mp_main__") else kind.__module__
    return f"{module}.{kind.__qualname__}".encode()


def attributes_of(value: object) -> dict[str, Any] | None:
    """Return the attributes in an object's ``__dict__`` and slots; None if its class provides for none."""
    attributes = getattr(value, "__dict__", None)
    slots = slots_of(type(value))
    if not slots:
        return attributes if isinstance(attributes, dict) else None
    present = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**present, **attributes} if isinstance(attributes, dict) else present


def slots_of(cls: type) -> list[str]:
    """Return the names of the slots of a class and its bases, whether they are set or not."""
    return [name for base in cls.__mro__ for name, slot in vars(base).items() if isinstance(slot, _SLOT)]


def has_attributes_only(cls: type) -> bool:
    """Tell whether all that instances of a class hold are attributes, by the room that they take.

    A class of C has room for more, and so have those derived from it: of dict, a tensor or a tokenizer.
    """
    pointers = len(slots_of(cls)) + (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return not cls.__itemsize__ and cls.__basicsize__ == object.__basicsize__ + pointers * _POINTER_BYTES


_SLOT = types.MemberDescriptorType
_POINTER_BYTES = struct.calcsize("P")


def _own_repr(value: object) -> str | None:
    """Return what an object's own ``__repr__`` says of it; None if it has none or shows an address."""
    if type(value).__repr__ is object.__repr__:
        return None
    shown = repr(value)
    return None if " at 0x" in shown else shown


def encode_array(array: np.ndarray[Any, Any]) -> bytes:
    """Return the bytes of an array that holds no objects."""
    content = digest_bytes(_bytes_of(array))
    return digest_parts([b"array", str(array.dtype).encode(), str(array.shape).encode(), content])


def _bytes_of(array: np.ndarray[Any, Any]) -> bytes | memoryview:
    """Return the bytes of an array in C order, without a copy where they lie so already."""
    if not array.nbytes:
        return b""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _generator_state(value: object) -> object:
    """Return the state of a random number generator as plain data."""
    if isinstance(value, torch.Generator):
        return str(value.device), value.get_state().numpy()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.BitGenerator):
        return value.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    return None if isinstance(value, random.SystemRandom) else cast("random.Random", value).getstate()


def _own_name(value: object) -> bytes:
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{getattr(value, '__module__', '')}.{name}".encode()


#: What lies deeper in an encoding has no name.
_DEEPEST = 100

_BUILT_IN_CONTAINERS = frozenset({tuple, list, deque, set, frozenset, dict, OrderedDict, defaultdict})

#: What is known by its name alone.
_NAMED = (
    type, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.ModuleType,
    np.ufunc,
)  # fmt: skip

#: Random number generators count by their state, so one that moves at every call is noticed.
GENERATORS = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)

#: What is open says nothing of what is read through it.
_OPEN = (io.IOBase, socket.socket)

#: The types of plain values that long lists are made of.
_FREQUENT = frozenset({str, int, float, tuple})

_PROCESS_GROUP = (torch.distributed.ProcessGroup,) if torch.distributed.is_available() else ()

#: What coordinates, logs or talks to the outside: it counts by its type, whatever state it is in.
_WITHOUT_VALUE: tuple[type[Any], ...] = (
    type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore,
    threading.Barrier, threading.Thread, threading.local, Executor, Future, logging.Logger, logging.LoggerAdapter,
    logging.Handler, io.IOBase, socket.socket, types.FrameType, types.TracebackType, torch.Stream, torch.Event,
    *_PROCESS_GROUP,
)  # fmt: skip
