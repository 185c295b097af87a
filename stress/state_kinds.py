"""Values that a program holds, changed or made anew: every kind of value in every place, with what the rules say.

A change is one of

- "another": an object with another value takes the value's place;
- "in place": the object itself becomes another value;
- "again": an equal object, made anew, takes its place;
- "elsewhere": the same program runs in another process, with another hash seed.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from stress.interpreters import HASH_SEEDS, Interpreters, Task
from stress.pairs import Outcome, in_a_directory
from stress.state_programs import PLACES, Call, Program, Running, changed, replaced
from stress.state_values import MISSING, VALUES, Value

_SAME = ("again", "elsewhere")
CHANGES = ("another", "in place", *_SAME)

#: Reasons for which a call with a value that need not be seen may go around the cache.
_OPAQUE = frozenset({"opaque_state", "opaque_weights", "sparse_tensor", "tensor_subclass"})
#: And of those whose state moves when it is read.
_MOVING = frozenset({"state_moved", "state_changes_at_every_call", "input_changed_in_place"})


@dataclass(frozen=True, slots=True)
class Case:
    """A program before and after a change.

    Attributes:
        change: One of ``CHANGES``.
        how: "live": one program runs on. "stored": two programs of one process share a directory. "process": the
            second one runs in another process, with the same directory.
        first: The program before it.
        second: The program after it.
        live: Statements that turn the first program, while it runs, into the second.
    """

    change: str
    how: str
    first: Program
    second: Program
    live: str = ""

    @property
    def differs(self) -> bool:
        """Whether the second call must not share a key with the first call."""
        return self.change not in _SAME

    @property
    def value(self) -> Value:
        """The value that the programs hold."""
        return VALUES[self.first.value]

    def shown(self) -> str:
        """Return both programs for a reader."""
        calls = f"# called {self.first.n_calls} times, then {self.second.n_calls} times"
        return "\n\n".join([self.first.text, f"# {self.how}:", self.live or self.second.text, calls])


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of value, and how it may be changed.

    Attributes:
        value: The value, by name.
        places: Where it may be.
        changes: What may happen to it.
        share: How often it is dealt, beside the others.
    """

    value: str
    places: tuple[str, ...]
    changes: tuple[str, ...]
    share: int = 1


def _places_of(value: Value) -> tuple[str, ...]:
    # The state of a dataset is found out once: that its own code changes what can be seen is not noticed.
    is_followed = not (value.is_consumed and value.is_seen)
    return tuple(
        name for name, place in PLACES.items()
        if (name != "dataset" or is_followed) and (not place.is_result or value.is_returned)
    )  # fmt: skip


def _changes_of(value: Value) -> tuple[str, ...]:
    return tuple(change for change in CHANGES if change != "in place" or value.change)


#: One kind for each value; place and change are drawn.
KINDS = {
    f"value: {name}": Kind(value=name, places=_places_of(value), changes=_changes_of(value))
    for name, value in VALUES.items()
}

#: One kind for each value, each place and each change.
EVERY_KIND = {
    f"{kind.value} | {place} | {change}": replace(kind, places=(place,), changes=(change,))
    for kind in KINDS.values()
    for place in kind.places
    for change in kind.changes
}


def say_what_is_left_out() -> None:
    """Name the packages that are not installed."""
    if MISSING:
        print(f"values of packages that are not installed are left out: {', '.join(MISSING)}", file=sys.stderr)


def deal(kind: Kind, rng: random.Random) -> Case:
    """Generate a case of a kind."""
    value, place, change = VALUES[kind.value], rng.choice(kind.places), rng.choice(kind.changes)
    number, other = rng.sample(value.numbers, 2)
    first = Program(kind.value, place, number)
    if change == "elsewhere":
        return Case(change, "process", first, first)
    if change == "in place":
        second = replace(first, n_calls=value.most_calls + 1)
        if not PLACES[place].is_result:  # what a caller does to a result of its own changes no other
            second = replace(second, number=other)
        return Case(change, "live", first, second, changed(replace(first, number=other)) or "")
    second = replace(first, number=other) if change == "another" else first
    live = replaced(second)
    if live is None or rng.random() < _STORED_SHARE:
        return Case(change, "stored", first, second)
    return Case(change, "live", first, second, live)


_STORED_SHARE = 0.3


def judge(case: Case, parent: Path | None, interpreters: Interpreters | None) -> Outcome:
    """Carry out both programs of a case and compare them with what they do without a cache.

    Args:
        case: The case.
        parent: Where a directory for its cache can be made, if it needs one.
        interpreters: Where it runs if it needs another process.
    """
    right = _without_cache(case)
    answers = in_a_directory(case.how, parent, lambda directory: _with_cache(case, directory, interpreters))
    return _compare(case, right, answers)


_Calls = tuple[list[Call], list[Call]]


def _without_cache(case: Case) -> _Calls:
    running = Running(case.first, is_cached=False)
    first = running.call(case.first)
    if case.how == "live":
        running.edit(case.live)
    else:
        running = Running(case.second, is_cached=False)
    return first, running.call(case.second)


def _with_cache(case: Case, directory: Path | None, interpreters: Interpreters | None) -> _Calls:
    running = Running(case.first, directory)
    first = running.call(case.first)
    if case.how == "live":
        running.edit(case.live)
        return first, running.call(case.second)
    running.close()
    if case.how == "process":
        assert interpreters is not None
        # One seed is enough, which is not this process's: each interpreter loads all the libraries.
        (second,) = interpreters.ask(Task(case.how, directory, case.second), HASH_SEEDS[1])
        return first, second
    running = Running(case.second, directory)
    second = running.call(case.second)
    running.close()
    return first, second


def _compare(case: Case, right: _Calls, answers: _Calls) -> Outcome:
    outcome = Outcome()
    is_large = case.value.most_calls > 1 and case.change == "in place"
    for which, calls, expected in zip(("first", "second"), answers, right, strict=True):
        results = [(call, true.result) for call, true in zip(calls, expected, strict=True) if not call.is_refused]
        if is_large and which == "second":
            results = results[-1:]
        outcome.wrongs += [
            ("wrong", f"call {i + 1} of the {which} program returned {call.result}, not {true}; {call.reasons}")
            for i, (call, true) in enumerate(results) if call.result != true
        ]  # fmt: skip
        _check_reasons(case, which, calls, outcome)
    first, second = answers
    _count_hits(first[1:], "first", case, outcome)
    if case.change != "in place":
        _count_hits(second if case.change in _SAME else second[1:], "second", case, outcome)
    return outcome


def _check_reasons(case: Case, which: str, calls: list[Call], outcome: Outcome) -> None:
    """Check that no call went around the cache, had a fault or was not kept, unless that is allowed."""
    outcome.wrongs += [("trouble", f"the {which} program: {call.faults}") for call in calls if call.faults]
    if PLACES[case.first.place].is_result or case.value.is_consumed:
        return
    is_seen = case.value.is_seen and not (case.value.has_code and case.first.place == "argument")
    allowed = frozenset() if is_seen else _OPAQUE
    if case.value.is_lazy:
        allowed |= _MOVING
    if case.value.can_be_consumed and case.first.place == "dataset":
        allowed |= _OPAQUE
    reasons = sorted({reason for call in calls for reason in call.reasons if reason not in allowed})
    if reasons:
        outcome.wrongs.append(("opaque", f"calls of the {which} program are not cached: {', '.join(reasons)}"))


def _count_hits(calls: list[Call], which: str, case: Case, outcome: Outcome) -> None:
    """Count the calls that must be hits: those without a reason not to be cached."""
    if case.value.is_consumed or case.value.is_lazy:
        return
    through = [call for call in calls if not call.reasons and not call.is_refused]
    missed = sum(not call.hits for call in through)
    outcome.expected += len(through)
    outcome.hits += len(through) - missed
    if missed:
        outcome.wrongs.append(("missed", f"{missed} calls of the {which} program were computed that are cached"))
