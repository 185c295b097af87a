"""Results of the same target under another key: what differs, and what to do about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from torchcache.errors import StoreError
from torchcache.inputs.batch import Batch
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.contract import AnyIdentity
from torchcache.keys.digest import digest_parts
from torchcache.keys.key_parts import Difference, Entry, KeyParts
from torchcache.options import CacheOptions
from torchcache.process import ForkLock
from torchcache.report.notices import Notices
from torchcache.storage.key_parts_file import KeptParts, KeptState, Row
from torchcache.storage.lmdb import LmdbStore
from torchcache.tiers.tiers import Tiers

#: At most this many states of one cache are noted by a process.
_MOST_NOTED = 8

#: For so long at most, keys are compared.
_MOST_SECONDS = 0.1

#: At most this many differences are named in a line.
_MOST_NAMED = 4

#: States that were noted later are those of this program, or of others that run beside it: they missed nothing.
_STARTED_AT = time.time()

#: Kinds of parts that ``ignore`` can leave out.
_IGNORABLE = ("state", "inside", "name")

#: How to call a part of each kind in front of its name.
_CALLED = {
    "code": "the code of ", "weights": "the weights ", "argument of the constructor": "the constructor's argument ",
    "construction": "the construction ", "option": "the option ", "setting": "the setting ", "record": "the record ",
}  # fmt: skip


class Relatives:
    """Knows what other keys of a target look like, from what was kept beside their rows.

    Safe from any thread.

    Args:
        target: What is cached.
        options: The options in force.
        identity: Knows the parts of the present key.
        tiers: Where they are kept.
        notices: Logs what differs.
    """

    def __init__(
        self, target: str, options: CacheOptions, identity: AnyIdentity, tiers: Tiers, notices: Notices
    ) -> None:
        self._target = target
        self._identity = identity
        self._tiers = tiers
        self._notices = notices
        self._checked = (f"option:check_rows={options.check_rows}", b"")
        self._lock = ForkLock()
        # Guarded by _lock:
        self._noted: set[bytes] = set()
        self.is_done: bool = not options.looks_up  # whether the first call was looked at

    def note(self, call: CachedCall) -> None:
        """Keep the parts of the key of a call whose rows are kept on disk."""
        store = call.sink
        if store is None or call.look.is_private:
            return
        with self._lock.raw:
            if call.namespace in self._noted or len(self._noted) >= _MOST_NOTED:
                return
            self._noted.add(call.namespace)
        module, state = self._parts(call.batch)
        kept = KeptState(call.namespace, time.time(), _rows(state))
        self._tiers.note_parts(store, self._target, _rows(module), kept)

    def look(self, call: CachedCall) -> None:
        """Log what differs, if the first call of this cache finds a key that nothing was ever kept under."""
        with self._lock.raw:
            if self.is_done:
                return
            self.is_done = True
        store = call.source
        if store is None or call.look.is_private:
            return
        try:
            if store.knows(call.namespace):
                return
        except StoreError:  # which the lookup of the rows met too, and counted
            return
        found = self._nearest(store, call.batch, call.namespace)
        if not found:
            return
        only_this_call = all(difference.kind == "call" for difference in found)
        self._notices.say(
            "relatives",
            f"nothing is cached under this key, and results of {self._target} are there under another one: "
            f"{_said(found)}",
            level=logging.INFO if only_this_call else logging.WARNING,
        )

    def describe(self, store: LmdbStore, batch: Batch, namespace: bytes) -> str:
        """Say which parts of a call's key differ from those that results are there under; "" if none are."""
        found = self._nearest(store, batch, namespace)
        return _said(found) if found else ""

    def _nearest(self, store: LmdbStore, batch: Batch, namespace: bytes) -> list[Difference]:
        """Return how the present key differs from the nearest of the others."""
        deadline = time.monotonic() + _MOST_SECONDS
        module, state = self._parts(batch)
        nearest: list[Difference] = []
        for kept in self._others(store):
            of_module = module.differences(_entries(kept.module))
            for other in kept.states:
                if other.namespace == namespace or other.noted_at > _STARTED_AT:
                    continue
                if time.monotonic() > deadline:
                    return nearest
                found = [*of_module, *state.differences(_entries(other.rows))]
                if found and (not nearest or len(found) < len(nearest)):
                    nearest = found
        return nearest

    def _others(self, store: LmdbStore) -> Iterator[KeptParts]:
        kept = store.kept_parts()
        if kept is not None and kept.target == self._target:
            yield kept
        yield from store.relatives(self._target)

    def _parts(self, batch: Batch) -> tuple[KeyParts, KeyParts]:
        """Return the parts of the module hash, and those of the state and of the form of a call."""
        module, state = self._identity.key_parts()
        form = [(f"call:{name}", digest_parts([value])) for name, value in batch.shared_parts()]
        return KeyParts(module), KeyParts([*state, self._checked, *form])


def _rows(parts: KeyParts) -> tuple[Row, ...]:
    return tuple(
        (entry.kind, entry.name.encode("utf-8", "replace").decode(), entry.digest, entry.is_group)
        for entry in parts.shortened()
    )


def _entries(rows: Sequence[Row]) -> list[Entry]:
    return [Entry(*row) for row in rows]


def _said(found: Sequence[Difference]) -> str:
    """Name some differences, and what to do about them."""
    # First what can be left out: it is the likeliest to be meant by nobody.
    ordered = sorted(found, key=lambda difference: difference.kind not in _IGNORABLE)
    named = [_name_of(difference) for difference in ordered[:_MOST_NAMED]]
    more = len(found) - len(named)
    shown = ", ".join(named) + (f" and {more} more" if more > 0 else "")
    verb = "differs" if len(found) == 1 and not found[0].is_group else "differ"
    return f"{shown} {verb}{''.join(f'; {remedy}' for remedy in _remedies(ordered))}"


def _name_of(difference: Difference) -> str:
    name = difference.name
    if difference.is_group:
        name = "others" if name == "*" else f"{name}.*"
    return f"{_CALLED.get(difference.kind, '')}`{name}`"


def _remedies(found: Sequence[Difference]) -> Iterator[str]:
    """Yield what to do about what differs, the likeliest first."""
    flags = [d for d in found if d.kind == "state" and d.name.rpartition(".")[2] == "training"]
    leaves = [d for d in found if d.kind in _IGNORABLE and d not in flags and not d.is_group]
    if leaves:
        names = tuple(difference.name for difference in leaves[:_MOST_NAMED])
        yield f"if they shape no result: ignore={names!r}"
    if flags:
        yield "call eval() or train() as the program did that filled the cache"
    kinds = {difference.kind for difference in found}
    if "weights" in kinds:
        yield "if the weights should be the same, load them or seed what makes them"
    if "argument of the constructor" in kinds:
        yield "an argument that shapes no result can be set after construction, or persistent_module_hash set"
    if "code" in kinds:
        yield "what other code computed stays under its own key"
