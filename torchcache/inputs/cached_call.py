"""One cached call under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchcache.inputs.batch import Batch
from torchcache.keys.identity import Look
from torchcache.storage.lmdb import LmdbStore


@dataclass(slots=True)
class CachedCall:
    """One cached call under way, with its key.

    Attributes:
        function: The user's own, bound to its instance.
        args: Positional arguments, the caller's own.
        kwargs: Keyword arguments, the caller's own.
        batch: The arguments as samples.
        look: The state that it is made in.
        namespace: Names the state and the form of the call, or another state in which it returns the same.
        own_namespace: Names the state and the form of the call.
        source: Where rows are looked up on disk; None: nowhere.
        sink: Where rows are written; None: nowhere.
        digests: Of each sample.
        keys: Of the user's own, in place of digests of the inputs.
        landings: How many computations of other threads had ended before the tiers were asked.
        is_unchecked: It is not known whether rows depend on their batch.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: Batch
    look: Look
    namespace: bytes
    own_namespace: bytes
    source: LmdbStore | None = None
    sink: LmdbStore | None = None
    digests: list[bytes] = field(default_factory=list)
    keys: Sequence[bytes] | None = None
    landings: int = 0
    is_unchecked: bool = False

    def digests_at(self, positions: Sequence[int]) -> list[bytes]:
        """Return the digests of the samples at ``positions``."""
        return self.digests if len(positions) == self.batch.n else [self.digests[p] for p in positions]
