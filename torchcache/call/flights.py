"""Rows under way: two threads that miss one sample at the same time compute it once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from torchcache import process
from torchcache.layout import Rows
from torchcache.process import ForkLock

#: A call waits so long for rows that other threads compute; then it computes them itself.
JOIN_SECONDS = 20.0


class Flight:
    """The rows that one call computes; ``rows`` are there, an item a layout, once it has landed, unless it failed."""

    def __init__(self, namespace: bytes) -> None:
        self.namespace = namespace
        self.digests: list[bytes] = []
        self.rows: Sequence[Rows] = ()
        self.generation: int = process.generation()
        self.owner: threading.Thread = threading.current_thread()
        self.has_landed: threading.Event = threading.Event()

    def is_under_way(self) -> bool:
        """Tell whether another thread of this process computes it; a forked child has none of its parent's."""
        owner = self.owner
        return self.generation == process.generation() and owner is not threading.current_thread() and owner.is_alive()


class Flights:
    """What the threads of this process compute for one cache right now.

    Our own waits cannot go in a circle: a call first computes what it claimed and then waits, and a call inside
    another cached call does not wait at all. The user's code may close the circle, where what is cached waits for a
    thread that asks for the same sample. So a wait has a bound, and one that reached it is the last of this cache.

    Attributes:
        landings: How many flights have ended; more than before a lookup means that rows may be there since.
    """

    def __init__(self) -> None:
        self._is_patient = True
        self._lock = ForkLock()
        # Guarded by _lock:
        self._under_way: dict[bytes, Flight] = {}  # namespace + digest -> who computes it
        self.landings: int = 0

    def claim(self, flight: Flight, digests: Sequence[bytes], *, joins: bool) -> dict[int, Flight]:
        """Claim rows for a flight of this thread.

        Args:
            flight: A new one, to be ``land``-ed whatever happens, also if this is interrupted.
            digests: The rows that no tier has, each once.
            joins: Whether the call may wait for others; none does after a wait that reached its bound.

        Returns:
            For each position in ``digests`` that somebody else computes, whose flight to wait for; the others
            are the flight's.
        """
        joined: dict[int, Flight] = {}
        with self._lock.raw:
            for position, digest in enumerate(digests):
                other = self._under_way.get(flight.namespace + digest) if self._under_way else None
                if other is not None and other.is_under_way():
                    if joins and self._is_patient:
                        joined[position] = other
                        continue
                else:  # nobody, or somebody who will not land it any more
                    self._under_way[flight.namespace + digest] = flight
                flight.digests.append(digest)
        return joined

    def wait(self, flights: Iterable[Flight]) -> bool:
        """Wait until flights have landed, ``JOIN_SECONDS`` for all of them together; tell whether that was enough."""
        deadline = time.monotonic() + JOIN_SECONDS
        if not all(flight.has_landed.wait(max(0.0, deadline - time.monotonic())) for flight in flights):
            self._is_patient = False
            return False
        return True

    def land(self, flight: Flight, rows: Sequence[Rows]) -> None:
        """End a flight with the rows that others may use, an item a layout."""
        flight.rows = rows
        with self._lock.raw:
            self.landings += 1
            for digest in flight.digests:
                if self._under_way.get(flight.namespace + digest) is flight:
                    del self._under_way[flight.namespace + digest]
        flight.has_landed.set()
