"""What a store is: batched calls, absence instead of errors of content, bounded waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torchcache.layout import Found, Rows


@dataclass(frozen=True, slots=True)
class Lookup:
    """What ``get_many`` found.

    Attributes:
        found: Values, one item a layout; their data belongs to the caller.
        missing: Positions of the digests that are absent or whose record failed a check.
        corrupt: How many records failed a check.
    """

    found: list[Found]
    missing: list[int]
    corrupt: int = 0


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows packed into records, ready to be committed: the part of a write that needs no lock."""

    namespace: bytes
    digests: Sequence[bytes]
    records: Sequence[bytes]

    def between(self, start: int, stop: int) -> Packed:
        """Return the rows from ``start`` to before ``stop``."""
        return Packed(self.namespace, self.digests[start:stop], self.records[start:stop])


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
        """Encode and compress rows; takes no lock at all."""

    def put_many(self, packed: Sequence[Packed]) -> Written:
        """Commit the records of all of ``packed``, in transactions that are small against the budget.

        What is already there stays. Waits for other processes at most ``lock_timeout_seconds``.
        """

    def delete_all(self) -> None:
        """Remove every value of this store, for all processes."""

    def used_bytes(self) -> int:
        """Return the bytes under the cache directory at this process's last look."""

    def close(self) -> None:
        """Give up this handle; the store itself is closed when its last handle is."""
