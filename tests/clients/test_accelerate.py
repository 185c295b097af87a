"""Modules under accelerate and under Lightning's Fabric, which put wrappers and hooks around them."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.clients.two_programs import run_program
from torchcache import cache_of, torchcache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("lightning") is None,
        reason="needs accelerate and lightning (requirements-clients.txt)",
    ),
]

N_ROWS = 6
X = torch.rand(N_ROWS, 4, generator=torch.Generator().manual_seed(0))


def make_encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval().requires_grad_(False)


def train_around(encoder, prepare, backward):
    whole = nn.Sequential(encoder, nn.Linear(4, 2))
    optimizer = torch.optim.SGD(whole[1].parameters(), 0.1)
    whole, optimizer = prepare(whole, optimizer)
    for _ in range(2):
        backward(whole(X).sum())
        optimizer.step()
        optimizer.zero_grad()


def programs(folder, mode):
    """Use an encoder in each way; yield the name of the way, hits and misses, and whether the result was right."""
    import lightning
    from accelerate import Accelerator, dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    warnings.simplefilter("ignore")
    accelerator, fabric = Accelerator(cpu=True), lightning.Fabric(accelerator="cpu", devices=1)
    fabric.launch()

    def cached(name, module):
        return torchcache(persistent=True, persistent_cache_dir=folder / name.replace(" ", "_"), mode=mode)(module)

    def report(name, encoder):
        stats = cache_of(encoder).stats()
        cache_of(encoder).close()
        said = {"name": name, "hits": stats.hits, "misses": stats.misses, "bypasses": dict(stats.bypasses)}
        return {**said, "is_right": torch.equal(encoder(X), make_encoder()(X))}

    encoder = cached("a child under accelerate", make_encoder())
    train_around(encoder, accelerator.prepare, accelerator.backward)
    yield report("a child under accelerate", encoder)

    encoder = cached("a child under Fabric", make_encoder())
    train_around(encoder, fabric.setup, fabric.backward)
    yield report("a child under Fabric", encoder)

    for name, wrap in {
        "prepared": accelerator.prepare,
        "set up": fabric.setup_module,
        "dispatched": lambda module: dispatch_model(module, {"": "cpu"}, force_hooks=True),
        "with a hook": lambda module: add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True)),
    }.items():
        encoder = cached(name, wrap(make_encoder()))
        for _ in range(2):
            encoder(X)
        yield report(name, encoder)


def test_modules_under_accelerate_and_fabric_hit_in_the_next_program(tmp_path):
    for seed, mode in enumerate(("on", "require")):
        output = run_program("tests.clients.test_accelerate", tmp_path, mode, seed=seed)
        said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert len(said) == 6, output
        expected = (N_ROWS, N_ROWS) if mode == "on" else (2 * N_ROWS, 0)
        for one in said:
            assert (one["hits"], one["misses"], one["bypasses"], one["is_right"]) == (*expected, {}, True), one["name"]


def test_a_hook_of_ones_own_counts():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Add(ModelHook):
        def __init__(self, summand):
            self.summand = summand

        def post_forward(self, module, output):
            return output + self.summand

    plain = make_encoder()
    hook = Add(1.0)
    add_hook_to_module(plain[2], hook)
    encoder = torchcache()(plain)
    for summand in (1.0, 2.0, 1.0):
        hook.summand = summand
        assert torch.equal(encoder(X), make_encoder()(X) + summand)
    assert cache_of(encoder).stats().misses == 2 * N_ROWS


if __name__ == "__main__":
    for said in programs(Path(sys.argv[1]), sys.argv[2]):
        print(json.dumps(said), flush=True)
