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
from torchcache.report.log import configure_from_environment, set_logger_config
from torchcache.report.stats import CacheStats
from torchcache.storage import backlogs as _backlogs  # noqa: F401 - the end of a program waits for its workers

if TYPE_CHECKING:
    from torchcache.cache import Cache, flush_all
    from torchcache.call.disabled import disabled
    from torchcache.doors.datasets import CachedDataset, CachedIterableDataset
    from torchcache.doors.decorator import cache_of, torchcache
    from torchcache.doors.lazy import lazy
    from torchcache.doors.typing import CachedFunction
    from torchcache.doors.warming import Warmed
    from torchcache.inputs.sample_keys import sample_keys
    from torchcache.options import CacheOptions

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
    "CachedFunction": "torchcache.doors.typing",
    "CachedDataset": "torchcache.doors.datasets",
    "CachedIterableDataset": "torchcache.doors.datasets",
    "Warmed": "torchcache.doors.warming",
    "cache_of": "torchcache.doors.decorator",
    "disabled": "torchcache.call.disabled",
    "flush_all": "torchcache.cache",
    "lazy": "torchcache.doors.lazy",
    "sample_keys": "torchcache.inputs.sample_keys",
    "torchcache": "torchcache.doors.decorator",
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
