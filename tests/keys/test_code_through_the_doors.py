"""The code that can run, as torch knows it and as a user of the decorator sees it."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from torchcache import CachedDataset, cache_of, torchcache
from torchcache.keys import time_limit
from torchcache.keys.code import walk_code
from torchcache.keys.origins import is_own_class, is_own_module
from torchcache.report.reasons import Reason

ROOT = Path(__file__).parents[2]

X = torch.ones(2, 3)


def run(text):
    """Execute a program and return its names."""
    names = {"__name__": "mine"}
    exec(compile(text, "mine.py", "exec"), names)
    return names


# -- behind torch's wrappers ----------

WRAPPED = {
    "no_grad": "@torch.no_grad()\ndef helper(x):\n    return x * 2",
    "inference_mode": "@torch.inference_mode()\ndef helper(x):\n    return x * 2",
    "enable_grad": "@torch.enable_grad()\n@torch.no_grad()\ndef helper(x):\n    return x * 2",
    "autocast": "@torch.autocast('cpu')\ndef helper(x):\n    return x * 2",
    "compile": "@torch.compile(backend='eager')\ndef helper(x):\n    return x * 2",
    "disable": "@torch.compiler.disable\ndef helper(x):\n    return x * 2",
    "vmap": "helper = torch.vmap(lambda x: x * 2)",
    "grad": "helper = torch.func.grad(lambda x: (x * 2).sum())",
    "module": "class Net(nn.Module):\n    def forward(self, x):\n        return x * 2\nhelper = nn.Sequential(Net())",
    "module of modules": "class Net(nn.Module):\n    @torch.no_grad()\n    def forward(self, x):\n"
    "        return x * 2\nhelper = nn.ModuleList([Net()])",
    "function in a module": "helper = nn.Identity()\nhelper.function = lambda x: x * 2",
    "hook": "helper = nn.Identity()\nhelper.register_forward_hook(lambda module, args, output: output * 2)",
    "autograd.Function": "class F(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
    "        return x * 2\nhelper = F.apply",
    "pointwise": "from torch.utils.checkpoint import checkpoint\nimport functools\n"
    "helper = functools.partial(checkpoint, lambda x: x * 2)",
    "fx": "helper = torch.fx.symbolic_trace(eval('lambda x: x * 2'))",
}  # fmt: skip


@pytest.mark.parametrize("text", WRAPPED.values(), ids=WRAPPED.keys())
def test_own_code_behind_a_wrapper_of_torch_counts(text):
    text = f"import torch, torch.fx\nfrom torch import nn\n{text}\ndef target(x):\n    return helper(x)"
    walk = walk_code(run(text)["target"])
    assert not walk.has_changed()
    assert walk_code(run(text)["target"]).fingerprint == walk.fingerprint
    assert walk_code(run(text.replace("x * 2", "x * 3").replace("output * 2", "output * 3"))["target"]).fingerprint != (
        walk.fingerprint
    )


def test_a_compiled_function_is_the_same_after_it_was_called():
    names = run("""
import torch
@torch.compile(backend="eager")
def helper(x):
    return x * 2
@torch.no_grad()
def target(x):
    return helper(x)
""")
    walk = walk_code(names["target"])
    names["target"](torch.ones(2))
    names["target"](torch.ones(3, 3))
    assert walk_code(names["target"]).fingerprint == walk.fingerprint


SCRIPTED = """
import torch

@torch.jit.script
def inner(x):
    return x * 2

@torch.jit.script
def helper(x):
    return inner(x) + 1

def target(x):
    return helper(x)
"""

CHILD = """
import sys
sys.path.insert(0, {root!r})
from torchcache.keys.code import walk_code
sys.path.insert(0, {folder!r})
import scripted
print(walk_code(scripted.target).fingerprint.hex())
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_function_counts_by_its_graph(tmp_path):
    def fingerprint(text, seed):
        folder = tmp_path / seed
        folder.mkdir()
        (folder / "scripted.py").write_text(text)
        child = CHILD.format(root=str(ROOT), folder=str(folder))
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.check_output([sys.executable, "-c", child], env=environment, text=True, timeout=250)

    base = fingerprint(SCRIPTED, "1")
    assert fingerprint("# A comment.\n" + SCRIPTED, "2") == base
    assert fingerprint(SCRIPTED.replace("x * 2", "x * 3"), "3") != base


# -- whose class it is ----------


def test_classes_of_torch_are_not_own():
    for cls in (nn.Module, nn.Linear, nn.Sequential, torch.Tensor, nn.Parameter, torch.device, fx.GraphModule,
                torch.export.ExportedProgram, torch.utils.data.DataLoader, torch.optim.SGD, torch.return_types.max,
                torch.distributions.Normal, torch.nn.utils.rnn.PackedSequence):  # fmt: skip
        assert not is_own_class(cls), cls
    assert not is_own_class(type(torch.no_grad()))


def test_a_traced_module_has_code_of_its_own():
    class Net(nn.Module):
        def __init__(self, plus):
            super().__init__()
            self.plus = plus

        def forward(self, x):
            return x + self.plus

    one, other, two = (fx.symbolic_trace(Net(n)) for n in (1, 1, 2))
    assert is_own_class(type(one))
    assert walk_code(type(one)).fingerprint == walk_code(type(other)).fingerprint
    assert walk_code(type(one)).fingerprint != walk_code(type(two)).fingerprint


def test_a_decorator_of_ones_own_around_a_cached_function_counts():
    text = """
import functools
from torchcache import torchcache
def scaled(function):
    @functools.wraps(function)
    def wrapper(x):
        return function(x) * 2
    return wrapper
@scaled
@torchcache()
def helper(x):
    return x + 1
def target(x):
    return helper(x)
"""
    one, other, inner = (run(t) for t in (text, text.replace("* 2", "* 3"), text.replace("+ 1", "+ 2")))
    fingerprints = [walk_code(names["target"]).fingerprint for names in (one, other, inner, run(text))]
    assert len(set(fingerprints[:3])) == 3
    assert fingerprints[3] == fingerprints[0]


def test_writes_in_a_forward_without_grad_are_noted():
    class Net(nn.Module):
        @torch.no_grad()
        def forward(self, x):
            self.calls = x
            return self.step(x)

        @torch.inference_mode()
        def step(self, x):
            self.seen.append(x)
            return x

    writes = walk_code(Net).writes
    assert writes.assigned_attributes == {"calls"}
    assert writes.changed_attributes == {"seen"}


def test_data_of_torch_is_no_code():
    names = run("import torch\nW = torch.ones(3)\nNET = None\ndef target(x):\n    return x @ W, NET, torch.relu(x)")
    walk = walk_code(names["target"])
    for value in (torch.zeros(4), nn.Parameter(torch.ones(1)), torch.float16, torch.device("cpu")):
        names["W"] = value
        assert not walk.has_changed()
    names["NET"] = nn.Linear(1, 1)
    assert walk.has_changed()


def test_a_faster_kernel_that_a_user_puts_into_torch_counts(monkeypatch):
    names = run("import torch.nn.functional as F\ndef target(x):\n    return F.silu(x)")
    walk = walk_code(names["target"])
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: x * 2)
    assert walk.has_changed()
    assert walk_code(names["target"]).fingerprint != walk.fingerprint


def test_torchs_own_code_is_not_walked():
    walk = walk_code(torch.nn.Linear)
    assert not walk.names
    assert not walk.writes.assigned_attributes


# -- through the door ----------

PERSISTENT = """
import torch
from torch import nn
from torchcache import torchcache

def helper(x):
    return x * 2

def indirect(x):
    return helper(x)

class Net(nn.Module):
    def forward(self, x):
        return x * 2

net = Net()
TABLE = {{"indirect": indirect}}

@torchcache(persistent=True, persistent_cache_dir={directory!r})
def uses_a_module(x):
    return net(x)

@torchcache(persistent=True, persistent_cache_dir={directory!r})
def uses_a_table(x):
    return TABLE["indirect"](x)

@torchcache(persistent=True, persistent_cache_dir={directory!r})
class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x)

holder = Holder()

class Outer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)

outer = torchcache(persistent=True, persistent_cache_dir={directory!r})(Outer(indirect))
"""


def result_before_and_after_an_edit(cache_dir, target):
    results = []
    for text in (PERSISTENT, PERSISTENT.replace("x * 2", "x * 3")):
        function = run(text.format(directory=str(cache_dir)))[target]
        results.append(function(torch.ones(1, 2)))
        cache_of(function).close()
    return [result[0, 0].item() for result in results]


def test_the_class_of_a_submodule_counts(cache_dir):
    assert result_before_and_after_an_edit(cache_dir, "holder") == [2, 3]


def test_the_class_of_a_module_that_a_function_uses_counts(cache_dir):
    assert result_before_and_after_an_edit(cache_dir, "uses_a_module") == [2, 3]


def test_a_function_in_a_table_counts_with_its_helpers(cache_dir):
    assert result_before_and_after_an_edit(cache_dir, "uses_a_table") == [2, 3]


def test_a_function_given_to_the_constructor_counts_with_its_helpers(cache_dir):
    assert result_before_and_after_an_edit(cache_dir, "outer") == [2, 3]


# -- modules as values ---------------------------------------------------------------------------------------------


@pytest.fixture
def helpers(monkeypatch):
    """Return a module of the user's own, and a function that redefines what is in it."""
    module = types.ModuleType("helpers_of_mine")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def define(text):
        exec(compile(text, "helpers_of_mine.py", "exec"), vars(module))
        return module

    define("def f(x):\n    return x * 2")
    return define


def test_a_module_in_an_attribute_counts_by_its_code(helpers):
    class Net(nn.Module):
        def __init__(self, ops):
            super().__init__()
            self.ops = ops

        def forward(self, x):
            return self.ops.f(x)

    module = torchcache()(Net(helpers("N = 1")))
    assert torch.equal(module(X), X * 2)
    assert torch.equal(module(X), X * 2)
    assert cache_of(module).stats().memory_hits
    helpers("def f(x):\n    return x * 3")
    assert torch.equal(module(X), X * 3)


def test_a_module_in_an_argument_counts_by_its_code(helpers):
    class Backend:
        def __init__(self, ops):
            self.ops = ops

    @torchcache(batch_dim=None)
    def call(x, backend):
        return backend.ops.f(x)

    backend = Backend(helpers("N = 1"))
    assert torch.equal(call(X, backend), X * 2)
    assert torch.equal(call(X, backend), X * 2)
    assert call.cache_instance.stats().memory_hits
    helpers("def f(x):\n    return x * 3")
    assert torch.equal(call(X, backend), X * 3)


def test_what_has_no_value_in_a_module_does_not_turn_the_cache_off(helpers):
    ops = helpers("HANDLE = (i for i in range(3))")

    @torchcache()
    def call(x, name="f"):
        return getattr(ops, name)(x)

    for _ in range(2):
        assert torch.equal(call(X), X * 2)
    assert not call.cache_instance.stats().bypasses


def test_a_counter_in_a_module_does_not_make_every_call_new(helpers):
    ops = helpers("CALLS = 0\ndef f(x):\n    global CALLS\n    CALLS += 1\n    return x * 2")

    @torchcache()
    def call(x, name="f"):
        return getattr(ops, name)(x)

    for _ in range(4):
        assert torch.equal(call(X), X * 2)
    assert call.cache_instance.stats().memory_hits
    assert not call.cache_instance.stats().bypasses


# -- what takes too long -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["function", "module", "dataset"])
def test_what_takes_too_long_to_look_at_goes_around_the_cache_and_says_so_once(door, monkeypatch, caplog):
    monkeypatch.setattr("torchcache.keys.time_limit.MOST_SECONDS", 0)

    class Net(nn.Module):
        def forward(self, x):
            return x * 2

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return X * index

    if door == "dataset":
        dataset = CachedDataset(Data(), persistent=False)
        cache = dataset.cache_instance
        for _ in range(2):
            assert torch.equal(dataset[2], X * 2)
    else:
        called = torchcache()(Net() if door == "module" else lambda x: x * 2)
        cache = cache_of(called)
        for _ in range(2):
            assert torch.equal(called(X), X * 2)
    assert cache.stats().bypasses == {"takes_too_long": 2}
    said = [record.getMessage() for record in caplog.records if "takes_too_long" in record.getMessage()]
    assert len(said) == 1
    assert "persistent_module_hash" in said[0]
    if door != "dataset":
        assert cache.explain(X).bypass_reason == "takes_too_long"
        monkeypatch.undo()
        cache.refresh()
        called(X)
        called(X)
        assert cache.stats().memory_hits


def test_the_attribute_that_takes_so_long_is_named(monkeypatch, caplog):
    class Entry:
        def __init__(self, number):
            self.number = number

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = [1, 2], {"a": 3}
            self.index = [Entry(number) for number in range(300_000)]

        def forward(self, x):
            return x * self.first[0] * self.last["a"] * self.index[7].number

    net = torchcache()(Net())
    monkeypatch.setattr("torchcache.keys.time_limit.MOST_SECONDS", 0.5)
    for _ in range(2):
        assert torch.equal(net(X), X * 21)
    assert cache_of(net).stats().bypasses == {"takes_too_long": 2}
    (said,) = [record.getMessage() for record in caplog.records if "takes_too_long" in record.getMessage()]
    assert "index takes" in said
    assert "ignore=" in said


def test_how_long_a_look_may_take_is_what_is_said():
    assert f"{time_limit.MOST_SECONDS:.0f} seconds" in Reason.TAKES_TOO_LONG.remedy


def test_no_loaded_module_of_torch_is_the_users_own():
    """Those made by C have no file, and what stands in for a module has a bare name in its place."""
    of_torch = [name for name, module in sys.modules.items() if name.startswith("torch.") and module is not None]
    assert [name for name in of_torch if is_own_module(name)] == []


BY_A_NAME_OF_THE_MOMENT = """
import importlib
import torch
from torchcache import torchcache

NAMES = {"a": "math"}

@torchcache()
def target(x, key="a"):
    return x * importlib.import_module(NAMES[key]).pi

for _ in range(2):
    target(torch.ones(2, 3))
stats = target.cache_instance.stats()
print(stats.memory_hits, dict(stats.bypasses))
"""


def test_code_that_asks_for_a_module_by_a_name_of_the_moment_is_cached(tmp_path):
    """In a process of its own: any module of one's own that is loaded counts, such as one of other tests."""
    program = tmp_path / "program.py"
    program.write_text(BY_A_NAME_OF_THE_MOMENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.check_output([sys.executable, str(program)], env=environment, text=True, timeout=250)
    assert said.split("\n")[0] == "2 {}"
