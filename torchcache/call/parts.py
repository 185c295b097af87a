"""Large calls: at most so many missing rows are computed at once, and kept before the next ones are."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from torchcache.call.joining import Joining, brought_together, positions_of
from torchcache.call.key import Keys
from torchcache.checks.parts import picked
from torchcache.checks.witness import WitnessCheck
from torchcache.inputs.cached_call import CachedCall
from torchcache.layout import Found, at_positions
from torchcache.options import CacheOptions
from torchcache.report.go_around import NOTHING, GoAround
from torchcache.report.notices import Notices
from torchcache.report.progress import progress_bar
from torchcache.report.reasons import Reason
from torchcache.tiers.tiers import spread

#: One row shows nothing of whether rows depend on their batch, so that is found out with at least so many.
_LEAST_UNCHECKED = 2


class Parts:
    """Completes calls part by part: each part is computed, checked and kept as a call of its own would be.

    Args:
        name: What to call the target.
        options: The options in force.
        keys: Splits the calls of the target.
        joining: Completes a part.
        witness: Knows whether rows depend on their batch.
        notices: Counts what happens.
    """

    def __init__(
        self, name: str, options: CacheOptions, keys: Keys, joining: Joining, witness: WitnessCheck, notices: Notices
    ) -> None:
        self._name = name
        self._size = options.batch_size
        self._shows_progress = options.progress
        self._keys = keys
        self._joining = joining
        self._witness = witness
        self._notices = notices

    def complete(
        self, call: CachedCall, found: list[Found], missing: list[int], doubted: list[int], *, can_wait: bool
    ) -> tuple[list[Found], object]:
        """Compute the rows that no tier has; see ``Joining.complete``.

        Raises:
            GoAround: If the call cannot be cached. Parts that were computed before are kept.
        """
        rest = sorted([*missing, *doubted])
        if not call.batch.is_divisible or len(rest) <= self._size_of_part(call):
            return self._joining.complete(call, found, missing, doubted, can_wait=can_wait)

        computed: list[Found] = []
        to_doubt = frozenset(doubted)
        are_different = False  # until rows are known to be their own, equal ones may come out different
        with progress_bar(len(rest), self._name, is_wanted=self._shows_progress) as advance:
            while rest:
                before = len(rest)
                if not are_different and not self._is_unchecked(call):
                    rest = self._without_equals(call, rest, computed)
                    are_different = True

                # Parts are about equally large: there are modules to which a batch of one is something else.
                n_parts = math.ceil(len(rest) / self._size_of_part(call))
                n = math.ceil(len(rest) / max(1, n_parts))
                rows = self._compute(call, rest[:n], found, to_doubt, can_wait=can_wait) if n else []
                rest = rest[n:]
                if not call.batch.results.do_stack([*computed[:1], *rows]):
                    raise GoAround(Reason.ROWS_DO_NOT_STACK)
                computed += rows
                advance(before - len(rest))
        return brought_together(call, found, computed, missing), NOTHING

    def _size_of_part(self, call: CachedCall) -> int:
        """Return how many rows of a call may be computed at once."""
        if self._size is None:
            return call.batch.n
        return max(self._size, _LEAST_UNCHECKED) if self._is_unchecked(call) else self._size

    def _is_unchecked(self, call: CachedCall) -> bool:
        """Tell whether it is still to be found out if rows of a call depend on their batch."""
        return call.is_unchecked and not self._witness.knows_rows(call) and not self._witness.are_copies(call)

    def _without_equals(self, call: CachedCall, rest: Sequence[int], computed: Iterable[Found]) -> list[int]:
        """Return the positions that are left without those of samples that others are equal to; count these."""
        seen = {call.digests[position] for position in positions_of(computed)}
        first: dict[bytes, int] = {}
        for position in rest:
            if call.digests[position] not in seen:
                first.setdefault(call.digests[position], position)
        self._notices.counters.add(duplicates=len(rest) - len(first))
        return list(first.values())

    def _compute(
        self, call: CachedCall, positions: list[int], found: list[Found], doubted: Collection[int], *, can_wait: bool
    ) -> list[Found]:
        """Complete a part; return its rows at their positions in the call."""
        part = self._part_of(call, positions)
        missing: list[int] = []
        again: list[int] = []
        for number, position in enumerate(positions):
            (again if position in doubted else missing).append(number)
        cached = picked(found, positions) if again else []
        try:
            rows, whole = self._joining.complete(part, cached, missing, again, can_wait=can_wait)
        except GoAround as around:
            # The result that it may have is that of the part.
            raise GoAround(around.reason, around.evidence) from None
        if part.look is not call.look:  # the first part has left the state, as by eval(): the others are in that one
            call.look = part.look
            call.namespace = call.own_namespace = part.namespace
        if whole is NOTHING:
            return at_positions(rows, positions)

        # All of the part was computed, and rows of it that another thread computes too are only in the result.
        rows, lacking = spread(rows, part.digests, missing)
        rows = at_positions(rows, positions)
        if lacking:
            rows += self._compute(call, [positions[i] for i in lacking], found, [], can_wait=False)
        return rows

    def _part_of(self, call: CachedCall, positions: list[int]) -> CachedCall:
        """Return a call that has some samples of another only."""
        args, kwargs, _ = call.batch.select(positions)
        return CachedCall(
            call.function,
            args,
            kwargs,
            self._keys.split(call.function, args, kwargs),
            call.look,
            call.namespace,
            call.own_namespace,
            source=call.source,
            sink=call.sink,
            digests=call.digests_at(positions),
            keys=None if call.keys is None else [call.keys[p] for p in positions],
            landings=call.landings,
            is_unchecked=self._is_unchecked(call),
        )
