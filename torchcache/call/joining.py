"""Missing rows of a call: each is computed here, or waited for where another thread computes it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from torchcache.call import flights
from torchcache.call.computing import NO_ROWS, Computer
from torchcache.call.flights import Flight, Flights
from torchcache.checks.parts import without
from torchcache.inputs.cached_call import CachedCall
from torchcache.inputs.sample_keys import open_fitting
from torchcache.layout import Found, Rows
from torchcache.options import CacheOptions
from torchcache.report.go_around import NOTHING
from torchcache.report.notices import Notices
from torchcache.tiers.tiers import Tiers, spread


class Joining:
    """Brings the rows of a call together.

    Args:
        options: The options in force.
        computer: Computes rows.
        tiers: Where rows are kept.
        notices: Counts and logs what happens.

    Attributes:
        flights: The rows that threads of this process compute.
    """

    def __init__(self, options: CacheOptions, computer: Computer, tiers: Tiers, notices: Notices) -> None:
        self._looks_up = options.looks_up
        self._computer = computer
        self._tiers = tiers
        self._notices = notices
        self.flights: Flights = Flights()

    def complete(
        self, call: CachedCall, found: list[Found], missing: list[int], doubted: list[int], *, can_wait: bool
    ) -> tuple[list[Found], object]:
        """Compute the rows that no tier has, equal ones once.

        Args:
            call: The call.
            found: The values that the tiers have.
            missing: Positions of the others.
            doubted: Positions of rows that are cached and to be compared.
            can_wait: Whether rows may come from another thread that computes them.

        Returns:
            All rows of the call; and its result as the function returned it, if that is what the caller is to get,
            NOTHING otherwise. With a result, there are rows of the samples that differ only, which tiers share.

        Raises:
            GoAround: If the call cannot be cached.
        """
        first: dict[bytes, int] = {}
        for position in missing:
            first.setdefault(call.digests[position], position)
        wanted = list(first.values())
        self._notices.counters.add(duplicates=len(missing) - len(wanted))

        # Rows that another thread was to compute and did not are computed here in a second round.
        computed: list[Found] = []
        for joins in (can_wait and not call.is_unchecked, False):
            own, joined, whole = self._compute(call, wanted, doubted, found, joins=joins)
            if whole is not NOTHING:
                return own, whole
            landed, wanted = self._wait(joined, call)
            computed += own
            computed += landed
            doubted = []
            if not wanted:
                break

        return brought_together(call, found, computed, missing), NOTHING

    def _compute(
        self, call: CachedCall, wanted: list[int], doubted: list[int], found: list[Found], *, joins: bool
    ) -> tuple[list[Found], Mapping[int, Flight], object]:
        """Compute those of the wanted rows that nobody else computes.

        Returns:
            The rows, the flights of the others by position, and the result as of ``complete``.
        """
        flight = Flight(call.namespace)
        shared: list[Rows] = []
        landed: list[Found] = []
        try:
            claimed = self.flights.claim(flight, call.digests_at(wanted), joins=joins)
            joined = {wanted[i]: other for i, other in claimed.items()}
            own = _others(wanted, joined)
            has_landed = self.flights.landings != call.landings
            if has_landed and self._looks_up and not call.is_unchecked:
                landed = _opened(call, self._tiers.look_in_memory(call, own))
                own = _others(own, positions_of(landed))

            computed = NO_ROWS
            if own or doubted:
                computed = self._computer.compute(call, own, doubted, found)
            shared = computed.shared
        finally:
            self.flights.land(flight, shared)
        return landed + computed.found, joined, computed.whole

    def _wait(self, joined: Mapping[int, Flight], call: CachedCall) -> tuple[list[Found], list[int]]:
        """Take rows from the flights that compute them; also return the positions of those that did not come."""
        by_flight: dict[Flight, list[int]] = {}
        for position, flight in joined.items():
            by_flight.setdefault(flight, []).append(position)
        if not self.flights.wait(by_flight):
            self._notices.say(
                "waited",
                f"rows that another thread computes did not come within {flights.JOIN_SECONDS:g} seconds. They are "
                "computed here too, and from now on threads do not wait for each other's rows. If what is cached waits "
                "for a thread that asks for the same sample, let that thread call the function without the cache",
            )

        landed: list[Found] = []
        for flight, positions in by_flight.items():
            for rows in flight.rows:
                landed += _taken(rows, positions, call.digests)
        landed = _opened(call, landed)
        missing = _others(joined, positions_of(landed))
        self._notices.counters.add(shared_rows=len(joined) - len(missing))
        return landed, missing


def brought_together(
    call: CachedCall, found: Sequence[Found], computed: Sequence[Found], missing: Sequence[int]
) -> list[Found]:
    """Return all rows of a call.

    Args:
        call: The call.
        found: The values that the tiers had.
        computed: What was computed since; it stands for what was found at the same positions.
        missing: The positions that the tiers had nothing for; equal samples take the row that one of them has.
    """
    again = positions_of(computed)
    rows: list[Found] = []
    for item in found:
        part = without(item, again)
        if part is not None:
            rows.append(part)

    if not again.issuperset(missing):
        again.update(missing)
        computed, _ = spread(computed, call.digests, sorted(again))
    return [*rows, *computed]


def _taken(rows: Rows, positions: list[int], digests: Sequence[bytes]) -> list[Found]:
    """Return what rows have for some positions of a call, by the digests of its samples."""
    numbers = {digest: number for number, digest in enumerate(rows.digests)}
    here: list[int] = []
    chosen: list[int] = []
    for position in positions:
        number = numbers.get(digests[position])
        if number is not None:
            here.append(position)
            chosen.append(number)
    return [Found(here, rows.layout, rows.data[chosen])] if here else []


def _opened(call: CachedCall, found: list[Found]) -> list[Found]:
    """Return rows that came from another thread as values; sealed ones only if they are of the call's inputs."""
    if call.keys is None:
        return found
    return open_fitting(call.batch, found)


def positions_of(found: Iterable[Found]) -> set[int]:
    """Return the positions that rows are at."""
    positions: set[int] = set()
    for item in found:
        positions.update(item.positions)
    return positions


def _others(positions: Iterable[int], given: Container[int]) -> list[int]:
    """Return the positions that are not among the given ones, in order."""
    return [position for position in positions if position not in given]
