"""Pairs of calls by kind: dealt from a deck, judged by several processes, counted, and kept where they go wrong."""

from __future__ import annotations

import collections
import contextlib
import json
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar

from stress.interpreters import Interpreters, prepare
from stress.members import Members
from stress.values import ViolationError
from stress.verdict import Run, Tally

T = TypeVar("T")

CASES = 20_000

_MOST_VIOLATIONS = 20
_END_SECONDS = 120.0  # a case that waits for another interpreter, and the ends of all of these


def in_a_directory(how: str, parent: Path | None, ask: Callable[[Path | None], T]) -> T:
    """Ask for the answers of a case with a directory for its caches, which is made where it needs one and removed."""
    if how in ("live", "fresh"):
        return ask(None)
    directory = Path(tempfile.mkdtemp(prefix="case-", dir=parent))
    try:
        return ask(directory / "cache")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(slots=True)
class Outcome:
    """What a case showed.

    Attributes:
        expected: Samples of the second call that must be hits.
        hits: How many of these were.
        wrongs: What never may happen, as kind and text.
    """

    expected: int = 0
    hits: int = 0
    wrongs: list[tuple[str, str]] = field(default_factory=list)


def compare_keys(
    outcome: Outcome, place: Mapping[Any, int], after: Sequence[Any], first: Sequence[str], second: Sequence[str]
) -> None:
    """Note which samples of the second call share a key wrongly, and which wrongly share none.

    Args:
        outcome: What is noted on.
        place: Where each sample of the first call is, of which the second has the key.
        after: The samples of the second call.
        first: The keys of the first call, by place.
        second: The keys of the second call.
    """
    known = set(first)
    for i, sample in enumerate(after):
        j = place.get(sample)
        if j is None and second[i] in known:
            outcome.wrongs.append(("shared", f"sample {i} has the key of a sample that is another one"))
        if j is not None and second[i] != first[j]:
            which = "namespace" if second[i].split()[0] != first[j].split()[0] else "digest"
            outcome.wrongs.append(("apart", f"sample {i} is sample {j} of the first call, but for its {which}"))


class Kind(Protocol):
    """One way to differ or to be the same."""

    @property
    def share(self) -> int:
        """How often it is dealt, beside the others."""
        ...


class Case(Protocol):
    """Two calls."""

    @property
    def how(self) -> str:
        """How, or in which process, the second one runs."""
        ...

    @property
    def differs(self) -> bool:
        """Whether at least one sample of the second call must not share a key with the first call."""
        ...

    def shown(self) -> str:
        """Return both calls for a reader."""
        ...


@dataclass(slots=True)
class PairTally(Tally):
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
    kinds: dict[str, int] = field(default_factory=dict)
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


@dataclass(frozen=True, slots=True)
class Pairs:
    """A suite of pairs of calls.

    Attributes:
        kinds: What cases there are, by name.
        deal: Makes a case of a kind.
        judge: Carries out a case and says what was wrong.
        cases: How many there are, unless the caller says.
        counted_as: Under which name the cases of a kind are counted.
    """

    kinds: Mapping[str, Kind]
    deal: Callable[[str, Random], Any]  # a Case
    judge: Callable[[Any, Path | None, Interpreters | None], Outcome]
    cases: int = CASES
    counted_as: Callable[[str], str] = str

    def tally(self) -> PairTally:
        """Return a tally that is still empty."""
        return PairTally(kinds=dict.fromkeys(map(self.counted_as, self.kinds), 0))

    def run(self, asked: Run[PairTally]) -> None:
        """Let ``jobs`` processes share the cases, until there were enough, the time is over, or much is violated.

        Raises:
            ViolationError: If no kind has a name with what was asked for.
        """
        if asked.only is None:
            self._run(asked)
            return
        kinds = {name: kind for name, kind in self.kinds.items() if asked.only in name}
        if not kinds:
            raise ViolationError("idle", f"no kind of the suite {asked.suite} has {asked.only!r} in its name")
        chosen = replace(self, kinds=kinds, cases=len(kinds))
        asked.tally.kinds = chosen.tally().kinds
        chosen._run(asked)

    def _run(self, asked: Run[PairTally]) -> None:
        tally = asked.tally
        prepare(asked.plant)
        if asked.case is not None:
            tally.kinds = {}
            self._try_all(asked, [asked.case], time.monotonic() + asked.seconds)
            return
        deadline = time.monotonic() + asked.seconds
        cases = range(asked.cases or self.cases)
        with contextlib.closing(Members(asked, asked.seconds + _END_SECONDS)) as members:
            running = [members.start(self._work, asked, i, cases[i :: asked.jobs], deadline) for i in range(asked.jobs)]
            for pid in running:
                members.join(pid, max(0.0, deadline - time.monotonic()) + _END_SECONDS)
        for i in range(asked.jobs):
            tally.add(json.loads(_tally_of(asked, i).read_text()))
        without = [name for name, count in tally.kinds.items() if not count]
        if without and not asked.has_failed():
            idle = f"{len(without)} kinds got no case, such as {without[0]!r}"
            if tally.cases < len(cases):  # each comes once before any twice, so only time was short
                print(f"{idle}, in {asked.seconds:g} seconds", file=sys.stderr)
            else:
                asked.note(ViolationError("idle", idle))

    def deck(self, rng: Random) -> list[str]:
        """Return kinds as they are dealt, shuffled: each comes once before any twice.

        Of kinds that are counted as one, the first comes before the second of any others.
        """
        ones = list(self.kinds)
        rest = [name for name, kind in self.kinds.items() for _ in range(kind.share - 1)]
        rng.shuffle(ones)
        rng.shuffle(rest)
        counts = collections.Counter[str]()
        turns: dict[str, int] = {}
        for name in ones:
            counts[self.counted_as(name)] += 1
            turns[name] = counts[self.counted_as(name)]
        return [*sorted(ones, key=turns.__getitem__), *rest]

    def _work(self, asked: Run[PairTally], job: int, numbers: Sequence[int], deadline: float) -> None:
        self._try_all(asked, numbers, deadline)
        _tally_of(asked, job).write_text(json.dumps(asdict(asked.tally)))

    def _try_all(self, asked: Run[PairTally], numbers: Sequence[int], deadline: float) -> None:
        size = sum(kind.share for kind in self.kinds.values())
        dealt: list[str] = []
        deck = -1
        with contextlib.closing(Interpreters(asked.plant)) as interpreters:
            for number in numbers:
                if time.monotonic() > deadline or len(asked.violations()) >= _MOST_VIOLATIONS:
                    break
                if number // size != deck:
                    deck = number // size
                    dealt = self.deck(asked.rng("deck", deck))
                self._try(asked, number, dealt[number % size], interpreters)

    def _try(self, asked: Run[PairTally], number: int, name: str, interpreters: Interpreters) -> None:
        """Deal and judge one case of a kind, and note what is wrong with it."""
        tally = asked.tally
        case: Case | None = None
        try:
            case = self.deal(name, asked.rng("case", number))
            outcome = self.judge(case, asked.directory, interpreters)
            wrongs = outcome.wrongs
            tally.expected += outcome.expected
            tally.hits += outcome.hits
        except ViolationError as error:
            wrongs = [(error.kind, str(error))]
        except Exception as error:
            wrongs = [("raised", "".join(traceback.format_exception(error)))]
        tally.cases += 1
        counted_as = self.counted_as(name)
        tally.kinds[counted_as] = tally.kinds.get(counted_as, 0) + 1
        if case is not None:
            tally.differences += case.differs
            tally.samenesses += not case.differs
            tally.ways[case.how] = tally.ways.get(case.how, 0) + 1
        counts = collections.Counter(kind for kind, _ in wrongs)
        tally.wrong_results += counts["wrong"]
        tally.shared_keys += counts["shared"]
        tally.split_keys += counts["apart"]
        if wrongs:
            _keep(asked, number, name, case, wrongs)


def _tally_of(asked: Run[PairTally], job: int) -> Path:
    return asked.directory / f"tally-{job}.json"


def _keep(asked: Run[PairTally], number: int, name: str, case: Case | None, wrongs: list[tuple[str, str]]) -> None:
    """Keep the calls of a case that went wrong, and say how to see it again."""
    path = asked.directory / f"case-{number}.txt"
    if case is not None:
        path.write_text(f"{name}, {case.how}\n\n{case.shown()}", "utf-8", "backslashreplace")
    again = f"python -m stress run --suite {asked.suite} --seed {asked.seed} --case {number}"
    again += f" --only {shlex.quote(asked.only)}" if asked.only else ""
    again += f" --plant {shlex.quote(asked.plant)}" if asked.plant else ""
    said = "; ".join(dict.fromkeys(text for _, text in wrongs))
    asked.note(ViolationError(wrongs[0][0], f"{name} ({case.how if case else 'not dealt'}): {said}; again: {again}"))
