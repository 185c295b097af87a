"""What the names in a function stand for now, without running code of the user's. This module does not import torch."""

from __future__ import annotations

import builtins
import importlib.util
import sys
import types
import weakref
from dataclasses import dataclass, field

from torchcache.keys.calls import Operand, Operands, Uses, text_of
from torchcache.keys.places import DEFAULT, MISSING, AttributesOf, ClosureOf, DefaultsOf, package_of

#: At most so many variables are followed to find one value: they may be assigned each other.
_MOST_VARIABLES = 64


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


class Scope:
    """What the names in a function stand for now.

    Args:
        function: The function; it does not live for this.
        uses: Of its code.
    """

    def __init__(self, function: types.FunctionType, uses: Uses) -> None:
        self._function = weakref.ref(function)
        self._uses = uses

    def values(self, operands: Operands, left_out: Operand | None = None) -> list[object]:
        """Return the values that something may be; ``MISSING`` for one that is not known.

        Args:
            operands: Where they come from.
            left_out: Where they do not come from.
        """
        return self._values(operands, _Path(left_out))

    def _values(self, operands: Operands, path: _Path) -> list[object]:
        found = []
        for operand in operands:
            for value in () if operand == path.left_out else self._roots(operand, path):
                for key in operand.keys:
                    value = self.attribute(value, key)  # noqa: PLW2901 - on to the next
                found.append(value)
        return found

    def _roots(self, operand: Operand, path: _Path) -> list[object]:
        """Return what the attributes of an operand are read of."""
        function, root = self._function(), operand.root
        if function is None:
            return [MISSING]
        if operand.kind == "global":
            return [function.__globals__.get(root, vars(builtins).get(root, MISSING))]
        if operand.kind == "module":
            return [self._imported(root, function)]
        if operand.kind == "variable":
            return self._variable(root, function, path)
        if operand.kind == "constant" and root == "None":
            return [None]
        text = text_of(operand)
        return [MISSING if text is None else text]

    def _variable(self, name: str, function: types.FunctionType, path: _Path) -> list[object]:
        if name in path.variables:
            return []
        if path.left == 0:
            return [MISSING]
        path.left -= 1
        code = function.__code__
        path.variables.append(name)
        values = self._values(self._uses.assigned.get(name, ()), path)
        path.variables.pop()
        if name in code.co_freevars:
            values.append(ClosureOf(self._function).get(name, MISSING))
        elif name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            values.append(DefaultsOf(self._function).get(name + DEFAULT, MISSING))
        return values or [MISSING]

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
