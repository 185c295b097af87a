"""The disk as a tier, and how a cache's store comes to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torchcache.layout import Rows
from torchcache.options import CacheOptions
from torchcache.storage.access import GROUP, PRIVATE
from torchcache.storage.budget import Counts
from torchcache.storage.contract import Lookup, StoreSettings
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.lmdb import LmdbStore
from torchcache.storage.temporary import temporary_directory
from torchcache.tiers.queue import WriteQueue


class StoreUser(Protocol):
    """Who is told that a store's rows are in use."""

    def on_used(self, store: LmdbStore) -> None: ...


class StoreTier:
    """One store; calls hand rows to the queue in front of it, since it waits for other processes.

    Args:
        store: The store.
        marks: Where marks of use are handed to; None where nothing is written.
        user: Is told now and then that rows of the store are in use, if that is marked.
    """

    name = "store"

    def __init__(self, store: LmdbStore, marks: WriteQueue | None, user: StoreUser) -> None:
        self._store = store
        self._marks = marks
        self._user = user

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup:
        lookup = self._store.get_many(namespace, digests)
        # Other processes tell by the mark whether a namespace is stale.
        if lookup.found and self._marks is not None and self._store.needs_touch(namespace):
            self._marks.touch(namespace)
            self._user.on_used(self._store)
        return lookup

    def has_many(self, namespace: bytes, digests: Sequence[bytes]) -> list[bool]:
        missing = set(self._store.get_many(namespace, digests).missing)
        return [position not in missing for position in range(len(digests))]

    def put_many(self, namespace: bytes, rows: Rows, *, replaces: bool = False) -> bool:
        """Commit rows; waits for other processes at most ``lock_timeout_seconds``."""
        packed = self._store.pack(namespace, rows)
        if replaces:
            packed = replace(packed, replaces=rows.digests)
        return not self._store.put_many([packed]).dropped

    def delete_many(self, namespace: bytes, digests: Sequence[bytes]) -> int:
        """Delete rows and return how many there were; waits as ``put_many`` does."""
        return self._store.delete_many(namespace, digests)


def make_store(module_hash: str, options: CacheOptions, counts: Counts, *, is_private: bool) -> LmdbStore | None:
    """Return the store of a module hash; None if nothing is kept on disk.

    Args:
        module_hash: Names the subdirectory; empty where nothing has a name.
        options: Those in force.
        counts: Returns how many samples the cache has found so far, and how many it had not.
        is_private: Whether the name means nothing to other programs, so that the directory is a temporary one.

    Raises:
        StoreError: If the directory cannot be made or must not be used.
        OSError: As that.
    """
    is_kept = options.persistent and options.max_persistent_cache_size > 0 and options.mode != "off"
    if not is_kept or not module_hash:
        return None

    directory = _directory_of(options, is_private=is_private)
    if directory is None:
        return None
    settings = StoreSettings(
        max_persistent_cache_size=options.max_persistent_cache_size,
        eviction=options.eviction,
        min_free_disk=options.min_free_disk,
        lock_timeout_seconds=options.lock_timeout_seconds,
        zstd_level=options.zstd_compression_level if options.zstd_compression else None,
    )
    store = LmdbStore(directory, module_hash, settings, counts)
    if options.writes:
        store.announce()
    return store


def _directory_of(options: CacheOptions, *, is_private: bool) -> CacheDirectory | None:
    """Return the directory to keep rows in: the configured one, or a temporary one unless it is only to be read."""
    path = None if is_private else options.persistent_cache_dir
    if path is not None:
        access = GROUP if options.shared else PRIVATE
        return CacheDirectory(path, access if options.writes else access.read_only())
    if options.writes:
        return CacheDirectory(temporary_directory(), before_turn=temporary_directory)
    return None
