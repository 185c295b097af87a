"""Generated programs called twice: with one difference they never share a key, without one they always hit.

Invariant: two calls that differ in any one way of ``kinds.KINDS`` share no key for the samples concerned, and the
second one gets its own right result; two that are the same by the rules share every key, the second one computes
nothing and its result is the first one's, bit for bit. What is right, the same program says without a cache.

The seed and the number of a case make the case; most run in this process, some in others.
"""

from __future__ import annotations

import collections
import contextlib
import json
import shlex
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stress.interpreters import Interpreters, prepare
from stress.judge import judge
from stress.kinds import KINDS, Case, deal
from stress.members import Members
from stress.values import ViolationError
from stress.verdict import Run, Tally

CASES = 20_000

_MOST_VIOLATIONS = 20
_END_SECONDS = 120.0  # a case that waits for another interpreter, and the ends of all of these


@dataclass(slots=True)
class KeyTally(Tally):
    """What a run did.

    Attributes:
        cases: Pairs of calls.
        differences: How many of these differed.
        samenesses: How many were the same.
        wrong_results: Samples whose result was not right.
        shared_keys: Samples that shared a key although they differ.
        split_keys: Samples that are the same and did not share a key.
        kinds: Cases by kind.
        ways: Cases by how they ran.
    """

    cases: int = 0
    differences: int = 0
    samenesses: int = 0
    wrong_results: int = 0
    shared_keys: int = 0
    split_keys: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    ways: dict[str, int] = field(default_factory=dict)

    def add(self, other: Mapping[str, Any]) -> None:
        """Add what another process counted."""
        for name, value in other.items():
            if isinstance(value, dict):
                counts = getattr(self, name)
                counts.update({key: counts.get(key, 0) + count for key, count in value.items()})
            else:
                setattr(self, name, getattr(self, name) + value)

    def is_proof(self) -> bool:
        return bool(self.differences and self.samenesses and self.hits)


TALLY = KeyTally


def run(asked: Run[KeyTally]) -> None:
    """Let ``jobs`` processes share the cases, until there were enough, the time is over, or much is violated."""
    tally = asked.tally
    prepare(asked.plant)
    if asked.case is not None:
        tally.kinds = {}
        _try_all(asked, [asked.case], time.monotonic() + asked.seconds)
        return
    deadline = time.monotonic() + asked.seconds
    cases = range(asked.cases or CASES)
    with contextlib.closing(Members(asked, asked.seconds + _END_SECONDS)) as members:
        running = [members.start(_work, asked, i, cases[i :: asked.jobs], deadline) for i in range(asked.jobs)]
        for pid in running:
            members.join(pid, max(0.0, deadline - time.monotonic()) + _END_SECONDS)
    for i in range(asked.jobs):
        tally.add(json.loads(_tally_of(asked, i).read_text()))
    without = [name for name, count in tally.kinds.items() if not count]
    if without and not asked.has_failed():
        asked.note(ViolationError("idle", f"{len(without)} kinds got no case, such as {without[0]!r}"))


def _tally_of(asked: Run[KeyTally], job: int) -> Path:
    return asked.directory / f"tally-{job}.json"


def _work(asked: Run[KeyTally], job: int, numbers: Sequence[int], deadline: float) -> None:
    _try_all(asked, numbers, deadline)
    _tally_of(asked, job).write_text(json.dumps(asdict(asked.tally)))


def _try_all(asked: Run[KeyTally], numbers: Sequence[int], deadline: float) -> None:
    with contextlib.closing(Interpreters(asked.plant)) as interpreters:
        for number in numbers:
            if time.monotonic() > deadline or len(asked.violations()) >= _MOST_VIOLATIONS:
                break
            _try(asked, asked.tally, number, interpreters)


def _try(asked: Run[KeyTally], tally: KeyTally, number: int, interpreters: Interpreters) -> None:
    """Deal and judge one case, and note what is wrong with it."""
    name, case = kind_of(asked, number), None
    try:
        case = deal(name, asked.rng("case", number))
        outcome = judge(case, asked.directory, interpreters)
        wrongs = outcome.wrongs
        tally.expected += outcome.expected
        tally.hits += outcome.hits
    except ViolationError as error:
        wrongs = [(error.kind, str(error))]
    except Exception as error:
        wrongs = [("raised", "".join(traceback.format_exception(error)))]
    tally.cases += 1
    tally.kinds[name] = tally.kinds.get(name, 0) + 1
    if KINDS[name].differs:
        tally.differences += 1
    else:
        tally.samenesses += 1
    if case is not None:
        tally.ways[case.how] = tally.ways.get(case.how, 0) + 1
    counts = collections.Counter(kind for kind, _ in wrongs)
    tally.wrong_results += counts["wrong"]
    tally.shared_keys += counts["shared"]
    tally.split_keys += counts["apart"]
    if wrongs:
        _keep(asked, number, name, case, wrongs)


def _keep(asked: Run[KeyTally], number: int, name: str, case: Case | None, wrongs: list[tuple[str, str]]) -> None:
    """Keep the programs of a case that went wrong, and say how to see it again."""
    path = asked.directory / f"case-{number}.txt"
    if case is not None:
        parts = [f"{name}, {case.how}", case.first.shown(), "live:", *case.live, "second:", case.second.shown()]
        path.write_text("\n\n".join(parts), "utf-8", "backslashreplace")
    again = f"python -m stress run --suite keys --seed {asked.seed} --case {number}"
    again += f" --plant {shlex.quote(asked.plant)}" if asked.plant else ""
    said = "; ".join(dict.fromkeys(text for _, text in wrongs))
    asked.note(ViolationError(wrongs[0][0], f"{name} ({case.how if case else 'not dealt'}): {said}; again: {again}"))


def kind_of(asked: Run[KeyTally], number: int) -> str:
    """Return the kind of a case: dealt from a shuffled deck, in which each kind comes once before any comes twice."""
    size = sum(kind.share for kind in KINDS.values())
    rng = asked.rng("deck", number // size)
    ones = list(KINDS)
    rest = [name for name, kind in KINDS.items() for _ in range(kind.share - 1)]
    rng.shuffle(ones)
    rng.shuffle(rest)
    return (ones + rest)[number % size]
