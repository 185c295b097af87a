"""Many calls of one function answered by one lookup, where each is one sample: the items of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchcache.call.flights import Flights
from torchcache.call.key import Keys
from torchcache.call.state import State
from torchcache.checks.checks import Checks
from torchcache.checks.verdicts import Verdicts
from torchcache.errors import CorruptRecordError
from torchcache.inputs.batch import ManyCalls
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.identity import Function
from torchcache.layout import Found
from torchcache.options import CacheOptions
from torchcache.report.go_around import NOTHING, GoAround
from torchcache.report.reasons import Reason
from torchcache.results.whole_calls import CallResults
from torchcache.tiers.tiers import Tiers


class Items:
    """Finds the results of calls that have plain arguments by position, and are one sample each.

    What it must not answer is left to ``Caller.call``, which says why. Safe from any thread.

    Args:
        options: The options in force.
        keys: Names calls.
        state: The state that shapes results.
        tiers: Where rows are kept.
        checks: Say whether earlier calls speak against caching.
        verdicts: What is known of namespaces.
        flights: The rows that threads of this process compute.
    """

    def __init__(
        self,
        options: CacheOptions,
        keys: Keys,
        state: State,
        tiers: Tiers,
        checks: Checks,
        verdicts: Verdicts,
        flights: Flights,
    ) -> None:
        self._may_compute = options.mode != "require"
        self._writes = options.writes
        self._flights = flights
        self._keys = keys
        self._state = state
        self._tiers = tiers
        self._checks = checks
        self._verdicts = verdicts
        self._results = CallResults()
        self._lone = ManyCalls(1, self._results)  # which most lookups are of, and nobody changes

    def find(self, function: Function, calls: Sequence[tuple[object, ...]]) -> list[object]:
        """Look many calls up.

        Returns:
            For each the result that a tier has; the call by itself, with its key, where no tier has one; or NOTHING
            where ``Caller.call`` has to be asked.
        """
        found: list[object] = [NOTHING] * len(calls)
        named = self._named(function, calls)
        if named is None:
            return found
        try:
            lookup = self._tiers.look_up(named)
            for item in lookup.found:
                self._read(item, found)
        except MemoryError:
            return [NOTHING] * len(calls)
        if self._may_compute:
            self._name_missing(named, calls, lookup.missing, found)
        return found

    def reason_against(self, call: CachedCall) -> Reason | None:
        """Say what earlier calls showed that speaks against caching a call, or None."""
        return self._checks.reason_against(call.namespace, self._verdicts.of(call.namespace))

    def _named(self, function: Function, calls: Sequence[tuple[object, ...]]) -> CachedCall | None:
        """Return the calls with their keys, none of them found so far; None if they must not be answered here."""
        # Where results lie on other devices, which of them is a matter of each call.
        batch = self._lone if len(calls) == 1 else ManyCalls(len(calls), self._results)
        if not self._tiers.devices.are_host or batch.bypass_reason() is not None:
            return None
        try:
            look = self._state.look_for_call()
        except GoAround:
            return None
        if look.is_in_training:  # the call itself knows where its rows are
            return None
        namespace = self._keys.namespace(batch.form(b""), look)
        digests = self._keys.digests_of_plain(function, calls)
        if digests is None:
            return None
        store = self._tiers.open(look)
        landings = self._flights.landings
        call = CachedCall(
            function, (), {}, batch, look, namespace, namespace, source=store, digests=digests, landings=landings
        )
        return None if self.reason_against(call) is not None else call

    def _name_missing(
        self, whole: CachedCall, calls: Sequence[tuple[object, ...]], positions: Sequence[int], found: list[object]
    ) -> None:
        """Put the call where nothing was found; of equal calls the later ones are to be asked for again."""
        sink = whole.source if self._writes else None
        named_already: set[bytes] = set()
        for position in positions:
            digest = whole.digests[position]
            if digest in named_already:
                continue
            named_already.add(digest)
            found[position] = CachedCall(
                whole.function,
                calls[position],
                {},
                self._lone,
                whole.look,
                whole.namespace,
                whole.namespace,
                source=whole.source,
                sink=sink,
                digests=[digest],
                landings=whole.landings,
            )

    def _read(self, item: Found, found: list[object]) -> None:
        """Put the results of rows where they belong; what cannot be read is left, and said by the call itself."""
        if not isinstance(item.data, np.ndarray):
            return
        try:
            results = self._results.assemble_each(item.layout, item.data, self._tiers.known)
        except CorruptRecordError:
            return
        for position, result in zip(item.positions, results, strict=True):
            found[position] = result
