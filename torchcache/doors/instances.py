"""The door for modules that somebody else wrote: one instance is cached, and its class stays as it was."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from torchcache import our_names
from torchcache.cache import Cache
from torchcache.doors.copies import LEFT_OUT, BoundToModule, CopyHooks
from torchcache.doors.setup import merge_options, module_caches
from torchcache.errors import ConfigError
from torchcache.keys.collectives import plain_class
from torchcache.keys.identity import Target
from torchcache.options import CacheOptions


def decorate_instance(module: nn.Module, options: CacheOptions) -> nn.Module:
    """Let what a module returns be cached; return the module.

    Raises:
        ConfigError: If it is decorated already, is no Python any more, or the options do not fit it.
    """
    if isinstance(vars(module).get(our_names.FORWARD), CachedForward) or hasattr(type(module), our_names.OPTIONS):
        raise ConfigError(
            f"this {type(module).__qualname__} is decorated with torchcache() already; drop one of the two"
        )
    if type(module).__module__.startswith("torch.jit"):
        raise ConfigError(
            f"torchcache() cannot decorate a {type(module).__qualname__}: its code is not Python any more; decorate "
            "the module that it was made of, or a function of your own that calls it, with a persistent_module_hash"
        )
    forward = CachedForward(module, options)
    forward.merged_options()

    # Past ``__setattr__``: a wrapper such as Fabric's may set the attribute on the module that it wraps.
    vars(module)[our_names.FORWARD] = forward
    CopyHooks(module).install()
    forward.cache(module)
    return module


class CachedForward(BoundToModule):
    """Stands in an instance's ``__dict__["forward"]`` and caches what the module's own forward returns.

    Attributes:
        options: Those of the decorator.
    """

    def __init__(self, module: nn.Module, options: CacheOptions) -> None:
        self._module = weakref.ref(module)
        self.options: CacheOptions = options
        self.__torchcache_original__: Callable[..., Any] | None = vars(module).get(our_names.FORWARD)

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        module = self._module()
        assert module is not None
        cache = self.cache(module)
        function = self._function(module)
        if cache is None:
            return function(*args, **kwargs)
        return cache.call(function, args, kwargs)

    def cache(self, module: nn.Module) -> Cache | None:
        """Return the module's cache, and let the attribute ``cache_instance`` be it; None if it is not cached."""
        cache = module_caches.of(module, self.options, self._make_cache)
        attributes = vars(module)
        if cache is None:
            attributes.pop(our_names.CACHE, None)
        elif attributes.get(our_names.CACHE) is not cache:
            attributes[our_names.CACHE] = cache
        return cache

    def cache_of_copy(self) -> Cache:
        """Return the cache of the module, which is a copy that is still being made."""
        module = self._module()
        assert module is not None
        return module_caches.get(module, self._make_cache)

    def describe(self) -> Target:
        """Return what is cached; also while the module is still being copied."""
        module = self._module()
        assert module is not None
        cls: type[nn.Module] = plain_class(type(module))
        return Target(
            name=cls.__qualname__,
            code=cls,
            function=self.__torchcache_original__ or cls.forward,
            instance=self._module,
            is_method=self.__torchcache_original__ is None,
        )

    def merged_options(self) -> CacheOptions:
        """Return the options in force for the module, checked."""
        module = self._module()
        if module is None:  # its cache outlives it
            return self.options
        return merge_options(self.options, module, self._function(module), is_method=False)

    def in_shallow_copy(self, module: nn.Module, name: str) -> object:  # noqa: ARG002 - the same of all
        if self.__torchcache_original__ is None:
            return LEFT_OUT
        return self.__torchcache_original__

    def _make_cache(self, module: nn.Module) -> Cache:  # noqa: ARG002 - as of the other doors
        return _AttributeCache(self)

    def _function(self, module: nn.Module) -> Callable[..., Any]:
        function: Callable[..., Any] = self.__torchcache_original__ or type(module).forward.__get__(module)
        return function

    @property
    def __code__(self) -> types.CodeType:
        """The original forward's code; torch.export asks for it."""
        module = self._module()
        assert module is not None
        code: types.CodeType = inspect.unwrap(self._function(module)).__code__
        return code

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The original forward, bound; inspect.signature asks for it."""
        module = self._module()
        if module is None:  # its attributes are looked at while it is still being made
            raise AttributeError("__wrapped__")
        return self._function(module)

    @property
    def __globals__(self) -> dict[str, Any]:
        """What only torch.jit.script asks for, which compiles the source of functions."""
        raise AttributeError(
            "torch.jit.script cannot compile a module whose forward torchcache() took the place of; use "
            "torch.jit.trace, which sees the undecorated module, or decorate its class in place of the module"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module(), "options": self.options, "original": self.__torchcache_original__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._module = weakref.ref(state["module"])
        self.options = state["options"]
        self.__torchcache_original__ = state["original"]


class _AttributeCache(BoundToModule, Cache):
    """A cache that its module has as an attribute: a copy of the module gets one of its own."""

    def __init__(self, forward: CachedForward) -> None:
        super().__init__(forward.describe(), forward.options)
        self._forward = forward

    def _final_options(self) -> CacheOptions:
        # A copy has its attributes, which may be options, once it is complete: they are merged at first use.
        return self._forward.merged_options()

    def in_shallow_copy(self, module: nn.Module, name: str) -> object:  # noqa: ARG002 - none of any
        return LEFT_OUT

    def __reduce__(self) -> tuple[Callable[..., object], tuple[CachedForward]]:
        return CachedForward.cache_of_copy, (self._forward,)
