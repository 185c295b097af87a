"""The modules that code imports or names, and those of their attributes that it can mean.

Names are yielded one by one: what a visit of one of them imports decides which there are after it. This module does not
import torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

from torchcache.keys.home import Home
from torchcache.keys.origins import find_origin, origin_of_class, origin_of_function, origin_of_module
from torchcache.keys.ours import unwrap
from torchcache.keys.places import MISSING, ItemsOf, Name, package_of
from torchcache.keys.reads import Reads
from torchcache.keys.walked import Trail


class Imports:
    """Imports the modules of the user's own that code names, and notes the versions of others.

    Args:
        home: Whose code the walk enters.
        trail: Where to note what was looked at.
    """

    def __init__(self, home: Home, trail: Trail) -> None:
        self._home = home
        self._trail = trail

    def names(self, function: types.FunctionType, reads: Reads) -> Iterator[Name]:
        """Yield the names that a function of the user's own imports when it runs, and what it can mean of modules."""
        for level, module, wanted in reads.imports:
            try:
                full = _full_name(function, level, module)
                origin = find_origin(full)
            except Exception:  # noqa: BLE001 - the search runs the user's code, too
                self._note_missing(module)
                continue
            if not self._home.is_own(origin):
                self._trail.stop_at(origin, f"import {module}", full)
            elif wanted:
                yield from self._names_wanted(full, module, wanted, reads)
            else:
                yield from self._names_in_packages(full, reads)

    def _names_wanted(self, full: str, module: str, wanted: tuple[str, ...], reads: Reads) -> Iterator[Name]:
        """Yield what ``from module import ...`` names."""
        loaded = self._load(full)
        if loaded is None:
            return
        if not isinstance(loaded, types.ModuleType):
            yield Name(module, sys.modules, full)
            return
        yield from self._names_of_its_kind(loaded, module)
        for key in wanted:
            if key not in vars(loaded) and hasattr(loaded, "__path__"):
                self._load(f"{full}.{key}")
            if key not in vars(loaded) and "__getattr__" in vars(loaded):
                yield Name(f"{module}.__getattr__", vars(loaded), "__getattr__")
            yield Name(f"{module}.{key}", vars(loaded), key)
            value = vars(loaded).get(key)
            if isinstance(value, types.ModuleType):
                yield from names_in_module(value, key, reads, self._home, is_own=True)

    def _names_in_packages(self, full: str, reads: Reads) -> Iterator[Name]:
        """Yield what code can mean after ``import package.module``, of both."""
        if self._load(full) is None:
            return
        for name in dict.fromkeys([full.partition(".")[0], full]):
            found = self._load(name)
            if found is not None and not isinstance(found, types.ModuleType):
                yield Name(name, sys.modules, name)
            elif found is not None:
                yield from self._names_of_its_kind(found, name)
                yield from names_in_module(found, name, reads, self._home, is_own=True)

    def _names_of_its_kind(self, module: types.ModuleType, label: str) -> Iterator[Name]:
        """Yield the module itself if its class is the user's own, which may answer for attributes that it lacks."""
        kind = type(module)
        if kind is not types.ModuleType and self._home.is_own(origin_of_class(kind)):
            yield Name(f"class of {label}", ItemsOf({"__class__": kind}), "__class__")

    def note_whether_there(self, module: str) -> None:
        """Note whether there is a module that code looks for and does not import by this."""
        try:
            origin = find_origin(module)
        except Exception:  # noqa: BLE001 - the search runs the user's code, too
            self._note_missing(module)
            self._trail.say(f"look for {module}", "missing")
            return
        if self._home.is_own(origin):
            self._trail.say(f"look for {module}", "there")
        else:
            self._trail.stop_at(origin, f"look for {module}", module)

    def load_named(self, module: str) -> None:
        """Import a module of the user's own that code names in a text; note the version of a library's."""
        try:
            origin = find_origin(module)
        except Exception:  # noqa: BLE001 - the search runs the user's code, too
            self._note_missing(module)
            return
        if self._home.is_own(origin):
            self._load(module)
        else:
            self._trail.stop_at(origin, f"import {module}", module)

    def _load(self, module: str) -> Any:  # noqa: ANN401 - a module may put anything in its own place
        """Return a module of the user's own, imported if it is not loaded; None if that fails."""
        try:
            loaded = sys.modules.get(module) or importlib.import_module(module)
        except Exception:  # noqa: BLE001 - a module that cannot be imported is as good as missing
            self._note_missing(module)
            return None
        self._trail.watch.add(Name(module, sys.modules, module), loaded)
        return loaded

    def _note_missing(self, module: str) -> None:
        self._trail.watch.add(Name(module, sys.modules, module), MISSING)


def _full_name(function: types.FunctionType, level: int, module: str) -> str:
    """Return the full name of a module that a function imports.

    Raises:
        ImportError: If it is relative to nothing.
    """
    return importlib.util.resolve_name("." * level + module, package_of(function)) if level else module


def names_in_module(
    module: types.ModuleType, label: str, reads: Reads, home: Home, *, is_own: bool, above: frozenset[int] = frozenset()
) -> Iterator[Name]:
    """Yield those attributes that code can mean of a module of the user's own, and of the modules in it.

    Args:
        module: The module.
        label: What to call it.
        reads: What the code reads.
        home: Whose code is entered.
        is_own: Whether the code is the user's own.
        above: The ids of the modules that it was reached through.
    """
    if id(module) in above or not home.is_own(origin_of_module(getattr(module, "__name__", None))):
        return
    attributes = vars(module)
    for key in reads.attributes:
        if key not in attributes and "__getattr__" in attributes:
            yield Name(f"{label}.__getattr__", attributes, "__getattr__", is_own)
        yield Name(f"{label}.{key}", attributes, key, is_own)
        value = attributes.get(key)
        if isinstance(value, types.ModuleType):
            within = above | {id(module)}
            yield from names_in_module(value, f"{label}.{key}", reads, home, is_own=is_own, above=within)


def missing_attributes(function: types.FunctionType, reads: Reads, home: Home) -> Iterator[Name]:
    """Yield attributes of functions of the user's own that code reads and that are not there yet."""
    for owner, label, key in _chains_of(function, reads):
        is_own = isinstance(owner, types.FunctionType) and home.is_own(origin_of_function(owner))
        if is_own and key not in vars(owner) and not hasattr(owner, key):
            yield Name(f"{label}.{key}", vars(owner), key)


def callables_of_libraries(
    function: types.FunctionType, reads: Reads, home: Home
) -> Iterator[tuple[types.ModuleType, Name]]:
    """Yield what can be called that code reads as an attribute of a module of a library, and that module."""
    for owner, label, key in _chains_of(function, reads):
        if isinstance(owner, types.ModuleType) and not home.is_own(origin_of_module(owner.__name__)):
            name = Name(f"{label}.{key}", vars(owner), key)
            if callable(name.read()):
                yield owner, name


def _chains_of(function: types.FunctionType, reads: Reads) -> Iterator[tuple[object, str, str]]:
    """Yield what an attribute is read of by way of a global and modules, what that is called, and the attribute."""
    for root, *keys in reads.chains:
        owner, label = function.__globals__.get(root), root
        for key in keys[:-1]:
            owner = vars(owner).get(key) if isinstance(owner, types.ModuleType) else None
            label = f"{label}.{key}"
        yield unwrap(owner), label, keys[-1]
