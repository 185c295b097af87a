"""Two calls that differ in one way share no key; two that are the same by the rules share it, and hit.

The cases are those of ``python -m stress run --suite keys``, a few of each kind, chosen by hypothesis.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stress.interpreters import Interpreters
from stress.judge import judge
from stress.kinds import KINDS, deal
from stress.literals import STATEFUL
from stress.programs import Side, identify

HERE = [name for name, kind in KINDS.items() if set(kind.where) <= {"fresh", "stored"}]
ELSEWHERE = [name for name in KINDS if name not in HERE]


@pytest.fixture(autouse=True)
def one_thread():
    """Let results not depend on how work is shared out, as the suite does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def interpreters():
    with contextlib.closing(Interpreters()) as started:
        yield started


def check(name, rng, directory, interpreters=None):
    case = deal(name, rng)
    outcome = judge(case, directory, interpreters)
    assert outcome.wrongs == [], "\n\n".join([case.how, case.first.shown(), *case.live, case.second.shown()])
    assert outcome.hits == outcome.expected
    return outcome


@pytest.mark.parametrize("name", HERE)
@given(rng=st.randoms(use_true_random=False))
@settings(
    max_examples=3, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),  # a smaller case takes minutes to find, and the one that failed is shown
)  # fmt: skip
def test_the_rules_hold(name, rng, tmp_path_factory):
    outcome = check(name, rng, tmp_path_factory.getbasetemp())
    assert KINDS[name].differs or outcome.expected


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_rules_hold_between_processes(name, tmp_path, interpreters):
    for seed in range(2):
        check(name, random.Random(f"{name} {seed}"), tmp_path, interpreters)


def test_the_kinds_name_everything_that_was_promised():
    promised = [
        "any bit", "dtype", "shape", "split", "exchanged", "name", "type", "weights", "construction", "state", "code",
        "globals", "closure", "mode", "strides", "memory format", "position or keyword", "part of the batch",
        "another order", "another process", "forked", "forkserver", "spawned",
    ]  # fmt: skip
    assert [word for word in promised if not any(word in name for name in KINDS)] == []


def test_a_case_is_the_same_for_the_same_seed():
    for name in KINDS:
        one, other = (deal(name, random.Random(7)) for _ in range(2))
        assert one.first.shown() == other.first.shown()
        assert one.second.shown() == other.second.shown()
        assert (one.how, one.live) == (other.how, other.live)


def test_samples_are_told_apart_without_the_library():
    x = torch.arange(6.0).view(2, 3)
    (a, b), (c,) = identify({"x": x, "k": 1}), identify({"k": 1, "x": x[:1]})
    assert a == c != b
    different = [
        {"x": x, "k": True}, {"x": x, "k": 1.0}, {"x": x, "j": 1}, {"y": x, "k": 1}, {"x": x.double(), "k": 1},
        {"x": x.view(torch.int32), "k": 1}, {"x": x.view(2, 3, 1), "k": 1}, {"x": -x, "k": 1}, {"x": x, "k": (1,)},
    ]  # fmt: skip
    for arguments in different:
        assert a not in identify(arguments)
    assert identify({"x": x, "k": 0.0}) != identify({"x": x, "k": -0.0})
    assert identify({"x": x.t().contiguous().t(), "k": 1}) == (a, b)


def test_a_slot_may_have_slots_and_a_decorator_is_none():
    side = Side(door="function", blocks={"a": "@wrap\ny = @op.a@\n"}, slots={"op.a": "@const.b@ + 1", "const.b": "2"},
                make="")  # fmt: skip
    assert side.text == "@wrap\ny = 2 + 1\n"


def test_no_family_has_a_member_twice():
    assert all(len(set(family)) == len(family) for family in STATEFUL)
