"""How copies are made of what holds something of ours: by copying a module, or by a pickle of code."""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from typing import Any

from torch import nn

from torchcache import our_names
from torchcache.doors.setup import say_replica

#: Says that a copy has nothing in the place of something.
LEFT_OUT = object()


class BoundToModule:
    """Something of ours in a module's ``__dict__`` that computes with that module's weights, whoever holds it."""

    __slots__ = ()

    def in_shallow_copy(self, module: nn.Module, name: str) -> object:
        """Return what a shallow copy of ``module`` has at ``name`` in place of this, or ``LEFT_OUT``."""
        raise NotImplementedError


class CopyHooks:
    """Stands in a module's ``__dict__`` for how it is copied in part.

    A shallow copy, and a copy that ``nn.DataParallel`` makes, are made without what is bound to the module: they
    compute with their own weights and are not cached. A deep copy and a pickle take it along, bound to the copy.
    """

    __torchcache_original__ = None  # as ``our_names.ORIGINAL`` says

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def install(self) -> None:
        """Let the module be copied in this way."""
        hooks = (self.get_state, self.replicate)  # the copy protocol and torch ask the instance for them
        vars(self._needed_module()).update(zip(our_names.COPYING, hooks, strict=True))

    def get_state(self) -> object:
        """Return what the module's own ``__getstate__`` does, without what is bound to it for ``copy.copy``."""
        module = self._needed_module()
        own = getattr(type(module), "__getstate__", None)  # that of object, from Python 3.11 on
        state = vars(module) if own is None else own(module)

        # deepcopy and pickle ask in the same way.
        is_shallow = sys._getframe(1).f_code is copy.copy.__code__  # noqa: SLF001 - the only way to tell
        if is_shallow and isinstance(state, dict):
            return self._in_shallow_copy(state)
        return state

    def replicate(self) -> nn.Module:
        """Return a copy of the module for one call of ``nn.DataParallel``."""
        module = self._needed_module()
        say_replica(type(module).__qualname__)
        replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # noqa: SLF001
        replica.__dict__ = self._in_shallow_copy(vars(replica))
        return replica

    def _in_shallow_copy(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return attributes of the module without what is bound to it, and without these hooks."""
        module = self._needed_module()
        kept: dict[str, Any] = {}
        for name, value in attributes.items():
            if getattr(value, "__self__", None) is self:
                continue
            copied = value.in_shallow_copy(module, name) if isinstance(value, BoundToModule) else value
            if copied is not LEFT_OUT:
                kept[name] = copied
        return kept

    def _needed_module(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._module = weakref.ref(state["module"])


def is_pickled_by_value(held: object, function: types.FunctionType) -> bool:
    """Tell in a ``__reduce__`` whether the pickle brings code along that the reader cannot import.

    So cloudpickle, and its copies in joblib and ray, send what was defined in a script, a notebook or a function. Any
    other pickle names it.

    Args:
        held: What is pickled.
        function: Whose name leads to it.
    """
    pickler = sys._getframe(2).f_globals  # noqa: SLF001 - what calls __reduce__ is C, called by the pickler's dump()
    if "cloudpickle" not in str(pickler.get("__name__")):
        return False
    name = function.__module__
    if name == "__main__" or name not in sys.modules:
        return True
    by_value: set[str] = pickler.get("list_registry_pickle_by_value", set)()
    if any(name == other or name.startswith(f"{other}.") for other in by_value):
        return True
    try:
        return functools.reduce(getattr, function.__qualname__.split("."), sys.modules[name]) is not held
    except AttributeError:
        return True
