"""The cached call: what comes back, what is computed, what is found again, and what goes around the cache."""

from __future__ import annotations

import enum
import logging
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from torchcache import UncacheableError, cache_of, disabled, torchcache
from torchcache.layout import DTYPE_SIZES
from torchcache.results import rows
from torchcache.results.devices import ResultDevices

DTYPES = [dtype for name in DTYPE_SIZES if (dtype := getattr(torch, name, None)) is not None]
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]


def make(forward, **options):
    """Decorate ``forward(x)`` as a function; return it and the list of the batches that reached it.

    The row that ``check_rows`` adds once is another file's matter.
    """
    seen = []

    @torchcache(**{"check_rows": False, **options})
    def function(x):
        seen.append(x)
        return forward(x)

    return function, seen


def rows_seen(seen):
    return [len(x) for x in seen]


def batch(n=4, width=10, start=0):
    return torch.arange(float(start), float(start + n * width)).reshape(n, width)


def stats_of(target):
    return cache_of(target).stats()


def raw(tensor):
    """Return the bytes of a tensor in row-major order, whatever its dtype."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_same(a, b):
    """Assert that two tensors are the same bit for bit."""
    assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
    assert raw(a) == raw(b)


def random_of(dtype, *shape):
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    noise = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return noise.view(dtype).reshape(shape)


# -- sample by sample ----------


def test_only_missing_rows_are_forwarded():
    function, seen = make(lambda x: x + 1)
    x = batch(8)
    function(x[:5])
    function(x[3:])
    assert rows_seen(seen) == [5, 3]
    assert torch.equal(seen[1], x[5:])


def test_missing_rows_may_lie_anywhere_in_the_batch():
    function, seen = make(lambda x: x + 1)
    x = batch(8)
    function(x[[1, 4, 6]])
    assert torch.equal(function(x), x + 1)
    assert torch.equal(seen[1], x[[0, 2, 3, 5, 7]])


def test_equal_rows_of_a_batch_are_computed_once():
    function, seen = make(lambda x: x + 1)
    x = batch(3)[[0, 1, 0, 2, 1, 0]]
    assert torch.equal(function(x), x + 1)
    assert rows_seen(seen) == [3]
    assert stats_of(function).misses == 3
    assert stats_of(function).duplicates == 3


def test_the_result_is_in_the_order_of_the_batch():
    function, _ = make(lambda x: x + 1)
    x = batch(64)
    function(x[::3])
    for seed in range(5):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        mixed = x[torch.cat([order, order[:10]])]
        assert torch.equal(function(mixed), mixed + 1)


def test_a_batch_of_new_rows_is_forwarded_as_it_is():
    function, seen = make(lambda x: x + 1)
    x = batch()
    function(x)
    assert seen[0] is x


def test_missing_rows_are_forwarded_without_grad_mode():
    modes = []

    @torchcache()
    def function(x):
        modes.append(torch.is_grad_enabled())
        return x + 1

    function(batch())
    assert modes == [False, False], "those that check_rows computes once more as well"


def test_an_empty_batch_gets_an_empty_result():
    function, seen = make(lambda x: x[:, :3] * 2)
    assert_same(function(torch.empty(0, 10)), torch.empty(0, 3))
    function(batch())
    assert_same(function(torch.empty(0, 10)), torch.empty(0, 3))
    assert stats_of(function).misses == 4
    assert not stats_of(function).bypasses
    assert len(seen) >= 1


def test_one_sample_at_a_time_finds_what_a_batch_stored():
    function, seen = make(lambda x: x + 1)
    x = batch()
    function(x)
    for row in x:
        assert torch.equal(function(row.unsqueeze(0)), row.unsqueeze(0) + 1)
    assert rows_seen(seen) == [4]


def test_an_error_of_the_forward_is_the_callers_and_spoils_nothing():
    broken = [True]

    @torchcache()
    def function(x):
        if broken:
            raise ZeroDivisionError("mine")
        return x + 1

    with pytest.raises(ZeroDivisionError, match="mine"):
        function(batch())
    broken.clear()
    assert torch.equal(function(batch()), batch() + 1)
    assert torch.equal(function(batch()), batch() + 1)
    assert stats_of(function).memory_hits == 4


def test_a_forward_may_call_its_own_module():
    class Module(nn.Module):
        def forward(self, x, depth: int = 2):
            return x if depth == 0 else self(x + 1, depth - 1)

    module = torchcache()(Module())
    for _ in range(2):
        assert torch.equal(module(batch()), batch() + 2)
    assert stats_of(module).memory_hits == 4


def test_a_cached_module_inside_a_cached_module_keeps_a_cache_of_its_own():
    inner = torchcache()(nn.Linear(10, 4))
    outer = torchcache(check_rows=False)(nn.Sequential(inner, nn.ReLU()))
    x = batch()
    expected = torch.relu(torch.nn.functional.linear(x, inner.weight, inner.bias))
    assert torch.equal(outer(x), expected)
    inner(x)
    outer(x)
    assert stats_of(outer).memory_hits == 4
    assert stats_of(inner).memory_hits == 4
    with torch.no_grad():
        inner.weight.mul_(-1)
    assert not torch.equal(outer(x), expected)


# -- the result belongs to the caller ----------


@pytest.fixture(params=["memory", "store"])
def tier(request, cache_dir):
    """Return the options of a cache that answers from one tier."""
    if request.param == "memory":
        return {}
    return {"persistent": True, "persistent_cache_dir": cache_dir, "max_memory_cache_size": 0}


def test_the_result_is_detached_on_a_miss_and_on_a_hit(tier):
    module = torchcache(**tier)(nn.Linear(10, 4))
    for _ in range(2):
        output = module(batch())
        assert not output.requires_grad
        assert output.grad_fn is None


def test_the_caller_may_write_into_results_on_a_miss_and_on_a_hit(tier):
    function, _ = make(lambda x: x + 1, **tier)
    x = batch()
    for n in (4, 2, 4, 4):
        result = function(x[:n])
        assert torch.equal(result, x[:n] + 1)
        result.fill_(-1)
    cache_of(function).flush()
    for _ in range(2):
        result = function(x)
        assert torch.equal(result, x + 1)
        result.fill_(-1)


def test_results_of_two_calls_do_not_share_memory():
    function, _ = make(lambda x: x + 1)
    function(batch())
    first, second = function(batch()), function(batch())
    first.zero_()
    assert torch.equal(second, batch() + 1)


def test_rows_of_one_result_do_not_share_memory():
    function, _ = make(lambda x: x + 1)
    x = batch(1).repeat(3, 1)
    for _ in range(2):
        result = function(x)
        result[0].zero_()
        assert torch.equal(result[1:], x[1:] + 1)


def test_the_caller_may_write_into_inputs_afterwards(tier):
    function, seen = make(lambda x: x + 1, **tier)
    x = batch()
    function(x)
    x.zero_()
    cache_of(function).flush()
    assert torch.equal(function(batch()), batch() + 1)
    assert torch.equal(function(x), x + 1)
    assert rows_seen(seen) == [4, 1]


def test_an_output_that_is_the_input_is_kept_by_value(tier):
    function, _ = make(lambda x: x, **tier)
    x = batch()
    function(x)
    x.zero_()
    cache_of(function).flush()
    assert torch.equal(function(batch()), batch())


def test_rows_stored_in_inference_mode_serve_training_later():
    function, _ = make(lambda x: x + 1)
    with torch.inference_mode():
        function(batch())
    head = nn.Linear(10, 2)
    result = function(batch())
    head(result).sum().backward()
    result.add_(1)
    assert not result.is_inference()
    assert head.weight.grad is not None
    assert stats_of(function).memory_hits == 4


def test_threads_may_call_the_same_module_at_once(tier):
    @torchcache(**tier)
    class Module(nn.Module):
        def forward(self, x, shift: int = 0):
            return x * 2 + shift

    module = Module()
    x = batch(40, 50)
    barrier = threading.Barrier(6)

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        barrier.wait()
        for i in range(30):
            rows = x[torch.randint(0, 40, (8,), generator=generator)]
            if not torch.equal(module(rows, i % 3), rows * 2 + i % 3):
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    stats = stats_of(module)
    assert stats.hits + stats.misses + stats.duplicates + stats.shared_rows == 6 * 30 * 8
    assert not stats.bypasses
    assert not stats.faults


# -- inputs: what makes two samples the same ----------


@torchcache()
def combined(a, b=None, *rest, scale=1, **named):
    total = a.double()
    for tensor in (b, *rest, *named.values()):
        if isinstance(tensor, torch.Tensor):
            total = total * 2 + tensor.double()
    return total.flatten(1)


def is_known(target, *args, **kwargs):
    """Tell whether a call computes nothing, and make it known for the next one."""
    before = stats_of(target).misses
    target(*args, **kwargs)
    return stats_of(target).misses == before


@pytest.fixture
def known():
    """Return the decorated function with an empty memory."""
    cache_of(combined).clear()
    return combined


def test_a_nan_equals_itself(known):
    x = torch.full((2, 3), torch.nan)
    known(x)
    assert is_known(known, x.clone())


def test_zero_and_minus_zero_are_two_inputs():
    function, _ = make(lambda x: 1 / x)
    zero = torch.zeros(2, 3)
    assert torch.equal(function(zero), torch.full((2, 3), torch.inf))
    assert torch.equal(function(-zero), torch.full((2, 3), -torch.inf))


def test_every_byte_of_a_sample_counts():
    function, seen = make(lambda x: x + 1)
    x = torch.zeros(1, 3, 64, 64)
    function(x)
    for place in range(0, x.numel(), 1531):
        changed = x.clone()
        changed.view(-1)[place] = 1e-45
        assert_same(function(changed), changed + 1)
    assert len(seen) == 1 + len(range(0, x.numel(), 1531))


def test_equal_bytes_of_another_dtype_are_another_input(known):
    x = torch.ones(2, 4)
    assert not is_known(known, x)
    assert not is_known(known, x.view(torch.int32))
    assert not is_known(known, x.view(torch.int16))
    assert is_known(known, x)


def test_equal_bytes_of_another_shape_are_another_input(known):
    x = batch(2, 12)
    assert not is_known(known, x)
    assert not is_known(known, x.view(2, 3, 4))
    assert not is_known(known, x.view(2, 4, 3))
    assert not is_known(known, x.view(2, 12, 1))
    assert is_known(known, x)


def test_strides_do_not_count():
    function, seen = make(lambda x: x + 1)
    x = batch(4, 6)
    function(x)
    strange = torch.empty(4, 12)[:, ::2].copy_(x)
    for same in (x.t().contiguous().t(), strange, torch.cat([x, x])[4:], x.flip(0).flip(0)):
        assert torch.equal(function(same), x + 1)
    function(x[:1].expand(3, 6))
    assert rows_seen(seen) == [4]


def test_memory_format_of_an_input_does_not_count():
    function, seen = make(lambda x: x.contiguous() + 1)
    x = torch.rand(2, 3, 4, 5)
    function(x)
    assert torch.equal(function(x.contiguous(memory_format=torch.channels_last)), x + 1)
    assert len(seen) == 1


def test_conjugate_and_negative_views_count_by_value():
    function, seen = make(lambda x: x * 1)
    x = torch.complex(batch(2, 3), batch(2, 3) + 1)
    assert torch.equal(function(x.conj()), x.conj().resolve_conj())
    assert torch.equal(function(x), x)
    assert torch.equal(function(x.conj()), x.conj().resolve_conj())
    assert len(seen) == 2
    function(x.imag)
    assert torch.equal(function(x.conj().imag), -x.imag)


@pytest.mark.filterwarnings("ignore:ComplexHalf")  # torch says so of any tensor of that dtype
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_input_may_have_any_dtype(dtype):
    function, seen = make(lambda x: x.contiguous().view(torch.uint8).flatten(1).double())
    x = random_of(dtype, 5, 16)
    whole = torch.stack([torch.tensor(list(raw(x[i : i + 1]))) for i in range(5)]).double()
    assert torch.equal(function(x[1:2]), whole[1:2])
    assert torch.equal(function(x), whole), "rows to compute may lie anywhere in the batch"
    assert torch.equal(function(x), whole)
    assert rows_seen(seen) == [1, 4]


def test_positions_and_keywords_are_one_call(known):
    x, y = batch(), batch(start=100)
    known(x, y)
    assert is_known(known, a=x, b=y)
    assert is_known(known, b=y, a=x)
    assert is_known(known, x, b=y)


def test_the_names_of_tensors_count(known):
    x, y = batch(), batch(start=100)
    assert not is_known(known, x, y)
    assert not is_known(known, y, x)
    assert not is_known(known, x, None, y)
    assert not is_known(known, x, other=y)
    assert not is_known(known, x, another=y)
    assert is_known(known, y, x)


def test_the_order_of_surplus_keywords_counts(known):
    a, b = batch(), batch(start=100)
    function = torchcache(check_rows=False)(lambda **named: torch.cat(list(named.values()), 1))
    assert torch.equal(function(a=a, b=b), torch.cat([a, b], 1))
    assert torch.equal(function(b=b, a=a), torch.cat([b, a], 1))
    assert torch.equal(function(a=a, b=b), torch.cat([a, b], 1))
    assert stats_of(function).memory_hits == 4


@pytest.mark.parametrize("name", ["", "*", "**order", "**b", "x[0]", "x y"])
def test_a_surplus_keyword_of_any_name_counts(name):
    cached = torchcache()(lambda x, **more: x * sum(more.values()))
    x = batch(2)
    for first, second in ((1, 2), (3, 4)):
        assert torch.equal(cached(x, **{name: first, "b": second}), x * (first + second))
    assert stats_of(cached).misses == 4


def test_a_surplus_keyword_is_not_an_argument_of_the_same_name():
    @torchcache(check_rows=False)
    def function(x, scale=1, /, *args, **named):
        return x * scale + sum(args) + 10 * sum(named.values())

    x = batch()
    assert torch.equal(function(x, 3), x * 3)
    assert torch.equal(function(x, scale=3), x + 30)
    assert torch.equal(function(x, 1, 3), x + 3)
    assert torch.equal(function(x, 1, **{"args[0]": 3}), x + 30)


def test_a_default_given_is_the_default_left_out(known):
    x = batch()
    known(x)
    assert is_known(known, x, None)
    assert is_known(known, x, scale=1)
    assert is_known(known, x, b=None, scale=1)


@pytest.mark.parametrize("where", ["keyword", "position"])
def test_plain_arguments_count_by_type_and_value(known, where):
    x = batch()
    values = [1, True, 1.0, "1", b"1", None, 2, 0.0, -0.0, False, "", (), (1,), (1.0,), ((1,),), (1, 1), "None"]
    values += [float("nan"), float("inf"), 2**70, torch.float32, torch.device("cpu"), Color.RED, Color.BLUE, 1j, ...]

    def is_new(value):
        if where == "keyword":
            return not is_known(known, x, option=value)
        return not is_known(known, x, None, value)

    assert all(is_new(value) for value in values)
    assert not any(is_new(value) for value in values)


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def test_values_of_strings_and_tuples_do_not_run_into_each_other(known):
    x = batch()
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]
    assert not any(is_known(known, x, p=p, q=q) for p, q in pairs)
    assert not any(is_known(known, x, t=pair) for pair in pairs)


def test_a_tensor_of_one_dimension_may_stand_beside_others(known):
    x, lengths = batch(), torch.tensor([1, 2, 3, 4])
    masked = torchcache()(lambda x, lengths: x * lengths.unsqueeze(1))
    assert torch.equal(masked(x, lengths), x * lengths.unsqueeze(1))
    assert torch.equal(masked(x, lengths.flip(0)), x * lengths.flip(0).unsqueeze(1))
    assert stats_of(masked).misses == 8


def test_tensors_of_different_dtypes_go_together():
    @torchcache()
    def embed(tokens, mask, weights):
        return tokens.double() * mask.double() + weights.double()

    tokens = torch.arange(12).reshape(4, 3)
    mask = torch.tensor([[True, True, False]]).expand(4, 3)
    weights = torch.rand(4, 3, dtype=torch.half)
    expected = tokens.double() * mask.double() + weights.double()
    for _ in range(2):
        assert torch.equal(embed(tokens, mask, weights=weights), expected)
    assert stats_of(embed).memory_hits == 4


def test_a_parameter_may_be_an_input():
    function, _ = make(lambda x: x + 1)
    x = nn.Parameter(batch(), requires_grad=False)
    assert torch.equal(function(x), batch() + 1)
    assert is_known(function, batch())


# -- outputs ----------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_may_have_any_dtype(tier, dtype):
    values = random_of(dtype, 6, 5)

    @torchcache(**tier)
    def function(x):
        return (
            values.view(torch.uint8)[x[:, 0].long()].view(dtype) if dtype is not torch.bool else values[x[:, 0].long()]
        )

    x = torch.arange(6.0).reshape(6, 1)
    first = function(x[:4])
    assert cache_of(function).flush()
    second = function(x[:4])
    assert_same(first, values[:4].clone())
    assert_same(second, first)
    mixed = function(x)
    assert_same(mixed, values)
    stats = stats_of(function)
    assert (stats.hits, stats.misses) == (8, 6)
    assert not stats.faults


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 1), (0,), (3, 0, 2), (70_000,)], ids=str
)
def test_an_output_row_may_have_any_shape(tier, shape):
    @torchcache(**tier)
    def function(x):
        size = torch.Size(shape).numel()
        return x[:, :1].expand(len(x), size).reshape(len(x), *shape)

    x = batch(6, 1)
    first = function(x)
    assert first.shape == (6, *shape)
    assert cache_of(function).flush()
    assert_same(function(x), first)
    assert_same(function(x[[4, 1]]), first[[4, 1]])
    assert stats_of(function).misses == 6


def test_zero_size_input_rows_are_all_equal(tier):
    @torchcache(**tier)
    def function(x):
        return torch.ones(len(x), 3)

    x = torch.empty(4, 0)
    for _ in range(2):
        assert_same(function(x), torch.ones(4, 3))
        cache_of(function).flush()
    assert stats_of(function).misses == 1


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((3, 4, 5), torch.channels_last), ((3, 2, 4, 5), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
def test_a_channels_last_result_comes_back_channels_last(tier, shape, memory_format):
    @torchcache(**tier)
    def function(x):
        return (x + 1).contiguous(memory_format=memory_format)

    x = torch.rand(4, *shape)
    first = function(x)
    assert cache_of(function).flush()
    for result, expected in ((function(x), x + 1), (function(x[[3, 1]]), x[[3, 1]] + 1)):
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=memory_format)
    assert first.is_contiguous(memory_format=memory_format)


def test_other_results_come_back_contiguous(tier):
    @torchcache(**tier)
    def function(x):
        return x.transpose(1, 2)

    x = torch.rand(4, 5, 6)
    function(x)
    assert cache_of(function).flush()
    result = function(x)
    assert torch.equal(result, x.transpose(1, 2))
    assert result.is_contiguous()


def test_an_output_that_repeats_memory_is_kept_in_full(tier):
    function, _ = make(lambda x: x[:, :1].expand(-1, 6), **tier)
    x = batch()
    function(x)
    assert cache_of(function).flush()
    result = function(x)
    result[:, 0] = -1
    assert torch.equal(result[:, 1:], x[:, :1].expand(-1, 5))


def test_nan_and_infinity_come_back_bit_for_bit(tier):
    bits = torch.tensor([[0x7FC00001, 0x7F800000, -0x00800000, -0x80000000]], dtype=torch.int32)
    special = bits.view(torch.float32)
    function, _ = make(lambda x: special.expand(len(x), 4) * 1, **tier)
    x = batch()
    first = function(x)
    assert cache_of(function).flush()
    assert_same(function(x), first)


def test_memory_on_the_device_of_the_output_is_the_same_cache_there():
    function, seen = make(lambda x: x + 1, memory_cache_device=None)
    for _ in range(2):
        assert torch.equal(function(batch()), batch() + 1)
    assert rows_seen(seen) == [4]


def fake_devices(monkeypatch):
    """Let wide results be computed on another device than narrow ones, as far as the cache can see."""

    def devices_of(tree):
        return tuple(torch.device("meta" if leaf.shape[-1] > 4 else "cpu") for leaf in tree.leaves)

    monkeypatch.setattr(rows, "devices_of", devices_of)


def test_a_hit_lies_where_the_result_of_its_own_form_of_call_lay(monkeypatch):
    fake_devices(monkeypatch)
    function, _ = make(lambda x: x + 1)
    wide, narrow = torch.rand(2, 8), torch.rand(2, 3)
    for x in (wide, narrow, wide, narrow):
        result = function(x)
    assert function(wide).device.type == "meta"
    assert torch.equal(result, narrow + 1)


def test_a_hit_goes_by_the_devices_of_module_and_inputs_too():
    cpu, other = torch.device("cpu"), torch.device("meta")
    devices = ResultDevices()

    def call(device, *, digest=b"1", is_divisible=True):
        batch = SimpleNamespace(tensors=[SimpleNamespace(device=device)], is_divisible=is_divisible)
        return SimpleNamespace(namespace=b"n", digests=[digest], batch=batch)

    devices.note(call(cpu), None, (cpu,))
    assert devices.of(call(other), None) == ()  # it is guessed then
    assert devices.of(call(cpu), other) == ()
    devices.note(call(other), None, (other,))
    assert devices.of(call(other), None) == (other,)
    assert devices.of(call(cpu), None) == (cpu,)
    assert devices.latest == (other,)

    whole = [call(cpu, digest=digest, is_divisible=False) for digest in (b"1", b"2", b"3")]
    devices.note(whole[0], None, (other,))
    devices.note(whole[1], None, (cpu,))
    assert [devices.of(one, None) for one in whole] == [(other,), (cpu,), (cpu,)]


# -- a smaller dtype ----------


@pytest.mark.parametrize("cache_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("output_dtype", FLOATS, ids=str)
def test_with_a_cache_dtype_the_first_result_equals_the_second(cache_dtype, output_dtype):
    if torch.float8_e8m0fnu in (cache_dtype, output_dtype):
        source = torch.tensor([[1.0, 2.0, 0.5, 4.0]])  # its only values are powers of two
    else:
        source = torch.tensor([[0.1, -1.7, 3.14159, 0.0]])
    source = source.to(output_dtype)

    @torchcache(cache_dtype=cache_dtype)
    def function(x):
        return source.repeat(len(x), 1)

    x = batch(3)
    first, second = function(x), function(x)
    assert_same(first, second)
    assert_same(first, source.to(cache_dtype).to(output_dtype).repeat(3, 1))
    assert_same(function(batch(4)), first[:1].repeat(4, 1))
    assert stats_of(function).memory_hits == 6


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.is_floating_point], ids=str)
def test_integers_bools_and_complex_numbers_are_never_cast(dtype):
    values = random_of(dtype, 4, 5)
    function, _ = make(lambda x: values[: len(x)], cache_dtype=torch.half)
    assert_same(function(batch()), values)
    assert_same(function(batch()), values)


def test_values_that_the_cast_makes_infinite_are_counted_and_said_once(caplog):
    function, _ = make(lambda x: x * 1e4, cache_dtype=torch.half)
    x = torch.tensor([[1.0, 10.0], [100.0, torch.inf], [torch.nan, 2.0]])
    first = function(x)
    assert torch.equal(first[:2], torch.tensor([[10000.0, torch.inf], [torch.inf, torch.inf]]))
    assert_same(function(x), first)
    function(x + 1)
    assert stats_of(function).overflowed_values == 4
    assert len([r for r in caplog.records if "infinite" in r.getMessage()]) == 1


def test_a_mixed_batch_of_hits_and_misses_is_rounded_alike():
    function, _ = make(lambda x: x / 3, cache_dtype=torch.bfloat16)
    x = batch(6)
    function(x[:3])
    assert_same(function(x), (x / 3).bfloat16().float())


# -- what the user's code does ----------

CALLS: list[int] = []
COUNTS = {"calls": 0}
SCALE = 2


def count_in_a_helper(module):
    module.calls += 1


class CountsOnSelf(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + 1


class CountsInAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return x + 1


class CountsInADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.counts = {"calls": 0}

    def forward(self, x):
        self.counts["calls"] += 1
        return x + 1


class CountsInAGlobalList(nn.Module):
    def forward(self, x):
        CALLS.append(len(x))
        return x + 1


class CountsInAGlobalDict(nn.Module):
    def forward(self, x):
        COUNTS["calls"] += 1
        return x + 1


class CountsInAMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def note(self):
        self.calls += 1

    def forward(self, x):
        self.note()
        return x + 1


class RemembersItsOutput(nn.Module):
    def forward(self, x):
        self.last = x + 1
        return self.last


class RemembersItsTime(nn.Module):
    def forward(self, x):
        self.started = time.perf_counter()
        return x + 1


@pytest.mark.parametrize(
    "cls",
    [
        CountsOnSelf,
        CountsInAList,
        CountsInADict,
        CountsInAGlobalList,
        CountsInAGlobalDict,
        CountsInAMethod,
        RemembersItsOutput,
        RemembersItsTime,
    ],
)
def test_a_forward_that_keeps_notes_still_hits(cls):
    module = torchcache()(cls())
    x = batch()
    for _ in range(4):
        assert torch.equal(module(x), x + 1)
    stats = stats_of(module)
    assert (stats.misses, stats.memory_hits) == (4, 12)
    assert not stats.bypasses
    assert not stats.dropped_rows


def test_a_function_that_counts_in_a_nonlocal_still_hits():
    calls = 0

    @torchcache(check_rows=False)
    def function(x):
        nonlocal calls
        calls += 1
        return x + 1

    for _ in range(4):
        function(batch())
    assert calls == 1
    assert stats_of(function).memory_hits == 12


# -- state that shapes the result ----------


class Model(nn.Module):
    """Everything a test may change."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(10, 10)
        self.norm = nn.LayerNorm(10)
        self.register_buffer("offset", torch.zeros(10))
        self.register_buffer("hidden", torch.zeros(10), persistent=False)
        self.table = torch.zeros(10)
        self.array = np.zeros(10, dtype=np.float32)
        self.scale = 1
        self.shifts = [0.0, 0.0]
        self.named = {"shift": 0.0}
        self.activation = torch.relu
        self.config = Config()
        self.space = SimpleNamespace(shift=0.0)
        self.record = Record()
        self.queue = deque([0.0])
        self.nested = ([0.0],)

    def forward(self, x):
        y = self.norm(self.linear(x)) * self.scale + self.offset + self.hidden + self.table
        y = y + self.space.shift + self.record.shift + self.queue[0] + self.nested[0][0]
        y = y + torch.from_numpy(self.array) + sum(self.shifts) + self.named["shift"] + self.config.shift
        return self.activation(y) * SCALE


class Config:
    shift = 0.0

    def __init__(self):
        self.shift = 0.0


@dataclass
class Record:
    shift: float = 0.0


@torch.no_grad()
def multiply_in_place(model):
    model.linear.weight.mul_(2)


def multiply_through_data(model):
    model.linear.weight.data.mul_(2)


def multiply_through_numpy(model):
    array = model.linear.weight.detach().numpy()
    array *= 2


def load_a_state_dict(model):
    model.load_state_dict({k: v * 2 + 1 for k, v in model.state_dict().items()})


def assign_a_state_dict(model):
    model.load_state_dict({k: v * 2 + 1 for k, v in model.state_dict().items()}, assign=True)


def replace_the_parameter(model):
    model.linear.weight = nn.Parameter(model.linear.weight.detach() * 2)


def replace_the_data(model):
    model.linear.weight.data = model.linear.weight.data * 2


def replace_the_layer(model):
    model.linear = nn.Linear(10, 10)


def take_an_optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sum(p.pow(2).sum() for p in model.parameters()).backward()
    optimizer.step()


def write_one_element(model):
    with torch.no_grad():
        model.linear.weight[3, 5] += 1


def write_one_hidden_element(model):
    model.linear.weight.data[3, 5] += 1
    cache_of(model).refresh()


def change_the_config(model):
    model.config.shift = 1.0


def change_the_namespace(model):
    model.space.shift = 1.0


def change_the_dataclass(model):
    model.record.shift = 1.0


def change_the_deque(model):
    model.queue[0] = 1.0


def change_the_list_in_a_tuple(model):
    model.nested[0][0] = 1.0


CHANGES = [
    multiply_in_place,
    multiply_through_data,
    multiply_through_numpy,
    load_a_state_dict,
    assign_a_state_dict,
    replace_the_parameter,
    replace_the_data,
    replace_the_layer,
    take_an_optimizer_step,
    write_one_element,
    write_one_hidden_element,
    lambda model: model.offset.add_(1),
    lambda model: model.hidden.add_(1),
    lambda model: setattr(model, "offset", torch.ones(10)),
    lambda model: model.table.add_(1),
    lambda model: setattr(model, "table", torch.ones(10)),
    lambda model: model.array.__iadd__(1),
    lambda model: setattr(model, "scale", 3),
    lambda model: model.shifts.append(1.0),
    lambda model: model.shifts.__setitem__(0, 1.0),
    lambda model: model.named.update(shift=1.0),
    lambda model: setattr(model, "activation", torch.tanh),
    lambda model: setattr(model, "config", type("Config", (), {"shift": 1.0})()),
    lambda model: setattr(model.norm, "eps", 10.0),
    change_the_config,
    change_the_namespace,
    change_the_dataclass,
    change_the_deque,
    change_the_list_in_a_tuple,
    lambda model: model.linear.register_forward_hook(lambda _module, _args, output: output + 1),
    lambda model: setattr(model.linear, "forward", lambda x: x),
    lambda model: model.linear.register_parameter("bias", None),
    lambda model: nn.utils.parametrize.register_parametrization(model.linear, "weight", nn.Softplus()),
    lambda _model: globals().__setitem__("SCALE", 5),
]
NAMES = [f.__name__ if f.__name__ != "<lambda>" else f"change {i}" for i, f in enumerate(CHANGES)]


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_what_shapes_the_result_is_noticed_at_the_next_call(change, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 2)
    model = torchcache(check_rows=False)(Model().requires_grad_(True))
    x = torch.rand(4, 10)
    old = model(x)
    assert torch.equal(model(x), old)
    change(model)
    plain = cached_result_of_an_undecorated(model, x)
    assert not torch.equal(plain, old), "the change must change the result, or it shows nothing"
    assert torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    assert stats_of(model).memory_hits == 8, "what is new is cached"


@pytest.mark.parametrize("change", [c for c in CHANGES[:11] if c is not take_an_optimizer_step])
def test_a_module_without_any_other_state_notices_its_weights(change):
    @torchcache()
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 10)

        def forward(self, x):
            return self.linear(x)

    model = Plain().requires_grad_(False)
    x = torch.rand(4, 10)
    old = model(x)
    assert is_known(model, x)
    change(model)
    plain = model.linear(x).detach()
    assert not torch.equal(plain, old)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("door", ["class", "instance", "torch's own", "function"])
def test_an_unchanged_module_is_compared_without_being_looked_at_again(door, monkeypatch):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 10)
            self.scale = 2.0

        def forward(self, x):
            return self.linear(x) * self.scale

    net = Plain().requires_grad_(False)
    target = {
        "class": lambda: torchcache()(Plain)().requires_grad_(False),
        "instance": lambda: torchcache()(net),
        "torch's own": lambda: torchcache()(nn.Sequential(nn.Linear(10, 4), nn.ReLU()).requires_grad_(False)),
        "function": lambda: torchcache()(lambda x: net(x)),  # noqa: PLW0108 - a function that closes over a module
    }[door]()
    for _ in range(3):
        target(batch())

    class Look:
        def __init__(self, *args):
            raise AssertionError("looked at in full")

    monkeypatch.setattr("torchcache.keys.state.Snapshot", Look)
    assert is_known(target, batch())


def cached_result_of_an_undecorated(model, x):
    with torch.no_grad():
        return type(model).forward(model, x)


def test_equal_values_in_another_place_are_the_same_state():
    model = torchcache()(Model())
    x = torch.rand(4, 10)
    model(x)
    model.linear.weight = nn.Parameter(model.linear.weight.detach().clone())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    model.shifts = [0.0, 0.0]
    assert is_known(model, x)


def test_the_old_state_finds_its_old_results():
    model = torchcache()(Model())
    x = torch.rand(4, 10)
    first = model(x)
    for scale in (2, 3, 1):
        model.scale = scale
        model(x)
    assert stats_of(model).misses == 12
    assert torch.equal(model(x), first)
    assert stats_of(model).memory_hits == 8


@pytest.mark.parametrize("values", [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1), ((1,), [1])], ids=str)
def test_plain_attributes_count_by_type(values):
    model = torchcache()(Model())
    model.extra = values[0]
    x = torch.rand(4, 10)
    model(x)
    model.extra = values[1]
    assert not is_known(model, x)


def test_the_training_flag_of_the_module_and_of_its_parts_counts():
    @torchcache()
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x):
            return x + self.training + 2 * self.part.training

    module = Module()
    x = batch()
    assert torch.equal(module(x), x + 3)
    assert torch.equal(module.eval()(x), x)
    module.part.train()
    assert torch.equal(module(x), x + 2)
    assert torch.equal(module.train()(x), x + 3)
    assert stats_of(module).misses == 12


def test_autocast_counts_by_state_and_dtype():
    module = torchcache()(nn.Linear(10, 4))
    x = torch.rand(4, 10)
    for _ in range(2):
        assert module(x).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.half):
            with torch.autocast("cpu", dtype=dtype):
                assert module(x).dtype == dtype
                with torch.autocast("cpu", enabled=False):
                    assert module(x).dtype == torch.float32
    assert stats_of(module).misses == 12


def test_the_default_dtype_counts():
    function, _ = make(lambda x: x * torch.ones(()))
    x = torch.ones(2, 3, dtype=torch.int32)
    assert function(x).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert function(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_a_function_closes_over_counts():
    net, factor, table = nn.Linear(10, 4), 1.0, {"shift": 0.0}

    @torchcache()
    def function(x):
        return net(x) * factor + table["shift"]

    x = torch.rand(4, 10)
    for change in range(4):
        if change == 1:
            factor = 2.0
        elif change == 2:
            table["shift"] = 1.0
        elif change == 3:
            with torch.no_grad():
                net.weight.add_(1)
        with torch.no_grad():
            expected = net(x) * factor + table["shift"]
        assert torch.equal(function(x), expected)
        assert torch.equal(function(x), expected)
    assert stats_of(function).misses == 16
    assert stats_of(function).memory_hits == 16


def test_two_instances_never_share_a_result(cache_dir):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    class Module(nn.Module):
        def __init__(self, factor=1):
            super().__init__()
            self.linear = nn.Linear(10, 4)
            self.factor = factor

        def forward(self, x):
            return self.linear(x) * self.factor

    x = torch.rand(4, 10)
    first = Module()
    others = [Module(), Module(2), Module(factor=3)]
    for other in others[1:]:
        other.load_state_dict(first.state_dict())
    scaled = Module()
    scaled.load_state_dict(first.state_dict())
    scaled.factor = 4
    for module in (first, *others, scaled):
        with torch.no_grad():
            expected = module.linear(x) * module.factor
        assert torch.equal(module(x), expected)
        assert cache_of(module).flush()
        assert stats_of(module).misses == 4


def test_weights_that_change_during_a_forward_are_not_stored_under_the_old_ones():
    @torchcache()
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10), requires_grad=False)
            self.hurried = [False]

        def forward(self, x):
            result = x * self.weight
            if self.hurried[0]:
                disturb(self)
            return result

    def disturb(module):
        module.weight.add_(1)

    module = Module()
    module.hurried[0] = True
    assert torch.equal(module(batch()), batch())
    assert stats_of(module).dropped_rows == {"state_moved": 4}
    assert stats_of(module).memory_rows == 0


# -- around the cache ----------


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class BatchMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x):
        return self.norm(x)


def test_a_batch_norm_in_training_mode_goes_around_the_cache():
    torch.manual_seed(0)
    plain, module = BatchMean(), torchcache()(BatchMean())
    for start in range(3):
        x = batch(start=start)
        assert torch.equal(module(x), plain(x))
    assert torch.equal(module.norm.running_mean, plain.norm.running_mean)
    assert stats_of(module).bypasses == {"batch_norm_in_training_mode": 3}
    assert stats_of(module).bypassed_rows == 12
    plain.eval()
    module.eval()
    for _ in range(2):
        assert torch.equal(module(x), plain(x).detach())
    assert stats_of(module).memory_hits == 4


def test_a_batch_norm_without_statistics_goes_around_the_cache():
    module = torchcache()(nn.BatchNorm1d(10, track_running_stats=False).eval())
    plain = nn.BatchNorm1d(10, track_running_stats=False).eval()
    assert torch.equal(module(batch()), plain(batch()))
    assert stats_of(module).bypasses == {"batch_norm_without_running_statistics": 1}


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.RReLU(), nn.LSTM(10, 4, num_layers=2, dropout=0.5)], ids=repr
)
def test_a_random_layer_in_training_mode_goes_around_the_cache(layer):
    @torchcache()
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            y = self.layer(x)
            return y if isinstance(y, torch.Tensor) else y[0]

    module = Module()
    x = torch.rand(4, 10)
    torch.manual_seed(1)
    expected = type(module).forward.__wrapped__(module, x)
    torch.manual_seed(1)
    assert torch.equal(module(x), expected)
    assert stats_of(module).bypasses == {"dropout_in_training_mode": 1}
    module.eval()
    module(x)
    assert is_known(module, x)


def test_a_dropout_of_zero_is_no_reason():
    module = torchcache()(nn.Sequential(nn.Linear(10, 4), nn.Dropout(0.0)))
    module(batch())
    assert is_known(module, batch())
    assert not stats_of(module).bypasses


def test_a_forward_that_draws_random_numbers_is_never_answered_from_the_cache():
    plain, module = Noise(), torchcache()(Noise())
    x = torch.zeros(4, 10) + torch.arange(4.0).unsqueeze(1)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = plain(x)
        torch.manual_seed(seed)
        assert torch.equal(module(x), expected)
    assert stats_of(module).bypasses == {"random_numbers": 3}
    assert stats_of(module).memory_rows == 0
    assert stats_of(module).hits == 0


@pytest.mark.parametrize("draw", ["random.random()", "np.random.rand()", "torch.rand(()).item()"])
def test_random_numbers_of_every_global_generator_are_noticed(draw):
    import random

    function = eval(f"lambda x: x + {draw}", {"random": random, "np": np, "torch": torch, "__name__": "mine"})
    module = torchcache()(function)
    results = [module(batch()) for _ in range(3)]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    assert stats_of(module).bypasses["random_numbers"] == 3


def test_random_numbers_of_another_thread_turn_the_cache_off_for_a_while_only():
    drawn = []

    @torchcache(check_rows=False)
    def function(x):
        if drawn:  # stands for another thread that draws meanwhile
            torch.rand(1)
        return x * 2

    drawn.append(1)
    for i in range(4):
        function(batch(start=100 * i))
    assert stats_of(function).bypasses["random_numbers"] == 4
    drawn.clear()
    for i in range(100):
        function(batch(start=10_000 + 100 * (i % 2)))
    assert stats_of(function).memory_hits > 20


def test_an_input_that_requires_grad_goes_around_the_cache_and_gets_its_gradient():
    module = torchcache()(nn.Linear(10, 4))
    x = batch().requires_grad_()
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.weight.sum(0).expand(4, 10))
    assert stats_of(module).bypasses == {"input_requires_grad": 1}
    with torch.no_grad():
        module(x)
    assert stats_of(module).misses == 4


def test_parameters_that_require_grad_are_cached_with_one_line(caplog):
    module = torchcache()(nn.Linear(10, 4))
    for _ in range(3):
        module(batch())
    assert stats_of(module).memory_hits == 8
    lines = [r for r in caplog.records if "require grad" in r.getMessage()]
    assert [r.levelno for r in lines] == [logging.WARNING]
    assert "requires_grad_(False)" in lines[0].getMessage()


def test_parameters_that_require_grad_bypass_if_asked_to():
    module = torchcache(when_grad="bypass")(nn.Linear(10, 4))
    module(batch()).sum().backward()
    assert module.weight.grad is not None
    assert stats_of(module).bypasses == {"parameters_require_grad": 1}
    with torch.no_grad():
        module(batch())
    module.requires_grad_(False)
    assert is_known(module, batch())


def test_parameters_that_require_grad_raise_if_asked_to():
    module = torchcache(when_grad="raise")(nn.Linear(10, 4))
    with pytest.raises(UncacheableError, match=r"requires_grad_\(False\)"):
        module(batch())
    with torch.no_grad():
        module(batch())
    assert stats_of(module).misses == 4


def test_state_that_changes_at_every_call_goes_around_the_cache_until_it_stands_still():
    module = torchcache()(nn.Linear(10, 4).requires_grad_(False))
    x = batch()
    for _ in range(10):
        module.weight.add_(1)
        assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight, module.bias))
    assert stats_of(module).bypasses["state_changes_at_every_call"] >= 5
    for _ in range(3):
        module(x)
    assert is_known(module, x)


def test_switching_between_two_states_is_not_restless():
    module = torchcache()(nn.Linear(10, 4).requires_grad_(False))
    for _ in range(10):
        module.train()(batch())
        module.eval()(batch())
    assert not stats_of(module).bypasses
    assert stats_of(module).misses == 8


def test_a_buffer_that_the_forward_changes_gives_right_results():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    plain, module = Module(), torchcache()(Module())
    for _ in range(8):
        assert torch.equal(module(batch()), plain(batch()))


def test_rows_of_different_shapes_go_around_the_cache():
    function, _ = make(lambda x: x[:, : int(x[0, 0])])
    x = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]])
    assert function(x[:1]).shape == (1, 1)
    assert function(x[1:]).shape == (1, 2)
    assert torch.equal(function(x), x[:, :1])
    assert stats_of(function).bypasses == {"rows_do_not_stack": 1}
    y = torch.cat([x[1:], torch.tensor([[3.0, 2.0, 3.0]])])
    assert torch.equal(function(y), y[:, :2])
    assert stats_of(function).bypasses == {"rows_do_not_stack": 2}


class Tagged(torch.Tensor):
    pass


def nested(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([*x])


def quantized(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, 1.0, 0, torch.qint8)


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (lambda x: x.as_subclass(Tagged), "tensor_subclass"),
        (lambda x: x.to("meta"), "meta_tensor"),
        (nested, "nested_tensor"),
        (lambda x: x.to_sparse(), "sparse_tensor"),
        (quantized, "quantized_tensor"),
    ],
    ids=["tensor_subclass", "meta_tensor", "nested_tensor", "sparse_tensor", "quantized_tensor"],
)
def test_a_tensor_without_plain_rows_goes_around_the_cache(convert, reason):
    function, seen = make(lambda x: x)
    x = convert(batch())
    assert function(x) is x
    assert function(x) is x
    assert len(seen) == 2
    assert stats_of(function).bypasses == {reason: 2}


def test_an_output_without_plain_rows_goes_around_the_cache():
    function, seen = make(lambda x: (x * 2).to_sparse())
    x = torch.cat([batch(2), batch(2)])
    for _ in range(2):
        assert torch.equal(function(x).to_dense(), x * 2)
    assert stats_of(function).bypasses["sparse_tensor"] == 2
    assert rows_seen(seen)[-1] in (2, 4)


def test_vmap_and_grad_transforms_go_around_the_cache():
    function, _ = make(lambda x: x.sin())
    x = torch.rand(3, 4, 5)
    assert torch.allclose(torch.vmap(function)(x), x.sin())
    derived = torch.func.jacrev(function)(x[0])
    assert torch.allclose(torch.einsum("ijij->ij", derived), x[0].cos())
    assert set(stats_of(function).bypasses) <= {"functorch_transform", "tensor_subclass", "input_requires_grad"}
    assert stats_of(function).misses == 0


def test_each_reason_is_said_once_and_names_the_remedy(caplog):
    module = torchcache()(nn.Sequential(nn.Linear(10, 4), nn.Dropout(0.5)))
    for _ in range(3):
        module(batch())
    lines = [r.getMessage() for r in caplog.records if "bypassed" in r.getMessage()]
    assert len(lines) == 1
    assert "eval()" in lines[0]
    assert "dropout_in_training_mode" in lines[0]


def test_under_compile_the_cached_call_still_caches():
    computed = []

    @torchcache(check_rows=False)
    class Module(nn.Module):
        def forward(self, x):
            computed.append(1)
            return x + 1

    module = Module()
    compiled = torch.compile(lambda x: module(x * 2) * 3, backend="eager")
    x = batch()
    for _ in range(3):
        assert torch.equal(compiled(x), (x * 2 + 1) * 3)
    assert stats_of(module).misses == 4
    assert stats_of(module).memory_hits == 8
    assert computed == [1]


# -- bad calls ----------


def refusal_of(target, *args, **kwargs):
    with pytest.raises(UncacheableError) as caught:
        target(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TypeError)
    return caught.value


def test_a_call_without_a_tensor_is_refused():
    function = torchcache()(lambda x=1: x)
    assert "at least one tensor of shape (batch, ...)" in str(refusal_of(function))
    assert "at least one tensor of shape (batch, ...)" in str(refusal_of(function, 3))


def test_a_tensor_without_a_batch_dimension_is_refused():
    function = torchcache()(lambda x, temperature: x * temperature)
    error = refusal_of(function, batch(), torch.tensor(0.5))
    assert error.argument == "temperature"
    assert "temperature.item()" in str(error)


def test_tensors_of_one_dimension_alone_are_refused():
    error = refusal_of(torchcache()(lambda x: x + 1), torch.rand(10))
    assert error.argument == "x"
    assert "x.unsqueeze(0)" in str(error)
    assert "x.unsqueeze(1)" in str(error)


def test_batch_sizes_that_differ_are_refused():
    error = refusal_of(torchcache()(lambda image, anchor: image + anchor), batch(4), anchor=batch(3))
    assert error.argument == "anchor"
    assert "image: 4, anchor: 3" in str(error)
    assert "expand" in str(error)


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1},
        object(),
        [torch.rand(4, 2), object()],
        (torch.rand(4, 2), [{1}]),
        {1},
        lambda x: x,
        bytearray(b"1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_argument_that_cannot_be_named_is_refused(value):
    function = torchcache()(lambda x, extra=None: x)
    for error in (refusal_of(function, batch(), value), refusal_of(function, batch(), extra=value)):
        assert error.argument == "extra"
        assert type(value).__name__ in str(error)
        assert "tensors with the batch in front" in str(error)


@pytest.mark.parametrize(
    "output",
    [lambda _x: None, lambda _x: 3, lambda _x: {"a": [1]}, lambda _x: ()],
    ids=["None", "int", "dict", "tuple"],
)
def test_an_output_without_any_tensor_is_refused(output):
    function, _ = make(output)
    assert "tensor" in str(refusal_of(function, batch()))


@pytest.mark.parametrize("output", [lambda x: x.sum(), lambda x: x[:1], lambda x: x.t()], ids=["0-d", "one", "turned"])
def test_an_output_whose_rows_are_not_the_batchs_is_refused(output):
    function, _ = make(output)
    assert "for a batch of 4" in str(refusal_of(function, batch()))


def test_arguments_that_do_not_fit_the_signature_get_the_usual_type_error():
    function = torchcache()(lambda x: x)
    for args, kwargs in (((batch(), 1), {}), ((batch(),), {"wrong": 1}), ((), {}), ((batch(),), {"x": batch()})):
        with pytest.raises(TypeError):
            function(*args, **kwargs)
    assert torch.equal(function(batch()), batch())


def test_no_call_leaves_a_reference_to_its_tensors_behind():
    import gc
    import weakref

    function = torchcache()(lambda x: x + 1)
    x = batch()
    gone = weakref.ref(x)
    function(x)
    function(x)
    del x
    gc.collect()
    assert gone() is None


# -- what a forward writes, and what it only reads ----------


class WritesARow(nn.Module):
    def forward(self, x):
        out = torch.empty_like(x)
        out[:] = x * self.scale
        return out


class WritesAMask(nn.Module):
    def forward(self, x):
        out = x.clone()
        out[out > self.scale * 20] = 0
        return out


class WritesFromATable(nn.Module):
    def forward(self, x):
        out = x.clone()
        out[:, :5] = self.table[:5]
        return out


class AddsFromAList(nn.Module):
    def forward(self, x):
        out = x.clone()
        out[:, 0] += self.shifts[0]
        return out


class FillsALocalDict(nn.Module):
    def forward(self, x):
        parts = {}
        parts["scale"] = self.scale
        return x * parts["scale"]


class AppendsToALocalList(nn.Module):
    def forward(self, x):
        parts = []
        parts.append(x * self.scale)
        parts.extend([x * shift for shift in self.shifts])
        return sum(parts)


class AddsToATable(nn.Module):
    def forward(self, x):
        return self.table.add(x).sort().values.clone()


class WritesAnAttributeOfAnotherObject(nn.Module):
    def forward(self, x):
        self.notes.scale = 1
        return x * self.scale


class WritesAnAttributeOfTheResult(nn.Module):
    def forward(self, x):
        out = x * self.scale
        out.scale = 1
        return out


class HasASetterThatIsNotCalled(nn.Module):
    def set_scale(self, scale):
        self.scale = scale

    def forward(self, x):
        return x * self.scale


def set_scale(module):
    module.scale = 3


def set_shift(module):
    module.shifts[0] = 3.0


def set_table(module):
    module.table.add_(3)


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (WritesARow, set_scale),
        (WritesAMask, set_scale),
        (WritesFromATable, set_table),
        (AddsFromAList, set_shift),
        (FillsALocalDict, set_scale),
        (AppendsToALocalList, set_scale),
        (AppendsToALocalList, set_shift),
        (AddsToATable, set_table),
        (WritesAnAttributeOfAnotherObject, set_scale),
        (WritesAnAttributeOfTheResult, set_scale),
        (HasASetterThatIsNotCalled, set_scale),
    ],
)
def test_an_attribute_that_the_forward_only_reads_counts(cls, change):
    module = cls()
    module.scale, module.shifts, module.table, module.notes = 1, [1.0, 2.0], torch.ones(10)[:10], SimpleNamespace()
    torchcache()(module)
    x = batch()
    old = module(x)
    assert torch.equal(module(x), old)
    change(module)
    with torch.no_grad():
        plain = cls.forward(module, x)
    assert not torch.equal(plain, old)
    assert torch.equal(module(x), plain)


FACTOR = 1


def test_a_global_that_the_forward_only_reads_counts(monkeypatch):
    @torchcache()
    def function(x):
        out = x.clone()
        out[:, 1:] = x[:, 1:] * FACTOR
        return out

    x = batch()
    assert torch.equal(function(x), x)
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert torch.equal(function(x)[:, 1:], x[:, 1:] * 3)


# -- faults of the machine and of foreign objects ----------


class Unreadable:
    """Fails when it is asked for its attributes."""

    @property
    def __dict__(self):
        raise OSError("gone")


def test_an_attribute_that_cannot_be_read_turns_the_cache_off_and_breaks_nothing():
    module = torchcache()(nn.Linear(4, 4).requires_grad_(False))
    x = torch.randn(3, 4)
    expected = module(x)
    module.handle = Unreadable()
    assert torch.equal(module(x), expected)
    stats = cache_of(module).stats()
    assert stats.bypasses == {"unreadable_state": 1}
    assert stats.faults == {"OSError": 1}
    del module.handle
    module(x)
    assert cache_of(module).stats().memory_hits == 3


@pytest.mark.parametrize("known_rows", [0, 2])
def test_without_memory_for_a_copy_the_result_is_computed(monkeypatch, known_rows):
    module = torchcache()(nn.Linear(4, 4).requires_grad_(False))
    x = torch.randn(5, 4)
    with disabled():
        expected = module(x)
    if known_rows:
        module(x[:known_rows])

    def fails(*arguments):
        raise MemoryError

    monkeypatch.setattr("torchcache.results.rows.take_apart", fails)
    assert torch.allclose(module(x), expected)
    assert cache_of(module).stats().bypasses == {"out_of_memory": 1}


def test_without_memory_for_the_hits_the_result_is_computed(monkeypatch):
    module = torchcache()(nn.Linear(4, 4).requires_grad_(False))
    x = torch.randn(5, 4)
    expected = module(x)

    def fails(*arguments):
        raise MemoryError

    monkeypatch.setattr("torchcache.results.rows.put_together", fails)
    assert torch.allclose(module(x), expected)
    assert cache_of(module).stats().bypasses == {"out_of_memory": 1}
