"""What torchcache leaves on the user's objects, and the way back to what the user put there.

This module does not import torch.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torchcache import our_names
from torchcache.keys.origins import origin_of_function


class StandIn:
    """Stands in place of a function or a bound method of the user's own, and is no function itself."""

    __slots__ = ()

    def stands_for(self) -> Callable[..., object]:
        """Return the function or bound method."""
        raise NotImplementedError


def unwrap(value: object) -> object:
    """Return the user's own function behind those of ours, own or inherited."""
    while True:
        if isinstance(value, types.FunctionType) and is_ours(value) and "__wrapped__" in vars(value):
            value = vars(value)["__wrapped__"]
        elif isinstance(value, StandIn):
            value = value.stands_for()
        else:
            return value


def is_ours(value: object) -> bool:
    """Tell a function of ours from one of the user's own around it, to which ``functools.wraps`` copied the mark."""
    function = value.__func__ if isinstance(value, staticmethod) else value
    return (
        isinstance(function, types.FunctionType)
        and our_names.ORIGINAL in vars(function)
        and origin_of_function(function) == "torchcache"
    )


def original_of(value: Any) -> object:  # noqa: ANN401 - a function of ours, or a static method of it
    """Return what a class itself has where a function of ours stands, or None."""
    function = value.__func__ if isinstance(value, staticmethod) else value
    return vars(function)[our_names.ORIGINAL]


def is_hook_of_ours(name: str, value: object) -> bool:
    """Tell whether an entry of a module's ``__dict__`` was put there by torchcache, for how it is called and copied."""
    if name == our_names.FORWARD:
        return hasattr(value, our_names.ORIGINAL)
    if name not in our_names.COPYING:
        return False
    return hasattr(getattr(value, "__self__", None), our_names.ORIGINAL)
