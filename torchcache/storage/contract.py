"""What a store is: batched calls, absence instead of errors of content, bounded waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from torchcache.layout import Found, Rows


class Verdict(IntEnum):
    """Whether the rows of a namespace depend on their batch; the numbers are part of the stored format."""

    UNKNOWN = 0
    INDEPENDENT = 1
    DEPENDENT = 2


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


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows packed into records, ready to be committed: the part of a write that needs no lock.

    Attributes:
        namespace: Of all of them.
        digests: Of the samples, in order.
        records: One a digest.
        dropped: How many rows no record can be made of, by reason; ``put_many`` passes it on.
        replaces: Digests whose earlier values are deleted first; empty where what is there stays.
    """

    namespace: bytes
    digests: Sequence[bytes]
    records: Sequence[bytes]
    dropped: Mapping[str, int] = field(default_factory=dict)
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
        dropped: How many were not stored, by reason.
    """

    rows: int = 0
    nbytes: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


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
        ``DEPENDENT`` are dropped, as ``rows_depend_on_batch``. Waits for other processes at most
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
