"""Whether walking the code again could give another result. Runs without torch."""

from __future__ import annotations

import functools
import gc
import sys
import textwrap
import timeit
import types
import weakref

import numpy as np
import pytest

from torchcache.keys import changes
from torchcache.keys.code import walk_code

PROGRAM = """
import functools
import math

N = 3
ARRAY = [1, 2]
TABLE = {"a": 1}
EMPTY = None

def inner(x):
    return x

def helper(x, shift=1, *, scale=2.0, words=("a",), table={"b": 1}):
    return inner(x) * shift

@functools.cache
def cached(x):
    return x

TABLE_OF_CODE = {"helper": helper, "n": 1}
FUNCTIONS = [helper, cached]
partial = functools.partial(helper, 1, scale=3.0)

class Helper:
    size = 3
    def __init__(self, n):
        self.n = n
    def __call__(self, x):
        return x

object_ = Helper(2)
objects = (object_,)

class Other:
    pass

class Base:
    width = 3
    table = {"a": 1}
    def finish(self, x):
        return helper(x)

def make():
    n, f, empty = 1, inner, None
    def closed(x):
        return f(x), n, empty
    def set_n(value):
        nonlocal n
        n = value
    def set_f(value):
        nonlocal f
        f = value
    def remove():
        nonlocal empty
        del empty
    closed.set_n, closed.set_f, closed.remove = set_n, set_f, remove
    closed.note = 1
    return closed

closed = make()

class Target(Base):
    def forward(self, x):
        return (
            N, ARRAY, TABLE, EMPTY, self.finish(x), cached(x), TABLE_OF_CODE, FUNCTIONS, partial(), object_(x),
            objects, closed(x), math.pi, len(x), missing, closed.note, Other,
        )
"""


@pytest.fixture
def program():
    """Return the names of the program, which is a module as far as code can tell."""
    names = {"__name__": "mine"}
    exec(compile(PROGRAM, "mine.py", "exec", dont_inherit=True), names)
    return types.SimpleNamespace(names=names, **{k: v for k, v in names.items() if not k.startswith("__")})


def execute(program, text):
    exec(compile(textwrap.dedent(text), "cell.py", "exec", dont_inherit=True), program.names)


# -- no change of code ----------


@pytest.mark.parametrize(
    "text",
    [
        "pass",
        "N = 4",
        "N = 'text'",
        "N = None",
        "import numpy; N = numpy.ones(3)",
        "ARRAY = (1, 2, 3)",
        "ARRAY.append(3)",
        "ARRAY.append([1, {2: 3}])",
        "TABLE['b'] = 2",
        "TABLE = {}",
        "EMPTY = 1",
        "Base.width = 4",
        "Base.table = [1]",
        "Base.table['b'] = 2",
        "TABLE_OF_CODE['n'] = 2",
        "object_.n = 3",
        "closed.set_n(5)",
        "closed.note = 2",
        "unrelated = lambda: 1",
        "cached(3)",
        "helper.__kwdefaults__['table']['c'] = 3",
        "import copyreg; copyreg._slotnames(Base)",
        "Target().forward",
        "Target().anything = lambda: 1",
    ],
)
def test_other_data_is_no_change_of_code(program, text):
    walk = walk_code(program.Target)
    assert not walk.has_changed()
    execute(program, text)
    assert not walk.has_changed()
    assert not walk.has_changed()  # also once it has looked closer
    assert walk_code(program.Target).fingerprint == walk.fingerprint


# -- changes of code ----------


@pytest.mark.parametrize(
    "text",
    [
        "def helper(x):\n    return 1",
        "def inner(x):\n    return x + 1",
        "inner.__code__ = (lambda x: x + 1).__code__",
        "inner.__defaults__ = (1,)",
        "inner.__kwdefaults__ = {'x': 1}",
        "helper.__defaults__ = (2,)",
        "helper.__defaults__ = None",
        "helper.__kwdefaults__ = {'scale': 3.0}",
        "helper.__kwdefaults__['scale'] = 3.0",
        "helper.__kwdefaults__['table'] = inner",
        "helper.__kwdefaults__['table']['f'] = inner",
        "helper.__kwdefaults__['other'] = 3.0",
        "helper.__kwdefaults__ = None",
        "cached = functools.cache(lambda x: x + 1)",
        "cached.__wrapped__ = inner",
        "partial = functools.partial(helper, 1)",
        "TABLE_OF_CODE['helper'] = inner",
        "TABLE_OF_CODE['n'] = inner",
        "TABLE_OF_CODE['new'] = inner",
        "del TABLE_OF_CODE['helper']",
        "TABLE_OF_CODE['other'] = TABLE_OF_CODE.pop('helper')",
        "TABLE_OF_CODE = {}",
        "TABLE_OF_CODE = None",
        "FUNCTIONS.reverse()",
        "FUNCTIONS.insert(0, 1)",
        "FUNCTIONS[1] = inner",
        "N = inner",
        "N = math",
        "N = int",
        "N = Helper(1)",
        "N = [inner]",
        "import operator; N = operator.methodcaller('x')",
        "ARRAY.append(inner)",
        "ARRAY = [[inner]]",
        "TABLE['b'] = Helper(1)",
        "TABLE['b'] = [math.sin]",
        "EMPTY = 1; EMPTY = inner",
        "object_ = Helper(2)",
        "object_.n = inner",
        "object_ = None",
        "objects = (Helper(3),)",
        "Helper.__call__ = inner",
        "Helper.other = inner",
        "Helper.plain = 3",
        "Base.finish = inner",
        "Base.width = inner",
        "Base.table['f'] = inner",
        "Base.table = [Helper(1)]",
        "Base.new = property(inner)",
        "Base.__call__ = inner",
        "del Base.finish",
        "Target.forward = lambda self, x: x",
        "Target.__bases__ = (Other,)",
        "class Other:\n    pass",
        "class Base:\n    pass",
        "closed.set_f(lambda x: x)",
        "closed.set_f(3)",
        "closed.set_n(inner)",
        "closed.remove()",
        "closed.note = inner",
        "del closed.note",
        "closed = make()",
        "import cmath as math",
        "missing = 1",
        "missing = inner",
        "len = lambda x: 1",
        "len = 3",
        "del N",
        "del inner",
    ],
)
def test_other_code_is_a_change(program, text):
    if "Base:" in text:
        text = text.replace("class Base", "class Replaced") + "\nTarget.__bases__ = (Replaced,)"
    walk = walk_code(program.Target)
    assert not walk.has_changed()
    execute(program, text)
    assert walk.has_changed()
    assert walk.has_changed()
    assert not walk_code(program.Target).has_changed()


def test_data_and_then_code_is_a_change(program):
    walk = walk_code(program.Target)
    for text in ("N = 'text'", "N = [1]", "N = [2]", "N = {1: 2}"):
        execute(program, text)
        assert not walk.has_changed()
    execute(program, "N[3] = inner")
    assert walk.has_changed()


@pytest.mark.parametrize(
    "text", ["inner.__code__ = (lambda x: x + 1).__code__", "helper.__kwdefaults__ = {'scale': 3.0}"]
)
def test_a_change_before_the_first_question_and_without_a_view_is_noticed(program, text, monkeypatch):
    assert changes._OFFSET is not None  # on every CPython so far
    monkeypatch.setattr(changes, "_OFFSET", None)
    walk = walk_code(program.Target)
    execute(program, text)
    assert walk.has_changed()


def test_a_change_before_the_first_question_is_noticed(program):
    walk = walk_code(program.Target)
    program.inner.__code__ = (lambda x: x + 1).__code__
    assert walk.has_changed()


def test_an_empty_cell_that_is_filled_is_a_change():
    def make():
        def target(x):
            return later(x)

        def fill():
            nonlocal later
            later = len

        if fill is None:
            later = None
        return target, fill

    target, fill = make()
    walk = walk_code(target)
    assert not walk.has_changed()
    fill()
    assert walk.has_changed()


def test_a_method_registered_later_is_a_change():
    names = {"__name__": "mine"}
    exec("import functools\n@functools.singledispatch\ndef f(x):\n    return x\ndef target(x):\n    return f(x)", names)
    walk = walk_code(names["target"])
    assert not walk.has_changed()
    names["f"].register(int, lambda x: x + 1)
    assert walk.has_changed()
    assert walk_code(names["target"]).fingerprint != walk.fingerprint


def test_changes_in_imported_modules_are_noticed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "changing.py").write_text("def helper(x):\n    return x\n")
    texts = (
        "import changing\ndef target(x):\n    return changing.helper(x), changing.later",
        "def target(x):\n    import changing\n    return changing.helper(x), changing.later",
        "def target(x):\n    from changing import helper, later\n    return helper(x), later",
    )
    try:
        for text in texts:
            for change in (
                lambda module: setattr(module, "helper", lambda x: x),
                lambda module: setattr(module, "later", 1),
                lambda module: delattr(module, "helper"),
            ):
                sys.modules.pop("changing", None)
                names = {"__name__": "mine"}
                exec(text, names)
                walk = walk_code(names["target"])
                assert not walk.has_changed()
                change(sys.modules["changing"])
                assert walk.has_changed(), text
        walk = walk_code(names["target"])
        del sys.modules["changing"]
        assert walk.has_changed()
    finally:
        sys.modules.pop("changing", None)


def test_a_module_that_could_not_be_imported_is_noticed(monkeypatch):
    names = {"__name__": "mine"}
    exec("def target(x):\n    import surely_absent\n    return surely_absent.f(x)", names)
    walk = walk_code(names["target"])
    assert not walk.has_changed()
    monkeypatch.setitem(sys.modules, "surely_absent", types.ModuleType("surely_absent"))
    assert walk.has_changed()


def test_changes_of_a_part_are_noticed():
    def make():
        def helper(x):
            return x

        n = 1

        def held(x, y=1):
            return helper(x), n

        def put(value):
            nonlocal helper
            helper = value

        return held, put

    for change in (
        lambda held, put: put(lambda x: x + 1),
        lambda held, put: setattr(held, "__defaults__", (2,)),
        lambda held, put: setattr(held, "__kwdefaults__", {"y": 2}),
        lambda held, put: setattr(held, "__code__", held.__code__.replace(co_name="other")),
    ):
        held, put = make()
        walk = walk_code(lambda x: x, [held])
        assert not walk.has_changed()
        change(held, put)
        assert walk.has_changed()


# -- safety ----------


class Hostile:
    """Takes part in no comparison."""

    def __eq__(self, other):
        raise AssertionError("compared")

    def __bool__(self):
        raise AssertionError("asked")

    __hash__ = None


def test_no_comparison_of_the_users_is_called(program):
    program.names["N"] = Hostile()
    program.names["EMPTY"] = np.ones(3)
    walk = walk_code(program.Target)
    assert not walk.has_changed()
    program.names["inner"] = Hostile()
    assert walk._watch._code_moved()  # and has not raised
    program.names["inner"] = program.inner
    program.names["EMPTY"] = np.zeros(4)
    assert not walk.has_changed()
    program.Base.finish = Hostile()
    assert walk._watch._code_moved()


def test_what_cannot_be_asked_counts_as_changed(program, monkeypatch):
    walk = walk_code(program.Target)
    assert not walk.has_changed()
    monkeypatch.setattr(walk._watch, "_code_moved", lambda: 1 / 0)
    assert walk.has_changed()


def test_attributes_that_come_to_an_object_are_a_change_once_they_hold_code(program):
    walk = walk_code(program.Target)
    program.object_.later = 1
    assert not walk.has_changed()
    program.object_.later = [program.inner]
    assert walk.has_changed()


def test_data_that_was_replaced_is_not_kept_alive(program):
    class Large(np.ndarray):
        pass

    Large.__module__ = "numpy"
    program.names["N"] = np.ones(3).view(Large)
    program.names["object_"] = big = program.Helper(np.ones(3))
    walk = walk_code(program.Target)
    assert not walk.has_changed()
    array = weakref.ref(program.names["N"])
    thing = weakref.ref(big)
    program.names["N"] = program.names["object_"] = program.names["objects"] = program.object_ = program.objects = None
    del big
    gc.collect()
    assert array() is None
    assert thing() is None
    assert walk.has_changed()


def test_it_is_asked_quickly():
    text = (
        "".join(f"def f{i}(x, n={i}):\n    return f{i + 1}(x) + len(x) + N{i}\nN{i} = {i}\n" for i in range(50))
        + "def f50(x):\n    return x\n"
    )
    for i in range(10):
        text += (
            f"class C{i}:\n    size = 1\n    def a(self):\n        return f{i}(1)\n    def b(self):\n        return 1\n"
        )
    text += "def target(x):\n    return f0(x), " + ", ".join(f"C{i}" for i in range(10))
    names = {"__name__": "mine"}
    exec(text, names)
    walk = walk_code(names["target"])
    assert not walk.has_changed()
    seconds = min(timeit.repeat(walk.has_changed, number=100, repeat=20)) / 100
    assert seconds < 200e-6  # 20 us alone on a machine of 2020; never a matter of milliseconds


def test_code_made_by_functools_is_not_taken_for_data(program):
    program.names["N"] = 1
    walk = walk_code(program.Target)
    program.names["N"] = functools.partial(program.inner, 1)
    assert walk.has_changed()
