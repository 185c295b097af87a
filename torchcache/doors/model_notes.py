"""What a cache remembers of the models that a factory built, beside their results."""

from __future__ import annotations

import numpy as np

from torchcache.errors import StoreError
from torchcache.keys.digest import DIGEST_BYTES, digest_parts
from torchcache.keys.identity import Look
from torchcache.layout import Layout, Leaf, Rows
from torchcache.options import CacheOptions
from torchcache.report.notices import Notices
from torchcache.storage.lmdb import LmdbStore
from torchcache.tiers.tiers import Tiers

#: What is noted of a model: 16 bytes that name its code, weights and state.
_NOTE = Layout((Leaf("uint8", "uint8", (DIGEST_BYTES,)),))


class ModelNotes:
    """Notes of which model a factory built, each under a key; kept in the store that has the results.

    A note is a row in a namespace of its own. It is in use as long as the results that depend on it are.

    Args:
        tiers: Of the cache that has the results.
        notices: Of the same cache.
        options: Of the same cache: what it may read and write.
    """

    def __init__(self, tiers: Tiers, notices: Notices, options: CacheOptions) -> None:
        self._tiers = tiers
        self._notices = notices
        self._options = options
        self._known: dict[bytes, bytes] = {}
        self._read_last = ""  # the module hash of the factory whose notes were read last

    def read(self, factory: Look, key: bytes) -> bytes | None:
        """Return what is noted under a key, or None."""
        note = self._known.get(key)
        store = self._tiers.open(factory)
        if factory.module_hash != self._read_last:
            self._read_last = factory.module_hash
            self._tiers.keep_in_use(_namespace_of(factory), self._known.keys())
        if note is None and store is not None and self._options.looks_up:
            note = self._read_from(store, _namespace_of(factory), key)
            if note is not None:
                self._known[key] = note
        return note

    def write(self, factory: Look, key: bytes, note: bytes) -> None:
        """Note what was built; log it if that was something else before."""
        before = self.read(factory, key)
        if before == note:
            return
        if before is not None:
            self._notices.say(
                "another model",
                "the factory built another model than the one whose results are cached, so it starts afresh; results "
                "that were given until now, in this run, were those of the other one. Name what it loads in version",
            )
        self._known[key] = note
        store = self._tiers.open(factory)
        if store is not None and self._options.writes:
            rows = Rows([key], _NOTE, np.frombuffer(note, np.uint8).reshape(1, -1))
            self._tiers.store(store, _namespace_of(factory), rows, replaces=before is not None)

    def _read_from(self, store: LmdbStore, namespace: bytes, key: bytes) -> bytes | None:
        try:
            found = store.get_many(namespace, [key]).found
        except StoreError as error:
            self._notices.error(error, 0)
            return None
        if not found or found[0].layout != _NOTE:
            return None
        return bytes(found[0].data[0])


def _namespace_of(factory: Look) -> bytes:
    return digest_parts([b"lazy", factory.module_hash.encode()])
