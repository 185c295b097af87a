"""Results that are more than one tensor: any pytree with the batch in front, and plain values beside it."""

from __future__ import annotations

import collections
import enum
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from torchcache import UncacheableError, cache_of, torchcache


class Pair(NamedTuple):
    features: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Scored:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    label: str = "none"


@dataclass(frozen=True, slots=True)
class Sealed:
    features: torch.Tensor


class Kind(enum.Enum):
    DENSE = 1


def forms(x):
    """Return results of all forms for a batch."""
    half, count = x.half(), (x > 0).sum(1)
    return {
        "tuple": (x * 2, half, count),
        "list": [x * 2, [half]],
        "dict": {"b": x * 2, "a": half},
        "ordered": collections.OrderedDict(b=x * 2, a=count),
        "named tuple": Pair(x * 2, x > 0),
        "dataclass": Scored(x * 2, (half, count), "seen"),
        "nested": {"layers": [(x, Pair(half, x > 0))], "kind": Kind.DENSE, "none": None},
        "plain values": {"x": x, "eps": 1e-5, "name": "net", "on": True, "dtype": torch.half, "zero": -0.0},
        "images": (x.repeat(1, 2).reshape(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last), x[:, 0]),
    }


FORMS = list(forms(torch.zeros(2, 6)))


def same(a, b):
    """Tell whether two results are the same, bit for bit and type for type."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        is_alike = a.dim() < 4 or a.is_contiguous() == b.is_contiguous()
        return is_alike and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Scored):
        return all(same(getattr(a, name), getattr(b, name)) for name in ("logits", "hidden", "label"))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a is b or a == b


def make(form, **options):
    sizes = []

    @torchcache(**options)
    def function(x):
        sizes.append(len(x))
        return forms(x)[form]

    return function, sizes


X = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS)
def test_a_hit_has_the_form_and_the_bits_of_what_was_returned(form):
    function, sizes = make(form, check_rows=False)
    assert same(function(X), forms(X)[form])
    assert same(function(X), forms(X)[form])
    shuffled = X[[3, 1, 5, 1]]
    assert same(function(shuffled), forms(shuffled)[form])
    assert sizes == [6]


@pytest.mark.parametrize("form", FORMS)
def test_hits_and_computed_rows_are_put_together(form):
    function, _ = make(form)
    function(X[:4])
    assert same(function(X), forms(X)[form])
    assert cache_of(function).stats().misses == 6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zstd", [False, True])
def test_what_was_stored_on_disk_comes_back_in_its_form(form, zstd, cache_dir):
    options = {"persistent": True, "persistent_cache_dir": cache_dir, "zstd_compression": zstd}
    function, _ = make(form, **options)
    function(X)
    cache_of(function).close()
    function, sizes = make(form, **options)
    function(X[:1])  # a class that this cache has not seen is learned from the first row
    assert same(function(X), forms(X)[form])
    assert sum(sizes) <= 1
    assert cache_of(function).stats().store_hits >= 5
    cache_of(function).close()


@pytest.mark.parametrize("form", ["tuple", "named tuple", "dataclass", "nested"])
def test_the_caller_may_write_into_every_leaf(form):
    function, _ = make(form)
    for _ in range(3):
        result = function(X.clone())
        for leaf in torch.utils._pytree.tree_leaves(result):
            parts = (leaf.logits, *leaf.hidden) if isinstance(leaf, Scored) else (leaf,)
            for part in parts:
                if isinstance(part, torch.Tensor):
                    part.zero_()
    assert same(function(X), forms(X)[form])


def test_the_result_is_detached_in_every_leaf():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x):
            return {"y": self.linear(x), "pair": Pair(self.linear(x), x > 0)}

    module = torchcache()(Module())
    for _ in range(2):
        result = module(X)
        assert not result["y"].requires_grad
        assert not result["pair"].features.requires_grad


def test_each_floating_leaf_is_rounded_alike_on_a_miss_and_on_a_hit():
    function = torchcache(cache_dtype=torch.half)(lambda x: (x / 3, (x > 0).sum(1), x.double() / 7))
    first, second = function(X), function(X)
    assert same(first, second)
    assert [leaf.dtype for leaf in second] == [torch.float32, torch.int64, torch.float64]
    assert torch.equal(second[0], (X / 3).half().float())


def test_nan_payloads_signed_zeros_and_subnormals_come_back_bit_for_bit(cache_dir):
    bits = torch.tensor([[0x7FC00001, -0x80000000, 1, 0x7F800001, -0x3FFFFF, 0x00400000]], dtype=torch.int32)

    @torchcache(persistent=True, persistent_cache_dir=cache_dir, max_memory_cache_size=0)
    def function(x):
        values = bits.view(torch.float32).expand(len(x), -1)
        return {"float": values, "double": values.double()[:, 1:3]}

    function(X)
    cache_of(function).flush()
    hit = function(X[2:4])
    assert cache_of(function).stats().store_hits + cache_of(function).stats().queue_hits == 2
    assert torch.equal(hit["float"].view(torch.int32), bits.expand(2, -1))
    cache_of(function).close()


# -- what does not fit ----------


@pytest.mark.parametrize(
    ("output", "place"),
    [
        (lambda x: {"y": x, "loss": x.mean()}, "output['loss']"),
        (lambda x: (x, [x[:1]]), "output[1][0]"),
        (lambda x: Pair(x, x.t()), "output.mask"),
        (lambda x: {"y": x, "other": object()}, "output['other']"),
        (lambda x: {"y": x, "names": {1, 2}}, "output['names']"),
    ],
    ids=["0-d", "one row", "turned", "an object", "a set"],
)
def test_a_result_that_cannot_be_split_is_refused_with_its_place(output, place):
    function = torchcache()(output)
    with pytest.raises(UncacheableError) as caught:
        function(X[:4])
    assert place in str(caught.value)


def test_rows_whose_plain_values_differ_are_computed_together():
    @torchcache(check_rows=False)
    def function(x):
        return {"y": x * 2, "largest": float(x[:, 0].max())}

    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])
    function(a)
    function(b)
    both = torch.cat([a, b])
    result = function(both)
    assert result["largest"] == 5.0
    assert torch.equal(result["y"], both * 2)
    assert cache_of(function).stats().bypasses == {"rows_do_not_stack": 1}


def test_a_plain_value_that_is_the_batch_size_is_never_another_batchs():
    @torchcache()
    def function(x):
        return {"y": x * 2, "n": len(x), "shape": x.shape}

    for n in (4, 2, 6, 4, 2, 6, 3):
        result = function(X[:n])
        assert result["n"] == n
        assert result["shape"] == (n, 6)


def test_a_plain_value_that_happens_to_be_the_batch_size_is_cached_from_the_next_size_on():
    @torchcache(check_rows=False)
    def function(x):
        return {"y": x * 2, "layers": 4}

    function(X[:4])
    assert cache_of(function).stats().dropped_rows == {"plain_value_may_be_batch_size": 4}
    function(X[:5])
    function(X[:4])
    assert cache_of(function).stats().memory_hits == 4


def test_plain_values_that_depend_on_the_batch_are_found_out_with_the_second_one():
    def plain(x):
        return {"y": x * 2, "mean": float(x.mean())}

    function = torchcache()(plain)
    for x in (X[:2], X[2:4], X[4:], X[:1]):
        assert same(function(x), plain(x))
    assert set(cache_of(function).stats().bypasses) == {"rows_depend_on_batch"}


def test_a_frozen_dataclass_with_slots_is_one_class_though_its_methods_lead_to_another():
    @torchcache()
    def compute(x):
        return Sealed(x * 2)

    x = torch.rand(3, 2)
    for _ in range(2):
        assert torch.equal(compute(x).features, x * 2)
    assert cache_of(compute).stats().misses == 3


def test_an_empty_batch_keeps_its_form():
    function = torchcache()(lambda x: {"y": x * 2, "pair": Pair(x, x > 0)})
    result = function(X[:0])
    assert result["y"].shape == (0, 6)
    assert isinstance(result["pair"], Pair)


# -- in another process ----------

PROGRAM = """
import sys
from dataclasses import dataclass
from typing import NamedTuple
import torch
from torch import nn
from torchcache import cache_of, torchcache

class Pair(NamedTuple):
    features: torch.Tensor
    mask: torch.Tensor

@dataclass
class Out:
    pair: Pair
    scale: float

@torchcache(persistent=True, persistent_cache_dir=sys.argv[1])
class Net(nn.Module):
    def forward(self, x):
        return Out(Pair(x * 2, x > 1), 0.5)

module = Net()
out = module(torch.arange(6.0).reshape(3, 2))
assert type(out) is Out and type(out.pair) is Pair and out.scale == 0.5
assert torch.equal(out.pair.mask, torch.arange(6.0).reshape(3, 2) > 1)
print(module.cache_instance.stats().misses)
module.cache_instance.close()
"""


def test_a_later_program_rebuilds_classes_that_its_code_names(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    root = str(Path(__file__).parents[2])
    misses = [
        subprocess.run(
            [sys.executable, "program.py", "cache"], capture_output=True, text=True, timeout=250, check=True,
            cwd=tmp_path, env={"PYTHONPATH": root, "PATH": ""},
        ).stdout.strip()
        for _ in range(2)
    ]  # fmt: skip
    assert misses == ["3", "0"]
