"""What one cache counts and says."""

from __future__ import annotations

from collections.abc import Mapping

from torchcache.errors import StoreError
from torchcache.log import warn_once
from torchcache.reasons import RANDOM_CODE, remedy_for
from torchcache.stats import Counters


class Notices:
    """The counters of one cache, and its lines in the log: each kind once a target.

    Args:
        name: What to call the target.
        remedies: What to say of a reason to go around the cache, where the usual is not what to do here.

    Attributes:
        counters: What ``stats()`` shows.
        last_fault: What was said of the last fault, for who asks why a call missed.
    """

    def __init__(self, name: str, remedies: Mapping[str, str]) -> None:
        self._name = name
        self._remedies = remedies
        self.counters = Counters()
        self.last_fault = ""

    def bypass(self, reason: str, rows: int, evidence: str = "") -> None:
        """Note that a call of so many rows goes around the cache."""
        self.counters.add_to("bypasses", reason)
        self.counters.add(bypassed_rows=rows)
        self.say(f"bypass {reason}", f"the cache is bypassed: {self.because(reason, evidence)}")

    def because(self, reason: str, evidence: str) -> str:
        """Return a reason with what to do about it."""
        kind = RANDOM_CODE if evidence and reason == "random_numbers" else reason
        remedy = self._remedies.get(kind) or remedy_for(kind)
        return f"{remedy} ({reason}: {evidence})" if evidence else f"{remedy} ({reason})"

    def has_served(self) -> bool:
        """Tell whether a call was looked up, or computed and taken apart: then the target is set up."""
        values = self.counters.values()
        return any(values.get(name) for name in ("misses", "memory_hits", "queue_hits", "store_hits"))

    def error(self, error: BaseException, rows: int) -> None:
        """Note a fault that became a miss, or so many rows that were not stored."""
        kind = error.kind if isinstance(error, StoreError) else type(error).__name__
        if rows:
            self.counters.add_to("dropped_rows", kind, rows)
        self.fault(kind, str(error))

    def fault(self, kind: str, message: str, amount: int = 1) -> None:
        """Note a fault of the machine, or of what others wrote."""
        self.counters.add_to("faults", kind, amount)
        self.last_fault = message
        warn_once(("fault", kind), "%s: %s; it goes on without (fault %r, said once)", self._name, message, kind)

    def say(self, kind: str, message: str) -> None:
        """Say something once per target and kind."""
        warn_once((self._name, kind), "%s: %s", self._name, message)
