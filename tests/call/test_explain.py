"""``explain`` says what a key is made of and where each sample is; two of them show what differs."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from torchcache import ConfigError, UncacheableError, cache_of, torchcache


class Net(nn.Module):
    def __init__(self, width=4, *, scale=2):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, width).requires_grad_(False)
        self.scale = scale

    def forward(self, x, shift=0):
        return helper(self.linear(x)) * self.scale + shift


def helper(x):
    return x * OFFSET


OFFSET = 2
Cached = torchcache()(type("Cached", (Net,), {}))
X = torch.arange(12.0).reshape(4, 3)


def names_that_differ(one, other):
    return {line.partition(":")[0] for line in one.differences(other)}


def test_it_says_where_each_sample_is(cache_dir):
    module = torchcache(persistent=True, persistent_cache_dir=cache_dir, max_memory_cache_size=0)(Net())
    cache = cache_of(module)
    assert {sample.found_in for sample in cache.explain(X).samples} == {"nowhere"}
    module(X[:2])
    cache.flush()
    assert [sample.found_in for sample in cache.explain(X).samples] == ["store", "store", "nowhere", "nowhere"]
    cache.close()
    module = torchcache()(Net())
    module(X[1:3])
    assert [s.found_in for s in cache_of(module).explain(X).samples] == ["nowhere", "memory", "memory", "nowhere"]


def test_it_computes_counts_and_keeps_nothing():
    module = torchcache()(Net())
    module(X[:2])
    cache = cache_of(module)
    before = cache.stats()
    cache.explain(X)
    assert cache.stats() == before


def test_it_prints_what_it_returns(capsys):
    module = Cached()
    explanation = module.cache_instance.explain(X)
    assert capsys.readouterr().out == f"{explanation}\n"
    shown = str(explanation)
    for part in ("code function helper", "construction arguments", "option version", "mode", "weights linear.weight"):
        assert part in shown
    for part in ("state scale", "state name OFFSET", "argument shift", "tensor x", "sample 3", explanation.module_hash):
        assert part in shown
    assert len(shown.splitlines()) == 1 + len(explanation.parts) + 4


def test_it_names_the_key_that_the_call_uses():
    module = Cached()
    explanation = module.cache_instance.explain(X)
    module(X)
    again = module.cache_instance.explain(X)
    assert explanation.module_hash == module.cache_instance.module_hash
    assert explanation.namespace == again.namespace
    assert explanation.differences(again) == []
    assert {sample.found_in for sample in again.samples} == {"memory"}


CHANGES = {
    "weights linear.weight": lambda module: module.linear.weight.data.mul_(2),
    "weights linear.bias": lambda module: module.linear.bias.zero_(),
    "state scale": lambda module: setattr(module, "scale", 3),
    "state training": lambda module: setattr(module, "training", False),
    "state linear.in_features": lambda module: setattr(module.linear, "in_features", 7),
    "state name OFFSET": lambda _module: globals().__setitem__("OFFSET", 3),
    "code function helper": lambda _module: setattr(helper, "__code__", (lambda x: x * OFFSET + 1).__code__),
    "mode": lambda _module: torch.set_float32_matmul_precision("high"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_part_that_changed_is_the_one_that_differs(name, monkeypatch):
    monkeypatch.setitem(globals(), "OFFSET", 2)
    monkeypatch.setattr(helper, "__code__", helper.__code__)
    precision = torch.get_float32_matmul_precision()
    module = Cached()
    before = module.cache_instance.explain(X)
    try:
        CHANGES[name](module)
        after = module.cache_instance.explain(X)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert names_that_differ(before, after) == {name}
    assert before.namespace != after.namespace


def test_arguments_and_construction_arguments_and_options_differ_by_name():
    one, other = Cached(scale=2), Cached(scale=2)
    assert one.cache_instance.explain(X).differences(other.cache_instance.explain(X)) == []
    assert names_that_differ(
        one.cache_instance.explain(X, 1), one.cache_instance.explain(X, shift=2)
    ) == {"argument shift"}  # fmt: skip
    scaled = Cached(scale=3)
    assert names_that_differ(one.cache_instance.explain(X), scaled.cache_instance.explain(X)) == {
        "construction arguments", "state scale",
    }  # fmt: skip
    versioned = Cached()
    versioned.torchcache_version = "2"
    assert names_that_differ(one.cache_instance.explain(X), versioned.cache_instance.explain(X)) == {"option version"}


def test_samples_differ_by_their_place():
    module = Cached()
    cache = module.cache_instance
    other = X.clone()
    other[2, 1] += 1e-3
    (line,) = cache.explain(X).differences(cache.explain(other))
    assert line.startswith("sample 2: ")
    assert cache.explain(X).differences(cache.explain(X[:3])) == [
        f"sample 3: {cache.explain(X).samples[3].digest[:8]} / absent"
    ]


def test_it_says_why_a_call_would_not_be_cached():
    module = torchcache()(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)))
    explanation = cache_of(module).explain(X)
    assert explanation.bypass_reason == "dropout_in_training_mode"
    assert "goes around the cache: dropout_in_training_mode" in str(explanation)
    assert cache_of(module.eval()).explain(X).bypass_reason is None


def test_it_explains_functions_and_methods_of_instances():
    function = torchcache()(lambda x, scale=1: x * scale)
    function(X)
    assert {s.found_in for s in cache_of(function).explain(X, scale=1).samples} == {"memory"}
    module = nn.Linear(3, 2)
    module.forward = lambda x: x * 2
    torchcache()(module)
    module(X)
    assert {s.found_in for s in cache_of(module).explain(X).samples} == {"memory"}


def test_what_a_call_would_refuse_it_refuses_too():
    module = Cached()
    with pytest.raises(UncacheableError, match="one dimension only"):
        module.cache_instance.explain(X[0])


def test_a_module_that_is_gone_cannot_be_explained():
    with pytest.raises(ConfigError, match="keep a reference"):
        Cached().cache_instance.explain(X)


def test_it_pickles():
    module = Cached()
    explanation = module.cache_instance.explain(X)
    assert pickle.loads(pickle.dumps(explanation)) == explanation
