"""SIGKILL at any instant loses at most what was not committed, and damages nothing."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import struct
import time
import traceback
from pathlib import Path

import pytest

from tests.processes.programs import enqueue, store_hits
from tests.storage.children import fork, in_child, wait_for
from tests.storage.known_values import close_environments, digest_of, digests_of, hits_of, open_store, put, verify
from torchcache.storage.writer import writer

SIZES = (100, 3000, 20_000, 300_000)


def write_for_ever(root: Path, first: int, acknowledge: int, **settings: object) -> None:
    """Commit rows and say after each commit which are durable now."""
    store = open_store(root, **settings)
    rng = random.Random(first)
    for number in itertools.count(first, 8):
        put(store, digests_of(range(number, number + 8)), nbytes=rng.choice(SIZES))
        os.write(acknowledge, struct.pack("<Q", number))


def queue_for_ever(root: Path, first: int, acknowledge: int) -> None:
    """Write through the queue and flush now and then."""
    store = open_store(root)
    for i, number in enumerate(itertools.count(first, 8)):
        enqueue(store, range(number, number + 8), nbytes=SIZES[i % 4])
        if i % 3 == 2:
            assert writer.flush(10)
            for earlier in (number - 16, number - 8, number):
                os.write(acknowledge, struct.pack("<Q", earlier))


def kill_while(work, delay_seconds: float, *args: object) -> list[int]:
    """Run ``work`` in a child, kill it after a while and return what it acknowledged."""
    reader, acknowledge = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            work(*args, acknowledge)
        finally:
            os._exit(9)
    os.close(acknowledge)
    select.select([], [], [], delay_seconds)  # the instant of death is what is random here
    os.kill(pid, signal.SIGKILL)
    assert wait_for(pid, 60) == -signal.SIGKILL, "the writer failed before it was killed"
    told = b""
    while part := os.read(reader, 1 << 16):
        told += part
    os.close(reader)
    return [number for (number,) in struct.iter_unpack("<Q", told)]


@pytest.mark.parametrize("work", [write_for_ever, queue_for_ever])
def test_what_was_committed_survives_thirty_kills_and_the_next_process_writes(root, work):
    store = open_store(root)
    rng = random.Random(work.__name__)
    durable: list[int] = []
    for kill in range(30):
        first = 1_000_000 * kill
        acknowledged = kill_while(work, rng.uniform(0.0, 0.08), root, first)
        durable += [number for start in acknowledged for number in range(start, start + 8)]
        asked = list(range(first, first + 400))
        hits = store_hits(store, asked)
        assert hits >= {number for number in durable if number >= first}
        put(store, [digest_of(first - 1)])
        durable.append(first - 1)
    assert store_hits(store, durable) == set(durable)
    assert len(durable) > 100
    close_environments()
    assert verify(store.path) >= len(durable)


def test_a_process_killed_while_it_makes_the_store_leaves_a_directory_that_works(root, tmp_path):
    rng = random.Random(0)
    for kill in range(30):
        path = tmp_path / f"cache-{kill}"
        acknowledged = kill_while(write_for_ever, rng.uniform(0.0, 0.006), path, 0)

        def use(path=path, acknowledged=acknowledged):
            store = open_store(path)
            durable = [number for start in acknowledged for number in range(start, start + 8)]
            assert store_hits(store, durable) == set(durable)
            put(store, [digest_of(-1)])
            assert hits_of(store, [digest_of(-1)]) == {0}

        in_child(use)


@pytest.mark.parametrize("eviction", ["stale", "none", "lru"])
def test_killed_processes_leave_nothing_that_counts_against_the_budget_for_ever(root, eviction):
    """What a process killed in the middle of a removal leaves is taken away when room is needed."""
    store = open_store(root, max_persistent_cache_size=2_000_000, eviction=eviction)
    put(store, digests_of(range(10)))
    trash = root / ".torchcache-trash-of-a-killed-process"
    trash.mkdir()
    (trash / "data.mdb").write_bytes(bytes(1_500_000))
    old = time.time() - 7200
    os.utime(trash, (old, old))
    os.utime(trash / "data.mdb", (old, old))
    assert put(store, digests_of(range(20, 30)), nbytes=50_000).rows == 10
    assert not trash.exists()
    assert hits_of(store, digests_of(range(10))) == set(range(10))


def test_members_of_a_crowd_may_be_killed_while_the_others_read_and_write(root):
    """Four writers and four readers for three seconds; one of them is killed and replaced all the time."""
    put(open_store(root), digests_of(range(8)))
    rng = random.Random(0)

    def read_for_ever():
        store = open_store(root)
        while True:
            store_hits(store, [rng.randrange(5_000_000) // 1000 * 1000 + i for i in range(16)] + list(range(8)))

    def start(number):
        pid = fork()
        if pid == 0:
            try:
                if number % 2:
                    read_for_ever()
                else:
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    write_for_ever(root, 1000 * number, nowhere, lock_timeout_seconds=20.0)
            except BaseException:  # noqa: BLE001 - shown, and it ends
                traceback.print_exc()
            finally:
                os._exit(9)
        return pid

    running = {start(number): number for number in range(8)}
    try:
        for number in range(8, 40):
            select.select([], [], [], 0.08)
            victim = rng.choice(list(running))
            os.kill(victim, signal.SIGKILL)
            replaced = running.pop(victim)
            assert wait_for(victim, 60) == -signal.SIGKILL, "it failed before it was killed"
            running[start(number // 2 * 2 + replaced % 2)] = replaced
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        endings = [wait_for(pid, 60) for pid in running]
    assert endings == [-signal.SIGKILL] * 8
    store = open_store(root)
    put(store, [digest_of(-1)])
    assert hits_of(store, digests_of([-1, *range(8)])) == set(range(9))
