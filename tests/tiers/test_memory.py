"""The memory tier: values by key, least recently used out first, never above its limit."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from torchcache.layout import Layout, Leaf, Rows
from torchcache.storage.contract import Lookup
from torchcache.tiers.memory import MemoryTier

CPU = torch.device("cpu")
HERE, THERE = b"n" * 16, b"m" * 16


def layout_of(nbytes):
    return Layout((Leaf("uint8", "uint8", (nbytes,)),))


def digest(number):
    return number.to_bytes(16, "little")


def value(number, nbytes):
    """Return the bytes that belong to a key: any reader can check any answer."""
    return np.random.default_rng([number, nbytes]).integers(0, 256, nbytes, dtype=np.uint8)


def rows(numbers, nbytes):
    data = np.stack([value(n, nbytes) for n in numbers]) if numbers else np.empty((0, nbytes), np.uint8)
    return Rows([digest(n) for n in numbers], layout_of(nbytes), data)


def put(tier, numbers, nbytes, namespace=HERE):
    tier.put_many(namespace, rows(list(numbers), nbytes))


def get(tier, numbers, namespace=HERE):
    """Return what the tier has, as number -> bytes; check that its answer is complete and right."""
    numbers = list(numbers)
    lookup = tier.get_many(namespace, [digest(n) for n in numbers])
    found, missing = lookup.found, lookup.missing
    answered = {}
    for item in found:
        assert item.data.shape == (len(item.positions), item.layout.nbytes)
        for position, row in zip(item.positions, item.data, strict=True):
            assert position not in answered
            answered[position] = bytes(row)
            assert answered[position] == bytes(value(numbers[position], item.layout.nbytes))
    assert sorted([*answered, *missing]) == list(range(len(numbers)))
    assert len({item.layout for item in found}) == len(found), "one item a layout"
    return {numbers[position]: row for position, row in answered.items()}


def test_what_was_put_is_found():
    tier = MemoryTier(10_000, CPU)
    put(tier, range(10), 100)
    assert set(get(tier, range(10))) == set(range(10))


def test_what_was_not_put_is_missing():
    tier = MemoryTier(10_000, CPU)
    assert get(tier, range(3)) == {}
    put(tier, [1], 100)
    assert set(get(tier, range(3))) == {1}


def test_namespaces_do_not_mix():
    tier = MemoryTier(10_000, CPU)
    put(tier, [1], 100)
    put(tier, [2], 100, THERE)
    assert set(get(tier, [1, 2])) == {1}
    assert set(get(tier, [1, 2], THERE)) == {2}


def test_the_tier_keeps_a_copy():
    tier = MemoryTier(10_000, CPU)
    original = rows([1, 2], 100)
    tier.put_many(HERE, original)
    original.data[:] = 0
    get(tier, [1, 2])


def test_what_it_gives_out_belongs_to_the_receiver():
    tier = MemoryTier(10_000, CPU)
    put(tier, [1, 2], 100)
    for positions in ([1], [1, 2]):
        found = tier.get_many(HERE, [digest(n) for n in positions]).found
        found[0].data[:] = 0
        get(tier, [1, 2])


def test_a_key_may_be_asked_for_twice_in_one_batch():
    tier = MemoryTier(10_000, CPU)
    put(tier, [1, 2], 100)
    lookup = tier.get_many(HERE, [digest(n) for n in (1, 2, 1, 3, 1)])
    found, missing = lookup.found, lookup.missing
    assert missing == [3]
    assert sum(len(item.positions) for item in found) == 4


def test_a_key_that_is_there_is_not_put_again():
    tier = MemoryTier(10_000, CPU)
    put(tier, [1, 2], 100)
    used = tier.usage()
    put(tier, [1, 2, 1], 100)
    assert tier.usage() == used == (2, used[1])


def test_nothing_is_put_with_an_empty_batch():
    tier = MemoryTier(10_000, CPU)
    put(tier, [], 100)
    assert tier.usage() == (0, 0)
    assert tier.get_many(HERE, []) == Lookup([], [])


# -- least recently used ----------


def test_the_least_recently_used_goes_first():
    tier = MemoryTier(1000, CPU)
    for number in range(10):
        put(tier, [number], 100)
    get(tier, [0, 3])
    for number in range(10, 14):
        put(tier, [number], 100)
    assert set(get(tier, range(14))) == {0, 3, 6 + 1, 8, 9, 10, 11, 12, 13, 7 - 1}


def test_a_batch_that_does_not_fit_leaves_its_last_rows():
    tier = MemoryTier(1000, CPU)
    put(tier, range(25), 100)
    assert set(get(tier, range(25))) == set(range(15, 25))


def test_many_evictions_stay_in_order():
    tier = MemoryTier(300_000, CPU)
    for start in range(0, 20_000, 100):
        put(tier, range(start, start + 100), 100)
        if start >= 4000:
            get(tier, [5, 17])
        elif start >= 100:
            get(tier, range(50))
    kept = get(tier, range(20_000))
    assert {5, 17} <= set(kept)
    others = sorted(set(kept) - {5, 17})
    whole_batches = range(others[0] // 100 * 100 + 100, 20_000)
    assert set(whole_batches) <= set(others), "rows of one batch are equally old"
    assert len(kept) >= 2700


def test_a_layout_that_is_no_longer_used_gives_its_room_to_another():
    tier = MemoryTier(100_000, CPU)
    put(tier, range(90), 1000)
    for start in range(0, 10_000, 100):
        put(tier, range(start, start + 100), 100)
    assert tier.usage()[0] >= 900
    assert not any(len(row) == 1000 for row in get(tier, range(10_000)).values())


# -- the limit ----------


@pytest.mark.parametrize("nbytes", [0, 1, 7, 100, 999, 5000])
@pytest.mark.parametrize("limit", [1, 999, 10_000, 1_000_000])
def test_the_bytes_never_exceed_the_limit(nbytes, limit):
    tier = MemoryTier(limit, CPU)
    for start in range(0, 600, 60):
        put(tier, range(start, start + 60), nbytes)
        assert tier.usage()[1] <= limit
        get(tier, range(0, start, 7))


def test_the_room_is_used():
    for nbytes in (10, 100, 1000, 30_000):
        tier = MemoryTier(1_000_000, CPU)
        for start in range(0, 4000, 50):
            put(tier, range(start, start + 50), nbytes)
        held = tier.usage()[0]
        assert held * nbytes >= 0.85 * 1_000_000 or held == 4000


def test_bookkeeping_counts_so_that_tiny_rows_stay_within_the_limit_too():
    tier = MemoryTier(2_000_000, CPU)
    for start in range(0, 60_000, 2000):
        put(tier, range(start, start + 2000), 1)
    held, used = tier.usage()
    assert used <= 2_000_000
    assert held * 100 <= 4_000_000


@pytest.mark.parametrize("limit", [500, 50_000])
def test_a_value_larger_than_the_limit_is_passed_by(limit):
    tier = MemoryTier(limit, CPU)
    put(tier, range(3), 100)
    put(tier, [7], limit + 1)
    assert set(get(tier, [*range(3), 7])) == {0, 1, 2}
    put(tier, [4], 100)
    assert 4 in get(tier, [4])


def test_a_value_as_large_as_the_limit_fits():
    tier = MemoryTier(5000, CPU)
    put(tier, [1], 5000)
    assert set(get(tier, [1])) == {1}
    assert tier.usage() == (1, 5000)


def test_rows_of_different_layouts_stay_apart():
    tier = MemoryTier(1_000_000, CPU)
    sizes = {number: (number % 5) * 37 for number in range(60)}
    for number, nbytes in sizes.items():
        put(tier, [number], nbytes)
    assert {n: len(row) for n, row in get(tier, range(60)).items()} == sizes


def test_layouts_of_equal_size_keep_their_dtype():
    tier = MemoryTier(10_000, CPU)
    data = np.zeros((1, 8), np.uint8)
    layouts = [Layout((Leaf(name, name, shape),)) for name, shape in (("float32", (2,)), ("float64", (1,)))]
    for number, layout in enumerate(layouts):
        tier.put_many(HERE, Rows([digest(number)], layout, data))
    found = tier.get_many(HERE, [digest(0), digest(1)]).found
    assert [(list(item.positions), item.layout) for item in found] == [([0], layouts[0]), ([1], layouts[1])]


def test_clear_frees_everything():
    tier = MemoryTier(10_000, CPU)
    put(tier, range(10), 100)
    tier.clear()
    assert tier.usage() == (0, 0)
    assert get(tier, range(10)) == {}
    put(tier, range(3), 100)
    assert len(get(tier, range(3))) == 3


def test_it_says_what_is_there_and_that_is_no_use_of_it():
    tier = MemoryTier(1000, CPU)
    put(tier, range(10), 100)
    assert tier.has_many(HERE, [digest(n) for n in (3, 99, 3, 0)]) == [True, False, True, True]
    assert tier.has_many(THERE, [digest(3)]) == [False]
    assert tier.has_many(HERE, []) == []
    get(tier, range(1, 10))
    assert tier.has_many(HERE, [digest(0)]) == [True]
    put(tier, [50], 100)
    assert tier.has_many(HERE, [digest(0)]) == [False]


def test_deleted_rows_are_gone_and_can_be_put_anew():
    tier = MemoryTier(100_000, CPU)
    put(tier, range(10), 100)
    put(tier, range(10), 40, THERE)
    assert tier.delete_many(HERE, [digest(n) for n in (2, 77, 5, 2)]) == 2
    assert tier.delete_many(b"x" * 16, [digest(2)]) == 0
    assert set(get(tier, range(10))) == set(range(10)) - {2, 5}
    assert len(get(tier, range(10), THERE)) == 10
    put(tier, range(4), 7)
    assert {n: len(row) for n, row in get(tier, range(4)).items()} == {0: 100, 1: 100, 2: 7, 3: 100}
    check_invariants(tier)


def test_a_slab_is_freed_with_its_last_row():
    tier = MemoryTier(1_000_000, CPU)
    put(tier, range(100), 100)
    put(tier, range(100, 150), 200)
    tier.delete_many(HERE, [digest(n) for n in range(99)])
    assert tier.usage() == (51, 100 * 100 + 50 * 200)
    tier.delete_many(HERE, [digest(99)])
    assert tier.usage() == (50, 50 * 200)
    tier.delete_many(HERE, [digest(n) for n in range(100, 150)])
    assert tier.usage() == (0, 0)
    check_invariants(tier)
    assert (tier._places, tier._slabs) == ({}, {})


def test_a_freed_slab_is_not_kept_by_what_is_lined_up_to_be_evicted():
    tier = MemoryTier(100_000, CPU)
    for start in range(0, 4000, 100):
        put(tier, range(start, start + 100), 100)
    slabs = [weakref.ref(slab) for slab in tier._slabs.values()]
    assert len(slabs) > 1
    tier.delete_namespace(HERE)
    gc.collect()
    assert [slab for slab in slabs if slab() is not None] == []


def test_a_deleted_namespace_leaves_the_others():
    tier = MemoryTier(100_000, CPU)
    for nbytes in (100, 40):
        put(tier, range(nbytes, nbytes + 20), nbytes)
        put(tier, range(nbytes, nbytes + 20), nbytes, THERE)
    tier.delete_namespace(HERE)
    tier.delete_namespace(b"x" * 16)
    assert get(tier, range(200)) == {}
    assert len(get(tier, range(200), THERE)) == 40
    check_invariants(tier)


def check_invariants(tier):
    """The dictionaries have exactly the digests of the used slots, and the sums are right."""
    used = {}
    for slab in tier._slabs.values():
        assert slab in tier._shelves[slab.layout]
        free = set(slab.free)
        assert len(free) == len(slab.free) < slab.filled
        for slot, owner in enumerate(slab.owners):
            assert (owner is None) == (slot in free)
            if owner is not None:
                used[owner] = slab.number << 32 | slot
    assert used == {(name, d): code for name, places in tier._places.items() for d, code in places.items()}
    assert all(tier._places.values())
    assert sum(map(len, tier._shelves.values())) == len(tier._slabs)
    assert tier._rows == len(used)
    assert tier._bytes == sum(slab.filled * slab.layout.nbytes for slab in tier._slabs.values())
    assert tier._slots == sum(slab.filled for slab in tier._slabs.values())


def test_a_limit_of_nothing_holds_nothing():
    tier = MemoryTier(0, CPU)
    put(tier, range(3), 100)
    assert tier.usage() == (0, 0)


def test_threads_get_whole_rows():
    tier = MemoryTier(20_000, CPU)
    barrier = threading.Barrier(4)

    def work(seed):
        generator = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(100):
            numbers = sorted(set(generator.integers(0, 400, 20).tolist()))
            nbytes = int(generator.choice([50, 51, 500]))
            put(tier, [n * 3 + (nbytes % 3) for n in numbers], nbytes)
            get(tier, range(*sorted(generator.integers(0, 1200, 2).tolist())))
            tier.delete_many(HERE, [digest(int(n)) for n in generator.integers(0, 1200, 5)])
            if generator.random() < 0.05:
                tier.delete_namespace(HERE)
            assert tier.usage()[1] <= 20_000
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    check_invariants(tier)


# -- against a model ----------

SIZES = (0, 1, 40, 130, 1000)
numbers = st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True)


class AgainstAnOrderedDict(RuleBasedStateMachine):
    """The model: keys by their last use. What is gone was used no later than anything that is still there."""

    @initialize(limit=st.sampled_from([50, 999, 3000, 20_000]))
    def start(self, limit):
        self.limit = limit
        self.tier = MemoryTier(limit, CPU)
        self.used_at = OrderedDict()  # key -> tick of its last use; keys that were put and not seen to be gone
        self.tick = 0

    def ask(self, keys):
        """Compare what the tier has with the model; return it."""
        held = set(get(self.tier, keys))
        assert held <= self.used_at.keys()
        gone = [self.used_at.pop(key) for key in keys if key in self.used_at and key not in held]
        if gone and held:
            assert max(gone) <= min(self.used_at[key] for key in held)
        self.tick += 1
        for key in held:
            self.used_at[key] = self.tick
        return held

    @rule(numbers=numbers)
    def get(self, numbers):
        self.ask([number * len(SIZES) + i for number in numbers for i in range(len(SIZES))])

    @rule(numbers=numbers, nbytes=st.sampled_from(SIZES))
    def get_and_put_what_is_missing(self, numbers, nbytes):
        keys = [number * len(SIZES) + SIZES.index(nbytes) for number in numbers]
        held = self.ask(keys)
        new = [key for key in keys if key not in held]
        self.tier.put_many(HERE, rows(new, nbytes))
        self.tick += 1
        # Of a batch that does not fit as a whole, only the last rows are taken.
        room = self.limit // max(nbytes, 1)
        taken = new[max(0, len(new) - room) :]
        self.used_at.update(dict.fromkeys(taken, self.tick))
        if taken:
            assert self.tier.usage()[0] >= len(taken)

    @rule(numbers=numbers)
    def delete(self, numbers):
        keys = [number * len(SIZES) + i for number in numbers for i in range(len(SIZES))]
        there = sum(self.tier.has_many(HERE, [digest(key) for key in keys]))
        assert self.tier.delete_many(HERE, [digest(key) for key in keys]) == there
        assert not any(self.tier.has_many(HERE, [digest(key) for key in keys]))
        for key in keys:
            self.used_at.pop(key, None)

    @precondition(lambda self: self.used_at)
    @rule()
    def delete_namespace(self):
        self.tier.delete_namespace(HERE)
        self.used_at.clear()
        assert self.tier.usage() == (0, 0)

    @precondition(lambda self: self.used_at)
    @rule()
    def clear(self):
        self.tier.clear()
        self.used_at.clear()
        assert self.tier.usage() == (0, 0)

    @invariant()
    def the_limit_holds(self):
        if hasattr(self, "tier"):
            n, used = self.tier.usage()
            assert used <= self.limit
            assert n <= len(self.used_at)
            check_invariants(self.tier)

    def teardown(self):
        if hasattr(self, "tier"):
            n, _ = self.tier.usage()
            assert len(self.ask(list(self.used_at))) == n


TestAgainstAnOrderedDict = AgainstAnOrderedDict.TestCase
TestAgainstAnOrderedDict.settings = settings(max_examples=150, stateful_step_count=30)
