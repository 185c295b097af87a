"""Functions and whatever else is code, by what it is made of or by its name."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np

from torchcache.keys.canonical import fingerprint_code
from torchcache.keys.digest import digest_parts
from torchcache.keys.encoders.objects import attributes, named, own_name
from torchcache.keys.encoding import Encoding
from torchcache.keys.inside import is_bound_to_object
from torchcache.keys.origins import is_own_module
from torchcache.keys.ours import StandIn, unwrap
from torchcache.keys.plain import type_name

#: At most this many callbacks of torch.compile lie in each other.
_MOST_CALLBACKS = 8


def function(encoding: Encoding, value: types.FunctionType, path: str) -> bytes:
    """Encode a function by its code, its defaults and what its closure holds."""
    unwrapped = unwrap(value)
    if not isinstance(unwrapped, types.FunctionType):
        return encoding.encode(unwrapped, path)
    compiled = vars(unwrapped).get("_torchdynamo_orig_callable")
    if compiled is not None:
        return _compiled(encoding, unwrapped, compiled, path)

    encoding.observer.note_code(unwrapped)
    parts = [b"function", encoding.observer.code_of(unwrapped)]
    parts += [encoding.encode(default, f"{path} default") for default in unwrapped.__defaults__ or ()]
    for name, default in sorted((unwrapped.__kwdefaults__ or {}).items()):
        parts += [name.encode(), encoding.encode(default, f"{path} default {name}")]
    for name, cell in _closure_of(unwrapped):
        try:
            parts.append(encoding.encode(cell.cell_contents, f"{path} closure {name}"))
        except ValueError:
            parts.append(b"empty")
    return digest_parts(parts)


def _closure_of(function: types.FunctionType) -> list[tuple[str, types.CellType]]:
    return list(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))


def _compiled(encoding: Encoding, wrapper: types.FunctionType, compiled: object, path: str) -> bytes:
    """Encode what torch.compile made of a function; the wrapper's closure notes what was compiled so far."""
    closure = dict(_closure_of(wrapper))
    callback = closure["callback"].cell_contents if "callback" in closure else None
    return digest_parts([b"compiled", encode_compiler(callback), encoding.encode(compiled, path)])


def encode_compiler(callback: object) -> bytes:
    """Return the name and the options of the back end that a callback of torch.compile leads to."""
    for _ in range(_MOST_CALLBACKS):
        callback = getattr(callback, "_torchdynamo_orig_backend", callback)
    name = getattr(callback, "compiler_name", None)
    if not isinstance(name, str) or not name.isidentifier():  # an object's address
        name = type(callback).__qualname__

    parts = [b"compiler", name.encode()]
    for key in ("config", "kwargs", "dynamic"):
        shown = repr(getattr(callback, key, None))
        if " at 0x" not in shown:
            parts.append(f"{key} {shown}".encode())
    return digest_parts(parts)


def stand_in(encoding: Encoding, value: StandIn, path: str) -> bytes:
    """Encode the function or bound method that something of ours stands for."""
    return encoding.encode(unwrap(value), path)


def method(encoding: Encoding, value: types.MethodType, path: str) -> bytes:
    """Encode a bound method by its function and its object."""
    return encoding.items(b"method", [value.__func__, value.__self__], path)


def built_in(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - a function or method of C
    """Encode a function of C by its name, and one that belongs to an object by that as well."""
    encoding.observer.note_code(value)
    name = digest_parts([b"named", own_name(value)])
    if not is_bound_to_object(value):
        return name
    return digest_parts([name, encoding.encode(value.__self__, f"{path}.__self__")])


def python_module(encoding: Encoding, value: types.ModuleType, path: str) -> bytes:
    """Encode a module of Python by its name, and an own one that is not imported under it by what it holds."""
    imported = sys.modules.get(value.__name__)
    # A library may put another module in the place of its own, as transformers does.
    if imported is value or (imported is not None and not is_own_module(value.__name__)):
        return named(encoding, value, path)
    names = [name for name in vars(value) if not name.startswith("__")]
    if not encoding.is_content:
        encoding.observer.note_attributes(value, names)
    held = [(name, vars(value)[name]) for name in names]
    return encoding.pairs(b"module", held, path, is_order_kept=False)


def universal(encoding: Encoding, value: np.ufunc, path: str) -> bytes:
    """Encode a ufunc by its name if a library has it there; ``np.frompyfunc`` makes others."""
    name = value.__name__
    homes = [sys.modules.get(home) for home in ("numpy", "scipy.special")]
    if any(getattr(home, name, None) is value for home in homes):
        return digest_parts([b"named", name.encode()])
    return encoding.opaque(value, path)


def operator(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401, ARG001 - an operator of torch.ops
    """Encode an operator by its name; what runs behind it is code."""
    encoding.observer.note_code(value)
    return digest_parts([b"operator", str(value).encode()])


def partial(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - a partial function or method
    """Encode a partial function by its parts, and by what somebody hung on it."""
    encoding.observer.note_code(value.func)
    parts = encoding.items(b"partial", [value.func, value.args, value.keywords], path)
    if not vars(value):
        return parts
    return digest_parts([parts, attributes(encoding, value, path)])


def wrapped(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - a static or class method
    """Encode a static or class method by its kind and its function."""
    return digest_parts([type_name(type(value)), encoding.encode(value.__func__, path)])


def descriptor(encoding: Encoding, value: property, path: str) -> bytes:
    """Encode a property by its functions."""
    return encoding.items(b"property", [value.fget, value.fset, value.fdel], path)


def code(encoding: Encoding, value: types.CodeType, path: str) -> bytes:  # noqa: ARG001 - as of any way
    """Encode a code object by what it does."""
    return digest_parts([b"code", fingerprint_code(value)])


def script(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401, ARG001 - a scripted function
    """Encode a scripted function by its code."""
    return digest_parts([b"script", str(value.code).encode()])
