"""The programs of the page "Share a cache between workers and ranks" do what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """Save a program of the page under its name and run the command that the page gives for it."""

    def run_program(name):
        (program,) = re.findall(rf"```python\n# {re.escape(name)}\n(.*?)```", PAGE, re.DOTALL)
        (command,) = re.findall(rf"```console\n\$ (.* {re.escape(name)})\n```", PAGE)
        (tmp_path / name).write_text(program)
        words = command.replace("torchrun", "python -m torch.distributed.run").split()
        words[0] = sys.executable
        result = subprocess.run(
            words,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.splitlines()

    return run_program


def test_workers_decode_each_image_once(run):
    first = run("workers.py")
    assert "\n".join(first).count("decoding") == 32  # workers may print into one line
    epochs = [line for line in first if line.startswith("epoch")]
    assert len(epochs) == 3
    assert len({line.split()[2] for line in epochs}) == 1
    second = run("workers.py")
    assert second == epochs


def test_ranks_compute_nothing_from_the_second_epoch_on(run):
    said = re.findall(r"epoch \d rank \d computed \d+", "\n".join(run("ranks.py")))  # ranks may print into one line
    assert sorted(said) == [
        f"epoch {epoch} rank {rank} computed {128 if epoch == 0 else 0}" for epoch in range(3) for rank in range(2)
    ]
