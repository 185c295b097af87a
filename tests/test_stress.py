"""The stress program checks what it says it checks, and fails when something is wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from stress.suites import SUITES, forms, keys, state

ROOT = Path(__file__).resolve().parents[1]


def stress(*words: object) -> tuple[int, list[str]]:
    """Run the program; return its exit status and what it printed."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHCACHE_", "COVERAGE_"))}
    done = subprocess.run(
        [sys.executable, "-m", "stress", *map(str, words)],
        capture_output=True, text=True, timeout=250, cwd=ROOT, env=variables, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("suite", "jobs", "least_kills"),
    [("crowd", 2, 5), ("kill", 1, 5), ("fork", 1, 0), ("loader", 2, 0), ("ranks", 1, 1)],
)
def test_a_suite_passes_and_really_checked_something(suite, jobs, least_kills, tmp_path):
    words = ("run", "--suite", suite, "--seconds", 3, "--seed", 1, "--dir", tmp_path, "--jobs", jobs)
    status, lines = stress(*words)
    verdict = json.loads(lines[0])
    assert status == 0, "\n".join(lines)
    assert verdict["violations"] == verdict["over_budget_bytes"] == verdict["hangs"] == 0
    assert verdict["second_run_rows_computed"] == 0
    assert verdict["hits"] == verdict["expected"]
    assert verdict["reads"] > 100
    assert verdict["expected"] > 50
    assert verdict["kills"] >= least_kills
    assert verdict["samples"] > 5
    assert lines[1:] == ["stress: 1 passed, 0 failed"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("suite", "plant", "kind"),
    [
        ("crowd", "wrong-value", "wrong"),
        ("crowd", "lost-record", "lost"),
        ("crowd", "over-budget", "budget"),
        ("kill", "wrong-value", "wrong"),
        ("kill", "lost-record", "lost"),
        ("kill", "over-budget", "budget"),
        ("fork", "wrong-value", "wrong"),
        ("fork", "lost-record", "lost"),
        ("fork", "over-budget", "budget"),
        ("fork", "open-handle", "raised"),
        ("loader", "lost-record", "lost"),
        ("ranks", "wrong-value", "wrong"),
        ("ranks", "lost-record", "lost"),
    ],
)
def test_a_suite_finds_what_was_planted_and_says_how_to_see_it_again(suite, plant, kind, tmp_path):
    words = ("run", "--suite", suite, "--seconds", 3, "--seed", 1, "--dir", tmp_path, "--jobs", 2, "--plant", plant)
    status, lines = stress(*words)
    verdict = json.loads(lines[0])
    assert status == 1
    assert verdict["violations"] > 0
    assert any(line.startswith(f"{kind}: ") for line in lines), lines
    (kept,) = tmp_path.iterdir()
    assert f"kept: {kept}" in lines
    assert f"again: python -m stress run --suite {suite} --seconds 3 --seed 1 --jobs 2 --plant {plant}" in lines
    assert lines[-1] == "stress: 0 passed, 1 failed"


def test_every_kind_of_case_gets_its_turn(tmp_path):
    n = len(keys.PAIRS.kinds)  # each kind comes once before any comes twice
    status, lines = stress("run", "--suite", "keys", "--seconds", 220, "--cases", n, "--seed", 1, "--dir", tmp_path)
    verdict = json.loads(lines[0])
    assert status == 0, "\n".join(lines)
    assert verdict["cases"] == n
    assert min(verdict["kinds"].values()) > 0
    assert {"live", "fresh", "stored", "process", "fork", "inherited", "forkserver", "spawn"} == set(verdict["ways"])
    assert verdict["hits"] == verdict["expected"] > 30
    assert verdict["violations"] == verdict["wrong_results"] == verdict["shared_keys"] == verdict["split_keys"] == 0
    assert lines[1:] == ["stress: 1 passed, 0 failed"]


@pytest.mark.parametrize("pairs", [keys.PAIRS, forms.PAIRS, state.PAIRS], ids=["keys", "forms", "state"])
def test_each_value_gets_a_case_before_any_gets_two(pairs):
    deck = [pairs.counted_as(kind) for kind in pairs.deck(random.Random(1))]
    n = len(set(deck))
    assert n == len(pairs.tally().kinds)
    assert len(set(deck[:n])) == n


@pytest.mark.parametrize(
    ("suite", "plant", "kind", "cases"),
    [
        ("keys", "blind", "shared", ("--only", "dtype")),
        ("keys", "marks-only", "wrong", ("--only", "uncounted", "--cases", 30)),
        ("keys", "old-switches", "shared", ("--only", "backend", "--cases", 20)),
        ("forms", "no-containers", "wrong", ("--cases", 47)),
    ],
)
def test_a_key_that_is_wrong_is_found_and_the_case_can_be_seen_again(suite, plant, kind, cases, tmp_path):
    words = ("--seed", 1, "--dir", tmp_path, "--jobs", 1, "--plant", plant)
    status, lines = stress("run", "--suite", suite, "--seconds", 90, *cases, *words)
    assert status == 1
    assert json.loads(lines[0])["violations"] > 0
    said = next(line for line in lines if line.startswith(f"{kind}: "))
    again = said.partition("again: python -m stress ")[2].split()
    (kept,) = tmp_path.iterdir()
    assert (kept / f"case-{again[again.index('--case') + 1]}.txt").exists()
    status, lines = stress(*again, "--dir", tmp_path)
    assert status == 1
    assert json.loads(lines[0])["cases"] == 1
    assert said in lines


def test_every_kind_of_call_of_any_form_gets_its_turn(tmp_path):
    status, lines = stress("run", "--suite", "forms", "--seconds", 220, "--cases", 60, "--seed", 1, "--dir", tmp_path)
    verdict = json.loads(lines[0])
    assert status == 0, "\n".join(lines)
    assert verdict["cases"] == 60
    assert min(verdict["kinds"].values()) > 0
    assert {"live", "fresh", "stored", "process", "fork", "inherited"} == set(verdict["ways"])
    assert verdict["hits"] == verdict["expected"] > 30
    assert verdict["violations"] == verdict["wrong_results"] == verdict["shared_keys"] == verdict["split_keys"] == 0
    assert lines[1:] == ["stress: 1 passed, 0 failed"]


PLANTED = """
import os, random, sys
from pathlib import Path
from stress.form_kinds import KINDS, deal
from stress.suites.forms import judge
from stress.interpreters import prepare

def is_found(kinds):
    for number in range(10):
        for name in KINDS:
            case = deal(name, random.Random(f"{name} {number}"))
            if case.how in ("live", "fresh", "stored"):
                if {kind for kind, _ in judge(case, Path(sys.argv[1]), None).wrongs} & kinds:
                    return True
    return False

for plant, *kinds in map(str.split, sys.argv[2:]):
    pid = os.fork()
    if not pid:
        prepare(plant)
        os._exit(7 if is_found(set(kinds)) else 8)
    print(plant, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_key_that_is_wrong_for_a_form_of_calls_is_found(tmp_path):
    plants = (
        "no-containers shared wrong", "no-unbatched shared wrong", "keys-alone shared wrong", "padding-counts apart",
        "first-dimension apart", "wrong-value wrong",
    )  # fmt: skip
    assert {plant.split()[0] for plant in plants} == set(SUITES["forms"].plants)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLANTED, tmp_path, *plants], capture_output=True, text=True, cwd=ROOT,
        check=False, timeout=250,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{plant.split()[0]} 7" for plant in plants], done.stderr


def test_rows_in_any_batch_get_their_own_values(tmp_path):
    status, lines = stress("run", "--suite", "rows", "--seconds", 60, "--cases", 3000, "--seed", 1, "--dir", tmp_path)
    verdict = json.loads(lines[0])
    assert status == 0, "\n".join(lines)
    assert set(verdict["rows"].values()) == {3000}
    assert set(verdict["wrong"].values()) == {0}
    assert min(verdict["functions"].values()) > 0
    assert verdict["hits"] == verdict["expected"] > 10_000
    assert min(verdict["store_hits"].values()) > 0


@pytest.mark.parametrize("plant", ["wrong-value", "short-sighted"])
def test_rows_with_values_of_others_are_found(plant, tmp_path):
    words = ("--cases", 3000, "--seed", 1, "--dir", tmp_path, "--plant", plant)
    status, lines = stress("run", "--suite", "rows", "--seconds", 60, *words)
    assert status == 1
    assert sum(json.loads(lines[0])["wrong"].values()) > 0
    assert any(line.startswith("wrong: ") for line in lines)


def test_rows_that_are_checked_by_an_extreme_one_alone_are_found(tmp_path):
    words = ("--cases", 1000, "--seed", 1, "--dir", tmp_path, "--plant", "witness-only")
    status, lines = stress("run", "--suite", "rows", "--seconds", 60, *words)
    assert status == 1
    assert any(line.startswith(("unnoticed: ", "wrong: ")) for line in lines)


def test_the_suites_are_listed_without_torch():
    status, lines = stress("list")
    assert status == 0
    assert [line.split()[0] for line in lines] == [
        "crowd",
        "kill",
        "fork",
        "loader",
        "ranks",
        "keys",
        "forms",
        "state",
        "rows",
    ]
    assert all(len(line.split()) > 5 for line in lines)
    program = "import sys, stress.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
