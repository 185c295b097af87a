"""Carries out a case and says what was wrong: the rules of ``docs/keys.md``, without the library's own code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stress.interpreters import HASH_SEEDS, Interpreters, Task
from stress.kinds import Case
from stress.pairs import Outcome, compare_keys, in_a_directory
from stress.programs import Answer, Running, Side, identify


def judge(case: Case, parent: Path | None, interpreters: Interpreters | None) -> Outcome:
    """Carry out both calls of a case and compare them with what the rules say.

    Args:
        case: The case.
        parent: Where a directory for its cache can be made, if it needs one.
        interpreters: Where it runs if it needs another process.
    """
    answers = in_a_directory(case.how, parent, lambda directory: _answer(case, directory, interpreters))
    return _compare(case, *answers)


def _answer(case: Case, directory: Path | None, interpreters: Interpreters | None) -> tuple[Answer, Answer]:
    if case.how == "inherited":
        assert interpreters is not None
        first, second = interpreters.ask(Task(case.how, None, case.second, case.first), HASH_SEEDS[0])
        return first, second
    running = Running(case.first, directory)
    first = running.call(case.first)
    if case.how == "live":
        running.edit(case.live)
        return first, running.call(case.second)
    if case.ritual == "copied":
        running.copy()
        second = running.call(case.second)
        running.close()
        return first, second
    if directory is not None:
        running.close()
    if case.how in ("fresh", "stored"):
        running = Running(case.second, directory)
        second = running.call(case.second)
        if directory is not None:
            running.close()
        return first, second
    assert interpreters is not None
    hash_seed = HASH_SEEDS[len(case.first.text) % 2] if case.how == "process" else HASH_SEEDS[0]
    (second,) = interpreters.ask(Task(case.how, directory, case.second), hash_seed)
    return first, second


def _compare(case: Case, first: Answer, second: Answer) -> Outcome:
    outcome = Outcome()
    outcome.wrongs += [("trouble", f"the {which} call: {a.trouble}") for which, a in
                       (("first", first), ("second", second)) if a.trouble]  # fmt: skip
    before, after = identify(case.first.arguments()), identify(case.second.arguments())
    place = {sample: i for i, sample in enumerate(before)} if case.is_same_program else {}

    twin = Running(case.first, is_cached=False)
    right = _right_rows(twin, case.first, first)
    for i, sample in enumerate(before):
        if first.rows[i] not in right[sample]:
            outcome.wrongs.append(("wrong", f"sample {i} of the first call"))
    if case.how == "live":
        twin.edit(case.live)
    elif case.how != "inherited":
        twin = Running(case.second, is_cached=False)
    right = _right_rows(twin, case.second, second)
    for i, sample in enumerate(after):
        j = place.get(sample)
        if j is None and second.rows[i] not in right[sample]:
            outcome.wrongs.append(("wrong", f"sample {i} of the second call"))
        if j is not None:
            allowed = {first.rows[j]} if case.how != "fresh" else {first.rows[j], *right[sample]}
            if second.rows[i] not in allowed:
                outcome.wrongs.append(("wrong", f"sample {i} of the second call, which is sample {j} of the first"))
    if first.trouble or second.trouble:  # a call that goes around the cache has no keys
        return outcome

    compare_keys(outcome, place, after, first.keys, second.keys)
    if case.how != "fresh":  # two caches in memory share nothing
        _count_hits(outcome, after, place, second)
    return outcome


def _count_hits(outcome: Outcome, after: tuple[bytes, ...], place: dict[bytes, int], second: Answer) -> None:
    """Compare what was computed with what had to be: by the cache's own count, and by what really ran."""
    new = set(after) - place.keys()
    ran = [sample for arguments in second.forwarded for sample in identify(arguments)]
    again = [sample for sample in ran if sample in place]
    computed = max(len(again), second.misses - len(new), 0)
    outcome.expected = sum(sample in place for sample in after)
    outcome.hits = max(0, outcome.expected - computed)
    if computed:
        outcome.wrongs.append(("missed", f"{computed} samples were computed that are cached"))
    if second.misses < len(new):
        outcome.wrongs.append(("shared", f"{second.misses} samples were computed of {len(new)} that are new"))


def _right_rows(twin: Running, side: Side, answer: Answer) -> dict[bytes, set[bytes]]:
    """Return what each sample may come back as: as part of its call, or of the batch it was computed with.

    Kernels add in another order for another number of rows, so the last bits may depend on it.
    """
    right: dict[bytes, set[bytes]] = {}
    for called in _calls(side, answer):
        samples = identify(called.arguments())
        for sample, row in zip(samples, twin.call(called).rows, strict=True):
            right.setdefault(sample, set()).add(row)
    return right


def _calls(side: Side, answer: Answer) -> Iterator[Side]:
    yield side
    for arguments in answer.forwarded:
        yield replace(side, args=(), kwargs=arguments)
