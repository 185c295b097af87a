"""What makes room for a commit: trash, environments that nobody uses, and rows by the store's policy."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from torchcache.storage import budget
from torchcache.storage.budget import Budget
from torchcache.storage.deletion import Deletion
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.environment import Environment
from torchcache.storage.table import NAMESPACES, SEGMENTS, USES, all_namespaces, prefix_of, scan, use_of

logger: logging.Logger = logging.getLogger(__name__)


class Eviction:
    """Makes room for one store; every method requires the directory's turn.

    Args:
        directory: The cache directory.
        environment: The store's own, in which rows are deleted.
        limit: The budget that what is new has to fit in.
        policy: What the option ``eviction`` says.
    """

    def __init__(self, directory: CacheDirectory, environment: Environment, limit: Budget, policy: str) -> None:
        self._directory = directory
        self._environment = environment
        self._budget = limit
        self._policy = policy

    def make_room(
        self, needed_bytes: int, keep: Collection[bytes], *, before: bytes, uses: Mapping[bytes, bytes]
    ) -> bool:
        """Empty the trash, or evict by the policy.

        Args:
            needed_bytes: How many bytes are to be written.
            keep: Fingerprints of namespaces that do not count as stale.
            before: Rows used since this time stay.
            uses: Marks of use that are not on disk yet.

        Returns:
            Whether there is more room now.
        """
        if self.make_room_outside(needed_bytes):
            return True
        if self._policy == "none":
            return False
        if self._policy == "stale":
            is_more = self.delete_slices(self._stale_segments(keep), needed_bytes)
            self._delete_stale_entries(keep)
            return is_more
        # More than is needed, so that not every commit has to make room again.
        oldest = self.oldest_segments(before, uses)
        return self.delete_slices(oldest, max(needed_bytes, self._budget.slack_bytes()))

    def make_room_outside(self, needed_bytes: int) -> bool:
        """Empty the trash, or remove other environments that nobody uses; return whether there is more room."""
        used_before = self._directory.used_bytes()
        self._directory.empty_trash()
        if self._directory.measure() < used_before:
            return True
        if self._policy == "none":
            return False
        own = self._environment.name
        return budget.remove_stale_environments(self._directory, own, needed_bytes, self._budget)

    def _stale_segments(self, keep: Collection[bytes]) -> list[bytes]:
        """Return the segments of namespaces nobody touched for an hour, oldest first."""
        limit = time.time() - budget.STALE_SECONDS
        touched_at: dict[bytes, float] = {}  # by what the keys of a stale namespace's segments begin with
        stale: list[tuple[float, bytes]] = []
        with self._environment.reading() as txn:
            for namespace, entry in all_namespaces(txn):
                if entry.touched_at < limit and namespace not in keep:
                    touched_at[prefix_of(SEGMENTS, entry.number)] = entry.touched_at
            for view, _ in scan(txn, SEGMENTS):
                key = bytes(view)
                if key[:4] in touched_at:
                    stale.append((touched_at[key[:4]], key))
        return [key for _, key in sorted(stale)]

    def oldest_segments(self, before: bytes, uses: Mapping[bytes, bytes]) -> list[bytes]:
        """Return the half of all segments that were used longest ago, oldest first; none used since ``before``."""
        used: list[tuple[bytes, bytes]] = []
        with self._environment.reading() as txn:
            # What this process read since the last commit is not noted on disk yet.
            for view, when in scan(txn, USES):
                key = SEGMENTS + bytes(view[1:])
                used.append((uses.get(use_of(key), bytes(when)), key))
        used.sort()
        oldest = used[: max(1, len(used) // 2)]
        return [key for when, key in oldest if when < before]

    def _delete_stale_entries(self, keep: Collection[bytes]) -> None:
        """Delete the entries of namespaces that have a verdict and no rows, and nobody touched for an hour."""
        limit = time.time() - budget.STALE_SECONDS
        with self._environment.writing() as txn:
            stale = [
                namespace
                for namespace, entry in all_namespaces(txn)
                if entry.touched_at < limit and not entry.rows and namespace not in keep
            ]
            most = 0
            if stale:
                most, _ = budget.deletable(txn, self._budget.room_bytes())
            if not most:
                txn.abort()
            for namespace in stale[:most]:
                txn.delete(NAMESPACES + namespace)

    def delete_slices(self, segments: Sequence[bytes], needed_bytes: int) -> bool:
        """Delete segments, a small transaction at a time, until enough pages are free."""
        waiting = deque(segments)
        rows = 0
        while waiting:
            with self._environment.writing() as txn:
                free_bytes = budget.free_bytes(txn, self._environment.last_page())
                if rows and free_bytes >= budget.FREE_FACTOR * needed_bytes:
                    txn.abort()
                    break
                deletion = Deletion(txn, self._budget.room_bytes())
                deletion.delete_segments(waiting)
                if not deletion.carry_out():
                    break
                rows += deletion.rows
            self._directory.measure()
        if rows:
            logger.info(
                "the cache under %s is full; %d rows of %s were evicted (eviction=%r)",
                self._directory.path, rows, self._environment.name, self._policy,
            )  # fmt: skip
        return rows > 0
