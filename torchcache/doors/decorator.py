"""The decorator, and the cache of what it decorated: both tell the kinds of targets apart and ask the door of each."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from torchcache import our_names
from torchcache.cache import Cache
from torchcache.doors.classes import cache_of_instance, decorate_class
from torchcache.doors.functions import decorate_function
from torchcache.doors.instances import CachedForward, decorate_instance
from torchcache.doors.methods import (
    NO_CLASS_METHODS,
    CachedMethod,
    decorate_bound_method,
    decorate_method,
    is_written_in_a_class,
)
from torchcache.doors.typing import Decorator
from torchcache.errors import ConfigError
from torchcache.keys.ours import StandIn
from torchcache.options import CacheOptions, OptionArguments

if TYPE_CHECKING:
    from typing_extensions import Never, Unpack

#: What a class may hold in place of a method, and what to do instead.
_REMEDIES = {
    staticmethod: "write @staticmethod above @torchcache()",
    classmethod: NO_CLASS_METHODS,
    property: "a property takes no batch; decorate a method that takes one",
}

_REMEDY_FOR_SCRIPTED = (
    "its code is not Python any more; decorate the function that it was made of, or one of your own that calls it, "
    "with a persistent_module_hash"
)

_REMEDY_FOR_OTHERS = "give it an nn.Module class, an nn.Module, a function or a method, and a dataset to CachedDataset"


def torchcache(*target: Never, **options: Unpack[OptionArguments]) -> Decorator:
    """Cache what a module class, a function or a module returns, sample by sample.

    Use it as ``@torchcache()`` above an ``nn.Module`` class, a function or a method, or call
    ``torchcache()(module)`` or ``torchcache()(module.method)`` with a module that somebody else wrote. Classes and
    modules are changed in place and returned; of functions and methods a wrapper is returned (``CachedFunction``).

    Args:
        *target: Must be empty; only there to explain the missing parentheses of a bare ``@torchcache``.
        **options: See ``CacheOptions``; each is checked here. A module's attributes named
            ``torchcache_<option>`` win over them.

    Raises:
        ConfigError: If an option is unknown or wrong, or the target cannot be cached.
    """
    if target:
        raise ConfigError("torchcache needs parentheses: write @torchcache() or torchcache()(module)")
    checked = CacheOptions.from_arguments(options)

    def decorate(target: object) -> Any:  # noqa: ANN401 - Decorator says what for what
        if isinstance(target, type):
            return decorate_class(target, checked)
        if isinstance(target, nn.Module):
            return decorate_instance(target, checked)
        if isinstance(target, types.FunctionType):
            if is_written_in_a_class(target):
                return decorate_method(target, checked)
            return decorate_function(target, checked)
        if isinstance(target, types.MethodType):
            return decorate_bound_method(target, checked)
        if isinstance(target, StandIn):
            raise ConfigError(f"{_name_of(target)} is decorated with torchcache() already; drop one of the two")
        remedy = _REMEDIES.get(type(target), _REMEDY_FOR_OTHERS)
        if isinstance(target, torch.jit.ScriptFunction):
            remedy = _REMEDY_FOR_SCRIPTED
        raise ConfigError(f"torchcache() cannot decorate {target!r}: {remedy}")

    return decorate


def cache_of(target: object) -> Cache:
    """Return the cache of a decorated function or module, of an instance of a decorated class, or of its method.

    So it does of a ``CachedDataset`` and of what ``lazy()`` made.

    Raises:
        ConfigError: If the target is not decorated, or is not enabled.
    """
    cache = _cache_of_module(target) if isinstance(target, nn.Module) else _cache_of_other(target)
    if cache is None:
        hint = "; ask an instance of the class" if isinstance(target, (type, CachedMethod)) else ""
        raise ConfigError(
            f"{_name_of(target)} has no cache: it is not decorated with torchcache(), or not enabled{hint}"
        )
    cache.identify()
    return cache


def _cache_of_module(module: nn.Module) -> Cache | None:
    forward = vars(module).get(our_names.FORWARD)
    if isinstance(forward, CachedForward):
        return forward.cache(module)
    if hasattr(type(module), our_names.OPTIONS):
        return cache_of_instance(module)
    return _cache_on(module)


def _cache_of_other(target: object) -> Cache | None:
    if isinstance(target, (types.FunctionType, StandIn, Dataset)):
        return _cache_on(target)
    if isinstance(target, types.MethodType):
        # Another decorator may be above ours.
        method = inspect.unwrap(target.__func__, stop=lambda function: isinstance(function, CachedMethod))
        if isinstance(method, CachedMethod):
            return method.cache(target.__self__)
    return None


def _cache_on(target: object) -> Cache | None:
    found = getattr(target, our_names.CACHE, None)
    return found if isinstance(found, Cache) else None


def _name_of(target: object) -> str:
    if isinstance(target, StandIn):
        return _name_of(target.stands_for())
    if isinstance(target, (type, types.FunctionType, types.MethodType)):
        return target.__qualname__
    return type(target).__qualname__
