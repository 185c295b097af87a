"""The same program has the same fingerprint in every process, however it was started. Runs without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from torchcache.keys.code import walk_code

ROOT = Path(__file__).parents[2]

PROGRAM = '''
"""A program."""
import contextlib
import dataclasses
import functools
import multiprocessing
import sys

sys.path.insert(0, {root!r})
from torchcache.keys.code import walk_code

WORDS = {{"d", "e", "f"}}

@dataclasses.dataclass
class Result:
    """Describe it."""
    x: int = 0
    y: list = dataclasses.field(default_factory=list)

@functools.singledispatch
def dispatched(x):
    """Describe it."""
    return x

@dispatched.register
def _(x: int):
    return x + 1

class Helper:
    """Describe it."""
    def __call__(self, x):
        """Describe it."""
        try:
            return x in {{"a", "b", "c"}}
        except ValueError:
            return None

helper = Helper()
FUNCTIONS = {{lambda x: x + 1, lambda x: x + 2, dispatched, helper}}

class Target:
    """Describe it."""

    def forward(self, x, words=frozenset({{"a", "b", "c"}})):
        """Describe it."""
        class Local:
            """Describe it."""
            a, b, c = 1, 2, 3
            def method(self):
                """Describe it."""
                self.p, self.q, self.r = 1, 2, 3
                for i in range(3):
                    with contextlib.suppress(ValueError):
                        yield i
        return Local, Result(1), dispatched(x), helper(x), WORDS, FUNCTIONS, [y for y in words if y], __name__

def report(queue):
    queue.put(walk_code(Target).fingerprint.hex())

if __name__ == "__main__":
    print(walk_code(Target).fingerprint.hex())
    for method in sys.argv[1:]:
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=report, args=(queue,))
        process.start()
        print(queue.get())
        process.join()
'''


def start(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    return done.stdout.split()


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return the path of the program."""
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM.format(root=str(ROOT)))
    return path


@pytest.fixture(scope="module")
def base(script):
    """Return the fingerprint in the program's own process."""
    (fingerprint,) = start(str(script), PYTHONHASHSEED="0")
    return fingerprint


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_agree_with_their_parent(script, base, method):
    assert start("-W", "ignore", str(script), method) == [base, base]


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_the_hash_seed_does_not_count(script, base, seed):
    assert start(str(script), PYTHONHASHSEED=seed) == [base]


def test_without_docstrings_it_is_the_same(script, base):
    assert start("-OO", str(script)) == [base]


def test_another_folder_and_other_lines_do_not_count(script, base, tmp_path):
    other = tmp_path / "elsewhere" / "other.py"
    other.parent.mkdir()
    other.write_text("# A comment.\n\n" + script.read_text().replace("Describe it.", "Say it\nelse."))
    assert start(str(other)) == [base]


@pytest.mark.parametrize("how", ["module", "imported", "-c", "stdin", "exec", "profiler"])
def test_however_the_program_is_started(script, base, how, tmp_path):
    printing = "from torchcache.keys.code import walk_code; print(walk_code({}).fingerprint.hex())"
    text = script.read_text()
    environment = {"PYTHONPATH": os.pathsep.join([str(script.parent), str(ROOT)])}
    if how == "module":
        assert start("-m", "program", **environment) == [base]
    elif how == "imported":
        assert start("-c", "import program; " + printing.format("program.Target"), **environment) == [base]
    elif how == "-c":
        assert start("-c", text) == [base]
    elif how == "stdin":
        done = subprocess.run([sys.executable, "-"], input=text, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split() == [base]
    elif how == "exec":
        code = f"names = {{}}; exec(open({str(script)!r}).read(), names); " + printing.format("names['Target']")
        assert start("-c", code, **environment) == [base]
    else:
        assert start("-m", "cProfile", "-o", str(tmp_path / "profile"), str(script)) == [base]


def test_a_file_that_is_edited_while_the_program_runs_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "edited.py"
    path.write_text("def target(x):\n    return x * 2\n")
    import importlib

    edited = importlib.import_module("edited")
    try:
        walk = walk_code(edited.target)
        path.write_text("def target(x):\n    return x * 333\n")
        assert walk_code(edited.target).fingerprint == walk.fingerprint
        assert not walk.has_changed()
        importlib.reload(edited)
        assert walk_code(edited.target).fingerprint != walk.fingerprint
    finally:
        sys.modules.pop("edited")


def test_cells_of_a_notebook_are_walked_as_they_are_now():
    notebook = types.ModuleType("__main__")

    def cell(number, text):
        exec(compile(text, f"<ipython-input-{number}>", "exec", dont_inherit=True), vars(notebook))

    cell(1, "def helper(x):\n    return x * 2")
    cell(2, "def target(x):\n    return helper(x)")
    walk = walk_code(notebook.target)
    cell(3, "N = 1")
    assert not walk.has_changed()
    cell(4, "def helper(x):\n    return x * 2")
    assert walk.has_changed()
    again = walk_code(notebook.target)
    assert again.fingerprint == walk.fingerprint
    cell(5, "def helper(x):\n    return x * 3")
    assert again.has_changed()
    assert walk_code(notebook.target).fingerprint != walk.fingerprint
