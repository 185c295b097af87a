"""Calls of every form made twice: containers, texts, padding, whole calls and keys of one's own share no key wrongly.

Invariant: two calls that differ in any one way of ``form_kinds.KINDS`` share no key for the samples concerned, and
the second one gets its own right result, by type and by value; two that are the same by the rules share every key,
and the second one computes nothing. What is right, the same function says without a cache, one sample at a time.

The seed and the number of a case make the case; most run in this process, some in others.
"""

from __future__ import annotations

from pathlib import Path

from stress.answers import Answering
from stress.form_kinds import KINDS, Case, deal
from stress.interpreters import HASH_SEEDS, Interpreters, Task
from stress.pairs import Outcome, Pairs, compare_keys, in_a_directory
from stress.programs import Answer


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
    answering = Answering(case.first, directory)
    first = answering.call(case.first)
    if case.how == "live":
        return first, answering.call(case.second)
    if directory is not None:
        answering.close()
    if case.how in ("fresh", "stored"):
        answering = Answering(case.second, directory)
        second = answering.call(case.second)
        if directory is not None:
            answering.close()
        return first, second
    assert interpreters is not None
    hash_seed = HASH_SEEDS[case.first.n % 2] if case.how == "process" else HASH_SEEDS[0]
    (second,) = interpreters.ask(Task(case.how, directory, case.second), hash_seed)
    return first, second


def _compare(case: Case, first: Answer, second: Answer) -> Outcome:
    outcome = Outcome()
    outcome.wrongs += [("trouble", f"the {which} call: {a.trouble}") for which, a in
                       (("first", first), ("second", second)) if a.trouble]  # fmt: skip
    for which, answer, right in zip(("first", "second"), (first, second), case.right, strict=True):
        wrong = [i for i in range(len(right)) if answer.rows[i] != right[i]]
        outcome.wrongs += [("wrong", f"sample {i} of the {which} call") for i in wrong]
    if first.trouble or second.trouble:  # a call that goes around the cache has no keys
        return outcome
    before, after = case.identities()
    place = {sample: i for i, sample in enumerate(before)}
    compare_keys(outcome, place, after, first.keys, second.keys)
    # A sample that was computed alone is served to no other batch before rows are known to be their own.
    is_unchecked = case.first.do_check and len(set(before)) == 1 and len(after) > 1
    if case.how != "fresh" and not is_unchecked:  # two caches in memory share nothing
        _count_hits(outcome, before, after, second)
    return outcome


def _count_hits(outcome: Outcome, before: list[object], after: list[object], second: Answer) -> None:
    """Compare what was computed with what had to be: by the cache's own count, and by what really ran."""
    new = set(after) - set(before)
    computed = max(0, second.misses - len(new))
    outcome.expected = sum(sample not in new for sample in after)
    outcome.hits = max(0, outcome.expected - computed)
    if computed:
        outcome.wrongs.append(("missed", f"{computed} samples were computed that are cached"))
    if second.misses < len(new):
        outcome.wrongs.append(("shared", f"{second.misses} samples were computed of {len(new)} that are new"))
    if not new and second.forwarded:
        outcome.wrongs.append(("missed", "the function ran although all samples are cached"))


PAIRS = Pairs(KINDS, deal, judge)
TALLY, run = PAIRS.tally, PAIRS.run
