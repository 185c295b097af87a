"""Code of libraries that stands in their namespaces where other code was defined, as that of a faster kernel does.

What is defined in a namespace counts by the version of its library. What has another name there than it was defined by
is told by where it was defined. This module does not import torch.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchcache.keys.origins import STANDARD, origin_of_module
from torchcache.keys.reach import ASIDE

_OF_CLASSES = (types.MethodDescriptorType, types.WrapperDescriptorType)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, *_OF_CLASSES)

#: What does not run in a forward. Libraries wrap it once they are used, as Lightning does with ``torch.compile``, and
#: that with the constructor of modules.
_COMPUTING_NOTHING = ASIDE | {"compile"}


@dataclass(frozen=True, slots=True)
class Displaced:
    """A function of a library that stands in a namespace, and was defined by another name.

    Attributes:
        name: Where it was defined, and as what.
        is_added: Whether another library put it into a class, where it may stand in place of nothing: it counts if
            code of the class's own library reads the name.
    """

    name: str
    is_added: bool

    @classmethod
    def of(cls, value: object, namespace: str, library: str | None, key: str) -> Displaced | None:
        """Describe what stands under a name; None if it was defined as that, or is no function of a library.

        Args:
            value: What stands there.
            namespace: The name of a module, or that and the name of a class in it.
            library: The distribution that the module is from.
            key: The name.
        """
        if key in _COMPUTING_NOTHING or not issubclass(type(value), _FUNCTIONS):
            return None
        module, name = _where_defined(value)
        origin = origin_of_module(module)
        if origin == STANDARD or _is_called(value, name, namespace, key):
            return None
        return cls(f"{module}.{name}", origin != library and namespace not in sys.modules)


def name_elsewhere(value: object, module: str, key: str) -> str | None:
    """Return what something callable in a module of a library is that has another name than it has there.

    Args:
        value: It stands there.
        module: The name of the module.
        key: Its name in it.
    """
    if issubclass(type(value), (type, *_FUNCTIONS)):
        where, name = _where_defined(value)
        return None if _is_called(value, name, module, key) else f"{where}.{name}"
    try:
        name = str(getattr(value, "__name__", ""))  # of NumPy's functions, and of operators
    except Exception:  # noqa: BLE001 - a library's own way to answer, which may raise anything
        name = ""
    kind = type(value)
    return None if _is_called(value, name, module, key) else f"{name} {kind.__module__}.{kind.__qualname__}"


#: What NumPy calls by a shorter name, too.
_IN_FULL = {"abs": "absolute", "conj": "conjugate"}

#: By the name of the namespace: what torch itself calls by other names, before anything could be put there.
_before: dict[str, Mapping[str, Displaced]] = {}


def remember(namespace: str, displaced: Mapping[str, Displaced]) -> None:
    """Remember the functions of a namespace that came with it under other names."""
    _before.setdefault(namespace, displaced)


def changed(namespace: str, displaced: Mapping[str, Displaced]) -> Iterator[tuple[str, Displaced | None]]:
    """Yield each name under which another function stands than came with a namespace; None if it has its own name."""
    before = _before.get(namespace, {})
    for key in sorted({*before, *displaced}):
        if displaced.get(key) != before.get(key):
            yield key, displaced.get(key)


def _where_defined(code: Any) -> tuple[str, str]:  # noqa: ANN401 - a class, or one of _FUNCTIONS
    if isinstance(code, types.FunctionType):
        module = code.__globals__.get("__name__")  # a wrapper takes the names of what it wraps, but not this
    elif isinstance(code, _OF_CLASSES):
        module = code.__objclass__.__module__
    else:
        module = code.__module__
    return str(module or ""), str(getattr(code, "__qualname__", ""))


def _is_called(code: object, name: str, namespace: str, key: str) -> bool:
    """Tell whether code is called as it was defined; in C, ``norm`` may be ``linalg_norm``."""
    if isinstance(code, types.FunctionType):
        return f".{namespace}.{key}".endswith(f".{name}")
    last = name.rpartition(".")[2]
    return last in (key, _IN_FULL.get(key)) or (last.endswith(f"_{key}") and not isinstance(code, type))
