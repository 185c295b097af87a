"""Training flags that no code reads: whether they are set or not, a module returns the same."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from torchcache.keys.origins import is_own_class
from torchcache.keys.reads import all_codes
from torchcache.keys.walked import CodeWalk
from torchcache.keys.writes import Writes

FLAG = "training"

#: Runs when a class is made, and not when its objects are called.
_ASIDE = frozenset({"__init_subclass__", "__class_getitem__", "__set_name__"})

#: What nn.Module itself does with the flags of all modules shapes no result: it sets them.
_BASES = frozenset(nn.Module.__mro__)


@dataclass(frozen=True, slots=True)
class _Readers:
    """Whether the code of a class reads the flags of its objects, and those of any others."""

    own: bool
    others: bool


_known: WeakKeyDictionary[type, _Readers] = WeakKeyDictionary()


def are_read(moved: Iterable[type], every: Iterable[type], walk: CodeWalk | None) -> bool:
    """Tell whether any code may read the training flags of some modules; in doubt it does.

    Args:
        moved: The classes of these modules.
        every: The classes of all modules of what is cached.
        walk: What the walk over the code found, if there was one.
    """
    if walk is not None and walk.writes.reads_of_any(FLAG):
        return True
    return any(_readers_in(cls).others for cls in set(every)) or any(_readers_in(cls).own for cls in set(moved))


def _readers_in(cls: type) -> _Readers:
    """Return who reads flags in the code of a class and its bases."""
    known = _known.get(cls)
    if known is not None:
        return known
    own = others = False
    for base in cls.__mro__:
        if base in _BASES:
            continue
        own = own or _is_read_beside(base)
        writes = Writes()
        for name, value in list(vars(base).items()):
            if name in _ASIDE:
                continue
            for function in _functions_in(value):
                if not _mentions_flag(function.__code__):
                    continue
                writes.note(function, base)
                # As a text it is asked of anything.
                others = others or _names_flag(function.__code__)
        own = own or writes.reads_of(base, FLAG)
        others = others or writes.reads_of_any(FLAG)
    found = _known[cls] = _Readers(own, others)
    return found


def _is_read_beside(cls: type) -> bool:
    """Tell whether a function beside a class of a library reads flags: it may be handed objects of the class.

    Those of the user's own code are walked.
    """
    if is_own_class(cls):
        return False
    module = sys.modules.get(cls.__module__)
    writes = Writes()
    for value in list(vars(module).values()) if module is not None else ():
        if not isinstance(value, types.FunctionType) or value.__module__ != cls.__module__:
            continue
        for function in _functions_in(value):
            if _mentions_flag(function.__code__):
                writes.note(function)
                if _names_flag(function.__code__):
                    return True
    return writes.reads_of_any(FLAG)


def _functions_in(value: object, depth: int = 0) -> Iterator[types.FunctionType]:
    """Yield the functions that an attribute of a class is made of: a method, a property, what a decorator wraps."""
    if depth > _DEEPEST:
        return
    held: list[object] = []
    if isinstance(value, types.FunctionType):
        yield value
        held = [value.__dict__.get("__wrapped__"), *_in_closure(value)]
    elif isinstance(value, property):
        held = [value.fget, value.fset]
    elif isinstance(value, (staticmethod, classmethod)):
        held = [value.__func__]
    elif not isinstance(value, type):  # a descriptor of whatever class; nothing of it is asked, which might run code
        attributes = getattr(value, "__dict__", None) if type(value).__module__ != "builtins" else None
        held = [*attributes.values()] if type(attributes) is dict else []
    for inner in held:
        if isinstance(inner, (types.FunctionType, property, staticmethod, classmethod)):
            yield from _functions_in(inner, depth + 1)


def _in_closure(function: types.FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            continue


_DEEPEST = 8


def _mentions_flag(code: types.CodeType) -> bool:
    return any(FLAG in inner.co_names or FLAG in inner.co_consts for inner in all_codes(code))


def _names_flag(code: types.CodeType) -> bool:
    return any(FLAG in inner.co_consts for inner in all_codes(code))
