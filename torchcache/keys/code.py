"""The code that can run, as a fingerprint. This module does not import torch.

What is hashed are code objects, instruction by instruction with their operands resolved, not source
text: the text may have been edited since it was compiled, cannot tell closures apart, and is missing
in a REPL. Docstrings, line numbers, file and module names do not count.

The walk starts at a class or a function and follows what its code refers to by name: globals, closure
cells, attributes of imported modules. It goes on through code of the user's own and stops at the
standard library, torch, and other installed distributions, which count by name and version.
"""

from __future__ import annotations

import dis
import functools
import inspect
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from torchcache.keys.digest import digest_parts

#: Flags of a code object that say how it runs (generator, coroutine, *args, ...); the rest, such as
#: "has a docstring", does not count.
_FLAG_MASK = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_ITERABLE_COROUTINE
)

#: Attributes of a class that are not code and do not change what it computes.
_SKIPPED_CLASS_ATTRIBUTES = frozenset({
    "__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__annotations__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__",
    "__static_attributes__", "__parameters__", "__orig_bases__", "__abstractmethods__", "_abc_impl",
    "__slotnames__", "__classcell__", "__new__torchcache__", "cache_instance",
})  # fmt: skip

#: Methods that change the list, dict, set or deque they are called on.
_MUTATORS = frozenset({
    "append", "appendleft", "extend", "extendleft", "insert", "add", "update", "pop", "popleft", "popitem",
    "remove", "discard", "clear", "setdefault", "sort", "reverse", "subtract", "put", "write",
    "difference_update", "intersection_update", "symmetric_difference_update", "__setitem__",
})  # fmt: skip

#: Functions in a table of up to so many items are walked.
_MOST_TABLE_ITEMS = 64

_LOADS_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LOADS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_LOADS_CELL = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})

#: Distributions whose code never counts: their versions are said by others (torch by the user's own
#: care, Python by its minor version), and a patch release must not start every cache afresh.
_UNCOUNTED = frozenset({"torch", "numpy", "torchcache", "the standard library"})


@dataclass(frozen=True, slots=True)
class Name:
    """A global, closure variable or class attribute that walked code reads, and where to read it again.

    ``is_own`` is False for one of an installed distribution, whose version counts.
    """

    label: str
    place: Mapping[str, Any] | types.CellType
    key: str
    is_own: bool = True

    def read(self) -> object:
        """Return the variable's present value, or ``MISSING``."""
        if isinstance(self.place, types.CellType):
            try:
                return self.place.cell_contents
            except ValueError:
                return MISSING
        return self.place.get(self.key, MISSING)


MISSING = object()


@dataclass(slots=True)
class Writes:
    """What a piece of code changes: by assignment (exact), and in place (by the form of the statement)."""

    assigned_attributes: set[str] = field(default_factory=set)
    assigned_names: set[str] = field(default_factory=set)
    changed_attributes: set[str] = field(default_factory=set)
    changed_names: set[str] = field(default_factory=set)

    def note_change(self, origin: _Origin) -> None:
        """Note that the object that came from ``origin`` is changed in place."""
        kind, name = origin
        if kind == "attribute":
            self.changed_attributes.add(name)
        elif kind == "name":
            self.changed_names.add(name)


@dataclass(slots=True)
class CodeWalk:
    """What a walk found.

    Attributes:
        fingerprint: Digest of all code reached.
        names: Globals and closure cells with values that are neither code nor modules.
        writes: What the code that runs changes itself: that is no part of the key.
    """

    fingerprint: bytes = b""
    names: list[Name] = field(default_factory=list)
    writes: Writes = field(default_factory=Writes)


def walk_code(target: type | Callable[..., object], parts: Iterable[type] = (), *, entry: str = "forward") -> CodeWalk:
    """Walk the code that runs when ``target`` is called.

    Args:
        target: A function, or a class.
        parts: Classes of the submodules of the module that is called, or that the function uses.
        entry: The method of a class that runs; only code reachable from it counts as a writer of
            attributes (a setter that ``forward`` does not call does not hide an attribute).
    """
    target = unwrap(target)  # type: ignore[assignment] # of a function of ours, the user's
    walk = _Walk(home=_home_of(target))
    walk.visit(target, "target")
    if not isinstance(target, type):
        walk.note_writes_of_functions()
    for cls in dict.fromkeys([*((target,) if isinstance(target, type) else ()), *parts]):
        walk.visit_class(cls)
        walk.note_writes_of_method(cls, entry)
    return walk.result()


def _home_of(target: type | Callable[..., object]) -> str | None:
    """Return the origin of the target, whose code counts wherever it comes from."""
    if isinstance(target, types.FunctionType):
        return _origin_of_function(target)
    return _origin_of_module(getattr(target, "__module__", None))


class _Walk:
    """One walk; every object is visited once, in an order that only the code decides."""

    def __init__(self, home: str | None) -> None:
        self._home = home  # None: the user's own, which always counts
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # ids stay unique while the objects live
        self._parts: list[bytes] = [f"python {sys.version_info[0]}.{sys.version_info[1]}".encode()]
        self._found = CodeWalk()
        self._functions: list[types.FunctionType] = []

    def result(self) -> CodeWalk:
        self._found.fingerprint = digest_parts(self._parts)
        return self._found

    # -- visiting ---------------------------------------------------------------------------------

    def visit(self, value: object, label: str) -> bool:
        """Visit ``value`` if it is code; return False if it is (also) a value of another kind."""
        value = unwrap(value)
        if isinstance(value, functools.partial):
            self._say("partial", label)
            self.visit(value.func, label)
            return False
        if isinstance(value, types.MethodType):
            return self.visit(value.__func__, label)
        if isinstance(value, types.FunctionType):
            self._visit_function(value, label)
            return True
        if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
            self._say("builtin", label, getattr(value, "__qualname__", ""))
            return True
        if isinstance(value, type):
            self.visit_class(value)
            return True
        if isinstance(value, types.ModuleType):
            self._stop_at(_origin_of_module(value.__name__), label)
            return True
        return False

    def visit_class(self, cls: type) -> None:
        """Visit a class, its bases, their methods and class attributes."""
        for base in cls.__mro__:
            origin = _origin_of_module(base.__module__)
            if not self._is_own(origin):
                self._stop_at(origin, base.__qualname__)
                continue
            if self._again("class", base, base.__name__):
                continue
            self._say("class", base.__name__)
            for name, attribute in sorted(vars(base).items()):
                if name in _SKIPPED_CLASS_ATTRIBUTES or name.startswith("torchcache_"):
                    continue
                if getattr(attribute, "__torchcache_original__", attribute) is None:
                    continue  # ours, standing in for what the class inherits
                functions = [*_functions_of(attribute)]
                for part, function in functions:
                    self.visit(function, f"{name}{part}")
                if not functions and not name.startswith("__"):
                    self._visit_name(Name(f"{base.__name__}.{name}", vars(base), name, is_own_module(base.__module__)))

    def _visit_function(self, function: types.FunctionType, label: str) -> None:
        origin = _origin_of_function(function)
        if not self._is_own(origin):
            self._stop_at(origin, f"{label} {function.__qualname__}")
            return
        if self._again("function", function, label):
            return
        is_own = origin is None
        self._functions.append(function)
        self._say("function", label)
        self._parts.append(fingerprint_code(function.__code__))
        for name, default in _defaults(function):
            self._say("default", name, _constant(default))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self._visit_name(Name(f"{function.__name__}.{name}", cell, name, is_own))
        attributes = frozenset(_attribute_names(function.__code__))
        for name in sorted(set(_global_names(function.__code__))):
            if name in function.__globals__:
                self._visit_name(Name(name, function.__globals__, name, is_own))
                value = function.__globals__[name]
                if isinstance(value, types.ModuleType) and self._is_own(_origin_of_module(value.__name__)):
                    for attribute in sorted(attributes & vars(value).keys()):
                        self._visit_name(Name(f"{name}.{attribute}", vars(value), attribute, is_own))

    def _visit_name(self, name: Name) -> None:
        value = name.read()
        if value is MISSING or name.key == "__class__":
            return
        if self.visit(value, name.key):
            return
        self._found.names.append(name)
        if not name.is_own:
            return  # the registries of a large library lead everywhere; its version counts
        if isinstance(getattr(type(value), "forward", None), types.FunctionType) and hasattr(value, "modules"):
            for module in value.modules():  # a torch module that the code uses
                self.visit_class(type(module))
        elif isinstance(value, (list, tuple, dict)) and len(value) <= _MOST_TABLE_ITEMS:
            for item in value.values() if isinstance(value, dict) else value:
                self.visit(item, name.key)

    # -- what the code changes itself -----------------------------------------------------------------

    def note_writes_of_functions(self) -> None:
        for function in self._functions:
            self._note_writes(function)

    def note_writes_of_method(self, cls: type, entry: str) -> None:
        """Note the writes of ``entry`` and of what it reaches by name through the class and its globals."""
        waiting, known = [entry], {entry, "__init__", "__new__", "__setstate__"}
        by_name: dict[str, list[types.FunctionType]] = {}
        for base in cls.__mro__:
            if self._is_own(_origin_of_module(base.__module__)):
                for name, attribute in vars(base).items():
                    by_name.setdefault(name, []).extend(
                        f for _, f in _functions_of(attribute) if isinstance(f, types.FunctionType)
                    )
        methods = {id(f) for functions in by_name.values() for f in functions}
        for function in self._functions:
            if id(function) not in methods:
                by_name.setdefault(function.__name__, []).append(function)
        while waiting:
            for function in by_name.get(waiting.pop(), ()):
                self._note_writes(function)
                reached = {*_attribute_names(function.__code__), *_global_names(function.__code__)}
                waiting.extend(reached - known)
                known |= reached

    def _note_writes(self, function: types.FunctionType) -> None:
        code = function.__code__
        self_name = code.co_varnames[0] if code.co_argcount and "." in function.__qualname__ else ""
        for inner in _all_codes(code):
            _note_writes_in(inner, self_name, self._found.writes)

    # -- where it stops -------------------------------------------------------------------------------

    def _is_own(self, origin: str | None) -> bool:
        return origin is None or (origin == self._home and origin not in _UNCOUNTED)

    def _stop_at(self, origin: str | None, label: str) -> None:
        if origin is None or origin in _UNCOUNTED or origin == self._home:
            self._say("foreign", label)
        else:
            self._say("foreign", label, origin, _version_of(origin))

    def _again(self, kind: str, value: object, label: str) -> bool:
        number = self._seen.get(id(value))
        if number is None:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            return False
        self._say(f"{kind} again", label, str(number))
        return True

    def _say(self, *words: str | bytes) -> None:
        self._parts.append(digest_parts(w.encode() if isinstance(w, str) else w for w in words))


@lru_cache(maxsize=16384)
def fingerprint_code(code: types.CodeType) -> bytes:
    """Return the digest of one code object and of those inside it."""
    parts = [
        str((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAG_MASK)).encode(),
        " ".join(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]).encode(),
        getattr(code, "co_exceptiontable", b""),
    ]
    for instruction in dis.get_instructions(code):
        if instruction.opname == "NOP":  # what -OO leaves of a docstring
            continue
        parts.append(instruction.opname.encode())
        if instruction.opcode in _HAS_CONSTANT:
            parts.append(_constant(instruction.argval))
        elif isinstance(instruction.argval, str):
            parts.append(instruction.argval.encode())
        elif instruction.arg is not None:
            parts.append(str(instruction.arg).encode())
    return digest_parts(parts)


_HAS_CONSTANT = frozenset(dis.hasconst)


def unwrap(value: object) -> object:
    """Return the user's own function behind those of ours, own or inherited."""
    while hasattr(value, "__torchcache_original__") and hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value


def _functions_of(attribute: object) -> Iterator[tuple[str, object]]:
    """Yield the functions a class attribute holds, with a part name for properties."""
    if isinstance(attribute, (staticmethod, classmethod)):
        yield "", attribute.__func__
    elif isinstance(attribute, property):
        for part in ("fget", "fset", "fdel"):
            function = getattr(attribute, part)
            if function is not None:
                yield f".{part}", function
    elif isinstance(attribute, functools.cached_property):
        yield "", attribute.func
    elif isinstance(attribute, (types.FunctionType, functools.partial)):
        yield "", unwrap(attribute)


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    for i, default in enumerate(function.__defaults__ or ()):
        yield str(i), default
    yield from sorted((function.__kwdefaults__ or {}).items())


def _constant(value: object) -> bytes:
    """Return a stable name of a constant or of a plain default; of anything else, of its type."""
    if isinstance(value, types.CodeType):
        return b"code" + fingerprint_code(value)
    if isinstance(value, (tuple, list)):
        return digest_parts([type(value).__name__.encode(), *map(_constant, value)])
    if isinstance(value, (frozenset, set)):
        return digest_parts([type(value).__name__.encode(), *sorted(map(_constant, value))])
    if isinstance(value, dict):
        pairs = sorted((_constant(k), _constant(v)) for k, v in value.items())
        return digest_parts([b"dict", *(part for pair in pairs for part in pair)])
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type(...))):
        return f"{type(value).__name__} {value!r}".encode()
    if isinstance(value, types.FunctionType):
        return b"function" + fingerprint_code(value.__code__)
    name = repr(value)
    return f"{type(value).__qualname__} {'' if ' at 0x' in name else name}".encode()


def _all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_codes(constant)


def _global_names(code: types.CodeType) -> Iterator[str]:
    for inner in _all_codes(code):
        for instruction in dis.get_instructions(inner):
            if instruction.opname in _LOADS_GLOBAL:
                yield instruction.argval


def _attribute_names(code: types.CodeType) -> Iterator[str]:
    for inner in _all_codes(code):
        for instruction in dis.get_instructions(inner):
            if instruction.opname in _LOADS_ATTRIBUTE or instruction.opname == "LOAD_SUPER_ATTR":
                yield instruction.argval


_Origin = tuple[str, str]  # "self", "attribute" of self, "name" of a global or cell, or "" for anything else
_UNKNOWN: _Origin = ("", "")


def _note_writes_in(code: types.CodeType, self_name: str, writes: Writes) -> None:
    """Note what one code object changes, following where the objects on the stack came from.

    An object whose origin is not known is not noted: in doubt a value counts, which costs a miss.
    """
    stack: list[_Origin] = []

    def pop(count: int) -> _Origin:
        last = _UNKNOWN
        for _ in range(count):
            last = stack.pop() if stack else _UNKNOWN
        return last

    def peek(depth: int) -> _Origin:
        return stack[-depth] if len(stack) >= depth else _UNKNOWN

    for instruction in dis.get_instructions(code):
        opname, argument, arg = instruction.opname, instruction.argval, instruction.arg
        effect = dis.stack_effect(instruction.opcode, arg, jump=False)
        if opname in ("STORE_ATTR", "DELETE_ATTR"):
            if peek(1)[0] == "self":
                writes.assigned_attributes.add(argument)
            else:
                writes.note_change(peek(1))
        elif opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
            opname in ("STORE_DEREF", "DELETE_DEREF") and argument in code.co_freevars
        ):
            writes.assigned_names.add(argument)
        elif opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            writes.note_change(peek(2))
        elif opname == "STORE_SLICE":
            writes.note_change(peek(3))

        if opname == "COPY":
            stack.append(peek(arg or 1))
        elif opname == "SWAP" and arg and len(stack) >= arg:
            stack[-1], stack[-arg] = stack[-arg], stack[-1]
        elif opname == "DUP_TOP":
            stack.append(peek(1))
        elif opname == "DUP_TOP_TWO":
            stack += [peek(2), peek(1)]
        elif opname == "ROT_TWO" and len(stack) >= 2:
            stack[-2:] = [stack[-1], stack[-2]]
        elif opname == "ROT_THREE" and len(stack) >= 3:
            stack[-3:] = [stack[-1], stack[-3], stack[-2]]
        elif opname in _LOADS_ATTRIBUTE:
            owner = pop(1)
            if argument in _MUTATORS:
                writes.note_change(owner)
            stack += [("attribute", argument) if owner[0] == "self" else _UNKNOWN] * (1 + effect)
        elif opname in _LOADS_GLOBAL or opname in _LOADS_CELL:
            stack += [_UNKNOWN] * (effect - 1)
            stack.append(("self", "") if argument == self_name else ("name", argument))
        elif opname.startswith("LOAD_FAST"):  # from 3.13 on, one instruction may load two variables
            loaded = argument if isinstance(argument, tuple) else (argument,)
            stack += [("self", "") if name == self_name else _UNKNOWN for name in loaded]
        elif opname == "STORE_FAST_LOAD_FAST":
            pop(1)
            stack.append(("self", "") if argument[1] == self_name else _UNKNOWN)
        elif opname.startswith(_PUSHES_NOTHING):
            if effect > 0:
                stack += [_UNKNOWN] * effect
            else:
                pop(-effect)
        elif effect > 0:
            stack += [_UNKNOWN] * effect
        else:
            pop(1 - effect)
            stack.append(_UNKNOWN)
        if opname.startswith(("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")):
            stack.clear()


_PUSHES_NOTHING = (
    "STORE_", "DELETE_", "POP_", "RETURN_", "RAISE_", "RERAISE", "JUMP_", "RESUME", "NOP", "PRECALL", "KW_NAMES",
    "PUSH_", "COPY_FREE_VARS", "MAKE_CELL", "EXTENDED_ARG", "SWAP", "ROT_", "CACHE", "LIST_APPEND", "SET_ADD",
    "MAP_ADD", "LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE", "DICT_MERGE", "END_", "GEN_START",
)  # fmt: skip


def is_own_module(module: str | None) -> bool:
    """Tell whether a module is neither the standard library's nor an installed distribution's."""
    return _origin_of_module(module) is None


def _origin_of_function(function: types.FunctionType) -> str | None:
    """Return where a function's code comes from: a distribution, the standard library, or None for the user's own.

    The file decides, not the module's name: a script may be called like a module of the standard library, and
    code made by ``exec`` has any name.
    """
    return _origin_of_file(function.__code__.co_filename)


@lru_cache(maxsize=4096)
def _origin_of_module(module: str | None) -> str | None:
    loaded = None if module is None else sys.modules.get(module)
    if loaded is None:
        return None
    if module in sys.builtin_module_names:
        return _STANDARD
    path = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", ())), "")
    return _origin_of_file(str(path))


@lru_cache(maxsize=4096)
def _origin_of_file(path: str) -> str | None:
    if path.startswith("<frozen"):
        return _STANDARD
    if path.startswith("<"):
        return None
    full = os.path.realpath(path)
    if full.startswith(_PACKAGE_FOLDER):
        return "torchcache"
    for folder in _LIBRARY_FOLDERS:
        if full.startswith(folder):
            top = full[len(folder) :].partition(os.sep)[0].partition(".")[0]
            return (_distributions().get(top) or [top])[0]
    return _STANDARD if full.startswith(_STANDARD_FOLDERS) else None


_STANDARD = "the standard library"
_PACKAGE_FOLDER = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_LIBRARY_FOLDERS = tuple(
    dict.fromkeys(
        os.path.realpath(path) + os.sep
        for path in (*sysconfig.get_paths().values(), *sys.path)
        if Path(path).name in ("site-packages", "dist-packages")
    )
)
_STANDARD_FOLDERS = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))


@lru_cache(maxsize=1)
def _distributions() -> dict[str, list[str]]:
    return {name: sorted(found) for name, found in metadata.packages_distributions().items()}


@lru_cache(maxsize=1024)
def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
