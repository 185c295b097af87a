"""Every error torchcache raises, drawn as a tree.

::

    TorchcacheError
    ├── ConfigError        an option, a decorated target or an attribute is wrong (raised while setting up)
    ├── UncacheableError   a call cannot be keyed or its result cannot be split into samples (until one was cached)
    ├── CacheMissError     a call would have to be computed in mode="require"
    ├── SampleError        a dataset raised while its cache was filled
    ├── StoreError         the disk tier cannot be used (never leaves a cached call)
    └── CorruptRecordError stored bytes fail a check (never leaves a cached call)

The first two are a ``ValueError`` and a ``TypeError`` both, so that ``except`` clauses need not know
whether it was the type or the value of an argument that was wrong. All of them pickle: DataLoader
workers send their exceptions to the parent.
"""

from __future__ import annotations

from torchcache.explanation import Explanation
from torchcache.kinds import Fault


class TorchcacheError(Exception):
    """The root of all errors of this package."""


class ConfigError(TorchcacheError, ValueError, TypeError):
    """An option, a decorated target or a ``torchcache_`` attribute is wrong."""

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class UncacheableError(TorchcacheError, ValueError, TypeError):
    """A call has an argument or a result that cannot be cached sample by sample.

    Raised until a call was cached; later ones go around the cache.
    """

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class CacheMissError(TorchcacheError, LookupError):
    """A call in ``mode="require"`` would have to be computed; nothing was.

    Attributes:
        explanation: What ``explain`` says of the call: the ``differences`` to that of another run show what makes
            it miss. None if nothing could be found out.
        missing: Positions of the samples that are not cached; none if the call would go around the cache.
    """

    def __init__(self, message: str, *, explanation: Explanation | None = None, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.explanation = explanation
        self.missing = missing


class SampleError(TorchcacheError, RuntimeError):
    """A dataset raised while ``CachedDataset.warm`` filled its cache; ``index`` says where."""

    def __init__(self, message: str, *, index: object = None) -> None:
        super().__init__(message)
        self.index = index


class StoreError(TorchcacheError, OSError):
    """The disk tier cannot be used; ``kind`` names the fault in the counters."""

    def __init__(self, message: str, *, kind: Fault = Fault.STORE) -> None:
        super().__init__(message)
        self.kind = kind


class CorruptRecordError(TorchcacheError):
    """Stored bytes fail a check; they are never decoded further."""

    kind = Fault.CORRUPT_RESULT
