"""Python values to bytes that say what they are: arguments of a call, of a constructor, plain state, datasets.

One rule says what a value is, whoever asks and wherever it lies (``_way_of``):

1. plain values, and containers of known types: by value;
2. tensors and arrays of exactly the known types: by bytes, dtype and shape;
3. random number generators: see ``_Encoding._generator``;
4. objects of registered classes (``registry.py``): by what their registration says;
5. objects of classes derived from these that add attributes only: by both;
6. objects that hold attributes only: by these;
7. all others: by what pickle would keep, where that is made of such values and the same twice in a row;
8. what is left has no value that can be seen: it is *opaque*.

An ``Observer`` is told what an encoding came upon, so that whoever encodes state can watch exactly what counts.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import inspect
import io
import logging
import random
import socket
import sys
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

import torchcache.keys.registered  # noqa: F401 - what it registers is found from here
from torchcache.keys.attributes import adds_attributes_only, attributes_of
from torchcache.keys.code import (
    StandIn,
    fingerprint_code,
    is_bound_to_object,
    is_own_class,
    is_own_module,
    unwrap,
    walk_code,
)
from torchcache.keys.digest import digest_bytes, digest_of_leaves, digest_parts
from torchcache.keys.plain import attributes_of_member, encode_plain, type_name
from torchcache.keys.registry import Encode, Registration, count_registered, find_part, find_registration
from torchcache.keys.tensor_digest import digest_tensor
from torchcache.keys.time_limit import TakesTooLongError, TimeLimit

#: What lies deeper in an encoding has no value that can be seen; the stack of the interpreter bounds it too.
_DEEPEST = 100

#: At most so many values are encoded at once; what comes after them has no value that can be seen.
_MOST_VALUES = 10_000_000

#: After so many values it is asked whether an encoding takes too long.
_CHECKED_EVERY = 256

#: An unseeded generator of NumPy draws 128 bits to start from, one of torch 53: no user chooses a seed that large.
_LARGEST_SEED = 1 << 64
_LARGEST_TORCH_SEED = 1 << 40

Way = Callable[["_Encoding", Any, str], bytes]
Look = Callable[[], bytes]


class UnnamedValueError(Exception):
    """A value cannot be seen; ``path`` says where it lies inside what was encoded."""

    def __init__(self, path: str, type_name: str) -> None:
        super().__init__(path)
        self.path = path
        self.type_name = type_name


class Observer:
    """Is told what an encoding comes upon. By default, modules and tensors count by value, and nothing is noted."""

    #: Whether generators count by the state they are in, although nobody seeded them.
    counts_generators = False
    #: Whether an object's own ``__getstate__`` says what it is made of.
    asks_for_state = False
    #: Whether the order of a dict counts: code may go through it in order.
    is_order_kept = True
    #: Ends an encoding that takes too long.
    limit: TimeLimit | None = None
    #: Whether values are looked at again later: an iterator that code consumes is another one then.
    looks_again = True

    def refer(self, value: torch.nn.Module | torch.Tensor, path: str) -> bytes | None:  # noqa: ARG002 - for those who ask
        """Return the bytes of a module or a tensor; None if it is to be encoded as any other object."""
        if isinstance(value, torch.Tensor):
            return None
        return _architecture(value)

    def code_of(self, function: types.FunctionType) -> bytes:
        """Return the bytes of a function's code, without its defaults and closure."""
        return fingerprint_code(function.__code__)  # its helpers are walked for those who heed note_code

    def leaves_out(self, owner: object, name: str, value: object, path: str) -> bool:  # noqa: ARG002 - for those who do
        """Tell whether an attribute does not count."""
        return False

    def note_code(self, code: object) -> None:
        """Note a function, or the class of an object: code that may run."""

    def note_opaque(self, path: str, value: object) -> None:
        """Note where something lies that cannot be seen."""

    def note_generator(self, generator: object) -> None:
        """Note a random number generator."""

    def note_container(self, value: Any) -> bool:  # noqa: ANN401, ARG002 - any container of a built-in type
        """Note a container that may change; return whether all that lies in it is taken care of."""
        return False

    def note_attributes(self, value: object, names: Sequence[str]) -> None:
        """Note an object whose attributes of these names count."""

    def note_array(self, value: np.ndarray[Any, Any]) -> None:
        """Note an array of numbers."""

    def note_content(self, value: object, look: Look, quick_look: Look | None) -> None:
        """Note an object that has to be looked at again to see whether it has changed, with all that lies in it.

        Args:
            value: The object.
            look: Returns other bytes once it has changed.
            quick_look: Returns other bytes once it has changed in a way that shows at once, for one that is large.
        """


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
    return _Encoding(_ArgumentObserver()).encode(value, path)


def encode_value(value: object, path: str, observer: Observer, *, owner: object = None) -> bytes:
    """Return the bytes of a value, and tell ``observer`` what was come upon.

    Args:
        value: The value.
        path: What to call it.
        observer: Decides what modules and tensors are, and what is left out.
        owner: The object whose attribute it is; found in it, it counts by its place and not once more by value.
    """
    encoding = _Encoding(observer)
    if owner is not None:
        encoding.enter(owner)
    try:
        return encoding.encode(value, path)
    except RecursionError:
        observer.note_opaque(path, value)
        return b"too deep"


class _SilentObserver(Observer):
    """Encodes what ``note_content`` is told of once more, with nothing to note."""

    def __init__(self, told: Observer) -> None:
        self.counts_generators = told.counts_generators
        self.asks_for_state = told.asks_for_state
        self.looks_again = told.looks_again
        self.leaves_out = told.leaves_out  # type: ignore[method-assign]

    def refer(self, value: torch.nn.Module | torch.Tensor, path: str) -> bytes | None:  # noqa: ARG002 - as of Observer
        return None if isinstance(value, torch.Tensor) else str(id(value)).encode()


class _Encoding:
    """One encoding; the same value is encoded once, and one that contains itself comes to an end."""

    def __init__(self, observer: Observer, *, is_content: bool = False) -> None:
        self.observer = observer
        self._is_in_library = False  # whether what is encoded belongs to an object of a library
        #: Whether what is encoded was made for it, or is encoded at each call anyway: then it is not noted again.
        self.is_content = is_content
        self._inside: dict[int, int] = {}
        self._done: dict[int, bytes] = {}
        self._kept: list[object] = []  # ids stay unique while the objects live

    def enter(self, owner: object) -> None:
        """Let ``owner`` be a cycle where it is found."""
        self._inside[id(owner)] = 0

    def encode(self, value: object, path: str) -> bytes:
        plain = encode_plain(value)
        if plain is not None and isinstance(value, BRINGS_CODE):
            for kind in classes_in(value):
                self.observer.note_code(kind)
            if isinstance(value, enum.Enum) and attributes_of_member(value):
                plain = None  # they are watched
        if plain is not None:
            return plain
        return self.encode_in(_way_of(type(value)), value, path)

    def encode_in(self, way: Way, value: object, path: str) -> bytes:
        """Encode a value that is not plain in a way of its own."""
        number = id(value)
        if number in self._inside:
            return f"cycle {self._inside[number]}".encode()
        known = self._done.get(number)
        if known is not None:
            return known
        if self.observer.limit is not None and not len(self._done) % _CHECKED_EVERY:
            self.observer.limit.check()
        if len(self._done) >= _MOST_VALUES or len(self._inside) >= _DEEPEST:
            return self.opaque(value, path)
        self._inside[number] = len(self._inside)
        try:
            encoded = way(self, value, path)
        finally:
            del self._inside[number]
        self._done[number] = encoded
        self._kept.append(value)
        return encoded

    def opaque(self, value: object, path: str) -> bytes:
        """Say that a value cannot be seen."""
        self.observer.note_opaque(path, value)
        return digest_parts([b"opaque", type_name(type(value))])

    # -- containers and arrays -------------------------------------------------------------------------------------

    def items(self, name: bytes, values: Iterable[Any], path: str) -> bytes:
        # Most items of a long list are plain, and saying where they lie would cost more than they do.
        return digest_parts([name, *(
            encode_plain(item) or self.encode(item, f"{path}[{i}]")
            if type(item) in _FREQUENT else self.encode(item, f"{path}[{i}]")
            for i, item in enumerate(values)
        )])  # fmt: skip

    def pairs(self, name: bytes, pairs: Iterable[tuple[Any, Any]], path: str, *, is_order_kept: bool) -> bytes:
        keyed = [(self.encode(key, f"{path} key"), key, value) for key, value in pairs]
        if not is_order_kept:
            keyed.sort(key=itemgetter(0))  # before the values are encoded: what they lead to is noted in this order
        parts = [name]
        for encoded, key, value in keyed:
            parts += [encoded, self.encode(value, f"{path}[{key!r}]")]
        return digest_parts(parts)

    def container(self, value: Any, path: str) -> bytes:  # noqa: ANN401 - of one of ``_CONTAINERS`` or derived
        """Encode what lies in a container that may change, by the methods of the built-in class."""
        if self.is_content or not self.observer.note_container(value):
            return self._container(value, path)
        self.is_content = True
        try:
            return self._container(value, path)
        finally:
            self.is_content = False

    def _container(self, value: Any, path: str) -> bytes:  # noqa: ANN401 - as above
        if isinstance(value, list):
            return self.items(b"list", list.__iter__(value), path)
        if isinstance(value, dict):
            if isinstance(value, OrderedDict):
                encoded = self.pairs(b"ordered", OrderedDict.items(value), path, is_order_kept=True)
            else:
                # A library may make a table of functions from a set, in an order that each process has for itself.
                is_table = self._is_in_library and all(map(callable, dict.values(value)))
                is_order_kept = self.observer.is_order_kept and not is_table
                encoded = self.pairs(b"dict", dict.items(value), path, is_order_kept=is_order_kept)
            if isinstance(value, defaultdict):
                return digest_parts([encoded, self.encode(value.default_factory, f"{path}.default_factory")])
            return encoded
        if isinstance(value, deque):
            return self.items(f"deque {value.maxlen}".encode(), deque.__iter__(value), path)
        if isinstance(value, set):
            return digest_parts([b"set", *sorted(self.encode(item, f"{path}{{}}") for item in set.__iter__(value))])
        return b"bytearray " + bytes(value)

    def array(self, value: np.ndarray[Any, Any], path: str) -> bytes:
        """Encode an array, without what a class derived from that of arrays adds."""
        plain = value.view(np.ndarray)
        if plain.dtype.hasobject:
            return self._whole(b"objects", value, [plain.shape, plain.dtype, *plain.ravel().tolist()], path)
        if not self.is_content:
            self.observer.note_array(plain)
        return digest_parts([encode_array(plain), self.encode(plain.dtype, f"{path}.dtype")])

    def masked_array(self, value: Any, path: str) -> bytes:  # noqa: ANN401 - a masked array
        notes = {name: note for name, note in vars(value).items() if name not in _NOTES_OF_MASKED_ARRAYS}
        parts = [value.data, np.ma.getmaskarray(value), value.fill_value, value.hardmask, notes]
        return self._whole(type_name(type(value)), value, parts, path)

    def record(self, value: Any, path: str) -> bytes:  # noqa: ANN401 - a row of a structured array
        return self._whole(type_name(type(value)), value, [np.array(value)], path)

    def _whole(self, name: bytes, value: object, parts: Sequence[object], path: str) -> bytes:
        """Encode the parts of an object that is encoded again at each call."""
        self._note_content(value, path, _way_of(type(value)))
        return self._inside_content(lambda: self.items(name, parts, path))

    # -- modules, tensors, generators --------------------------------------------------------------------------------

    def module(self, value: torch.nn.Module, path: str) -> bytes:
        referred = self.observer.refer(value, path)
        if referred is None:
            return self.attributes(value, path)
        return digest_parts([b"module", type_name(type(value)), referred])

    def tensor(self, value: torch.Tensor, path: str) -> bytes:
        referred = None if self.is_content else self.observer.refer(value, path)
        if referred is not None:
            return digest_parts([b"tensor", type_name(type(value)), referred])
        content = encode_tensor(value)
        if content is None:
            return self.opaque(value, path)
        notes = getattr(value, "__dict__", None)
        parts = [b"tensor", type_name(type(value)), content]
        return digest_parts([*parts, self.encode(notes, f"{path}.__dict__")] if notes else parts)

    def generator(self, value: Any, path: str) -> bytes:  # noqa: ANN401 - one of ``GENERATORS``
        """Encode a random number generator.

        What it draws is seen by comparing its state before and after. Its state counts where somebody seeded it, as far
        as that shows, or where the code reads states: then two seeds may give two results without a draw.
        """
        self.observer.note_generator(value)
        name = type_name(type(value))
        if getattr(value, "__dict__", None):  # of a class derived from one of a library's
            name = digest_parts([name, self.attributes(value, path)])
        if not (self.observer.counts_generators or _is_seeded(value)) or _is_global(value):
            return digest_parts([b"generator", name])
        return self._whole(name, value, [generator_state(value)], path)

    # -- code ------------------------------------------------------------------------------------------------------

    def function(self, function: types.FunctionType, path: str) -> bytes:
        unwrapped = unwrap(function)
        if not isinstance(unwrapped, types.FunctionType):
            return self.encode(unwrapped, path)
        compiled = vars(unwrapped).get("_torchdynamo_orig_callable")
        if compiled is not None:  # the wrapper's closure notes what was compiled so far
            closure = dict(zip(unwrapped.__code__.co_freevars, unwrapped.__closure__ or (), strict=False))
            callback = closure["callback"].cell_contents if "callback" in closure else None
            return digest_parts([b"compiled", encode_compiler(callback), self.encode(compiled, path)])
        self.observer.note_code(unwrapped)
        parts = [b"function", self.observer.code_of(unwrapped)]
        parts += [self.encode(default, f"{path} default") for default in unwrapped.__defaults__ or ()]
        for name, default in sorted((unwrapped.__kwdefaults__ or {}).items()):
            parts += [name.encode(), self.encode(default, f"{path} default {name}")]
        for name, cell in zip(unwrapped.__code__.co_freevars, unwrapped.__closure__ or (), strict=False):
            try:
                parts.append(self.encode(cell.cell_contents, f"{path} closure {name}"))
            except ValueError:
                parts.append(b"empty")
        return digest_parts(parts)

    def stand_in(self, value: StandIn, path: str) -> bytes:
        return self.encode(unwrap(value), path)

    def method(self, value: types.MethodType, path: str) -> bytes:
        return self.items(b"method", [value.__func__, value.__self__], path)

    def built_in(self, value: Any, path: str) -> bytes:  # noqa: ANN401 - a function or method of C
        """Encode a function of C by its name, and one that belongs to an object by that as well."""
        self.observer.note_code(value)
        named = digest_parts([b"named", _own_name(value)])
        if not is_bound_to_object(value):
            return named
        return digest_parts([named, self.encode(value.__self__, f"{path}.__self__")])

    def python_module(self, value: types.ModuleType, path: str) -> bytes:
        """Encode a module of Python by its name, and an own one that is not imported under it by what it holds."""
        imported = sys.modules.get(value.__name__)
        # A library may put another module in the place of its own, as transformers does.
        if imported is value or (imported is not None and not is_own_module(value.__name__)):
            return self.named(value, path)
        names = [name for name in vars(value) if not name.startswith("__")]
        if not self.is_content:
            self.observer.note_attributes(value, names)
        return self.pairs(b"module", [(name, vars(value)[name]) for name in names], path, is_order_kept=False)

    def named(self, value: Any, path: str) -> bytes:  # noqa: ANN401, ARG002 - a class or a descriptor
        self.observer.note_code(value)
        return digest_parts([b"named", type_name(value) if isinstance(value, type) else _own_name(value)])

    def universal(self, value: np.ufunc, path: str) -> bytes:
        """Encode a ufunc by its name if a library has it there; ``np.frompyfunc`` makes others."""
        name = value.__name__
        homes = [sys.modules.get(home) for home in ("numpy", "scipy.special")]
        if any(getattr(home, name, None) is value for home in homes):
            return digest_parts([b"named", name.encode()])
        return self.opaque(value, path)

    def operator(self, value: Any, path: str) -> bytes:  # noqa: ANN401, ARG002 - an operator of torch.ops
        """Encode an operator by its name; what runs behind it is code."""
        self.observer.note_code(value)
        return digest_parts([b"operator", str(value).encode()])

    def partial(self, value: Any, path: str) -> bytes:  # noqa: ANN401 - a partial function or method
        self.observer.note_code(value.func)
        parts = self.items(b"partial", [value.func, value.args, value.keywords], path)
        return digest_parts([parts, self.attributes(value, path)]) if vars(value) else parts

    def wrapped(self, value: Any, path: str) -> bytes:  # noqa: ANN401 - a static or class method
        return digest_parts([type_name(type(value)), self.encode(value.__func__, path)])

    def descriptor(self, value: property, path: str) -> bytes:
        return self.items(b"property", [value.fget, value.fset, value.fdel], path)

    def code(self, value: types.CodeType, path: str) -> bytes:  # noqa: ARG002 - as of any way
        return digest_parts([b"code", fingerprint_code(value)])

    def script(self, value: Any, path: str) -> bytes:  # noqa: ANN401, ARG002 - a scripted function
        return digest_parts([b"script", str(value.code).encode()])

    # -- objects ---------------------------------------------------------------------------------------------------

    def member(self, value: enum.Enum, path: str) -> bytes:
        """Encode an enum member whose value is not plain, or that has attributes of its own."""
        self.observer.note_code(type(value))
        head = digest_parts([b"enum", type_name(type(value)), str(value.name).encode()])
        return digest_parts([head, self.encode(value.value, f"{path}.value"), self.attributes(value, path)])

    def attributes(self, value: object, path: str) -> bytes:
        """Encode an object by its attributes."""
        kind = type(value)
        self.observer.note_code(kind)
        attributes = attributes_of(value) or {}
        kept = [
            name
            for name, item in attributes.items()
            if not self.observer.leaves_out(value, name, item, f"{path}.{name}")
        ]
        if not self.is_content:
            self.observer.note_attributes(value, kept)
        parts = [b"object", type_name(kind)]
        outer, self._is_in_library = self._is_in_library, not is_own_class(kind)
        for name in sorted(kept, key=str):
            told = find_part(kind, name)
            way = self.encode if told is None else partial(self.encode_in, _told_by(told))
            parts += [str(name).encode(), way(attributes[name], f"{path}.{name}")]
        self._is_in_library = outer
        return digest_parts(parts)

    def coordination(self, value: object, path: str) -> bytes:
        """Encode what coordinates, logs or talks to the outside by its type, whatever state it is in.

        And by what somebody hung on it.
        """
        if isinstance(value, _PROCESS_GROUP):
            self.observer.note_code(type(value))  # what is asked of it shows in the code
        head = digest_parts([b"object", type_name(type(value))])
        attributes = getattr(value, "__dict__", None) or {}
        own_names = _names_in_code(type(value)) if attributes else ()
        hung = [name for name in attributes if name not in own_names]
        return self._whole(head, value, [{name: attributes[name] for name in hung}], path) if hung else head

    def stream(self, value: io.IOBase, path: str) -> bytes:
        """Encode by its type what is written to only; nothing says what will be read from another one."""
        try:
            is_written_only = not value.readable()
        except Exception:  # noqa: BLE001 - it is closed, or a foreign class
            is_written_only = False
        name = type_name(type(value))
        return digest_parts([b"object", name]) if is_written_only else self.opaque(value, path)

    def registered(self, value: object, path: str, registration: Registration) -> bytes:
        """Encode an object by what its registration says."""
        if self._is_consumed_unseen(value):
            return self.opaque(value, path)
        if not registration.is_immutable:
            self._note_content(value, path, _told_by(registration), registration.quick)
        try:
            made = registration.encode(value)
        except Exception:  # noqa: BLE001 - whatever somebody's function raises: it cannot be told
            return self.opaque(value, path)
        return self._inside_content(lambda: digest_parts([b"registered", self.encode(made, path)]))

    def reduced(self, value: object, path: str) -> bytes:
        """Encode an object by what pickle would keep of it, where that is the same twice in a row."""
        self.observer.note_code(type(value))
        if _is_function_of_library(value):
            return self.named(value, path)
        parts = _parts_of(value)
        if parts is None or self._is_consumed_unseen(value):
            return self.opaque(value, path)
        if not self.is_content:
            look = self._note_content(value, path, _Encoding.reduced)
            if look() != look():
                return self.opaque(value, path)
        return self._inside_content(lambda: self._parts(value, parts, path))

    def _is_consumed_unseen(self, value: object) -> bool:
        return not self.observer.looks_again and hasattr(type(value), "__next__")

    def _parts(self, value: object, parts: Sequence[object], path: str) -> bytes:
        function, *rest = parts
        name = _own_name(function)
        return digest_parts([b"reduced", type_name(type(value)), name, self.items(b"parts", rest, path)])

    def _note_content(self, value: object, path: str, way: Way, quick: Encode | None = None) -> Look:
        """Note an object that is encoded again at each call, unless it lies in another one; return what does that."""
        observer = _SilentObserver(self.observer)

        def look() -> bytes:
            return _Encoding(observer, is_content=True).encode_in(way, value, path)

        def quick_look() -> bytes:
            assert quick is not None
            return _Encoding(observer, is_content=True).encode(quick(value), path)

        if not self.is_content:
            self.observer.note_content(value, look, None if quick is None else quick_look)
        return look

    def _inside_content(self, encode: Callable[[], bytes]) -> bytes:
        """Encode parts of what is encoded as a whole at each call: they need no watching of their own."""
        outer, self.is_content = self.is_content, True
        try:
            return encode()
        finally:
            self.is_content = outer


#: Plain values of these may be of a class with methods of the user's own, or hold such a value.
BRINGS_CODE = (enum.Enum, tuple)


def classes_in(value: object) -> Iterator[type]:
    """Yield the classes in a plain value whose methods code may call: of enum members and one's own named tuples."""
    if isinstance(value, enum.Enum):
        yield type(value)
    elif isinstance(value, tuple):
        if type(value) not in (tuple, torch.Size) and is_own_class(type(value)):
            yield type(value)
        for item in value:
            yield from classes_in(item)


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
    attributes = attributes_of(value) or {}  # before, as asking an exception for them changes what pickle would keep
    try:
        reduced = _reduce(value)
        now = attributes_of(value) or {}
        if now.keys() != attributes.keys():  # asking filled a cache that the object has
            attributes, reduced = now, _reduce(value)
        if not isinstance(reduced, tuple):
            return None
        parts = tuple(list(part) if i > 2 and isinstance(part, Iterator) else part for i, part in enumerate(reduced))
    except Exception:  # noqa: BLE001 - a foreign method may raise anything: then there is no value to see
        return None
    if any(isinstance(inspect.getattr_static(kind, name, None), types.FunctionType) for name in _BY_HAND):
        return parts
    return (*parts, attributes)


def _reduce(value: object) -> object:
    reduce = copyreg.dispatch_table.get(type(value))
    return value.__reduce_ex__(4) if reduce is None else reduce(value)


#: Methods with which a class written in Python says itself what is kept of its objects.
_BY_HAND = ("__reduce__", "__reduce_ex__", "__getstate__")


def _state_way(kind: type, otherwise: Way) -> Way:
    """Return how to encode objects by their own ``__getstate__``, for observers who ask for that."""
    own: Callable[[object], object] | None = getattr(kind, "__getstate__", None)
    if own is None or own is getattr(object, "__getstate__", None):
        return otherwise

    def way(encoding: _Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - as of any way
        if not encoding.observer.asks_for_state:
            return otherwise(encoding, value, path)
        try:
            state = own(value)
        except Exception:  # noqa: BLE001 - a foreign one may raise anything: then the attributes say it
            return otherwise(encoding, value, path)
        encoding.observer.note_code(kind)
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if not encoding.observer.leaves_out(value, k, v, f"{path}.{k}")}
        return digest_parts([b"state", type_name(kind), encoding.encode(state, path)])

    return way


# -- which way ---------------------------------------------------------------------------------------------------

_ways: WeakKeyDictionary[type, tuple[int, Way]] = WeakKeyDictionary()


def _way_of(kind: type) -> Way:
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
    if kind.__module__ == "torch._ops" and kind.__name__ in ("OpOverload", "OpOverloadPacket", "_OpNamespace"):
        return _Encoding.operator
    for kinds, way in _KINDS:
        if issubclass(kind, kinds):
            return way
    found = find_registration(kind)
    if found is not None:
        return _registered_way(kind, *found)
    base = next((base for base in kind.__mro__ if base in _BASES), None)
    if base is not None and adds_attributes_only(kind, base):
        return _state_way(kind, _derived(_BASES[base]))
    if issubclass(kind, _WITHOUT_VALUE):
        return _Encoding.coordination
    if issubclass(kind, io.IOBase):
        return _Encoding.stream
    if issubclass(kind, _OPEN):
        return _Encoding.opaque
    return _state_way(kind, _Encoding.attributes if adds_attributes_only(kind) else _Encoding.reduced)


def _told_by(registration: Registration) -> Way:
    """Return how to encode objects by what a registration says."""

    def way(encoding: _Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - as of any way
        return digest_parts([type_name(type(value)), encoding.registered(value, path, registration)])

    return way


def _registered_way(kind: type, base: type, registration: Registration) -> Way:
    way = _told_by(registration)
    if kind is base or registration.stands_for_subclasses:
        return way
    return _derived(way) if adds_attributes_only(kind, base) else _Encoding.reduced


def _derived(way: Way) -> Way:
    """Return how to encode objects of a class that adds attributes to one that is encoded in some way."""

    def derived(encoding: _Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - as of any way
        return digest_parts([way(encoding, value, path), encoding.attributes(value, path)])

    return derived


def _plain_part(convert: Callable[[Any], object]) -> Way:
    """Return how to encode the plain value that an object of a derived class has beside its attributes."""

    def way(encoding: _Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401, ARG001 - as of any way
        return encode_plain(convert(value)) or b""

    return way


#: Random number generators; see ``_Encoding.generator``.
GENERATORS = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)

_PROCESS_GROUP = (torch.distributed.ProcessGroup,) if torch.distributed.is_available() else ()

#: What coordinates, logs or talks to the outside: it counts by its type, whatever state it is in.
_WITHOUT_VALUE: tuple[type[Any], ...] = (
    type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore, threading.Barrier,
    threading.Thread, Executor, logging.Logger, logging.LoggerAdapter, logging.Handler,
    torch.Stream, torch.Event, *_PROCESS_GROUP,
)  # fmt: skip


def _names_in_code(kind: type) -> frozenset[str]:
    """Return the names that the code of a class of a library uses, those of its own attributes among them."""
    bases = [base for base in kind.__mro__ if not is_own_class(base)]
    functions = [part for base in bases for part in vars(base).values()]
    codes = [part.__code__ for part in functions if isinstance(part, types.FunctionType)]
    return frozenset(name for code in codes for name in code.co_names)


#: What is open says nothing of what is read through it.
_OPEN = (socket.socket, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)

#: The types of plain values that long lists are made of.
_FREQUENT = frozenset({str, int, float, tuple})

_CONTAINERS = (list, dict, set, deque, bytearray, OrderedDict, defaultdict)

_DESCRIPTORS = (
    types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip

#: What is told apart by its class, or one that it is derived from.
_KINDS: tuple[tuple[type | tuple[type, ...], Way], ...] = (
    (StandIn, _Encoding.stand_in),
    (torch.nn.Module, _Encoding.module),
    (torch.Tensor, _Encoding.tensor),
    (types.FunctionType, _Encoding.function),
    (types.MethodType, _Encoding.method),
    ((types.BuiltinFunctionType, types.MethodWrapperType), _Encoding.built_in),
    ((type, *_DESCRIPTORS), _Encoding.named),
    (types.ModuleType, _Encoding.python_module),
    (np.ufunc, _Encoding.universal),
    ((staticmethod, classmethod), _Encoding.wrapped),
    (torch.jit.ScriptFunction, _Encoding.script),
    (random.SystemRandom, _Encoding.opaque),
    (GENERATORS, _Encoding.generator),
    (enum.Enum, _Encoding.member),
    (np.ma.MaskedArray, _Encoding.masked_array),
    (np.void, _Encoding.record),
    (property, _Encoding.descriptor),
    (types.CodeType, _Encoding.code),
    (functools._lru_cache_wrapper, _Encoding.attributes),  # noqa: SLF001 - its type has no other name
)

_EXACT: dict[type, Way] = {
    tuple: lambda encoding, value, path: encoding.items(b"tuple", tuple.__iter__(value), path),
    frozenset: lambda encoding, value, path: digest_parts(
        [b"frozenset", *sorted(encoding.encode(item, f"{path}{{}}") for item in frozenset.__iter__(value))]
    ),
    slice: lambda encoding, value, path: encoding.items(b"slice", [value.start, value.stop, value.step], path),
    **dict.fromkeys(_CONTAINERS, _Encoding.container),
    np.ndarray: _Encoding.array,
    np.memmap: _Encoding.array,
    functools.partial: _Encoding.partial,
    functools.partialmethod: _Encoding.partial,
}

#: Classes from which others may be derived that add attributes.
_BASES: dict[type, Way] = {
    **_EXACT,
    # By methods of the built-in classes, which return objects of just these.
    int: _plain_part(int.__pos__),
    float: _plain_part(float.__pos__),
    complex: _plain_part(complex.__pos__),
    str: _plain_part(str.__str__),
    bytes: _plain_part(lambda value: bytes.__getitem__(value, slice(None))),
}

#: What a masked array notes about itself, such as whether others share its mask; its value is told without these.
_NOTES_OF_MASKED_ARRAYS = frozenset({
    "_mask", "_fill_value", "_hardmask", "_sharedmask", "_isfield", "_baseclass", "_optinfo", "_basedict",
})  # fmt: skip


# -- tensors, arrays and generators by value ---------------------------------------------------------------------


def encode_tensor(tensor: torch.Tensor, leaves: bytes | None = None) -> bytes | None:
    """Return dtype, shape and content digest of a tensor on any device; None for one without bytes that can be seen.

    What a class derived from Tensor adds as attributes is left to the caller.

    Args:
        tensor: The tensor.
        leaves: The digests of the leaves of its values, where they are known.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        inner = inner_tensors(tensor)
        if inner is not None:  # a wrapper around other tensors, which have the bytes
            digests = [encode_tensor(part) for _, part in inner]
            return None if None in digests else digest_parts([b"wrapper", *(digest or b"" for digest in digests)])
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return None  # its class decides what its values are
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents it for subclasses
            tensor = tensor.as_subclass(torch.Tensor)
    content = digest_tensor(tensor) if leaves is None else digest_of_leaves(leaves)
    form = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode()
    return None if content is None else digest_parts([form, content])


def inner_tensors(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]] | None:
    """Return the tensors that a wrapper subclass (quantized weights, DTensor) is made of; None if it is none."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return None
    names, _ = tensor.__tensor_flatten__()
    inner = ((name, getattr(tensor, name)) for name in names)
    return [(name, value) for name, value in inner if isinstance(value, torch.Tensor)]


def encode_array(array: np.ndarray[Any, Any]) -> bytes:
    """Return the bytes of an array that holds no objects; what lies between the fields of records does not count."""
    if array.dtype.names is not None:
        return digest_parts([b"records", *(encode_array(array[name]) for name in array.dtype.names)])
    content = digest_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.nbytes else b"")
    return digest_parts([b"array", str(array.dtype).encode(), str(array.shape).encode(), content])


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


#: At most so many callbacks of torch.compile lie in each other.
_MOST_CALLBACKS = 8


def _architecture(module: torch.nn.Module) -> bytes:
    """Say what a module is but not its weights: they count wherever the module is used."""
    parts = [repr(module).encode() if " at 0x" not in repr(module) else b""]
    for name, child in module.named_modules():
        parts += [name.encode(), type_name(type(child))]
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return digest_parts(parts)


def _own_name(value: object) -> bytes:
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{getattr(value, '__module__', '')}.{name}".encode()


def generator_state(value: Any) -> object:  # noqa: ANN401 - one of ``GENERATORS``
    """Return the state of a random number generator as plain data."""
    if isinstance(value, torch.Generator):
        return str(value.device), value.get_state().numpy()
    if isinstance(value, random.Random):
        return value.getstate()
    bits = _bits_of(value)
    # Children that are spawned draw from the sequence of seeds, and leave the generator's own state as it is.
    return bits.state, getattr(getattr(bits, "_seed_seq", None), "state", None)


def _bits_of(value: Any) -> Any:  # noqa: ANN401 - a generator of NumPy and the bit generator in it
    if isinstance(value, np.random.Generator):
        return value.bit_generator
    return value._bit_generator if isinstance(value, np.random.RandomState) else value  # noqa: SLF001 - no public name


def _is_seeded(value: Any) -> bool:  # noqa: ANN401 - as above
    """Tell whether somebody gave a generator its seed, as far as it shows: of ``random.Random`` it does not."""
    if isinstance(value, torch.Generator):
        seed = value.initial_seed()
        return seed < _LARGEST_TORCH_SEED or seed == torch.Generator(device="cpu").initial_seed()
    if isinstance(value, random.Random):
        return False
    entropy = getattr(getattr(_bits_of(value), "_seed_seq", None), "entropy", None)
    return not isinstance(entropy, int) or entropy < _LARGEST_SEED


def _is_global(value: object) -> bool:
    """Tell whether a generator is one of those that everybody draws from."""
    held = getattr(random.random, "__self__", None), np.random.mtrand._rand, torch.default_generator  # noqa: SLF001
    return any(value is generator for generator in held)
