"""Files that are damaged, foreign, hostile or cannot be written: a miss, a line in the log, never more."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import lmdb
import pytest
import torch
from torch import nn

import torchcache
from tests.storage.children import in_child
from tests.storage.known_values import (
    NAMESPACE,
    close_environments,
    digest_of,
    digests_of,
    directory_bytes,
    forget_environments,
    hits_of,
    open_store,
    put,
)
from torchcache.errors import StoreError
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.files import FORMAT, FORMAT_KEY

NOBODY = 65534


# -- damaged, foreign and hostile files ---------------------------------------------------------------------------


def truncated_to(share):
    def damage(path, victim):
        os.truncate(path, int(path.stat().st_size * share) if share else 100)

    return damage


def cut_to_pages(pages):
    return lambda path, victim: os.truncate(path, 4096 * pages)


def zero_length(path, victim):
    os.truncate(path, 0)


def garbage(path, victim):
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def zeros(path, victim):
    path.write_bytes(bytes(path.stat().st_size))


def text(path, victim):
    path.write_text("this is not a database\n" * 1000)


def meta_pages_of_zeros(path, victim):
    path.write_bytes(bytes(2 * 4096) + path.read_bytes()[2 * 4096 :])


def first_meta_page_of_garbage(path, victim):
    path.write_bytes(random.Random(0).randbytes(4096) + path.read_bytes()[4096:])


def sqlite(path, victim):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("create table t (x)")
        database.commit()


def directory(path, victim):
    path.unlink()
    path.mkdir()


def fifo(path, victim):
    path.unlink()
    os.mkfifo(path)


def symlink(path, victim):
    path.unlink()
    path.symlink_to(victim)


def dangling_symlink(path, victim):
    path.unlink()
    path.symlink_to(victim.parent / "nowhere")


def hard_link(path, victim):
    path.unlink()
    path.hardlink_to(victim)


def device(path, victim):
    path.unlink()
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero


def missing(path, victim):
    path.unlink()


def of_another_user(path, victim):
    os.chown(path, NOBODY, NOBODY)


DAMAGES = {
    "half": truncated_to(0.5),
    "nine tenths": truncated_to(0.9),
    "100 bytes": truncated_to(0),
    "one page": cut_to_pages(1),
    "two pages": cut_to_pages(2),
    **{
        function.__name__.replace("_", " "): function
        for function in (
            zero_length, garbage, zeros, text, meta_pages_of_zeros, first_meta_page_of_garbage, sqlite, directory, fifo,
            symlink, dangling_symlink, hard_link, device, missing, of_another_user,
        )
    },
}  # fmt: skip


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_bytes(random.Random(1).randbytes(50_000))
    return path


@pytest.fixture
def damaged_root(root):
    """A cache directory with a store of 200 rows that nobody has open."""
    put(open_store(root), digests_of(range(200)), nbytes=1000)
    forget_environments()
    return root


@pytest.mark.parametrize("file", ["data.mdb", "lock.mdb"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_miss_and_the_store_works_again_after_the_next_write(damaged_root, victim, file, damage):
    """No signal, no hang, nothing but ``StoreError``; whoever a link points at is not changed."""
    before = victim.read_bytes()
    DAMAGES[damage](damaged_root / "module-hash" / file, victim)
    in_child(use_after_damage, damaged_root)
    assert victim.read_bytes() == before
    assert not (victim.parent / "nowhere").exists()
    assert in_child(read_in_a_fresh_process, damaged_root) >= 20
    assert len(list(damaged_root.glob("*.damaged*"))) <= 1


def use_after_damage(root):
    start = time.monotonic()
    store = open_store(root)
    with contextlib.suppress(StoreError):
        hits_of(store, digests_of(range(200)))
    put(store, digests_of(range(1000, 1020)), nbytes=1000)
    assert hits_of(store, digests_of(range(1000, 1020))) == set(range(20))
    hits_of(store, digests_of(range(200)))
    assert time.monotonic() - start < 5


def read_in_a_fresh_process(root):
    forget_environments()
    store = open_store(root)
    assert hits_of(store, digests_of(range(1000, 1020))) == set(range(20))
    return len(hits_of(store, [*digests_of(range(200)), *digests_of(range(1000, 1020))]))


def test_an_empty_place_that_another_process_announces_meanwhile_is_not_set_aside(root, monkeypatch):
    store, rmdir = open_store(root), os.rmdir
    store.announce()

    def rmdir_and_let_another_process_announce(path):
        rmdir(path)
        path.mkdir(0o700)

    monkeypatch.setattr(os, "rmdir", rmdir_and_let_another_process_announce)
    put(store, digests_of(range(10)))
    assert hits_of(store, digests_of(range(10))) == set(range(10))
    assert list(root.glob("*.damaged*")) == []


def test_only_one_damaged_store_is_kept(damaged_root):
    for seed in range(3):
        data = damaged_root / "module-hash" / "data.mdb"
        data.write_bytes(random.Random(seed).randbytes(100_000 + seed))
        put(open_store(damaged_root), [digest_of(seed)])
        forget_environments()
    aside = [path for path in damaged_root.iterdir() if path.is_dir() and path.name != "module-hash"]
    assert len(aside) == 1
    assert (aside[0] / "data.mdb").stat().st_size == 100_002


def test_a_store_set_aside_counts_against_the_budget_and_can_be_evicted(damaged_root):
    """Files that nobody can read must not keep a full budget full for ever."""
    data = damaged_root / "module-hash" / "data.mdb"
    data.write_bytes(bytes(1_600_000))
    store = open_store(damaged_root, max_persistent_cache_size=2_000_000)
    with contextlib.suppress(StoreError):
        put(store, [digest_of(0)])
    assert directory_bytes(damaged_root) <= 2_000_000
    for path in [*damaged_root.glob("*.damaged*/*"), *damaged_root.glob("*.damaged*")]:
        os.utime(path, (1, 1))
    wake(store)
    put(store, digests_of(range(10)), nbytes=10_000)
    assert hits_of(store, digests_of(range(10))) == set(range(10))


@pytest.mark.parametrize("kind", ["file", "link to a directory", "dangling link", "fifo", "world-writable directory"])
def test_something_else_in_the_place_of_the_subdirectory_is_never_followed(root, tmp_path, kind):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("kept")
    root.mkdir(mode=0o700)
    place = root / "module-hash"
    if kind == "file":
        place.write_text("kept")
    elif kind == "link to a directory":
        put(open_store(tmp_path / "elsewhere"), digests_of(range(5)))
        forget_environments()
        shutil.rmtree(target)
        (tmp_path / "elsewhere" / "module-hash").rename(target)
        place.symlink_to(target)
    elif kind == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()
        place.chmod(0o777)
    before = sorted((path.name, path.read_bytes()) for path in target.iterdir())

    def use():
        store = open_store(root)
        with contextlib.suppress(StoreError):
            assert hits_of(store, digests_of(range(5))) == set()
        with contextlib.suppress(StoreError):
            put(store, digests_of(range(5)))

    in_child(use)
    assert sorted((path.name, path.read_bytes()) for path in target.iterdir()) == before
    assert not (tmp_path / "nowhere").exists()


def test_an_environment_of_another_format_is_not_touched(damaged_root):
    path = damaged_root / "module-hash"
    with lmdb.open(str(path)) as env, env.begin(write=True) as txn:
        txn.put(FORMAT_KEY, FORMAT + b"00")
    before = (path / "data.mdb").read_bytes()
    store = open_store(damaged_root)
    with pytest.raises(StoreError) as caught:
        store.get_many(NAMESPACE, digests_of(range(3)))
    assert caught.value.kind == "format"
    with pytest.raises(StoreError) as caught:
        put(store, digests_of(range(3)))
    assert caught.value.kind == "format"
    assert FORMAT.decode() in str(caught.value)
    close_environments()
    assert (path / "data.mdb").read_bytes() == before
    assert [entry.name for entry in damaged_root.iterdir() if entry.is_dir()] == ["module-hash"]
    forget_environments()
    shutil.rmtree(path)


def test_an_environment_of_a_smaller_map_is_still_read_and_written(root):
    """Another process, with a smaller budget, wrote it; and one with a larger one goes on."""
    small = open_store(root, max_persistent_cache_size=10_000_000)
    put(small, digests_of(range(10)))
    in_child(write_much, root)
    assert hits_of(small, digests_of(range(10))) == set(range(10))
    put(small, digests_of(range(20, 30)))
    assert hits_of(small, digests_of(range(5000, 5010))) == set(range(10))


def write_much(root):
    forget_environments()
    store = open_store(root, max_persistent_cache_size=200_000_000)
    for first in range(5000, 5100, 10):
        put(store, digests_of(range(first, first + 10)), nbytes=1_000_000)


def test_a_map_that_another_process_outgrew_is_opened_again(root, monkeypatch):
    monkeypatch.setattr("torchcache.storage.files._LEAST_MAP_BYTES", 1 << 20)
    store = open_store(root, max_persistent_cache_size=1 << 18)
    put(store, digests_of(range(10)))
    in_child(write_much, root)
    for _ in range(3):
        with contextlib.suppress(StoreError):
            if hits_of(store, digests_of([0, 5000])) == {0, 1}:
                break
    else:
        raise AssertionError("a lookup that met a larger file never recovers")


def test_readers_that_were_killed_do_not_block_new_ones(root, monkeypatch):
    monkeypatch.setattr("torchcache.storage.files._MOST_READERS", 4)
    store = open_store(root)
    monkeypatch.setattr(type(store._environment.files), "_readers", lambda self: 4)
    put(store, digests_of(range(3)))
    for _ in range(8):
        in_child(read_and_stay_registered, root)
        assert hits_of(store, digests_of(range(3))) == {0, 1, 2}
        close_environments()
    assert hits_of(store, digests_of(range(3))) == {0, 1, 2}


def read_and_stay_registered(root):
    """End without closing, as a killed process does; its reader slot stays."""
    assert hits_of(open_store(root), digests_of(range(3))) == {0, 1, 2}


def test_opening_is_not_tried_again_at_once_after_it_failed(damaged_root):
    garbage(damaged_root / "module-hash" / "data.mdb", None)
    store = open_store(damaged_root)
    tries, open_it = [], store._environment.files.open
    store._environment.files.open = lambda: tries.append(time.monotonic()) or open_it()
    for _ in range(2000):
        with pytest.raises(StoreError):
            store.get_many(NAMESPACE, [digest_of(0)])
    assert all(later - earlier >= 0.9 for earlier, later in itertools.pairwise(tries))
    assert tries
    forget_environments()
    shutil.rmtree(damaged_root / "module-hash")


# -- directories that cannot be used -----------------------------------------------------------------------------


class Doubled(nn.Module):
    """Counts the rows it computes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


def call_twice(cache_dir, **options):
    """Use the public interface as a program does; return the statistics and the lines of the log."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("torchcache")
    logger.addHandler(handler)
    try:
        module = Doubled().eval().requires_grad_(False)
        cached = torchcache.torchcache(persistent=True, persistent_cache_dir=cache_dir, **options)(module)
        x = torch.arange(32.0).reshape(8, 4)
        with torchcache.disabled():
            expected = cached(x)
        start = time.monotonic()
        assert torch.equal(cached(x), expected)
        assert torch.equal(cached(x), expected)
        cache = torchcache.cache_of(cached)
        cache.flush()
        assert torch.equal(cached(x), expected)
        assert time.monotonic() - start < 6
        return cache.stats(), [line for line in lines if "module hash" not in line]
    finally:
        logger.removeHandler(handler)


def goes_on_in_memory(cache_dir):
    stats, lines = call_twice(cache_dir)
    assert (stats.misses, stats.memory_hits, stats.store_hits) == (8, 16, 0)
    assert sum(stats.faults.values()) >= 1
    assert len(lines) == 1, lines
    return lines[0]


def as_somebody_else(function, *args):
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return function(*args)


@pytest.fixture
def reachable():
    """A directory that other users can reach."""
    place = Path("/tmp") / f"torchcache-test-{os.getpid()}-{random.Random().getrandbits(64):x}"
    place.mkdir(mode=0o755)
    yield place
    shutil.rmtree(place)


def test_a_usable_directory_is_used(root):
    stats, lines = call_twice(root)
    assert (stats.misses, stats.written_rows, dict(stats.faults), lines) == (8, 8, {}, [])


def test_a_file_in_the_place_of_the_directory_costs_one_line(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    assert str(path) in goes_on_in_memory(path)
    assert path.read_text() == "kept"


def test_a_directory_under_a_file_costs_one_line(tmp_path):
    (tmp_path / "file").write_text("kept")
    goes_on_in_memory(tmp_path / "file" / "cache")


def test_a_directory_that_everybody_can_write_costs_one_line(tmp_path):
    path = tmp_path / "cache"
    path.mkdir()
    path.chmod(0o777)
    assert "777" in goes_on_in_memory(path)
    assert list(path.iterdir()) == []


def test_a_directory_of_another_user_costs_one_line(reachable):
    path = reachable / "cache"
    path.mkdir()
    os.chown(path, 1, 1)
    path.chmod(0o777)
    assert "belongs to" in in_child(as_somebody_else, goes_on_in_memory, path)
    assert list(path.iterdir()) == []


def test_a_directory_of_root_that_we_cannot_write_costs_one_line(reachable):
    in_child(as_somebody_else, goes_on_in_memory, reachable)
    assert list(reachable.iterdir()) == []


def test_a_directory_that_cannot_be_made_costs_one_line(reachable):
    in_child(as_somebody_else, goes_on_in_memory, reachable / "cache")
    assert list(reachable.iterdir()) == []


def test_a_cache_that_we_may_not_read_costs_one_line(reachable):
    """Root made it, with its private files, in a directory that anybody may write to."""
    path = reachable / "cache"
    path.mkdir()
    path.chmod(0o1777)
    stats, _ = call_twice(path)
    assert stats.written_rows == 8
    forget_environments()
    in_child(as_somebody_else, cannot_break_in, path)


def cannot_break_in(path):
    stats, lines = call_twice(path)
    assert (stats.misses, stats.memory_hits) == (8, 16)
    assert len(lines) == len(stats.faults) >= 1


@contextlib.contextmanager
def tmpfs(path, size):
    path.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        forget_environments()
        subprocess.run(["umount", path], check=True)


def test_a_read_only_file_system_costs_one_line(tmp_path):
    with tmpfs(tmp_path / "small", "1m") as path:
        subprocess.run(["mount", "-o", "remount,ro", path], check=True)
        goes_on_in_memory(path / "cache")


def test_a_store_on_a_file_system_that_became_read_only_still_answers_or_misses(tmp_path):
    with tmpfs(tmp_path / "small", "8m") as path:
        put(open_store(path), digests_of(range(10)))
        forget_environments()
        subprocess.run(["mount", "-o", "remount,ro", path], check=True)

        def use():
            with contextlib.suppress(StoreError):
                store = open_store(path)
                with contextlib.suppress(StoreError):
                    hits_of(store, digests_of(range(10)))
                put(store, [digest_of(50)])
                raise AssertionError("it wrote to a read-only file system")

        in_child(use)
        subprocess.run(["mount", "-o", "remount,rw", path], check=True)
        assert hits_of(open_store(path), digests_of(range(10))) == set(range(10))


# -- a full disk ----------------------------------------------------------------------------------------------------


def fill(path: Path) -> None:
    """Take every byte that is left."""
    with path.open("wb", buffering=0) as stream:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while stream.write(bytes(size)):
                    pass


def test_on_a_full_disk_lookups_go_on_and_writes_resume_when_there_is_room(tmp_path):
    with tmpfs(tmp_path / "small", "4m") as path:
        in_child(fill_and_resume, path)


def test_a_disk_that_others_filled_is_left_to_them_and_writes_resume_when_there_is_room(tmp_path):
    with tmpfs(tmp_path / "small", "16m") as path:
        in_child(leave_room_and_resume, path)


def leave_room_and_resume(path):
    store = open_store(path / "cache")
    put(store, digests_of(range(20)), nbytes=10_000)
    with (path / "checkpoint").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(path).free - 500_000)
    for first in range(100, 200, 10):
        put(store, digests_of(range(first, first + 10)), nbytes=10_000)
    assert shutil.disk_usage(path).free >= (16 << 20) // 50
    assert hits_of(store, digests_of(range(20))) == set(range(20))
    (path / "checkpoint").unlink()
    assert put(store, digests_of(range(300, 310)), nbytes=10_000).rows == 10


def do_not_look_at_the_disk():
    """Somebody else may fill the disk between the look and the commit."""
    CacheDirectory.free_disk_bytes = lambda _: (0, 0)


def fill_and_resume(path):
    do_not_look_at_the_disk()
    store = open_store(path / "cache")
    put(store, digests_of(range(20)), nbytes=10_000)
    fill(path / "filler")
    failed = 0
    for first in range(100, 200, 10):
        try:
            put(store, digests_of(range(first, first + 10)), nbytes=10_000)
        except StoreError:
            failed += 1
        assert hits_of(store, digests_of(range(20))) == set(range(20))
    assert failed == 10
    (path / "filler").unlink()
    put(store, digests_of(range(100, 110)), nbytes=10_000)
    assert hits_of(store, digests_of([*range(20), *range(100, 110)])) == set(range(30))


@pytest.mark.parametrize(
    "state", ["nothing yet", "a directory", "no lock file", "an empty lock file", "a short lock file"]
)
def test_opening_on_a_full_disk_is_no_signal(tmp_path, state):
    with tmpfs(tmp_path / "small", "4m") as path:
        cache = path / "cache"
        if state == "a directory":
            cache.mkdir(mode=0o700)
        elif state != "nothing yet":
            put(open_store(cache), digests_of(range(20)), nbytes=10_000)
            forget_environments()
            lock = cache / "module-hash" / "lock.mdb"
            lock.unlink() if state == "no lock file" else os.truncate(
                lock, 0 if state == "an empty lock file" else 5000
            )
        fill(path / "filler")
        in_child(use_on_a_full_disk, cache)
        (path / "filler").unlink()
        put(open_store(cache), digests_of(range(50, 60)))
        assert hits_of(open_store(cache), digests_of(range(50, 60))) == set(range(10))


def use_on_a_full_disk(cache):
    do_not_look_at_the_disk()
    for _ in range(2):
        with contextlib.suppress(StoreError):
            store = open_store(cache)
            with contextlib.suppress(StoreError):
                hits_of(store, digests_of(range(20)))
            with contextlib.suppress(StoreError):
                put(store, digests_of(range(100, 110)), nbytes=10_000)
            with contextlib.suppress(StoreError):
                hits_of(store, digests_of(range(110)))


def test_a_program_on_a_disk_that_fills_up_gets_right_results(tmp_path):
    with tmpfs(tmp_path / "small", "4m") as path:
        in_child(train_on_a_small_disk, path)


def train_on_a_small_disk(path):
    torch.set_num_threads(1)  # a parallel operation hangs in a forked child
    module = torchcache.torchcache(persistent=True, persistent_cache_dir=path, max_memory_cache_size=0)(
        nn.Linear(4, 5000).requires_grad_(False)
    )
    data = torch.randn(400, 4)
    with torchcache.disabled():
        expected = module(data)
    for _ in range(2):
        for i in range(0, 400, 20):
            assert torch.allclose(module(data[i : i + 20]), expected[i : i + 20], atol=1e-5)
    cache = torchcache.cache_of(module)
    cache.flush()
    stats = cache.stats()
    assert stats.store_hits > 0
    assert sum(stats.dropped_rows.values()) > 0


def test_an_address_space_limit_costs_at_most_the_disk_tier(root):
    """A map of 64 GiB does not fit; a smaller one may."""
    put(open_store(root), digests_of(range(10)))
    forget_environments()
    for limit in (8 << 30, 1 << 30, 256 << 20):
        in_child(use_under_a_limit, root, resource.RLIMIT_AS, limit)
    assert in_child(use_under_a_limit, root, resource.RLIMIT_AS, 8 << 30) == 10


@pytest.mark.parametrize(("limit", "value"), [(resource.RLIMIT_FSIZE, 60_000), (resource.RLIMIT_NOFILE, 0)])
def test_other_limits_of_the_process_cost_at_most_the_disk_tier(root, limit, value):
    put(open_store(root), digests_of(range(10)))
    forget_environments()
    in_child(use_under_a_limit, root, limit, value)


def use_under_a_limit(root, limit, value):
    """Limits on addresses are above what is mapped already."""
    if limit == resource.RLIMIT_AS:
        value += int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    if limit == resource.RLIMIT_NOFILE:
        value = 1 + max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    found = 0
    with contextlib.suppress(StoreError):
        store = open_store(root, max_persistent_cache_size=50_000_000)
        with contextlib.suppress(StoreError):
            found = len(hits_of(store, digests_of(range(10))))
        with contextlib.suppress(StoreError):
            put(store, digests_of(range(100, 150)), nbytes=10_000)
        with contextlib.suppress(StoreError):
            found = len(hits_of(store, digests_of(range(10))))
    return found


def wake(store) -> None:
    """Let a store that found its budget full ask again now and not in ten seconds."""
    store._budget._resting_until = 0.0


def test_a_handle_that_somebody_else_is_giving_up_is_waited_for(root):
    store = open_store(root)
    put(store, digests_of(range(5)))
    store.close()
    held = lmdb.open(str(store.path), readonly=True, max_dbs=0)
    closing = threading.Timer(0.02, held.close)
    closing.start()
    try:
        assert hits_of(store, digests_of(range(5))) == set(range(5))
    finally:
        closing.join()
        held.close()
