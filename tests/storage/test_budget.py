"""The budget is a limit: a strict bound of what a commit adds, and what goes when it is full."""

from __future__ import annotations

import itertools
import logging
import os
import random
import shutil
import threading
import time

import lmdb
import pytest

from tests.storage.children import in_child
from tests.storage.known_values import (
    NAMESPACE,
    close_environments,
    digest_of,
    digests_of,
    directory_bytes,
    entry_of,
    forget_environments,
    hits_of,
    open_store,
    packed_of,
    put,
    verdict_of,
)
from torchcache.errors import StoreError
from torchcache.storage import budget as budgets
from torchcache.storage import commit, eviction, table
from torchcache.storage import lmdb as lmdb_store
from torchcache.storage.access import PRIVATE
from torchcache.storage.contract import StoreSettings, Verdict
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.lmdb import LmdbStore

NAMESPACES = [b"%016d" % i for i in range(6)]


class Clock:
    """A clock that tests set forward instead of waiting."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._time = time.time

    def time(self) -> float:
        return self._time() + self.offset

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (lmdb_store, table, commit, eviction, budgets):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def never_resting(monkeypatch):
    """A full store is asked again at once and not after ten seconds."""
    monkeypatch.setattr(budgets, "_REST_SECONDS", 0.0)


class Sampler:
    """Looks at the bytes under a directory every five milliseconds, from outside."""

    def __init__(self, root) -> None:
        self.root = root
        self.most = 0
        self.samples = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join(10)
        self.look()

    def _sample(self) -> None:
        while not self._is_over.wait(0.005):
            self.look()

    def look(self) -> None:
        self.most = max(self.most, directory_bytes(self.root))
        self.samples += 1


# -- the bound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_no_commit_grows_the_file_by_more_than_its_bound(root, seed, monkeypatch):
    """Rows of all sizes in commits of all sizes, with evictions between them, and readers that hold pages."""
    bounds = []
    growth_bytes = commit.Commit.growth_bytes

    def noted(write):
        bounds.append(growth_bytes(write))
        return bounds[-1]

    monkeypatch.setattr(commit.Commit, "growth_bytes", noted)
    rng = random.Random(seed)
    store = open_store(root)
    put(store, digests_of([0]))
    number = 1
    for _ in range(60):
        packed = []
        for _ in range(rng.choice([1, 1, 2, 5])):
            nbytes = rng.choice([0, 10, 100, 100, 1000, 3000, 3000, 4096, 20_000, 65_500, 65_600, 300_000])
            n = rng.choice([1, 1, 3, 50, 400]) if nbytes < 5000 else rng.choice([1, 2, 8])
            packed += packed_of(store, digests_of(range(number, number + n)), nbytes, rng.choice(NAMESPACES))
            number += n
        if rng.random() < 0.2:
            keys = store._eviction.oldest_segments(b"\xff", store._uses)
            if keys:
                store._eviction.delete_slices(keys[: rng.randrange(1, 30)], 1 << 40)
        before, bounds[:] = (store.path / "data.mdb").stat().st_size, []
        store.put_many(packed)
        grown = (store.path / "data.mdb").stat().st_size - before
        assert bounds, "a commit that nobody asked the budget for"
        assert grown <= bounds[-1]


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_for_a_large_tree_of_small_rows(root, seed, monkeypatch):
    bounds = []
    growth_bytes = commit.Commit.growth_bytes
    monkeypatch.setattr(commit.Commit, "growth_bytes", lambda write: bounds.append(growth_bytes(write)) or bounds[-1])
    rng = random.Random(seed)
    store = open_store(root)
    number = 0
    for n in [4000] * 8 + [1, 1, 2000, 1, 10, 300, 1, 4000, 1]:
        before = (store.path / "data.mdb").stat().st_size if store.path.exists() else None
        bounds[:] = []
        store.put_many(packed_of(store, digests_of(range(number, number + n)), rng.choice([10, 30, 100])))
        number += n
        if before is not None:
            assert (store.path / "data.mdb").stat().st_size - before <= sum(bounds)


def test_a_deletion_grows_the_file_by_no_more_than_the_room_it_was_given(root, monkeypatch):
    rooms = []
    deletable = budgets.deletable
    monkeypatch.setattr(
        budgets, "deletable", lambda txn, room: rooms.append(room) or deletable(txn, min(room, 500_000))
    )
    store = open_store(root)
    for first in range(0, 30_000, 2000):
        put(store, digests_of(range(first, first + 2000)), nbytes=60)
    segments = store._eviction.oldest_segments(b"\xff", store._uses)
    assert len(segments) > 20
    for key in segments[::5]:
        rooms[:] = []
        before = (store.path / "data.mdb").stat().st_size
        store._eviction.delete_slices([key], 1 << 40)
        assert rooms, "a deletion that nobody asked the budget for"
        assert (store.path / "data.mdb").stat().st_size - before <= 500_000 * len(rooms)


@pytest.mark.parametrize("nbytes", [60, 3000, 70_000, 2_000_000])
@pytest.mark.parametrize("how", ["delete_many", "judge"])
def test_deleting_by_key_or_namespace_grows_the_file_by_no_more_than_its_room(root, monkeypatch, nbytes, how):
    """Each transaction, from a tree of any size; rows in random order touch the most pages."""
    room, grown = 400_000, []
    deletable = budgets.deletable
    store = open_store(root)

    def noted(txn, _):
        grown.append((store.path / "data.mdb").stat().st_size)
        return deletable(txn, room)

    monkeypatch.setattr(budgets, "deletable", noted)
    n = min(4000, 30_000_000 // nbytes)
    step = max(1, min(2000, 3_000_000 // nbytes))
    for first in range(0, n, step):
        put(store, digests_of(range(first, first + step)), nbytes=nbytes)
    digests = digests_of(range(n))
    random.Random(0).shuffle(digests)
    if how == "judge":
        store.judge(NAMESPACE, Verdict.DEPENDENT)
    else:
        assert store.delete_many(NAMESPACE, digests[: n // 2]) == n // 2
        assert hits_of(store, digests) == set(range(n // 2, n))
        store.delete_many(NAMESPACE, digests)
    assert len(grown) > 1
    grown.append((store.path / "data.mdb").stat().st_size)
    assert max(after - before for before, after in itertools.pairwise(grown)) <= room


def test_a_segment_whose_pages_cannot_even_be_listed_stays(root, monkeypatch):
    """LMDB writes down every page that becomes free, eight bytes each."""
    store = open_store(root)
    put(store, digests_of([1, 2]), nbytes=1_000_000)
    monkeypatch.setattr(budgets, "deletable", lambda *_: (100, 900_000))
    assert store.delete_many(NAMESPACE, digests_of([1])) == 0
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    assert entry_of(store).rows == 2
    monkeypatch.setattr(budgets, "deletable", lambda *_: (100, 1_100_000))
    assert store.delete_many(NAMESPACE, digests_of([1])) == 1
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    assert entry_of(store).rows == 0


def test_what_may_be_deleted_grows_with_the_room_there_is(store):
    put(store, digests_of(range(4000)), nbytes=50)
    with store._environment.reading() as txn:
        assert budgets.deletable(txn, 0) == (0, 0)
        some, nbytes = budgets.deletable(txn, 200_000)
        more, more_bytes = budgets.deletable(txn, 50_000_000)
    assert 0 < some < more
    assert 0 < nbytes < more_bytes
    assert more_bytes > 1 << 30


# -- the limit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", ["none", "stale", "lru"])
@pytest.mark.parametrize(
    ("limit", "nbytes"),
    [(100_000, 100), (100_000, 3000), (300_000, 1000), (1_000_000, 100), (1_000_000, 20_000), (5_000_000, 300_000),
     (5_000_000, 1_000_000), (20_000_000, 3000), (20_000_000, 1_000_000)],
)  # fmt: skip
def test_the_bytes_under_the_directory_never_exceed_the_budget(root, limit, nbytes, eviction):
    """Three times the budget is offered, in commits as the writer makes them, by two stores and with reads."""
    stores = [open_store(root, name, max_persistent_cache_size=limit, eviction=eviction) for name in ("one", "other")]
    rng = random.Random(limit + nbytes)
    per_commit = max(1, min(stores[0].most_commit_bytes // (nbytes + 60), 4096))
    number = 0
    with Sampler(root) as sampler:
        while number * nbytes < 3 * limit:
            store = stores[rng.random() < 0.3]
            namespace = rng.choice(NAMESPACES[:2])
            numbers = range(number, number + per_commit)
            written = store.put_many(packed_of(store, digests_of(numbers), nbytes, namespace))
            number += per_commit
            sampler.look()
            assert sampler.most <= limit
            assert written.rows + sum(written.dropped.values()) == per_commit
            if rng.random() < 0.3:
                hits_of(store, digests_of(rng.sample(range(number), min(number, 20))), namespace)
            if rng.random() < 0.1:
                store.touch(namespace)
    assert sampler.most <= limit
    assert sampler.samples > 3


@pytest.mark.parametrize("nbytes", [100, 3000])
def test_marks_of_use_never_exceed_the_budget_either(root, nbytes, clock):
    """What is read is noted on disk, in a full store too."""
    limit = 200_000
    store = open_store(root, max_persistent_cache_size=limit, eviction="lru")
    for first in range(0, 4000, 20):
        put(store, digests_of(range(first, first + 20)), nbytes=nbytes)
    for step in range(40):
        clock.offset += 700
        hits_of(store, digests_of(range(4000)))
        store.touch(NAMESPACE)
        assert directory_bytes(root) <= limit, step


def test_at_least_four_fifths_of_a_budget_hold_rows_of_three_kilobytes(root):
    limit, nbytes = 20_000_000, 3000
    store = open_store(root, max_persistent_cache_size=limit)
    rows = first = 0
    while True:
        written = put(store, digests_of(range(first, first + 100)), nbytes=nbytes)
        if written.dropped:
            break
        rows += written.rows
        first += 100
    assert 0.8 * limit <= directory_bytes(root) <= limit
    assert rows * nbytes >= 0.75 * limit
    assert hits_of(store, digests_of(range(first))) == set(range(first))


def test_several_processes_together_keep_to_the_budget(root):
    limit = 3_000_000
    with Sampler(root) as sampler:
        threads = [
            threading.Thread(target=in_child, args=(write_three_times_the_budget, root, limit, name))
            for name in ("one", "one", "other")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sampler.most <= limit
    assert 0.5 * limit < directory_bytes(root)


def write_three_times_the_budget(root, limit, name):
    forget_environments()
    store = open_store(root, name, max_persistent_cache_size=limit, eviction="lru", lock_timeout_seconds=20.0)
    first = os.getpid() * 100_000
    for i in range(0, limit // 2000, 20):
        put(store, digests_of(range(first + i, first + i + 20)), nbytes=2000)


@pytest.mark.parametrize("limit", [1, 1000, 20_000, 60_000])
def test_a_budget_too_small_for_anything_stores_nothing_and_says_so_once(root, limit, caplog):
    store = open_store(root, max_persistent_cache_size=limit)
    with caplog.at_level(logging.WARNING):
        for first in range(0, 50, 10):
            written = put(store, digests_of(range(first, first + 10)))
            assert (written.rows, dict(written.dropped)) == (0, {"budget": 10})
    assert hits_of(store, digests_of(range(50))) == set()
    assert directory_bytes(root) <= max(limit, 4096)  # the directory itself, which we may not even have made
    assert len(caplog.records) == 1


def test_a_row_larger_than_the_budget_is_passed_by_and_smaller_ones_go_on(root):
    store = open_store(root, max_persistent_cache_size=1_000_000)
    put(store, digests_of(range(10)), nbytes=1000)
    written = put(store, digests_of([100]), nbytes=2_000_000)
    assert dict(written.dropped) == {"budget": 1}
    put(store, digests_of(range(10, 20)), nbytes=1000)
    assert hits_of(store, digests_of([*range(20), 100])) == set(range(20))


def test_other_files_under_the_directory_count_too(root):
    store = open_store(root, max_persistent_cache_size=1_000_000)
    put(store, digests_of([0]))
    (root / "notes").mkdir()
    (root / "notes" / "large").write_bytes(bytes(900_000))
    assert dict(put(store, digests_of(range(1, 30)), nbytes=3000).dropped) == {"budget": 29}
    assert (root / "notes" / "large").exists()
    (root / "notes" / "large").unlink()
    assert put(store, digests_of(range(1, 30)), nbytes=3000).rows == 29


def test_what_is_full_says_so_once_with_the_remedy(root, caplog):
    store = open_store(root, max_persistent_cache_size=300_000)
    with caplog.at_level(logging.WARNING):
        for first in range(0, 2000, 50):
            put(store, digests_of(range(first, first + 50)), nbytes=1000)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "max_persistent_cache_size" in said
    assert str(root) in said
    assert "300000" in said


@pytest.mark.parametrize("eviction", ["stale", "none"])
def test_a_lowered_budget_keeps_what_is_there_adds_nothing_and_says_so_once(root, clock, caplog, eviction):
    put(open_store(root), digests_of(range(500)), nbytes=3000)
    before = directory_bytes(root)
    forget_environments()
    lowered = open_store(root, max_persistent_cache_size=1_000_000, eviction=eviction)
    clock.offset = 400.0  # a mark of use is due, and finds no room
    lowered.touch(NAMESPACE)
    assert len(caplog.records) == 1
    for first in range(500, 600, 10):
        assert dict(put(lowered, digests_of(range(first, first + 10)), nbytes=3000).dropped) == {"budget": 10}
    assert hits_of(lowered, digests_of(range(600))) == set(range(500))
    assert directory_bytes(root) <= before
    (said,) = [record.getMessage() for record in caplog.records]
    assert "more than max_persistent_cache_size=1000000" in said
    assert f"eviction='{eviction}'" in said


def test_a_lowered_budget_makes_an_environment_start_afresh_with_lru(root):
    put(open_store(root), digests_of(range(500)), nbytes=3000)
    forget_environments()
    lowered = open_store(root, max_persistent_cache_size=1_000_000, eviction="lru")
    assert put(lowered, digests_of(range(500, 510)), nbytes=3000).rows == 10
    assert directory_bytes(root) <= 1_000_000


def test_a_second_store_of_one_process_has_the_room_of_its_larger_budget(root, monkeypatch):
    monkeypatch.setattr("torchcache.storage.files._LEAST_MAP_BYTES", 1 << 20)
    small = open_store(root, max_persistent_cache_size=1_000_000)
    assert put(small, digests_of(range(10)), nbytes=3000).rows == 10
    large = open_store(root, max_persistent_cache_size=100_000_000)
    assert put(large, digests_of(range(10, 3010)), nbytes=3000).rows == 3000
    assert hits_of(small, digests_of(range(3010))) == set(range(3010))
    assert dict(put(small, digests_of([5000]), nbytes=3000).dropped) == {"budget": 1}


@pytest.mark.parametrize("room", [0, 4095, 70_000, 90_000, 150_000, 900_000, 1_200_000])
@pytest.mark.parametrize("eviction", ["stale", "lru"])
def test_marks_verdicts_and_deletions_keep_to_the_last_bytes_of_the_budget(root, clock, room, eviction):
    """Somebody else's file leaves exactly so much room; what does not fit is left out."""
    limit = 20_000_000
    store = open_store(root, max_persistent_cache_size=limit, eviction=eviction)
    for first in range(0, 4000, 1000):
        put(store, digests_of(range(first, first + 1000)), nbytes=60, namespace=NAMESPACES[first // 1000 % 2])
    # The free pages of earlier commits would take the new ones, and a reader keeps them from it.
    pinned = threading.Event()
    leave = threading.Event()

    def read_on():
        with store._environment.reading():
            pinned.set()
            leave.wait(30)

    thread = threading.Thread(target=read_on)
    thread.start()
    assert pinned.wait(10)
    try:
        hits_of(store, digests_of(range(4000)), NAMESPACES[0])  # for lru: many marks wait to be noted
        (root / "filler").write_bytes(b"")
        os.truncate(root / "filler", limit - room - directory_bytes(root))
        assert directory_bytes(root) == limit - room
        for step in range(6):
            clock.offset += 700
            store.touch(NAMESPACES[step % 2])
            assert directory_bytes(root) <= limit, "touch"
            store.judge(NAMESPACES[2 + step % 2], Verdict.INDEPENDENT)
            assert directory_bytes(root) <= limit, "judge"
            store.delete_many(NAMESPACES[0], digests_of(range(100 * step, 100 * step + 50)))
            assert directory_bytes(root) <= limit, "delete_many"
            store.judge(NAMESPACES[1], Verdict.DEPENDENT)
            assert directory_bytes(root) <= limit, "judge and delete"
        if not 90_000 <= room < 900_000:  # between, it depends on how many pages are free
            assert verdict_of(store, NAMESPACES[2]) is (Verdict.INDEPENDENT if room >= 900_000 else Verdict.UNKNOWN)
    finally:
        leave.set()
        thread.join(10)


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_a_budget_too_small_for_a_verdict_drops_it(root, limit, caplog):
    store = open_store(root, max_persistent_cache_size=limit)
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    store.touch(NAMESPACE)
    assert store.delete_many(NAMESPACE, digests_of([1])) == 0
    assert verdict_of(store) is Verdict.UNKNOWN
    assert directory_bytes(root) <= max(limit, 4096)
    assert caplog.records == []


def test_marks_verdicts_and_deletions_go_on_in_a_store_that_is_full_of_rows(root, clock):
    """Else what is in use would count as stale after an hour, and the wrong rows would stay."""
    store = open_store(root, max_persistent_cache_size=20_000_000)
    rows = fill(store, nbytes=3000, step=100)
    for step in range(20):
        clock.offset += 700
        store.touch(NAMESPACE)
        assert time.time() + clock.offset - entry_of(store).touched_at < 100
        store.judge(b"%016d" % (100 + step), Verdict.INDEPENDENT)
        assert verdict_of(store, b"%016d" % (100 + step)) is Verdict.INDEPENDENT
        assert store.delete_many(NAMESPACE, digests_of([step])) == 1
        assert directory_bytes(root) <= 20_000_000
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    assert verdict_of(store) is Verdict.DEPENDENT
    assert entry_of(store).rows == 0
    assert rows * 3000 > 15_000_000
    assert put(store, digests_of(range(20)), nbytes=3000, namespace=NAMESPACES[1]).rows == 20


# -- eviction -------------------------------------------------------------------------------------------------------


def fill(store, namespace=NAMESPACE, first=0, nbytes=3000, step=20):
    """Write until something is dropped; return how many rows fitted."""
    number = first
    while not put(store, digests_of(range(number, number + step)), nbytes=nbytes, namespace=namespace).dropped:
        number += step
        assert (number - first) * nbytes < 10**9
    return number - first


@pytest.mark.parametrize("eviction", ["none", "stale"])
def test_a_full_store_in_use_keeps_what_it_has(root, eviction):
    store = open_store(root, max_persistent_cache_size=2_000_000, eviction=eviction)
    rows = fill(store)
    for first in range(10_000, 12_000, 20):
        put(store, digests_of(range(first, first + 20)), nbytes=3000)
    assert hits_of(store, digests_of(range(rows))) == set(range(rows))
    assert len(hits_of(store, digests_of(range(10_000, 12_000)))) < 40


def test_stale_environments_go_first_oldest_first_and_no_more_than_needed(root, caplog):
    limit = 4_000_000
    for i in range(3):
        other = open_store(root, f"old-{i}", max_persistent_cache_size=limit)
        put(other, digests_of(range(200)), nbytes=3000)
    fresh = open_store(root, "fresh", max_persistent_cache_size=limit)
    put(fresh, digests_of(range(10)))
    forget_environments()
    now = time.time()
    for i, age in enumerate((7200, 14400, 5000)):
        os.utime(root / f"old-{i}" / "data.mdb", (now - age, now - age))
    store = open_store(root, max_persistent_cache_size=limit)
    first = 0
    with caplog.at_level(logging.INFO, logger="torchcache"):
        while (root / "old-1").exists():
            assert put(store, digests_of(range(first, first + 10)), nbytes=3000).rows == 10
            first += 10
            assert first < 1000
    assert sorted(path.name for path in root.glob("*/")) == ["fresh", "module-hash", "old-0", "old-2"]
    assert sum("old-1" in record.getMessage() for record in caplog.records) == 1


def test_a_full_directory_makes_room_for_a_new_module_hash(root):
    """The user edited the code: what nobody touched for an hour goes, and the new code is cached."""
    limit = 2_000_000
    fill(open_store(root, "old-code", max_persistent_cache_size=limit))
    forget_environments()
    os.utime(root / "old-code" / "data.mdb", (1, 1))
    store = open_store(root, max_persistent_cache_size=limit)
    assert put(store, digests_of(range(10)), nbytes=3000).rows == 10
    assert not (root / "old-code").exists()


def test_environments_that_were_touched_within_the_hour_stay(root):
    limit = 2_000_000
    other = open_store(root, "other", max_persistent_cache_size=limit)
    put(other, digests_of(range(300)), nbytes=3000)
    forget_environments()
    recently = time.time() - 3000
    os.utime(root / "other" / "data.mdb", (recently, recently))
    fill(open_store(root, max_persistent_cache_size=limit))
    assert hits_of(open_store(root, "other", max_persistent_cache_size=limit), digests_of(range(300))) == set(
        range(300)
    )


def test_with_eviction_none_nothing_ever_goes(root):
    limit = 2_000_000
    other = open_store(root, "other", max_persistent_cache_size=limit)
    put(other, digests_of(range(300)), nbytes=3000)
    forget_environments()
    os.utime(root / "other" / "data.mdb", (1, 1))
    fill(open_store(root, max_persistent_cache_size=limit, eviction="none"))
    assert hits_of(open_store(root, "other", max_persistent_cache_size=limit), digests_of(range(300))) == set(
        range(300)
    )


def test_stale_namespaces_of_the_environment_go_when_it_is_full(root, clock):
    store = open_store(root, max_persistent_cache_size=3_000_000)
    put(store, digests_of(range(100)), nbytes=3000, namespace=NAMESPACES[0])
    clock.offset = 7200
    put(store, digests_of(range(100)), nbytes=3000, namespace=NAMESPACES[1])
    fill(store, NAMESPACES[2])
    assert hits_of(store, digests_of(range(100)), NAMESPACES[0]) == set()
    assert hits_of(store, digests_of(range(100)), NAMESPACES[1]) == set(range(100))


def test_a_namespace_that_is_only_read_is_kept_by_being_touched(root, clock):
    store = open_store(root, max_persistent_cache_size=3_000_000)
    for namespace in NAMESPACES[:2]:
        put(store, digests_of(range(100)), nbytes=3000, namespace=namespace)
    clock.offset = 7200
    assert store.needs_touch(NAMESPACES[1])
    store.touch(NAMESPACES[1])
    assert not store.needs_touch(NAMESPACES[1])
    fill(store, NAMESPACES[2])
    assert hits_of(store, digests_of(range(100)), NAMESPACES[0]) == set()
    assert hits_of(store, digests_of(range(100)), NAMESPACES[1]) == set(range(100))


def test_lru_goes_on_inserting_for_three_times_the_budget_and_keeps_the_newest(root, clock):
    limit, nbytes = 3_000_000, 3000
    store = open_store(root, max_persistent_cache_size=limit, eviction="lru")
    number = dropped = 0
    while number * nbytes < 4 * limit:
        clock.offset += 1
        dropped += sum(put(store, digests_of(range(number, number + 20)), nbytes=nbytes).dropped.values())
        number += 20
        assert directory_bytes(root) <= limit
    assert dropped <= number // 50
    newest = range(number - 200, number)
    assert len(hits_of(store, digests_of(newest))) >= 195
    kept = len(hits_of(store, digests_of(range(number))))
    assert kept * nbytes >= 0.3 * limit


@pytest.mark.parametrize("nbytes", [100, 1000, 20_000, 100_000])
def test_lru_goes_on_inserting_rows_of_every_size(root, clock, nbytes):
    limit = 5_000_000
    store = open_store(root, max_persistent_cache_size=limit, eviction="lru")
    step = max(1, store.most_commit_bytes // (nbytes + 60))
    number = dropped = 0
    while number * nbytes < 3 * limit:
        clock.offset += 1
        dropped += sum(put(store, digests_of(range(number, number + step)), nbytes=nbytes).dropped.values())
        number += step
        assert directory_bytes(root) <= limit
    assert dropped <= number // 20
    assert hits_of(store, digests_of(range(number - step, number))) == set(range(step))


def test_lru_keeps_what_is_read(root, clock):
    limit, nbytes = 3_000_000, 3000
    store = open_store(root, max_persistent_cache_size=limit, eviction="lru")
    favourites = digests_of(range(20))
    put(store, favourites, nbytes=nbytes)
    number = 1000
    for _ in range(150):
        clock.offset += 1
        put(store, digests_of(range(number, number + 20)), nbytes=nbytes)
        number += 20
        clock.offset += 1
        assert hits_of(store, favourites) == set(range(20))
    assert (number - 1000) * nbytes > 2.5 * limit
    assert len(hits_of(store, digests_of(range(1000, 1100)))) < 50


def test_evicted_rows_can_be_written_again(root, clock):
    limit, nbytes = 2_000_000, 3000
    store = open_store(root, max_persistent_cache_size=limit, eviction="lru")
    for _ in range(3):
        for first in range(0, 1000, 20):
            clock.offset += 1
            digests = digests_of(range(first, first + 20))
            put(store, digests, nbytes=nbytes)
            assert hits_of(store, digests) == set(range(20))


def test_eviction_leaves_no_index_entry_without_its_record(root, clock):
    """Nor marks of use of segments that are gone; ``verify`` looks at both when the test ends."""
    store = open_store(root, max_persistent_cache_size=1_500_000, eviction="lru")
    for first in range(0, 2000, 20):
        clock.offset += 1
        put(store, digests_of(range(first, first + 20)), nbytes=2000, namespace=NAMESPACES[first // 20 % 3])
        hits_of(store, digests_of(range(first)), NAMESPACES[0])
    close_environments()
    with lmdb.open(str(store.path), readonly=True, lock=False) as env, env.begin() as txn:
        entries = dict(txn.cursor())
    segments = {key[1:] for key in entries if key[:1] == b"s"}
    assert {key[1:] for key in entries if key[:1] == b"r"} == segments
    for key, location in entries.items():
        if key[:1] == b"i":
            assert key[1:4] + location[:4] in segments


def test_a_verdict_goes_with_its_stale_namespace_only(root, clock):
    """It is as small as a row of the index, but there may be one for every state the module ever had."""
    store = open_store(root, max_persistent_cache_size=3_000_000)
    old, empty, used = NAMESPACES[:3]
    put(store, digests_of(range(50)), nbytes=3000, namespace=old)
    for namespace in (old, empty, used):
        store.judge(namespace, Verdict.INDEPENDENT)
    clock.offset = 7200
    store.touch(used)
    fill(store, NAMESPACES[3])
    assert hits_of(store, digests_of(range(50)), old) == set()
    assert [entry_of(store, namespace) for namespace in (old, empty)] == [None, None]
    assert verdict_of(store, used) is Verdict.INDEPENDENT


def test_a_verdict_outlives_its_rows_under_lru(root, clock):
    store = open_store(root, max_persistent_cache_size=5_000_000, eviction="lru")
    put(store, digests_of(range(20)), nbytes=3000)
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    number = 0
    while entry_of(store).rows:
        clock.offset += 1
        put(store, digests_of(range(number, number + 20)), nbytes=3000, namespace=NAMESPACES[1])
        number += 20
        assert number < 5000
    assert verdict_of(store) is Verdict.INDEPENDENT
    assert (entry_of(store).rows, entry_of(store).nbytes) == (0, 0)


def test_rows_that_may_not_be_stored_evict_nothing(root, clock, monkeypatch):
    store = open_store(root, max_persistent_cache_size=3_000_000)
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    put(store, digests_of(range(100)), nbytes=3000, namespace=NAMESPACES[0])
    fill(store, NAMESPACES[1])
    clock.offset = 7200
    monkeypatch.setattr(budgets.Budget, "allows", lambda *_: False)
    assert put(store, digests_of(range(20)), nbytes=3000).dropped == {"rows_depend_on_batch": 20}
    assert hits_of(store, digests_of(range(100)), NAMESPACES[0]) == set(range(100))


def test_clearing_makes_room_at_once(root):
    store = open_store(root, max_persistent_cache_size=1_000_000)
    fill(store)
    store.delete_all()
    assert store.shortage() is None
    assert directory_bytes(root) < 20_000
    assert put(store, digests_of(range(20)), nbytes=3000).rows == 20


def test_a_full_store_rests_and_asks_again(root, monkeypatch):
    monkeypatch.setattr(budgets, "_REST_SECONDS", 60.0)
    store = open_store(root, max_persistent_cache_size=1_000_000)
    assert store.shortage() is None
    fill(store)
    assert store.shortage() == "budget"


# -- a disk that others fill ------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """A file system of 100 GB that is as full as a test says."""

    class Disk:
        total, free = int(100e9), int(50e9)

    monkeypatch.setattr(CacheDirectory, "free_disk_bytes", lambda _: (Disk.free, Disk.total))
    return Disk


@pytest.mark.parametrize(
    ("total", "min_free", "least"),
    [
        (int(100e9), None, int(1e9)),
        (int(10e9), None, int(0.2e9)),
        (int(100e9), int(30e9), int(30e9)),
        (int(100e9), 0, 0),
    ],
)
def test_writing_stops_before_the_disk_has_less_room_than_min_free_disk(root, disk, caplog, total, min_free, least):
    store = open_store(root, min_free_disk=min_free)
    disk.total, disk.free = total, least + (8 << 20)
    assert put(store, digests_of(range(10)), nbytes=3000).rows == 10
    disk.free = least + 20_000
    with caplog.at_level(logging.WARNING):
        for first in (10, 20):
            assert put(store, digests_of(range(first, first + 10)), nbytes=3000).dropped == {"min_free_disk": 10}
    (said,) = [record.getMessage() for record in caplog.records]
    assert "min_free_disk" in said
    assert str(root) in said
    assert hits_of(store, digests_of(range(30))) == set(range(10))
    disk.free = least + (8 << 20)
    assert put(store, digests_of(range(10, 20)), nbytes=3000).rows == 10


def test_no_store_is_made_on_a_disk_that_is_nearly_full(root, disk):
    disk.free = int(1e9) + 1000
    store = open_store(root)
    assert put(store, digests_of(range(10))).dropped == {"min_free_disk": 10}
    assert directory_bytes(root) < 10_000


def test_a_file_system_that_does_not_say_how_large_it_is_is_written_to(root, disk):
    disk.free = disk.total = 0
    assert put(open_store(root), digests_of(range(10))).rows == 10


def test_on_a_nearly_full_disk_lru_writes_into_pages_of_its_own(root, disk):
    """What others need the disk for is not a reason to keep old rows for ever."""
    store = open_store(root, eviction="lru", max_persistent_cache_size=100 << 20)
    put(store, digests_of(range(2000)), nbytes=3000)
    disk.free = int(1e9) + 1000
    before = directory_bytes(root)
    rows = sum(put(store, digests_of(range(first, first + 20)), nbytes=3000).rows for first in range(5000, 5600, 20))
    assert rows > 300
    assert directory_bytes(root) <= before + (1 << 20)


def test_the_real_disk_is_asked(root):
    free, total = CacheDirectory(root).free_disk_bytes()
    assert 0 < free <= total == shutil.disk_usage(root).total


# -- what is not ours -------------------------------------------------------------------------------------------------


def foreign_data_set(path):
    """Make an LMDB data set of somebody else's, two hours old."""
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for number in range(100):
            txn.put(b"%d" % number, bytes(1000))
    past = time.time() - 7200
    for entry in path.iterdir():
        os.utime(entry, (past, past))
    return (path / "data.mdb").read_bytes()


@pytest.mark.parametrize("eviction", ["stale", "lru"])
@pytest.mark.parametrize("short", ["budget", "disk"])
def test_a_data_set_of_the_user_s_beside_the_cache_is_never_removed(root, disk, eviction, short):
    root.mkdir()
    before = foreign_data_set(root / "lsun_train_lmdb")
    if short == "disk":
        disk.free = 0
    store = open_store(root, max_persistent_cache_size=1_000_000 if short == "budget" else 1 << 30, eviction=eviction)
    for first in range(0, 400, 20):
        put(store, digests_of(range(first, first + 20)), nbytes=3000)
    assert (root / "lsun_train_lmdb" / "data.mdb").read_bytes() == before
    store.delete_all()
    assert (root / "lsun_train_lmdb" / "data.mdb").read_bytes() == before


def files_of_0_6(path):
    """Make what torchcache 0.6 left: a file a value, under its hash."""
    path.mkdir(parents=True)
    for number in (-5, 0, 123456789):
        (path / f"{number}.pt.br").write_bytes(b"zstd")


def test_beside_the_files_of_torchcache_0_6_a_cache_of_the_same_name_is_made_and_found_again(root, caplog):
    files_of_0_6(root / "pinned")
    store = open_store(root, "pinned")
    assert put(store, digests_of(range(5))).rows == 5
    assert store.path == root / "pinned.beside-0.6"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "torchcache 0.6" in said
    assert sorted(entry.name for entry in (root / "pinned").iterdir()) == ["-5.pt.br", "0.pt.br", "123456789.pt.br"]

    forget_environments()
    reader = LmdbStore(
        CacheDirectory(root, PRIVATE.read_only()), "pinned", StoreSettings(max_persistent_cache_size=1 << 30)
    )
    assert hits_of(reader, digests_of(range(5))) == set(range(5))

    shutil.rmtree(root / "pinned")
    forget_environments()
    assert hits_of(open_store(root, "pinned"), digests_of(range(5))) == set(range(5))
    assert len(caplog.records) == 1


def test_what_is_ours_or_empty_or_holds_anything_else_is_no_directory_of_torchcache_0_6(root):
    files_of_0_6(root / "mixed")
    (root / "mixed" / "notes.txt").touch()
    (root / "empty").mkdir()
    put(open_store(root, "ours"), digests_of(range(5)))
    directory = CacheDirectory(root)
    assert [directory.place_for(name) for name in ("mixed", "empty", "ours", "new")] == [
        "mixed", "empty", "ours", "new"
    ]  # fmt: skip


def test_a_data_set_of_the_user_s_under_the_name_of_the_cache_is_left_alone(root):
    root.mkdir()
    before = foreign_data_set(root / "mine")
    (root / "mine.damaged").mkdir()
    (root / "mine.damaged" / "precious").write_text("kept")
    store = open_store(root, "mine")
    with pytest.raises(StoreError, match="not made by torchcache") as caught:
        put(store, [digest_of(1)])
    assert caught.value.kind == "foreign"
    store.delete_all()
    assert (root / "mine" / "data.mdb").read_bytes() == before
    assert (root / "mine.damaged" / "precious").read_text() == "kept"


def test_a_directory_that_only_looks_like_trash_is_left_alone(root):
    store = open_store(root, max_persistent_cache_size=300_000)
    (root / ".trash-1000").mkdir()
    (root / ".trash-1000" / "file").write_text("kept")
    for number in range(90):
        put(store, [digest_of(number)], nbytes=3000)
    assert (root / ".trash-1000" / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("counts", "said"),
    [((90, 10), "Raise max_persistent_cache_size"), ((1, 100), "Only 1 samples were found so far, and 100 were not")],
)
def test_a_full_directory_of_a_cache_with_few_hits_is_told_first_to_look_for_the_cause(root, caplog, counts, said):
    caplog.set_level(logging.WARNING)
    settings = StoreSettings(max_persistent_cache_size=1 << 20)
    budget = budgets.Budget(CacheDirectory(root), settings, lambda: counts)
    budget.rest(1 << 21)
    (line,) = [record.getMessage() for record in caplog.records if "is full" in record.getMessage()]
    _, _, remedy = line.partition("not stored on disk. ")
    assert remedy.startswith(said)
    assert "raise max_persistent_cache_size" in remedy.lower()
