"""The one rule of all doors: what is cached, with which options, and where the cache of an instance is.

Each door says how it is attached to a target and what its cache is of (``Target``); all else is here.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from torchcache import process
from torchcache.cache import Cache
from torchcache.inputs.signature import CallSignature
from torchcache.options import CacheOptions
from torchcache.report.log import warn_once
from torchcache.storage import temporary

_making = process.ForkLock()  # guards what each CacheRegistry holds


def is_cached(instance: object, options: CacheOptions) -> bool:
    """Tell whether calls of an instance are cached now.

    Its attribute ``torchcache_enabled`` counts, else that of its class, else the option; any of them may be changed
    at any time. The copies that ``nn.DataParallel`` makes for one call have weights of their own, which would have to
    be hashed at each call: they are not cached.

    Args:
        instance: A module, or what a method is called on.
        options: Those of the decorator.

    Raises:
        ConfigError: If the attribute is neither True nor False.
    """
    own = getattr(instance, "__dict__", {})
    if own.get("_is_replica"):
        say_replica(type(instance).__qualname__)
        return False

    enabled = own.get("torchcache_enabled")
    if enabled is None:
        enabled = getattr(type(instance), "torchcache_enabled", None)
    if enabled is None:
        return options.enabled
    if isinstance(enabled, bool):
        return enabled
    return options.with_attributes(instance).enabled  # which raises


def say_replica(name: str) -> None:
    """Say once that replicas of a module are not cached."""
    warn_once(
        ("replica", name),
        "%s: nn.DataParallel makes copies of the module for each call, and these are not cached; cache a module "
        "outside of it, or use DistributedDataParallel",
        name,
    )


def merge_options(
    options: CacheOptions, instance: object, function: Callable[..., Any], *, is_method: bool
) -> CacheOptions:
    """Return the options in force for an instance, made ready by ``prepare``.

    Args:
        options: Those of the decorator; attributes of the instance and of its class win over them.
        instance: A module, or what a method is called on.
        function: What is cached.
        is_method: Whether the first parameter of ``function`` is the instance.

    Raises:
        ConfigError: If an attribute is no option or has a wrong value, or the options contradict each other.
    """
    merged = options.with_attributes(instance)
    prepare(merged, function, is_method=is_method)
    return merged


def prepare(options: CacheOptions, function: Callable[..., Any], *, is_method: bool) -> None:
    """Check merged options together, and see to it that a temporary directory is removed at the end.

    Here and not at first use: workers may use it although this process never does.

    Raises:
        ConfigError: If they contradict each other or the parameters of ``function``.
    """
    options.check_combinations()
    check_parameters(options, function, is_method=is_method)
    reserve(options)


def check_parameters(options: CacheOptions, function: Callable[..., Any], *, is_method: bool) -> None:
    """Check that a function has the parameters that options name.

    Raises:
        ConfigError: If it has not.
    """
    if options.unbatched or options.padded:
        CallSignature.of_options(function, options, is_method=is_method)


def reserve(options: CacheOptions) -> None:
    """See to it that the temporary directory is removed at the end, if these options use it."""
    is_temporary = options.persistent and options.persistent_cache_dir is None
    if is_temporary and options.enabled and options.writes:
        temporary.reserve()


def identified(cache: Cache | None, what: str) -> Cache:
    """Return what the attribute ``cache_instance`` is, with its module hash found out.

    Args:
        cache: None if the target is not cached.
        what: The kind of target, for the error.

    Raises:
        AttributeError: If the target is not cached.
    """
    if cache is None:
        raise AttributeError(f"cache_instance: torchcache is not enabled for this {what}")
    cache.identify()
    return cache


class _Kept:
    """The cache of one instance, None once that is gone."""

    __slots__ = ("_reference", "cache")

    def __init__(self, instance: object, cache: Cache) -> None:
        self.cache: Cache | None = cache
        # No weakref.finalize: it would hold the cache, and what a cache saw of the state may lead back to the instance.
        self._reference = weakref.ref(instance, self._let_go)

    def _let_go(self, _: object) -> None:
        self.cache = None


class CacheRegistry:
    """The caches of instances: each is made when it is first asked for, and forgotten with its instance.

    Whoever decorates owns the registry of what it decorated: modules share ``module_caches``, each cached method has
    one of its own. One for all would outlive a method that nobody holds any more, and keep alive what its caches saw
    of the state, which may lead back to the instance.

    Safe from any thread.
    """

    def __init__(self) -> None:
        # By the id of a live instance. The dictionary is replaced and never changed: torch.compile and strict export
        # walk over it while they trace.
        self._caches: dict[int, _Kept] = {}

    def of(self, instance: Any, options: CacheOptions, make: Callable[[Any], Cache]) -> Cache | None:  # noqa: ANN401 - of any class
        """Return the cache of an instance; None if it is not cached.

        Args:
            instance: A module, or what a method is called on.
            options: Those of the decorator.
            make: Makes the cache of an instance.
        """
        if not is_cached(instance, options):
            return None
        known = self._caches.get(id(instance))
        if known is not None and known.cache is not None:
            return known.cache
        return _get_uncompiled(self, instance, make)

    def get(self, instance: Any, make: Callable[[Any], Cache]) -> Cache:  # noqa: ANN401 - as above
        """Return the cache that an instance has, or is to have, whether it is cached now or not."""
        with _making.raw:
            known = self._caches.get(id(instance))
            if known is not None and known.cache is not None:
                return known.cache

            cache = make(instance)
            live = {key: kept for key, kept in self._caches.items() if kept.cache is not None}
            self._caches = {**live, id(instance): _Kept(instance, cache)}
            return cache


def _get_uncompiled(registry: CacheRegistry, instance: object, make: Callable[[Any], Cache]) -> Cache:
    """Make a cache, which torch.compile could not trace; a graph break, as ``cache.call_uncompiled`` is."""
    if "torch._dynamo" not in sys.modules:  # to import it takes a second
        return registry.get(instance, make)
    cache: Cache = torch.compiler.disable(registry.get)(instance, make)
    return cache


_get_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined] # noqa: SLF001 - what disable() sets


class _ModuleCaches(CacheRegistry):
    """The one registry of modules: what is pickled by value, as cloudpickle does, refers to that of its process."""

    def __reduce__(self) -> str:
        return "module_caches"


#: The caches of modules, whichever door they came through: a module that came through two has one.
module_caches: CacheRegistry = _ModuleCaches()
