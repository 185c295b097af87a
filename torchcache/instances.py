"""Whether an instance is cached, with which options, and its cache: one rule for all doors."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from torchcache import process
from torchcache.cache import Cache
from torchcache.log import warn_once
from torchcache.options import CacheOptions
from torchcache.samples import CallSignature
from torchcache.storage import temporary

_making = process.ForkLock()  # guards what each InstanceCaches holds


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
    return enabled if isinstance(enabled, bool) else options.with_attributes(instance).enabled  # which raises


def say_replica(name: str) -> None:
    """Say once that replicas of a module are not cached."""
    warn_once(
        ("replica", name),
        "%s: nn.DataParallel makes copies of the module for each call, and these are not cached; cache a module "
        "outside of it, or use DistributedDataParallel",
        name,
    )


def prepare(options: CacheOptions, function: Callable[..., Any], *, is_method: bool) -> None:
    """Check the merged options, and see to it that a temporary directory is gone at the end.

    Here and not at first use: workers may use it although this process never does.
    """
    options.check_combinations()
    if options.unbatched or options.padded:
        CallSignature.of_options(function, options, is_method=is_method)
    reserve(options)


def reserve(options: CacheOptions) -> None:
    """See to it that the temporary directory is gone at the end, if these options use it."""
    if options.enabled and options.writes and options.persistent and options.persistent_cache_dir is None:
        temporary.reserve()


class InstanceCaches:
    """The caches of instances: each is made when it is first asked for, and forgotten with its instance.

    Safe from any thread.
    """

    def __init__(self) -> None:
        self._caches: dict[int, tuple[weakref.ref[Any], Cache]] = {}  # by the id of a live instance; see _making

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
        if known is not None:
            return known[1]
        return _get_uncompiled(self, instance, make)

    def get(self, instance: Any, make: Callable[[Any], Cache]) -> Cache:  # noqa: ANN401 - as above
        """Return the cache that an instance has, or is to have, whether it is cached now or not."""
        with _making.raw:
            known = self._caches.get(id(instance))
            if known is None:
                # No weakref.finalize: it would hold the caches, and what a cache saw of the state may lead back to
                # the instance.
                caches, key, cache = self._caches, id(instance), make(instance)
                known = caches[key] = weakref.ref(instance, lambda _: caches.pop(key, None)), cache
            return known[1]


def _get_uncompiled(caches: InstanceCaches, instance: object, make: Callable[[Any], Cache]) -> Cache:
    """Make a cache, which torch.compile could not trace; a graph break, as ``cache.call_uncompiled`` is."""
    is_compiler_there = "torch._dynamo" in sys.modules  # to import it takes a second
    cache: Cache = (torch.compiler.disable(caches.get) if is_compiler_there else caches.get)(instance, make)
    return cache


_get_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined] # noqa: SLF001 - what disable() sets
