"""Generated programs called twice: with one difference they never share a key, without one they always hit.

Invariant: two calls that differ in any one way of ``kinds.KINDS`` share no key for the samples concerned, and the
second one gets its own right result; two that are the same by the rules share every key, the second one computes
nothing and its result is the first one's, bit for bit. What is right, the same program says without a cache.

The seed and the number of a case make the case; most run in this process, some in others.
"""

from __future__ import annotations

from stress.judge import judge
from stress.kinds import KINDS, deal
from stress.pairs import Pairs

PAIRS = Pairs(KINDS, deal, judge)
TALLY, run = PAIRS.tally, PAIRS.run
