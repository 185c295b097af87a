"""Names that walked code reads, and the places where their values can be read again.

This module does not import torch.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Missing:
    """The type of ``MISSING``."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()


class Place(Protocol):
    """Something that reads a value by its key each time it is asked, as a dictionary does."""

    def get(self, key: str, default: object, /) -> object:
        """Return the present value, or ``default``."""


@dataclass(frozen=True, slots=True)
class Name:
    """A global, closure variable, default or class attribute that walked code reads, and where to read it again.

    ``is_own`` is False for one of an installed distribution, whose version counts. ``counts_always`` is True where it
    is not known which code reads it: it counts although no code is seen to use it, as far as it has a value.
    """

    label: str
    place: Mapping[str, Any] | types.CellType | Place
    key: str
    is_own: bool = True
    counts_always: bool = False

    def read(self) -> object:
        """Return the variable's present value, or ``MISSING``."""
        if isinstance(self.place, types.CellType):
            try:
                return self.place.cell_contents
            except ValueError:
                return MISSING
        return self.place.get(self.key, MISSING)


#: What a default's key ends with: code that changes ``memo={}`` in place must not be taken for code that
#: changes a global of that name.
DEFAULT = "="


@dataclass(frozen=True, slots=True)
class DefaultsOf:
    """The defaults of a function by the names of its parameters, as they are now."""

    function: weakref.ref[types.FunctionType] | _Always

    def get(self, key: str, default: object, /) -> object:
        """Return the present default of the parameter that ``key`` names."""
        function = self.function()
        return default if function is None else dict(defaults_of(function)).get(key, default)


@dataclass(frozen=True, slots=True)
class ClosureOf:
    """The closure of a function that is held weakly, by the names of its variables."""

    function: weakref.ref[types.FunctionType] | _Always

    def get(self, key: str, default: object, /) -> object:
        """Return what the cell of the variable ``key`` holds now."""
        function = self.function()
        if function is None:
            return default
        try:
            return (function.__closure__ or ())[function.__code__.co_freevars.index(key)].cell_contents
        except (ValueError, IndexError):
            return default


@dataclass(frozen=True, slots=True)
class _Always:
    """Holds a function as a weak reference would, but keeps it."""

    function: types.FunctionType

    def __call__(self) -> types.FunctionType:
        return self.function


def reference(function: types.FunctionType, *, weak: bool) -> weakref.ref[types.FunctionType] | _Always:
    """Return something that returns the function when it is called."""
    return weakref.ref(function) if weak else _Always(function)


@dataclass(frozen=True, slots=True)
class ItemsOf:
    """The parts of an object that cannot change, by their names."""

    items: Mapping[str, object]

    def get(self, key: str, default: object, /) -> object:
        """Return the part of that name."""
        return self.items.get(key, default)


@dataclass(frozen=True, slots=True)
class AttributesOf:
    """The attributes of an object, those in slots too, without asking code of its class."""

    owner: Callable[[], object]

    def get(self, key: str, default: object, /) -> object:
        """Return the attribute of that name."""
        value = self.owner()
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and key in attributes:
            return attributes[key]
        for base in type(value).__mro__:
            slot = vars(base).get(key)
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    return slot.__get__(value)
                except AttributeError:
                    return default
        return default


@dataclass(frozen=True, slots=True)
class SubclassesOf:
    """The classes that are derived from a class by now and alive, as ``__subclasses__()`` lists them."""

    cls: type

    def get(self, key: str, default: object, /) -> list[type]:  # noqa: ARG002 - as of Place
        """Return them."""
        return type.__subclasses__(self.cls)


class ResultsOf:
    """The modules that a function behind ``functools.lru_cache`` has returned and keeps.

    The same tuple is read as long as they are the same.
    """

    def __init__(self, cached: object) -> None:
        self._cached = cached
        self._results: tuple[object, ...] = ()

    def get(self, key: str, default: object, /) -> object:  # noqa: ARG002 - there is one key
        """Return them."""
        held = gc.get_referents(self._cached)  # a bounded cache shows its results itself, another one its dict
        held += [value for part in held if type(part) is dict for value in part.values()]
        results = tuple([value for value in held if is_module(value)])
        if [*map(id, results)] != [*map(id, self._results)]:
            self._results = results
        return self._results


def is_module(value: object) -> bool:
    """Tell whether a value is a torch module, without importing torch."""
    return "_modules" in getattr(value, "__dict__", ()) and callable(getattr(type(value), "modules", None))


def package_of(function: types.FunctionType) -> str:
    """Return the package that relative imports of a function start from."""
    names = function.__globals__
    package, name = names.get("__package__"), names.get("__name__")
    if isinstance(package, str):
        return package
    name = name if isinstance(name, str) else ""
    return name if "__path__" in names else name.rpartition(".")[0]


def defaults_of(function: types.FunctionType) -> list[tuple[str, object]]:
    """Return the defaults of a function with the keys that ``DefaultsOf`` knows them by."""
    values, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
    if not values and not keywords:  # most have none, and walks ask often
        return []
    code = function.__code__
    names = code.co_varnames[: code.co_argcount][-len(values) :] if values else ()
    named = [*zip(names, values, strict=False), *sorted(keywords.items())]
    return [(f"{name}{DEFAULT}", value) for name, value in named]
