"""What a store is: batched calls, absence instead of errors of content, bounded waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from torchcache.kinds import Drop
from torchcache.layout import Found, Rows


class Verdict(IntEnum):
    """Whether the rows of a namespace depend on their batch; the numbers are part of the stored format."""

    UNKNOWN = 0
    INDEPENDENT = 1
    DEPENDENT = 2

    #: Rows were compared and came back the same, and proved nothing, as rows of zeros do.
    UNDECIDED = 3

    #: A row came back the same in two batches of copies of itself, of two sizes. Nothing is known of other batches.
    REPEATED = 4

    def replaces(self, other: Verdict) -> bool:
        """Tell whether this one is noted in place of another: what says more stays."""
        return _STRENGTH.index(self) > _STRENGTH.index(other)


_STRENGTH = (Verdict.UNKNOWN, Verdict.REPEATED, Verdict.UNDECIDED, Verdict.INDEPENDENT, Verdict.DEPENDENT)


@dataclass(frozen=True, slots=True)
class Lookup:
    """What ``get_many`` found.

    Attributes:
        found: Values, one item a layout; their data belongs to the caller.
        missing: Positions of the digests that are absent or whose record failed a check.
        corrupt: How many records failed a check.
        verdict: The namespace's; nothing is found where it is ``DEPENDENT``.
    """

    found: list[Found]
    missing: list[int]
    corrupt: int = 0
    verdict: Verdict = Verdict.UNKNOWN


def nothing_of(digests: Sequence[bytes], verdict: Verdict = Verdict.UNKNOWN) -> Lookup:
    """Return what a lookup of ``digests`` gives where none of them is there."""
    return Lookup([], list(range(len(digests))), verdict=verdict)


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows packed into records, ready to be committed: the part of a write that needs no lock.

    Attributes:
        namespace: Of all of them.
        digests: Of the samples, in order.
        records: One a digest.
        dropped: How many rows no record can be made of, and why; ``put_many`` passes it on.
        replaces: Digests whose earlier values are deleted first; empty where what is there stays.
    """

    namespace: bytes
    digests: Sequence[bytes]
    records: Sequence[bytes]
    dropped: Mapping[Drop, int] = field(default_factory=dict)
    replaces: Sequence[bytes] = ()

    def between(self, start: int, stop: int) -> Packed:
        """Return the records from ``start`` to before ``stop``."""
        return Packed(self.namespace, self.digests[start:stop], self.records[start:stop], replaces=self.replaces)


@dataclass(frozen=True, slots=True)
class Written:
    """What became of the rows of one commit.

    Attributes:
        rows: How many were stored by it, or were there already.
        nbytes: Bytes of the records it added.
        dropped: How many were not stored, and why.
    """

    rows: int = 0
    nbytes: int = 0
    dropped: Mapping[Drop, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """What one cache asks of its store, by the names of its options.

    Attributes:
        max_persistent_cache_size: The budget: bytes that everything under the cache directory may have.
        eviction: What makes room: "stale", "lru" or "none".
        min_free_disk: Bytes of the file system that stay free; None for the smaller of 1 GB and 2 % of it.
        lock_timeout_seconds: How long a write waits for other processes.
        zstd_level: The level at which rows are compressed; None stores them raw.
    """

    max_persistent_cache_size: int
    eviction: str = "stale"
    min_free_disk: int | None = None
    lock_timeout_seconds: float = 2.0
    zstd_level: int | None = None


class Store(Protocol):
    """Values of one module hash, by namespace (16 bytes) and sample digest (16 bytes).

    Absence is the normal answer: a record that is missing, damaged or of another key is reported as
    missing. Faults of the machine raise ``StoreError`` and leave the store usable. Calls are safe from
    any thread; none keeps a transaction open after it returns.
    """

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        """Copy out the values of ``digests``; takes no lock that another process can hold."""

    def pack(self, namespace: bytes, rows: Rows) -> Packed:
        """Encode and compress rows; takes no lock at all. Those that no record can hold are counted."""

    def put_many(self, packed: Sequence[Packed]) -> Written:
        """Commit the records of all of ``packed``, in transactions that are small against the budget.

        What is already there stays, unless it is named in ``replaces``. Rows of a namespace that is
        ``DEPENDENT`` are dropped, as ``Drop.ROWS_DEPEND_ON_BATCH``. Waits for other processes at most
        ``lock_timeout_seconds``.
        """

    def delete_many(self, namespace: bytes, digests: Sequence[bytes], cancel: Callable[[], bool] | None = None) -> int:
        """Delete the values of ``digests``; return how many were there.

        In transactions that are small against the budget, other processes may write between two. What
        cannot be deleted for lack of room is replaced by the next ``put_many`` of this store.

        Args:
            namespace: Of all of them.
            digests: Which ones.
            cancel: Asked while it waits and between transactions; True raises ``TurnCancelledError``, and
                the call can be made again.
        """

    def judge(self, namespace: bytes, verdict: Verdict, cancel: Callable[[], bool] | None = None) -> None:
        """Record whether the rows of ``namespace`` depend on their batch; delete them all if they do.

        The verdict is kept when the rows go, except by stale eviction and ``delete_all``. ``DEPENDENT`` is
        final. Where there is no room for it, it is dropped: a verdict can be found out again.

        Args:
            namespace: The namespace; it need not have rows.
            verdict: Not ``UNKNOWN``.
            cancel: As in ``delete_many``.
        """

    def delete_all(self) -> None:
        """Remove every value and verdict of this store, for all processes."""

    def used_bytes(self) -> int:
        """Return the bytes under the cache directory at this process's last look."""

    def close(self) -> None:
        """Give up what is open; the next use opens it again."""
