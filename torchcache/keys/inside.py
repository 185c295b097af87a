"""What lies inside functions, wrappers, containers and objects, without running code of the user's.

This module does not import torch.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torchcache.keys.canonical import fingerprint_code
from torchcache.keys.changes import CLASS_BOOKKEEPING, is_container, is_plain_type, items_of
from torchcache.keys.origins import origin_of_class, origin_of_function
from torchcache.keys.ours import is_ours, original_of, unwrap
from torchcache.keys.places import (
    MISSING,
    AttributesOf,
    ClosureOf,
    DefaultsOf,
    ItemsOf,
    Name,
    defaults_of,
    is_module,
    reference,
)
from torchcache.our_names import is_on_classes

#: What is made in C and called like a function, or read like an attribute.
BUILTIN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip

#: Kinds of objects that are nothing but a way to other code.
OPENED = frozenset({
    types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.partial,
    functools.partialmethod, functools.cached_property, functools.singledispatchmethod,
})  # fmt: skip

_LEAVES = (type, types.ModuleType, *BUILTIN)
_PARTIALS = (functools.partial, functools.partialmethod)
_TRANSPARENT = OPENED | {type(functools.lru_cache(len))}

#: What a wrapper calls the one function in it, which code calls by the wrapper's name.
_WRAPPED = ("__wrapped__", "func", "pyfunc")

#: Attributes of a class that are not code and do not change what it computes.
_SKIPPED_CLASS_ATTRIBUTES = CLASS_BOOKKEEPING | {
    "__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__annotate__", "__annotate_func__",
    "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__", "_abc_impl", "__classcell__",
}  # fmt: skip

#: At most this many wrappers inside wrappers are opened, and this many objects looked at, to find code of the user's.
_MOST_DEPTH = 6
_MOST_OBJECTS = 2000


def opened(value: object, is_own: Callable[[str | None], bool], *, into_own: bool = True) -> Iterator[object]:
    """Yield functions, classes and objects that lie in a value, itself included, nearest first.

    Objects of libraries are opened if they are containers, wrappers or descriptors; functions of the user's
    own by their closures.

    Args:
        value: The value.
        is_own: Tells whether code of an origin is the user's own.
        into_own: Whether the user's own functions are opened, and wrappers of unknown classes are not.
    """
    waiting = deque([(unwrap(value), 0)])
    known = {id(value)}
    kept = []
    for _ in range(_MOST_OBJECTS):
        if not waiting:
            return
        found, depth = waiting.popleft()
        kept.append(found)  # so that ids stay unique
        kind = type(found)
        if is_plain_type(kind):
            continue

        holds_items = is_container(found)
        if not holds_items and (kind not in OPENED or kind is types.FunctionType):
            yield found
        if depth == _MOST_DEPTH:
            continue

        if holds_items:
            inner = [*items_of(found), getattr(found, "default_factory", None)]
        else:
            inner = _contents(found, is_own, into_own=into_own)
        for content in inner:
            item = unwrap(content)
            if item is not MISSING and id(item) not in known:
                known.add(id(item))
                waiting.append((item, depth + 1))


def _contents(value: Any, is_own: Callable[[str | None], bool], *, into_own: bool) -> list[object]:  # noqa: ANN401 - of any kind
    """Return what lies in a value that is no container, as far as ``opened`` looks into it."""
    if isinstance(value, _LEAVES):
        return []
    if isinstance(value, types.FunctionType):
        origin = origin_of_function(value)
        if origin == "torchcache" or (is_own(origin) and not into_own):
            return []
        return [name.read() for name in names_inside(value, weak=False, closure_only=is_own(origin))]

    inner: list[object] = []
    kind = type(value)
    if kind in _TRANSPARENT or (not into_own and _is_wrapper(kind)):
        inner += [name.read() for name in names_inside(value, weak=False)]
    if is_module(value):
        inner += map(type, value.modules())
    return inner


def _is_wrapper(kind: type) -> bool:
    """Tell whether objects of a class are called, or stand for an attribute."""
    return any("__call__" in vars(base) or "__get__" in vars(base) for base in kind.__mro__)


def is_bound_to_object(value: object) -> bool:
    """Tell whether a function of C is a method of an object, which is data beside it."""
    owner = getattr(value, "__self__", None)
    is_code = owner is None or isinstance(owner, (type, types.ModuleType))
    return not is_code and type(owner).__name__ != "PyCapsule"  # as functions of pybind11 have one


def names_inside(value: Any, *, weak: bool, closure_only: bool = False) -> list[Name]:  # noqa: ANN401 - of any kind
    """Return the names of what lies inside a function, a wrapper or an object, in an order that is always the same.

    Args:
        value: The function, wrapper or object.
        weak: Whether the names must not keep it alive.
        closure_only: Whether of a function only the closure is asked for.
    """
    if isinstance(value, types.FunctionType):
        names = _names_in_closure(value, weak=weak)
        if not closure_only:
            names += _names_of_defaults(value, weak=weak)
            names += _attributes(value, weak=weak)
        return names
    if isinstance(value, _PARTIALS):
        return _names_in_partial(value, weak=weak)

    parts: dict[str, object] = {}
    if isinstance(value, property):
        parts = {"fget": value.fget, "fset": value.fset, "fdel": value.fdel}
        return [Name(key, ItemsOf({key: part}), key) for key, part in parts.items() if part is not None]
    if isinstance(value, (staticmethod, classmethod)):
        parts = {"__func__": value.__func__}
    elif isinstance(value, types.MethodType):
        parts = {"__func__": value.__func__, "__self__": value.__self__}
    else:
        return _attributes(value, weak=weak)
    return [Name(key, ItemsOf(parts), key) for key in parts]


def _names_in_closure(function: types.FunctionType, *, weak: bool) -> list[Name]:
    """Return the names of a function's closure variables, but for the class that ``super()`` needs."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    closure = ClosureOf(weakref.ref(function)) if weak else None
    names = []
    for key, cell in cells:
        if key != "__class__":
            names.append(Name(key, cell if closure is None else closure, key, is_own=False))
    return names


def _names_of_defaults(function: types.FunctionType, *, weak: bool) -> list[Name]:
    place = DefaultsOf(reference(function, weak=weak))
    return [Name(key, place, key, is_own=False) for key, _ in defaults_of(function)]


def _names_in_partial(value: functools.partial[Any] | functools.partialmethod[Any], *, weak: bool) -> list[Name]:
    parts: dict[str, object] = {"func": value.func}
    parts.update((str(i), item) for i, item in enumerate(value.args))
    names = [Name(key, ItemsOf(parts), key) for key in parts]
    keywords = ItemsOf(dict(value.keywords)) if weak else value.keywords
    return names + [Name(key, keywords, key) for key in sorted(value.keywords)]


def _attributes(value: object, *, weak: bool) -> list[Name]:
    """Return the names of an object's attributes, those in slots too."""
    try:
        held = AttributesOf(weakref.ref(value) if weak else lambda: value)
    except TypeError:
        return []
    names = []
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        place: Any = held if weak else attributes
        names += [Name(key, place, key) for key in sorted(filter(is_text, attributes))]
    for base in type(value).__mro__:
        if origin_of_class(base) is None:
            slots = [key for key, slot in vars(base).items() if isinstance(slot, types.MemberDescriptorType)]
            names += [Name(key, held, key) for key in sorted(slots)]
    return names


def is_text(key: object) -> bool:
    """Tell whether a key of a dictionary can be the name of an attribute."""
    return isinstance(key, str)


def attributes_that_count(cls: type) -> dict[str, object]:
    """Return the attributes of a class that are part of what the user wrote, sorted by their names."""
    return {name: value for name, value in sorted(vars(cls).items()) if _counts(name, value)}


def _counts(name: object, value: object) -> bool:
    """Tell whether an attribute of a class is part of what the user wrote."""
    if not isinstance(name, str) or name in _SKIPPED_CLASS_ATTRIBUTES or is_on_classes(name):
        return False
    # Ours may stand in for what the class inherits.
    return not is_ours(value) or original_of(value) is not None


def named_items(container: object) -> list[tuple[str, object]]:
    """Return the items of a container, named by their keys where these are always the same."""
    items: list[tuple[str, object]]
    if isinstance(container, Mapping):
        items = [(_key_name(key), value) for key, value in container.items()]
    else:
        items = [("", value) for value in items_of(container)]
    if isinstance(container, (set, frozenset)):
        items.sort(key=lambda item: _sorting_name(item[1]))
    factory = getattr(container, "default_factory", None)
    if factory is not None:
        items.append(("default_factory", factory))
    return items


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


def script_of(value: object) -> str | None:
    """Return the text of what torch.jit compiled, without the places of its source; None of anything else."""
    module = str(type(value).__module__)  # of what Cython compiled, it may be no text
    if module.partition(".")[0] != "torch" or not hasattr(type(value), "inlined_graph"):
        return None
    try:
        graph = str(value.inlined_graph)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - not every compiled object has one
        return None
    return "\n".join(line.partition(" # ")[0] for line in graph.splitlines())


def last_name(label: str) -> str:
    """Return the name that code reads of a label."""
    return label.rpartition(".")[2]


def label_inside(label: str, key: str) -> str:
    """Name what lies in a wrapper: the one function in it as the wrapper itself, which code calls by that name."""
    return label if key in _WRAPPED else f"{label}.{key}"
