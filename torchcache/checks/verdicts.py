"""What is known of namespaces: whether their rows depend on their batch."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from torchcache.checks.plan import Witness
from torchcache.process import ForkLock
from torchcache.report.go_around import NOTHING, GoAround
from torchcache.report.reasons import Reason
from torchcache.storage.contract import Verdict

#: At most this many namespaces are remembered with what was found out about them, and rows to check others with.
MOST_NAMESPACES = 4096
_MOST_WITNESSES = 16

#: This many comparisons may prove nothing, of rows of zeros for example, before the check is given up.
_VACUOUS_CHECKS = 3

T = TypeVar("T")


class Condemned(GoAround):
    """A call, and all others of its namespace, are to be answered without the cache: what is kept of it is forgotten.

    Args:
        reason: As of ``GoAround``.
        evidence: As of ``GoAround``.
        result: As of ``GoAround``.
        verdict: What other caches are to be told of the namespace, or None.
    """

    def __init__(
        self, reason: Reason, evidence: str = "", result: object = NOTHING, verdict: Verdict | None = None
    ) -> None:
        super().__init__(reason, evidence, result)
        self.verdict = verdict


def remember(table: OrderedDict[bytes, T], namespace: bytes, value: T, most: int = MOST_NAMESPACES) -> None:
    """Put what was found out about a namespace into a table, of which the oldest entries are forgotten."""
    table[namespace] = value
    if len(table) > most:
        table.popitem(last=False)


class Verdicts:
    """What is known of namespaces: whether their rows depend on their batch, and a witness to find out.

    A few rows of the first computed batch of a namespace are computed once more by themselves. The batch also leaves
    one row as a witness, which the second one carries at its end: a row that depends on those before it, or on all,
    comes back changed.
    """

    def __init__(self) -> None:
        self._lock = ForkLock()
        # Guarded by _lock:
        self._verdicts: OrderedDict[bytes, Verdict | None] = OrderedDict()  # None: it cannot be found out
        self._witnesses: OrderedDict[bytes, Witness] = OrderedDict()
        self._vacuous: OrderedDict[bytes, int] = OrderedDict()  # comparisons that proved nothing
        self._repeated: OrderedDict[bytes, None] = OrderedDict()  # namespaces where the number of copies did not matter

    def of(self, namespace: bytes) -> Verdict | None:
        """Return the verdict; None if it could not be found out and is not to be tried again."""
        with self._lock.raw:
            return self._verdicts.get(namespace, Verdict.UNKNOWN)

    def note(self, namespace: bytes, verdict: Verdict | None) -> None:
        """Remember a verdict, or with None that there will be none, and forget the witness.

        One that says dependent stays, and None does not replace any.
        """
        with self._lock.raw:
            before = self._verdicts.get(namespace)
            if before is None or (before is not Verdict.DEPENDENT and verdict is not None):
                remember(self._verdicts, namespace, verdict)
            self._witnesses.pop(namespace, None)

    def learn(self, namespace: bytes, verdict: Verdict) -> None:
        """Remember what another cache found out, where nothing is known here.

        Where it found out nothing, this one tries by itself.
        """
        if verdict is Verdict.REPEATED:
            self.note_repeated(namespace)
        elif verdict not in (Verdict.UNKNOWN, Verdict.UNDECIDED) and self.of(namespace) is Verdict.UNKNOWN:
            self.note(namespace, verdict)

    def condemned(self, namespace: bytes, result: object = NOTHING, evidence: str = "") -> Condemned:
        """Remember that rows depend on their batch; return what to raise, with the result of the call if it is known.

        Args:
            namespace: Of the call.
            result: Of the whole call, as its caller made it.
            evidence: In what rows differ, if that says more than that they do.
        """
        is_news = self.of(namespace) is not Verdict.DEPENDENT
        self.note(namespace, Verdict.DEPENDENT)
        return Condemned(Reason.ROWS_DEPEND_ON_BATCH, evidence, result, verdict=Verdict.DEPENDENT if is_news else None)

    def note_repeated(self, namespace: bytes) -> None:
        """Remember that a row came back the same in two batches of copies of itself, of two sizes."""
        with self._lock.raw:
            remember(self._repeated, namespace, None)

    def is_repeated(self, namespace: bytes) -> bool:
        """Tell whether ``note_repeated`` was told so."""
        with self._lock.raw:
            return namespace in self._repeated

    def note_vacuous(self, namespace: bytes) -> None:
        """Remember that a comparison proved nothing; after some of these there will be no verdict."""
        with self._lock.raw:
            count = self._vacuous.get(namespace, 0) + 1
            remember(self._vacuous, namespace, count)
        if count >= _VACUOUS_CHECKS:
            self.note(namespace, None)

    def witness(self, namespace: bytes) -> Witness | None:
        """Return the witness that an earlier batch left."""
        with self._lock.raw:
            return self._witnesses.get(namespace)

    def leave(self, namespace: bytes, witness: Witness) -> None:
        """Leave a witness in place of any other."""
        with self._lock.raw:
            remember(self._witnesses, namespace, witness, _MOST_WITNESSES)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock.raw:
            self._verdicts.clear()
            self._witnesses.clear()
            self._repeated.clear()
            self._vacuous.clear()
