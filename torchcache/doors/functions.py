"""The door for functions: a wrapper takes the place of each."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torchcache import our_names
from torchcache.cache import Cache
from torchcache.doors.setup import prepare
from torchcache.errors import ConfigError
from torchcache.keys.identity import Target
from torchcache.options import CacheOptions

#: Functions that return before they have computed anything.
_LATE = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def decorate_function(function: types.FunctionType, options: CacheOptions) -> Callable[..., Any]:
    """Return a function that caches what another returns; the other itself if that is not enabled.

    Raises:
        ConfigError: If it is decorated already, returns before it has computed, or the options do not fit it.
    """
    check_function(function)
    prepare(options, function, is_method=False)
    if not options.enabled:
        return function
    cache = Cache(Target(name=function.__qualname__, code=function, function=function), options)

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> object:
        return cache.call(function, args, kwargs)

    setattr(cached, our_names.ORIGINAL, function)
    setattr(cached, our_names.CACHE, cache)
    return cached


def check_function(function: types.FunctionType) -> None:
    """Check that a function can be cached.

    Raises:
        ConfigError: If it is decorated already, or returns before it has computed anything.
    """
    if hasattr(function, our_names.ORIGINAL):
        raise ConfigError(f"{function.__qualname__} is decorated with torchcache() already; drop one of the two")
    if any(is_kind(function) for is_kind in _LATE):
        raise ConfigError(
            f"torchcache() cannot decorate {function.__qualname__}: what an async or generator function returns is not "
            "its result yet; decorate the function inside that computes the tensors"
        )
