"""Visits code and what it refers to, object by object, from where ``code.py`` starts.

This module does not import torch.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchcache.keys.calls import uses_of
from torchcache.keys.canonical import constant, is_constant
from torchcache.keys.changes import is_container, is_plain_type
from torchcache.keys.displaced import name_elsewhere
from torchcache.keys.home import Home
from torchcache.keys.imports import Imports, callables_of_libraries, missing_attributes, names_in_module
from torchcache.keys.inside import (
    BUILTIN,
    OPENED,
    attributes_that_count,
    is_bound_to_object,
    is_text,
    label_inside,
    last_name,
    named_items,
    names_inside,
    script_of,
)
from torchcache.keys.modules import Lookup, Reached, WholeModules, main_name
from torchcache.keys.operators import ImplementationOf, Operators, digest_of_file, operators_at, operators_used
from torchcache.keys.origins import origin_of_class, origin_of_function, origin_of_module
from torchcache.keys.ours import is_ours, original_of, unwrap
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
    reference,
)
from torchcache.keys.put_in import Namespaces
from torchcache.keys.reads import Reads, reads_of
from torchcache.keys.references import (
    SKIPPED_GLOBALS,
    code_of,
    identifiers_in,
    names_in_library,
    names_of_environment,
)
from torchcache.keys.running import Visited
from torchcache.keys.walked import CodeWalk, Trail
from torchcache.our_names import ON_FUNCTIONS

#: Attributes of a torch module that hold no code of their own: its children are visited one by one.
_MODULE_TENSORS = frozenset({"_parameters", "_buffers", "_modules"})

#: At most this many functions and classes are visited that the code of an installed distribution, the target's own,
#: refers to.
_MOST_OF_LIBRARY = 200


class Walk:
    """One walk; every object is visited once, in an order that only the code decides.

    Args:
        home: Whose code it enters.

    Attributes:
        trail: What it notes on its way.
        visited: The code that it visited.
        namespaces: Those of the libraries whose code it reached.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self.trail: Trail = Trail(home)
        self.visited: Visited = Visited()
        self._watch = self.trail.watch
        self._library_left = _MOST_OF_LIBRARY
        self._operators: set[str] = set()  # names of those that were visited
        self._whole = WholeModules()
        self._imports = Imports(home, self.trail)
        self.namespaces: Namespaces = Namespaces()
        self._is_weak = False  # what is visited belongs to somebody's state, and must not live for the walk
        self._is_aside = False  # it is not known whether any code that runs means what is visited
        self._aside: list[types.FunctionType] = []  # the functions that were visited then

    def result(self) -> CodeWalk:
        return self.trail.result(self._aside)

    # -- values of any kind -------------------------------------------------------------------------------

    def visit_held(self, value: object) -> set[str]:
        """Visit code that lies in a module's state, and hold nothing of it; return the names of what was reached."""
        self._is_weak = True
        known = self.visited.names()
        self.visit(value, "part")
        self._is_weak = False
        return self.visited.names() - known

    def visit(self, value: object, label: str) -> bool:
        """Visit ``value`` if it is code; return False if it is (also) a value of another kind."""
        value = unwrap(value)
        if is_plain_type(type(value)):
            return False
        if isinstance(value, types.FunctionType):
            self._visit_function(value, label)
            return True
        if isinstance(value, type):
            self.visited.add_class_name(last_name(label), value)
            self.visit_class(value)
            return True
        operators = operators_at(value)
        if operators is not None:
            self._visit_operators(operators)
            return True
        if isinstance(value, types.ModuleType):
            self._whole.reach(value)
            return self._visit_module(value, label)
        if isinstance(value, BUILTIN):
            return self._visit_builtin(value, label)
        if isinstance(value, (staticmethod, classmethod, property)):
            return self._visit_descriptor(value, label)
        if isinstance(value, functools.singledispatchmethod):  # its caches of what was found are no data
            self.visit(value.func, label)
            return self.visit(value.dispatcher, label)
        if isinstance(value, types.MethodType):
            self.visit(value.__func__, label)
            return self.visit(value.__self__, f"{label}.__self__")
        self._visit_data(value, label)
        return False

    def _visit_data(self, value: object, label: str) -> None:
        """Visit the code that lies in what is no code itself."""
        if is_container(value):
            self._visit_items(value, label)
            return
        text = script_of(value)
        if text is not None:
            self.trail.say(f"script {label}", text)
        elif self._home.leads_to_own(value):
            if isinstance(value, functools._lru_cache_wrapper):  # noqa: SLF001 - its type has no other name
                self.trail.found.names.append(Name(f"results of {label}", ResultsOf(value), "results"))
            self._visit_object(value, label)

    def _visit_module(self, module: types.ModuleType, label: str) -> bool:
        """Note a module, of which count the attributes that code names; return False if it is loaded under no name."""
        name = getattr(module, "__name__", None)
        origin = origin_of_module(name)
        self.trail.stop_at(origin, label, name if isinstance(name, str) else "")
        if self._home.is_own(origin):
            self._watch.add_object(module)  # of a class that answers for its attributes, from now on
        if type(module) is not types.ModuleType and self._home.is_own(origin_of_class(type(module))):
            self.visit_class(type(module))  # it may answer for attributes that the module does not have
        return sys.modules.get(str(name)) is module

    def _visit_builtin(self, value: object, label: str) -> bool:
        owner = getattr(value, "__objclass__", None) or type(getattr(value, "__self__", None))
        module = str(getattr(value, "__module__", None) or owner.__module__)
        self.trail.say(f"builtin {label}", module, getattr(value, "__qualname__", ""))
        self.namespaces.add_code(value)
        return not is_bound_to_object(value)

    def _visit_descriptor(self, value: Any, label: str) -> bool:  # noqa: ANN401 - a property, or a method of a class
        self.trail.say(f"{type(value).__name__} {label}")
        is_property = isinstance(value, property)
        for name in names_inside(value, weak=self._is_weak):
            self._visit_inner(name, f"{label}.{name.key}" if is_property else label)
        parts = (value.fget, value.fset, value.fdel) if is_property else (value.__func__,)
        return all(part is None or isinstance(part, types.FunctionType) for part in parts)

    def _visit_operators(self, operators: Operators) -> None:
        """Visit what runs behind operators of ``torch.ops``."""
        if operators.name in self._operators:
            return
        self._operators.add(operators.name)
        label = f"operators {operators.name}"
        self.trail.say(label)
        place = ImplementationOf(operators)
        found: Any = place.get("", None)
        self._watch.add(Name(label, place, ""), found)

        for name, function in found.functions:
            self.visit(function, name.partition("::")[2])  # as code names it
        for origin in found.origins:
            self.trail.stop_at(origin, label, origin)
        for path in found.files:
            self.trail.say(f"library {Path(path).name}", digest_of_file(path))
        self.trail.found.unseen += found.unseen

    # -- classes ------------------------------------------------------------------------------------------

    def visit_class(self, cls: type) -> None:
        """Visit a class, its metaclass, its bases, their methods and class attributes."""
        for base in cls.__mro__:
            origin = origin_of_class(base)
            if not self._home.is_own(origin):
                self.trail.stop_at(origin, base.__qualname__, base.__module__)
                self.namespaces.add_class(base)
            elif not self.trail.again("class", base, base.__name__):
                self._visit_attributes_of_class(base, is_own=origin is None)

    def _visit_attributes_of_class(self, cls: type, *, is_own: bool) -> None:
        self.visited.classes.append(cls)
        self.visited.add_class_name(cls.__name__, cls)
        self._watch.add_class(cls)
        self._watch.add_whole(vars(cls))
        kept = attributes_that_count(cls)
        self.trail.say(f"class {cls.__name__}", " ".join(kept), *(base.__name__ for base in cls.__bases__))
        self.namespaces.add_class(cls)
        if type(cls) is not type:
            self.visit_class(type(cls))

        for key, value in kept.items():
            label = f"{cls.__name__}.{key}"
            if is_ours(value):
                self.visit(original_of(value), label)  # what the class said itself
                continue
            self.visited.note_attribute(key, value)
            self._visit_name(Name(label, vars(cls), key, is_own), label, is_data=not key.startswith("__"))

    # -- functions ----------------------------------------------------------------------------------------

    def _visit_function(self, function: types.FunctionType, label: str) -> None:
        origin = origin_of_function(function)
        if not self._home.is_own(origin):
            self._visit_foreign_function(function, label, origin)
            return
        self.visited.add_function(last_name(label), function)
        if self.trail.again("function", function, label):
            return
        if self._is_aside:
            self._aside.append(function)

        is_own = origin is None
        if not is_own:
            self.namespaces.add_code(function)
        reads = reads_of(function.__code__)
        self._watch.add_function(function, weak=self._is_weak)
        self.trail.say(f"function {label}", *code_of(function))
        self._visit_defaults(function, is_own=is_own)
        self._visit_closure(function, reads, is_own=is_own)
        self.trail.found.names += names_of_environment(function, reads)
        self._visit_attributes_of_function(function, label, is_own=is_own)

        was_weak, self._is_weak = self._is_weak, False  # globals are nobody's state
        if is_own:
            self._visit_globals(function, reads)
        else:
            self._visit_globals_of_library(function, reads)
        self._is_weak = was_weak

    def _visit_foreign_function(self, function: types.FunctionType, label: str, origin: str | None) -> None:
        """Note a function of a library, and visit code of the user's own that it wraps."""
        # A wrapper took its name and its module from what it wraps.
        is_wrapper = origin != "torchcache" and self._home.leads_to_own(function)
        made_as = function.__code__.co_name if is_wrapper else function.__qualname__
        self.trail.stop_at(origin, label, f"{function.__globals__.get('__name__')}.{made_as}")
        self.namespaces.add_code(function)
        if is_wrapper and not self.trail.again("inside", function, label):
            self._watch.add_function(function, weak=self._is_weak)
            for name in names_inside(function, weak=self._is_weak):
                self._visit_inner(name, label, is_data=not name.key.startswith("__"))

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

    def _visit_closure(self, function: types.FunctionType, reads: Reads, *, is_own: bool) -> None:
        """Visit closure variables, and the class whose ``super()`` a function uses."""
        closure = ClosureOf(weakref.ref(function)) if self._is_weak else None
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if key == "__class__":
                self._visit_home_of_super(cell)
                continue
            place = cell if closure is None else closure
            self._visit_root(Name(f"{function.__name__}.{key}", place, key, is_own), reads, is_own=is_own)

    def _visit_home_of_super(self, cell: types.CellType) -> None:
        """Visit the class in a cell, unless that is how the function was found."""
        try:
            cls = cell.cell_contents
        except ValueError:
            return
        if isinstance(cls, type) and not self.trail.has_seen(cls):
            self.visit_class(cls)

    def _visit_attributes_of_function(self, function: types.FunctionType, label: str, *, is_own: bool) -> None:
        attributes = vars(function)
        if attributes:
            self._watch.add_object(function)
        place: Any = AttributesOf(weakref.ref(function)) if self._is_weak else attributes
        for key in sorted(filter(is_text, attributes)):
            if key not in ON_FUNCTIONS:
                name = Name(f"{label}.{key}", place, key, is_own)
                if not self._visit_name(name, key, is_data=False) and not key.startswith("__"):
                    self.trail.add_function_name(name)

    def _visit_globals(self, function: types.FunctionType, reads: Reads) -> None:
        """Visit what a function of the user's own refers to by globals, imports and names that it makes."""
        for key in reads.names:
            if key not in SKIPPED_GLOBALS:
                self._visit_root(Name(key, function.__globals__, key), reads, is_own=True)
        self._follow_chains(function, reads)
        for name in self._imports.names(function, reads):
            self._visit_name(name, name.key, is_followed=True)
        self._follow_uses(function, reads)

    def _visit_globals_of_library(self, function: types.FunctionType, reads: Reads) -> None:
        """Visit what the target's own distribution refers to, in part: a large one leads everywhere.

        Its version counts for the rest.
        """
        for name, is_code in names_in_library(function, reads):
            if is_code and self._library_left <= 0:
                continue
            self._library_left -= is_code
            self._visit_name(name, name.key)

    # -- names --------------------------------------------------------------------------------------------

    def _visit_root(self, name: Name, reads: Reads, *, is_own: bool) -> None:
        """Visit what lies at a name that a function reads; of a module, the attributes that the function names."""
        value = name.read()
        self._visit_name(name, name.key, is_followed=True)
        if isinstance(value, types.ModuleType):
            for inner in names_in_module(value, name.key, reads, self._home, is_own=is_own):
                self._visit_name(inner, inner.key, is_followed=True)

    def _visit_name(self, name: Name, label: str, *, is_data: bool = True, is_followed: bool = False) -> bool:
        """Visit what lies at a name now, and note it; return False if it is (also) data.

        Args:
            name: The name.
            label: What to call what lies there.
            is_data: Whether data counts that lies there.
            is_followed: Whether who calls knows which attributes of a module are meant.
        """
        if self._is_aside:
            name = replace(name, counts_always=True)
        value = name.read()
        if not name.is_own and self._home.is_library and is_container(value):  # a table of it: its version counts
            return True
        if name.key.startswith("_torchdynamo"):  # torch notes addresses on the functions it wraps
            return True

        if not isinstance(name.place, ItemsOf):  # of what cannot change, whose holder is watched
            self._watch.add(name, value, weak=self._is_weak)
        if value is MISSING:
            return True
        if is_followed and isinstance(value, types.ModuleType):
            is_all_code = self._visit_module(value, label)
        else:
            is_all_code = self.visit(value, label)
        if is_data and not is_all_code:
            self.trail.add_name(name)
        return is_all_code

    def _visit_inner(self, name: Name, label: str, *, is_data: bool = False) -> None:
        """Visit what lies inside an object of a library, if it is of the user's own, or plain data beside it."""
        value = name.read()
        if value is MISSING:
            return
        if self._home.leads_to_own(value):
            kind = type(value)
            is_own = kind not in OPENED and not is_container(value) and self._home.is_own(origin_of_class(kind))
            self._visit_name(Name(name.label, name.place, name.key, is_own), label, is_data=is_data)
        elif is_data and is_constant(value):
            self._visit_name(name, label)

    # -- containers and objects ---------------------------------------------------------------------------

    def _visit_items(self, container: object, label: str) -> None:
        """Visit the code in a container; its data counts by value, with what holds it."""
        items = [(key, value) for key, value in named_items(container) if self._home.leads_to_own(value)]
        if items and not self.trail.again("container", container, label):
            for key, value in items:
                self.visit(value, f"{label}[{key}]")

    def _visit_object(self, value: Any, label: str) -> None:  # noqa: ANN401 - an object of any class
        """Visit the class of an object, and the code that lies in its attributes."""
        if self.trail.again("object", value, label):
            return
        self._watch.add_object(value)
        self.visit_class(type(value))
        self.visited.object_classes.append(type(value))
        if is_module(value):
            for module in value.modules():
                self.visit_class(type(module))
                self._visit_code_of_module(module, label)
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            for name in names_inside(value, weak=self._is_weak):
                self._visit_name(name, label_inside(label, name.key), is_data=not self._is_weak)
        else:
            self._visit_attributes(value, label)

    def _visit_attributes(self, value: object, label: str) -> None:
        origin = origin_of_class(type(value))
        is_own = self._home.is_own(origin)
        for name in names_inside(value, weak=self._is_weak):
            held = name.read()
            self.visited.note_attribute(name.key, held)
            if self._home.leads_to_own(held):
                self._visit_inner(name, label_inside(label, name.key))
            elif is_own:
                self._watch.add(name, held, weak=self._is_weak)
            elif origin != "torch" and name.key[:1] != "_" and is_constant(held):
                self.trail.say(f"setting {label}.{name.key}", constant(held))

        attributes = getattr(value, "__dict__", None)
        if is_own and not self._is_weak and isinstance(attributes, dict):
            self._watch.add_whole(attributes, data_may_come=True)

    def _visit_code_of_module(self, module: object, label: str) -> None:
        """Visit functions and hooks that a torch module holds; its other attributes count by value."""
        for name in names_inside(module, weak=self._is_weak):
            if name.key not in _MODULE_TENSORS:
                self._visit_inner(name, f"{label}.{name.key}")

    # -- modules and imports ------------------------------------------------------------------------------

    def _follow_chains(self, function: types.FunctionType, reads: Reads) -> None:
        """Visit attributes of functions, and what a user put into a module of a library, such as a faster kernel."""
        for name in missing_attributes(function, reads, self._home):
            self._watch.add(name, MISSING)
        for module, name in callables_of_libraries(function, reads, self._home):
            value = name.read()
            self._watch.add(name, value)
            self.namespaces.add_code(value)
            if self._home.leads_to_own(value):
                self.visit(value, name.key)
            elif (elsewhere := name_elsewhere(value, module.__name__, name.key)) is not None:
                self.trail.say(f"{name.label} is", elsewhere)

    def _follow_uses(self, function: types.FunctionType, reads: Reads) -> None:
        """Note operators, and the modules that a function reaches other than by an attribute that it names."""
        uses = uses_of(function.__code__)
        self._whole.add_names(*reads.attributes, *identifiers_in(function))
        for operators in operators_used(function, uses):
            self._visit_operators(operators)

        reached = Reached(function, uses)
        self._whole.reach_from(reached)
        for text in sorted(reached.sought()):
            self._imports.note_whether_there(text)
        names = reached.names()
        for text in sorted(name.text for name in names if name.is_whole):
            self._imports.load_named(text)
        if names:
            lookup = Lookup(reached)
            self._watch.add(Name(f"modules of {function.__name__}", lookup, ""), lookup.get("", None))
            for module in lookup.modules():
                self._whole.reach(module, has_data=any(name.text for name in names))

    def visit_whole_modules(self) -> None:
        """Visit all code of the modules that code reaches other than by an attribute that it names."""
        self.trail.found.classes = tuple(self.visited.classes)
        self._is_aside = True
        for module, has_data in self._whole.waiting():
            label = main_name(module.__name__)
            self.trail.say(f"whole module {label}")
            self._watch.add_whole(vars(module), data_may_come=True)
            for key, value in sorted(vars(module).items()):
                is_skipped = key in SKIPPED_GLOBALS or (key.startswith("__") and key != "__getattr__")
                name = Name(f"{label}.{key}", vars(module), key)
                if isinstance(value, types.ModuleType) and not is_skipped:
                    self._watch.add(name, value)
                    self._whole.add_inner(key, value, module, has_data=has_data)
                elif not is_skipped:
                    self._visit_global(name, value, has_data=has_data)

    def _visit_global(self, name: Name, value: object, *, has_data: bool) -> None:
        """Visit a global of a module that counts whole; as data, what is called as constants are counts always."""
        if has_data or name.key.isupper():
            self._visit_name(name, name.key)
        elif type(value) in OPENED or isinstance(value, (type, *BUILTIN)):
            self._visit_name(name, name.key, is_data=False)
        elif is_container(value):
            self._visit_items(value, name.key)
        elif self._home.leads_to_own(value):  # it may be another one at each call
            self.visit_class(type(value))
