"""Which modules code reaches other than by an attribute that it names. This module does not import torch."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

from torchcache.keys.calls import UNKNOWN, Call, Operand, Operands, Uses, parameters_of
from torchcache.keys.origins import is_own_module
from torchcache.keys.places import package_of
from torchcache.keys.scope import Scope

#: Functions that return the module of a name, or what lies in it, by the module and the name they were defined with.
_IMPORTING = frozenset({
    "importlib.import_module", "builtins.__import__", "_frozen_importlib.__import__", "pkgutil.resolve_name",
    "pydoc.locate",
})  # fmt: skip

#: Functions that look up what lies in the module of the code that calls them.
_OF_OWN_MODULE = frozenset({"builtins.globals"})

#: Attributes of a module with which code asks for any of its others.
_WHOLE = frozenset({"__dict__", "__dir__", "__getattr__", "__getattribute__"})

#: What reads no module from ``sys.modules``, and what reads the one of the key that it is given.
_WITHOUT_MODULE = frozenset({"__contains__", "__len__", "keys"})
_BY_KEY = frozenset({"__getitem__", "get", "pop", "setdefault"})


@dataclass(frozen=True, slots=True)
class ModuleName:
    """How code names a module.

    Attributes:
        text: The name, or what it starts with.
        is_whole: Whether the text is the whole name.
    """

    text: str
    is_whole: bool


#: Any module at all.
ANY = ModuleName("", is_whole=False)


class Reached:
    """The modules that a function reaches other than by an attribute that it names, as they are now.

    Args:
        function: The function; it does not live for this.
        uses: Of its code.

    Attributes:
        may_rename: Whether a global or closure variable holds a name, and may hold another one later.
    """

    def __init__(self, function: types.FunctionType, uses: Uses) -> None:
        self.may_rename = False
        self._uses = uses
        self._scope = Scope(function, uses)
        self._home = function.__globals__.get("__name__")
        self._package = package_of(function)
        code = function.__code__
        self._closure = frozenset(code.co_freevars)
        self._parameters = frozenset(parameters_of(code))

    def modules(self) -> list[types.ModuleType]:
        """Return those that the function has a name for."""
        found = [value for value in self._used() if isinstance(value, types.ModuleType)]
        owners = [_owner(operand) for operand in self._uses.read if operand.keys and operand.keys[-1] in _WHOLE]
        found += [value for value in self._scope.values(tuple(owners)) if isinstance(value, types.ModuleType)]
        if any(_name_of(value) in _OF_OWN_MODULE for value in [*self._used(), *self._called()]):
            home = self._scope.module(str(self._home))
            found += [home] if isinstance(home, types.ModuleType) else []
        return list({id(module): module for module in found}.values())

    def names(self) -> set[ModuleName]:
        """Return the names of those that it asks for by name."""
        names = {ANY} if any(_name_of(value) in _IMPORTING or value is sys.modules for value in self._used()) else set()
        for call in self._uses.calls:
            importing = _IMPORTING.intersection(map(_name_of, self._scope.values(call.callee)))
            named = self._named(_argument(call, 0, "name"), self._package_in(call)) if importing else set()
            names |= named
            if any(name.endswith("__import__") for name in importing):  # it returns the outermost package
                names |= {ModuleName(name.text.partition(".")[0], name.is_whole) for name in named}
            for operand in call.callee:
                if operand.keys and operand.keys[-1] not in _WITHOUT_MODULE and self._is_table(_owner(operand)):
                    names |= self._named(_argument(call, 0, "key")) if operand.keys[-1] in _BY_KEY else {ANY}
        for owners, key in self._uses.items:
            if any(map(self._is_table, owners)):
                names |= self._named(key)
        return names

    def _used(self) -> list[object]:
        return self._scope.values(tuple(self._uses.used))

    def _called(self) -> Iterator[object]:
        for call in self._uses.calls:
            yield from self._scope.values(call.callee)

    def _is_table(self, operand: Operand) -> bool:
        return any(value is sys.modules for value in self._scope.values((operand,)))

    def _package_in(self, call: Call) -> str:
        """Return the package that a call gives, from which a relative name starts."""
        given = [value for value in self._scope.values(_argument(call, 1, "package")) if isinstance(value, str)]
        return given[0] if given else self._package

    def _named(self, operands: Operands, package: str = "") -> set[ModuleName]:
        """Return the names that a value may be."""
        names = set()
        for operand in self._origins(operands):
            is_start = operand.kind == "start"
            self.may_rename = self.may_rename or (operand.kind in ("global", "variable") and operand.root != "__name__")
            for value in [operand.root] if is_start else self._scope.values((operand,)):
                name = _resolved(value, package) if isinstance(value, str) else None
                names.add(ANY if name is None else ModuleName(name.partition(":")[0], is_whole=not is_start))
        return names or {ANY}

    def _origins(self, operands: Operands, above: frozenset[Operand] = frozenset()) -> Iterator[Operand]:
        """Yield what a value may come from, through variables; a parameter may be given anything."""
        for operand in operands:
            if operand.kind != "variable" or operand.root in self._closure:
                yield operand
            elif operand.root in self._parameters or operand.keys:
                yield from UNKNOWN
            elif operand not in above:
                yield from self._origins(self._uses.assigned.get(operand.root, UNKNOWN), above | {operand})


class _Found:
    """The modules that were found; callable, so that others that are found are told from it as code is."""

    def __init__(self, modules: list[types.ModuleType]) -> None:
        self.modules = modules

    def __call__(self) -> list[types.ModuleType]:
        return self.modules


class Lookup:
    """The own modules of the names that a function asks for; the same object is read as long as they are the same.

    Args:
        reached: What the function reaches.
    """

    def __init__(self, reached: Reached) -> None:
        self._reached = reached
        self._names = reached.names()
        self._found = _Found([])
        self._asked: tuple[object, ...] = ()

    def get(self, key: str, default: object, /) -> object:  # noqa: ARG002 - there is one key
        """Return what stands for them."""
        names = self._names if not self._reached.may_rename else self._reached.names()  # to find them out takes longer
        # A module that is imported is the last one; one in the place of another counts where it is asked for by name.
        exact = [id(sys.modules.get(name.text)) for name in names if name.is_whole]
        asked = (frozenset(names), len(sys.modules), next(reversed(sys.modules)), *sorted(exact))
        if asked != self._asked:
            self._asked = asked
            modules = own_modules(names)
            if [*map(id, modules)] != [*map(id, self._found.modules)]:
                self._found = _Found(modules)
        return self._found

    def modules(self) -> list[types.ModuleType]:
        """Return them, in the order of their names."""
        return self._found.modules


def own_modules(names: set[ModuleName]) -> list[types.ModuleType]:
    """Return the loaded modules of the user's own that names may mean, in the order of their names."""
    exact = {name.text for name in names if name.is_whole}
    starts = tuple(name.text for name in names if not name.is_whole)
    loaded: dict[str, object] = {**sys.modules}  # it may hold anything
    found = {
        id(module): (main_name(name), module)
        for name, module in loaded.items()
        if isinstance(module, types.ModuleType) and (name in exact or name.startswith(starts)) and is_own_module(name)
    }
    return [module for _, module in sorted(found.values(), key=lambda item: item[0])]


def is_main(module: types.ModuleType) -> bool:
    """Tell whether a module is the program itself, whose globals are also the variables of its loops."""
    return main_name(module.__name__) == "__main__"


def main_name(name: str) -> str:
    """Return the name of a module; in a spawned child the program has another one."""
    return "__main__" if name == "__mp_main__" else name


def _argument(call: Call, place: int, name: str) -> Operands:
    named = dict(call.keywords).get(name)
    if named is not None:
        return named
    return call.positional[place] if len(call.positional) > place else ()


def _owner(operand: Operand) -> Operand:
    return Operand(operand.kind, operand.root, operand.keys[:-1])


def _name_of(value: object) -> str:
    """Return where a function was defined."""
    is_function = isinstance(value, (types.FunctionType, types.BuiltinFunctionType))
    return f"{value.__module__}.{value.__name__}" if is_function else ""  # type: ignore[attr-defined]


def _resolved(name: str, package: str) -> str | None:
    """Return a full name; None for one that is relative to nobody knows what."""
    if not name.startswith("."):
        return name or None
    try:
        # What may follow a front, such as "." alone, is resolved with it.
        return importlib.util.resolve_name(name, package) if name.strip(".") else _package_at(name, package)
    except ImportError:
        return None


def _package_at(dots: str, package: str) -> str | None:
    base = package.rsplit(".", len(dots) - 1)[0]
    return f"{base}." if base else None
