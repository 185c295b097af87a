"""Keys of the user's own, in place of the digests of a call's inputs."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from torchcache import UncacheableError, cache_of, disabled, sample_keys, torchcache
from torchcache.layout import Layout, Leaf, Rows


def batch(n=6, width=3, start=0):
    return torch.arange(start, start + n * width, dtype=torch.float32).reshape(n, width)


def counted(**options):
    """Return a cached function and the list of the batches it was called with."""
    seen = []

    def double(x, factor=2):
        seen.append(x.clone())
        return x * factor

    return torchcache(check_rows=False, **options)(double), seen


KEYS = {
    "list of str": lambda n: [f"sample {i}" for i in range(n)],
    "tuple of int": lambda n: tuple(range(n)),
    "list of bytes": lambda n: [bytes([i]) for i in range(n)],
    "mixed": lambda n: [i if i % 2 else str(i) for i in range(n)],
    "tensor": torch.arange,
    "uint8 tensor": lambda n: torch.arange(n, dtype=torch.uint8),
    "array": np.arange,
    "range": range,
    "large": lambda n: [2**100 + i for i in range(n)],
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_key_stands_for_its_input(tmp_path, kind, where):
    options = {} if where == "memory" else {
        "persistent": True, "persistent_cache_dir": tmp_path, "max_memory_cache_size": 0
    }  # fmt: skip
    cached, seen = counted(**options)
    x, keys = batch(), KEYS[kind](6)
    with sample_keys(keys):
        first = cached(x)
    with sample_keys(keys[3:]):
        second = cached(x[3:])
    assert torch.equal(first, 2 * x)
    assert torch.equal(second, 2 * x[3:])
    assert len(seen) == 1


def test_integers_of_every_form_are_one_key():
    cached, seen = counted()
    for keys in (range(6), torch.arange(6), np.arange(6, dtype=np.int16), [np.int64(i) for i in range(6)]):
        with sample_keys(keys):
            cached(batch())
    assert len(seen) == 1


def test_keys_of_another_type_are_others():
    cached, seen = counted()
    for keys in ([1, 2], ["1", "2"], [b"1", b"2"]):
        with sample_keys(keys):
            cached(batch(2))
    assert len(seen) == 3


def test_a_key_and_the_digest_of_an_input_are_two_things():
    cached, seen = counted()
    cached(batch(2))
    with sample_keys([0, 1]):
        cached(batch(2))
    cached(batch(2))
    assert len(seen) == 2


def test_only_what_is_missing_is_computed_in_any_order():
    cached, seen = counted()
    x = batch()
    with sample_keys([0, 1, 2]):
        cached(x[:3])
    with sample_keys([5, 1, 5, 0]):
        assert torch.equal(cached(x[[5, 1, 5, 0]]), 2 * x[[5, 1, 5, 0]])
    assert [len(rows) for rows in seen] == [3, 1]


def test_state_form_and_plain_arguments_still_count():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0), requires_grad=False)

        def forward(self, x, shift=0):
            return x * self.factor + shift

    module = torchcache(check_rows=False)(Scale())
    x = batch(2)

    def call(x, **kwargs):
        with sample_keys([0, 1]):
            return module(x, **kwargs)

    assert torch.equal(call(x), x * 2)
    assert torch.equal(call(x, shift=1), x * 2 + 1)
    assert torch.equal(call(x.double()), x.double() * 2)
    assert call(torch.cat([x, x], 1)).shape == (2, 6)
    module.factor.fill_(3)
    assert torch.equal(call(x), x * 3)


class Outer(nn.Module):
    """A model with a cached part deep inside."""

    def __init__(self, inner):
        super().__init__()
        self.block = nn.Sequential(nn.Identity(), nn.Sequential(inner))

    def forward(self, x):
        return self.block(x + 0.0) + 1


def test_they_reach_a_part_deep_inside():
    inner = torchcache(check_rows=False)(nn.Linear(3, 3).requires_grad_(False))
    outer = Outer(inner)
    x = batch()
    with sample_keys(range(6)):
        first = outer(x)
    with sample_keys([4, 2]):
        assert torch.equal(outer(x[[4, 2]]), first[[4, 2]])
    assert cache_of(inner).stats().misses == 6


def test_a_cached_part_inside_a_cached_model_gets_the_keys_of_the_rows_it_sees():
    inner = torchcache()(nn.Linear(3, 3).requires_grad_(False))
    outer = torchcache()(Outer(inner))
    x = batch(8)
    with disabled():
        want = outer(x)
    for rows in ([0, 1, 2], [2, 4, 0, 5], [5, 6, 6], [7, 1]):
        with sample_keys(rows):
            assert torch.allclose(outer(x[rows]), want[rows], atol=1e-6)
    with sample_keys([3]):
        inner(x[[3]] + 0.0)
    cache_of(outer).clear()
    with sample_keys(range(8)):
        assert torch.allclose(outer(x), want, atol=1e-6)
    assert cache_of(inner).stats().misses == 8


def test_padded_batches_may_have_keys():
    cached = torchcache(padded={"ids": "mask"})(lambda ids, mask: ids * mask)
    for width in (3, 5):
        ids, mask = torch.zeros(2, width), torch.zeros(2, width)
        ids[:, :2], mask[:, :2] = torch.tensor([[1.0, 2], [3, 4]]), 1
        with sample_keys(["a", "b"]):
            assert torch.equal(cached(ids, mask), ids)
    assert cache_of(cached).stats().misses == 2


def test_the_innermost_counts_and_ends():
    cached, seen = counted()
    x = batch(2)
    with sample_keys([0, 1]):
        with sample_keys([2, 3]):
            cached(x)
        cached(x)
    cached(x)
    with sample_keys([2, 3]):
        cached(x)
    assert len(seen) == 3


def test_they_end_with_an_exception():
    cached, seen = counted()
    with pytest.raises(KeyError), sample_keys([0, 1, 2]):
        raise KeyError
    cached(batch(2))
    assert len(seen) == 1


def test_they_hold_for_one_thread_and_one_task():
    cached, _ = counted()

    async def call(keys):
        with sample_keys(keys):
            await asyncio.sleep(0)
            return cached(batch(len(keys)))

    async def both():
        await asyncio.gather(call([0, 1]), call([0, 1, 2]))

    asyncio.run(both())
    with sample_keys([0, 1, 2, 3]):
        thread = threading.Thread(target=cached, args=(batch(2),))
        thread.start()
        thread.join()
    assert cache_of(cached).stats().misses == 2 + 1 + 2


def test_whole_calls_go_by_their_arguments():
    calls = []

    @torchcache(batch_dim=None)
    def load(i):
        calls.append(i)
        return i + 1

    with sample_keys([0, 1, 2]):
        assert (load(1), load(2), load(1)) == (2, 3, 2)
    assert calls == [1, 2]


# -- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_another_number_of_keys_is_refused(n):
    cached, seen = counted()
    with sample_keys(range(n)), pytest.raises(UncacheableError, match=f"{n} keys.*batch of 2") as refused:
        cached(batch(2))
    assert refused.value.argument == "ids"
    assert seen == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("ab", "got str"),
        (b"ab", "got bytes"),
        (3, "got int"),
        (None, "got NoneType"),
        ({0: 1}, "got dict"),
        ([0, 1.0], "type float for sample 1"),
        ([0, True], "type bool for sample 1"),
        ([None], "type NoneType for sample 0"),
        (torch.zeros(2), "tensor of torch.float32"),
        (torch.zeros(2, 1, dtype=torch.long), "shape \\(2, 1\\)"),
        (torch.tensor([True]), "tensor of torch.bool"),
        (np.zeros(2), "type float"),
    ],
)
def test_what_is_no_list_of_keys_is_refused(keys, said):
    with pytest.raises(UncacheableError, match=said) as refused, sample_keys(keys):
        pass
    assert refused.value.argument == "ids"


def program(directory, **options):
    """Return the cached function of one program of several that share a directory."""

    def double(x):
        return x * 2

    return torchcache(
        persistent=True, persistent_cache_dir=directory, persistent_module_hash="double", check_rows=False, **options
    )(double)


@pytest.mark.parametrize("memory", [0, 1e6])
def test_a_second_program_with_other_inputs_under_the_same_keys_gets_none_of_the_first_ones_rows(
    tmp_path, caplog, memory
):
    first, second = program(tmp_path), program(tmp_path, max_memory_cache_size=memory)
    for i in range(0, 640, 32):
        with sample_keys(range(i, i + 32)):
            first(batch(32, start=i))
    cache_of(first).flush()
    for _ in range(2):
        for i in range(0, 640, 32):
            x = batch(32, start=i + 1)
            with sample_keys(range(i, i + 32)):
                assert torch.equal(second(x), 2 * x)
    assert cache_of(second).stats().bypasses == {"sample_key_of_other_inputs": 40}
    assert "a key of its own" in caplog.text


def test_a_second_program_with_the_same_inputs_under_the_same_keys_computes_nothing(tmp_path):
    first, second = program(tmp_path), program(tmp_path, mode="require")
    for cached in (first, second):
        for i in range(0, 640, 32):
            x = batch(32, start=i)
            with sample_keys(range(i, i + 32)):
                assert torch.equal(cached(x), 2 * x)
        cache_of(cached).flush()
    assert cache_of(second).stats().store_hits == 640


def test_after_the_first_batches_a_share_of_the_keys_is_watched_until_one_is_wrong():
    cached, _ = counted()

    def call(i, start):
        x = batch(1, start=start)
        with sample_keys([i]):
            return torch.equal(cached(x), 2 * x)

    assert all(call(i, i) for i in [*range(400), *range(400)])
    right = [call(i, i + 1000) for i in range(400)]
    first = right.index(True)
    assert first < 150  # one in sixteen is watched
    assert all(right[first:])
    assert cache_of(cached).stats().bypasses == {"sample_key_of_other_inputs": right.count(True)}


def test_inputs_that_are_no_tensors_and_padded_ones_are_compared_too():
    lengths = torchcache(persistent_module_hash="lengths", check_rows=False)(
        lambda texts: torch.tensor([[float(len(text))] for text in texts])
    )
    padded = torchcache(padded={"ids": "mask"})(lambda ids, mask: ids * mask)
    with sample_keys(["a"]):
        assert lengths(["one"]) == 3
        assert lengths(["three"]) == 5
        assert lengths(["one"]) == 3
        for value, width in ((1.0, 2), (1.0, 4), (2.0, 3)):
            ids, mask = torch.zeros(1, width), torch.zeros(1, width)
            ids[:, :2], mask[:, :2] = value, 1
            assert torch.equal(padded(ids, mask), ids)
    assert cache_of(lengths).stats().bypasses == {"sample_key_of_other_inputs": 1}
    assert cache_of(padded).stats().bypasses == {"sample_key_of_other_inputs": 1}
    assert cache_of(padded).stats().misses == 1


def test_a_row_that_says_nothing_of_its_inputs_is_a_miss():
    cached, seen = counted()
    with sample_keys([0]):
        cached(batch(1))
        explained = cache_of(cached).explain(batch(1))
        core = cache_of(cached)._core
        tiers, namespace = core.tiers, core.caller.keys._last[2]
        digest = bytes.fromhex(explained.samples[0].digest)
        layout = Layout((Leaf("float32", "float32", (3,)),))
        tiers._memory.delete_many(namespace, [digest])
        tiers._memory.put_many(namespace, Rows([digest], layout, np.zeros((1, 12), np.uint8)))
        assert torch.equal(cached(batch(1)), 2 * batch(1))
    assert len(seen) == 2


def test_two_threads_with_other_inputs_under_one_key_get_their_own_results():
    computing, may_end = threading.Event(), threading.Event()

    def double(x):
        computing.set()
        assert may_end.wait(30)
        return x * 2

    cached = torchcache(persistent_module_hash="threads", check_rows=False)(double)
    flights = cache_of(cached)._core.caller.joining.flights
    claim = flights.claim

    def claim_and_let_go(*args, **kwargs):
        joined = claim(*args, **kwargs)
        if joined:
            may_end.set()
        return joined

    flights.claim = claim_and_let_go

    def call(start):
        with sample_keys([0]):
            return cached(batch(1, start=start))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, 0)
        assert computing.wait(30)
        second = pool.submit(call, 100)
        assert torch.equal(first.result(30), 2 * batch(1))
        assert torch.equal(second.result(30), 2 * batch(1, start=100))
    assert cache_of(cached).stats().shared_rows == 0


def test_what_verify_hits_replaces_is_found_by_its_key():
    factor = [2]
    cached = torchcache(persistent_module_hash="verified", check_rows=False, verify_hits=1.0)(lambda x: x * factor[0])
    for value in (2, 3, 3):
        factor[0] = value
        with sample_keys([0, 1]):
            assert torch.equal(cached(batch(2)), value * batch(2))
    assert cache_of(cached).stats().mismatched_rows == 2
    assert cache_of(cached).stats().bypasses == {}


def test_a_key_that_one_batch_repeats_with_other_inputs_is_always_noticed():
    cached, _ = counted()
    for i in range(20):
        x = batch(3, start=i)
        with sample_keys([f"a{i}", f"b{i}", f"a{i}"]):
            assert torch.equal(cached(x), 2 * x)
    assert cache_of(cached).stats().bypasses == {"sample_key_of_other_inputs": 20}


def test_explain_goes_by_them():
    cached, _ = counted()
    with sample_keys([0, 1]):
        cached(batch(2))
        assert [sample.found_in for sample in cache_of(cached).explain(batch(2)).samples] == ["memory", "memory"]
    assert [sample.found_in for sample in cache_of(cached).explain(batch(2)).samples] == ["nowhere", "nowhere"]
