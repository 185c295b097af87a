"""Instances of a class share the walk over its code, and each of them notices when the code changes."""

from __future__ import annotations

import abc
import gc
import itertools
import textwrap
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from tests.keys.test_noticed import X, program
from torchcache import disabled, torchcache
from torchcache.keys.code import walk_code

TEXT = """
class Abstract(abc.ABC):
    pass

class Own:
    pass

own = Own()
TABLE = {"f": lambda x: x}

class Helper:
    def apply(self, x):
        return x

def scale(x, factor=2):
    return x * factor

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gelu = nn.GELU()
        self.helper = Helper()

    def forward(self, x):
        x = TABLE["f"](scale(self.helper.apply(x)))
        if hasattr(x, "added_later"):
            x = x.added_later()
        return self.gelu(x) + (1 if isinstance(own, Abstract) else 0)
"""


def _replace_function(names, monkeypatch):
    names["scale"] = program("def scale(x): return x * 3")["scale"]


def _replace_code(names, monkeypatch):
    names["scale"].__code__ = program("def scale(x, factor): return x * factor + 1")["scale"].__code__


def _replace_default(names, monkeypatch):
    names["scale"].__defaults__ = (5,)


def _replace_method(names, monkeypatch):
    names["Helper"].apply = program("def apply(self, x): return x + 7")["apply"]


def _register(names, monkeypatch):
    names["Abstract"].register(names["Own"])


def _put_into_a_library(names, monkeypatch):
    monkeypatch.setattr(F, "gelu", program("def gelu(x, **options): return x * 11")["gelu"])


def _put_into_a_table(names, monkeypatch):
    names["TABLE"]["f"] = program("def f(x): return x - 4")["f"]


def _add_to_tensors(names, monkeypatch):
    method = program("def added_later(self): return self - 9")["added_later"]
    monkeypatch.setattr(torch.Tensor, "added_later", method, raising=False)


CHANGES = [
    _replace_function, _replace_code, _replace_default, _replace_method, _register, _put_into_a_library,
    _put_into_a_table, _add_to_tensors,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_each_instance_notices_that_code_changed_whoever_looks_first(change, order, monkeypatch):
    names = program(textwrap.dedent(TEXT), abc=abc)
    model = torchcache()(names["Model"])
    instances = [model().eval() for _ in range(2)]
    for instance in instances:
        instance(X)
        instance(X + 1)
    change(names, monkeypatch)
    instances.append(model().eval())  # which walks after the change
    for i in order:
        with disabled():
            expected = instances[i](X)
        for _ in range(2):
            assert torch.equal(instances[i](X), expected)


def test_a_walk_is_shared_as_long_as_the_code_is_the_same_and_somebody_follows_it():
    names = program(textwrap.dedent(TEXT), abc=abc)
    model = names["Model"]
    walk = walk_code(model, [model, nn.GELU])
    assert walk_code(model, [model, nn.GELU]) is walk
    assert walk_code(model, [model]) is not walk
    assert walk_code(model, [model, nn.GELU], entry="other") is not walk

    names["scale"] = program("def scale(x): return x * 3")["scale"]
    other = walk_code(model, [model, nn.GELU])
    assert other.fingerprint != walk.fingerprint
    assert walk.has_changed()
    assert walk.has_changed(), "whoever asks is told"

    reference = weakref.ref(other)
    del other
    gc.collect()
    assert reference() is None


def test_a_class_that_took_the_place_of_another_in_memory_has_a_walk_of_its_own():
    for factor in range(2, 40):
        names = program(f"class Model(nn.Module):\n    def forward(self, x): return x * {factor}")
        model = torchcache()(names["Model"])().eval()
        assert torch.equal(model(X), X * factor)
        del names, model
        gc.collect()
