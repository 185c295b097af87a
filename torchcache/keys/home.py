"""Whose code a walk enters: the user's own, and that of the target's own distribution.

This module does not import torch.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

from torchcache.keys.inside import opened
from torchcache.keys.operators import operators_at
from torchcache.keys.origins import (
    UNCOUNTED,
    functions_behind,
    is_of_cython,
    origin_of_class,
    origin_of_function,
    origin_of_module,
)


class Home:
    """Tells whose code a walk enters; the target's counts wherever it comes from.

    Args:
        target: The class or function that the walk starts at.

    Attributes:
        origin: Where the target comes from; None for the user's own.
        is_library: Whether that is a distribution whose code counts by its version everywhere else.
    """

    def __init__(self, target: type | Callable[..., object]) -> None:
        self.origin: str | None = _origin_of_target(target)
        self.is_library: bool = self.origin is not None and self.origin not in UNCOUNTED

    def is_own(self, origin: str | None) -> bool:
        """Tell whether code of an origin is entered."""
        return origin is None or (origin == self.origin and self.is_library)

    def leads_to_own(self, value: object) -> bool:
        """Tell whether code of the user's own lies in an object, perhaps behind code of a library."""
        return any(map(self._is_own_code, opened(value, self.is_own, into_own=False)))

    def _is_own_code(self, found: object) -> bool:
        if isinstance(found, types.FunctionType):
            return self.is_own(origin_of_function(found))
        if operators_at(found) is not None:
            return True
        if isinstance(found, types.ModuleType):
            return found is sys.modules.get(found.__name__) and origin_of_module(found.__name__) is None
        if is_of_cython(found):
            return self.is_own(origin_of_module(str(getattr(found, "__module__", ""))))
        return self.is_own(origin_of_class(found if isinstance(found, type) else type(found)))

    def functions_in(self, value: object) -> list[types.FunctionType]:
        """Return the functions of the user's own that calling ``value`` runs, through wrappers of anybody's."""
        functions = (found for found in opened(value, self.is_own) if isinstance(found, types.FunctionType))
        return [function for function in functions if self.is_own(origin_of_function(function))]

    def code_in(self, value: object) -> Iterator[types.FunctionType | type]:
        """Yield the functions of the user's own that lie in a value, and the classes of what else does."""
        for found in opened(value, self.is_own, into_own=False):
            if isinstance(found, types.FunctionType):
                if self.is_own(origin_of_function(found)):
                    yield found
            elif not isinstance(found, types.ModuleType):
                yield found if isinstance(found, type) else type(found)


def _origin_of_target(target: type | Callable[..., object]) -> str | None:
    """Return where a target comes from; what wraps a function of the user's own is the user's as well."""
    if isinstance(target, type):
        return origin_of_class(target)
    origins = [origin_of_function(function) for function in functions_behind(target)]
    if not origins:
        return origin_of_module(getattr(target, "__module__", None))
    return next((origin for origin in origins if origin not in UNCOUNTED), origins[0])
