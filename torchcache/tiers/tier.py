"""What a tier is: somewhere that rows are kept, asked in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torchcache.layout import Rows
from torchcache.storage.contract import Lookup


class Tier(Protocol):
    """Rows by namespace (16 bytes) and sample digest (16 bytes).

    A row that was put may be absent later; one that is found is what was put last for its key. Calls are safe from any
    thread and leave no lock taken. A tier counts nothing and logs nothing of its own: faults are raised, and ``Tiers``
    turns them into misses.
    """

    @property
    def name(self) -> str:
        """What ``stats()`` and ``explain()`` call it: ``memory``, ``queue``, ``store``."""

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        """Copy out what is there; one item per layout, the positions are those in ``digests``.

        A digest may be asked for twice. What is found belongs to the caller.
        """

    def has_many(self, namespace: bytes, digests: Sequence[bytes]) -> list[bool]:
        """Tell of each digest whether its row is there; that is no use of it."""

    def put_many(self, namespace: bytes, rows: Rows, *, replaces: bool = False) -> bool:
        """Keep rows, which must not change afterwards.

        Args:
            namespace: Of all of them.
            rows: The rows.
            replaces: Whether they take the place of what is there; else a row that is there already may stay.

        Returns:
            Whether they were accepted. Accepted rows may still be dropped, for lack of room.
        """

    def delete_many(self, namespace: bytes, digests: Sequence[bytes]) -> object:
        """Let rows be found no longer."""
