"""A cache that others fill is read wherever its files can be read, and nothing is written there."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import torchcache
from tests.storage.children import finish, in_child, read_line, run, start
from tests.storage.known_values import (
    NAME,
    NAMESPACE,
    check,
    digests_of,
    forget_environments,
    hits_of,
    open_store,
    put,
)
from torchcache.errors import StoreError
from torchcache.kinds import Fault
from torchcache.storage import environment, files
from torchcache.storage.access import PRIVATE
from torchcache.storage.contract import StoreSettings
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.lmdb import LmdbStore

NOBODY, SOMEBODY = 65534, 61001
X = torch.arange(32.0).reshape(8, 4)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount, and be several users")


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def place():
    """A directory that every user can reach."""
    path = Path("/tmp") / f"torchcache-test-{os.getpid()}-{random.Random().getrandbits(64):x}"
    path.mkdir(mode=0o755)
    # Other users may not be able to read what is imported late.
    codecs.lookup("ascii")
    fill(path / "warm")
    yield path
    forget_environments()
    shutil.rmtree(path)


def mount(*arguments):
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")


@contextlib.contextmanager
def read_only_mount(source, target):
    """Show a directory a second time, where nobody can write."""
    target.mkdir()
    mount("--bind", source, target)
    try:
        mount("-o", "remount,bind,ro", target)
        yield target
    finally:
        subprocess.run(["umount", target], check=True)


def call(cache_dir, x=X, **options):
    """Call a cached module of this process's own; return its statistics and the lines of the log."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("torchcache")
    logger.addHandler(handler)
    try:
        options = {"persistent": True, "persistent_cache_dir": cache_dir, "mode": "read", **options}
        module = torchcache.torchcache(**options)(Doubled().eval())
        assert torch.equal(module(x), x * 2)
        cache = torchcache.cache_of(module)
        assert cache.flush()
        return cache.stats(), [line for line in lines if "module hash" not in line]
    finally:
        logger.removeHandler(handler)


def fill(cache_dir, x=X):
    assert call(cache_dir, x, mode="on")[0].written_rows == len(x)
    forget_environments()


def finds_all(cache_dir, x=X, mode="read"):
    stats, lines = call(cache_dir, x, mode=mode)
    assert (stats.store_hits, stats.misses, dict(stats.faults), lines) == (len(x), 0, {}, [])


def is_refused(cache_dir, why):
    """It is computed and said once, and where nothing may be computed, the error says why."""
    stats, lines = call(cache_dir)
    assert (stats.store_hits, stats.misses) == (0, len(X))
    assert sum(stats.faults.values()) == len(lines) == 1
    assert why in lines[0]
    with pytest.raises(torchcache.CacheMissError, match=why):
        call(cache_dir, mode="require")


def as_user(user, function, *args, **options):
    """Run something in a child that is somebody else."""

    def run():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        return function(*args, **options)

    return in_child(run)


def open_to_all(cache_dir):
    """Let everybody read what root filled, as an administrator would."""
    subprocess.run(["chmod", "-R", "a+rX", cache_dir], check=True)


def state_of(path):
    return {
        str(entry): (status.st_mode, status.st_size, status.st_mtime_ns)
        for entry in [path, *path.rglob("*")]
        if entry.name != "lock.mdb"  # LMDB notes readers there
        for status in [entry.lstat()]
    }


# -- file systems and files that cannot be written ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["read", "require"])
def test_a_cache_on_a_read_only_mount_is_read(tmp_path, mode):
    fill(tmp_path / "cache")
    before = state_of(tmp_path / "cache")
    with read_only_mount(tmp_path / "cache", tmp_path / "mounted") as mounted:
        in_child(finds_all, mounted, X, mode)
    assert state_of(tmp_path / "cache") == before


def test_a_cache_on_a_file_system_that_became_read_only_is_read(tmp_path):
    path = tmp_path / "small"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", path)
    try:
        fill(path)
        mount("-o", "remount,ro", path)
        in_child(finds_all, path)
        in_child(finds_all, path, X, "require")
    finally:
        subprocess.run(["umount", path], check=True)


def test_what_is_written_through_another_mount_is_found_on_a_read_only_one(tmp_path):
    fill(tmp_path / "cache", X[:2])
    with read_only_mount(tmp_path / "cache", tmp_path / "mounted") as mounted:

        def follow():
            finds_all(mounted, X[:2])
            in_child(fill, tmp_path / "cache", X[2:])
            finds_all(mounted)

        in_child(follow)


@pytest.mark.parametrize("mode", ["read", "require"])
def test_a_cache_of_root_is_read_by_who_cannot_write_it(place, mode):
    fill(place / "cache")
    open_to_all(place / "cache")
    before = state_of(place / "cache")
    as_user(NOBODY, finds_all, place / "cache", X, mode)
    assert state_of(place / "cache") == before


def test_files_of_our_own_that_nobody_may_write_are_read(place):
    cache = place / "cache"
    cache.mkdir()
    os.chown(cache, NOBODY, NOBODY)
    as_user(NOBODY, fill, cache)
    subprocess.run(["chmod", "-R", "a-w", cache], check=True)
    as_user(NOBODY, finds_all, cache)


def test_without_the_file_for_readers_it_is_read_and_none_is_made(tmp_path):
    """As of a cache that was copied without it."""
    fill(tmp_path / "cache")
    (lock,) = tmp_path.glob("cache/*/lock.mdb")
    lock.unlink()
    in_child(finds_all, tmp_path / "cache")
    assert not lock.exists()


def test_a_directory_of_another_user_is_refused_with_the_reason(place):
    cache = place / "cache"
    cache.mkdir()
    os.chown(cache, SOMEBODY, SOMEBODY)
    as_user(SOMEBODY, fill, cache)
    open_to_all(cache)
    as_user(NOBODY, is_refused, cache, f"belongs to user {SOMEBODY}")


def test_a_module_of_another_user_in_a_directory_of_root_is_refused_with_the_reason(place):
    cache = place / "cache"
    cache.mkdir()
    cache.chmod(0o1777)
    as_user(SOMEBODY, fill, cache)
    open_to_all(cache)
    as_user(NOBODY, is_refused, cache, f"belongs to user {SOMEBODY}")


def test_a_cache_of_root_that_we_may_not_read_costs_one_line(place):
    fill(place / "cache")
    as_user(NOBODY, is_refused, place / "cache", "is not ours to read")


# -- readers and writers at the same time ---------------------------------------------------------------------------

#: Opens the cache as a reader would, reads once, and reads again whenever it is told to.
READER = """
import sys
from tests.processes.test_read_only import X, call
for _ in sys.stdin:
    stats, lines = call(sys.argv[1], max_memory_cache_size=0)
    print(stats.store_hits, stats.misses, dict(stats.faults), lines, flush=True)
"""


def ask(reader):
    reader.stdin.write("\n")
    reader.stdin.flush()
    return read_line(reader)


def test_a_reader_that_was_there_first_finds_what_another_process_writes_later(root):
    reader = start(READER, root)
    try:
        assert ask(reader) == "0 8 {} []"
        assert not root.exists()
        in_child(fill, root, X[:3])
        assert ask(reader) == "3 5 {} []"
        in_child(fill, root, X[3:])
        assert ask(reader) == "8 0 {} []"
        finish(reader)
    finally:
        reader.kill()
        reader.communicate()


def test_a_reader_that_forks_reads_on_in_parent_and_child(root):
    fill(root)

    def follow():
        finds_all(root)
        in_child(finds_all, root)
        finds_all(root)

    in_child(follow)


def reading_store(path):
    return LmdbStore(CacheDirectory(path, PRIVATE.read_only()), NAME, StoreSettings(max_persistent_cache_size=1 << 20))


START_AFRESH = """
import sys
from pathlib import Path
from tests.storage.known_values import digests_of, open_store, put
open_store(Path(sys.argv[1])).delete_all()
put(open_store(Path(sys.argv[1])), digests_of(range(10, 15)), 1000)
"""


def test_a_reader_follows_an_environment_that_is_removed_and_made_again(root, monkeypatch):
    monkeypatch.setattr(environment, "_INODE_CHECK_SECONDS", 0.0)
    put(open_store(root), digests_of(range(10)), 1000)
    forget_environments()
    store = reading_store(root)
    assert hits_of(store, digests_of(range(20))) == set(range(10))
    run(START_AFRESH, root)
    assert hits_of(store, digests_of(range(20))) == set(range(10, 15))


GROW = """
import sys
from pathlib import Path
from tests.storage.known_values import digests_of, open_store, put
put(open_store(Path(sys.argv[1])), digests_of(range(10, 3000)), 1000)
"""


@pytest.mark.parametrize("is_noted", [True, False], ids=["with a reader table", "without"])
def test_a_reader_follows_an_environment_that_grows_beyond_its_map(root, monkeypatch, is_noted):
    put(open_store(root), digests_of(range(10)), 1000)
    forget_environments()
    if not is_noted:
        (root / NAME / "lock.mdb").unlink()

    def follow():
        monkeypatch.setattr(files, "_LEAST_MAP_BYTES", 1 << 20)
        store = reading_store(root)
        store._environment.files._map_bytes = 1 << 20
        assert len(hits_of(store, digests_of(range(3000)))) == 10
        run(GROW, root)  # not forked, for which the environment would be closed
        assert len(hits_of(store, digests_of(range(3000)))) == 3000

    in_child(follow)


#: Replaces rows of one cache without a pause, so that LMDB uses its pages again and again.
OVERWRITER = """
import random, sys
from pathlib import Path
from tests.storage.known_values import NAMESPACE, digests_of, open_store, put
store, choose = open_store(Path(sys.argv[1]), max_persistent_cache_size=1 << 24), random.Random(0)
put(store, digests_of(range(200)), 1000)
Path(sys.argv[1], "..").chmod(0o755)
for folder in (Path(sys.argv[1]), *Path(sys.argv[1]).iterdir()):
    folder.chmod(0o755 if folder.is_dir() else 0o600)
for file in Path(sys.argv[1]).glob("*/*"):
    file.chmod(0o644)
print("ready", flush=True)
while True:
    some = digests_of(choose.sample(range(200), 20))
    store.delete_many(NAMESPACE, some)
    put(store, some, 1000)
"""


def test_a_reader_that_no_table_notes_never_takes_bytes_that_are_just_overwritten(place):
    """A checksum does not help where bytes change between the check and the copy."""
    writer = start(OVERWRITER, place / "cache")
    try:
        assert read_line(writer) == "ready"
        answered, overtaken = as_user(NOBODY, read_on, place / "cache")
    finally:
        writer.kill()
        writer.communicate()
    assert answered > 20
    assert overtaken > 0, "the writer was too slow to disturb anybody, so nothing was shown"


def read_on(path, seconds=3.0):
    """Read all rows again and again; each value must be right."""
    store, digests = reading_store(path), digests_of(range(200))
    begin, overtaken = environment._Reading._begin, 0

    def begin_and_wait(env):
        txn = begin(env)
        if random.random() < 0.5:
            time.sleep(0.02)  # the longer it takes, the more a writer gets ahead
        return txn

    environment._Reading._begin = staticmethod(begin_and_wait)
    answered = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            lookup = store.get_many(NAMESPACE, digests)
        except StoreError as error:
            if error.kind != Fault.OVERWRITTEN:
                raise
            overtaken += 1
            continue
        assert lookup.corrupt == 0
        answered += check(lookup, digests) != set()
    return answered, overtaken


def test_a_store_that_is_only_read_refuses_to_be_written(root):
    put(open_store(root), digests_of(range(3)))
    forget_environments()
    before = state_of(root)
    store = reading_store(root)
    for change in (
        lambda: put(store, digests_of([4])),
        lambda: store.delete_many(NAMESPACE, digests_of([1])),
        lambda: store.touch(NAMESPACE),
        store.delete_all,
    ):
        with pytest.raises(StoreError) as caught:
            change()
        assert caught.value.kind == "read_only"
    assert hits_of(store, digests_of(range(3))) == {0, 1, 2}
    assert state_of(root) == before
