"""A store against a ``dict``: any sequence of puts, lookups, deletions, reopenings and forks."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.storage.children import in_child
from tests.storage.known_values import (
    check,
    close_environments,
    digests_of,
    directory_bytes,
    forget_environments,
    open_store,
    packed_of,
    verdict_of,
    verify,
)
from torchcache.storage.contract import Verdict

NAMESPACES = [b"%016d" % i for i in range(3)]
BUDGET = 50_000_000

numbers = st.lists(st.integers(0, 60), min_size=1, max_size=20)
namespaces = st.sampled_from(NAMESPACES)
sizes = st.sampled_from([0, 50, 700, 3000, 70_000])
verdicts = st.sampled_from([Verdict.INDEPENDENT, Verdict.INDEPENDENT, Verdict.DEPENDENT])


class StoreModel(RuleBasedStateMachine):
    """``model`` has the size of every value that was put; its bytes follow from its key.

    ``verdicts`` has what the namespaces were judged.
    """

    @initialize(zstd_level=st.sampled_from([None, 1]))
    def make(self, zstd_level):
        self.root = Path(tempfile.mkdtemp(prefix="torchcache-model-"))
        self.settings = {"max_persistent_cache_size": BUDGET, "zstd_level": zstd_level}
        self.store = open_store(self.root, **self.settings)
        self.model: dict[tuple[bytes, int], int] = {}
        self.verdicts: dict[bytes, Verdict] = {}

    def put_into(self, namespace, some, nbytes):
        written = self.store.put_many(packed_of(self.store, digests_of(some), nbytes, namespace))
        if self.is_dependent(namespace):
            assert (written.rows, dict(written.dropped)) == (0, {"rows_depend_on_batch": len(some)})
        else:
            assert (written.rows, dict(written.dropped)) == (len(some), {})

    def is_dependent(self, namespace):
        return self.verdicts.get(namespace) is Verdict.DEPENDENT

    def note(self, namespace, some, nbytes):
        for number in () if self.is_dependent(namespace) else some:
            self.model.setdefault((namespace, number), nbytes)

    def delete_from(self, namespace, some):
        there = {number for number in some if (namespace, number) in self.model}
        assert self.store.delete_many(namespace, digests_of(some)) == len(there)

    @rule(namespace=namespaces, some=numbers, nbytes=sizes)
    def put(self, namespace, some, nbytes):
        self.put_into(namespace, some, nbytes)
        self.note(namespace, some, nbytes)

    @rule(namespace=namespaces, some=numbers)
    def delete(self, namespace, some):
        self.delete_from(namespace, some)
        for number in some:
            self.model.pop((namespace, number), None)

    @rule(namespace=namespaces, some=numbers)
    def delete_in_a_child(self, namespace, some):
        in_child(self.delete_from, namespace, some)
        for number in some:
            self.model.pop((namespace, number), None)

    @rule(namespace=namespaces, verdict=verdicts, is_in_child=st.booleans())
    def judge(self, namespace, verdict, is_in_child):
        if is_in_child:
            in_child(self.store.judge, namespace, verdict)
        else:
            self.store.judge(namespace, verdict)
        self.verdicts[namespace] = max(verdict, self.verdicts.get(namespace, verdict))
        if self.is_dependent(namespace):
            self.model = {key: nbytes for key, nbytes in self.model.items() if key[0] != namespace}

    @rule(some=st.lists(st.tuples(namespaces, numbers, sizes), min_size=1, max_size=4))
    def put_several(self, some):
        packed = []
        for namespace, batch, nbytes in some:
            packed += packed_of(self.store, digests_of(batch), nbytes, namespace)
            self.note(namespace, batch, nbytes)
        self.store.put_many(packed)

    @rule(namespace=namespaces, some=numbers, nbytes=sizes)
    def put_in_a_child(self, namespace, some, nbytes):
        in_child(self.put_into, namespace, some, nbytes)
        self.note(namespace, some, nbytes)

    @rule(namespace=namespaces, some=numbers)
    def get(self, namespace, some):
        self.look_up(namespace, some)

    @rule(namespace=namespaces, some=numbers)
    def get_in_a_child(self, namespace, some):
        in_child(self.look_up, namespace, some)

    def look_up(self, namespace, some):
        digests = digests_of(some)
        lookup = self.store.get_many(namespace, digests)
        hits = check(lookup, digests, namespace)
        assert lookup.corrupt == 0
        assert lookup.verdict is self.verdicts.get(namespace, Verdict.UNKNOWN)
        assert hits == {i for i, number in enumerate(some) if (namespace, number) in self.model}
        for item in lookup.found:
            for position in item.positions:
                assert item.layout.nbytes == self.model[namespace, some[position]]

    @rule(namespace=namespaces)
    def touch(self, namespace):
        self.store.touch(namespace)

    @rule()
    def delete_all(self):
        self.store.delete_all()
        self.model.clear()
        self.verdicts.clear()

    @rule()
    def delete_all_in_a_child(self):
        in_child(self.store.delete_all)
        self.model.clear()
        self.verdicts.clear()
        self.store._environment._checked_at = 0.0  # as after the second that a lookup may be behind

    @rule()
    def reopen(self):
        forget_environments()
        self.store = open_store(self.root, **self.settings)

    @rule()
    def close_the_handle(self):
        close_environments()

    @invariant()
    def keeps_to_its_budget(self):
        if hasattr(self, "root"):
            assert directory_bytes(self.root) <= BUDGET

    def teardown(self):
        if not hasattr(self, "root"):
            return
        try:
            forget_environments()
            if self.store.path.exists():
                assert verify(self.store.path) == len(self.model)
        finally:
            shutil.rmtree(self.root)


class SmallStoreModel(RuleBasedStateMachine):
    """A budget that is always full: values may be missing, but are never wrong, and the limit holds."""

    @initialize(eviction=st.sampled_from(["none", "stale", "lru"]), limit=st.sampled_from([120_000, 500_000]))
    def make(self, eviction, limit):
        logging.getLogger("torchcache.storage").setLevel(logging.ERROR)  # it is full all the time
        self.root = Path(tempfile.mkdtemp(prefix="torchcache-model-"))
        self.limit = limit
        self.settings = {"max_persistent_cache_size": limit, "eviction": eviction}
        self.store = open_store(self.root, **self.settings)

    @rule(namespace=namespaces, first=st.integers(0, 300), n=st.integers(1, 30), nbytes=sizes)
    def put(self, namespace, first, n, nbytes):
        some = digests_of(range(first, first + n))
        written = self.store.put_many(packed_of(self.store, some, nbytes, namespace))
        assert written.rows + sum(written.dropped.values()) == n
        assert not written.rows or verdict_of(self.store, namespace) is not Verdict.DEPENDENT
        if written.rows == n and n * nbytes < self.limit // 8:
            assert check(self.store.get_many(namespace, some), some, namespace) == set(range(n))

    @rule(namespace=namespaces, first=st.integers(0, 300))
    def get(self, namespace, first):
        some = digests_of(range(first, first + 50))
        lookup = self.store.get_many(namespace, some)
        check(lookup, some, namespace)
        assert lookup.corrupt == 0

    @rule(namespace=namespaces)
    def touch(self, namespace):
        self.store.touch(namespace)

    @rule(namespace=namespaces, first=st.integers(0, 300), n=st.integers(1, 60))
    def delete(self, namespace, first, n):
        some = digests_of(range(first, first + n))
        held = len(check(self.store.get_many(namespace, some), some, namespace))
        deleted = self.store.delete_many(namespace, some)
        left = len(check(self.store.get_many(namespace, some), some, namespace))
        assert deleted == held - left

    @rule(namespace=namespaces, verdict=verdicts)
    def judge(self, namespace, verdict):
        before = verdict_of(self.store, namespace)
        self.store.judge(namespace, verdict)
        assert verdict_of(self.store, namespace) in (before, max(before, verdict))

    @rule()
    def wake(self):
        self.store._budget.wake()

    @rule()
    def reopen(self):
        forget_environments()
        self.store = open_store(self.root, **self.settings)

    @invariant()
    def keeps_to_its_budget(self):
        if hasattr(self, "root"):
            assert directory_bytes(self.root) <= self.limit

    def teardown(self):
        logging.getLogger("torchcache.storage").setLevel(logging.NOTSET)
        if not hasattr(self, "root"):
            return
        try:
            forget_environments()
            if self.store.path.exists():
                verify(self.store.path)
        finally:
            shutil.rmtree(self.root)


bounded = settings(max_examples=40, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow])

StoreModel.TestCase.settings = bounded
SmallStoreModel.TestCase.settings = bounded


class TestStoreAgainstADict(StoreModel.TestCase):
    pass


class TestSmallStore(SmallStoreModel.TestCase):
    pass


def test_room_for_the_rest_of_a_put_is_not_made_of_rows_that_it_found():
    first, second, third = NAMESPACES[:3]
    state = SmallStoreModel()
    state.make(eviction="lru", limit=500_000)
    try:
        state.put(namespace=third, first=300, n=29, nbytes=0)
        state.put(namespace=second, first=50, n=10, nbytes=70_000)
        state.put(namespace=second, first=161, n=15, nbytes=700)
        state.put(namespace=first, first=282, n=21, nbytes=50)
        state.put(namespace=third, first=44, n=14, nbytes=700)
        for _ in range(2):  # the second time, 16 rows are there
            state.put(namespace=second, first=171, n=18, nbytes=700)
    finally:
        state.teardown()
