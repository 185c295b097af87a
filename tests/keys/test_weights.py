"""Weights that training code writes in ways that torch does not count are never answered from stale results."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from torchcache import cache_of, disabled, torchcache
from torchcache.keys import weights
from torchcache.keys.fast import host_memory

EPOCHS = 5

ROWS = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(12).reshape(6, 2)


def epochs(make, train, x, *, no_grad=True):
    """Run a program of several epochs with a cache and without; return how many rows were hits.

    Each epoch evaluates the module twice on the same batches, before and after ``train(module, epoch)``.
    """

    def run(module):
        results = []
        for epoch in range(EPOCHS):
            for _ in range(2):
                with torch.set_grad_enabled(not no_grad):
                    results += [module(batch).detach().clone() for batch in x.split(3)]
            train(module, epoch)
            with torch.set_grad_enabled(not no_grad):
                results += [module(batch).detach().clone() for batch in x.split(3)]
        return results

    torch.manual_seed(0)
    plain = run(make())
    torch.manual_seed(0)
    cached = torchcache(check_rows=False)(make())
    assert all(map(torch.equal, run(cached), plain))
    hits = cache_of(cached).stats().hits
    assert hits >= EPOCHS * len(x), "each second evaluation hits"
    return hits


class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 8)
        self.head = nn.Linear(8, 4)
        self.head.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


@pytest.mark.filterwarnings("ignore:parameters require grad")
@pytest.mark.parametrize("no_grad", [True, False])
def test_textual_inversion_computes_what_it_does_without_a_cache(no_grad):
    rows = torch.randn(EPOCHS, 8, generator=torch.Generator().manual_seed(2))

    def train(module, epoch):
        module.embedding.weight.data[5] = rows[epoch]  # far from both ends

    epochs(TextEncoder, train, TOKENS, no_grad=no_grad)


def mlp():
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)).eval()


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trainable", "frozen"])
def test_averaged_weights_that_are_swapped_in_and_out_compute_what_they_do_without_a_cache(is_frozen):
    averages = {}

    def train(module, epoch):
        generator = torch.Generator().manual_seed(epoch)
        average = averages.setdefault(module, copy.deepcopy(list(module.parameters())))
        for mean, parameter in zip(average, module.parameters(), strict=True):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
            mean.data.lerp_(parameter.data, 0.5)
            kept = parameter.data.clone()
            parameter.data.copy_(mean.data)
            mean.data.copy_(kept)

    epochs(lambda: mlp().requires_grad_(not is_frozen), train, ROWS)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("way", ["plain", "foreach", "fused"])
def test_steps_of_optimizers_compute_what_they_do_without_a_cache(kind, way):
    optimizers = {}

    def train(module, epoch):
        if module not in optimizers:
            options = {"foreach": False} if way == "plain" else {way: True}
            optimizers[module] = getattr(torch.optim, kind)(module.parameters(), lr=0.1, **options)
        with disabled():
            module(ROWS).square().mean().backward()
        optimizers[module].step()
        optimizers[module].zero_grad()

    epochs(mlp, train, ROWS)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trainable", "frozen"])
def test_modules_made_in_inference_mode_compute_what_they_do_without_a_cache(is_frozen):
    def make():
        with torch.inference_mode():
            return mlp().requires_grad_(not is_frozen)

    def train(module, epoch):
        with torch.inference_mode():
            module[2].weight[30, 30 + epoch] += 10  # one element, far from both ends

    epochs(make, train, ROWS)


WRITES = {
    "one element through data": lambda p: p.data[30].add_(1),
    "one element through NumPy": lambda p: p.detach().numpy()[30].__iadd__(1),
    "a storage": lambda p: p.untyped_storage().fill_(64),
    "set_": lambda p: p.data.set_(p.detach() * 2),
    "a storage at the same address": lambda p: p.untyped_storage().__setitem__(200, 7),
    "two assignments of data": lambda p: (
        setattr(p, "data", torch.zeros_like(p)), setattr(p, "data", torch.ones_like(p)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("way", ["as it is", "transposed", "a part", "float16"])
def test_every_write_to_what_requires_grad_is_noticed_at_once(write, way):
    def make():
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
        weight = {"transposed": weight.t(), "a part": weight[:, 8:40], "float16": weight.half()}.get(way, weight)
        return nn.Parameter(weight)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = make()

        def forward(self, x):
            return x * self.weight.float().flatten()

    module = torchcache(check_rows=False)(Net())
    x = torch.arange(1.0, 3.0)[:, None]
    with torch.no_grad():
        module(x)
        module(x)
        assert cache_of(module).stats().hits == 2
        WRITES[write](module.weight)
        with disabled():
            changed = module(x)
        assert torch.equal(module(x), changed)


def test_every_byte_of_frozen_weights_is_compared_within_the_promised_number_of_calls():
    n_bytes, x = 40 * weights.LEAF_BYTES, torch.ones(1, 1)
    calls = n_bytes // weights._BYTES_IN_TURN + 20
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(n_bytes // 4), requires_grad=False)

        def forward(self, x):
            return x + self.table.sum()

    for place in (17, n_bytes // 8, n_bytes // 4 - 17):
        module = torchcache(check_rows=False)(Net())
        module(x)
        module.table.data[place] = 1
        results = [module(x).item() for _ in range(calls)]
        assert results[-1] == 2
        # Once noticed it stays so.
        assert sorted(results) == results


def test_every_byte_is_compared_in_time_also_where_other_state_changes_at_each_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.thawed = nn.Parameter(torch.ones(1))
            self.tables = nn.ParameterList(torch.zeros(20, weights.LEAF_BYTES // 4) for _ in range(2))

        def forward(self, x):
            return x + self.tables[1].sum()

    module, x = torchcache(check_rows=False)(Net().requires_grad_(False)), torch.ones(1, 1)
    module(x)
    module.tables[1].data[19, 17] = 1
    with torch.no_grad():
        for number in range(40 * weights.LEAF_BYTES // weights._BYTES_IN_TURN + 20):
            module.train(number % 2 == 0)
            module.thawed.requires_grad_(number % 3 == 0)
            result = module(x)
    assert result.item() == 2


def test_the_more_a_call_hashes_the_larger_is_the_share_that_is_compared():
    n_bytes = 400 * weights.LEAF_BYTES
    module = torchcache(check_rows=False)(nn.Linear(1024, n_bytes // 4096, bias=False).requires_grad_(False))
    x = torch.randn(256, 1024)
    module(x)
    module.weight.data[-20, 500] = 100
    with disabled():
        changed = module(x)
    calls = n_bytes // (weights._BYTES_IN_TURN + x.nbytes // weights._HASHED_PER_BYTE_IN_TURN) + 20
    assert calls < n_bytes // weights._BYTES_IN_TURN / 2
    for _ in range(calls):
        result = module(x)
    assert torch.equal(result, changed)


def test_freezing_and_thawing_keeps_what_was_hashed():
    module = torchcache(check_rows=False)(nn.Linear(64, 64).requires_grad_(False))
    x = torch.randn(2, 64)
    module(x)
    module.weight.data[30, 30] = 100  # not seen at once ...
    module.requires_grad_(True)  # ... but now all of it is compared
    with torch.no_grad():
        with disabled():
            changed = module(x)
        assert torch.equal(module(x), changed)


def test_a_change_that_comes_with_another_one_is_noticed_too():
    module = torchcache(check_rows=False)(mlp())
    with torch.no_grad():
        for eps in (0.1, 0.5):
            module[3].eps = eps
            module(ROWS)
        module[3].eps = 0.1
        module[2].weight.data[30, 30] = 100
        with disabled():
            changed = module(ROWS)
        assert torch.equal(module(ROWS), changed)


@pytest.mark.parametrize("made_in", ["inference mode", "the usual way"])
def test_what_it_costs_to_compare_large_weights_at_each_call_is_said_once(made_in, caplog):
    with torch.inference_mode(made_in == "inference mode"):
        linear = nn.Linear(2048, 1500).requires_grad_(made_in != "inference mode")
    module = torchcache()(linear)
    with torch.no_grad():
        for _ in range(2):
            module(torch.ones(2, 2048))
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "12 MB, some 1 ms" in line
    assert "requires_grad_(False)" in line


def test_the_line_about_parameters_that_require_grad_says_what_comparing_them_costs(caplog):
    module = torchcache()(nn.Linear(2048, 1500))
    for _ in range(2):
        module(torch.ones(2, 2048))
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "will not be trained" in line
    assert "12 MB, some 1 ms at each call" in line


def test_the_ends_of_weights_on_a_device_are_compared(monkeypatch):
    """On this machine the host stands for the device."""
    monkeypatch.setattr(host_memory, "_place_of", lambda _: None)
    monkeypatch.setattr(weights, "_is_on_device", lambda _: True)
    optimizers = {}

    def train(module, epoch):
        if module not in optimizers:
            optimizers[module] = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        with disabled():
            module(ROWS).square().mean().backward()
        optimizers[module].step()
        optimizers[module].zero_grad()

    epochs(lambda: mlp().to(memory_format=torch.contiguous_format), train, ROWS)


def test_a_write_just_before_weights_are_frozen_is_noticed_at_once():
    module, x = torchcache(check_rows=False)(nn.Linear(64, 64)), torch.randn(8, 64)
    with torch.no_grad():
        module(x)
        module.weight.data[20:40] -= 1.0
        module.requires_grad_(False)
        with disabled():
            expected = module(x)
        assert torch.equal(module(x), expected)
