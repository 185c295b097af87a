"""Objects by their attributes, by what a registration says, or by what pickle would keep of them."""

from __future__ import annotations

import copyreg
import enum
import inspect
import io
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch

from torchcache.keys.attributes import attributes_of
from torchcache.keys.digest import digest_parts
from torchcache.keys.encoding import Encoding, Way
from torchcache.keys.origins import is_own_class
from torchcache.keys.plain import encode_plain, type_name
from torchcache.keys.registry import Registration, find_part

_PROCESS_GROUP = (torch.distributed.ProcessGroup,) if torch.distributed.is_available() else ()

#: What coordinates, logs or talks to the outside: it counts by its type, whatever state it is in.
WITHOUT_VALUE: tuple[type[Any], ...] = (
    type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore, threading.Barrier,
    threading.Thread, Executor, logging.Logger, logging.LoggerAdapter, logging.Handler,
    torch.Stream, torch.Event, *_PROCESS_GROUP,
)  # fmt: skip

#: Methods with which a class written in Python says itself what is kept of its objects.
_BY_HAND = ("__reduce__", "__reduce_ex__", "__getstate__")


def opaque(encoding: Encoding, value: object, path: str) -> bytes:
    """Say that a value cannot be seen."""
    return encoding.opaque(value, path)


# -- by attributes ---------------------------------------------------------------------------------------------------


def attributes(encoding: Encoding, value: object, path: str) -> bytes:
    """Encode an object by its attributes."""
    kind = type(value)
    observer = encoding.observer
    observer.note_code(kind)

    held = attributes_of(value) or {}
    kept: list[str] = []
    for name, item in held.items():
        if not observer.leaves_out(value, name, item, f"{path}.{name}"):
            kept.append(name)
    if not encoding.is_content:
        observer.note_attributes(value, kept)

    parts = [b"object", type_name(kind)]
    outer, encoding.is_in_library = encoding.is_in_library, not is_own_class(kind)
    for name in sorted(kept, key=str):
        registration = find_part(kind, name)
        encode = encoding.encode if registration is None else partial(encoding.encode_in, told_by(registration))
        encoded = encode(held[name], f"{path}.{name}")
        observer.note_inner(f"{path}.{name}", encoded)
        parts += [str(name).encode(), encoded]
    encoding.is_in_library = outer
    return digest_parts(parts)


def with_attributes(way: Way) -> Way:
    """Return how to encode objects of a class that adds attributes to one that is encoded in some way."""

    def derived(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - as of any way
        return digest_parts([way(encoding, value, path), attributes(encoding, value, path)])

    return derived


def plain_part(convert: Callable[[Any], object]) -> Way:
    """Return how to encode the plain value that an object of a derived class has beside its attributes."""

    def way(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401, ARG001 - as of any way
        return encode_plain(convert(value)) or b""

    return way


def member(encoding: Encoding, value: enum.Enum, path: str) -> bytes:
    """Encode an enum member whose value is not plain, or that has attributes of its own."""
    encoding.observer.note_code(type(value))
    head = digest_parts([b"enum", type_name(type(value)), str(value.name).encode()])
    return digest_parts([head, encoding.encode(value.value, f"{path}.value"), attributes(encoding, value, path)])


# -- by what they say themselves ---------------------------------------------------------------------------------------


def told_by(registration: Registration) -> Way:
    """Return how to encode objects by what a registration says."""

    def way(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - as of any way
        return digest_parts([type_name(type(value)), _registered(encoding, value, path, registration)])

    return way


def _registered(encoding: Encoding, value: object, path: str, registration: Registration) -> bytes:
    if _is_consumed_unseen(encoding, value):
        return encoding.opaque(value, path)
    if not registration.is_immutable:
        encoding.note_content(value, path, told_by(registration), registration.quick)
    try:
        made = registration.encode(value)
    except Exception:  # noqa: BLE001 - whatever somebody's function raises: it cannot be told
        return encoding.opaque(value, path)
    if registration.is_immutable:  # what it holds may change: a time zone of one's own, the argument of a methodcaller
        return digest_parts([b"registered", encoding.encode(made, path)])
    return encoding.inside_content(lambda: digest_parts([b"registered", encoding.encode(made, path)]))


def by_state(kind: type, otherwise: Way) -> Way:
    """Return how to encode objects by their own ``__getstate__``, for observers who ask for that."""
    own: Callable[[object], object] | None = getattr(kind, "__getstate__", None)
    if own is None or own is getattr(object, "__getstate__", None):
        return otherwise

    def way(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - as of any way
        observer = encoding.observer
        if not observer.asks_for_state:
            return otherwise(encoding, value, path)
        try:
            state = own(value)
        except Exception:  # noqa: BLE001 - a foreign one may raise anything: then the attributes say it
            return otherwise(encoding, value, path)
        observer.note_code(kind)
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if not observer.leaves_out(value, k, v, f"{path}.{k}")}
        return digest_parts([b"state", type_name(kind), encoding.encode(state, path)])

    return way


def reduced(encoding: Encoding, value: object, path: str) -> bytes:
    """Encode an object by what pickle would keep of it, where that is the same twice in a row."""
    encoding.observer.note_code(type(value))
    if _is_function_of_library(value):
        return named(encoding, value, path)
    parts = _parts_of(value)
    if parts is None or _is_consumed_unseen(encoding, value):
        return encoding.opaque(value, path)
    if not encoding.is_content:
        read = encoding.note_content(value, path, reduced)
        if read() != read():
            return encoding.opaque(value, path)
    return encoding.inside_content(lambda: _encode_parts(encoding, value, parts, path))


def _encode_parts(encoding: Encoding, value: object, parts: Sequence[object], path: str) -> bytes:
    function, *rest = parts
    items = encoding.items(b"parts", rest, path)
    return digest_parts([b"reduced", type_name(type(value)), own_name(function), items])


def _is_consumed_unseen(encoding: Encoding, value: object) -> bool:
    return not encoding.observer.looks_again and hasattr(type(value), "__next__")


def _is_function_of_library(value: object) -> bool:
    """Tell whether an object is a function in another language than Python, such as Cython, that a module has."""
    name = getattr(value, "__qualname__", None)
    if not callable(value) or not isinstance(name, str) or isinstance(value, type):
        return False
    found: object = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _parts_of(value: object) -> tuple[object, ...] | None:
    """Return what pickle would keep of an object: a function and its arguments, state, items; None if it refuses.

    An object that is kept as the name of a global says nothing of its state. What a class written in Python adds to one
    of C, whose method does not know of it, counts too.
    """
    kind = type(value)
    held = attributes_of(value) or {}  # before, as asking an exception for them changes what pickle would keep
    try:
        kept = _reduce(value)
        now = attributes_of(value) or {}
        if now.keys() != held.keys():  # asking filled a cache that the object has
            held, kept = now, _reduce(value)
        if not isinstance(kept, tuple):
            return None
        parts = tuple(list(part) if i > 2 and isinstance(part, Iterator) else part for i, part in enumerate(kept))
    except Exception:  # noqa: BLE001 - a foreign method may raise anything: then there is no value to see
        return None
    if isinstance(value, BaseException):
        parts += _origin_of(value)
    if any(isinstance(inspect.getattr_static(kind, name, None), types.FunctionType) for name in _BY_HAND):
        return parts
    return (*parts, held)


def _origin_of(error: BaseException) -> tuple[object, ...]:
    """Return what an exception was raised from, which pickle does not keep, in a tuple; an empty one if nothing is."""
    origin = error.__cause__, error.__context__, error.__suppress_context__
    return () if origin == (None, None, False) else (origin,)


def _reduce(value: object) -> object:
    reduce = copyreg.dispatch_table.get(type(value))
    return value.__reduce_ex__(4) if reduce is None else reduce(value)


# -- by name -----------------------------------------------------------------------------------------------------------


def named(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401, ARG001 - a class or a descriptor
    """Encode a class, or whatever else has a name of its own, by that."""
    encoding.observer.note_code(value)
    return digest_parts([b"named", type_name(value) if isinstance(value, type) else own_name(value)])


def own_name(value: object) -> bytes:
    """Return the name that something has in its module."""
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{getattr(value, '__module__', '')}.{name}".encode()


def with_notes(way: Way) -> Way:
    """Return how to encode objects that are encoded in some way, and by what somebody hung on them."""

    def noted(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - as of any way
        encoded = way(encoding, value, path)
        held = attributes_of(value)
        if held is None:
            return encoded
        names = [name for name in held if not name.startswith("__")]  # those are of what it wraps
        if not encoding.is_content:
            encoding.observer.note_attributes(value, names)
        notes = [(name, held[name]) for name in names]
        if not notes:
            return encoded
        return digest_parts([encoded, encoding.pairs(b"notes", notes, path, is_order_kept=False)])

    return noted


def coordination(encoding: Encoding, value: object, path: str) -> bytes:
    """Encode what coordinates, logs or talks to the outside by its type, whatever state it is in.

    And by what somebody hung on it.
    """
    if isinstance(value, _PROCESS_GROUP):
        encoding.observer.note_code(type(value))  # what is asked of it shows in the code
    head = digest_parts([b"object", type_name(type(value))])
    held = getattr(value, "__dict__", None)
    if not held:
        return head
    own_names = _names_in_code(type(value))
    hung = {name: item for name, item in held.items() if name not in own_names}
    if not hung:
        return head
    return encoding.whole(head, value, [hung], path)


def _names_in_code(kind: type) -> frozenset[str]:
    """Return the names that the code of a class of a library uses, those of its own attributes among them."""
    names: set[str] = set()
    for base in kind.__mro__:
        if is_own_class(base):
            continue
        for part in vars(base).values():
            if isinstance(part, types.FunctionType):
                names.update(part.__code__.co_names)
    return frozenset(names)


def stream(encoding: Encoding, value: io.IOBase, path: str) -> bytes:
    """Encode by its type what is written to only; nothing says what will be read from another one."""
    try:
        is_written_only = not value.readable()
    except Exception:  # noqa: BLE001 - it is closed, or a foreign class
        is_written_only = False
    if not is_written_only:
        return encoding.opaque(value, path)
    return digest_parts([b"object", type_name(type(value))])
