"""The stress program checks what it says it checks, and fails when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def stress(*words: object) -> tuple[int, list[str]]:
    """Run the program; return its exit status and what it printed."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHCACHE_", "COVERAGE_"))}
    done = subprocess.run(
        [sys.executable, "-m", "stress", *map(str, words)],
        capture_output=True, text=True, timeout=100, cwd=ROOT, env=variables, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("suite", ["crowd", "kill"])
def test_a_suite_passes_and_really_checked_something(suite, tmp_path):
    status, lines = stress("run", "--suite", suite, "--seconds", 3, "--seed", 1, "--dir", tmp_path)
    verdict = json.loads(lines[0])
    assert status == 0, lines
    assert verdict["violations"] == verdict["over_budget_bytes"] == 0
    assert verdict["reads"] > 100
    assert verdict["expected"] > 100
    assert verdict["kills"] >= 5
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


def test_the_suites_are_listed_without_torch():
    status, lines = stress("list")
    assert status == 0
    assert [line.split()[0] for line in lines] == ["crowd", "kill"]
    program = "import sys, stress.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
