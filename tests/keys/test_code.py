"""The code that can run, as a fingerprint: what counts in it, and what does not. Runs without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from torchcache.keys.code import walk_code

ROOT = Path(__file__).parents[2]

BASE = """
import math
from fractions import Fraction

FACTOR = 2

def inner(x):
    return x + 1

def helper(x):
    return inner(x) * 3

def decorated(function):
    def wrapper(x):
        return function(x) + 1
    return wrapper

@decorated
def target_wrapped(x):
    return x * 2

def target(x, shift=1, *, scale=2.0):
    '''Describe it.'''
    y = helper(x) * scale
    return y.relu() + math.pi + shift

class Base:
    '''Describe it.'''

    width = 3

    def __init__(self):
        super().__init__()
        self.layer = Fraction(3, 3)

    def forward(self, x):
        '''Describe it.'''
        return self.finish(self.layer(x))

    def finish(self, x):
        return helper(x) + 5

    @property
    def size(self):
        return 7

    @staticmethod
    def fixed(x):
        return x * 11

    @classmethod
    def made(cls, x):
        return x * 13

class Mixin:
    def finish(self, x):
        return super().finish(x) * 19

class Target(Base):
    def forward(self, x):
        return super().forward(x) - 1 + sum(i * 17 for i in range(3))
"""


def run(text=BASE, *, name="mine", file="mine.py"):
    """Execute a program and return its names."""
    names = {"__name__": name}
    exec(compile(text, file, "exec"), names)
    return names


def fingerprint(text=BASE, target="Target", **kwargs):
    return walk_code(run(text, **kwargs)[target]).fingerprint


def edit(before, after, text=BASE):
    assert before in text
    return text.replace(before, after)


# -- what does not count ----------


@pytest.mark.parametrize("target", ["Target", "Base", "target"])
@pytest.mark.parametrize(
    "text",
    [
        edit("'''Describe it.'''", "'''Say something else.'''"),
        "\n\n\n# A comment.\n" + BASE,
        edit("return inner(x) * 3", "# A comment.\n    return (\n        inner(x) * 3\n    )"),
        edit("    '''Describe it.'''\n", "    pass\n"),
        BASE + "\nclass Unrelated:\n    pass\n\ndef unrelated(x):\n    return x\n",
        edit("def helper(x):", "def helper(x: float) -> float:"),
    ],
    ids=["docstrings", "line numbers", "layout", "no docstrings", "other code", "annotations"],
)
def test_what_cannot_change_a_result_does_not_count(target, text):
    assert fingerprint(text, target) == fingerprint(target=target)


@pytest.mark.parametrize("target", ["Target", "target"])
def test_the_name_of_the_module_and_of_the_file_do_not_count(target):
    assert fingerprint(target=target, name="__main__", file="/elsewhere/other.py") == fingerprint(target=target)


def test_two_walks_of_one_class_agree():
    names = run()
    assert walk_code(names["Target"]).fingerprint == walk_code(names["Target"]).fingerprint


# -- what counts ----------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("return inner(x) * 3", "return inner(x) * 4"),
        ("return inner(x) * 3", "return inner(x) * 3.0"),
        ("return inner(x) * 3", "return inner(x) * True"),
        ("return inner(x) * 3", "return inner(x) / 3"),
        ("return inner(x) * 3", "return 3 * inner(x)"),
        ("return inner(x) * 3", "return inner(inner(x)) * 3"),
        ("return x + 1", "return x + 2"),
        ("return x + 1", "return x - 1"),
        ("def inner(x):", "def inner(x, y=1):"),
        ("math.pi", "math.e"),
        ("y.relu()", "y.tanh()"),
        ("shift=1,", "shift=2,"),
        ("shift=1,", "shift=1.0,"),
        ("scale=2.0", "scale=3.0"),
        ("def target(x, shift=1", "def target(x, offset=1"),
    ],
)
def test_a_change_of_a_function_or_of_what_it_calls_counts(before, after):
    text = edit(before, after)
    if "offset" in after:
        text = edit("math.pi + shift", "math.pi + offset", text)
    assert fingerprint(text, "target") != fingerprint(target="target")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("- 1 +", "- 2 +"),
        ("i * 17", "i * 18"),
        ("helper(x) + 5", "helper(x) + 6"),
        ("return inner(x) * 3", "return inner(x) * 4"),
        ("self.finish(self.layer(x))", "self.layer(self.finish(x))"),
        ("return 7", "return 8"),
        ("x * 11", "x * 12"),
        ("x * 13", "x * 14"),
        ("super().forward(x)", "super().finish(x)"),
        ("class Target(Base):", "class Target(Mixin, Base):"),
        ("Fraction(3, 3)", "Fraction(3, 4)"),
    ],
)
def test_a_change_of_a_class_its_bases_and_their_methods_counts(before, after):
    assert fingerprint(edit(before, after)) != fingerprint()


def test_a_wrapper_around_the_function_counts():
    base = fingerprint(target="target_wrapped")
    assert fingerprint(edit("return function(x) + 1", "return function(x) + 2"), "target_wrapped") != base
    assert fingerprint(edit("return x * 2", "return x * 3"), "target_wrapped") != base


def test_methods_with_swapped_bodies_differ():
    swapped = edit("x * 11", "x * 0", edit("x * 13", "x * 11")).replace("x * 0", "x * 13")
    assert fingerprint(swapped) != fingerprint()


def test_constants_count_by_type_and_sign():
    def constant(value):
        return fingerprint(f"def target(x):\n    return x, {value}", "target")

    values = ["1", "1.0", "True", "'1'", "b'1'", "0.0", "-0.0", "None", "...", "1j", "(1, 2)", "(1, (2,))", "((1, 2),)"]
    assert len({constant(value) for value in values}) == len(values)


def test_the_names_of_keyword_arguments_of_a_call_count():
    def calling(arguments):
        return fingerprint(f"def target(g, x):\n    return g(x, {arguments})", "target")

    texts = ["a=2, b=3", "b=2, a=3", "b=3, a=2", "min=0.5", "max=0.5"]
    assert len({calling(text) for text in texts}) == len(texts)


def test_sets_of_constants_have_no_order():
    a = fingerprint("def target(x):\n    return x in {'a', 'b', 'c', 'd'}", "target")
    assert a == fingerprint("def target(x):\n    return x in {'d', 'c', 'b', 'a'}", "target")
    assert a != fingerprint("def target(x):\n    return x in {'a', 'b', 'c'}", "target")


NESTED = """
def target(x):
    def f(y):
        def g(z):
            return z + 1
        return g(y)
    return f(x)
"""


def test_generators_lambdas_and_nested_functions_count():
    texts = [
        "def target(x):\n    return [i for i in x]",
        "def target(x):\n    return [i + 1 for i in x]",
        "def target(x):\n    return (lambda y: y)(x)",
        "def target(x):\n    return (lambda y: y + 1)(x)",
        NESTED,
        NESTED.replace("z + 1", "z + 2"),
        "def target(x):\n    try:\n        return x + 1\n    except ValueError:\n        return x",
        "def target(x):\n    try:\n        return x + 1\n    except TypeError:\n        return x",
        "def target(x):\n    return x",
        "def target(*x):\n    return x",
        "def target(**x):\n    return x",
        "def target(x):\n    yield x",
        "async def target(x):\n    return x",
    ]
    assert len({fingerprint(text, "target") for text in texts}) == len(texts)


def test_closures_are_told_apart_by_their_code():
    def make(function):
        def target(x):
            return function(x)

        return walk_code(target).fingerprint

    assert make(lambda x: x + 1) != make(lambda x: x + 2)
    assert make(lambda x: x + 1) == make(lambda x: x + 1)


def test_functions_that_call_each_other_are_walked_to_the_end():
    text = "def target(x):\n    return other(x)\n\ndef other(x):\n    return target(x) if x else 1"
    assert fingerprint(text, "target") != fingerprint(text.replace("else 1", "else 2"), "target")


@pytest.mark.parametrize("name", ["mine", "__main__", "code", "queue", "test", "torch_models", "numpy_like", None])
def test_code_counts_whatever_its_module_is_called(name):
    def named(text):
        names = {} if name is None else {"__name__": name}
        exec(compile(text, "mine.py", "exec"), names)
        return walk_code(names["target"]).fingerprint

    assert named("def target(x):\n    return x * 5") != named("def target(x):\n    return x * 6")


def test_a_module_of_ones_own_is_walked_and_one_of_the_standard_library_is_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    # A .pyc of the same size and second would be taken for the new file's.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def with_helper(body):
        (tmp_path / "own_helpers.py").write_text(body)
        sys.modules.pop("own_helpers", None)
        import importlib

        importlib.invalidate_caches()
        names = run("import own_helpers\nimport json\n\ndef target(x):\n    return own_helpers.twice(x), json.dumps(1)")
        try:
            return walk_code(names["target"]).fingerprint
        finally:
            sys.modules.pop("own_helpers")

    old = with_helper("def twice(x):\n    return x * 2\n\ndef other(x):\n    return 1\n")
    assert with_helper("def twice(x):\n    return x * 22222\n\ndef other(x):\n    return 1\n") != old
    assert with_helper("def twice(x):\n    return x * 2\n\ndef other(x):\n    return 99999\n") == old


# -- in other processes ----------

CHILD = """
import sys
sys.path.insert(0, {root!r})
from torchcache.keys.code import walk_code
names = {{"__name__": "mine"}}
exec(compile(open(sys.argv[1]).read(), "mine.py", "exec"), names)
for target in ("Target", "target", "target_wrapped", "sets"):
    print(walk_code(names[target]).fingerprint.hex())
"""

SETS = """
def sets(x, words=frozenset({"a", "b", "c"}), table={"x": {1, 2}}):
    return x in {"d", "e", "f"}, [y for y in words]
"""


def in_a_child(tmp_path, *flags, **environment):
    (tmp_path / "mine.py").write_text(BASE + SETS)
    code = textwrap.dedent(CHILD).format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, str(tmp_path / "mine.py")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.slow
def test_other_processes_and_other_hash_seeds_give_the_same_fingerprint(tmp_path):
    found = {tuple(in_a_child(tmp_path, PYTHONHASHSEED=str(seed))) for seed in range(3)}
    assert len(found) == 1


@pytest.mark.slow
def test_without_docstrings_the_fingerprint_is_the_same(tmp_path):
    assert in_a_child(tmp_path, "-OO") == in_a_child(tmp_path)
