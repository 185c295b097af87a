"""Code in modules that are reached by more than an attribute that code names. Runs without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HELPERS = """
import tools
SCALE = 2.0
def f(x):
    return inner(x) * tools.size(x)
def inner(x):
    return x * 3
class Layer:
    def forward(self, x):
        return x + 4
"""

TOOLS = "def size(x):\n    return 5\ndef unused(x):\n    return 6\n"

UNREACHED = "def g(x):\n    return 7\n"

#: How a program may reach the functions of the module ``helpers``.
REACHED_BY = {
    "getattr, a computed name": "import helpers\ndef target(x, name='f'):\n    return getattr(helpers, name)(x)",
    "getattr, a written name": "import helpers\ndef target(x):\n    return getattr(helpers, 'f')(x)",
    "getattr, an import inside": """
        def target(x):
            import helpers as h
            return getattr(h, "f", None)(x)
    """,
    "getattr, in two steps": "import helpers\ndef target(x, n='f'):\n    h = helpers\n    return getattr(h, n)(x)",
    "an argument": """
        import helpers
        def call(ops, x):
            return ops.f(x)
        def target(x):
            return call(helpers, x)
    """,
    "a default": "import helpers\ndef target(x, ops=helpers):\n    return ops.f(x)",
    "a global of another name": "import helpers\nOPS = helpers\ndef target(x):\n    return OPS.f(x)",
    "a list": "import helpers\nOPS = [helpers]\ndef target(x):\n    return OPS[0].f(x)",
    "a dict": "import helpers\nOPS = {'a': helpers}\ndef target(x, key='a'):\n    return OPS[key].f(x)",
    "a list made at each call": "import helpers\ndef target(x):\n    return [o.f(x) for o in (helpers,)]",
    "an attribute of a class": """
        import helpers
        class Net:
            ops = helpers
            def forward(self, x):
                return self.ops.f(x)
        target = Net
    """,
    "an attribute of an object": """
        import helpers
        class Holder:
            def __init__(self):
                self.ops = helpers
        holder = Holder()
        def target(x):
            return holder.ops.f(x)
    """,
    "a closure": """
        def outer():
            import helpers
            def target(x):
                return helpers.f(x)
            return target
        target = outer()
    """,
    "a partial": """
        import functools, helpers
        def call(ops, x):
            return ops.f(x)
        target = functools.partial(call, helpers)
    """,
    "a function that returns it": """
        def ops():
            import helpers
            return helpers
        def target(x):
            return ops().f(x)
    """,
    "a name of an import": """
        def call(ops, x):
            return ops.f(x)
        def target(x):
            import helpers as h
            return call(h, x)
    """,
    "vars": "import helpers\ndef target(x, name='f'):\n    return vars(helpers)[name](x)",
    "__dict__": "import helpers\ndef target(x, name='f'):\n    return helpers.__dict__[name](x)",
    "sys.modules": "import sys, helpers\ndef target(x):\n    return sys.modules['helpers'].f(x)",
    "sys.modules.get": "import sys, helpers\ndef target(x):\n    return sys.modules.get('helpers').f(x)",
    "sys.modules, a computed name": "import sys, helpers\ndef target(x, n='helpers'):\n    return sys.modules[n].f(x)",
    "sys.modules, handed on": "import sys, helpers\ndef target(x):\n    return dict(sys.modules)['helpers'].f(x)",
    "import_module": """
        import importlib
        def target(x):
            return importlib.import_module("helpers").f(x)
    """,
    "import_module, imported by itself": """
        from importlib import import_module
        def target(x):
            module = import_module(name="helpers")
            return module.f(x)
    """,
    "import_module, a name in a global": """
        import importlib, helpers
        NAME = "helpers"
        def target(x):
            return importlib.import_module(NAME).f(x)
    """,
    "import_module, a computed name": """
        import importlib, helpers
        def target(x, name="pers"):
            return importlib.import_module(f"hel{name}").f(x)
    """,
    "import_module, handed on": """
        import importlib, helpers
        def target(x):
            return [module.f(x) for module in map(importlib.import_module, ["helpers"])]
    """,
    "__import__": "def target(x):\n    return __import__('helpers').f(x)",
    "__import__, a computed name": "import helpers\ndef target(x, n='hel'):\n    return __import__(n + 'pers').f(x)",
    "attrgetter": """
        import operator, helpers
        def target(x, name="f"):
            return operator.attrgetter(name)(helpers)(x)
    """,
    "eval": "import helpers\ndef target(x):\n    return eval('helpers.f(x)')",
    "eval, a computed text": "import helpers\ndef target(x, n='f'):\n    return eval(f'helpers.{n}')(x)",
    "eval, handed on": "import helpers\ndef target(x):\n    return [f(x) for f in map(eval, ['helpers.f'])]",
    "eval, compiled": "import helpers\ndef target(x):\n    return eval(compile('helpers.f(x)', 'text', 'eval'))",
    "exec": "import helpers\ndef target(x, d={}):\n    exec('y = helpers.f(x)', globals(), d)\n    return d['y']",
    "another module that has it": """
        import between
        def target(x, name="f"):
            return getattr(between.helpers, name)(x)
    """,
    "the module of the code itself": """
        import between
        def target(x):
            return between.call(x, "helpers")
    """,
}

BETWEEN = """
import sys
import helpers
def call(x, name):
    return getattr(sys.modules[__name__], name).f(x)
"""

#: Ways after which any module may be meant.
ANY_MODULE = {
    "sys.modules, a computed name",
    "sys.modules, handed on",
    "import_module, handed on",
    "__import__, a computed name",
}

REPORT = """
import importlib, sys
sys.path[:0] = [{root!r}, {folder!r}]
from torchcache.keys.code import walk_code
import unreached

def report(target):
    walk = walk_code(target)
    values = [f"{{name.label}} {{name.read()!r}}" for name in walk.names if type(name.read()) in (float, int, str)]
    return " ".join([walk.fingerprint.hex(), *values])

for name in sys.argv[1:]:
    print(report(importlib.import_module(name).target))
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that runs programs, each with its modules, and returns what the key of each is made of."""
    root = tmp_path_factory.mktemp("modules")

    def run(programs, **modules):
        given = {"helpers": HELPERS, "tools": TOOLS, "unreached": UNREACHED, "between": BETWEEN, **modules}
        given |= {f"program_{i}": text for i, text in enumerate(programs)}
        for name, module in given.items():
            (root / f"{name}.py").write_text(textwrap.dedent(module))
        script = root / "start.py"
        script.write_text(REPORT.format(root=str(ROOT), folder=str(root)))
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(script), *(f"program_{i}" for i in range(len(programs)))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert not done.returncode, done.stderr
        return done.stdout.splitlines()

    return run


def differing(before, after):
    return {how for how, one, other in zip(REACHED_BY, before, after, strict=True) if one != other}


BY_WRITTEN_NAMES = {
    "a global of another name", "a closure", "getattr, a written name", "getattr, an import inside",
}  # fmt: skip


@pytest.fixture(scope="module")
def before(start):
    """Return what the keys of the programs are made of."""
    return start(REACHED_BY.values())


def test_without_an_edit_the_key_stays(start, before):
    assert start(REACHED_BY.values()) == before


def test_an_edit_of_code_in_a_module_makes_another_key(start, before):
    after = start(REACHED_BY.values(), helpers=HELPERS.replace("x * 3", "x * 33"))
    assert differing(before, after) == {*REACHED_BY}


def test_an_edit_of_what_that_code_calls_makes_another_key(start, before):
    after = start(REACHED_BY.values(), tools=TOOLS.replace("return 5", "return 55"))
    assert differing(before, after) == {*REACHED_BY}


def test_an_edit_of_a_value_in_a_module_counts_where_any_name_may_be_asked_for(start, before):
    after = start(REACHED_BY.values(), helpers=HELPERS.replace("SCALE = 2.0", "SCALE = 3.0"))
    assert differing(before, after) == {*REACHED_BY} - BY_WRITTEN_NAMES


def test_an_edit_of_a_module_that_is_not_reached_keeps_the_key(start, before):
    after = start(REACHED_BY.values(), unreached=UNREACHED.replace("7", "77"))
    assert differing(before, after) == ANY_MODULE


def test_an_edit_of_a_function_that_is_not_reached_keeps_the_key(start, before):
    after = start(REACHED_BY.values(), tools=TOOLS.replace("6", "66"))
    assert differing(before, after) == ANY_MODULE
