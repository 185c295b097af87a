"""What code reaches in other ways than by names that it says counts: an edit of it is never answered from before."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest
import torch

from torchcache import cache_of, flush_all, torchcache
from torchcache.keys.origins import is_own_module

X = torch.arange(12.0).view(3, 4) + 1

FUNCTION = "def g(x): return x * {}"
LAZY = """
import sys, types, importlib
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        return getattr(importlib.import_module("{inner}"), name)
sys.modules[__name__] = Lazy(__name__)
"""
OF_ITS_OWN_KIND = """
import sys, types
class Kind(types.ModuleType):
    @property
    def k(self): return {}
sys.modules[__name__].__class__ = Kind
"""
NO_MODULE = """
import sys
class Kind:
    __slots__ = ()
    @property
    def k(self): return {}
sys.modules[__name__] = Kind()
"""
ANSWERS = """
def __getattr__(name):
    if name == "k": return {}
    raise AttributeError(name)
"""

#: The text of the helper before and after an edit, and that of the program, where HELPER stands for its name.
EDITS = {
    "a module of an own kind": (OF_ITS_OWN_KIND, "import HELPER\ndef f(x): return x * HELPER.k"),
    "a module of an own kind, imported late": (
        OF_ITS_OWN_KIND,
        "def f(x):\n    import HELPER\n    return x * HELPER.k",
    ),
    "from a module of an own kind": (OF_ITS_OWN_KIND, "def f(x):\n    from HELPER import k\n    return x * k"),
    "from an object in place of a module": (NO_MODULE, "def f(x):\n    from HELPER import k\n    return x * k"),
    "an object in place of a module": (NO_MODULE, "def f(x):\n    import HELPER\n    return x * HELPER.k"),
    "from a module that answers": (ANSWERS, "def f(x):\n    from HELPER import k\n    return x * k"),
    "globals of a function": (
        FUNCTION + "\ndef other(): pass",
        "import HELPER\ndef f(x): return HELPER.other.__globals__['g'](x)",
    ),
    "globals of an unknown function": (
        FUNCTION + "\ndef other(): pass",
        "import HELPER\nLIST = [HELPER.other]\ndef f(x): return LIST[0].__globals__['g'](x)",
    ),
    "globals of a frame": (
        FUNCTION,
        "import sys\nfrom HELPER import g\ndef f(x): return sys._getframe().f_globals['g'](x)",
    ),
    "pydoc.locate": (FUNCTION, "import pydoc\ndef f(x): return pydoc.locate('HELPER.g')(x)"),
    "pkgutil.resolve_name": (FUNCTION, "import pkgutil\ndef f(x): return pkgutil.resolve_name('HELPER.g')(x)"),
    "a default of a context variable": (
        FUNCTION,
        "import contextvars as c\nfrom HELPER import g\nV = c.ContextVar('v', default=g)\ndef f(x): return V.get()(x)",
    ),
    "the name of a function": (
        "def make():\n    def i{0}(): pass\n    return i{0}\ng = make()",
        "from HELPER import g\ndef f(x): return x * int(g.__name__[1:])",
    ),
    "the qualified name of a function": (
        "def make():\n    def i{0}(): pass\n    return i{0}\ng = make()",
        "from HELPER import g\nT = {{'i2': 2, 'i3': 3}}\ndef f(x): return x * T[g.__qualname__.split('.')[-1]]",
    ),
    "annotations of a class": (
        "class C:\n    k: 'K{}'",
        "from HELPER import C\ndef f(x): return x * int(C.__annotations__['k'][1:])",
    ),
}


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Return what writes the modules of a program anew, and runs it with what was cached before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in list(sys.modules):  # where any module may be meant, those of the tests are not
        if is_own_module(name):
            monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)

    def run(texts):
        for name in [name for name in sys.modules if name.startswith("module_of_a_test_")]:
            del sys.modules[name]
        for path in tmp_path.glob("module_of_a_test_*.py"):
            path.unlink()
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        f = importlib.import_module("module_of_a_test_main").f
        cached = torchcache(persistent=True, persistent_cache_dir=tmp_path / "cache")(f)
        results = [cached(X + i) for i in range(3)]
        flush_all()
        stats = cache_of(cached).stats()
        return [float((result / (X + i)).mean()) for i, result in enumerate(results)], stats

    yield run
    for name in set(sys.modules) - before:
        if name.startswith("module_of_a_test_"):
            del sys.modules[name]


def run_edits(edit, first, second, main):
    main = main.replace("HELPER", "module_of_a_test_helper")
    versions = []
    for helpers in (first, first, second):
        texts = {f"module_of_a_test_{name}": text for name, text in helpers.items()}
        versions.append(edit({**texts, "module_of_a_test_main": main}))
    (_, _), (_, same), (after, edited) = versions
    assert same.hits, "unchanged, it hits"
    assert after == pytest.approx([3.0] * 3), edited


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_of_what_is_reached_in_another_way_is_another_key(kind, edit):
    helper, main = EDITS[kind]
    run_edits(
        edit, {"helper": helper.format(2)}, {"helper": helper.format(3)}, main.replace("{{", "{").replace("}}", "}")
    )


def test_an_edit_of_what_a_lazy_module_loads_is_another_key(edit):
    helper = LAZY.replace("{inner}", "module_of_a_test_inner")
    first, second = ({"helper": helper, "inner": FUNCTION.format(factor)} for factor in (2, 3))
    run_edits(edit, first, second, "import HELPER\ndef f(x): return HELPER.g(x)")


@pytest.mark.parametrize("asked", ["hasattr(HELPER, 'K')", "getattr(HELPER, 'K', None)"])
def test_a_name_that_appears_in_a_module_that_is_asked_for_it_is_another_key(asked, edit):
    run_edits(edit, {"helper": ""}, {"helper": "K = 1"}, f"import HELPER\ndef f(x): return x * (3 if {asked} else 2)")


def test_a_module_that_appears_where_code_looks_for_it_is_another_key(edit):
    main = "import importlib.util\ndef f(x): return x * (3 if importlib.util.find_spec('HELPER') else 2)"
    run_edits(edit, {}, {"helper": ""}, main)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("w.weight.requires_grad", lambda w: w.requires_grad_(requires_grad=True)),
        ("any(p.requires_grad for p in w.parameters())", lambda w: w.bias.requires_grad_(requires_grad=True)),
        ("w.weight.grad is not None", lambda w: setattr(w.weight, "grad", torch.ones(4, 4))),
    ],
)
def test_what_code_reads_of_weights_beside_their_values_counts(text, change):
    names = {"w": torch.nn.Linear(4, 4).requires_grad_(requires_grad=False)}
    exec(f"def f(x): return x * (3 if {text} else 2)", names)
    f = torchcache()(names["f"])
    assert torch.equal(f(X), X * 2)
    assert torch.equal(f(X), X * 2)
    assert cache_of(f).stats().hits == len(X)
    change(names["w"])
    assert torch.equal(f(X), X * 3)


def test_a_gradient_that_code_reads_counts_by_value():
    names = {"w": torch.nn.Linear(4, 4).requires_grad_(requires_grad=False)}
    names["w"].weight.grad = torch.full((4, 4), 2.0)
    exec("def f(x): return x * w.weight.grad[0]", names)
    f = torchcache()(names["f"])
    assert torch.equal(f(X), X * 2)
    names["w"].weight.grad.mul_(2)
    assert torch.equal(f(X), X * 4)
    names["w"].weight.grad = torch.full((4, 4), 5.0)
    assert torch.equal(f(X), X * 5)


def test_a_gradient_that_no_code_reads_does_not_count():
    names = {"w": torch.nn.Linear(4, 4).requires_grad_(requires_grad=False)}
    exec("def f(x): return w(x)", names)
    f = torchcache()(names["f"])
    f(X)
    names["w"].weight.grad = torch.ones(4, 4)
    f(X)
    assert cache_of(f).stats().hits == len(X)


def test_a_method_that_dispatches_by_type_is_kept_from_its_first_call_on():
    text = """
    import functools

    class Own:
        @functools.singledispatchmethod
        def go(self, x):
            raise TypeError

        @go.register(torch.Tensor)
        def _(self, x):
            return x * 2

    own = Own()

    def f(x):
        return own.go(x)
    """
    names = {"torch": torch}
    exec(textwrap.dedent(text), names)
    f = torchcache()(names["f"])
    f(X)
    f(X)
    assert cache_of(f).stats().hits == len(X)
    vars(names["Own"])["go"].register(torch.Tensor, lambda self, x: x * 3)
    assert torch.equal(f(X), X * 3)
