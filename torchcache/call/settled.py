"""States that calls leave for another one in which they return the same: ``model.encode`` may call ``eval()`` first."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from torchcache.checks.verdicts import remember
from torchcache.errors import StoreError
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.digest import DIGEST_BYTES, digest_parts
from torchcache.layout import Layout, Leaf, Rows
from torchcache.options import CacheOptions
from torchcache.process import ForkLock
from torchcache.storage.lmdb import LmdbStore
from torchcache.tiers.tiers import Tiers

#: What is noted under the namespace of a state: that of the state in which calls leave the modules.
_NOTE = Layout((Leaf("uint8", "uint8", (DIGEST_BYTES,)),))

#: The notes are rows in a namespace of their own, beside the results.
_NAMESPACE = digest_parts([b"settled"])


class Settled:
    """Knows where to look for the rows of calls that set training flags which no code reads.

    Safe from any thread.

    Args:
        tiers: Of the cache that has the results.
        options: Of the same cache: what it may read and write.
    """

    def __init__(self, tiers: Tiers, options: CacheOptions) -> None:
        self._tiers = tiers
        self._options = options
        #: The namespaces in which to look, by the one of the state that a call is made in; one that is not left stands
        #: for itself. Changed under _lock, and read without.
        self.known: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = ForkLock()

    def find(self, own: bytes, store: LmdbStore | None) -> bytes:
        """Find out the namespace in which to look for calls of another one, in which they return the same.

        Args:
            own: The namespace of the state that the call is made in.
            store: Where an earlier program may have noted it.
        """
        found = self.known.get(own)
        if found is not None:
            return found

        found = own
        if store is not None and self._options.looks_up:
            try:
                found = self._read(store, own) or own
            except StoreError:  # which the lookup of the rows meets too, and counts
                return own
        with self._lock.raw:
            remember(self.known, own, found)
        return found

    def note(self, call: CachedCall) -> None:
        """Note that a call left its state, and where its rows are kept."""
        own, settled = call.own_namespace, call.namespace
        with self._lock.raw:
            if self.known.get(own) == settled:
                return
            remember(self.known, own, settled)
        if call.sink is not None:
            rows = Rows([own], _NOTE, np.frombuffer(settled, np.uint8).reshape(1, -1))
            self._tiers.store(call.sink, _NAMESPACE, rows, replaces=True)

    def forget(self) -> None:
        """Forget everything; the store is asked again."""
        with self._lock.raw:
            self.known.clear()

    def _read(self, store: LmdbStore, own: bytes) -> bytes | None:
        found = store.get_many(_NAMESPACE, [own]).found
        if not found or found[0].layout != _NOTE:
            return None
        return bytes(found[0].data[0])
