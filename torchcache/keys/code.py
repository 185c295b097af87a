"""The code that can run, as a fingerprint. This module does not import torch.

What is hashed are code objects (see ``bytecode.py``), not source text: the text may have been edited since
it was compiled, cannot tell closures apart, and is missing in a REPL.

The walk starts at a class or a function and follows what its code refers to by name: globals, closure
cells, defaults, attributes of imported modules, imports inside functions. It goes on through code of the
user's own, also where a wrapper of somebody else's hides it, and stops at the standard library, torch, and
other installed distributions, which count by version and files. Where code makes a name when it runs, all that it may
mean counts (``modules.py``, ``operators.py``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchcache.keys.bytecode import Reads, Writes, all_codes, constant, fingerprint_code, is_constant, reads_of
from torchcache.keys.calls import uses_of
from torchcache.keys.changes import CLASS_BOOKKEEPING, Watch, is_container, is_plain_type, items_of
from torchcache.keys.collectives import Talks, held_by
from torchcache.keys.digest import digest_parts
from torchcache.keys.modules import Lookup, Reached, is_main, main_name
from torchcache.keys.operators import (
    ImplementationOf,
    Operators,
    digest_of_file,
    operators_at,
    operators_used,
)
from torchcache.keys.origins import (
    UNCOUNTED,
    find_origin,
    functions_behind,
    is_own_class,
    is_own_module,
    origin_of_class,
    origin_of_function,
    origin_of_module,
    version_of,
)
from torchcache.keys.places import (
    MISSING,
    AttributesOf,
    ClosureOf,
    DefaultsOf,
    ItemsOf,
    Name,
    ResultsOf,
    defaults_of,
    is_module,
    package_of,
    reference,
)
from torchcache.keys.randomness import Draws, leads_to_entropy
from torchcache.keys.reach import Reach, defines
from torchcache.keys.time_limit import TimeLimit

__all__ = [
    "MISSING",
    "CodeWalk",
    "Name",
    "StandIn",
    "Writes",
    "fingerprint_code",
    "is_bound_to_object",
    "is_hook_of_ours",
    "is_own_class",
    "is_own_module",
    "unwrap",
    "walk_code",
]

#: Attributes of a class that are not code and do not change what it computes.
_SKIPPED_CLASS_ATTRIBUTES = CLASS_BOOKKEEPING | {
    "__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__annotate__", "__annotate_func__",
    "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__", "_abc_impl", "__classcell__",
    "cache_instance",
}  # fmt: skip

#: Globals that say where code lies, not what it does; a script's are others in a spawned worker.
_SKIPPED_GLOBALS = frozenset({
    "__name__", "__qualname__", "__module__", "__file__", "__spec__", "__package__", "__loader__", "__builtins__",
    "__doc__", "__annotations__", "__class__",
})  # fmt: skip

#: Attributes of a function that say nothing about what it does.
_SKIPPED_FUNCTION_ATTRIBUTES = frozenset({"cache_instance", "__torchcache_original__"})

#: Methods that make an object and do not run when it is used.
_BUILDERS = frozenset(
    {"__init__", "__new__", "__post_init__", "__setstate__", "__getstate__", "__reduce__", "__repr__"}
)

_BUILTIN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip

#: Wrappers are opened so deep, and so many of the objects in them looked at, to find code of the user's own.
_MOST_DEPTH = 6
_MOST_OBJECTS = 2000

#: So many functions and classes are visited that the code of an installed distribution, the target's own, refers to.
_MOST_OF_LIBRARY = 200

_NUMBERS = (int, float, complex, bool)

#: Names with which code can make results of the state of a random number generator without drawing from it. Arrays and
#: containers have a method ``copy`` too; the module and the function of that name are globals.
_READERS_OF_GENERATORS = frozenset({
    "getstate", "get_state", "clone_state", "graphsafe_get_state", "bit_generator", "_bit_generator", "seed_seq",
    "_seed_seq", "initial_seed", "jumped", "deepcopy", "dumps", "__getstate__", "__reduce__", "__reduce_ex__",
})  # fmt: skip
_COPY = "copy"


@dataclass(slots=True)
class CodeWalk:
    """What a walk found.

    Attributes:
        fingerprint: Digest of all code reached.
        names: Globals, closure cells, defaults and class attributes with values that are more than code.
        writes: What the code that runs changes itself: that is no part of the key.
        parts: What was walked, in this order, such as "function helper", with a digest of its own code. A second
            one of a label is "function helper (2)".
        classes: The classes of the user's own that were visited.
        talks: What the code that runs has to do with other ranks.
        reads_generators: Whether the code that runs may read the state of a random number generator.
        draws: What it may draw random numbers from that no seed decides.
        unseen: Operators that it may call and of which it is not known what runs.
    """

    fingerprint: bytes = b""
    names: list[Name] = field(default_factory=list)
    writes: Writes = field(default_factory=Writes)
    parts: list[tuple[str, bytes]] = field(default_factory=list)
    classes: tuple[type, ...] = ()
    talks: Talks = field(default_factory=Talks)
    reads_generators: bool = False
    draws: Draws = field(default_factory=Draws)
    unseen: list[str] = field(default_factory=list)
    _watch: Watch = field(default_factory=Watch, repr=False, compare=False)

    def has_changed(self) -> bool:
        """Tell whether walking again could give another result.

        That is so if code came, went or was replaced at a name that the walk looked at; data that took the
        place of other data is not asked about. In doubt it says yes. Costs some ten microseconds. Not
        thread-safe: the owner calls it under a lock.
        """
        return self._watch.has_changed()


class StandIn:
    """Stands in place of a function or a bound method of the user's own, and is no function itself."""

    __slots__ = ()

    def stands_for(self) -> Callable[..., object]:
        """Return the function or bound method."""
        raise NotImplementedError


def walk_code(
    target: type | Callable[..., object], parts: Iterable[object] = (), *, entry: str = "forward"
) -> CodeWalk:
    """Walk the code that runs when ``target`` is called.

    Own modules that a function imports when it runs are imported.

    Args:
        target: A function, or a class.
        parts: Classes of the submodules of the module that is called, or that the function uses, and functions
            and other callables that its state holds. The walk keeps none of those callables alive.
        entry: The method of a class that runs; only code reachable from it counts as a writer of
            attributes (a setter that ``forward`` does not call does not hide an attribute).

    Raises:
        TakesTooLongError: If that takes too long.
    """
    target = unwrap(target)  # type: ignore[assignment] # of a function of ours, the user's
    walk = _Walk(home=_home_of(target))
    walk.visit(target, "target")
    entries = {entry, *(() if isinstance(target, type) else walk.reached())}
    roots = {id(part): part for part in (target, *parts) if part is not target or isinstance(part, type)}
    for part in roots.values():
        if isinstance(part, type):
            walk.visit_class(part)
        else:
            entries |= walk.visit_held(part)
    walk.note_what_runs(entries, target)
    walk.note_draws({id(target): target, **roots}.values())
    for part in roots.values():
        walk.note_held(part)
    walk.visit_whole_modules()
    return walk.result()


def unwrap(value: object) -> object:
    """Return the user's own function behind those of ours, own or inherited."""
    while True:
        if isinstance(value, types.FunctionType) and _is_ours(value) and "__wrapped__" in vars(value):
            value = vars(value)["__wrapped__"]
        elif isinstance(value, StandIn):
            value = value.stands_for()
        else:
            return value


def _home_of(target: type | Callable[..., object]) -> str | None:
    """Return the origin of the target, whose code counts wherever it comes from."""
    if isinstance(target, type):
        return origin_of_class(target)
    origins = [origin_of_function(function) for function in functions_behind(target)]
    if not origins:
        return origin_of_module(getattr(target, "__module__", None))
    return next((origin for origin in origins if origin not in UNCOUNTED), origins[0])


class _Walk:
    """One walk; every object is visited once, in an order that only the code decides."""

    def __init__(self, home: str | None) -> None:
        self._home = home  # None: the user's own, which always counts
        self._limit = TimeLimit()
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # ids stay unique while the objects live
        self._found = CodeWalk()
        self._watch = self._found._watch  # noqa: SLF001 - a walk is made here
        self._known_names: set[tuple[int, str]] = set()
        self._function_names: list[Name] = []  # of attributes of functions
        self._functions: dict[str, list[types.FunctionType]] = {}  # by the names they were reached by
        self._classes: list[type] = []
        self._class_names: dict[str, list[type]] = {}  # classes by the names they were reached by
        self._object_classes: list[type] = []
        self._entropy: dict[str, object] = {}  # attributes that lead to it
        self._runnable: dict[str, list[tuple[type | None, types.FunctionType]]] = {}
        self._is_of_library = home is not None and home not in UNCOUNTED
        self._library_left = _MOST_OF_LIBRARY
        self._is_weak = False  # what is visited belongs to somebody's state, and must not live for the walk
        self._attributes: set[str] = set()  # that any of the functions reads, and texts that may name one
        # Modules that code reaches other than by an attribute that it names, and whether all their data counts.
        self._whole: dict[int, tuple[types.ModuleType, bool]] = {}
        self._operators: set[str] = set()
        self._is_aside = False  # what is visited is such a module's: whether any code that runs means it is not known
        self._aside: list[types.FunctionType] = []
        self._inner_modules: list[tuple[str, types.ModuleType, bool]] = []  # in them, which count if code says the name
        self._say(f"python {sys.version_info[0]}.{sys.version_info[1]}")
        if home is not None and self._is_of_library:
            self._say(f"home {home}", version_of(home))

    def result(self) -> CodeWalk:
        found = self._found
        aside = Writes()
        for function in self._aside:
            aside.note(function)
        found.names = [
            name for name in found.names
            if not (name.counts_always and aside.only_counts(name.key, is_container=is_container(name.read())))
        ]  # fmt: skip
        # Notes that a function keeps on another one and does not use.
        found.names += [
            name for name in self._function_names
            if not found.writes.leave_out_attribute(types.FunctionType, name.key, is_container=False)
        ]  # fmt: skip
        found.fingerprint = digest_parts(part for label, digest in found.parts for part in (label.encode(), digest))
        found.parts = _told_apart(found.parts)
        self._watch.seal()
        return found

    # -- visiting ---------------------------------------------------------------------------------------

    def visit_held(self, value: object) -> set[str]:
        """Visit code that lies in a module's state, and hold nothing of it; return the names of what was reached."""
        self._is_weak = True
        known = self.reached()
        self.visit(value, "part")
        self._is_weak = False
        return self.reached() - known

    def reached(self) -> set[str]:
        """Return the names that functions were reached by so far."""
        return set(self._functions)

    def visit(self, value: object, label: str) -> bool:
        """Visit ``value`` if it is code; return False if it is (also) a value of another kind."""
        value = unwrap(value)
        if is_plain_type(type(value)):
            return False
        if isinstance(value, types.FunctionType):
            self._visit_function(value, label)
            return True
        if isinstance(value, type):
            self._class_names.setdefault(_last_name(label), []).append(value)
            self.visit_class(value)
            return True
        operators = operators_at(value)
        if operators is not None:
            self._visit_operators(operators)
            return True
        if isinstance(value, types.ModuleType):
            self._reach_whole(value)
            return self._visit_module(value, label)
        if isinstance(value, _BUILTIN):
            owner = getattr(value, "__objclass__", None) or type(getattr(value, "__self__", None))
            module = str(getattr(value, "__module__", None) or owner.__module__)
            self._say(f"builtin {label}", module, getattr(value, "__qualname__", ""))
            return not is_bound_to_object(value)
        if isinstance(value, (staticmethod, classmethod, property)):
            self._say(f"{type(value).__name__} {label}")
            for name in _inside(value, weak=self._is_weak):
                self._visit_inner(name, f"{label}.{name.key}" if isinstance(value, property) else label)
            parts = [value.fget, value.fset, value.fdel] if isinstance(value, property) else [value.__func__]
            return all(part is None or isinstance(part, types.FunctionType) for part in parts)
        if isinstance(value, types.MethodType):
            self.visit(value.__func__, label)
            return self.visit(value.__self__, f"{label}.__self__")
        if is_container(value):
            self._visit_items(value, label)
        elif (text := _script_of(value)) is not None:
            self._say(f"script {label}", text)
        elif self._leads_to_own(value):
            if isinstance(value, functools._lru_cache_wrapper):  # noqa: SLF001 - its type has no other name
                self._found.names.append(Name(f"results of {label}", ResultsOf(value), "results"))
            self._visit_object(value, label)
        return False

    def _visit_module(self, module: types.ModuleType, label: str) -> bool:
        """Note a module, of which count the attributes that code names; return False if it is loaded under no name."""
        name = getattr(module, "__name__", None)
        self._stop_at(origin_of_module(name), label, name if isinstance(name, str) else "")
        return sys.modules.get(str(name)) is module

    def _reach_whole(self, module: types.ModuleType, *, has_data: bool = True) -> None:
        """Note a module whose code counts whole, if it is the user's own."""
        name = getattr(module, "__name__", None)
        if isinstance(name, str) and sys.modules.get(name) is module and origin_of_module(name) is None:
            known = self._whole.get(id(module), (module, False))[1]
            self._whole[id(module)] = module, known or (has_data and not is_main(module))

    def visit_class(self, cls: type) -> None:
        """Visit a class, its metaclass, its bases, their methods and class attributes."""
        for base in cls.__mro__:
            origin = origin_of_class(base)
            if not self._is_own(origin):
                self._stop_at(origin, base.__qualname__, base.__module__)
                self._watch_entries(base)
                continue
            if self._again("class", base, base.__name__):
                continue
            self._classes.append(base)
            self._class_names.setdefault(base.__name__, []).append(base)
            self._watch.add_class(base)
            self._watch.add_whole(vars(base))
            kept = {name: value for name, value in sorted(vars(base).items()) if _counts(name, value)}
            self._say(f"class {base.__name__}", " ".join(kept), *(b.__name__ for b in base.__bases__))
            if type(base) is not type:
                self.visit_class(type(base))
            for name, value in kept.items():
                original = _original_of(value) if _is_ours(value) else None
                if original is not None:
                    value = original  # noqa: PLW2901 - what the class said itself
                    self.visit(value, f"{base.__name__}.{name}")
                    continue
                self._note_entropy(name, value)
                place = Name(f"{base.__name__}.{name}", vars(base), name, origin is None)
                self._visit_name(place, place.label, is_data=not name.startswith("__"))

    def _watch_entries(self, cls: type) -> None:
        """Watch how a class of a library is called, and visit what a user put in place of that."""
        for key in ("forward", "__call__", "_call_impl"):
            if key in vars(cls):
                name = Name(f"{cls.__qualname__}.{key}", vars(cls), key, is_own=False)
                value = name.read()
                self._watch.add(name, value)
                if isinstance(value, types.FunctionType) and self._leads_to_own(value):
                    self.visit(value, key)

    def _visit_function(self, function: types.FunctionType, label: str) -> None:
        origin = origin_of_function(function)
        if not self._is_own(origin):
            # A wrapper took its name and its module from what it wraps.
            is_wrapper = origin != "torchcache" and self._leads_to_own(function)
            made_as = function.__code__.co_name if is_wrapper else function.__qualname__
            self._stop_at(origin, label, f"{function.__globals__.get('__name__')}.{made_as}")
            if is_wrapper and not self._again("inside", function, label):
                self._watch.add_function(function, weak=self._is_weak)
                for name in _inside(function, weak=self._is_weak):
                    self._visit_inner(name, label, is_data=not name.key.startswith("__"))
            return
        self._functions.setdefault(_last_name(label), []).append(function)
        if self._again("function", function, label):
            return
        if self._is_aside:
            self._aside.append(function)
        is_own = origin is None
        self._watch.add_function(function, weak=self._is_weak)
        self._say(f"function {label}", *self._code_of(function))
        self._visit_defaults(function, is_own=is_own)
        closure = ClosureOf(weakref.ref(function)) if self._is_weak else None
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if key == "__class__":
                self._visit_home_of_super(cell)
                continue
            name = Name(f"{function.__name__}.{key}", cell if closure is None else closure, key, is_own)
            self._visit_root(name, function, is_own=is_own)
        self._note_environment(function)
        self._visit_attributes_of_function(function, label, is_own=is_own)
        was_weak, self._is_weak = self._is_weak, False  # globals are nobody's state
        self._visit_globals(function, is_own=is_own)
        self._is_weak = was_weak

    def _visit_globals(self, function: types.FunctionType, *, is_own: bool) -> None:
        reads = reads_of(function.__code__)
        if not is_own:
            self._visit_globals_of_library(function, reads)
            return
        for key in reads.names:
            if key not in _SKIPPED_GLOBALS:
                self._visit_root(Name(key, function.__globals__, key, is_own), function, is_own=is_own)
        self._follow_chains(function, reads, is_own=is_own)
        for level, module, wanted in reads.imports:
            self._follow_import(function, level, module, wanted, is_own=is_own)
        self._follow_uses(function)

    def _visit_root(self, name: Name, function: types.FunctionType, *, is_own: bool) -> None:
        """Visit what lies at a name that a function reads; of a module, the attributes that the function names."""
        value = name.read()
        self._visit_name(name, name.key, is_followed=True)
        if isinstance(value, types.ModuleType):
            self._follow_module(value, name.key, reads_of(function.__code__), is_own=is_own)

    def _follow_uses(self, function: types.FunctionType) -> None:
        """Note operators, and the modules that a function reaches other than by an attribute that it names."""
        reads, uses = reads_of(function.__code__), uses_of(function.__code__)
        self._attributes.update(reads.attributes, _identifiers_in(function))
        for operators in operators_used(function, uses):
            self._visit_operators(operators)
        reached = Reached(function, uses)
        for module in reached.modules():
            self._reach_whole(module)
        names = reached.names()
        for text in sorted(name.text for name in names if name.is_whole):
            self._import_named(text)
        if names:
            lookup = Lookup(reached)
            self._watch.add(Name(f"modules of {function.__name__}", lookup, ""), lookup.get("", None))
            for module in lookup.modules():
                self._reach_whole(module, has_data=any(name.text for name in names))

    def _visit_operators(self, operators: Operators) -> None:
        """Visit what runs behind operators of ``torch.ops``."""
        if operators.name in self._operators:
            return
        self._operators.add(operators.name)
        self._say(f"operators {operators.name}")
        place = ImplementationOf(operators)
        found: Any = place.get("", None)
        self._watch.add(Name(f"operators {operators.name}", place, ""), found)
        for name, function in found.functions:
            self.visit(function, name.partition("::")[2])  # as code names it
        for origin in found.origins:
            self._stop_at(origin, f"operators {operators.name}", origin)
        for path in found.files:
            self._say(f"library {Path(path).name}", digest_of_file(path))
        self._found.unseen += found.unseen

    def _import_named(self, module: str) -> None:
        """Import a module of the user's own that code names in a text; note the version of a library's."""
        try:
            origin = find_origin(module)
        except Exception:  # noqa: BLE001 - the search runs the user's code, too
            self._watch.add(Name(module, sys.modules, module), MISSING)
            return
        if self._is_own(origin):
            self._import(module)
        else:
            self._stop_at(origin, f"import {module}", module)

    def _note_environment(self, function: types.FunctionType) -> None:
        """Note the variables of the environment that a function may ask for: each text in it that could name one."""
        reads = reads_of(function.__code__)
        if not {"environ", "getenv"} & {*reads.names, *reads.attributes}:
            return
        for text in _identifiers_in(function):
            self._found.names.append(Name(f"environment {text}", os.environ, text))

    def _visit_globals_of_library(self, function: types.FunctionType, reads: Reads) -> None:
        """Visit the code that the target's own distribution refers to, in part: a large one leads everywhere.

        Its version counts for the rest, and numbers that somebody may set count by value.
        """
        for key in reads.names:
            value = function.__globals__.get(key, MISSING)
            is_number = type(value) in _NUMBERS and not key.startswith("_")
            if not (is_number or (self._library_left > 0 and isinstance(value, (types.FunctionType, type)))):
                continue
            self._library_left -= not is_number
            self._visit_name(Name(key, function.__globals__, key, is_own=False), key)

    def _code_of(self, function: types.FunctionType) -> Iterator[bytes]:
        """Yield the code and the defaults that are constants."""
        yield fingerprint_code(function.__code__)
        for key, value in defaults_of(function):
            yield key.encode()
            yield constant(value) if is_constant(value) else b"by value"

    def _visit_defaults(self, function: types.FunctionType, *, is_own: bool) -> None:
        place = DefaultsOf(reference(function, weak=self._is_weak))
        for key, value in defaults_of(function):
            if not is_constant(value):
                self._visit_name(Name(f"{function.__name__}({key})", place, key, is_own), key)
        keywords = function.__kwdefaults__ or {}
        if keywords and not self._is_weak:
            for key, value in keywords.items():
                if is_constant(value):
                    self._watch.add_exactly(keywords, key, value)
            self._watch.add_whole(keywords)

    def _visit_home_of_super(self, cell: types.CellType) -> None:
        """Visit the class whose ``super()`` a function uses, unless that is how the function was found."""
        try:
            cls = cell.cell_contents
        except ValueError:
            return
        if isinstance(cls, type) and id(cls) not in self._seen:
            self.visit_class(cls)

    def _visit_attributes_of_function(self, function: types.FunctionType, label: str, *, is_own: bool) -> None:
        attributes = vars(function)
        place: Any = AttributesOf(weakref.ref(function)) if self._is_weak else attributes
        for key in sorted(filter(_is_text, attributes)):
            if key not in _SKIPPED_FUNCTION_ATTRIBUTES:
                name = Name(f"{label}.{key}", place, key, is_own)
                if not self._visit_name(name, key, is_data=False) and not key.startswith("__"):
                    self._function_names.append(name)

    def _visit_name(self, name: Name, label: str, *, is_data: bool = True, is_followed: bool = False) -> bool:
        """Visit what lies at a name now, and note it; return False if it is (also) data.

        Args:
            name: The name.
            label: What to call what lies there.
            is_data: Whether data counts that lies there.
            is_followed: Whether who calls knows which attributes of a module are meant.
        """
        name = replace(name, counts_always=True) if self._is_aside else name
        value = name.read()
        if not name.is_own and self._is_of_library and is_container(value):  # a table of it: its version counts
            return True
        if name.key.startswith("_torchdynamo"):  # torch notes addresses on the functions it wraps
            return True
        if not isinstance(name.place, ItemsOf):  # of what cannot change, whose holder is watched
            self._watch.add(name, value, weak=self._is_weak)
        if value is MISSING or self._visit_what_lies_there(value, label, is_followed=is_followed):
            return True
        if is_data and (id(name.place), name.key) not in self._known_names:
            self._known_names.add((id(name.place), name.key))
            self._found.names.append(name)
        return False

    def _visit_what_lies_there(self, value: object, label: str, *, is_followed: bool) -> bool:
        if is_followed and isinstance(value, types.ModuleType):
            return self._visit_module(value, label)
        return self.visit(value, label)

    def _visit_inner(self, name: Name, label: str, *, is_data: bool = False) -> None:
        """Visit what lies inside an object of a library, if it is of the user's own, or plain data beside it."""
        value = name.read()
        if value is not MISSING and self._leads_to_own(value):
            kind = type(value)
            is_own = kind not in _OPENED and not is_container(value) and self._is_own(origin_of_class(kind))
            self._visit_name(Name(name.label, name.place, name.key, is_own), label, is_data=is_data)
        elif is_data and value is not MISSING and is_constant(value):
            self._visit_name(name, label)

    def _visit_items(self, container: object, label: str) -> None:
        """Visit the code in a container; its data counts by value, with what holds it."""
        if isinstance(container, Mapping):
            items = [(_key_name(key), value) for key, value in container.items()]
        else:
            items = [("", value) for value in items_of(container)]
            if isinstance(container, (set, frozenset)):
                items.sort(key=lambda item: _sorting_name(item[1]))
        if getattr(container, "default_factory", None) is not None:
            items.append(("default_factory", container.default_factory))  # type: ignore[attr-defined]
        items = [(key, value) for key, value in items if self._leads_to_own(value)]
        if items and not self._again("container", container, label):
            for key, value in items:
                self.visit(value, f"{label}[{key}]")

    def _visit_object(self, value: Any, label: str) -> None:  # noqa: ANN401 - an object of any class
        """Visit the class of an object, and the code that lies in its attributes."""
        if self._again("object", value, label):
            return
        origin = origin_of_class(type(value))
        self.visit_class(type(value))
        self._object_classes.append(type(value))
        if is_module(value):
            for module in value.modules():
                self.visit_class(type(module))
                self._visit_code_of_module(module, label)
            return
        if isinstance(value, (functools.partial, functools.partialmethod)):
            for name in _inside(value, weak=self._is_weak):
                self._visit_name(name, _label_inside(label, name.key), is_data=not self._is_weak)
            return
        is_own = self._is_own(origin)
        for name in _inside(value, weak=self._is_weak):
            held = name.read()
            self._note_entropy(name.key, held)
            if self._leads_to_own(held):
                self._visit_inner(name, _label_inside(label, name.key))
            elif is_own:
                self._watch.add(name, held, weak=self._is_weak)
            elif origin != "torch" and name.key[:1] != "_" and is_constant(held):
                self._say(f"setting {label}.{name.key}", constant(held))
        if is_own and not self._is_weak and isinstance(attributes := getattr(value, "__dict__", None), dict):
            self._watch.add_whole(attributes, data_may_come=True)

    def _visit_code_of_module(self, module: object, label: str) -> None:
        """Visit functions and hooks that a torch module holds; its other attributes count by value."""
        for name in _inside(module, weak=self._is_weak):
            if name.key not in _MODULE_TENSORS:
                self._visit_inner(name, f"{label}.{name.key}")

    # -- through modules and imports --------------------------------------------------------------------

    def _follow_module(
        self, module: types.ModuleType, label: str, reads: Reads, *, is_own: bool, above: frozenset[int] = frozenset()
    ) -> None:
        """Visit those attributes of a module of the user's own that the code can mean."""
        if not self._is_own(origin_of_module(getattr(module, "__name__", None))) or id(module) in above:
            return
        for key in reads.attributes:
            if key not in vars(module) and "__getattr__" in vars(module):
                self._visit_name(Name(f"{label}.__getattr__", vars(module), "__getattr__", is_own), "__getattr__")
            self._visit_name(Name(f"{label}.{key}", vars(module), key, is_own), key, is_followed=True)
            value = vars(module).get(key)
            if isinstance(value, types.ModuleType):
                self._follow_module(value, f"{label}.{key}", reads, is_own=is_own, above=above | {id(module)})

    def _follow_chains(self, function: types.FunctionType, reads: Reads, *, is_own: bool) -> None:
        """Visit attributes of functions, and what a user put into a module of a library, such as a faster kernel."""
        for root, *keys in reads.chains:
            owner, label = function.__globals__.get(root), root
            for key in keys[:-1]:
                owner = vars(owner).get(key) if isinstance(owner, types.ModuleType) else None
                label = f"{label}.{key}"
            owner, key = unwrap(owner), keys[-1]
            if isinstance(owner, types.FunctionType):
                if key not in vars(owner) and self._is_own(origin_of_function(owner)) and not hasattr(owner, key):
                    self._watch.add(Name(f"{label}.{key}", vars(owner), key), MISSING)
            elif isinstance(owner, types.ModuleType) and not self._is_own(origin_of_module(owner.__name__)):
                value = vars(owner).get(key)
                if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
                    name = Name(f"{label}.{key}", vars(owner), key, is_own)
                    self._watch.add(name, value)
                    if self._leads_to_own(value):
                        self.visit(value, key)

    def _follow_import(
        self, function: types.FunctionType, level: int, module: str, wanted: tuple[str, ...], *, is_own: bool
    ) -> None:
        """Follow an import inside a function."""
        try:
            full = importlib.util.resolve_name("." * level + module, package_of(function)) if level else module
            origin = find_origin(full)
        except Exception:  # noqa: BLE001 - the search runs the user's code, too
            self._watch.add(Name(module, sys.modules, module), MISSING)
            return
        if not self._is_own(origin):
            self._stop_at(origin, f"import {module}", full)
            return
        loaded = self._import(full)
        if loaded is None:
            return
        reads = reads_of(function.__code__)
        for key in wanted:
            if key not in vars(loaded) and hasattr(loaded, "__path__"):
                self._import(f"{full}.{key}")
            self._visit_name(Name(f"{module}.{key}", vars(loaded), key, is_own), key, is_followed=True)
            value = vars(loaded).get(key)
            if isinstance(value, types.ModuleType):
                self._follow_module(value, key, reads, is_own=is_own)
        if not wanted:
            for name in dict.fromkeys([full.partition(".")[0], full]):
                found = self._import(name)
                if found is not None:
                    self._follow_module(found, name, reads, is_own=is_own)

    def _import(self, module: str) -> types.ModuleType | None:
        """Return a module of the user's own, imported if it is not loaded; None if that fails."""
        try:
            loaded = sys.modules.get(module) or importlib.import_module(module)
        except Exception:  # noqa: BLE001 - a module that cannot be imported is as good as missing
            loaded = None
        self._watch.add(Name(module, sys.modules, module), MISSING if loaded is None else loaded)
        return loaded

    # -- what the code does when it runs -----------------------------------------------------------------

    def visit_whole_modules(self) -> None:
        """Visit all code of the modules that code reaches other than by an attribute that it names.

        Last, because what of it runs is not known: it counts, and says nothing of what the code that runs does.
        """
        self._found.classes = tuple(self._classes)
        self._is_aside = True
        visited: set[tuple[int, bool]] = set()
        while waiting := [item for item in self._whole.items() if (item[0], item[1][1]) not in visited]:
            number, (module, has_data) = waiting[0]
            visited.add((number, has_data))
            self._visit_whole_module(module, has_data=has_data)
            for key, inner, has_data in self._inner_modules:
                if key in self._attributes:
                    self._reach_whole(inner, has_data=has_data)

    def _visit_whole_module(self, module: types.ModuleType, *, has_data: bool) -> None:
        """Visit all code of a module, and all its data, or only what is called as constants are."""
        label = main_name(module.__name__)
        self._say(f"whole module {label}")
        self._watch.add_whole(vars(module), data_may_come=True)
        for key, value in sorted(vars(module).items()):
            name = Name(f"{label}.{key}", vars(module), key)
            if key in _SKIPPED_GLOBALS or (key.startswith("__") and key != "__getattr__"):
                continue
            if isinstance(value, types.ModuleType):
                self._watch.add(name, value)
                self._inner_modules.append((key, value, has_data))
                if value.__name__.startswith(f"{module.__name__}."):
                    self._reach_whole(value, has_data=has_data)
            elif has_data or key.isupper():
                self._visit_name(name, key)
            elif type(value) in _OPENED or isinstance(value, (type, *_BUILTIN)):
                self._visit_name(name, key, is_data=False)
            elif is_container(value):
                self._visit_items(value, key)
            elif self._leads_to_own(value):  # it may be another one at each call
                self.visit_class(type(value))

    def note_what_runs(self, entries: set[str], target: object) -> None:
        """Note what the code that runs from ``entries`` on, followed by name through all classes, writes and reads.

        If ``target`` is a method, the names that classes give it are entries too.

        And whether it talks to other ranks, or asks for its own.

        What only builds an object is left aside, and methods that Python calls by itself are not.
        """
        by_name: dict[str, list[tuple[type | None, types.FunctionType]]] = {}
        methods: set[int] = set()
        for cls in self._classes:
            for name, attribute in vars(cls).items():
                for function in self._own_functions_in(attribute):
                    by_name.setdefault(name, []).append((cls, function))
                    methods.add(id(function))
        for label, functions in self._functions.items():
            for function in functions:
                for found in () if id(function) in methods else self._own_functions_in(function):
                    for name in {label, function.__name__}:
                        by_name.setdefault(name, []).append((None, found))
        targets = set() if isinstance(target, type) else {id(function) for function in self._own_functions_in(target)}
        entries = entries | {
            name
            for name, found in by_name.items()
            if any(owner and id(function) in targets for owner, function in found)
        }
        self._runnable = by_name
        special = {name for name in by_name if name.startswith("__") and name not in _BUILDERS}
        waiting, known = sorted({*entries, *special} - _BUILDERS), {*entries, *special, *_BUILDERS}
        noted: set[tuple[type | None, int]] = set()
        talks = self._found.talks = Talks(held_by(self._classes))
        while waiting:
            for owner, function in by_name.get(waiting.pop(), ()):
                if (owner, id(function)) in noted:
                    continue
                noted.add((owner, id(function)))
                self._limit.check()
                self._found.writes.note(function, owner)
                talks.note(function)
                reads = reads_of(function.__code__)
                reached = {*reads.attributes, *reads.names}
                if _COPY in reads.names or not _READERS_OF_GENERATORS.isdisjoint(reached):
                    self._found.reads_generators = True
                waiting.extend(reached - known)
                known |= reached

    def note_draws(self, roots: Iterable[object]) -> None:
        """Note what the code that runs may draw random numbers from.

        A false alarm turns a cache off, so this looks closer at what runs than ``note_what_runs``: of a class that is
        used, other methods may draw.

        Args:
            roots: The target, and the code in its state.
        """
        roots = list(roots)
        methods = {name for name, found in self._runnable.items() if any(owner is not None for owner, _ in found)}
        functions = dict(self._runnable)
        for label, found in self._functions.items():
            table, bracket, _ = label.partition("[")
            if bracket:  # code says the name of the table
                functions[table] = [*functions.get(table, ()), *((None, function) for function in found)]
        live = [*self._object_classes, *(root for root in roots if isinstance(root, type))]
        target = roots[0]
        is_map = isinstance(target, type) and defines(target, "__getitem__") and not defines(target, "forward")
        reach = Reach(functions, self._class_names, live, self._own_code_in, is_map=is_map)
        for root in roots:
            if not isinstance(root, type):
                reach.follow(root)
        draws = self._found.draws = Draws(dict(self._entropy), methods)
        for function in reach.run():
            self._limit.check()
            draws.note(function)

    def _note_entropy(self, key: str, value: object) -> None:
        """Note an attribute that leads to entropy."""
        if leads_to_entropy(value):
            self._entropy[key] = value

    def note_held(self, value: object) -> None:
        """Note that the state holds something that talks to other ranks or draws; the code that runs may use it."""
        self._found.talks.note_value(value)
        self._found.draws.note_held(value)

    def _own_functions_in(self, value: object) -> list[types.FunctionType]:
        """Return the functions of the user's own that calling ``value`` runs, through wrappers of anybody's."""
        return [
            found for found in _opened(value, self._is_own)
            if isinstance(found, types.FunctionType) and self._is_own(origin_of_function(found))
        ]  # fmt: skip

    def _own_code_in(self, value: object) -> Iterator[types.FunctionType | type]:
        """Yield the functions of the user's own that lie in a value, and the classes of what else does."""
        for found in _opened(value, self._is_own, into_own=False):
            if isinstance(found, types.FunctionType):
                if self._is_own(origin_of_function(found)):
                    yield found
            elif not isinstance(found, types.ModuleType):
                yield found if isinstance(found, type) else type(found)

    # -- where it stops -----------------------------------------------------------------------------------

    def _leads_to_own(self, value: object) -> bool:
        """Tell whether code of the user's own lies in an object, perhaps behind code of a library."""
        for found in _opened(value, self._is_own, into_own=False):
            if isinstance(found, types.FunctionType):
                if self._is_own(origin_of_function(found)):
                    return True
            elif operators_at(found) is not None:
                return True
            elif isinstance(found, types.ModuleType):
                if found is sys.modules.get(found.__name__) and origin_of_module(found.__name__) is None:
                    return True
            elif self._is_own(origin_of_class(found if isinstance(found, type) else type(found))):
                return True
        return False

    def _is_own(self, origin: str | None) -> bool:
        return origin is None or (origin == self._home and origin not in UNCOUNTED)

    def _stop_at(self, origin: str | None, label: str, name: str) -> None:
        if self._is_own(origin):
            self._say(f"module {label}")
        elif origin is None or origin in UNCOUNTED:
            self._say(f"foreign {label}", name)
        else:
            self._say(f"foreign {label}", name, origin, version_of(origin))

    def _again(self, kind: str, value: object, label: str) -> bool:
        self._limit.check()
        number = self._seen.get(id(value))
        if number is None:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            return False
        self._say(f"{kind} {label} again", str(number))
        return True

    def _say(self, label: str, *words: str | bytes) -> None:
        self._found.parts.append((label, digest_parts(w.encode() if isinstance(w, str) else w for w in words)))


def _told_apart(parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Give a number to each further part of one label."""
    counts = Counter[str]()
    numbered = []
    for label, digest in parts:
        counts[label] += 1
        numbered.append((label if counts[label] == 1 else f"{label} ({counts[label]})", digest))
    return numbered


#: Attributes of a torch module that hold no code of their own: its children are visited one by one.
_MODULE_TENSORS = frozenset({"_parameters", "_buffers", "_modules"})

#: Kinds of objects that are nothing but a way to other code.
_OPENED = frozenset({
    types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.partial,
    functools.partialmethod, functools.cached_property, functools.singledispatchmethod,
})  # fmt: skip


def _is_ours(value: object) -> bool:
    """Tell a function of ours from one of the user's own around it, to which ``functools.wraps`` copied the mark."""
    function = value.__func__ if isinstance(value, staticmethod) else value
    return (
        isinstance(function, types.FunctionType)
        and "__torchcache_original__" in vars(function)
        and origin_of_function(function) == "torchcache"
    )


def _original_of(value: Any) -> object:  # noqa: ANN401 - a function of ours, or a static method of it
    """Return what a class itself has where a function of ours stands, or None."""
    function = value.__func__ if isinstance(value, staticmethod) else value
    return vars(function)["__torchcache_original__"]


def is_hook_of_ours(name: str, value: object) -> bool:
    """Tell whether an entry of a module's ``__dict__`` was put there by torchcache, for how it is called and copied."""
    if name == "forward":
        return hasattr(value, "__torchcache_original__")
    owner = getattr(value, "__self__", None) if name in _COPYING else None
    return hasattr(owner, "__torchcache_original__")


#: How a module is copied.
_COPYING = ("__getstate__", "_replicate_for_data_parallel")


def is_bound_to_object(value: object) -> bool:
    """Tell whether a function of C is a method of an object, which is data beside it."""
    owner = getattr(value, "__self__", None)
    is_code = owner is None or isinstance(owner, (type, types.ModuleType))
    return not is_code and type(owner).__name__ != "PyCapsule"  # as functions of pybind11 have one


def _counts(name: object, value: object) -> bool:
    """Tell whether an attribute of a class is part of what the user wrote."""
    if not isinstance(name, str) or name in _SKIPPED_CLASS_ATTRIBUTES:
        return False
    if name.startswith(("torchcache_", "__torchcache_", "__jit_unused_properties__")):
        return False
    # Ours may stand in for what the class inherits.
    return not _is_ours(value) or _original_of(value) is not None


def _opened(value: object, is_own: Callable[[str | None], bool], *, into_own: bool = True) -> Iterator[object]:
    """Yield functions, classes and objects that lie in a value, itself included, nearest first.

    Objects of libraries are opened if they are containers, wrappers or descriptors; functions of the user's
    own by their closures.
    """
    waiting, known = [(unwrap(value), 0)], {id(value)}
    kept = []
    for _ in range(_MOST_OBJECTS):
        if not waiting:
            return
        found, depth = waiting.pop(0)
        kept.append(found)  # so that ids stay unique
        kind = type(found)
        if is_plain_type(kind):
            continue
        inner: Iterable[object] = ()
        if is_container(found):
            inner = [*items_of(found), getattr(found, "default_factory", None)]
        elif isinstance(found, (type, types.ModuleType, *_BUILTIN)):
            yield found
        else:
            if kind not in _OPENED or kind is types.FunctionType:
                yield found
            if isinstance(found, types.FunctionType):
                origin = origin_of_function(found)
                if origin == "torchcache" or (is_own(origin) and not into_own):
                    continue
                inner = [name.read() for name in _inside(found, weak=False, closure_only=is_own(origin))]
            elif kind in _OPENED or (into_own is False and _is_wrapper(kind)) or kind is _LRU_CACHE:
                inner = [name.read() for name in _inside(found, weak=False)]
            if is_module(found):
                inner = [*inner, *(type(m) for m in found.modules())]  # type: ignore[attr-defined]
        if depth < _MOST_DEPTH:
            for item in inner:
                item = unwrap(item)  # noqa: PLW2901 - the user's function in place of ours
                if item is not MISSING and id(item) not in known:
                    known.add(id(item))
                    waiting.append((item, depth + 1))


_LRU_CACHE = type(functools.lru_cache(len))


def _is_wrapper(kind: type) -> bool:
    """Tell whether objects of a class are called, or stand for an attribute."""
    return any("__call__" in vars(base) or "__get__" in vars(base) for base in kind.__mro__)


def _inside(value: Any, *, weak: bool, closure_only: bool = False) -> list[Name]:  # noqa: ANN401 - of any kind
    """Return the names of what lies inside a function, a wrapper or an object, in an order that is always the same."""
    if isinstance(value, types.FunctionType):
        closure = ClosureOf(weakref.ref(value)) if weak else None
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        names = [
            Name(key, cell if closure is None else closure, key, is_own=False)
            for key, cell in cells
            if key != "__class__"
        ]
        if closure_only:
            return names
        defaults = DefaultsOf(reference(value, weak=weak))
        names += [Name(key, defaults, key, is_own=False) for key, _ in defaults_of(value)]
        return names + _attributes(value, weak=weak)
    if isinstance(value, property):
        parts: dict[str, object] = {"fget": value.fget, "fset": value.fset, "fdel": value.fdel}
        return [Name(key, ItemsOf({key: part}), key) for key, part in parts.items() if part is not None]
    if isinstance(value, (staticmethod, classmethod)):
        return [Name("__func__", ItemsOf({"__func__": value.__func__}), "__func__")]
    if isinstance(value, types.MethodType):
        parts = {"__func__": value.__func__, "__self__": value.__self__}
        return [Name(key, ItemsOf(parts), key) for key in parts]
    if isinstance(value, (functools.partial, functools.partialmethod)):
        parts = {"func": value.func, **{str(i): item for i, item in enumerate(value.args)}}
        names = [Name(key, ItemsOf(parts), key) for key in parts]
        keywords = ItemsOf(dict(value.keywords)) if weak else value.keywords
        return names + [Name(key, keywords, key) for key in sorted(value.keywords)]
    return _attributes(value, weak=weak)


def _attributes(value: object, *, weak: bool) -> list[Name]:
    """Return the names of an object's attributes, those in slots too."""
    try:
        held = AttributesOf(weakref.ref(value) if weak else lambda: value)
    except TypeError:
        return []
    attributes = getattr(value, "__dict__", None)
    names = []
    if isinstance(attributes, dict):
        place: Any = held if weak else attributes
        names = [Name(key, place, key) for key in sorted(filter(_is_text, attributes))]
    for base in type(value).__mro__:
        if origin_of_class(base) is None:
            slots = sorted(key for key, slot in vars(base).items() if isinstance(slot, types.MemberDescriptorType))
            names += [Name(key, held, key) for key in slots]
    return names


def _identifiers_in(function: types.FunctionType) -> list[str]:
    """Return the texts in a function's code that could be names."""
    texts = {value for code in all_codes(function.__code__) for value in code.co_consts if type(value) is str}
    return sorted(filter(str.isidentifier, texts))


def _script_of(value: object) -> str | None:
    """Return the text of what torch.jit compiled, without the places of its source; None of anything else."""
    module = str(type(value).__module__)  # of what Cython compiled, it may be no text
    if module.partition(".")[0] != "torch" or not hasattr(type(value), "inlined_graph"):
        return None
    try:
        graph = str(value.inlined_graph)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - not every compiled object has one
        return None
    return "\n".join(line.partition(" # ")[0] for line in graph.splitlines())


def _last_name(label: str) -> str:
    """Return the name that code reads of a label."""
    return label.rpartition(".")[2]


def _label_inside(label: str, key: str) -> str:
    """Name what lies in a wrapper: the one function in it as the wrapper itself, which code calls by that name."""
    return label if key in ("__wrapped__", "func", "pyfunc") else f"{label}.{key}"


def _is_text(key: object) -> bool:
    return isinstance(key, str)


def _key_name(key: object) -> str:
    """Name a key of a table of functions where its name is always the same."""
    if isinstance(key, type):
        return key.__qualname__
    return key if type(key) is str else ""


def _sorting_name(value: object) -> bytes:
    """Return what orders the code in a set the same in every process, as well as can be."""
    if isinstance(value, types.FunctionType):
        return value.__qualname__.encode() + fingerprint_code(value.__code__)
    return str(getattr(value, "__qualname__", type(value).__qualname__)).encode()
