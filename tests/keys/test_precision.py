"""Each switch of torch that changes what float32 is computed in makes another key, and stops no caching."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchcache.keys.fast import mode

#: Each has a process of its own: what torch was told in one way, it may refuse to tell in another.
PROGRAM = """
import json, os, sys, warnings

warnings.simplefilter("ignore")
import torch
from torch import nn
from torchcache import cache_of, disabled, torchcache

torch.set_num_threads(1)
X = torch.randn(4, 64)


def try_out(switch):
    module = torchcache()(nn.Linear(64, 64).requires_grad_(False))
    module(X)
    module(X)
    before = cache_of(module).stats()
    exec(switch)
    with disabled():
        plain = module(X)
    results = [module(X) for _ in range(2)]
    module(torch.cat([X, X + 1]))  # has its rows checked, with a tolerance that depends on the precision
    after = cache_of(module).stats()
    return {
        "hits": before.hits,
        "misses": after.misses - before.misses,
        "hits after": after.hits - before.hits,
        "bypasses": dict(after.bypasses),
        "faults": dict(after.faults),
        "is right": all(torch.equal(result, plain) for result in results),
    }


for switch in json.load(sys.stdin):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            print(json.dumps(try_out(switch)), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""

OLD = [
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
]
NEW = [
    f"torch.backends.{place}.fp32_precision = {value!r}"
    for place, value in (
        ("cuda.matmul", "tf32"), ("cudnn.conv", "ieee"), ("cudnn.rnn", "ieee"), ("cudnn", "tf32"), ("cudnn", "ieee"),
        ("mkldnn.matmul", "bf16"), ("mkldnn.matmul", "tf32"), ("mkldnn.conv", "bf16"), ("mkldnn.rnn", "tf32"),
        ("mkldnn", "bf16"),
    )
] + [f"torch.backends.fp32_precision = {value!r}" for value in ("tf32", "bf16", "ieee")]  # fmt: skip
MIXED = [
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.cudnn.rnn.fp32_precision = 'ieee'; torch.backends.cuda.matmul.allow_tf32 = True",
]
EINSUM = [
    "torch.backends.opt_einsum.enabled = False",
    "torch.backends.opt_einsum.strategy = 'greedy'",
    "torch.backends.opt_einsum.set_flags(_enabled=True, _strategy='optimal')",
]
HAS_NEW = hasattr(torch._C, "_get_fp32_precision_getter")


def test_each_switch_makes_another_key_and_stops_no_caching():
    switches = [*OLD, *EINSUM, *(NEW + MIXED if HAS_NEW else [])]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(switches), capture_output=True, text=True, timeout=240,
        check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    seen = dict(zip(switches, map(json.loads, done.stdout.splitlines()), strict=True))
    expected = {"hits": 4, "misses": 8, "hits after": 8, "bypasses": {}, "faults": {}, "is right": True}
    assert seen == dict.fromkeys(switches, expected), done.stderr


def test_a_torch_that_has_no_new_switches_is_asked_for_the_old_ones(monkeypatch):
    monkeypatch.setattr(mode, "_PRECISION", None)
    monkeypatch.setattr(mode, "_FLAGS", tuple(getattr(torch._C, name) for name in mode._OLD_PRECISIONS))
    before = mode.current_mode()
    assert not mode.is_precision_reduced()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert mode.current_mode() != before
        assert mode.is_precision_reduced()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert mode.current_mode() == before


@pytest.mark.skipif(not HAS_NEW, reason="the switches are newer than this torch")
@pytest.mark.parametrize("place", [("mkldnn", "matmul"), ("mkldnn", "conv"), ("cuda", "matmul")])
def test_rows_are_compared_more_loosely_where_a_new_switch_reduces_the_precision(place):
    value = {"mkldnn": "bf16", "cuda": "tf32"}[place[0]]
    before = torch._C._get_fp32_precision_getter(*place)
    assert not mode.is_precision_reduced()
    torch._C._set_fp32_precision_setter(*place, value)
    try:
        assert mode.is_precision_reduced()
    finally:
        torch._C._set_fp32_precision_setter(*place, before)
    assert not mode.is_precision_reduced()
