"""Values of every kind count whole, wherever a program holds them: another one never shares, an equal one hits.

The cases are those of ``python -m stress run --suite state``: one for each kind of value, with places and changes
dealt round.
"""

from __future__ import annotations

import contextlib
import random
import sys
import types

import pytest
import torch

from stress.interpreters import Interpreters
from stress.state_kinds import CHANGES, EVERY_KIND, KINDS, deal, judge
from stress.state_programs import PLACES
from stress.state_values import MISSING, VALUES


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


@pytest.fixture
def program(monkeypatch):
    """Return the names of a program, to which its text can be given."""
    module = types.ModuleType("program")
    monkeypatch.setitem(sys.modules, "program", module)
    return vars(module)


def dealt(names):
    """Yield each kind of value with the place and the change that are its turn."""
    for i, name in enumerate(names):
        places, changes = KINDS[f"value: {name}"].places, KINDS[f"value: {name}"].changes
        yield name, places[i % len(places)], changes[i // len(PLACES) % len(changes)]


@pytest.mark.parametrize(("name", "place", "change"), list(dealt(VALUES)))
def test_a_value_counts_whole(name, place, change, tmp_path, interpreters):
    kind = f"{name} | {place} | {change}"
    case = deal(EVERY_KIND[kind], random.Random(kind))
    outcome = judge(case, tmp_path, interpreters)
    assert outcome.wrongs == [], case.shown()


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.filterwarnings("ignore:the matrix subclass is not the recommended way")
def test_code_reads_of_a_value_what_the_table_says(name, program):
    value = VALUES[name]
    exec(value.text, program)
    make, read, change = program["make"], program["read"], program["change"]
    one, other = value.numbers[0], value.numbers[-1]
    right = read(make(one))
    assert read(make(one)) == right != read(make(other))
    made = make(one)
    assert (read(made) == read(made)) is not value.is_consumed
    if value.change:
        change(made, other)
        assert read(made) == read(make(other))


def test_nothing_that_was_promised_is_left_out():
    assert MISSING == ()
    assert len(VALUES) >= 80
    assert len(PLACES) >= 8
    assert set(CHANGES) == {"another", "in place", "again", "elsewhere"}
