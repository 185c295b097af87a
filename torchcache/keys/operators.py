"""What runs behind an operator of ``torch.ops``. This module does not import torch.

Torch keeps the functions of ``torch.library.custom_op``. Of those of ``Library.impl`` only what is noted is known (see
``registrations.py``), because its dispatcher does not give them back.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchcache.keys.calls import Uses
from torchcache.keys.digest import digest_parts
from torchcache.keys.origins import UNCOUNTED, origin_of_file, origin_of_module
from torchcache.keys.places import MISSING
from torchcache.keys.registrations import OF_TORCH, count_noted, noted, registered
from torchcache.keys.scope import Scope

#: Attributes of ``torch.ops`` that are no namespace.
_NO_NAMESPACE = frozenset({"import_module", "load_library", "loaded_libraries"})

#: Registered for this key is what computes shapes, not values.
_SHAPES = "Meta"

#: Wrappers are opened so deep to find the function inside.
_MOST_WRAPPERS = 8

_EXTENSIONS = (".so", ".pyd", ".dylib")


#: Classes of torch._ops, and the attribute that holds the name of their operators.
_NAMES = {"_Ops": "", "_OpNamespace": "name", "OpOverloadPacket": "_qualified_op_name", "OpOverload": "_name"}


@dataclass(frozen=True, slots=True)
class Operators:
    """Operators by their name, such as "mine::scale": all of a namespace without what follows, or all there are."""

    name: str

    @property
    def is_one(self) -> bool:
        """Whether a single operator is named, with all its overloads."""
        return bool(self.name) and not self.name.endswith("::")

    def counts(self, name: str) -> bool:
        """Tell whether these include an operator, and not one of torch's own."""
        is_meant = name == self.name if self.is_one else name.startswith(self.name)
        return is_meant and name.partition("::")[0] not in OF_TORCH


def operators_at(value: object) -> Operators | None:
    """Return which operators a value stands for, or leads to; None for anything else, and for torch's own."""
    kind = type(value)
    if isinstance(value, Operators):
        name = value.name
    elif kind.__module__ != "torch._ops" or kind.__name__ not in _NAMES:
        return None
    else:
        attribute = _NAMES[kind.__name__]
        name = str(vars(value).get(attribute, "")).partition(".")[0] + ("::" if attribute == "name" else "")
    return None if name.partition("::")[0] in OF_TORCH else Operators(name)


def operators_used(function: types.FunctionType, uses: Uses) -> list[Operators]:
    """Return the operators that a function names, and those that it may look up.

    Args:
        function: The function.
        uses: Of its code.
    """
    if "torch" not in sys.modules:
        return []
    scope = _Scope(function, uses)
    read = filter(None, map(operators_at, scope.values(tuple(uses.read))))
    used = filter(None, map(operators_at, scope.values(tuple(uses.used))))
    found = {operators.name: operators for operators in [*(o for o in read if o.is_one), *used]}
    return [found[name] for name in sorted(found)]


class _Scope(Scope):
    """What the names in a function stand for; of ``torch.ops``, also what was not looked up yet."""

    def attribute(self, value: object, key: str) -> object:
        operators = operators_at(value)
        if operators is None or key.startswith("__"):
            return super().attribute(value, key)
        if operators.is_one:
            return operators
        if not operators.name and key in _NO_NAMESPACE:
            return MISSING
        return operators_at(Operators(f"{operators.name}{key}" if operators.name else f"{key}::"))


@dataclass(frozen=True, slots=True)
class Implementation:
    """What runs behind some operators.

    Attributes:
        functions: Those written in Python, by the name of the operator.
        files: The user's own libraries, of which one may hold an operator that is not written in Python.
        origins: The distributions of other such libraries, and of modules whose functions torch does not give back.
        unseen: The operators of which none of this is known.
    """

    functions: tuple[tuple[str, object], ...] = ()
    files: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    def __call__(self) -> tuple[tuple[str, object], ...]:
        """Return the functions; callable, so that others in their place are told from them as code is."""
        return self.functions


class ImplementationOf:
    """What runs behind some operators now; the same object is read as long as it is the same.

    Args:
        operators: The operators.
    """

    def __init__(self, operators: Operators) -> None:
        self._operators = operators
        self._asked: object = None
        self._found = Implementation()

    def get(self, key: str, default: object, /) -> object:  # noqa: ARG002 - there is one key
        """Return it."""
        definitions = _definitions(self._operators)
        made = tuple((name, function) for name, definition in definitions for function in _functions_of(definition))
        loaded: Iterable[str] = getattr(_ops(), "loaded_libraries", ())
        asked = [len(registered()), count_noted(), len(sys.modules), *sorted(loaded), *((n, id(f)) for n, f in made)]
        if asked != self._asked:
            self._asked = asked
            found = _implementation(self._operators, made)
            if found != self._found:
                self._found = found
        return self._found


def _implementation(operators: Operators, made: tuple[tuple[str, object], ...]) -> Implementation:
    functions, origins, unseen = [*made], set[str](), []
    defined = {name for name, _ in made}
    is_elsewhere = not operators.is_one
    for key in sorted(registered()):
        namespace, operator, dispatch = key.split("/", 2)
        name = f"{namespace}::{operator.partition('.')[0]}"
        if dispatch == _SHAPES or not operators.counts(name):
            continue
        function = noted(key)
        if function is not None and not (name in defined and _is_of_definition(function)):
            functions.append((name, function))
        elif function is None and name not in defined:
            origin = origin_of_module(namespace)
            origins.update(() if origin is None else (origin,))
            unseen += [name] if origin is None else []
    for name, function in _kernels(operators):
        functions.append((name, function))
    if not functions and not unseen and not origins and operators.is_one:
        is_elsewhere = _exists(operators.name)
    files = sorted({*_libraries()}) if is_elsewhere else []
    own = tuple(path for path in files if origin_of_file(path) is None)
    origins |= {origin for path in files if (origin := origin_of_file(path)) is not None and origin not in UNCOUNTED}
    if is_elsewhere and operators.is_one and not (own or origins):
        unseen.append(operators.name)
    return Implementation(tuple(functions), own, tuple(sorted(origins)), tuple(dict.fromkeys(unseen)))


def _ops() -> Any:  # noqa: ANN401 - torch.ops
    return getattr(sys.modules.get("torch"), "ops", None)


def _definitions(operators: Operators) -> list[tuple[str, object]]:
    """Return what ``torch.library.custom_op`` made, by the names of the operators."""
    known = getattr(sys.modules.get("torch._library.custom_ops"), "OPDEFS", None) or {}
    if operators.is_one:
        found = known.get(operators.name)
        return [] if found is None else [(operators.name, found)]
    return [(name, known[name]) for name in sorted(known) if operators.counts(name)]


def _functions_of(definition: object) -> Iterator[object]:
    """Yield the functions that compute values, not those that compute shapes or gradients."""
    for attribute in ("_init_fn", "_backend_fns", "_torch_dispatch_fns", "_vmap_fn"):
        held = getattr(definition, attribute, None)
        for found in [*held.values()] if isinstance(held, dict) else [held]:
            if found is not None:
                yield _within(found)


def _within(function: object) -> object:
    """Return the function in wrappers of torch's, which lead to those that compute shapes as well."""
    for _ in range(_MOST_WRAPPERS):
        if not (isinstance(function, types.FunctionType) and _is_of_definition(function)):
            break
        closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        if "fn" not in closure:
            break
        function = closure["fn"].cell_contents
    return function


def _is_of_definition(function: object) -> bool:
    """Tell whether a function is one that torch makes around that of ``torch.library.custom_op``."""
    home = function.__globals__.get("__name__") if isinstance(function, types.FunctionType) else None
    return isinstance(home, str) and home.startswith("torch.") and home != "torch.library"


def _kernels(operators: Operators) -> Iterator[tuple[str, object]]:
    """Yield the functions that ``OpOverload.py_impl`` gave an operator, if it was looked up."""
    namespace, _, operator = operators.name.partition("::")
    of_namespace = getattr(_ops(), "__dict__", {}).get(namespace) if operators.is_one else None
    packet = getattr(of_namespace, "__dict__", {}).get(operator)
    for overload in [*getattr(packet, "__dict__", {}).values()]:
        for function in [*getattr(overload, "py_kernels", {}).values()]:
            if isinstance(function, types.FunctionType):
                yield operators.name, function


def _exists(name: str) -> bool:
    find = getattr(getattr(sys.modules.get("torch"), "_C", None), "_jit_get_schemas_for_operator", None)
    return find is None or bool(find(name))


def _libraries() -> Iterator[str]:
    """Yield the files of libraries that may hold operators: loaded as such, or as modules of the user's own."""
    yield from map(str, getattr(_ops(), "loaded_libraries", ()))
    loaded: dict[str, object] = {**sys.modules}  # it may hold anything
    for name, module in loaded.items():
        path = getattr(module, "__file__", None) if isinstance(module, types.ModuleType) else None
        if isinstance(path, str) and path.endswith(_EXTENSIONS) and origin_of_module(name) is None:
            yield path


@lru_cache(maxsize=256)
def _digest_of_file(path: str, size: int, time_ns: int) -> bytes:  # noqa: ARG001 - another file at the path
    return digest_parts([Path(path).read_bytes()])


def digest_of_file(path: str) -> bytes:
    """Return a digest of the content of a file, which is read once."""
    try:
        status = Path(path).stat()
        return _digest_of_file(path, status.st_size, status.st_mtime_ns)
    except OSError:
        return b""
