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
    name = _name_of(value)
    if name is None or name.partition("::")[0] in OF_TORCH:
        return None
    return Operators(name)


def _name_of(value: object) -> str | None:
    """Return the name of the operators that a value stands for, as of ``Operators``; None for anything else."""
    if isinstance(value, Operators):
        return value.name
    kind = type(value)
    if kind.__module__ != "torch._ops" or kind.__name__ not in _NAMES:
        return None
    attribute = _NAMES[kind.__name__]
    name, _, _ = str(vars(value).get(attribute, "")).partition(".")
    if attribute == "name":  # a namespace
        return f"{name}::"
    return name


def operators_used(function: types.FunctionType, uses: Uses) -> list[Operators]:
    """Return the operators that a function names, and those that it may look up.

    Args:
        function: The function.
        uses: Of its code.
    """
    if "torch" not in sys.modules:
        return []
    scope = _Scope(function)
    found: dict[str, Operators] = {}
    for value in scope.values(tuple(uses.read)):
        operators = operators_at(value)
        if operators is not None and operators.is_one:
            found[operators.name] = operators

    # What is used as it is may be asked for any operator in it.
    for value in scope.values(tuple(uses.used)):
        operators = operators_at(value)
        if operators is not None:
            found[operators.name] = operators
    return [found[name] for name in sorted(found)]


class _Scope(Scope):
    """What the names in a function stand for; of ``torch.ops``, also what was not looked up yet."""

    def attribute(self, value: object, key: str) -> object:
        operators = operators_at(value)
        if operators is None or key.startswith("__"):
            return super().attribute(value, key)
        if operators.is_one:
            return operators
        if operators.name:
            return operators_at(Operators(f"{operators.name}{key}"))
        if key in _NO_NAMESPACE:
            return MISSING
        return operators_at(Operators(f"{key}::"))


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
        made: list[tuple[str, object]] = []
        for name, definition in _definitions(self._operators):
            made += [(name, function) for function in _functions_of(definition)]

        # The answer can only differ where one of these does.
        loaded: Iterable[str] = getattr(_ops(), "loaded_libraries", ())
        asked: list[object] = [len(registered()), count_noted(), len(sys.modules)]
        asked += sorted(loaded)
        for name, function in made:
            asked.append((name, id(function)))
        if asked != self._asked:
            self._asked = asked
            found = _implementation(self._operators, made)
            if found != self._found:
                self._found = found
        return self._found


def _implementation(operators: Operators, made: list[tuple[str, object]]) -> Implementation:
    """Return what runs behind operators now.

    Args:
        operators: The operators.
        made: The functions that ``torch.library.custom_op`` was given for them, by the name of the operator.
    """
    found = _Registered(operators, made)
    functions = [*found.functions, *_kernels(operators)]
    origins = found.origins
    unseen = found.unseen

    # What no function in Python was found for may be in a library of C.
    is_elsewhere = not operators.is_one
    if operators.is_one and not (functions or unseen or origins):
        is_elsewhere = _exists(operators.name)

    own: list[str] = []
    if is_elsewhere:
        for path in sorted(set(_libraries())):
            origin = origin_of_file(path)
            if origin is None:
                own.append(path)
            elif origin not in UNCOUNTED:
                origins.add(origin)
        if operators.is_one and not (own or origins):
            unseen.append(operators.name)
    return Implementation(tuple(functions), tuple(own), tuple(sorted(origins)), tuple(dict.fromkeys(unseen)))


class _Registered:
    """What is registered for operators beside their definitions.

    Attributes:
        functions: The functions that compute values, by the name of the operator.
        origins: The distributions that registered functions of which nothing else is known.
        unseen: The operators of which nothing is known.
    """

    def __init__(self, operators: Operators, made: list[tuple[str, object]]) -> None:
        self.functions = [*made]
        self.origins = set[str]()
        self.unseen: list[str] = []
        defined = {name for name, _ in made}
        for key in sorted(registered()):
            namespace, operator, dispatch = key.split("/", 2)
            name = f"{namespace}::{operator.partition('.')[0]}"
            if dispatch != _SHAPES and operators.counts(name):
                self._add(name, noted(key), origin_of_module(namespace), is_defined=name in defined)

    def _add(self, name: str, function: object, origin: str | None, *, is_defined: bool) -> None:
        """Add what is registered under one key.

        Args:
            name: The operator.
            function: What was registered, if that was noted.
            origin: Where the module comes from that has the name of the operator's namespace.
            is_defined: Whether the operator's definition says what runs.
        """
        if function is not None:
            if not (is_defined and _is_of_definition(function)):
                self.functions.append((name, function))
        elif not is_defined:
            if origin is None:
                self.unseen.append(name)
            else:
                self.origins.add(origin)


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
        candidates = [held]
        if isinstance(held, dict):
            candidates = list(held.values())
        for found in candidates:
            if found is not None:
                yield _within(found)


def _within(function: object) -> object:
    """Return the function in wrappers of torch's, which lead to those that compute shapes as well."""
    for _ in range(_MOST_WRAPPERS):
        if not isinstance(function, types.FunctionType) or not _is_of_definition(function):
            break
        closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        if "fn" not in closure:
            break
        function = closure["fn"].cell_contents
    return function


def _is_of_definition(function: object) -> bool:
    """Tell whether a function is one that torch makes around that of ``torch.library.custom_op``."""
    if not isinstance(function, types.FunctionType):
        return False
    home = function.__globals__.get("__name__")
    return isinstance(home, str) and home.startswith("torch.") and home != "torch.library"


def _kernels(operators: Operators) -> Iterator[tuple[str, object]]:
    """Yield the functions that ``OpOverload.py_impl`` gave an operator, if it was looked up."""
    if not operators.is_one:
        return
    namespace, _, operator = operators.name.partition("::")
    of_namespace = _attributes_of(_ops()).get(namespace)
    packet = _attributes_of(of_namespace).get(operator)
    for overload in list(_attributes_of(packet).values()):
        kernels = getattr(overload, "py_kernels", {})
        for function in list(kernels.values()):
            if isinstance(function, types.FunctionType):
                yield operators.name, function


def _attributes_of(value: object) -> dict[str, object]:
    attributes: dict[str, object] = getattr(value, "__dict__", {})
    return attributes


def _exists(name: str) -> bool:
    torch_c = getattr(sys.modules.get("torch"), "_C", None)
    find = getattr(torch_c, "_jit_get_schemas_for_operator", None)
    return find is None or bool(find(name))


def _libraries() -> Iterator[str]:
    """Yield the files of libraries that may hold operators: loaded as such, or as modules of the user's own."""
    yield from map(str, getattr(_ops(), "loaded_libraries", ()))
    loaded: dict[str, object] = {**sys.modules}  # it may hold anything
    for name, module in loaded.items():
        if not isinstance(module, types.ModuleType):
            continue
        path = getattr(module, "__file__", None)
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
