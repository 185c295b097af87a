"""Values of every kind in every place of a program: another value never shares, an equal one hits, a change is seen.

Invariant: whatever a program holds, wherever it holds it, each call returns what it returns without a cache: after
another value took its place, and after it was changed in place. An equal value made anew hits, in this process and in
the next one, unless the cache says that it cannot see the value, which it may of some kinds. A value that a program
returns comes back as it was, with its type and what that adds, or is not kept.

A deck has each kind of value in each place with each change once. The suite ``keys`` has a part of them as well.
"""

from __future__ import annotations

import random

from stress.pairs import Pairs, PairTally
from stress.state_kinds import EVERY_KIND, Case, deal, judge, say_what_is_left_out
from stress.verdict import Run


def _deal(name: str, rng: random.Random) -> Case:
    return deal(EVERY_KIND[name], rng)


PAIRS = Pairs(EVERY_KIND, _deal, judge, cases=len(EVERY_KIND), counted_as=lambda name: EVERY_KIND[name].value)
TALLY = PAIRS.tally


def run(asked: Run[PairTally]) -> None:
    """Run the suite."""
    say_what_is_left_out()
    PAIRS.run(asked)
