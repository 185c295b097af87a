"""The budget of a cache directory holds over all processes together, whoever has which budget."""

from __future__ import annotations

import os
import random
import select
import time
from pathlib import Path

import pytest

from tests.storage.children import fork, in_child, wait_for
from tests.storage.known_values import (
    digest_of,
    digests_of,
    directory_bytes,
    forget_environments,
    hits_of,
    open_store,
    put,
)

BUDGET = 48 << 20
SECONDS, MOST_SECONDS = 2.0, 20.0


def sample_while(root: Path, pids: list[int], timeout_seconds: float = 60.0) -> int:
    """Count the bytes under ``root`` every ten milliseconds until all children have ended; return the most."""
    most, running = 0, set(pids)
    deadline = time.monotonic() + timeout_seconds
    while running:
        assert time.monotonic() < deadline, "a writer did not end"
        select.select([], [], [], 0.01)
        if root.exists():
            most = max(most, directory_bytes(root))
        for pid in list(running):
            status = wait_for(pid, 0)
            if status is not None:
                assert status == 0
                running.discard(pid)
    return most


def in_children(n: int, work, *args) -> list[int]:
    """Start ``work(place, *args)`` in ``n`` children."""
    pids = []
    for place in range(n):
        pid = fork()
        if pid == 0:
            status = 1
            try:
                work(place, *args)
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def write_all_sizes(place: int, root: Path, seconds: float, settings: dict) -> None:
    """Commit batches of rows of 1 kB to 2 MB, and check those that are found."""
    rng = random.Random(place)
    names = [f"hash-{i}" for i in range(2)]
    stores = [open_store(root, name, lock_timeout_seconds=30.0, **settings) for name in names]
    start, number = time.monotonic(), 1_000_000 * place
    asked = dropped = 0
    while (spent := time.monotonic() - start) < MOST_SECONDS:
        if spent > seconds and (dropped or asked > BUDGET // 3):  # a slow machine needs longer to fill it
            break
        store = rng.choice(stores)
        nbytes = int(1000 * 2000 ** rng.random())
        batch = digests_of(range(number, number + rng.choice([1, 4, 16])))
        written = put(store, batch, nbytes=nbytes)
        dropped += sum(written.dropped.values())
        asked += len(batch) * nbytes
        assert written.rows + sum(written.dropped.values()) == len(batch)
        found = hits_of(store, batch)
        assert len(found) == len(batch) or written.dropped or settings["eviction"] == "lru"
        number += len(batch)


@pytest.mark.parametrize("eviction", ["stale", "none", "lru"])
def test_eight_writers_of_all_sizes_never_exceed_the_budget_and_use_it(root, eviction):
    settings = {"max_persistent_cache_size": BUDGET, "eviction": eviction}
    most = sample_while(root, in_children(8, write_all_sizes, root, SECONDS, settings))
    assert most <= BUDGET
    if eviction != "lru":  # there the file is used over and over, and started afresh when it has grown too far
        assert directory_bytes(root) >= 0.85 * BUDGET
    assert most >= 0.85 * BUDGET


def test_two_processes_with_different_budgets_each_keep_theirs(root):
    def fill(place, budgets):
        store = open_store(root, max_persistent_cache_size=budgets[place], lock_timeout_seconds=30.0)
        for number in range(1000 * place, 1000 * place + 400):
            before = directory_bytes(root)
            stored = not put(store, [digest_of(number)], nbytes=100_000).dropped
            assert not stored or before <= budgets[place]

    most = sample_while(root, in_children(2, fill, [8 << 20, 24 << 20]))
    assert 0.85 * (24 << 20) <= most <= 24 << 20


def test_a_budget_smaller_than_what_is_there_stops_writing_and_goes_on_reading(root):
    def fill():
        put(open_store(root, max_persistent_cache_size=BUDGET), digests_of(range(200)), nbytes=100_000)
        return directory_bytes(root)

    before = in_child(fill)

    def use():
        store = open_store(root, max_persistent_cache_size=4 << 20)
        assert put(store, digests_of(range(1000, 1010)), nbytes=1000).dropped == {"budget": 10}
        assert hits_of(store, digests_of(range(200))) == set(range(200))

    in_child(use)
    assert directory_bytes(root) <= before

    def use_as_before():
        store = open_store(root, max_persistent_cache_size=BUDGET)
        assert put(store, digests_of(range(1000, 1010)), nbytes=1000).rows == 10

    in_child(use_as_before)


def test_a_budget_smaller_than_what_is_there_is_come_to_where_the_policy_allows(root):
    in_child(lambda: put(open_store(root, max_persistent_cache_size=BUDGET), digests_of(range(200)), nbytes=100_000))

    def use():
        store = open_store(root, max_persistent_cache_size=4 << 20, eviction="lru")
        for number in range(1000, 1040):
            put(store, [digest_of(number)], nbytes=50_000)
        assert 39 in hits_of(store, digests_of(range(1000, 1040)))

    in_child(use)
    assert directory_bytes(root) <= 4 << 20


@pytest.mark.parametrize("eviction", ["stale", "none", "lru"])
def test_a_budget_too_small_for_one_record_stores_nothing_and_counts_it(root, eviction):
    def use(budget):
        store = open_store(root, max_persistent_cache_size=budget, eviction=eviction)
        assert sum(put(store, [digest_of(1)], nbytes=3_000_000).dropped.values()) == 1
        assert hits_of(store, [digest_of(1)]) == set()

    for budget in (1, 5000, 300_000, 2_000_000):
        in_child(use, budget)
        assert directory_bytes(root) <= max(budget, 4096)  # the directory alone has a page


def test_dead_environments_are_removed_as_a_whole_while_other_processes_use_theirs(root):
    """A reader that still has one open keeps what it has; everybody else goes on."""
    for name in ("dead-1", "dead-2"):
        in_child(lambda name=name: put(open_store(root, name), digests_of(range(100)), nbytes=100_000))
        past = time.time() - 7200
        os.utime(root / name / "data.mdb", (past, past))
    go, over = os.pipe(), os.pipe()

    def read_the_dead(_):
        store = open_store(root, "dead-1")
        assert hits_of(store, digests_of(range(100))) == set(range(100))
        os.write(go[1], b"x")
        os.close(over[1])
        while not select.select([over[0]], [], [], 0.005)[0]:
            hits_of(store, digests_of(range(100)))  # checks what it finds
        assert hits_of(store, digests_of(range(100))) == set() or (root / "dead-1").exists()

    def write(place):
        store = open_store(root, f"living-{place}", max_persistent_cache_size=BUDGET, lock_timeout_seconds=30.0)
        for number in range(150):
            put(store, [digest_of(number)], nbytes=100_000)

    reader = in_children(1, read_the_dead)
    assert os.read(go[0], 1) == b"x"
    most = sample_while(root, in_children(2, write))
    select.select([], [], [], 1.1)  # so long a reader may go on with what was removed
    os.close(over[1])
    sample_while(root, reader)
    for descriptor in (*go, over[0]):
        os.close(descriptor)
    assert most <= BUDGET
    assert not (root / "dead-1").exists()
    for name in ("living-0", "living-1"):
        assert in_child(lambda name=name: len(hits_of(open_store(root, name), digests_of(range(150))))) >= 100
    forget_environments()
