"""Which modules code reaches other than by an attribute that it names. This module does not import torch."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

from torchcache.keys.calls import Call, Uses, parameters_of
from torchcache.keys.operands import UNKNOWN, Operand, Operands
from torchcache.keys.origins import is_own_module, origin_of_module
from torchcache.keys.places import package_of
from torchcache.keys.scope import Scope

#: Functions that return the module of a name, or what lies in it, by the module and the name they were defined with.
_IMPORTING = frozenset({
    "importlib.import_module", "builtins.__import__", "_frozen_importlib.__import__", "pkgutil.resolve_name",
    "pydoc.locate",
})  # fmt: skip

#: Those of them that are given the name of what lies in a module, behind the name of that.
_FINDING_INSIDE = frozenset({"pkgutil.resolve_name", "pydoc.locate"})

#: Functions that tell whether there is a module.
_SEEKING = frozenset({"importlib.util.find_spec", "pkgutil.find_loader", "importlib.find_loader"})

#: Attributes with the globals of a function, and of whatever calls.
_GLOBALS = "__globals__"
_OF_CALLERS = frozenset({"f_globals", "f_locals"})

#: Functions that look up what lies in the module of the code that calls them.
_OF_OWN_MODULE = frozenset({"builtins.globals"})

#: Functions that run text, which may name anything there, and what lies in modules that are there.
_RUNNING_TEXT = frozenset({"builtins.eval", "builtins.exec", "builtins.compile"})

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
        self.may_rename: bool = False
        self._uses = uses
        self._scope = Scope(function)
        self._home = function.__globals__.get("__name__")
        self._package = package_of(function)
        code = function.__code__
        self._closure = frozenset(code.co_freevars)
        self._parameters = frozenset(parameters_of(code))

    def modules(self) -> list[types.ModuleType]:
        """Return those that the function has a name for."""
        used = self._used()
        found = list(used)

        # Those that are asked for any of their attributes.
        asked_whole = [operand for operand in self._uses.read if operand.keys and operand.keys[-1] in _WHOLE]
        owners = tuple(map(_owner, asked_whole))
        found += self._scope.values(owners)

        # Those whose globals are asked for by way of a function.
        for value in self._owners_of_globals():
            if isinstance(value, types.FunctionType):
                found.append(self._scope.module(str(value.__globals__.get("__name__"))))

        # The one of the function itself.
        if self._may_run(_OF_OWN_MODULE | _RUNNING_TEXT):
            found.append(self._scope.module(str(self._home)))

        by_id: dict[int, types.ModuleType] = {}
        for module in found:
            if isinstance(module, types.ModuleType):
                by_id[id(module)] = module
        return list(by_id.values())

    def modules_of_text(self) -> list[types.ModuleType]:
        """Return those whose code may run because the function runs text: those that lie in its own."""
        own = self._scope.module(str(self._home))
        if not isinstance(own, types.ModuleType) or not self._may_run(_RUNNING_TEXT):
            return []
        return [value for value in vars(own).values() if isinstance(value, types.ModuleType)]

    def _may_run(self, functions: frozenset[str]) -> bool:
        """Tell whether it calls one of some functions, or hands it on."""
        return any(_name_of(value) in functions for value in chain(self._used(), self._called()))

    def names(self) -> set[ModuleName]:
        """Return the names of those that it asks for by name."""
        names = set[ModuleName]()
        # What imports, or the table of all modules, goes where it is not followed.
        if any(_name_of(value) in _IMPORTING or value is sys.modules for value in self._used()):
            names.add(ANY)
        # Globals of functions that are not known.
        if not all(isinstance(value, types.FunctionType) for value in self._owners_of_globals()):
            names.add(ANY)
        if any(operand.keys and operand.keys[-1] in _OF_CALLERS for operand in self._uses.read):
            names.add(ANY)
        for call in self._uses.calls:
            names |= self._imported_by(call)
            names |= self._asked_of_table(call)
        for owners, key in self._uses.items:
            if any(map(self._is_table, owners)):
                names |= self._named(key)
        return names

    def _imported_by(self, call: Call) -> set[ModuleName]:
        """Return the names that a call imports, if it is one of a function that imports."""
        importing = _IMPORTING.intersection(map(_name_of, self._scope.values(call.callee)))
        if not importing:
            return set()
        names = self._named(_argument(call, 0, "name"), self._package_in(call))
        if any(name.endswith("__import__") for name in importing):  # it returns the outermost package
            for name in list(names):
                outermost = name.text.partition(".")[0]
                names.add(ModuleName(outermost, name.is_whole))
        if not importing.isdisjoint(_FINDING_INSIDE):
            for name in [name for name in names if name.is_whole]:
                above = name.text
                while above := above.rpartition(".")[0]:
                    names.add(ModuleName(above, is_whole=True))
        return names

    def sought(self) -> set[str]:
        """Return the names of modules that it looks for without importing them."""
        names = set[str]()
        for call in self._uses.calls:
            if not _SEEKING.isdisjoint(map(_name_of, self._scope.values(call.callee))):
                for name in self._named(_argument(call, 0, "name"), self._package_in(call)):
                    names.add(name.text if name.is_whole else "")
        return names - {""}

    def _owners_of_globals(self) -> list[object]:
        owners = [_owner(operand) for operand in self._uses.read if operand.keys[-1:] == (_GLOBALS,)]
        return self._scope.values(tuple(owners))

    def _asked_of_table(self, call: Call) -> set[ModuleName]:
        """Return the names that a call reads from ``sys.modules``, if it is one of a method of that."""
        names = set[ModuleName]()
        for operand in call.callee:
            method = operand.keys[-1] if operand.keys else ""
            if not method or method in _WITHOUT_MODULE or not self._is_table(_owner(operand)):
                continue
            if method in _BY_KEY:
                names |= self._named(_argument(call, 0, "key"))
            else:
                names.add(ANY)
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
        for value in self._scope.values(_argument(call, 1, "package")):
            if isinstance(value, str):
                return value
        return self._package

    def _named(self, operands: Operands, package: str = "") -> set[ModuleName]:
        """Return the names that a value may be."""
        names = set[ModuleName]()
        for operand in self._origins(operands):
            if operand.kind in ("global", "variable") and operand.root != "__name__":
                self.may_rename = True
            is_start = operand.kind == "start"
            values: list[object] = [operand.root]
            if not is_start:
                values = self._scope.values((operand,))
            for value in values:
                names.add(_module_name(value, package, is_whole=not is_start))
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
        names = self._names
        if self._reached.may_rename:  # to find them out takes longer
            names = self._reached.names()
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


class WholeModules:
    """The modules of the user's own whose code counts whole, because it is not known what of it is meant."""

    def __init__(self) -> None:
        self._reached: dict[int, tuple[types.ModuleType, bool]] = {}  # and whether all their data counts
        self._visited: set[tuple[int, bool]] = set()
        self._inner: list[tuple[str, types.ModuleType, bool]] = []  # in them, which count if code says the name
        self._names: set[str] = set()  # of attributes that any of the functions reads, and texts that may name one

    def add_names(self, *names: str) -> None:
        """Add names of attributes that code reads, and texts in it that may name one."""
        self._names.update(names)

    def reach(self, module: types.ModuleType, *, has_data: bool = True) -> None:
        """Note a module whose code counts whole, if it is the user's own.

        Args:
            module: The module.
            has_data: Whether all its data counts as well.
        """
        name = getattr(module, "__name__", None)
        if not isinstance(name, str) or sys.modules.get(name) is not module or origin_of_module(name) is not None:
            return
        counts_data = has_data and not is_main(module)
        known = self._reached.get(id(module))
        if known is not None and known[1]:
            counts_data = True
        self._reached[id(module)] = module, counts_data

    def reach_from(self, reached: Reached) -> None:
        """Note the modules that a function has a name for, and those that text may mean which it runs."""
        for module in reached.modules():
            self.reach(module)
        for module in reached.modules_of_text():
            self.reach(module, has_data=False)

    def add_inner(self, key: str, value: types.ModuleType, owner: types.ModuleType, *, has_data: bool) -> None:
        """Note a module that another one which counts whole holds under a name."""
        self._inner.append((key, value, has_data))
        if value.__name__.startswith(f"{owner.__name__}."):
            self.reach(value, has_data=has_data)

    def waiting(self) -> Iterator[tuple[types.ModuleType, bool]]:
        """Yield each module once, or once more with its data, also those that are reached meanwhile."""
        while (found := self._next()) is not None:
            module, has_all_data = found
            self._visited.add((id(module), has_all_data))
            yield found
            for key, inner, has_data in self._inner:
                if key in self._names:
                    self.reach(inner, has_data=has_data)

    def _next(self) -> tuple[types.ModuleType, bool] | None:
        for number, (module, has_data) in self._reached.items():
            if (number, has_data) not in self._visited:
                return module, has_data
        return None


def own_modules(names: set[ModuleName]) -> list[types.ModuleType]:
    """Return the loaded modules of the user's own that names may mean, in the order of their names."""
    exact = {name.text for name in names if name.is_whole}
    starts = tuple(name.text for name in names if not name.is_whole)
    loaded: dict[str, object] = {**sys.modules}  # it may hold anything
    found: dict[int, tuple[str, types.ModuleType]] = {}
    for name, module in loaded.items():
        is_meant = name in exact or name.startswith(starts)
        if is_meant and isinstance(module, types.ModuleType) and is_own_module(name):
            found[id(module)] = main_name(name), module
    by_name = sorted(found.values(), key=itemgetter(0))
    return [module for _, module in by_name]


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
    if place < len(call.positional):
        return call.positional[place]
    return ()


def _owner(operand: Operand) -> Operand:
    return Operand(operand.kind, operand.root, operand.keys[:-1])


def _name_of(value: object) -> str:
    """Return where a function was defined."""
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return ""
    return f"{value.__module__}.{value.__name__}"


def _module_name(value: object, package: str, *, is_whole: bool) -> ModuleName:
    """Return which module a value names, or the start of whose name it is."""
    name = _resolved(value, package) if isinstance(value, str) else None
    if name is None:
        return ANY
    module, _, _ = name.partition(":")
    return ModuleName(module, is_whole)


def _resolved(name: str, package: str) -> str | None:
    """Return a full name; None for one that is relative to nobody knows what."""
    if not name.startswith("."):
        return name or None
    if not name.strip("."):  # what may follow a front, such as "." alone, is resolved with it
        return _package_at(name, package)
    try:
        return importlib.util.resolve_name(name, package)
    except ImportError:
        return None


def _package_at(dots: str, package: str) -> str | None:
    base = package.rsplit(".", len(dots) - 1)[0]
    return f"{base}." if base else None
