"""What every tier promises: a test file for a tier subclasses ``TierContract`` and has a fixture ``tier``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest

from tests.storage.known_values import check, digests_of, plain_layout, rows_of
from torchcache.layout import Rows
from torchcache.report.stats import CacheStats
from torchcache.tiers.tier import Tier

HERE, THERE = b"one namespace".ljust(16), b"another one".ljust(16)


class TierContract:
    """The tests; values are functions of their keys, so that any answer can be checked."""

    @pytest.fixture
    def tier(self) -> Tier:
        raise NotImplementedError("a subclass says which tier it tries")

    def put(self, tier, numbers, nbytes=100, namespace=HERE):
        assert tier.put_many(namespace, rows_of(digests_of(numbers), nbytes, namespace))

    def found(self, tier, numbers, namespace=HERE):
        """Return which of some samples the tier has; its answer is whole and right, and both ways of asking agree."""
        numbers = list(numbers)
        digests = digests_of(numbers)
        lookup = tier.get_many(namespace, digests)
        positions = check(lookup, digests, namespace)
        assert len({item.layout for item in lookup.found}) == len(lookup.found), "one item per layout"
        assert [position in positions for position in range(len(numbers))] == tier.has_many(namespace, digests)
        return {numbers[position] for position in positions}

    def test_its_hits_have_a_counter(self, tier):
        assert f"{tier.name}_hits" in {counter.name for counter in fields(CacheStats)}

    def test_nothing_is_found_before_anything_was_put(self, tier):
        assert self.found(tier, range(3)) == set()

    def test_what_was_put_is_found_and_the_rest_is_missing(self, tier):
        self.put(tier, range(0, 20, 2))
        assert self.found(tier, [19, 4, 7, 0, 18, 3]) == {4, 0, 18}
        assert self.found(tier, [6]) == {6}
        assert self.found(tier, [7]) == set()

    def test_no_samples_are_a_lookup_too(self, tier):
        self.put(tier, [1])
        assert self.found(tier, []) == set()

    def test_a_sample_that_is_asked_for_twice_is_answered_twice(self, tier):
        self.put(tier, [1, 2])
        digests = digests_of([2, 1, 2, 5, 2])
        assert check(tier.get_many(HERE, digests), digests, HERE) == {0, 1, 2, 4}

    def test_namespaces_do_not_mix(self, tier):
        self.put(tier, [1])
        self.put(tier, [2], namespace=THERE)
        assert self.found(tier, [1, 2]) == {1}
        assert self.found(tier, [1, 2], THERE) == {2}

    def test_rows_of_several_layouts_are_found_together(self, tier):
        self.put(tier, [1, 2], nbytes=100)
        self.put(tier, [3], nbytes=8)
        self.put(tier, [4], nbytes=0)
        assert self.found(tier, range(6)) == {1, 2, 3, 4}

    def test_a_row_may_be_put_twice(self, tier):
        self.put(tier, [1, 2])
        self.put(tier, [2, 3])
        assert self.found(tier, range(5)) == {1, 2, 3}

    def test_what_is_found_belongs_to_the_caller(self, tier):
        self.put(tier, [1, 2])
        for numbers in ([1], [1, 2]):
            tier.get_many(HERE, digests_of(numbers)).found[0].data[:] = 0
            assert self.found(tier, [1, 2]) == {1, 2}

    def test_rows_take_the_place_of_others_only_if_they_say_so(self, tier):
        wrong = Rows(digests_of([1, 2]), plain_layout(100), np.zeros((2, 100), np.uint8))
        assert tier.put_many(HERE, wrong)
        assert tier.put_many(HERE, rows_of(digests_of([1, 2]), 100, HERE), replaces=True)
        assert self.found(tier, [1, 2]) == {1, 2}

    def test_what_was_deleted_is_missing_and_can_be_put_again(self, tier):
        self.put(tier, range(5))
        tier.delete_many(HERE, digests_of([1, 3, 77]))
        assert self.found(tier, range(5)) == {0, 2, 4}
        tier.delete_many(THERE, digests_of([0]))
        assert self.found(tier, range(5)) == {0, 2, 4}
        self.put(tier, [1])
        assert self.found(tier, range(5)) == {0, 1, 2, 4}

    def test_threads_may_use_it_together(self, tier):
        def use(number):
            own = range(100 * number, 100 * number + 20)
            self.put(tier, own)
            assert self.found(tier, own) == set(own)
            tier.delete_many(HERE, digests_of(own[:10]))
            return self.found(tier, own) == set(own[10:])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(use, range(8)))
