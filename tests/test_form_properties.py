"""Calls of every form: two that differ in one way share no key; two that are the same by the rules share it, and hit.

The cases are those of ``python -m stress run --suite forms``, a few of each kind, chosen by hypothesis.
"""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stress.answers import ID_FORMS, Form
from stress.form_kinds import FORMS, KINDS, deal, right_rows, write
from stress.interpreters import Interpreters
from stress.suites.forms import judge
from stress.trees import KINDS as CONTAINERS
from stress.trees import Frame, Node, Rows, Sequences, Values, Whole, has_keys

HERE = [name for name, kind in KINDS.items() if set(kind.where) <= {"live", "fresh", "stored"}]
ELSEWHERE = [name for name in KINDS if name not in HERE]


@pytest.fixture(scope="module")
def interpreters():
    with contextlib.closing(Interpreters()) as started:
        yield started


def check(name, rng, directory, interpreters=None):
    case = deal(name, rng)
    outcome = judge(case, directory, interpreters)
    assert outcome.wrongs == [], f"{case.how}\n{case.shown()}"
    assert outcome.hits == outcome.expected


@pytest.mark.parametrize("name", HERE)
@given(rng=st.randoms(use_true_random=False))
@settings(
    max_examples=3, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),  # a smaller case takes minutes to find, and the one that failed is shown
)  # fmt: skip
def test_the_rules_hold(name, rng, tmp_path_factory):
    check(name, rng, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_rules_hold_between_processes(name, tmp_path, interpreters):
    check(name, random.Random(f"{name} 0"), tmp_path, interpreters)


def test_the_kinds_name_everything_that_was_promised():
    promised = [
        "any bit", "dtype", "shape", "array or tensor", "text: joined or split", "plain: another type",
        "container: its kind", "name of a key", "order of keys", "places exchanged", "along which dimension",
        "batched or unbatched", "one position more", "a hole", "mask at an end", "keys: another one",
        "keys: another type", "state", "strides", "memory format", "position or keyword", "another order", "repeated",
        "new rows", "padded otherwise", "another side", "keys in another form", "from the disk", "another process",
        "forked",
    ]  # fmt: skip
    assert [word for word in promised if not any(word in name for name in KINDS)] == []


def test_a_case_is_the_same_for_the_same_seed():
    for name in KINDS:
        one, other = (deal(name, random.Random(7)) for _ in range(2))
        assert (one.how, one.shown()) == (other.how, other.shown())


def test_all_forms_are_written():
    forms = [write(random.Random(seed), form) for form in FORMS for seed in range(100)]
    leaves = [leaf for form in forms for _, leaf in form.leaves()]
    assert {leaf.kind for leaf in leaves if isinstance(leaf, Node)} == set(CONTAINERS)
    assert {Rows, Sequences, Values, Whole, np.ndarray, int, float, str, bool} <= set(map(type, leaves))
    assert {form.batch_dim for form in forms} == {0, 1, None}
    assert {form.ids_form for form in forms if form.ids} == set(ID_FORMS)
    assert any(form.unbatched for form in forms)


def answers(**args):
    return right_rows(Form(args=args))


def test_what_is_right_tells_samples_apart_without_the_library():
    x = torch.arange(6.0).view(2, 3)
    a, b = answers(a=Rows(x), c=1)
    assert answers(a=Rows(x, "turned"), c=1) == (a, b)
    assert answers(a=Rows(x.flip(0)), c=1) == (b, a)
    different = [
        {"a": Rows(x), "c": True}, {"a": Rows(x), "d": 1}, {"a": Rows(x.double()), "c": 1}, {"a": Rows(-x), "c": 1},
        {"a": Rows(x.view(2, 3, 1)), "c": 1}, {"a": Node("tuple", (Rows(x),)), "c": 1},
        {"a": Values(("a", "b")), "c": 1},
        *({"a": Node(kind, (Rows(x), 1), ("a", "b") if has_keys(kind) else ()), "c": 1} for kind in CONTAINERS),
        {"a": Node("dict", (1, Rows(x)), ("b", "a")), "c": 1}, {"a": Values((("a",), ("b",))), "c": 1},
    ]  # fmt: skip
    seen = {a, b}
    for args in different:
        rows = answers(**args)
        assert not seen.intersection(rows)
        seen.update(rows)


def test_what_is_right_does_not_depend_on_padding():
    def padded(frame, *rows):
        ids = Sequences(tuple(map(torch.tensor, rows)))
        mask = Sequences(tuple(torch.ones(len(row)) for row in rows), is_mask=True)
        return Form(args={"a": ids, "b": mask}, padded=(("a", "b"),), frame=frame)

    narrow, wide = padded(Frame(3, (0, 1)), [1, 2, 3], [4, 5]), padded(Frame(9, (6, 0), 7), [1, 2, 3], [4, 5])
    assert right_rows(narrow) == right_rows(wide)
    (ids, mask), _ = padded(Frame(4, (0, 2), 0), [1, 2, 3], [4, 5]).call()[1].values(), None
    assert ids.tolist() == [[1, 2, 3, 0], [0, 0, 4, 5]]
    assert mask.tolist() == [[1, 1, 1, 0], [0, 0, 1, 1]]
    assert right_rows(padded(Frame(3, (0,)), [1, 2, 0])) != right_rows(padded(Frame(3, (0,)), [1, 2]))


def test_containers_are_made_anew_each_time():
    form = Form(args={"a": Node("OrderedDict", (Rows(torch.zeros(2, 3)), Node("list", (1, None))), ("x", "y"))})
    one, other = (form.call()[1]["a"] for _ in range(2))
    assert type(one) is OrderedDict
    assert one["y"] == other["y"] == [1, None]
    assert one["y"] is not other["y"]
    assert one["x"].data_ptr() != other["x"].data_ptr()
