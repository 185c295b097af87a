"""Python values to bytes that say what they are: arguments of a call, of a constructor, plain state, datasets.

One rule says what a value is, whoever asks and wherever it lies (``way_of``):

1. plain values, and containers of known types: by value;
2. tensors and arrays of exactly the known types: by bytes, dtype and shape;
3. random number generators: see ``encoders/tensors.py``;
4. objects of registered classes (``registry.py``): by what their registration says;
5. objects of classes derived from these that add attributes only: by both;
6. objects that hold attributes only: by these;
7. all others: by what pickle would keep, where that is made of such values and the same twice in a row;
8. what is left has no value that can be seen: it is *opaque*.

An ``Observer`` is told what an encoding came upon, so that whoever encodes state can watch exactly what counts.
"""

from __future__ import annotations

import enum
import functools
import inspect
import io
import random
import socket
import types
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import torch

import torchcache.keys.registered  # noqa: F401 - what it registers is found from here
from torchcache.keys.attributes import adds_attributes_only
from torchcache.keys.code import walk_code
from torchcache.keys.encoders import containers, functions, objects, tensors
from torchcache.keys.encoding import Encoding, Way
from torchcache.keys.generators import GENERATORS
from torchcache.keys.observer import Observer
from torchcache.keys.ours import StandIn
from torchcache.keys.places import Name
from torchcache.keys.registry import count_registered, find_registration
from torchcache.keys.time_limit import TakesTooLongError


class UnnamedValueError(Exception):
    """A value cannot be seen; ``path`` says where it lies inside what was encoded."""

    def __init__(self, path: str, type_name: str) -> None:
        super().__init__(path)
        self.path = path
        self.type_name = type_name


class _ArgumentObserver(Observer):
    is_order_kept = False

    def code_of(self, function: types.FunctionType) -> bytes:
        try:
            return walk_code(function).fingerprint  # with the helpers it calls
        except TakesTooLongError:
            raise UnnamedValueError(function.__qualname__, "function of too much code") from None

    def note_opaque(self, path: str, value: object) -> None:
        raise UnnamedValueError(path, type(value).__qualname__)


def encode_argument(value: object, path: str) -> bytes:
    """Return the bytes of a construction argument.

    Args:
        value: Anything; a module counts by its class and the shapes of its tensors, since its weights count wherever
            it is used.
        path: What to call the value in an error.

    Raises:
        UnnamedValueError: If the value, or one inside it, has no value that can be seen.
    """
    return Encoding(_ArgumentObserver(), way_of).encode(value, path)


def encode_value(value: object, path: str, observer: Observer, *, owner: object = None) -> bytes:
    """Return the bytes of a value, and tell ``observer`` what was come upon.

    Args:
        value: The value.
        path: What to call it.
        observer: Decides what modules and tensors are, and what is left out.
        owner: The object whose attribute it is; found in it, it counts by its place and not once more by value.
    """
    encoding = Encoding(observer, way_of)
    if owner is not None:
        encoding.enter(owner)
    try:
        return encoding.encode(value, path)
    except RecursionError:
        observer.note_opaque(path, value)
        return b"too deep"


def encode_name(name: Name, encode: Callable[[object], bytes], opaque: list[tuple[str, str]]) -> bytes:
    """Return the bytes of the present value of a variable that code reads.

    Where it is not known whether any code reads it, it counts only if all of it can be seen.

    Args:
        name: The variable.
        encode: Encodes its value, and adds to ``opaque`` what cannot be seen.
        opaque: Where something lies that cannot be seen, and of what type.
    """
    n_opaque = len(opaque)
    encoded = encode(name.read())
    if name.counts_always and len(opaque) > n_opaque:  # perhaps nobody reads it
        del opaque[n_opaque:]
        return b"not seen"
    return encoded


# -- which way ---------------------------------------------------------------------------------------------------------

#: The ways found for classes that no table has, each with how many registrations there were then.
_ways: WeakKeyDictionary[type, tuple[int, Way]] = WeakKeyDictionary()


def way_of(kind: type) -> Way:
    """Return how objects of a class are encoded: the one rule of this module."""
    exact = _EXACT.get(kind)
    if exact is not None:
        return exact
    known = _ways.get(kind)
    n_registered = count_registered()
    if known is not None and known[0] == n_registered:
        return known[1]
    way = _find_way(kind)
    _ways[kind] = n_registered, way
    return way


def _find_way(kind: type) -> Way:
    for rule in (_way_by_base, _way_by_registration, _way_by_derivation, _way_of_outside):
        way = rule(kind)
        if way is not None:
            return way
    if adds_attributes_only(kind):
        return objects.by_state(kind, objects.attributes)
    if inspect.getattr_static(kind, "__reduce__") is not vars(object)["__reduce__"]:
        return objects.reduced  # a class of C may keep more than the state that it tells, such as a calendar
    return objects.by_state(kind, objects.reduced)


def _way_by_base(kind: type) -> Way | None:
    """Return the way of what is told apart by its class, or one that it is derived from."""
    if kind.__module__ == "torch._ops" and kind.__name__ in _OPERATORS:
        return functions.operator
    for kinds, way in _KINDS:
        if issubclass(kind, kinds):
            return way
    return None


def _way_by_registration(kind: type) -> Way | None:
    """Return the way of a class that is registered, or derived from one that is."""
    found = find_registration(kind)
    if found is None:
        return None
    base, registration = found
    way = objects.told_by(registration)
    if kind is base or registration.stands_for_subclasses:
        return way
    return objects.with_attributes(way) if adds_attributes_only(kind, base) else objects.reduced


def _way_by_derivation(kind: type) -> Way | None:
    """Return the way of a class that adds attributes to a known one."""
    for base in kind.__mro__:
        if base in _BASES:
            break
    else:
        return None
    if not adds_attributes_only(kind, base):
        return None
    return objects.by_state(kind, objects.with_attributes(_BASES[base]))


def _way_of_outside(kind: type) -> Way | None:
    """Return the way of what coordinates, or leads to files, sockets and code that is under way."""
    if issubclass(kind, objects.WITHOUT_VALUE):
        return objects.coordination
    if issubclass(kind, io.IOBase):
        return objects.stream
    return objects.opaque if issubclass(kind, _OPEN) else None


#: The classes of operators in ``torch._ops``.
_OPERATORS = frozenset({"OpOverload", "OpOverloadPacket", "_OpNamespace"})

#: What is open says nothing of what is read through it.
_OPEN = (socket.socket, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)

_DESCRIPTORS = (
    types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip

#: What is told apart by its class, or one that it is derived from.
_KINDS: tuple[tuple[type | tuple[type, ...], Way], ...] = (
    (StandIn, functions.stand_in),
    (torch.nn.Module, tensors.module),
    (torch.Tensor, tensors.tensor),
    (types.FunctionType, functions.function),
    (types.MethodType, functions.method),
    ((types.BuiltinFunctionType, types.MethodWrapperType), functions.built_in),
    ((type, *_DESCRIPTORS), objects.named),
    (types.ModuleType, functions.python_module),
    (np.ufunc, functions.universal),
    ((staticmethod, classmethod), objects.with_notes(functions.wrapped)),
    (torch.jit.ScriptFunction, functions.script),
    (random.SystemRandom, objects.opaque),
    (GENERATORS, tensors.generator),
    (enum.Enum, objects.member),
    (np.ma.MaskedArray, containers.masked_array),
    (np.void, containers.record),
    (property, objects.with_notes(functions.descriptor)),
    (types.CodeType, functions.code),
    (functools._lru_cache_wrapper, objects.attributes),  # noqa: SLF001 - its type has no other name
)

#: What is told apart by its exact class.
_EXACT: dict[type, Way] = {
    tuple: containers.tuple_,
    frozenset: containers.frozen_set,
    slice: containers.slice_,
    **dict.fromkeys(containers.CONTAINERS, containers.container),
    np.ndarray: containers.array,
    np.memmap: containers.array,
    functools.partial: functions.partial,
    functools.partialmethod: functions.partial,
}

#: Classes from which others may be derived that add attributes.
_BASES: dict[type, Way] = {
    **_EXACT,
    # By methods of the built-in classes, which return objects of just these.
    int: objects.plain_part(int.__pos__),
    float: objects.plain_part(float.__pos__),
    complex: objects.plain_part(complex.__pos__),
    str: objects.plain_part(str.__str__),
    bytes: objects.plain_part(lambda value: bytes.__getitem__(value, slice(None))),
}
