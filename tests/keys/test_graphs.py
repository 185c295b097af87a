"""Modules made by torch.fx count by the code, functions and constants of their graph, and their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.storage.children import run
from torchcache import cache_of, torchcache

X = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator)
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Interpreted(nn.Module):
    """Its own code reads the graph, which need not be compiled."""

    def __init__(self):
        super().__init__()
        self.module = torch.fx.symbolic_trace(Net())

    def forward(self, x):
        return torch.fx.Interpreter(self.module).run(x)


def put_sigmoid(module):
    """Put another function in place of the first, without another number of nodes."""
    node = next(node for node in module.graph.nodes if node.target is torch.relu)
    node.target = torch.sigmoid
    module.recompile()


def add_one(module):
    first = next(node for node in module.graph.nodes if node.op == "call_function")
    with module.graph.inserting_after(first):
        one_more = module.graph.call_function(torch.add, (first, 1.0))
    first.replace_all_uses_with(one_more, lambda user: user is not one_more)
    module.recompile()


def write_weight(module):
    next(module.parameters()).add_(1.0)


@pytest.mark.parametrize("change", [put_sigmoid, add_one, write_weight])
@pytest.mark.parametrize("make", [lambda: torch.fx.symbolic_trace(Net()), Interpreted], ids=["traced", "interpreted"])
def test_a_traced_module_hits_until_it_is_changed(make, change):
    module = make()
    cached = torchcache()(module)
    for _ in range(3):
        assert torch.equal(cached(X), Net()(X))
    assert cache_of(cached).stats().bypasses == {}
    assert cache_of(cached).stats().hits == 2 * len(X)

    change(getattr(module, "module", module))
    right = torch.fx.Interpreter(getattr(module, "module", module)).run(X)
    assert not torch.equal(right, Net()(X))
    assert torch.equal(cached(X), right)


def test_what_the_graph_calls_by_name_counts(cache_dir):
    for factor in (2.0, 3.0):

        def scale(x, factor=factor):
            return x * factor

        module = torch.fx.symbolic_trace(Net())
        last = next(node for node in module.graph.nodes if node.op == "output")
        with module.graph.inserting_before(last):
            scaled = module.graph.call_function(scale, (last.args[0],))
        last.args = (scaled,)
        module.recompile()
        cached = torchcache(persistent=True, persistent_cache_dir=cache_dir)(module)
        assert torch.equal(cached(X), Net()(X) * factor)
        cache_of(cached).close()


PROGRAM = """
import sys
import torch
from tests.keys.test_graphs import Net, X
from torchcache import cache_of, torchcache

module = torchcache(persistent=True, persistent_cache_dir=sys.argv[1])(torch.fx.symbolic_trace(Net()))
assert torch.equal(module(X), Net()(X))
print(cache_of(module).stats().misses)
"""


def test_the_next_program_finds_what_a_traced_module_returned(cache_dir):
    said = [run(PROGRAM, cache_dir, timeout_seconds=60.0, PYTHONHASHSEED=seed).strip() for seed in ("1", "2")]
    assert said == ["4", "0"]
