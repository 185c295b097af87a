"""Whatever may change a result between two calls is noticed at the next one, wherever it lies."""

from __future__ import annotations

import collections
import functools
import logging
import os
import queue
import random
import sys
import textwrap
import threading
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchcache import ConfigError, cache_of, disabled, torchcache
from torchcache.keys.fast import dict_versions, marks

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def program(text, **names):
    """Execute a program that decorates ``target``; return its names."""
    names = {"__name__": "program", "torch": torch, "nn": nn, "np": np, "functools": functools, **names}
    names |= {"collections": collections, "types": types}
    names["torchcache"] = torchcache
    exec(compile(text, "program.py", "exec", dont_inherit=True), names)
    return names


def check(target, change, x=X):
    """Call before and after a change; every result is that of the undecorated target."""
    with disabled():
        plain = target(x)
    assert torch.equal(target(x), target(x))
    assert cache_of(target).stats().hits == len(x), "unchanged, it hits"
    change()
    with disabled():
        changed = target(x)
    assert changed.shape != plain.shape or not torch.equal(changed, plain), "the change must show"
    for _ in range(2):
        result = target(x)
        assert result.shape == changed.shape
        assert torch.allclose(result, changed, equal_nan=True)


FUNCTIONS = """
import contextvars, dataclasses, threading
SCALE = 2
context = contextvars.ContextVar("context", default=1)
event = threading.Event()

@dataclasses.dataclass
class Large:
    k: int = 2
    labels: dict = dataclasses.field(default_factory=lambda: {i: str(i) for i in range(100)})

@dataclasses.dataclass
class Derived:
    k: int = 2
    def __post_init__(self):
        self.double = 2 * self.k

class Deep:
    def __init__(self, n):
        self.k, self.inner = 1, Deep(n - 1) if n else None

large_config, derived, deep = Large(), Derived(), Deep(6)
numbers = {"w": np.ones(8, np.float32)}

class Helper:
    def __init__(self, k):
        self.k = k
    def __call__(self, x):
        return x * self.k

class Slotted:
    __slots__ = ("a", "b")
    def __init__(self):
        self.a, self.b = 1, 2

class Described:
    def __get__(self, instance, owner=None):
        return SCALE * 3

class Settings:
    scale = 1

class Net(nn.Module):
    shown = Described()
    settings = Settings
    def __init__(self, act):
        super().__init__()
        self.act = act
    def forward(self, x):
        return self.act(x) * self.shown * self.settings.scale

def act(x):
    return x * SCALE

def make(k):
    def inner(x):
        return x * k
    return inner

@torch.no_grad()
def without_grad(x):
    return x * SCALE

helper = Helper(2)
slotted = Slotted()
table = {"f": make(2), "w": torch.ones(8)}
listed = [Helper(2), {"z": [torch.ones(8)]}]
many = {i: i for i in range(10_000)}
objects = [Helper(i) for i in range(100)]
array = np.ones(100_000)
large = np.ones(1_000_000)
queue = collections.deque([1, 2])
space = types.SimpleNamespace(a=1, inner=types.SimpleNamespace(b=2))
partial = functools.partial(make, 2)
"""

#: What the decorated function does, and what changes it.
CASES = {
    "an attribute of an object": ("helper(x)", "helper.k = 3"),
    "a method of an object's class": ("helper(x)", "Helper.__call__ = lambda self, x: x * 5"),
    "a slot": ("x * slotted.a", "slotted.a = 5"),
    "a function in a table": ("table['f'](x)", "table['f'] = make(3)"),
    "a tensor in a table": ("x * table['w']", "table['w'].mul_(3)"),
    "another tensor in a table": ("x * table['w']", "table['w'] = torch.full((8,), 7.0)"),
    "an object in a list": ("listed[0](x)", "listed[0].k = 11"),
    "a tensor in a list in a dict in a list": ("x * listed[1]['z'][0]", "listed[1]['z'][0].add_(1)"),
    "an item of a large dict": ("x * many[5]", "many[5] = 77"),
    "an object in a long list": ("objects[50](x)", "objects[50].k = 7"),
    "an element of an array": ("x * float(array[500])", "array[500] = 77"),
    "all of a large array": ("x * float(large[500_001])", "large += 1"),
    "a deque": ("x * queue[0]", "queue[0] = 5"),
    "a namespace in a namespace": ("x * space.inner.b", "space.inner.b = 5"),
    "a partial": ("partial()(x)", "partial = functools.partial(make, 4)"),
    "a constant behind a wrapper of torch's": ("without_grad(x)", "SCALE = 7"),
    "a class that is found among the subclasses": (
        "[found() for found in Large.__subclasses__()][-1].run(x)",
        "class Later(Large):\n    def run(self, x):\n        return x * 3",
        "class Sooner(Large):\n    def run(self, x):\n        return x * 2",
    ),
    "a method of a subclass of a subclass": (
        "Helper.__subclasses__()[0].__subclasses__()[0].run(x)", "Second.run = staticmethod(lambda x: x * 3)",
        "class First(Helper):\n    pass\nclass Second(First):\n    run = staticmethod(lambda x: x * 2)",
    ),
    "a global that comes later": ("later(x) if 'later' in globals() else x", "later = lambda x: x * 9"),
    "a builtin that is shadowed": ("abs(x)", "abs = lambda x: x * 13"),
    "a constant that a function in an attribute reads": ("net(x)", "SCALE = 5", "net = Net(act)"),
    "the code of a function in an attribute": (
        "net(x)", "act.__code__ = (lambda x: x + SCALE).__code__", "net = Net(act)",
    ),
    "the class of an object in an attribute": (
        "net(x)", "Helper.__call__ = lambda self, x: x - self.k", "net = Net(Helper(2))",
    ),
    "a class that is a class attribute": ("net(x)", "Settings.scale = 4", "net = Net(act)"),
    "the class of a module": (
        "net(x)", "net.__class__ = type('Other', (Net,), {'forward': lambda self, x: x})", "net = Net(act)",
    ),
    "another class of an object": (
        "helper(x)", "helper.__class__ = type('Other', (Helper,), {'__call__': lambda self, x: x * 7})",
    ),
    "another class of an object in a list": (
        "listed[0](x)", "listed[0].__class__ = type('Other', (Helper,), {'__call__': lambda self, x: x * 7})",
    ),
    "another class of what a bound method belongs to": (
        "run(x)", "helper.__class__ = type('Other', (Helper,), {'half': lambda self: 4})",
        "Helper.half = lambda self: 2\nHelper.run = lambda self, x: x / self.half()\nrun = helper.run",
    ),
    "another class of an object of a library": (
        "x * len(type(steps).__name__)", "steps.__class__ = torch.optim.lr_scheduler.ExponentialLR",
        "import torch.optim\nsteps = object.__new__(torch.optim.lr_scheduler.StepLR)",
    ),
    "other attributes of an object, all at once": ("helper(x)", "helper.__dict__ = {'k': 9}"),
    "other attributes of a module, all at once": (
        "net(x)", "net.__dict__ = {**vars(net), 'act': lambda x: x * 7}", "net = Net(act)",
    ),
    "other attributes of a function, all at once": (
        "x * step.k", "step.__dict__ = {'k': 9}", "def step(): pass\nstep.k = 2",
    ),
    "other attributes of a tensor, all at once": (
        "x * w * w.scale", "w.__dict__ = {'scale': 3}", "w = torch.ones(8); w.scale = 2",
    ),
    "another class of a class": (
        "Made.run(x)", "Made.__class__ = type('Other', (type,), {'run': lambda cls, x: x * 3})",
        "Meta = type('Meta', (type,), {'run': lambda cls, x: x * 2})\nclass Made(metaclass=Meta): pass",
    ),
    "another class of a module made by hand": (
        "made.run(x)",
        "made.__class__ = type('Other', (types.ModuleType,), {'__getattribute__': lambda *_: lambda x: x * 5})",
        "made = types.ModuleType('made'); made.run = lambda x: x * 2",
    ),
    "other modules of a module, all at once": (
        "net(x)", "net._modules = {'0': nn.Softplus()}", "net = nn.Sequential(nn.Tanh())",
    ),
    "other parameters of a module, all at once": (
        "net(x)", "net._parameters = nn.Linear(8, 8)._parameters", "net = nn.Linear(8, 8).requires_grad_(False)",
    ),
    "a module for an empty Sequential": ("net(x)", "net.append(nn.Tanh())", "net = nn.Sequential()"),
    "a module for an empty ModuleList": (
        "functools.reduce(lambda y, f: f(y), net, x)", "net.append(nn.Tanh())", "net = nn.ModuleList()",
    ),
    "a large dataclass": ("x * large_config.k", "large_config.k = 5"),
    "what is no field of a dataclass": ("x * derived.double", "derived.double = 7"),
    "an object six objects deep": (
        "x * deep.inner.inner.inner.inner.inner.inner.k", "deep.inner.inner.inner.inner.inner.inner.k = 5",
    ),
    "the object of a bound method": ("run(x)", "helper.k = 9", "run = helper.__call__"),
    "the dtype of an array in a dict": ("x * float(numbers['w'][0])", "numbers['w'] = numbers['w'].view(np.int32)"),
    "an event": ("-x if event.is_set() else x", "event.set()"),
    "a context variable": ("x * context.get()", "context.set(3)"),
    "the order of a ModuleDict": (
        "functools.reduce(lambda y, f: f(y), d.values(), x)", "a = d.pop('a'); d['a'] = a",
        "d = nn.ModuleDict({'a': nn.Tanh(), 'b': nn.Softplus()})",
    ),
    "a conjugate in place of a tensor": (
        "x * held[0].imag.sum()", "held[0] = held[0].conj()", "held = [torch.ones(2, dtype=torch.cfloat) * 1j]",
    ),
    "a negative in place of a tensor": (
        "x * held[0].sum()", "held[0] = torch._neg_view(held[0])", "held = [torch.ones(2)]",
    ),
    "an attribute of a list": ("x * held.k", "held.k = 3", "class L(list): pass\nheld = L([1]); held.k = 2"),
    "an attribute of a str that is equal": (
        "x * net.name.k", "s = S('a'); s.k = 5; net.name = s",
        "class S(str): pass\nnet = types.SimpleNamespace(name=S('a')); net.name.k = 2",
    ),
    "what a bound method of C belongs to": ("x * get('a')", "get.__self__['a'] = 5", "get = {'a': 2}.get"),
    "an attribute of a module made by hand": (
        "x * made.k", "made.k = 5", "made = types.ModuleType('made'); made.k = 2",
    ),
    "an attribute of a partial": (
        "x * part.k", "part.k = 5", "part = functools.partial(int); part.k = 2",
    ),
    "what lies forty objects deep": (
        "x * functools.reduce(lambda v, _: v.a, range(40), far)",
        "functools.reduce(lambda v, _: v.a, range(39), far).a = 5",
        "far = functools.reduce(lambda v, _: types.SimpleNamespace(a=v), range(40), 2)",
    ),
    "a column of a DataFrame": (
        "x * float(table['a'].iloc[0])", "table.loc[0, 'a'] = 5.0",
        "import pandas\ntable = pandas.DataFrame({'a': [2.0]})",
    ),
    "a mask": ("x * float(masked.sum())", "masked.mask[0] = True", "masked = np.ma.masked_array([1.0, 2.0], [0, 0])"),
    "the order of keys in a graph of a library": (
        "x * list(graph.data)[0]", "graph.data = {2: 1, 1: 1}", "graph = collections.UserDict({1: 1, 2: 1})",
    ),
    "a note on a tensor": ("x * w * w.scale", "w.scale = 3", "w = torch.ones(8); w.scale = 2"),
    "an environment variable": (
        "x * int(os.environ.get('TORCHCACHE_TEST_SCALE', '1'))", "os.environ['TORCHCACHE_TEST_SCALE'] = '3'",
    ),
}  # fmt: skip


@pytest.fixture(params=[True, False], ids=["versions", "no versions"])
def dictionaries(request, monkeypatch):
    """Compare with and without the interpreter's help."""
    if not request.param:
        monkeypatch.setattr(dict_versions, "IS_SUPPORTED", False)


@pytest.mark.usefixtures("dictionaries")
@pytest.mark.parametrize("case", CASES)
def test_a_change_of_what_a_function_uses_is_noticed(case, monkeypatch):
    monkeypatch.delenv("TORCHCACHE_TEST_SCALE", raising=False)
    expression, change, *before = CASES[case]
    text = FUNCTIONS + "\n".join(before) + f"\n@torchcache()\ndef target(x):\n    return {expression}\n"
    names = program(text, os=os)
    check(names["target"], lambda: exec(change, names))
    monkeypatch.delenv("TORCHCACHE_TEST_SCALE", raising=False)


def test_a_global_that_text_names_is_noticed(monkeypatch):
    module = types.ModuleType("named_by_text")
    monkeypatch.setitem(sys.modules, "named_by_text", module)
    text = "scale = 2\ndef target(x):\n    return x * eval('sc' + 'ale')"
    exec(compile(text, "named_by_text.py", "exec", dont_inherit=True), vars(module))
    check(torchcache()(module.target), lambda: monkeypatch.setattr(module, "scale", 3))


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Tanh()
        self.offset = 1.0

    def factor(self):
        return 2

    def forward(self, x):
        return self.layer(x) * self.factor() + self.offset


class Triples(Doubles):
    def factor(self):
        return 3


@pytest.mark.parametrize("decorate", [torchcache(), lambda net: torchcache()(net.forward)])
@pytest.mark.parametrize("key", ["__class__", "__dict__"])
def test_another_class_or_other_attributes_of_what_is_cached_are_noticed(decorate, key):
    net = Doubles()
    value = Triples if key == "__class__" else {**vars(net), "offset": 5.0}
    check(decorate(net), lambda: setattr(net, key, value))


ANEW = [
    """
    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        return dict(found) if name == '__dict__' else found
    """,
    "    __dict__ = property(lambda self: {})",
]


@pytest.mark.parametrize("text", ANEW)
def test_an_object_that_shows_other_attributes_each_time_stands_still(text):
    text = f"class Shown:\n{text}\n    def run(self, x): return x * 2\nshown = Shown()\n"
    names = program(f"{text}@torchcache()\ndef target(x):\n    return shown.run(x)")
    for _ in range(5):
        names["target"](X)
    assert cache_of(names["target"]).stats().hits == 4 * len(X)


def frozen_net(*layers):
    torch.manual_seed(0)
    return torchcache()(nn.Sequential(*layers).eval().requires_grad_(False))


def transposed(net):
    net[0].weight.data = net[0].weight.data.t()


def cut(net):
    net[0].weight.data, net[0].bias.data = net[0].weight.data[:4], net[0].bias.data[:4]


def moved_by_set(net):
    with torch.no_grad():
        net[0].weight.set_(net[0].weight * 2)


def one_element(net):
    with torch.no_grad():
        net[0].weight[3, 5] += 1


MODULES = {
    "data transposed": transposed,
    "data cut": cut,
    "set_": moved_by_set,
    "one element under no_grad": one_element,
    "double()": lambda net: net.double() and None,
    "a layer replaced": lambda net: net.__setitem__(1, nn.Tanh()),
    "a layer deleted": lambda net: net.__delitem__(1),
    "a layer appended": lambda net: net.append(nn.Tanh()),
    "running statistics through data": lambda net: net[2].running_mean.data.add_(1),
    "eps": lambda net: setattr(net[2], "eps", 10.0),
    "a hook on a layer": lambda net: net[0].register_forward_hook(lambda *args: args[-1] + 1) and None,
    "a pre-hook on a layer": lambda net: net[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1,)) and None,
}


@pytest.mark.usefixtures("dictionaries")
@pytest.mark.parametrize("change", MODULES)
def test_a_change_of_a_module_is_noticed(change):
    net = frozen_net(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8))
    if change == "data cut":
        net = frozen_net(nn.Linear(8, 8), nn.ReLU())
    x = X.clone()
    if change == "double()":
        with disabled():
            before = net(x)
        assert torch.equal(net(x), before)
        net.double()
        assert net(x.double()).dtype == torch.float64
        return
    check(net, lambda: MODULES[change](net), x)


@pytest.mark.parametrize("change", [transposed, cut])
def test_without_the_guards_of_torch_the_form_of_weights_is_compared_too(change, monkeypatch):
    monkeypatch.setattr(marks, "_guards_work", lambda: False)
    net = frozen_net(nn.Linear(8, 8), nn.ReLU())
    check(net, lambda: change(net))


def test_in_other_surroundings_the_form_of_weights_is_compared_too():
    net = frozen_net(nn.Linear(8, 8), nn.ReLU())
    for _ in range(3):
        net(X)
        with torch.inference_mode():
            net(X)
    with torch.inference_mode():
        check_changed = net(X).clone()
    transposed(net)
    with torch.inference_mode():
        assert not torch.equal(net(X), check_changed)
        with disabled():
            plain = net(X)
        assert torch.equal(net(X), plain)


def test_weights_made_in_inference_mode_are_watched():
    with torch.inference_mode():
        net = frozen_net(nn.Linear(8, 8))

    def change():
        with torch.inference_mode():
            net[0].weight.mul_(2)

    check(net, change)


def test_a_hook_on_all_modules_goes_around_the_cache():
    net = frozen_net(nn.Linear(8, 8))
    handle = []
    try:
        check(net, lambda: handle.append(torch_module.register_module_forward_hook(lambda *args: args[-1] + 1)))
    finally:
        handle[0].remove()
    assert cache_of(net).stats().bypasses == {"global_module_hooks": 2}


def put_in(module, hook):
    module._forward_hooks[9999] = hook


def put_in_place(module, hook):
    module._forward_hooks = collections.OrderedDict({9999: hook})


def put_before(module, hook):
    module._forward_pre_hooks[9999] = lambda module, args: (args[0] + 1,)


@pytest.mark.parametrize("put", [put_in, put_in_place, put_before])
@pytest.mark.parametrize("has_others", [False, True])
def test_a_hook_that_torch_did_not_register_is_noticed(put, has_others):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval().requires_grad_(False)
    if has_others:
        net[0].register_forward_hook(lambda module, args, output: output * 2)
        net[0].register_forward_pre_hook(lambda module, args: None)
    net, x = torchcache()(net), torch.rand(3, 4)
    for _ in range(3):
        net(x)
    put(net[0], lambda module, args, output: output + 10)
    with disabled():
        expected = net(x)
    assert torch.equal(net(x), expected)


def test_hooks_on_inner_modules_are_said_once(caplog):
    net = frozen_net(nn.Linear(8, 8))
    net[0].register_forward_hook(lambda *_: None)
    net(X)
    net(X)
    assert sum("do not run on hits" in line for line in caplog.messages) == 1


class Steering:
    def __init__(self):
        self.alpha = 1.0

    def hook(self, module, args, output):
        return output * self.alpha


def test_the_object_of_a_hook_that_is_a_method_is_watched():
    net, steering = frozen_net(nn.Linear(8, 8)), Steering()
    net[0].register_forward_hook(steering.hook)
    check(net, lambda: setattr(steering, "alpha", 4.0))


def test_a_hook_that_comes_during_a_forward_is_noticed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            if x.sum() > 1000:
                self.layer.register_forward_hook(lambda *args: args[-1] + 1)
            return self.layer(x)

    module = torchcache(check_rows=False)(Net())
    module(X)
    module(X + 10_000)
    with disabled():
        plain = module(X)
    assert torch.equal(module(X), plain)


def test_a_forward_of_torch_that_is_replaced_is_noticed(monkeypatch):
    net = frozen_net(nn.Linear(8, 8))
    check(net, lambda: monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x * 2))


def test_state_that_contains_itself_is_encoded():
    class Node:
        def __init__(self, parent=None):
            self.parent, self.children, self.k = parent, [], 1
            if parent is not None:
                parent.children.append(self)

    root = Node()
    Node(root)
    module = torchcache()(Holds(root))
    module.handle.table = {}
    module.handle.table["self"] = module.handle.table
    module(X)
    module(X)
    assert cache_of(module).stats().memory_hits == 4
    assert not cache_of(module).stats().bypasses
    root.children[0].k = 2
    module(X)
    assert cache_of(module).stats().misses == 8


# -- state that moves by itself ----------


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class CountsElsewhere(Counter):
    def note(self):
        self.calls = self.calls + 1

    def forward(self, x):
        self.note()
        return x * self.calls


class Averages(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return x - self.mean


class Draws(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        if isinstance(self.generator, torch.Generator):
            return x + torch.rand(1, generator=self.generator)
        return x + self.generator.random()


@pytest.mark.parametrize(
    "make",
    [
        Counter, CountsElsewhere, Averages, lambda: Draws(torch.Generator().manual_seed(0)),
        lambda: Draws(np.random.default_rng(0)), lambda: Draws(np.random.RandomState(0)),
        lambda: Draws(random.Random(0)),
    ],
    ids=["counter", "counter elsewhere", "average", "torch", "numpy", "numpy legacy", "random"],
)  # fmt: skip
def test_state_that_shapes_results_and_moves_at_every_call_is_never_answered_from_the_cache(make):
    plain, module = make(), torchcache()(make())
    for _ in range(6):
        assert torch.equal(module(X), plain(X))
    assert cache_of(module).stats().hits == 0


def test_a_variable_that_a_function_counts_with_and_uses_is_state():
    calls = 0

    @torchcache()
    def function(x):
        nonlocal calls
        calls += 1
        return x * calls

    for i in range(1, 6):
        assert torch.equal(function(X), X * i)


#: Modules whose results depend on what they did before, each in another way of writing it.
REMEMBERING = {
    "the last batch": "out = x - self.prev; self.prev = float(x.sum()) + 1; return out",
    "a state of a cell": "out = x + self.state; self.state = out.mean(0); return out",
    "a mean by a function": "self.mean = torch.lerp(self.mean, x.sum(), 0.1); return x - self.mean",
    "a switch": "self.flip = not self.flip; return x if self.flip else -x",
    "the length of a list": "self.history.append(1); return x * len(self.history)",
    "an item of a dict": "self.counts['n'] += 1; return x * self.counts['n']",
    "an attribute of an object": "self.inner.n += 1; return x * self.inner.n",
    "an item of a global": "N[0] += 1; return x * N[0]",
    "a maximum": "self.top = max(self.top, 0) + 1; return x * self.top",
    "what a method returns": "return x * self.inner.update(1)",
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_depends_on_earlier_calls_is_never_answered_from_the_cache(name):
    text = f"""
N = [0]

class Inner:
    def __init__(self):
        self.n = 0
    def update(self, k):
        self.n = max(self.n, 0) + k
        return self.n

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.prev, self.flip, self.history, self.counts, self.top = 0.0, False, [], {{"n": 0}}, 0
        self.state, self.mean, self.inner = torch.zeros(8), torch.zeros(()), Inner()
    def forward(self, x):
        {REMEMBERING[name]}
"""
    plain, module = program(text)["Net"](), torchcache(check_rows=False)(program(text)["Net"]())
    for _ in range(6):
        assert torch.allclose(module(X), plain(X))


#: State that code sets only sometimes, and that a user sets as well.
SOMETIMES = {
    "only in training": ("if self.training: self.code = torch.lerp(self.code, x.mean(0), 0.1)", "code", 4.0),
    "if there is none": ("if self.code is None: self.code = torch.ones(8)", "code", 5.0),
    "for wide inputs": ("if x.shape[1] > 100: self.code = torch.ones(8)", "code", 3.0),
}


@pytest.mark.parametrize("name", SOMETIMES)
def test_what_code_sets_only_sometimes_counts(name):
    statement, attribute, value = SOMETIMES[name]
    text = f"""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.code = torch.ones(8)
    def forward(self, x):
        {statement}
        return x * self.code
"""
    module = torchcache()(program(text)["Net"]().eval())
    check(module, lambda: setattr(module, attribute, torch.full((8,), value)))


def test_an_attribute_of_the_same_name_in_another_class_hides_nothing():
    text = """
class Inner(nn.Module):
    def forward(self, x):
        self.scale = 1.0
        return x

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = Inner(), 1.0
    def forward(self, x):
        return self.inner(x) * self.scale
"""
    module = torchcache()(program(text)["Net"]())
    check(module, lambda: setattr(module, "scale", 2.0))


@pytest.mark.parametrize("method", ["add", "update", "remove", "write"])
def test_a_method_that_is_called_like_one_of_a_container_hides_nothing(method):
    text = f"""
class Ops:
    def __init__(self, k):
        self.k = k
    def {method}(self, x):
        return x + self.k

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.ops = Ops(1)
    def forward(self, x):
        return self.ops.{method}(x)
"""
    module = torchcache()(program(text)["Net"]())
    check(module, lambda: setattr(module.ops, "k", 5))


@pytest.mark.parametrize("how", ["global", "lru_cache"])
def test_a_model_that_is_built_at_the_first_call_counts_with_its_weights(how):
    text = {
        "global": """
MODEL = None
def get():
    global MODEL
    if MODEL is None:
        MODEL = nn.Linear(8, 8).requires_grad_(False)
    return MODEL
""",
        "lru_cache": """
@functools.lru_cache
def get():
    return nn.Linear(8, 8).requires_grad_(False)
""",
    }[how]
    names = program(text + "\n@torchcache()\ndef target(x):\n    return get()(x)\n")
    names["target"](X)  # builds the model
    check(names["target"], lambda: names["get"]().weight.mul_(3))


# -- what cannot be named ----------


class Handle:
    """As an object of a C library: no attributes, and nothing that pickle could keep."""

    __slots__ = ()

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle")


class Holds(nn.Module):
    def __init__(self, handle):
        super().__init__()
        self.handle = handle

    def forward(self, x):
        return x * 2


@pytest.mark.parametrize(
    "make",
    [lambda: (i for i in range(3)), lambda: open(__file__), queue.SimpleQueue, lambda: [{"in": map(str, iter(gen()))}]],  # noqa: PTH123, SIM115
    ids=["generator", "open file", "queue in C", "generator deep inside"],
)
def test_state_that_cannot_be_seen_goes_around_the_cache_and_is_named_once(make, caplog):
    handle = make()
    module = torchcache()(Holds(handle))
    for _ in range(3):
        assert torch.equal(module(X), X * 2)
    assert cache_of(module).stats().bypasses == {"opaque_state": 3}
    (line,) = caplog.messages
    assert "handle" in line
    assert all(remedy in line for remedy in ("register_value", "ignore=", "persistent_module_hash"))
    if hasattr(handle, "close"):
        handle.close()


def gen():
    yield 1


@pytest.mark.parametrize("ignore", [("handle",), ("cfg.out",), ("OPEN",)])
def test_what_is_ignored_neither_counts_nor_keeps_a_call_from_the_cache(ignore):
    text = textwrap.dedent(
        """
        OPEN = None
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.handle, self.cfg = None, types.SimpleNamespace(out=None, scale=2.0)
            def forward(self, x):
                assert OPEN is not self, (self.handle, self.cfg.out)
                return x * self.cfg.scale
        """
    )
    names = program(text)
    module = torchcache(ignore=ignore)(names["Net"]())
    where = {"handle": vars(module), "cfg.out": vars(module.cfg), "OPEN": names}[ignore[0]]
    key = ignore[0].rpartition(".")[2]
    for value in (gen(), 1, "other", gen()):
        where[key] = value
        module(X)
    stats = cache_of(module).stats()
    assert (stats.misses, stats.memory_hits, dict(stats.bypasses)) == (4, 12, {})
    module.cfg.scale = 3.0
    assert torch.equal(module(X), X * 3)


def test_a_name_to_ignore_that_is_not_there_raises_at_the_first_call():
    module = torchcache(ignore=("handel",))(Holds(1))
    with pytest.raises(ConfigError, match=r"ignore names 'handel'.*did you mean 'handle'"):
        module(X)


@pytest.mark.parametrize("statement", ["COUNTED.append(1)", "COUNTED[0] = 1", "COUNTED[0] += 1"])
def test_what_is_only_counted_may_be_named_to_be_ignored(statement):
    names = program(f"COUNTED = [0]\ndef count(x):\n    {statement}\n    return x * 2\n")
    cached = torchcache(ignore=("COUNTED",))(names["count"])
    assert torch.equal(cached(X), X * 2)
    assert torch.equal(cached(X), X * 2)
    assert cache_of(cached).stats().memory_hits == 4


def test_locks_loggers_and_what_is_written_to_are_no_state(caplog):
    held = [threading.Lock(), logging.getLogger("x"), threading.Event(), open(os.devnull, "w")]  # noqa: PTH123, SIM115
    for handle in held:
        module = torchcache()(Holds(handle))
        module(X)
        module(X)
        assert cache_of(module).stats().memory_hits == 4
    held[-1].close()
    assert not caplog.messages


# -- weights without plain bytes, or without any ----------


def test_lazy_modules_are_cached_once_they_have_their_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torchcache()(nn.Sequential(nn.LazyLinear(3)))
    for _ in range(3):
        result = module(X)
    assert torch.equal(result, module[0](X))
    assert cache_of(module).stats().bypasses == {"uninitialized_parameters": 1}
    assert cache_of(module).stats().memory_hits == 4


def test_sparse_weights_go_around_the_cache():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.eye(8).to_sparse()

        def forward(self, x):
            return (self.weight @ x.t()).t()

    module = torchcache()(Sparse())
    assert torch.equal(module(X), X)
    module.weight = module.weight * 2
    assert torch.equal(module(X), X * 2)
    assert set(cache_of(module).stats().bypasses) == {"opaque_weights"}


# -- the surroundings ----------


def set_and_restore(getter, setter, value):
    """Return a context manager that sets a switch of torch for its body."""

    class Setting:
        def __enter__(self):
            self.before = getter()
            setter(value)

        def __exit__(self, *_):
            setter(self.before)

    return Setting


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another autocast": lambda: torch.autocast("cpu", torch.float16),
    "default dtype": set_and_restore(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "matmul precision": set_and_restore(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "deterministic": set_and_restore(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "flushed denormals": set_and_restore(lambda: False, torch.set_flush_denormal, True),
    "fast path": set_and_restore(
        torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False
    ),
    "other kernels": set_and_restore(torch.backends.mkldnn.is_available, torch._C._set_mkldnn_enabled, False),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_results_of_its_own_and_finds_them_again(mode):
    net = frozen_net(nn.Linear(8, 8))
    net(X)
    with MODES[mode]():
        net(X)
        net(X)
    net(X)
    stats = cache_of(net).stats()
    assert (stats.misses, stats.memory_hits) == (8, 8)


def test_the_number_of_threads_and_grad_mode_are_no_mode():
    net = frozen_net(nn.Linear(8, 8))
    net(X)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        net(X)
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        net(X)
    with torch.inference_mode():
        net(X)
    assert cache_of(net).stats().misses == 4


def test_modes_that_see_every_operation_go_around_the_cache():
    class Doubles(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if "addmm" in str(func) else result

    class Sees(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    net = frozen_net(nn.Linear(8, 8))
    once = net(X)
    with Doubles():
        assert torch.equal(net(X), once * 2)
    with Sees():
        assert torch.equal(net(X), once)
    with torch.device("cpu"):
        assert torch.equal(net(X), once)
    assert cache_of(net).stats().bypasses == {"torch_dispatch_mode": 1, "torch_function_mode": 1}
    assert cache_of(net).stats().memory_hits == 4


def test_weights_that_torch_holds_are_not_stored_under_what_was_written_since():
    layer = parametrize.register_parametrization(nn.Linear(8, 8, bias=False), "weight", nn.Softplus()).eval()
    layer.requires_grad_(False)
    net = torchcache()(layer)
    with parametrize.cached():
        once = net(X)
        layer.parametrizations.weight.original.add_(1)
        assert torch.equal(net(X), once)  # as torch says itself
    assert cache_of(net).stats().bypasses == {"parametrizations_held": 1}
    assert not torch.equal(net(X), once)


# -- redefined code and the hash ----------


def test_a_helper_that_is_redefined_and_restored_finds_its_old_results_on_disk(cache_dir):
    text = """
def helper(x):
    return x * 2

@torchcache(persistent=True, persistent_cache_dir=directory, max_memory_cache_size=0)
def target(x):
    return helper(x)
"""
    names = program(text, directory=cache_dir)
    target, hashes = names["target"], []
    for factor, misses in ((2, 4), (3, 8), (2, 8)):
        exec(f"def helper(x):\n    return x * {factor}", names)
        assert torch.equal(target(X), X * factor)
        cache_of(target).flush()
        hashes.append(cache_of(target).module_hash)
        assert cache_of(target).stats().misses == misses
        assert cache_of(target).cache_dir.name == hashes[-1]
    assert hashes[0] == hashes[2] != hashes[1]
    cache_of(target).close()


def test_code_in_state_that_is_replaced_by_equal_code_still_hits():
    module = torchcache()(Holds(lambda x: x + 1))
    module(X)
    for _ in range(3):
        module.handle = lambda x: x + 1
        module(X)
    assert cache_of(module).stats().misses == 4


def test_the_order_of_a_dict_in_the_state_counts():
    class Pipeline(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = {"add": 1.0, "double": 2.0}

        def forward(self, x):
            for name, value in self.steps.items():
                x = x + value if name == "add" else x * value
            return x

    module = torchcache()(Pipeline())
    assert torch.equal(module(X), (X + 1) * 2)
    module.steps = {"double": 2.0, "add": 1.0}
    assert torch.equal(module(X), X * 2 + 1)


def test_weights_that_were_freed_are_not_read():
    module = torchcache()(nn.Linear(4, 4))
    flat = torch.rand(20)
    module.weight.data, module.bias.data = flat[:16].view(4, 4), flat[16:]
    x = torch.rand(3, 4)
    module(x)
    flat.untyped_storage().resize_(0)
    assert cache_of(module).explain(x).bypass_reason == "opaque_weights"
