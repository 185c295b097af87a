"""What two type checkers say of the names that we give users, and of calls that users write, ``tests/typing``.

Expected errors are marked there, and a mark without an error is an error: so is a check that finds nothing any more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Mypy takes the package's own settings, which are strict, and shares the cache of the package's own check.
CHECKERS = {
    "mypy": ["mypy", "tests/typing"],
    "pyright": ["basedpyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("command", CHECKERS.values(), ids=CHECKERS.keys())
def test_calls_that_users_write_have_the_types_and_the_errors_that_they_should(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=250, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_name_of_the_package_has_a_type_that_all_checkers_agree_on():
    # It asks the first Python on the path where torch is, whatever --pythonpath says.
    first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--verifytypes", "torchcache", "--ignoreexternal"],
        env={**os.environ, "PATH": first},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=ROOT,
    )
    errors = [line.strip() for line in done.stdout.splitlines() if "error: " in line]
    assert errors == []
    assert "Type completeness score: 100%" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
