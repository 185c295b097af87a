"""Whose code it is: the user's own, or that of the standard library or an installed distribution.

The file of the code decides where there is one, not the name of the module: a script may be called like a
module of the standard library, and what ``exec`` makes has any name or none.

This module does not import torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from torchcache.keys.distributions import distributions_of, installed_version

STANDARD = "the standard library"

#: Distributions whose code never counts: their versions are said by others (torch by the user's own
#: care, Python by its minor version), and a patch release must not start every cache afresh.
UNCOUNTED = frozenset({"torch", "numpy", "torchcache", STANDARD})

#: The file of code that cloudpickle (3.1) brought along; the file of its module is among its globals.
_BY_VALUE = "<dynamic-code>"

#: Wrappers are opened so deep to find the function inside.
_MOST_WRAPPERS = 8

#: What Cython calls the classes of its functions.
_OF_CYTHON = frozenset({"cython_function_or_method", "fused_cython_function"})


def is_own_module(module: str | None) -> bool:
    """Tell whether a module is neither the standard library's nor an installed distribution's."""
    return origin_of_module(module) is None


def is_own_class(cls: type) -> bool:
    """Tell whether a class is the user's own: its module is, or the file of one of its functions."""
    return origin_of_class(cls) is None


class _Still(threading.local):
    """What was found out of classes that stand still, by their ids, with the classes; None while they may change."""

    origins: dict[int, tuple[type, str | None]] | None = None


_still = _Still()


@contextmanager
def classes_stand_still() -> Iterator[None]:
    """Find out but once where each class comes from, while this thread runs no code that changes one."""
    _still.origins = {}
    try:
        yield
    finally:
        _still.origins = None


def origin_of_class(cls: type) -> str | None:
    """Return where a class comes from: a distribution, the standard library, or None for the user's own."""
    known = _still.origins
    if known is None:
        return _origin_of_class(cls)
    found = known.get(id(cls))
    if found is None:
        found = known[id(cls)] = cls, _origin_of_class(cls)
    return found[1]


def _origin_of_class(cls: type) -> str | None:
    origin = origin_of_module(cls.__module__)
    if origin is None or cls.__flags__ & _IS_IMMUTABLE:
        return origin
    for attribute in tuple(vars(cls).values()):
        for function in functions_behind(attribute):
            # What collections.namedtuple writes has no file and a module of its own, whoever asks for it.
            is_written = str(function.__globals__.get("__name__")).startswith("namedtuple_")
            if not is_written and origin_of_function(function) is None:
                return None
    return origin


#: A class of C: nobody adds functions to it.
_IS_IMMUTABLE = 1 << 8


def functions_behind(attribute: object) -> Iterator[types.FunctionType]:
    """Yield the plain functions behind an attribute of a class: its own, and the wrapped ones."""
    if isinstance(attribute, property):
        for part in (attribute.fget, attribute.fset, attribute.fdel):
            yield from functions_behind(part)
        return
    for _ in range(_MOST_WRAPPERS):
        if isinstance(attribute, (staticmethod, classmethod, types.MethodType)):
            attribute = attribute.__func__
        elif isinstance(attribute, types.FunctionType):
            yield attribute
            attribute = vars(attribute).get("__wrapped__")
        else:
            return


def origin_of_function(function: types.FunctionType) -> str | None:
    """Return where a function's code comes from.

    Code without a file belongs to the module whose globals it uses, such as the methods that
    ``dataclass`` writes, and to the user if these are no module's. Code that came in a pickle has them from there.
    """
    path = function.__code__.co_filename
    if path == _BY_VALUE:
        file = function.__globals__.get("__file__")
        return origin_of_file(file) if isinstance(file, str) else None
    if path.startswith("<") and not path.startswith("<frozen"):
        name = function.__globals__.get("__name__")
        if not isinstance(name, str):
            return None
        if name in sys.builtin_module_names:  # these are of C; what exec makes without a name looks like theirs
            return None
        module = sys.modules.get(name)
        return origin_of_module(name) if getattr(module, "__dict__", None) is function.__globals__ else None
    return origin_of_file(path)


def origin_of_module(module: str | None) -> str | None:
    """Return where a loaded module comes from; one that is not loaded is the user's own."""
    loaded = sys.modules.get(module) if isinstance(module, str) else None
    if loaded is None:
        return None
    if module in sys.builtin_module_names:
        return STANDARD
    path = _path_of(loaded)
    package = module.rpartition(".")[0] if isinstance(module, str) else ""
    if package in sys.modules and os.sep not in path:  # of C, or as torch.ops, whose file is a bare name
        return origin_of_module(package)
    origin = origin_of_file(path)
    # A profiler or debugger of the standard library runs the user's script under its own name.
    return None if origin == STANDARD and module in ("__main__", "__mp_main__") else origin


def is_of_cython(value: object) -> bool:
    """Tell whether a value is a function that Cython compiled; its class is of a module that no distribution has."""
    return type(value).__name__ in _OF_CYTHON


def module_of(kind: type) -> str:
    """Name the module of a class; empty where its ``__module__`` is no text.

    That of a class made in C may be what describes the attribute of its instances: so are Cython's in Python 3.10.
    """
    module: object = kind.__module__
    return module if isinstance(module, str) else ""


def _path_of(module: types.ModuleType) -> str:
    try:
        path = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", None) or ()), "")
    except Exception:  # noqa: BLE001 - a module of the user's own kind may raise anything
        return ""
    return path if isinstance(path, str) else ""


def find_origin(module: str) -> str | None:
    """Return where a module that is perhaps not loaded would come from, without importing it.

    Raises:
        ImportError: If there is no such module.
    """
    top = module.partition(".")[0]
    if module in sys.modules:
        return origin_of_module(module)
    if top in sys.modules:
        return origin_of_module(top)
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ImportError(f"there is no module {top}")
    if spec.origin in ("built-in", "frozen"):
        return STANDARD
    return origin_of_file(spec.origin or next(iter(spec.submodule_search_locations or ()), ""))


def origin_of_file(path: str) -> str | None:
    """Return where a file comes from: the names of its distributions, the standard library, or None."""
    return _origin_of_file(path, tuple(sys.path))


@lru_cache(maxsize=4096)
def _origin_of_file(path: str, search_path: tuple[str, ...]) -> str | None:
    if path.startswith("<frozen"):
        return STANDARD
    if not path or path.startswith("<"):
        return None
    full = os.path.realpath(path)
    if full.startswith(_PACKAGE_FOLDER):
        return "torchcache"
    found = distributions_of(full, search_path)
    if found is not None:
        return found
    return STANDARD if full.startswith(_STANDARD_FOLDERS) else None


_PACKAGE_FOLDER = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_STANDARD_FOLDERS = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))


@lru_cache(maxsize=1024)
def version_of(origin: str) -> str:
    """Return what tells the versions of the distributions that ``origin_of_file`` named."""
    return ", ".join(map(installed_version, origin.split(", ")))
