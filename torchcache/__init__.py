"""Cache what frozen PyTorch modules return, sample by sample, in memory and on disk.

Importing the package does not import torch; the names that need it load it when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from torchcache.errors import (
    CacheMissError,
    ConfigError,
    CorruptRecordError,
    SampleError,
    StoreError,
    TorchcacheError,
    UncacheableError,
)
from torchcache.explanation import Explanation, SampleExplanation
from torchcache.keys.registrations import note_registrations
from torchcache.keys.registry import register_value
from torchcache.log import configure_from_environment, set_logger_config
from torchcache.stats import CacheStats

if TYPE_CHECKING:
    from torchcache.cache import Cache, disabled, flush_all
    from torchcache.dataset import CachedDataset, CachedIterableDataset, Warmed
    from torchcache.decorator import CachedFunction, cache_of, torchcache
    from torchcache.lazy_module import lazy
    from torchcache.options import CacheOptions
    from torchcache.own_keys import sample_keys

__version__ = "1.0.0.dev0"

__all__ = [
    "Cache",
    "CacheMissError",
    "CacheOptions",
    "CacheStats",
    "CachedDataset",
    "CachedFunction",
    "CachedIterableDataset",
    "ConfigError",
    "CorruptRecordError",
    "Explanation",
    "SampleError",
    "SampleExplanation",
    "StoreError",
    "TorchcacheError",
    "UncacheableError",
    "Warmed",
    "cache_of",
    "disabled",
    "flush_all",
    "lazy",
    "register_value",
    "sample_keys",
    "set_logger_config",
    "torchcache",
]

_WITH_TORCH = {
    "Cache": "torchcache.cache",
    "CacheOptions": "torchcache.options",
    "CachedFunction": "torchcache.decorator",
    "CachedDataset": "torchcache.dataset",
    "CachedIterableDataset": "torchcache.dataset",
    "Warmed": "torchcache.dataset",
    "cache_of": "torchcache.decorator",
    "disabled": "torchcache.cache",
    "flush_all": "torchcache.cache",
    "lazy": "torchcache.lazy_module",
    "sample_keys": "torchcache.own_keys",
    "torchcache": "torchcache.decorator",
}


def __getattr__(name: str) -> object:
    module = _WITH_TORCH.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    note_registrations()  # of torch, if this was what loaded it
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


configure_from_environment()
note_registrations()
