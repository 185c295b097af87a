"""A program that caches calls of several forms in the directory that it is given, and prints what was computed.

``cache.tar.xz`` holds the directory that it left when the format of records was 1, by Python 3.11: all of it must be
read today. Where the format of records or what a key consists of is changed on purpose, it is made anew:
``python tests/golden/program.py DIR; tar -C DIR --exclude lock.mdb -cJf tests/golden/cache.tar.xz .``
"""

from __future__ import annotations

import json
import math
import sys

import torch
from torch import nn

from torchcache import cache_of, flush_all, sample_keys, torchcache

ON_DISK = {"persistent": True, "persistent_cache_dir": sys.argv[1]}


def numbers(*shape, seed=0):
    """Return numbers that are the same bits on every machine."""
    return ((torch.arange(math.prod(shape)) * (seed + 7) % 31 - 15) / 8).view(shape)


@torchcache(**ON_DISK)
class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(8, width)
        self.linear.weight.data = numbers(width, 8, seed=1)
        self.linear.bias.data = numbers(width, seed=2)
        self.eval().requires_grad_(False)

    def forward(self, x):
        return {"linear": self.linear(x), "pair": (x * 2, "text")}


@torchcache(**ON_DISK)
def scaled(x, factor=2):
    return x * factor


@torchcache(batch_dim=None, **ON_DISK)
def whole(x, number):
    return [x + number, {"number": int(number), "array": x.numpy()}]


@torchcache(padded={"x": "mask"}, **ON_DISK)
def padded(x, mask):
    return x * 2 * mask[..., None]


@torchcache(zstd_compression=True, persistent_module_hash="named", **ON_DISK)
def named(x):
    return x.repeat(1, 64).half()


class Model:
    @torchcache(**ON_DISK)
    def encode(self, x):
        return x + 1


def main():
    x, model, net = numbers(6, 8), Model(), Net(4)
    other = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval().requires_grad_(False)
    other[0].weight.data, other[0].bias.data = numbers(8, 8, seed=3), numbers(8, seed=4)
    torchcache(**ON_DISK)(other)
    for start, end in ((0, 3), (2, 6)):
        for target in (net, scaled, named, model.encode, other):
            target(x[start:end])
        scaled(x[start:end], factor=3)
        with sample_keys(list(range(start, end))):
            scaled(x[start:end], factor=5)
    for i in range(3):
        whole(x[i], i)
    mask = torch.ones(4, 5)
    mask[1, 3:] = 0
    padded(numbers(4, 5, 3), mask)
    padded(numbers(3, 5, 3, seed=5), mask[1:])
    flush_all()
    caches = {
        "net": net, "scaled": scaled, "whole": whole, "padded": padded, "named": named, "method": model.encode,
        "other": other,
    }  # fmt: skip
    stats = {name: cache_of(target).stats() for name, target in caches.items()}
    counts = {name: {"misses": s.misses, "hits": s.hits, "faults": dict(s.faults)} for name, s in stats.items()}
    print(json.dumps(counts))
    print(json.dumps({name: cache_of(target).module_hash for name, target in caches.items()}))


if __name__ == "__main__":
    main()
