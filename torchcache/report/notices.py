"""What one cache counts and says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torchcache.errors import CorruptRecordError, StoreError
from torchcache.kinds import Drop, Fault
from torchcache.report.log import log_once, warn_once
from torchcache.report.reasons import RANDOM_CODE, REMEDY_OF_RANDOM_CODE, Reason
from torchcache.report.stats import Counters

#: At most this many paths are counted one by one of what moved.
_MOST_MOVED = 32
_OTHERS = "others"


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
        self.counters: Counters = Counters()
        self.last_fault: str = ""

    def bypass(self, reason: Reason, rows: int, evidence: str = "") -> None:
        """Note that a call of so many rows goes around the cache."""
        self.counters.add_to("bypasses", reason)
        self.counters.add(bypassed_rows=rows)
        self.say(f"bypass {reason}", f"the cache is bypassed: {self.because(reason, evidence)}")

    def because(self, reason: Reason, evidence: str) -> str:
        """Return a reason with what to do about it."""
        kind: str = reason
        remedy = reason.remedy
        if evidence and reason is Reason.RANDOM_NUMBERS:
            kind, remedy = RANDOM_CODE, REMEDY_OF_RANDOM_CODE
        remedy = self._remedies.get(kind, remedy)
        return f"{remedy} ({reason}: {evidence})" if evidence else f"{remedy} ({reason})"

    def has_served(self) -> bool:
        """Tell whether a call was answered, by the cache or around it: then the target is set up."""
        values = self.counters.values()
        return any(values.get(name) for name in ("misses", "memory_hits", "queue_hits", "store_hits", "bypasses"))

    def error(self, error: BaseException, rows: int) -> None:
        """Note a fault that became a miss, or so many rows that were not stored.

        An error of ours has a kind; any other counts under the name of its class.
        """
        kind: str = type(error).__name__
        if isinstance(error, (StoreError, CorruptRecordError)):
            kind = error.kind
        if rows:
            self.counters.add_to("dropped_rows", kind, rows)
        self._note_fault(kind, str(error), 1)

    def fault(self, kind: Fault, message: str, amount: int = 1) -> None:
        """Note a fault of the machine, or of what others wrote."""
        self._note_fault(kind, message, amount)

    def drop(self, kind: Drop, rows: int) -> None:
        """Note so many rows that are not stored."""
        self.counters.add_to("dropped_rows", kind, rows)

    def moved(self, paths: Iterable[str]) -> None:
        """Note what moved, so that a call or its rows were not cached; of very many paths the later ones together."""
        counted = self.counters.kinds_of("moved")
        for path in paths:
            name = path
            if path not in counted and len(counted) >= _MOST_MOVED:
                name = _OTHERS
            counted.add(name)
            self.counters.add_to("moved", name)

    def _note_fault(self, kind: str, message: str, amount: int) -> None:
        name = str(kind)
        self.counters.add_to("faults", name, amount)
        self.last_fault = message
        warn_once(("fault", name), "%s: %s; it goes on without (fault %r, said once)", self._name, message, name)

    def say(self, kind: str, message: str, level: int = logging.WARNING) -> None:
        """Say something once per target and kind."""
        log_once((self._name, kind), "%s: %s", self._name, message, level=level)
