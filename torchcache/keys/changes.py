"""What a code walk saw, in a form that tells quickly whether another walk could see something else.

Code (functions, classes, modules, the user's own objects, anything callable) is compared by identity, plain
data only by type: whether its value changed is asked by who counts values. No ``__eq__`` of the user's is
called, and what is neither a function, a class nor a module is held weakly where Python can.

This module does not import torch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from operator import attrgetter, getitem, is_, itemgetter
from typing import Any

from torchcache.keys.fast.attribute_dicts import Makeup
from torchcache.keys.origins import is_own_class
from torchcache.keys.places import MISSING, Name

#: Code in a container of up to so many items is walked, through so many containers inside containers.
MOST_ITEMS = 64
MOST_CONTAINERS = 4

_PLAIN = frozenset({
    type(None), type(...), bool, int, float, complex, str, bytes, bytearray, memoryview, range, slice,
})  # fmt: skip
#: Told by name, because this module does not import their libraries: they have hundreds of attributes to look at.
_PLAIN_NAMES = frozenset({
    ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch", "dtype"), ("torch", "device"),
    ("numpy", "ndarray"),
})  # fmt: skip
_CONTAINERS = (
    list, tuple, dict, set, frozenset, deque, OrderedDict, defaultdict, types.MappingProxyType, types.SimpleNamespace,
)  # fmt: skip
#: What lives as long as its program anyway, or does not hold anything large.
_KEPT = frozenset({
    types.FunctionType, type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, property, staticmethod,
    classmethod, types.MethodDescriptorType, types.WrapperDescriptorType,
})  # fmt: skip

_fields = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_contents = attrgetter("cell_contents")
_bases = attrgetter("__bases__")


def is_container(value: object) -> bool:
    """Tell whether a value is a container of a library's, small enough for its items to be walked."""
    return type(value) in _CONTAINERS and len(items_of(value)) <= MOST_ITEMS


def items_of(value: object) -> Collection[Any]:
    """Return the items of a container; of a mapping, its values."""
    if isinstance(value, types.SimpleNamespace):
        return vars(value).values()
    if isinstance(value, Mapping):
        return value.values()
    return value  # type: ignore[return-value]


def parts_of(value: object, depth: int = 0) -> Iterator[object]:
    """Yield a value, or what lies in a container and in those inside it, without what wraps it."""
    if is_container(value):
        items = items_of(value)
        if depth < MOST_CONTAINERS and not _PLAIN.issuperset(map(type, items)):
            for item in tuple(items):
                yield from parts_of(item, depth + 1)
        return

    while True:
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        else:
            break
    yield value


def is_code(value: object) -> bool:
    """Tell whether a value, or one in it, is code or leads to it; a walk then has to look at it."""
    return next(_codes_in(value), None) is not None


def is_plain_type(kind: type) -> bool:
    """Tell whether instances of a type are data, whatever their value."""
    return kind in _PLAIN or (kind.__module__, kind.__name__) in _PLAIN_NAMES


def _codes_in(value: object, depth: int = 0) -> Iterator[object]:
    kind = type(value)
    if kind in _PLAIN:
        return
    if kind in _CONTAINERS:
        items = items_of(value)
        if depth < MOST_CONTAINERS and len(items) <= MOST_ITEMS and not _PLAIN.issuperset(map(type, items)):
            for item in tuple(items):
                yield from _codes_in(item, depth + 1)
        if kind is defaultdict:
            yield from _codes_in(value.default_factory, depth)  # type: ignore[attr-defined]
    elif kind in _KEPT or (not is_plain_type(kind) and (callable(value) or _has_code(kind))):
        yield value


def _has_code(kind: type) -> bool:
    known = _with_code.get(kind)
    if known is None:
        is_descriptor = any("__get__" in vars(base) for base in kind.__mro__)
        known = issubclass(kind, (type, types.ModuleType)) or is_descriptor or is_own_class(kind)
        _with_code[kind] = known
    return known


#: Asked at every call for what lies in containers; a class that changes is watched itself.
_with_code: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _signature(value: object) -> list[int]:
    """Return what differs when other code lies in a container, or in another place of it."""
    if type(value) not in _CONTAINERS:
        return []
    codes = [*map(id, _codes_in(value))]
    if not codes:
        return codes
    if isinstance(value, Mapping):
        codes += map(id, value)
    else:
        codes += [place for place, item in enumerate(items_of(value)) if is_code(item)]
    return codes


class Watch:
    """The places that a walk looked at, with what lay there.

    Not thread-safe: its owner asks under a lock.
    """

    def __init__(self) -> None:
        self._dead: list[weakref.ref[Any]] = []  # of the objects held weakly, those that died
        self._kept: list[object] = []
        self._functions: dict[int, types.FunctionType] = {}
        self._weak_functions: list[tuple[weakref.ref[types.FunctionType], types.CodeType, int, int]] = []
        self._classes: dict[int, type] = {}
        self._strong: dict[int, tuple[Any, dict[str, object]]] = {}
        self._weak: list[tuple[Name, int]] = []
        self._objects: dict[int, Callable[[], object]] = {}
        self._all_objects: list[Callable[[], object]] = []
        self._makeup: Makeup = Makeup([])
        self._soft: dict[int, tuple[Any, dict[str, type]]] = {}
        self._containers: list[tuple[Name, list[int]]] = []
        self._missing: dict[int, tuple[Any, set[str]]] = {}
        self._whole: dict[int, tuple[Any, frozenset[str], bool]] = {}  # keys, and whether data may come
        self.seal()

    # -- noting what lies where -----------------------------------------------------------------------

    def add(self, name: Name, value: object, *, weak: bool = False) -> None:
        """Note that ``value`` lies at a name.

        Args:
            name: The name.
            value: What lies there now, or ``MISSING``.
            weak: Hold nothing of it alive.
        """
        place, key = name.place, name.key
        if value is MISSING:
            _, keys = self._missing.setdefault(id(place), (place, set()))
            keys.add(key)
        elif type(value) in _CONTAINERS:
            signature = self._hold_codes(value, weak=weak)
            self._containers.append((name, signature))
            self._add_type(place, key, value)
        elif not is_code(value):
            self._add_type(place, key, value)
        elif not weak and type(value) in _KEPT:
            self.add_exactly(place, key, value)
        else:
            self._hold(value)
            self._weak.append((name, id(value)))

    def _add_type(self, place: Any, key: str, value: object) -> None:  # noqa: ANN401 - as of Name
        """Note of what type the value at a key is."""
        _, types_ = self._soft.setdefault(id(place), (place, {}))
        types_[key] = type(value)

    def add_exactly(self, place: Any, key: str, value: object) -> None:  # noqa: ANN401 - as of Name
        """Note that ``value``, a small constant or code, lies at a key, and that any other counts as a change."""
        _, values = self._strong.setdefault(id(place), (place, {}))
        values[key] = value

    def add_whole(self, place: Mapping[str, Any], *, data_may_come: bool = False) -> None:
        """Note that a new key of a mapping counts as a change, or only one that holds code."""
        self._whole[id(place)] = (place, frozenset(place), data_may_come)

    def add_function(self, function: types.FunctionType, *, weak: bool = False) -> None:
        """Note a function's code and defaults."""
        if weak:
            reference = weakref.ref(function, self._dead.append)
            marks = function.__code__, id(function.__defaults__), id(function.__kwdefaults__)
            self._weak_functions.append((reference, *marks))
        else:
            self._functions[id(function)] = function

    def add_class(self, cls: type) -> None:
        """Note the base classes of a class."""
        self._classes[id(cls)] = cls

    def add_object(self, value: object) -> None:
        """Note of which class an object is, and which dictionary has its attributes: both can be assigned."""
        self._objects[id(value)] = self._hold(value)

    def _hold_codes(self, container: object, *, weak: bool) -> list[int]:
        signature = _signature(container)
        if not signature:
            return signature
        for value in _codes_in(container):
            is_weak = weak or type(value) not in _KEPT
            self._hold(value, weak=is_weak)
        if isinstance(container, Mapping):
            self._kept.extend(container)
        return signature

    def _hold(self, value: object, *, weak: bool = True) -> Callable[[], object]:
        """See to it that the object's id stays its own, or that its death is noticed; return what returns it."""
        if weak:
            try:
                reference = weakref.ref(value, self._dead.append)
            except TypeError:
                pass
            else:
                self._kept.append(reference)
                return reference
        self._kept.append(value)
        return lambda: value

    # -- asking ---------------------------------------------------------------------------------------

    def has_changed(self) -> bool:
        """Tell whether code may lie at one of the names that did not lie there; in doubt, yes."""
        try:
            return bool(self._dead) or self._code_moved() or self._data_became_code()
        except Exception:  # noqa: BLE001 - a name is gone, or an object cannot be asked: then look again
            return True

    def seal(self) -> None:
        """Make the lists that are compared; whoever has added something calls it."""
        self._saved_fields = list(map(_fields, self._functions.values()))  # alive, so that no other takes its place
        self._views = [_view(function) for function in self._functions.values()]
        self._viewed = b"".join(self._views)
        self._all_classes = list(self._classes.values())
        self._saved_bases = list(map(_bases, self._all_classes))
        self._saved_metaclasses = list(map(type, self._all_classes))
        if len(self._all_objects) != len(self._objects):  # else nothing is new, and what moved is to be seen
            self._all_objects = list(self._objects.values())
            self._makeup = Makeup([read() for read in self._all_objects])
        self._code_reading = _Reading(self._strong)
        self._data_reading = _Reading(self._soft)
        self._absent: list[tuple[Mapping[str, Any], frozenset[str]]] = []
        self._absent_elsewhere: list[Name] = []
        for place, keys in self._missing.values():
            if isinstance(place, Mapping):
                self._absent.append((place, frozenset(keys)))
            else:
                self._absent_elsewhere += [Name("", place, key) for key in keys]
        self._places = [place for place, _, _ in self._whole.values()]
        self._lengths = [len(keys) for _, keys, _ in self._whole.values()]

    def _code_moved(self) -> bool:
        # One function with everything in it: it runs at every call, and a call of Python costs as much as a check.
        if b"".join(self._views) != self._viewed:
            return True
        if _OFFSET is None and not all(map(_has_fields, self._functions.values(), self._saved_fields)):
            return True
        if not all(map(is_, map(_bases, self._all_classes), self._saved_bases)):
            return True
        if list(map(type, self._all_classes)) != self._saved_metaclasses:
            return True
        if not all(map(is_, self._code_reading.read(), self._code_reading.expected)):
            return True

        if self._weak and any(id(name.read()) != number for name, number in self._weak):
            return True
        if self._all_objects and self._makeup.has_changed([read() for read in self._all_objects]):
            return True
        if self._absent and not all(place.keys().isdisjoint(keys) for place, keys in self._absent):
            return True
        if self._absent_elsewhere and any(name.read() is not MISSING for name in self._absent_elsewhere):
            return True
        if list(map(len, self._places)) != self._lengths and self._has_other_keys():
            return True
        return any(map(_function_moved, self._weak_functions))

    def _has_other_keys(self) -> bool:
        """Look at the keys one by one: copying and pickling leave keys of their own in a class."""
        for place, keys, data_may_come in list(self._whole.values()):
            new = frozenset(place) - keys - CLASS_BOOKKEEPING
            if not keys <= frozenset(place) or (new and not data_may_come) or any(is_code(place[key]) for key in new):
                return True
            for key in new:
                self.add(Name("", place, key), place[key])
            self._whole[id(place)] = (place, frozenset(place), data_may_come)
        self.seal()
        return False

    def _data_became_code(self) -> bool:
        values = self._data_reading.read()
        if not all(map(is_, map(type, values), self._data_reading.expected)) and self._other_types_are_code():
            return True
        return any(_signature_at(name) != signature for name, signature in self._containers)

    def _other_types_are_code(self) -> bool:
        """Look at the data one by one, of which some has other types now; remember these if none is code."""
        known = {(id(name.place), name.key) for name, _ in self._containers}
        for place, types_ in self._soft.values():
            for key in types_:
                value = Name("", place, key).read()
                is_watched = (id(place), key) in known  # as a container, whose signature is compared
                if value is MISSING or (is_code(value) and not is_watched):
                    return True
                types_[key] = type(value)
                if type(value) in _CONTAINERS and not is_watched:
                    self._containers.append((Name("", place, key), []))
        self._data_reading = _Reading(self._soft)
        return False


def _find_fields() -> int | None:
    """Return where in a function's memory code, defaults and keyword defaults lie one after the other.

    To ask a function for them is audited, and one audit hook, which filelock 4 has from Python 3.12 on, makes each
    answer cost a microsecond. None where they lie elsewhere; then they are asked for.
    """

    def function(a: object = None, *, b: object = None) -> None:
        """Have all three."""

    if sys.implementation.name != "cpython":
        return None
    size = ctypes.sizeof(ctypes.c_size_t)
    memory = ctypes.c_size_t * (function.__sizeof__() // size)
    words = list(memory.from_address(id(function)))
    wanted = [*map(id, _fields(function))]
    for i in range(len(words)):
        if words[i : i + 3] == wanted:
            return i * size
    return None


_OFFSET = _find_fields()
_View = ctypes.c_char * (3 * ctypes.sizeof(ctypes.c_size_t))


def _view(function: types.FunctionType) -> memoryview | bytes:
    """Return a live view of a function's code and defaults; whoever has it keeps the function."""
    if _OFFSET is None:
        return b""
    return memoryview(_View.from_address(id(function) + _OFFSET))


def _has_fields(function: types.FunctionType, fields: tuple[object, ...]) -> bool:
    return all(map(is_, _fields(function), fields))


def _signature_at(name: Name) -> list[int]:
    value = name.read()
    if type(value) in _CONTAINERS:
        return _signature(value)
    if is_code(value):
        return [id(value)]
    return []


def _function_moved(known: tuple[weakref.ref[types.FunctionType], types.CodeType, int, int]) -> bool:
    reference, code, defaults, keyword_defaults = known
    function = reference()
    return (
        function is None
        or function.__code__ is not code
        or id(function.__defaults__) != defaults
        or id(function.__kwdefaults__) != keyword_defaults
    )


class _Reading:
    """Reads many keys of many places at once, always in the same order; raises KeyError where one is gone."""

    def __init__(self, slots: Mapping[int, tuple[Any, Mapping[str, Any]]]) -> None:
        self._getters: list[tuple[itemgetter[Any], Mapping[str, Any]]] = []
        self._owners: list[Mapping[str, Any]] = []  # of few keys each, which are read one by one
        self._keys: list[str] = []
        self._others: list[tuple[Any, list[str]]] = []
        self._cells: list[types.CellType] = []
        several: list[Any] = []
        few: list[Any] = []
        others: list[Any] = []
        cells: list[Any] = []
        for place, keys in slots.values():
            values = list(keys.values())
            if isinstance(place, types.CellType):
                self._cells.append(place)
                cells += values
            elif not isinstance(place, Mapping):
                self._others.append((place, list(keys)))
                others += values
            elif len(keys) > _FEW:
                self._getters.append((itemgetter(*keys), place))
                several += values
            else:
                self._owners += [place] * len(keys)
                self._keys += keys
                few += values
        self.expected: list[Any] = [*several, *few, *others, *cells]

    def read(self) -> list[object]:
        """Return what lies there now, in the order of ``expected``."""
        values: list[object] = []
        for getter, place in self._getters:
            values += getter(place)
        values += map(getitem, self._owners, self._keys)
        for place, keys in self._others:
            values += [place.get(key, MISSING) for key in keys]
        values += map(_contents, self._cells)
        return values


_FEW = 2


#: Attributes of a class that others set and that are no code.
CLASS_BOOKKEEPING = frozenset({"__slotnames__", "__annotations__", "__annotations_cache__", "__abstractmethods__"})
