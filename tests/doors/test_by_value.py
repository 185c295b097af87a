"""What was decorated in a script is sent by value, as joblib, dask and ray do, and is cached in the same place."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from tests.storage.children import run
from torchcache import CachedDataset

#: Everything of it is in ``__main__``, which the other process has not got.
SCRIPT = """
import dataclasses, enum, json, sys
import cloudpickle, torch
from torch import nn
import torchcache

root, pickled, use = sys.argv[1:]
options = dict(persistent=True, persistent_cache_dir=root)


class Sign(enum.Enum):
    PLUS = 1
    MINUS = -1


@dataclasses.dataclass
class Config:
    scale: float = 2.0
    sign: Sign = Sign.PLUS


config = Config()


def helper(x):
    return x * config.scale if config.sign is Sign.PLUS else -x


@torchcache.torchcache(**options)
def function(x, depth=0):
    return helper(x) if depth == 0 else function(x, depth - 1)


def make(k):
    @torchcache.torchcache(**options)
    def closure(x):
        return x * k

    return closure


@torchcache.torchcache(**options)
class Base(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.linear = nn.Linear(3, n)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.requires_grad_(False)

    def forward(self, x):
        return helper(self.linear(x))


class Derived(Base):
    def __init__(self):
        super().__init__(5)
        self.shift = 4

    def forward(self, x):
        return super().forward(x) + self.shift


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return helper(x * self.weight)

    def encode(self, x):
        return x * self.weight + 7


class Object:
    def __init__(self):
        self.factor = 2

    @torchcache.torchcache(**options)
    def encode(self, x):
        return Object.more(x) * self.factor

    @staticmethod
    @torchcache.torchcache(**options)
    def static(x):
        return x - 1

    @staticmethod
    def more(x):
        return x + 1


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return helper(torch.full((3,), float(i)))


an_object = Object()
targets = dict(
    function=function,
    closure=make(3),
    base=Base(),
    derived=Derived(),
    instance=torchcache.torchcache(**options)(Plain()),
    bound=torchcache.torchcache(**options)(Plain().encode),
    method=an_object.encode,
    static=Object.static,
    dataset=torchcache.CachedDataset(Items(), **options),
)
caches = {name: torchcache.cache_of(target) for name, target in targets.items() if name != "dataset"}


def task():
    x = torch.arange(12.0).reshape(4, 3)
    found = {}
    for name, target in targets.items():
        rows = torch.stack([target[i] for i in range(4)]) if name == "dataset" else target(x)
        cache = torchcache.cache_of(target)
        stats = cache.stats()
        assert name not in caches or caches[name].module_hash == cache.module_hash
        found[name] = [cache.module_hash, str(cache.cache_dir), rows.tolist(), stats.misses, dict(stats.bypasses)]
    return found


if use == "used":
    print(json.dumps(task()))
with open(pickled, "wb") as file:
    cloudpickle.dump(task, file)
if use == "unused":
    print(json.dumps(task()))
"""

ELSEWHERE = """
import json, pickle, sys

with open(sys.argv[1], "rb") as file:
    task = pickle.load(file)
print(json.dumps(task()))
"""


@pytest.mark.parametrize("use", ["unused", "used"])
def test_what_came_by_value_finds_what_the_original_computed(tmp_path, use):
    root, pickled = tmp_path / "cache", tmp_path / "pickled"
    here = json.loads(run(SCRIPT, root, pickled, use))
    there = json.loads(run(ELSEWHERE, pickled))
    assert here.keys() == there.keys()
    for name, (module_hash, place, rows, misses, bypasses) in here.items():
        assert (misses, bypasses) == (4, {}), name
        assert there[name] == [module_hash, place, rows, 0, {}], name


def test_the_cache_of_a_dataset_says_what_to_send():
    cached = CachedDataset(torch.utils.data.TensorDataset(torch.ones(2, 3)))
    with pytest.raises(TypeError, match="send what it is the cache of"):
        pickle.dumps(cached.cache_instance)


PARALLEL = """
import sys, torch
from joblib import Parallel, delayed
import torchcache


class Encoder:
    def __init__(self):
        self.k = 2

    @torchcache.torchcache(persistent=True, persistent_cache_dir=sys.argv[1])
    def encode(self, x):
        return x * self.k


encoder = Encoder()


def task(i):
    assert (encoder.encode(torch.full((1, 3), float(i))) == 2 * i).all()
    return encoder.encode.cache_instance.stats().misses


if __name__ == "__main__":
    results = Parallel(n_jobs=2)(delayed(task)(i) for i in range(6))
    assert len(results) == 6
    print(sum(results))
"""


def test_joblib_s_workers_compute_nothing_twice(tmp_path):
    assert int(run(PARALLEL, tmp_path, timeout_seconds=60)) >= 6
    assert run(PARALLEL, tmp_path, timeout_seconds=60) == "0\n"
