"""What the names in a function stand for now, without running code of the user's. This module does not import torch."""

from __future__ import annotations

import builtins
import importlib.util
import sys
import types
import weakref
from dataclasses import dataclass, field

from torchcache.keys.calls import uses_of
from torchcache.keys.operands import UNKNOWN, Operand, Operands, text_of
from torchcache.keys.per_code import PerCode
from torchcache.keys.places import DEFAULT, MISSING, AttributesOf, ClosureOf, DefaultsOf, package_of

#: At most so many variables are followed to find one value: they may be assigned each other.
_MOST_VARIABLES = 64


class Scope:
    """What the names in a function stand for now.

    Args:
        function: The function; it does not live for this.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self._function = weakref.ref(function)
        self._sources = _sources_in(function.__code__)

    def values(self, operands: Operands, left_out: Operand | None = None) -> list[object]:
        """Return the values that something may be; ``MISSING`` for one that is not known.

        Args:
            operands: Where they come from.
            left_out: Where they do not come from.
        """
        function = self._function()
        found = []
        for source in self._sources.of(operands, left_out):
            value = MISSING if function is None else self._root(source, function)
            for key in source.keys:
                value = self.attribute(value, key)
            found.append(value)
        return found

    def _root(self, source: Operand, function: types.FunctionType) -> object:
        """Return what the attributes of a source are read of."""
        kind, root, _ = source
        if kind == "global":
            return function.__globals__.get(root, vars(builtins).get(root, MISSING))
        if kind == "closure":
            return ClosureOf(self._function).get(root, MISSING)
        if kind == "default":
            return DefaultsOf(self._function).get(root, MISSING)
        if kind == "module":
            return self._imported(root, function)
        if kind == "constant" and root == "None":
            return None
        text = text_of(source)
        return MISSING if text is None else text

    def _imported(self, name: str, function: types.FunctionType) -> object:
        """Return the module that an import in the function names, with dots in front if it is relative."""
        try:
            return self.module(importlib.util.resolve_name(name, package_of(function)))
        except ImportError:
            return MISSING

    def attribute(self, value: object, key: str) -> object:
        """Return an attribute without running code of the user's own; ``MISSING`` if that does not find it."""
        found: object = MISSING
        if isinstance(value, types.ModuleType):
            return vars(value)[key] if key in vars(value) else self.module(f"{value.__name__}.{key}")
        if isinstance(value, type):
            found = next((vars(base)[key] for base in value.__mro__ if key in vars(base)), MISSING)
        elif value is not MISSING:
            found = AttributesOf(lambda: value).get(key, MISSING)
        return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found

    def module(self, name: str) -> object:
        """Return a module, if it is loaded."""
        return sys.modules.get(name, MISSING)


@dataclass(slots=True)
class _Path:
    """How a value is looked for.

    Attributes:
        left_out: Where it does not come from.
        variables: Those on the way, each assigned the next.
        left: How many more may be followed.
    """

    left_out: Operand | None
    variables: list[str] = field(default_factory=list)
    left: int = _MOST_VARIABLES


class _Sources:
    """Where values come from in the end, through variables, as far as code alone tells.

    A source is an operand of any kind but "variable"; or of the kind "closure", for a closure variable, or "default",
    for the default of a parameter.

    Args:
        code: The code object.
    """

    def __init__(self, code: types.CodeType) -> None:
        self._assigned = uses_of(code).assigned
        self._closure = frozenset(code.co_freevars)
        self._parameters = frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        self._known: dict[tuple[Operands, Operand | None], Operands] = {}  # as many as the code has of them

    def of(self, operands: Operands, left_out: Operand | None) -> Operands:
        """Return the sources of something, but for ``left_out``, in the order in which they are found."""
        key = operands, left_out
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = tuple(self._follow(operands, _Path(left_out)))
        return known

    def _follow(self, operands: Operands, path: _Path) -> list[Operand]:
        found = []
        for operand in operands:
            if operand == path.left_out:
                continue
            if operand.kind != "variable":
                found.append(operand)
                continue
            for kind, root, keys in self._of_variable(operand.root, path):
                found.append(Operand(kind, root, keys + operand.keys))
        return found

    def _of_variable(self, name: str, path: _Path) -> list[Operand]:
        if name in path.variables:
            return []
        if path.left == 0:
            return [*UNKNOWN]
        path.left -= 1
        path.variables.append(name)
        sources = self._follow(self._assigned.get(name, ()), path)
        path.variables.pop()
        if name in self._closure:
            sources.append(Operand("closure", name))
        elif name in self._parameters:
            sources.append(Operand("default", name + DEFAULT))
        return sources or [*UNKNOWN]


_sources_in = PerCode(_Sources)
