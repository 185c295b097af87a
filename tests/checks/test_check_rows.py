"""Rows that depend on their batch are found out before anything is served to another batch; others raise no alarm."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from stress import batch_functions
from torchcache import CacheMissError, cache_of, torchcache
from torchcache.storage.lmdb import LmdbStore


def stats_of(target):
    return cache_of(target).stats()


def wrap(function, **options):
    """Decorate a function; also return the sizes of the batches that reached it."""
    sizes = []

    @torchcache(**options)
    def cached(x):
        sizes.append(len(x))
        return function(x)

    return cached, sizes


def batches(n, *shape, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) for _ in range(count)]


def seeded(make):
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


class SequenceFirstLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x):
        return self.lstm(x)[0]


class FunctionalBatchNorm(nn.Module):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


DEPENDENT = {
    "mean": (lambda: lambda x: x - x.mean(0), (8, 16)),
    "mean of a large batch": (lambda: lambda x: x - x.mean(0), (512, 16)),
    "softmax over the batch": (lambda: lambda x: x.softmax(0), (16, 8)),
    "a row of numbers that sums up": (lambda: lambda x: x.cumsum(0), (6, 4)),
    "the reverse": (lambda: lambda x: x.flip(0).cumsum(0).flip(0), (6, 4)),
    "ranks": (lambda: lambda x: x.argsort(0).argsort(0), (16, 4)),
    "similarity of all pairs": (lambda: lambda x: x @ x.T, (6, 4)),
    "an unbatched image": (lambda: seeded(lambda: nn.Conv2d(3, 3, 3, padding=1)), (3, 9, 9)),
    "sequence-first LSTM": (lambda: seeded(SequenceFirstLSTM), (7, 2, 8)),
    "sequence-first transformer": (
        lambda: seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)), (7, 2, 8),
    ),
    "batch norm without statistics": (lambda: seeded(FunctionalBatchNorm), (8, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", DEPENDENT)
def test_rows_that_depend_on_their_batch_are_bypassed(case, caplog):
    make, shape = DEPENDENT[case]
    plain = make()
    cached, _ = wrap(plain)
    first, second, third, _ = batches(*shape)
    for x in (first, second, third, first, second[: len(second) // 2] if "image" not in case else second):
        assert torch.allclose(cached(x), plain(x), atol=1e-6)
    stats = stats_of(cached)
    assert set(stats.bypasses) == {"rows_depend_on_batch"}
    assert stats.memory_rows == stats.hits == 0
    assert sum("depend on the batch" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16, 250, 2048])
@pytest.mark.parametrize("name", batch_functions.DEPENDENT)
def test_rows_that_depend_on_their_batch_are_noticed_before_a_hit_whatever_its_size(name, n):
    function = batch_functions.DEPENDENT[name]
    for seed in range(3):
        cached = torchcache()(lambda x: function(x))  # noqa: PLW0108 - each in a cache of its own
        first, second, third, _ = batches(n, 16, seed=100 * n + seed)
        for x in (first, second, torch.cat([first, third])[n // 2 :], second.flip(0)):
            assert torch.equal(cached(x), function(x))
        assert stats_of(cached).hits == 0
        assert set(stats_of(cached).bypasses) == {"rows_depend_on_batch"}


@pytest.mark.parametrize("sizes", [(7, 4, 9), (8, 5, 3), (5, 8, 6), (3, 2, 4), (2, 3, 2), (64, 33, 64)])
def test_what_is_done_to_every_other_size_of_a_batch_is_noticed_before_a_hit(sizes):
    function = batch_functions.DEPENDENT["odd or even"]
    for seed in range(3):
        cached = torchcache()(lambda x: function(x))  # noqa: PLW0108 - each in a cache of its own
        rows = torch.randn(200, 16, generator=torch.Generator().manual_seed(seed))
        for x in (*rows[: sum(sizes)].split(sizes), rows[1:5], rows[2:9], rows[:2]):
            assert torch.equal(cached(x), function(x))
        assert stats_of(cached).hits == 0


WEIGHTS = {"sum": lambda x: x.sum(1), "norm": lambda x: x.norm(dim=1), "first column": lambda x: x[:, 0]}
BOUNDS = {
    "median": lambda weights: weights >= weights.median(),
    "mean": lambda weights: weights > weights.mean(),
    "quartile": lambda weights: weights >= weights.quantile(0.25),
    "maximum": lambda weights: weights < weights.max(),
    "count": lambda weights: weights >= weights.topk(2).values[-1],
}


@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_rows_that_a_batch_drops_for_what_the_others_are_are_noticed_before_a_hit(weight, bound, n):
    for seed in range(3):
        cached = torchcache()(lambda x: x * BOUNDS[bound](WEIGHTS[weight](x))[:, None])
        for x in batches(n, 16, seed=seed):
            cached(x)
        assert stats_of(cached).hits == 0
        assert set(stats_of(cached).bypasses) == {"rows_depend_on_batch"}


@pytest.mark.parametrize("n", [2, 8, 700])
@pytest.mark.parametrize("name", batch_functions.OWN)
def test_rows_of_their_own_raise_no_alarm_whatever_the_size(name, n):
    module, dtype = batch_functions.make_own(name, 16, seed=n)
    cached = torchcache()(lambda x: module(x))  # noqa: PLW0108 - the module stays as it is
    first, second, *_ = (x.to(dtype) for x in batches(n, 16, seed=n))
    for x in (first, second, first, torch.cat([first, second])):
        cached(x)
    assert not stats_of(cached).bypasses
    assert stats_of(cached).hits == 3 * n


def deep(dtype):
    def make():
        layers = [m for _ in range(12) for m in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
        return nn.Sequential(*layers).to(dtype)

    return make


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


INDEPENDENT = {
    "float16": (deep(torch.float16), (9, 64), torch.float16),
    "bfloat16": (deep(torch.bfloat16), (9, 64), torch.bfloat16),
    "float32": (deep(torch.float32), (9, 64), torch.float32),
    "convolutions": (Convolutional, (5, 3, 32, 32), torch.float32),
    "a large matmul": (lambda: nn.Linear(4096, 1024), (33, 4096), torch.float32),
    "batch-first transformer": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (5, 7, 32), torch.float32,
    ),
    "rows of zeros": (lambda: nn.Threshold(10.0, 0.0), (5, 8), torch.float32),
    "instance norm": (lambda: nn.InstanceNorm1d(4), (5, 4, 16), torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEPENDENT)
def test_rows_of_their_own_raise_no_alarm(case):
    make, shape, dtype = INDEPENDENT[case]
    cached, sizes = wrap(seeded(make))
    n = shape[0]
    rounds = [x.to(dtype) for x in batches(*shape)]
    results = [cached(x) for x in rounds]
    few = sizes[1]
    assert few in {3, 4, 5, 6, 7, 8} - {n}
    if case == "rows of zeros":  # they prove nothing, so it is tried three times, and kept then
        assert sizes == [n, 4, n + 1, 5, n + 1, 5, n]
        results = [cached(x) for x in rounds]
    else:  # a few rows once more, and then one row more
        assert sizes == [n, few, n + 1, n, n]
        assert stats_of(cached).misses == 4 * n
    hits = stats_of(cached).hits
    assert all(torch.equal(cached(x), result) for x, result in zip(rounds, results, strict=True))
    assert not stats_of(cached).bypasses
    assert stats_of(cached).memory_hits == hits + 4 * n


@pytest.mark.parametrize("tier", ["queue", "store"])
def test_what_the_caller_writes_into_a_checked_batch_reaches_no_tier(tier, cache_dir, monkeypatch):
    may_pack, pack = threading.Event(), LmdbStore.pack

    def waits(self, namespace, rows):
        assert may_pack.wait(30)
        return pack(self, namespace, rows)

    monkeypatch.setattr(LmdbStore, "pack", waits)
    cached, _ = wrap(lambda x: x * 2, persistent=True, persistent_cache_dir=cache_dir, max_memory_cache_size=0)
    first, second, *_ = batches(4, 3)
    cached(first)
    cached(second).zero_()
    if tier == "store":
        may_pack.set()
        assert cache_of(cached).flush()
    assert torch.equal(cached(second), second * 2)
    may_pack.set()
    cache_of(cached).close()


def test_hits_in_the_second_batch_are_served_and_its_other_rows_checked_beside_a_witness():
    cached, sizes = wrap(lambda x: x * 2)
    first, second, *_ = batches(8, 3)
    cached(first)
    mixed = torch.cat([first[4:], second])
    assert torch.equal(cached(mixed), mixed * 2)
    assert sizes == [8, 5, 9]
    assert stats_of(cached).misses == 16


@pytest.mark.parametrize("mode", ["on", "read", "require"])
def test_rows_that_an_earlier_program_computed_one_by_one_are_served_to_a_batch_once_it_is_checked(mode, cache_dir):
    def centred(x):
        return x - x.mean(0)

    one, other, *_ = batches(1, 3)
    for x in (one, other):  # two programs, so that neither sees two batches
        before = torchcache(persistent=True, persistent_cache_dir=cache_dir)(centred)
        before(x)
        cache_of(before).close()
    later = torchcache(persistent=True, persistent_cache_dir=cache_dir, mode=mode)(centred)
    assert torch.equal(later(one), centred(one)), "it was computed alone"
    assert stats_of(later).hits == 1
    x = torch.cat([one, other])
    if mode == "require":
        with pytest.raises(CacheMissError, match="rows_not_checked"):
            later(x)
    else:
        assert torch.equal(later(x), centred(x))
        assert stats_of(later).bypasses == {"rows_depend_on_batch": 1}
        assert stats_of(later).hits == 1
    cache_of(later).close()


def test_equal_rows_of_a_batch_are_computed_as_they_are_until_rows_are_known_to_be_their_own():
    ones = torch.ones(8, 3)
    first, second, *_ = batches(8, 3)
    for plain, hits in ((lambda x: x * len(x), 0), (lambda x: x / x.max(), 24), (lambda x: x - x.mean(0), 24)):
        cached, _ = wrap(plain)
        for x in [ones] * 4:
            assert torch.equal(cached(x), plain(x)), "a batch of equal rows, as to warm up, says next to nothing"
        assert stats_of(cached).hits == hits, "copies are served to copies, where their number does not matter"
        for x in (first, second, second[:4], ones):
            assert torch.equal(cached(x), plain(x))
        assert stats_of(cached).hits == hits
        assert stats_of(cached).bypasses["rows_depend_on_batch"] >= 4


def test_what_differs_from_itself_is_taken_for_random_unless_a_name_vouches_for_it():
    numbers = iter(range(1000))  # not read by the walk: a library's own generator is not either

    class Counter:
        @staticmethod
        def draw():
            return next(numbers)

    def noisy(x):
        return x + Counter.draw()

    first, *_ = batches(8, 3)
    for name, bypasses in ((None, {"random_numbers"}), ("noisy", set())):
        cached = torchcache(persistent_module_hash=name, ignore=("numbers",) if name is None else ())(noisy)
        got = cached(first)
        assert torch.equal(cached(first), got) == (name is not None)
        assert set(stats_of(cached).bypasses) == bypasses


def test_a_module_that_takes_no_small_batch_is_checked_by_its_witness():
    def large_only(x):
        assert len(x) > 8
        return x - x.mean(0)

    def own(x):
        assert len(x) > 8
        return x * 2

    for plain in (large_only, own):
        cached, sizes = wrap(plain)
        first, second, third, _ = batches(9, 3)
        for x in (first, second, third, third, first):
            assert torch.equal(cached(x), plain(x))
        bypasses = stats_of(cached).bypasses
        if plain is own:
            assert sizes == [9, 4, 5, 10, 5, 6, 9, 9], "few rows were refused, so the first batch was not kept"
            assert not bypasses
        else:
            assert bypasses == {"rows_depend_on_batch": 4}


def test_the_verdict_is_kept_with_the_namespace(cache_dir):
    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    first, second, third, _ = batches(4, 3)

    def centred(x):
        return x - x.mean(0)

    for bypasses in (3, 3):  # the second time, the verdict is known at once
        cached = torchcache(**options)(centred)
        for x in (first, second, third):
            result = cached(x)
        assert torch.equal(result, centred(third))
        stats = stats_of(cached)
        assert (stats.misses, stats.bypasses) == (0, {"rows_depend_on_batch": bypasses})
        cache_of(cached).close()


def test_that_rows_are_their_own_is_not_found_out_twice(cache_dir):
    sizes = []

    def twice(x):
        sizes.append(len(x))
        return x * 2

    rounds = [*batches(9, 3), *batches(9, 3, seed=1)]
    for part in (rounds[:4], rounds[4:]):
        cached = torchcache(persistent=True, persistent_cache_dir=cache_dir)(twice)
        for x in part:
            cached(x)
        cache_of(cached).close()
    assert sizes == [9, 4, 10, 9, 9, 9, 9, 9, 9]


def test_each_state_is_checked_for_itself():
    module = seeded(lambda: nn.Linear(3, 3))
    cached, sizes = wrap(module)
    first, second, *_ = batches(9, 3)
    for factor in (1, 2):
        with torch.no_grad():
            module.weight.mul_(factor)
        cached(first)
        cached(second)
    assert sizes == [9, 4, 10, 9, 4, 10]
    assert stats_of(cached).misses == 36
    assert not stats_of(cached).bypasses


def test_under_a_name_of_ones_own_weights_that_changed_are_no_alarm():
    module = torchcache(persistent_module_hash="named")(seeded(lambda: nn.Linear(3, 3)))
    first, second, third, fourth = batches(4, 3)
    module(first)
    with torch.no_grad():
        module.weight.mul_(10)  # the name says that this does not matter
    for x in (second, third, fourth):
        module(x)
    assert not stats_of(module).bypasses
    assert torch.equal(module(first), module(first))


def test_check_rows_can_be_turned_off():
    cached, sizes = wrap(lambda x: x - x.mean(0), check_rows=False)
    for x in batches(4, 3):
        cached(x)
    assert sizes == [4, 4, 4, 4]
    assert not stats_of(cached).bypasses


def test_a_module_that_takes_one_sample_at_a_time_is_cached():
    def single(x):
        assert len(x) == 1
        return x * 2

    cached, sizes = wrap(single)
    rows = batches(1, 3, count=5)
    for x in [*rows, *rows]:
        assert torch.equal(cached(x), x * 2)
    stats = stats_of(cached)
    assert stats.bypasses == {}
    assert stats.memory_hits == 5
    assert sizes == [1] * 5


def test_a_module_of_a_fixed_batch_size_goes_around_the_cache():
    def fixed(x):
        return x.view(4, 3) * 2

    cached, _ = wrap(fixed)
    first, second, *_ = batches(4, 3)
    for x in (first, second, torch.cat([first[:2], second[2:]])):
        assert torch.equal(cached(x), fixed(x))
    assert set(stats_of(cached).bypasses) == {"rows_depend_on_batch"}


def test_rows_are_not_checked_when_one_more_does_not_fit_into_memory():
    def tight(x):
        if len(x) > 4:
            raise torch.OutOfMemoryError
        return x * 2

    cached, sizes = wrap(tight)
    rounds = batches(4, 3)
    for x in (*rounds, *rounds):
        assert torch.equal(cached(x), x * 2)
    assert stats_of(cached).bypasses == {"out_of_memory": 1}
    assert sizes == [4, 3, 9, 4, 4, 4, 4]


def test_inputs_of_another_shape_are_checked_among_themselves():
    cached, sizes = wrap(lambda x: x.flatten(1).sum(1, keepdim=True))
    for shape in ((9, 3), (9, 5), (9, 7)):
        cached(batches(*shape)[0])
    assert sizes == [9, 4] * 3
    cached(batches(9, 5)[1])
    cached(batches(9, 7)[1])
    assert sizes == [*[9, 4] * 3, 10, 10]


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_rounding_by_cache_dtype_is_no_alarm(dtype):
    cached, _ = wrap(lambda x: x * 3.3, cache_dtype=dtype)
    for x in batches(4, 300):
        cached(x)
    assert not stats_of(cached).bypasses


def test_each_form_of_a_call_is_checked_for_itself():
    def plain(x, center=False):
        return x - x.mean(0) if center else x * 2

    cached = torchcache()(plain)
    rounds = batches(8, 3)
    for center in (False, True):
        for x in rounds:
            assert len(cached(x, center)) == 8
    assert torch.equal(cached(rounds[0], center=True), plain(rounds[0], center=True))
    assert torch.equal(cached(rounds[0]), plain(rounds[0]))
    stats = stats_of(cached)
    assert stats.bypasses == {"rows_depend_on_batch": 5}
    assert stats.memory_hits == 8, "one form says nothing of the other"


def failing_once(error):
    """Return a function that fails the first time that it gets a batch of four rows and its witness."""
    failures = [error]

    def function(x):
        if len(x) == 9 and failures:
            raise failures.pop()
        return x * 2

    return function


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_memory_that_runs_out_on_the_cpu_is_no_verdict(error):
    cached, _ = wrap(failing_once(error), persistent_module_hash="failing")
    rounds = batches(4, 3)
    for x in (*rounds, *rounds):
        assert torch.equal(cached(x), x * 2)
    assert stats_of(cached).bypasses == {"out_of_memory": 1}
    assert stats_of(cached).memory_hits == 12


def test_a_passing_fault_after_rows_were_checked_condemns_nothing():
    cached, _ = wrap(failing_once(ConnectionError("gone")), persistent_module_hash="failing")
    small, large = batches(2, 3), batches(9, 3, seed=1)
    for x in small:
        cached(x)
    x = torch.cat([small[0], large[0]])  # nine of eleven rows are missing
    assert torch.equal(cached(x), x * 2)
    assert stats_of(cached).bypasses == {"other_batch_failed": 1}
    assert torch.equal(cached(x), x * 2)
    assert torch.equal(cached(x), x * 2)
    assert stats_of(cached).bypasses == {"other_batch_failed": 1}


def test_one_refused_batch_of_two_does_not_end_the_check_of_larger_ones():
    failures = [ValueError("a hiccup")]

    def plain(x):
        if len(x) == 2 and failures:
            raise failures.pop()
        return x - x.mean(0)

    cached, _ = wrap(plain)
    singles, larger = batches(1, 3), batches(8, 3, seed=1)
    for x in singles:
        cached(x)
    for x in larger:
        result = cached(x)
    assert torch.equal(result, plain(larger[-1]))
    assert stats_of(cached).bypasses["rows_depend_on_batch"] >= 3


def test_weights_that_go_back_and_forth_do_not_block_the_check():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x):
            return (x - x.mean(0)) * self.weight

    module = torchcache()(Centred())
    for i, x in enumerate(batches(8, 3, count=8)):
        module.weight.data.fill_(1.0 + i % 2)
        result = module(x)
    assert torch.equal(result, (x - x.mean(0)) * module.weight)
    assert stats_of(module).bypasses["rows_depend_on_batch"] >= 3


def test_check_rows_false_frees_what_was_condemned(cache_dir):
    options = {"persistent": True, "persistent_cache_dir": cache_dir}

    def centred(x):
        return x - x.mean(0)

    first, second, third, _ = batches(4, 3)
    cached = torchcache(**options)(centred)
    for x in (first, second):
        cached(x)
    cache_of(cached).close()
    free = torchcache(**options, check_rows=False)(centred)
    free(third)
    assert torch.equal(free(third[:2]), centred(third)[:2])
    assert not stats_of(free).bypasses
    cache_of(free).close()


def test_memory_format_is_no_dependence_and_rows_of_both_formats_go_together():
    conv = seeded(lambda: nn.Conv2d(3, 4, 3, padding=1))
    cached, _ = wrap(conv)
    first, second, third, _ = batches(4, 3, 8, 8)
    cached(first.contiguous(memory_format=torch.channels_last))
    cached(second)
    cached(third)
    mixed = torch.cat([first[:2], second[:2], third[:2]])
    assert torch.allclose(cached(mixed), conv(mixed), atol=1e-6)
    stats = stats_of(cached)
    assert not stats.bypasses
    assert stats.memory_hits == 6


def test_what_depends_on_the_size_of_a_large_batch_is_found_out():
    cached, _ = wrap(lambda x: x / len(x))
    for x in batches(256, 3):
        cached(x)
    assert stats_of(cached).bypasses["rows_depend_on_batch"] == 4


def test_a_witness_is_no_row_of_zeros():
    cached, _ = wrap(lambda x: x * x.std(0))
    first, second, third, _ = batches(8, 3)
    first[0] = 0.0
    for x in (first, second, third):
        result = cached(x)
    assert torch.equal(result, third * third.std(0))
