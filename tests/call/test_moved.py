"""What moves at each call, or during it, is named: in the log, in ``stats()`` and by ``explain``."""

from __future__ import annotations

import argparse
import logging

import pytest
import torch
from torch import nn

from torchcache import cache_of, torchcache

X = torch.rand(3, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.step = 0
        self.cfg = argparse.Namespace(rate=0.1, out="a")
        self.seen = {"images": [1]}

    def forward(self, x):
        return self.linear(x) + 0 * (self.step + len(self.cfg.out) + len(self.seen["images"]))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)
    return lambda word: [record.getMessage() for record in caplog.records if word in record.getMessage()]


def cached(module):
    return torchcache()(module.eval().requires_grad_(False))


def test_what_changes_at_every_call_is_named_with_its_values(said, capsys):
    module = cached(Net())
    for step in range(6):
        module.step = step
        module.cfg.out = "b" * step
        module.seen["images"].append(step)
        module(X)
    (line,) = said("change at every call")
    assert "cfg.out ('bbb' -> 'bbbb')" in line
    assert "step (3 -> 4)" in line
    assert "seen['images'] (" in line
    assert "ignore=(...)" in line
    assert cache_of(module).stats().moved == {"cfg.out": 2, "step": 2, "seen['images']": 2}
    explanation = cache_of(module).explain(X)
    assert "step (4 -> 5)" in explanation.moved
    assert "moved last: cfg.out" in capsys.readouterr().out


def test_what_moves_during_calls_is_named_after_three_in_a_row(said):
    class Counting(Net):
        def forward(self, x):
            self.step += 1
            return self.linear(x) * self.step

    module = cached(Counting())
    for i in range(2):
        module(X + i)
    assert said("while rows were computed") == []
    module(X + 2)
    (line,) = said("while rows were computed")
    assert "step (2 -> 3) changed" in line
    assert "3 times in a row" in line
    assert "ignore=('step',)" in line
    assert cache_of(module).stats().moved == {"step": 3}


def test_weights_that_a_call_writes_are_named(said):
    class Learning(Net):
        def forward(self, x):
            with torch.no_grad():
                self.linear.weight.add_(1)
            return self.linear(x)

    module = cached(Learning())
    for i in range(3):
        module(X + i)
    (line,) = said("while rows were computed")
    assert "weight linear.weight changed" in line
    assert "ignore" not in line
    assert cache_of(module).stats().moved == {"linear.weight": 3}


def test_trained_weights_are_named_with_what_they_were(said):
    module = torchcache()(Net())
    for _ in range(5):
        module(X)
        with torch.no_grad():
            module.linear.bias.add_(1)
    (line,) = said("change at every call")
    assert "weight linear.bias" in line
    assert set(cache_of(module).stats().moved) == {"linear.bias"}


def test_a_setting_that_changes_at_every_call_is_named(said):
    module = cached(Net())
    for i in range(5):
        torch.set_default_dtype((torch.float32, torch.float64)[i % 2])
        module.step = i
        try:
            module(X)
        finally:
            torch.set_default_dtype(torch.float32)
    assert "default dtype" in said("change at every call")[0]


def test_the_first_reason_stays_the_reason():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.linear(x))

    module = torchcache()(Normed().requires_grad_(False))
    for i in range(6):
        module(X + i)
    assert cache_of(module).stats().bypasses == {"batch_norm_in_training_mode": 6}


def test_paths_are_counted_one_by_one_up_to_a_bound():
    module = torchcache()(nn.Sequential(*[nn.Linear(4, 4) for _ in range(40)]).requires_grad_(False))
    for _ in range(12):
        module(X)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    assert len(cache_of(module).stats().moved) <= 33
