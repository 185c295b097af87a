"""Generated programs called twice: with one difference they never share a key, without one they always hit.

Invariant: two calls that differ in any one way of ``kinds.KINDS`` share no key for the samples concerned, and the
second one gets its own right result; two that are the same by the rules share every key, the second one computes
nothing and its result is the first one's, bit for bit. What is right, the same program says without a cache.

Each kind of value of ``state_kinds`` is one of the kinds. The suite ``state`` has them in every place, with every
change.

The seed and the number of a case make the case; most run in this process, some in others.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from stress import judge, kinds, state_kinds
from stress.interpreters import Interpreters
from stress.pairs import Outcome, Pairs, PairTally
from stress.verdict import Run


def _deal(name: str, rng: Random) -> kinds.Case | state_kinds.Case:
    if name in state_kinds.KINDS:
        return state_kinds.deal(state_kinds.KINDS[name], rng)
    return kinds.deal(name, rng)


def _judge(
    case: kinds.Case | state_kinds.Case, parent: Path | None, interpreters: Interpreters | None
) -> Outcome:  # fmt: skip
    if isinstance(case, state_kinds.Case):
        return state_kinds.judge(case, parent, interpreters)
    return judge.judge(case, parent, interpreters)


PAIRS = Pairs(kinds.KINDS | state_kinds.KINDS, _deal, _judge)
TALLY = PAIRS.tally


def run(asked: Run[PairTally]) -> None:
    """Run the suite."""
    state_kinds.say_what_is_left_out()
    PAIRS.run(asked)
