"""The one way around the cache."""

from __future__ import annotations

from typing import Final

from torchcache.report.reasons import Reason

#: Stands for the result of a call that is still to be computed; None may be a result.
NOTHING: Final = object()


class GoAround(Exception):  # noqa: N818 - no error: the call is answered, only not by the cache
    """A call is to be answered without the cache.

    Raised wherever that is found out below ``call.call``, which alone answers it: it counts the reason, and computes
    the call as its caller made it.

    Args:
        reason: Why.
        evidence: What was found that is the reason, where that helps.
        result: What the call returns, if that is known already.
    """

    def __init__(self, reason: Reason, evidence: str = "", result: object = NOTHING) -> None:
        super().__init__(reason)
        self.reason = reason
        self.evidence = evidence
        self.result = result
