"""How far the code walk goes: through wrappers of libraries, objects, modules and imports. Runs without torch."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap

import pytest

from torchcache.keys.code import walk_code
from torchcache.keys.origins import is_own_class
from torchcache.keys.places import MISSING


def run(text, *, name="mine", file="mine.py"):
    """Execute a program and return its names."""
    names = {} if name is None else {"__name__": name}
    exec(compile(textwrap.dedent(text), file, "exec", dont_inherit=True), names)
    return names


def fingerprint(text, target="target", **kwargs):
    return walk_code(run(text, **kwargs)[target]).fingerprint


def names_of(walk):
    return {name.label: name.read() for name in walk.names}


# -- wrappers of libraries ----------

WRAPPED = {
    "lru_cache": """
        from functools import lru_cache
        @lru_cache(maxsize=3)
        def helper(x):
            return x * 2
        def target(x):
            return helper(x)
    """,
    "cache": """
        import functools
        @functools.cache
        def helper(x):
            return x * 2
        def target(x):
            return helper(x)
    """,
    "singledispatch": """
        from functools import singledispatch
        @singledispatch
        def helper(x):
            return x
        @helper.register
        def _(x: int):
            return x * 2
        def target(x):
            return helper(x)
    """,
    "contextmanager": """
        from contextlib import contextmanager
        @contextmanager
        def helper(x):
            yield x * 2
        def target(x):
            with helper(x) as y:
                return y
    """,
    "np.vectorize": """
        import numpy as np
        helper = np.vectorize(lambda x: x * 2)
        def target(x):
            return helper(x)
    """,
    "partial": """
        from functools import partial
        def times(y, x):
            return x * 2
        helper = partial(times, 1)
        def target(x):
            return helper(x)
    """,
    "partial of a partial of a cache": """
        from functools import partial, cache
        helper = partial(partial(cache(lambda y, x: x * 2)), 1)
        def target(x):
            return helper(x)
    """,
    "a wrapper in a table": """
        from functools import cache
        TABLE = {"helper": [cache(lambda x: x * 2)]}
        def target(x):
            return TABLE["helper"][0](x)
    """,
    "a bound method": """
        class Helper:
            def twice(self, x):
                return x * 2
        helper = Helper().twice
        def target(x):
            return helper(x)
    """,
    "a method of operator": """
        import operator
        class Helper:
            def twice(self, x):
                return x * 2
        helper = Helper()
        def target(x):
            return operator.methodcaller("twice", x)(helper)
    """,
    "a reduce": """
        from functools import reduce, partial
        helper = partial(reduce, lambda x, y: x * 2)
        def target(x):
            return helper(x)
    """,
    "a default": """
        def target(x, helper=lambda x: x * 2):
            return helper(x)
    """,
    "a keyword default in a list": """
        def target(x, *, helpers=[lambda x: x * 2]):
            return helpers[0](x)
    """,
    "an attribute of a function": """
        def target(x):
            return target.helper(x)
        target.helper = lambda x: x * 2
    """,
    "a default factory": """
        from collections import defaultdict
        TABLE = defaultdict(lambda: 1 * 2)
        def target(x):
            return TABLE[x]
    """,
}  # fmt: skip


@pytest.mark.parametrize("text", WRAPPED.values(), ids=WRAPPED.keys())
def test_own_code_inside_counts(text):
    assert fingerprint(text) == fingerprint(text)
    assert fingerprint(text.replace("* 2", "* 3")) != fingerprint(text)


METHODS = """
    import functools

    class Descriptor:
        def __get__(self, owner, cls):
            return owner.x * 4

    class Meta(type):
        def made(cls):
            return 5

    class Target(metaclass=Meta):
        attribute = Descriptor()

        @functools.cached_property
        def cached(self):
            return 11

        @functools.lru_cache
        def remembered(self):
            return 12

        @functools.singledispatchmethod
        def dispatched(self, x):
            return 13

        @dispatched.register
        def _(self, x: int):
            return 14

        def many(self, n):
            return n * 15

        few = functools.partialmethod(many, 16)
        other = functools.partialmethod(lambda self: 20)

        @classmethod
        @functools.cache
        def of_the_class(cls):
            return 17

        @staticmethod
        @functools.cache
        def of_nobody():
            return 18

        @property
        @functools.cache
        def read(self):
            return 19

        class Inner:
            def forward(self):
                return 21
"""


@pytest.mark.parametrize("number", [4, 5, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21])
def test_own_code_in_a_class_counts_behind_any_decorator(number):
    changed = METHODS.replace(f"* {number}\n", f"* {number}0\n").replace(f"return {number}\n", f"return {number}0\n")
    changed = changed.replace(f"lambda self: {number})", f"lambda self: {number}0)")
    assert changed != METHODS
    assert fingerprint(changed, "Target") != fingerprint(METHODS, "Target")


def test_arguments_of_a_partial_and_of_a_partial_method_are_names():
    names = names_of(walk_code(run(METHODS)["Target"]))
    assert 16 in names.values()
    partial = "import functools\nhelper = functools.cache(functools.partial(lambda a, b, x: x, 5, b=6))\n"
    names = names_of(walk_code(run(partial + "def target(x):\n    return helper(x)")["target"]))
    assert {5, 6} <= {value for value in names.values() if isinstance(value, int)}


def test_a_static_method_is_not_a_class_method():
    text = "class Target:\n    @staticmethod\n    def f(x=1):\n        return x"
    assert fingerprint(text, "Target") != fingerprint(text.replace("static", "class"), "Target")


def test_what_a_wrapper_of_a_library_remembers_does_not_count():
    names = run("""
        import functools
        import numpy as np
        @functools.singledispatch
        def dispatched(x):
            return x
        @dispatched.register
        def of_int(x: int):
            return 1
        @functools.cache
        def cached(x):
            return x
        vectorized = np.vectorize(lambda x: x + 1)
        def target(x):
            return dispatched(x) + cached(x) + vectorized(x)
    """)
    walk = walk_code(names["target"])
    names["target"](3)
    names["target"](2.5)
    assert walk_code(names["target"]).fingerprint == walk.fingerprint
    assert not walk.has_changed()


def test_what_a_vectorized_function_was_given_counts():
    text = "import numpy as np\nhelper = np.vectorize(lambda x: x, otypes='f')\ndef target(x):\n    return helper(x)"
    assert fingerprint(text.replace("'f'", "'d'")) != fingerprint(text)


def test_plain_values_in_the_closure_of_a_librarys_wrapper_are_names(tmp_path, monkeypatch):
    library = tmp_path / "site-packages"
    library.mkdir()
    (library / "wrapping.py").write_text(
        "def times(n, on):\n    def call(x):\n        return on(x) * n\n    return call\n"
    )
    monkeypatch.syspath_prepend(library)
    names = run("import wrapping\nhelper = wrapping.times(7, lambda x: x + 1)\ndef target(x):\n    return helper(x)")
    try:
        found = [name for name in walk_code(names["target"]).names if name.key == "n"]
    finally:
        sys.modules.pop("wrapping")
    assert [(name.read(), name.is_own) for name in found] == [(7, False)]


# -- objects of the user's own classes ----------

HELPER = """
    class Helper:
        def __init__(self, n):
            self.n = n
        def __call__(self, x):
            return x * 2

    class Slotted:
        __slots__ = ("helper",)

    slotted = Slotted()
    slotted.helper = Helper(1)
    helper = Helper(1)
    helpers = [{"a": Helper(1)}]

    class Holder:
        helper = Helper(1)
        def __call__(self, x):
            return self.helper(x)

    class Keeper:
        pass

    keeper = Keeper()
    keeper.helper = Helper(1)

    def outer():
        helper = Helper(1)
        def target(x):
            return helper(x)
        return target
"""


@pytest.mark.parametrize(
    "target",
    [
        "def target(x):\n    return helper(x)",
        "def target(x):\n    return helpers[0]['a'](x)",
        "def target(x, helper=Helper(1)):\n    return helper(x)",
        "def target(x, *, helpers=(Helper(1),)):\n    return helpers[0](x)",
        "target = Holder",
        "target = outer()",
        "def target(x):\n    return keeper.helper(x)",
        "def target(x):\n    return slotted.helper(x)",
        "import functools\ntarget_ = functools.partial(helper, 1)\ndef target(x):\n    return target_(x)",
    ],
)
def test_the_class_of_an_object_is_walked(target):
    text = textwrap.dedent(HELPER) + target
    assert fingerprint(text) == fingerprint(text)
    assert fingerprint(text.replace("x * 2", "x * 3")) != fingerprint(text)


def test_classes_tell_the_own_ones_that_were_visited():
    names = run("""
        import collections, dataclasses, enum
        from typing import NamedTuple
        @dataclasses.dataclass
        class Result:
            x: int = 1
        class Pair(NamedTuple):
            a: int
            b: int
        Plain = collections.namedtuple("Plain", "a b")
        class Kind(enum.Enum):
            A = 1
        class Unrelated:
            pass
        def target(x):
            return Result(1), Pair(1, 2), Plain(3, 4), Kind.A, collections.OrderedDict(), int
    """)
    assert set(walk_code(names["target"]).classes) == {names[n] for n in ("Result", "Pair", "Plain", "Kind")}


# -- modules ----------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that writes the package ``kept`` afresh; nothing of it is loaded before or after."""

    def write(**modules):
        forget()
        for name, text in {"__init__": "", **modules}.items():
            path = tmp_path / "kept" / f"{name.replace('__of__', '/')}.py"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "kept"]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(tmp_path)
    # A .pyc of the same size and second would be taken for the new file's.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    forget()


HELPERS = "def helper(x):\n    return x * 2\n\ndef other(x):\n    return 1\n"


@pytest.mark.parametrize(
    "text",
    [
        "import kept.helpers\ndef target(x):\n    return kept.helpers.helper(x)",
        "import kept.helpers\ndef target(x):\n    short = kept.helpers\n    return short.helper(x)",
        "def target(x):\n    import kept.helpers\n    return kept.helpers.helper(x)",
        "def target(x):\n    import kept.helpers as h\n    return h.helper(x)",
        "def target(x):\n    from kept import helpers\n    return helpers.helper(x)",
        "def target(x):\n    from kept.helpers import helper as h\n    return h(x)",
        "class target:\n    def forward(self, x):\n        from kept.helpers import helper\n        return helper(x)",
        "def target(x):\n    from kept.outer import through\n    return through(x)",
        "from kept.helpers import helper\ndef target(x):\n    return [helper(y) for y in x]",
    ],
)
def test_modules_of_ones_own_are_followed(text, package):
    outer = "def through(x):\n    from .helpers import helper\n    return helper(x)\n"
    package(helpers=HELPERS, outer=outer)
    before = fingerprint(text)
    package(helpers=HELPERS, outer=outer)
    assert fingerprint(text) == before
    package(helpers=HELPERS.replace("return 1", "return 9"), outer=outer)
    assert fingerprint(text) == before
    package(helpers=HELPERS.replace("x * 2", "x * 3"), outer=outer)
    assert fingerprint(text) != before


def test_an_import_that_fails_is_missing(package):
    package(broken="raise SystemError('no')")
    text = "def target(x):\n    from kept.{} import helper\n    return helper(x)"
    for name in ("broken", "absent"):
        assert walk_code(run(text.format(name))["target"]).fingerprint
    assert walk_code(run("def target(x):\n    import no_such_module_at_all")["target"]).fingerprint
    assert walk_code(run("def target(x):\n    from .. import nothing")["target"]).fingerprint


def test_a_module_of_a_library_is_not_imported():
    sys.modules.pop("wave", None)
    walk_code(run("def target(x):\n    import wave\n    return wave.open(x)")["target"])
    assert "wave" not in sys.modules


def test_which_function_of_a_library_is_meant_counts():
    texts = [
        f"from {module} import {name} as f\ndef target(x):\n    return f(x)"
        for module, name in [("math", "sin"), ("cmath", "sin"), ("shlex", "quote"), ("urllib.parse", "quote")]
    ]
    texts += [f"import {name} as f\ndef target(x):\n    return f.sin(x)" for name in ("math", "cmath")]
    assert len({fingerprint(text) for text in texts}) == len(texts)


def test_what_a_user_put_into_a_module_of_a_library_counts(monkeypatch):
    names = run("import json\ndef target(x):\n    return json.dumps(x)")
    before = walk_code(names["target"])
    monkeypatch.setattr(json, "dumps", lambda x: x * 2)
    assert before.has_changed()
    assert walk_code(names["target"]).fingerprint != before.fingerprint


# -- whose class it is ----------


@pytest.mark.parametrize("name", [None, "json", "mine", "__main__", "builtins", "numpy"])
def test_a_class_is_own_whatever_its_module_is_called(name):
    text = "class Target:\n    def forward(self, x):\n        return x * 2"
    assert is_own_class(run(text, name=name)["Target"])
    assert is_own_class(run(text, name=name, file="<string>")["Target"])
    changed = text.replace("* 2", "* 3")
    assert fingerprint(changed, "Target", name=name) != fingerprint(text, "Target", name=name)


def test_a_class_made_by_type_is_own():
    text = "target = type('Made', (), {'forward': lambda self, x: x * 2, '__module__': 'json'})"
    assert is_own_class(run(text)["target"])
    assert fingerprint(text.replace("* 2", "* 3")) != fingerprint(text)


def test_a_class_is_own_if_a_wrapped_method_is():
    text = "import contextlib\nclass Target:\n    @contextlib.contextmanager\n    def f(self):\n        yield 1"
    assert is_own_class(run(text, name="json")["Target"])


def test_where_a_wrapped_function_was_made_does_not_count():
    text = """
        import contextlib
        def make():
            @contextlib.contextmanager
            def helper(x):
                yield x
            return helper
        helper = make()
        def target(x):
            return helper(x)
    """
    assert fingerprint(text) == fingerprint(text.replace("make()", "other()"))


def test_classes_of_libraries_are_not_own():
    import collections
    import dataclasses
    import decimal
    import fractions

    import numpy as np

    for cls in (int, json.JSONDecoder, dataclasses.Field, fractions.Fraction, decimal.Decimal, np.ndarray, np.vectorize,
                collections.OrderedDict, importlib.machinery.ModuleSpec, np.polynomial.Polynomial):  # fmt: skip
        assert not is_own_class(cls), cls
    import dis
    import urllib.parse

    assert not is_own_class(dis._Instruction)  # a namedtuple
    assert not is_own_class(urllib.parse.SplitResult)


def test_a_method_that_a_user_put_into_a_librarys_class_counts(monkeypatch):
    names = run("import json\ndef target(x):\n    return json.JSONDecoder().decode(x)")
    before = walk_code(names["target"]).fingerprint
    monkeypatch.setattr(json.JSONDecoder, "decode", lambda self, x: x * 2)
    assert is_own_class(json.JSONDecoder)
    assert walk_code(names["target"]).fingerprint != before


# -- defaults ----------


def test_defaults_that_are_no_constants_are_names():
    import numpy as np

    names = {"array": np.ones(2), "__name__": "mine"}
    exec(compile("def target(x, array=array, n=1, *, table={'a': 1}):\n    return x", "mine.py", "exec"), names)
    found = {name.label: name for name in walk_code(names["target"]).names}
    assert set(found) == {"target(array=)", "target(table=)"}
    assert found["target(table=)"].read() == {"a": 1}
    assert found["target(array=)"].read() is names["array"]
    names["target"].__defaults__ = (np.zeros(3), 1)
    assert found["target(array=)"].read().shape == (3,)
    names["target"].__kwdefaults__ = None
    assert found["target(table=)"].read() is MISSING


def test_a_default_that_a_function_keeps_notes_in_is_a_change_of_its_own():
    writes = walk_code(run("""
        memo = {}
        def target(x, memo={}, seen=[]):
            memo[x] = 1
            seen.append(x)
            def inner(memo):
                memo[x] = 2
            return x
    """)["target"]).writes  # fmt: skip
    assert writes.changed_names == {"memo=", "seen="}


def test_a_default_is_told_from_a_parameter_of_an_inner_function_and_shared_with_a_closure():
    text = "def target(x, kept={}):\n    def inner(SIGNATURE):\n        kept[x] = 2\n    return inner"
    assert walk_code(run(text.replace("SIGNATURE", "kept"))["target"]).writes.changed_names == set()
    assert walk_code(run(text.replace("SIGNATURE", ""))["target"]).writes.changed_names == {"kept="}


def test_where_a_module_lies_is_no_name():
    walk = walk_code(
        run("def target(x):\n    class Local:\n        pass\n    return Local, __name__, __file__")["target"]
    )
    assert not walk.names


def test_attributes_of_a_function_are_names_unless_code_keeps_notes_in_them():
    text = "def helper(x):\n    return x\nhelper.scale = 3\n\ndef target(x):\n    return helper.scale"
    assert names_of(walk_code(run(text)["target"])) == {"helper.scale": 3}
    counting = text.replace("return helper", "helper.calls += 1\n    return helper") + "\nhelper.calls = 0\n"
    assert names_of(walk_code(run(counting)["target"])) == {"helper.scale": 3}
    using = counting.replace("helper.scale\n", "helper.scale * helper.calls\n")
    assert names_of(walk_code(run(using)["target"])) == {"helper.scale": 3, "helper.calls": 0}


# -- writes ----------


def test_writes_behind_wrappers_are_noted():
    walk = walk_code(
        run("""
        import functools, contextlib

        def decorate(function):
            def wrapper(*args):
                return function(*args)
            return wrapper

        class Target:
            @decorate
            @functools.lru_cache
            def forward(self, x):
                self.seen = x
                with self.context():
                    return self.step(x)

            @contextlib.contextmanager
            def context(self):
                self.entered = 1
                yield

            @decorate
            def step(self, x):
                self.steps.append(x)

            def elsewhere(self):
                self.untouched = 1
    """)["Target"]
    )
    assert walk.writes.assigned_attributes == {"seen", "entered"}
    assert walk.writes.changed_attributes == {"steps"}


def test_writes_of_a_function_reached_by_another_name_are_noted():
    walk = walk_code(
        run("""
        import functools
        def step(x):
            global COUNT
            COUNT = x
        other = functools.cache(step)
        class Target:
            def forward(self, x):
                return other(x)
    """)["Target"]
    )
    assert walk.writes.assigned_names == {"COUNT"}


# -- what is told apart ----------


def test_code_that_looks_alike_is_told_apart():
    two = run("a, b = lambda x: x + 1, lambda x: x + 2")
    assert walk_code(two["a"]).fingerprint != walk_code(two["b"]).fingerprint
    swapped = "def a(x):\n    return {}\ndef b(x):\n    return {}\ndef target(x):\n    return a(x), b(x)"
    assert fingerprint(swapped.format(1, 2)) != fingerprint(swapped.format(2, 1))
    order = "def a(x):\n    return 1\ndef b(x):\n    return 2\nTABLE = [{}, {}]\ndef target(x):\n    return TABLE, a, b"
    assert fingerprint(order.format("a", "b")) != fingerprint(order.format("b", "a"))


def test_closures_over_other_values_are_told_apart_by_their_names():
    def make(k):
        return lambda x: x * k

    two, three = walk_code(make(2)), walk_code(make(3))
    assert two.fingerprint == three.fingerprint
    assert list(names_of(two).values()) == [2]
    assert list(names_of(three).values()) == [3]


def test_a_function_that_replaces_itself_at_its_name_is_walked_on():
    text = "def target(x):\n    return 1\nold = target\ndef target(x):\n    return old(x) + 5"
    assert fingerprint(text.replace("return 1", "return 2")) != fingerprint(text)


def test_parts_say_what_differs():
    text = "class Net:\n    def forward(self, x):\n        return helper(x)\n\ndef helper(x):\n    return inner(x)\n"
    text += "def inner(x):\n    return 1"
    one, two = (dict(walk_code(run(t)["Net"]).parts) for t in (text, text.replace("return 1", "return 2")))
    assert list(one)[1:4] == ["class Net", "function Net.forward", "function helper"]
    assert {label for label in one if one[label] != two[label]} == {"function inner"}
    assert all(len(digest) == 16 for digest in one.values())


def test_labels_of_parts_occur_once():
    text = "def make(n):\n    def f(x):\n        return n\n    return f\nTABLE = [make(1), make(2), make]\n"
    labels = [label for label, _ in walk_code(run(text + "def target(x):\n    return TABLE")["target"]).parts]
    assert len(set(labels)) == len(labels)


# -- callables that a module's state holds ----------


def test_parts_may_be_functions():
    text = "def helper(x):\n    return {}\nclass Net:\n    def forward(self, x):\n        return self.f(x)\n"
    text += "def held(x):\n    return helper(x)"
    one, two = run(text.format(1)), run(text.format(2))
    assert walk_code(one["Net"]).fingerprint == walk_code(two["Net"]).fingerprint
    assert walk_code(one["Net"], [one["held"]]).fingerprint != walk_code(two["Net"], [two["held"]]).fingerprint


def test_a_walk_does_not_keep_alive_what_a_part_holds():
    import functools
    import gc
    import weakref

    class Net:
        def __init__(self):
            self.f = lambda x, me=self: (self, me, x)
            self.g = functools.partial(self.forward, self)
            self.table = [self.f]

        def forward(self, x):
            return self.f(x)

    net = Net()
    walk = walk_code(Net, [net.f, net.g, net.forward, net.table])
    assert not walk.has_changed()
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None
    assert walk.has_changed()
