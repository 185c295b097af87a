"""The contract of a store, as ``LmdbStore`` keeps it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import threading
import time
from pathlib import Path

import lmdb
import msgpack
import numpy as np
import pytest

from tests.storage.children import in_child, stopped
from tests.storage.known_values import (
    NAMESPACE,
    check,
    close_environments,
    digest_of,
    digests_of,
    entry_of,
    forget_environments,
    hits_of,
    open_store,
    packed_of,
    plain_layout,
    put,
    value_of,
    verdict_of,
    verify,
)
from torchcache.errors import StoreError
from torchcache.layout import MAX_LEAVES, Layout, Leaf, Rows
from torchcache.storage import budget as budgets
from torchcache.storage.contract import Packed, Verdict
from torchcache.storage.deletion import Deletion
from torchcache.storage.directory import CacheDirectory, TurnCancelledError
from torchcache.storage.record import MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_VALUE_BYTES

OTHER_NAMESPACE = b"another one.....".ljust(16)


def test_a_lookup_before_anything_was_written_is_a_miss_and_makes_nothing(root):
    store = open_store(root)
    lookup = store.get_many(NAMESPACE, digests_of(range(3)))
    assert (lookup.found, lookup.missing, lookup.corrupt) == ([], [0, 1, 2], 0)
    assert list(root.iterdir()) == []


def test_what_was_put_is_found(store):
    digests = digests_of(range(10))
    written = put(store, digests)
    assert (written.rows, dict(written.dropped)) == (10, {})
    assert hits_of(store, digests) == set(range(10))


def test_absent_samples_are_missing_beside_those_found_and_positions_tell_which(store):
    put(store, digests_of(range(0, 20, 2)))
    asked = digests_of([19, 4, 7, 0, 18, 3])
    lookup = store.get_many(NAMESPACE, asked)
    assert check(lookup, asked) == {1, 3, 4}
    assert (sorted(lookup.missing), lookup.corrupt) == ([0, 2, 5], 0)


def test_no_samples_are_a_lookup_too(store):
    put(store, [digest_of(1)])
    lookup = store.get_many(NAMESPACE, [])
    assert (lookup.found, lookup.missing) == ([], [])


def test_a_sample_asked_for_twice_is_answered_twice(store):
    put(store, digests_of([1, 2]))
    assert hits_of(store, digests_of([2, 1, 2, 2])) == {0, 1, 2, 3}


def test_found_data_belongs_to_the_caller(store):
    digests = digests_of(range(4))
    put(store, digests)
    for item in store.get_many(NAMESPACE, digests).found:
        item.data[:] = 0
    assert hits_of(store, digests) == set(range(4))


def test_found_data_outlives_later_commits_and_the_closed_environment(store):
    digests = digests_of(range(64))
    put(store, digests, nbytes=3000)
    lookup = store.get_many(NAMESPACE, digests)
    store.delete_all()
    for i in range(5):
        put(store, digests_of(range(1000 * i, 1000 * i + 64)), nbytes=3000)
    close_environments()
    assert check(lookup, digests) == set(range(64))


def test_an_equal_sample_twice_in_a_batch_is_stored_once(store):
    before = put(store, [digest_of(0)]).nbytes
    written = put(store, digests_of([1, 1, 1]))
    assert (written.rows, written.nbytes) == (3, before)
    assert hits_of(store, digests_of([1])) == {0}


def test_an_equal_sample_twice_among_the_items_of_a_commit_is_stored_once(store):
    packed = packed_of(store, digests_of([1, 2])) + packed_of(store, digests_of([2, 3]))
    assert store.put_many(packed).nbytes == 3 * put(store, [digest_of(9)]).nbytes
    assert hits_of(store, digests_of([1, 2, 3])) == {0, 1, 2}


def test_what_is_there_already_stays_and_counts_as_stored(store):
    first = put(store, digests_of(range(10)))
    again = put(store, digests_of(range(5, 15)))
    assert again.rows == 10
    assert again.nbytes == first.nbytes // 2
    assert hits_of(store, digests_of(range(15))) == set(range(15))


def test_many_small_commits_fill_one_segment_and_stay_readable(store):
    for i in range(200):
        put(store, [digest_of(i)], nbytes=700)
    assert hits_of(store, digests_of(range(200))) == set(range(200))
    close_environments()
    assert verify(store.path) == 200
    assert segments_of(store.path) <= 4


def test_namespaces_do_not_see_each_other(store):
    namespaces = [b"%016d" % i for i in range(50)]
    for namespace in namespaces:
        put(store, digests_of([1, 2]), namespace=namespace)
    put(store, digests_of([3]), namespace=namespaces[7])
    for i, namespace in enumerate(namespaces):
        assert hits_of(store, digests_of([1, 2, 3]), namespace) == ({0, 1, 2} if i == 7 else {0, 1})


def test_one_commit_may_hold_many_namespaces(store):
    packed = []
    for i in range(20):
        packed += packed_of(store, digests_of(range(i, i + 3)), namespace=b"%016d" % (i % 5))
    store.put_many(packed)
    for i in range(20):
        assert hits_of(store, digests_of(range(i, i + 3)), b"%016d" % (i % 5)) == {0, 1, 2}


def test_values_of_many_layouts_share_a_commit_and_a_lookup(store):
    layouts = [
        Layout((Leaf("float32", "float32", (3,)),)),
        Layout((Leaf("float16", "float32", (2, 3)),)),
        Layout((Leaf("float32", "float32", (3,)), Leaf("int64", "int64", (2,))), b"a structure"),
        Layout((Leaf("float32", "float32", (0, 7)),)),
        Layout((Leaf("uint8", "uint8", (3, 2, 2), 1),)),
    ]
    packed, expected = [], {}
    for i, layout in enumerate(layouts):
        digests = digests_of(range(100 * i, 100 * i + 10))
        data = np.random.default_rng(i).integers(0, 256, (10, layout.nbytes), dtype=np.uint8)
        packed.append(store.pack(NAMESPACE, Rows(digests, layout, data)))
        expected |= {digest: (layout, row.tobytes()) for digest, row in zip(digests, data, strict=True)}
    store.put_many(packed)
    asked = list(expected)
    random.Random(0).shuffle(asked)
    lookup = store.get_many(NAMESPACE, asked)
    assert (lookup.missing, lookup.corrupt, len(lookup.found)) == ([], 0, len(layouts))
    for item in lookup.found:
        for position, row in zip(item.positions, item.data, strict=True):
            assert expected[asked[position]] == (item.layout, row.tobytes())


@pytest.mark.parametrize("zstd_level", [None, 3])
def test_rows_of_every_size_come_back(root, zstd_level):
    store = open_store(root, zstd_level=zstd_level)
    sizes = [0, 1, 15, 100, 2000, 2038, 4040, 4096, 65000, 65520, 65536, 65537, 300_000, 2_000_000]
    for i, nbytes in enumerate(sizes):
        put(store, digests_of([2 * i, 2 * i + 1]), nbytes=nbytes)
    digests = digests_of(range(2 * len(sizes)))
    assert hits_of(store, digests) == set(range(2 * len(sizes)))
    forget_environments()
    lookup = open_store(root).get_many(NAMESPACE, digests)
    assert check(lookup, digests) == set(range(2 * len(sizes)))
    assert {item.layout.nbytes for item in lookup.found} == set(sizes)


def test_compression_saves_space_and_stores_raw_what_does_not_shrink(root):
    store = open_store(root, zstd_level=3)
    shrinks = put(store, [digest_of(1)], nbytes=10_000)  # halves repeat
    assert shrinks.nbytes < 6000
    noise = np.random.default_rng(0).integers(0, 256, (1, 10_000), dtype=np.uint8)
    rows = Rows([digest_of(2)], plain_layout(10_000), noise)
    assert 10_000 < store.put_many([store.pack(NAMESPACE, rows)]).nbytes < 10_100
    (found,) = store.get_many(NAMESPACE, [digest_of(2)]).found
    assert found.data.tobytes() == noise.tobytes()


def test_a_value_larger_than_a_record_may_be_is_passed_by(store):
    rows = Rows([digest_of(1)], plain_layout(MAX_VALUE_BYTES + 1), np.empty((1, 0), np.uint8))
    written = store.put_many([store.pack(NAMESPACE, rows)])
    assert (written.rows, written.nbytes, dict(written.dropped)) == (0, 0, {"too_large": 1})
    assert hits_of(store, [digest_of(1)]) == set()


BYTE = Leaf("uint8", "uint8", (1,))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout((BYTE,) * 3, b"a structure"), id="three leaves"),
        pytest.param(Layout((BYTE,) * MAX_LEAVES, bytes(5000)), id="as many leaves as may be"),
        pytest.param(Layout((BYTE,), bytes(MAX_HEADER_BYTES - 60)), id="a long structure"),
        pytest.param(Layout((Leaf("uint8", "uint8", (1,) * MAX_DIMENSIONS),)), id="as many dimensions as may be"),
        pytest.param(Layout((Leaf("float32", "float32", (50, 400)),) * 3, bytes(3000)), id="long rows"),
    ],
)
@pytest.mark.parametrize("zstd_level", [None, 1])
def test_a_structured_value_comes_back_with_its_structure(root, layout, zstd_level):
    store, digests = open_store(root, zstd_level=zstd_level), digests_of(range(5))
    data = np.random.default_rng(0).integers(0, 256, (5, layout.nbytes), dtype=np.uint8)
    assert store.put_many([store.pack(NAMESPACE, Rows(digests, layout, data))]).rows == 5
    lookup = store.get_many(NAMESPACE, [*digests, digest_of(9)])
    (found,) = lookup.found
    assert (found.layout, lookup.missing, lookup.corrupt) == (layout, [5], 0)
    assert found.data[np.argsort(found.positions)].tobytes() == data.tobytes()
    assert store.delete_many(NAMESPACE, digests) == 5
    assert segments_of_open(store) == 0


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout((BYTE,) * (MAX_LEAVES + 1)), id="too many leaves"),
        pytest.param(Layout(()), id="no leaf"),
        pytest.param(Layout((BYTE,), bytes(MAX_HEADER_BYTES - 40)), id="too long a structure"),
        pytest.param(Layout((BYTE,), bytes(10 * MAX_HEADER_BYTES)), id="far too long a structure"),
        pytest.param(Layout((BYTE,) * MAX_LEAVES, bytes(MAX_HEADER_BYTES - 100)), id="too much together"),
        pytest.param(Layout((Leaf("uint8", "uint8", (1,) * (MAX_DIMENSIONS + 1)),)), id="too many dimensions"),
        pytest.param(Layout((Leaf("uint8", "uint8", (1 << 20, 0, 1 << 20)),)), id="huge around nothing"),
        pytest.param(Layout((Leaf("uint8", "no such dtype", (1,)),)), id="unknown dtype"),
        pytest.param(Layout((Leaf("uint8", "uint8", (1,), 7),)), id="unknown memory format"),
    ],
)
def test_a_value_that_no_header_can_describe_is_dropped_and_counted(store, layout):
    data = np.zeros((3, layout.nbytes), np.uint8)
    refused = store.pack(NAMESPACE, Rows(digests_of(range(3)), layout, data))
    assert dict(store.put_many([refused]).dropped) == {"too_large_to_describe": 3}
    assert not store.path.exists()
    written = store.put_many([*packed_of(store, digests_of(range(5, 8))), refused])
    assert (written.rows, dict(written.dropped)) == (3, {"too_large_to_describe": 3})
    assert hits_of(store, digests_of(range(8))) == {5, 6, 7}


def test_samples_whose_digests_share_a_front_never_get_each_others_value(store):
    one = digest_of(1)
    twin = one[:8] + bytes(8)
    put(store, [one])
    assert hits_of(store, [twin]) == set()
    put(store, [twin])
    hits_of(store, [one, twin])


def test_another_process_finds_what_was_committed_and_we_find_its(store):
    put(store, digests_of(range(10)))
    in_child(put, store, digests_of(range(10, 20)))
    assert hits_of(store, digests_of(range(20))) == set(range(20))
    assert in_child(hits_of, store, digests_of(range(20))) == set(range(20))


def test_another_store_of_the_directory_does_not_see_them(store, root):
    put(store, digests_of(range(3)))
    assert hits_of(open_store(root, "another-hash"), digests_of(range(3))) == set()


def test_two_stores_on_one_environment_share_it(store, root):
    put(store, digests_of(range(3)))
    twin = open_store(root)
    assert hits_of(twin, digests_of(range(3))) == {0, 1, 2}
    store.close()
    put(twin, digests_of([3]))
    assert hits_of(twin, digests_of(range(4))) == {0, 1, 2, 3}


def test_delete_all_deletes_all_for_every_store_and_writes_go_on(store, root):
    twin = open_store(root)
    put(store, digests_of(range(10)))
    assert hits_of(twin, digests_of(range(10))) == set(range(10))
    store.delete_all()
    assert hits_of(store, digests_of(range(10))) == set()
    assert hits_of(twin, digests_of(range(10))) == set()
    assert not store.path.exists()
    put(twin, digests_of([1]))
    assert hits_of(store, digests_of(range(10))) == {1}


def test_after_another_process_deleted_all_it_is_a_miss_and_no_fault(store):
    digests = digests_of(range(10))
    put(store, digests)
    assert hits_of(store, digests) == set(range(10))
    in_child(store.delete_all)
    look_at_the_file_again(store)
    assert hits_of(store, digests) == set()
    put(store, digests)
    assert hits_of(store, digests) == set(range(10))


def test_after_another_process_deleted_all_and_wrote_its_rows_are_found(store):
    put(store, digests_of(range(10)))
    in_child(delete_and_put, store, digests_of(range(20, 30)))
    look_at_the_file_again(store)
    assert hits_of(store, digests_of(range(30))) == set(range(20, 30))


def test_after_another_process_deleted_all_a_write_goes_to_the_new_file(store):
    put(store, digests_of(range(10)))
    in_child(delete_and_put, store, digests_of(range(20, 30)))
    put(store, digests_of([40]))
    assert in_child(hits_of, store, digests_of([20, 40])) == {0, 1}


def test_a_removed_cache_directory_is_made_again(store, root):
    put(store, digests_of(range(3)))
    shutil.rmtree(root)
    put(store, digests_of([5]))
    assert hits_of(store, digests_of(range(6))) == {5}
    assert store.path.stat().st_mode & 0o777 == 0o700


def test_everything_on_disk_is_private(store, root):
    old = os.umask(0)
    try:
        put(store, digests_of(range(3)))
    finally:
        os.umask(old)
    assert root.stat().st_mode & 0o777 == 0o700
    for path in [store.path, *store.path.iterdir(), root / ".torchcache.lock"]:
        assert path.stat().st_mode & 0o077 == 0, path


HOLD_FILE_LOCK = """
import sys, filelock, os
lock = filelock.FileLock(os.path.join(sys.argv[1], ".torchcache.lock"))
lock.acquire()
print("ready", flush=True)
sys.stdin.read()
"""

HOLD_WRITE_MUTEX = """
import sys, lmdb
env = lmdb.open(sys.argv[1], map_size=1 << 36)
with env.begin(write=True) as txn:
    txn.put(b"x", b"y")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("is_open", [True, False], ids=["open already", "opened by the lookup"])
def test_a_lookup_needs_no_lock_that_a_stopped_process_holds(store, root, is_open):
    digests = digests_of(range(64))
    put(store, digests)
    close_environments()
    if is_open:
        hits_of(store, digests)
    with stopped(HOLD_FILE_LOCK, root), stopped(HOLD_WRITE_MUTEX, store.path):
        start = time.monotonic()
        assert hits_of(store, digests) == set(range(64))
        assert time.monotonic() - start < 0.5
    put(store, digests_of([100]))


def test_a_write_gives_up_when_the_lock_stays_with_a_stopped_process(root):
    store = open_store(root, lock_timeout_seconds=0.3)
    put(store, digests_of([1]))
    with stopped(HOLD_FILE_LOCK, root):
        start = time.monotonic()
        with pytest.raises(StoreError) as caught:
            put(store, digests_of([2]))
        assert time.monotonic() - start < 2
        assert caught.value.kind == "lock_timeout"
        assert hits_of(store, digests_of([1, 2])) == {0}
    put(store, digests_of([2]))
    assert hits_of(store, digests_of([1, 2])) == {0, 1}


def test_a_write_waits_longer_for_a_lock_that_others_get_in_turn(root):
    """The lock itself never comes free for it: what the others leave is that each of them had its turn."""
    store = open_store(root, lock_timeout_seconds=0.3)
    put(store, digests_of([1]))
    has_waited = threading.Event()

    def take_turns() -> None:
        while not has_waited.wait(0.05):
            os.utime(root)

    with stopped(HOLD_FILE_LOCK, root):
        thread = threading.Thread(target=take_turns)
        thread.start()
        start = time.monotonic()
        with pytest.raises(StoreError, match="stayed with another process"):
            put(store, digests_of([2]))
        waited = time.monotonic() - start
        has_waited.set()
        thread.join()
    assert 5 * 0.3 < waited < 5


def test_each_turn_shows_that_the_lock_is_not_stuck(root):
    store = open_store(root)
    put(store, digests_of([1]))
    os.utime(root, (0, 0))
    put(store, digests_of([2]))
    assert root.stat().st_mtime > 0


def test_the_value_of_a_corrupt_record_is_missing_and_the_next_write_replaces_it(store):
    digests = digests_of(range(20))
    put(store, digests, nbytes=1000)
    close_environments()
    damage(store.path / "data.mdb", value_of(NAMESPACE, digests[7], 1000)[300:340])
    lookup = store.get_many(NAMESPACE, digests)
    assert check(lookup, digests) == set(range(20)) - {7}
    assert (list(lookup.missing), lookup.corrupt) == ([7], 1)
    put(store, [digests[7]], nbytes=1000)
    assert hits_of(store, digests) == set(range(20))


def test_a_corrupt_record_is_replaced_by_a_process_that_found_it_beside_sound_ones(store):
    digests = digests_of(range(20))
    put(store, digests, nbytes=200)
    close_environments()
    for i in (3, 4):
        damage(store.path / "data.mdb", value_of(NAMESPACE, digests[i], 200)[:20])
    assert hits_of(store, digests) == set(range(20)) - {3, 4}
    put(store, digests, nbytes=200)
    assert hits_of(store, digests) == set(range(20))


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(msgpack.packb(fields), id=said)
        for said, fields in {
            "negative number": [-1, 1, 1, 1, 0.0, 0.0],
            "huge number": [1 << 40, 1, 1, 1, 0.0, 0.0],
            "text for a number": ["0", 1, 1, 1, 0.0, 0.0],
            "negative segment": [0, -5, 1, 1, 0.0, 0.0],
            "huge segment": [0, 1 << 40, 1, 1, 0.0, 0.0],
            "last segment": [0, (1 << 32) - 1, 1, 1, 0.0, 0.0],
            "no segment": [0, None, 1, 1, 0.0, 0.0],
            "half a segment": [0, 1.5, 1, 1, 0.0, 0.0],
            "text for rows": [0, 1, "many", 1, 0.0, 0.0],
            "text for a time": [0, 1, 1, 1, 0.0, "yesterday"],
            "no number as a time": [0, 1, 1, 1, 0.0, float("nan")],
            "too short": [0],
            "a map": {},
        }.items()
    ]
    + [pytest.param(b"", id="empty"), pytest.param(b"\xc1" * 40, id="no msgpack")],
)
def test_a_damaged_entry_of_the_namespace_table_costs_its_rows_and_is_replaced(store, entry):
    put(store, digests_of(range(5)))
    put(store, digests_of(range(5)), namespace=OTHER_NAMESPACE)
    close_environments()
    with lmdb.open(str(store.path)) as env, env.begin(write=True) as txn:
        txn.put(b"n" + NAMESPACE, entry)
    hits_of(store, digests_of(range(5)))
    put(store, digests_of(range(10)))
    put(store, digests_of(range(5, 10)), namespace=OTHER_NAMESPACE)
    store.touch(NAMESPACE)
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    assert hits_of(store, digests_of(range(10)), OTHER_NAMESPACE) == set(range(10))
    # The damaged number may have hidden what a lookup could not know to be doubtful: one more round.
    assert set(range(5, 10)) <= hits_of(store, digests_of(range(10)))
    put(store, digests_of(range(10)))
    assert hits_of(store, digests_of(range(10))) == set(range(10))


@pytest.mark.parametrize("nbytes", [100, 1000, 5000, 100_000])
@pytest.mark.parametrize("kind", ["bit", "byte", "page"])
def test_flipped_bits_anywhere_in_the_file_never_give_a_wrong_value(root, nbytes, kind):
    """Each case is looked up, written to and looked up again, in a process of its own that must live."""
    digests = digests_of(range(60))
    store = open_store(root)
    put(store, digests, nbytes=nbytes)
    put(store, digests[:10], nbytes=nbytes, namespace=OTHER_NAMESPACE)
    close_environments()
    data = store.path / "data.mdb"
    sound = data.read_bytes()
    rng = random.Random(f"{nbytes}{kind}")
    found = 0
    for case in range(12):
        damaged = bytearray(sound)
        for _ in range(4):
            at = rng.randrange(len(sound)) if rng.random() < 0.6 else rng.randrange(min(len(sound), 5 * 4096))
            if kind == "bit":
                damaged[at] ^= 1 << rng.randrange(8)
            elif kind == "byte":
                damaged[at] = rng.randrange(256)
            else:
                page = at - at % 4096
                damaged[page : page + 4096] = rng.randbytes(4096)
        data.write_bytes(damaged)
        try:
            found += in_child(use_a_damaged_store, root, digests, nbytes)
        except AssertionError as error:
            raise AssertionError(f"case {case} of {kind}, {nbytes} bytes") from error
        for path in root.glob("*.damaged"):
            shutil.rmtree(path)
        if data.parent.exists():
            shutil.rmtree(data.parent)
        data.parent.mkdir(mode=0o700)
        data.write_bytes(sound)
    assert found > 0


def test_no_bit_of_the_entries_beside_the_records_is_trusted(root):
    """The pages of the index and of the namespace table, bit by bit, at random."""
    digests = digests_of(range(30))
    store = open_store(root)
    put(store, digests, nbytes=6000)
    close_environments()
    data = store.path / "data.mdb"
    sound = data.read_bytes()
    pages = [
        at
        for at in range(2 * 4096, len(sound), 4096)
        if NAMESPACE in sound[at : at + 4096] or b"a format" in sound[at:]
    ]
    rng = random.Random(1)
    for _ in range(80):
        damaged = bytearray(sound)
        damaged[rng.choice(pages) + rng.randrange(4096)] ^= 1 << rng.randrange(8)
        data.write_bytes(damaged)
        in_child(use_a_damaged_store, root, digests, 6000)
        for path in root.glob("*.damaged"):
            shutil.rmtree(path)
        shutil.rmtree(data.parent)
        data.parent.mkdir(mode=0o700)
        data.write_bytes(sound)


# -- deletion -----------------------------------------------------------------------------------------------


def test_deleted_rows_are_missing_and_the_others_stay(store):
    digests = digests_of(range(20))
    put(store, digests, nbytes=1000)
    put(store, digests, namespace=OTHER_NAMESPACE)
    assert store.delete_many(NAMESPACE, digests[5:8]) == 3
    assert hits_of(store, digests) == set(range(20)) - {5, 6, 7}
    assert hits_of(store, digests, OTHER_NAMESPACE) == set(range(20))
    assert in_child(hits_of, store, digests) == set(range(20)) - {5, 6, 7}


def test_a_deletion_counts_only_what_was_there(store):
    assert store.delete_many(NAMESPACE, digests_of(range(3))) == 0
    assert not store.path.exists()
    put(store, digests_of(range(3)))
    assert store.delete_many(OTHER_NAMESPACE, digests_of(range(3))) == 0
    assert store.delete_many(NAMESPACE, digests_of([1, 7, 1, 2])) == 2
    assert store.delete_many(NAMESPACE, digests_of([1, 2])) == 0
    assert store.delete_many(NAMESPACE, []) == 0
    assert hits_of(store, digests_of(range(3))) == {0}


@pytest.mark.parametrize("nbytes", [0, 100, 3000, 70_000])
def test_a_deleted_row_can_be_written_anew_with_another_value(store, nbytes):
    digests = digests_of(range(10))
    put(store, digests, nbytes=500)
    for _ in range(3):
        assert store.delete_many(NAMESPACE, digests[2:4]) == 2
        put(store, digests, nbytes=nbytes)
        sizes = {p: item.layout.nbytes for item in store.get_many(NAMESPACE, digests).found for p in item.positions}
        assert sizes == {p: nbytes if p in (2, 3) else 500 for p in range(10)}


def test_a_row_that_cannot_be_deleted_is_replaced_by_the_next_write(store, monkeypatch):
    put(store, digests_of(range(5)), nbytes=500)
    monkeypatch.setattr(budgets, "deletable", lambda *_: (0, 0))
    assert store.delete_many(NAMESPACE, digests_of([1])) == 0
    put(store, digests_of(range(5)), nbytes=600)
    found = store.get_many(NAMESPACE, digests_of(range(5))).found
    assert {item.layout.nbytes: list(item.positions) for item in found} == {500: [0, 2, 3, 4], 600: [1]}


def replacing(store, digests, nbytes):
    (item,) = packed_of(store, digests, nbytes)
    return dataclasses.replace(item, replaces=digests)


def sizes_of(store, digests):
    return {p: item.layout.nbytes for item in store.get_many(NAMESPACE, digests).found for p in item.positions}


@pytest.mark.parametrize("nbytes", [1000, 70_000])
def test_rows_that_replace_others_take_their_place_and_their_room(store, nbytes):
    digests = digests_of(range(64))
    put(store, digests, nbytes)
    segments, rows = segments_of_open(store), entry_of(store).rows
    for size in (nbytes - 10, nbytes):
        order = random.Random(size).sample(digests, 64)
        for start in range(0, 64, 8):
            assert store.put_many([replacing(store, order[start : start + 8], size)]).rows == 8
        assert sizes_of(store, digests) == dict.fromkeys(range(64), size)
    assert segments_of_open(store) <= segments + 1
    assert entry_of(store).rows == rows == 64
    assert store.delete_many(NAMESPACE, digests) == 64
    assert segments_of_open(store) == 0


def test_of_several_values_in_one_commit_the_last_stands(store):
    digests = digests_of(range(5))
    first = packed_of(store, digests, 500)
    written = store.put_many([*first, replacing(store, digests[1:4], 600), replacing(store, digests[2:3], 700)])
    assert (written.rows, entry_of(store).rows) == (9, 5)
    assert sizes_of(store, digests) == {0: 500, 1: 600, 2: 700, 3: 600, 4: 500}


def test_a_value_goes_though_no_record_can_hold_the_one_that_replaces_it(store):
    digests = digests_of(range(5))
    refused = Packed(NAMESPACE, (), (), {"too_large": 2}, replaces=digests[:2])
    assert store.put_many([refused]).dropped == {"too_large": 2}
    assert not store.path.exists()
    put(store, digests)
    assert store.put_many([refused]).dropped == {"too_large": 2}
    assert hits_of(store, digests) == {2, 3, 4}


@pytest.mark.parametrize(("nbytes", "n"), [(100, 2000), (3000, 100), (70_000, 7)])
@pytest.mark.parametrize("entries", [1, 50, 4096])
def test_a_segment_goes_with_its_last_row_and_the_namespace_too(store, monkeypatch, nbytes, n, entries):
    monkeypatch.setattr(budgets, "deletable", lambda *_: (entries, 1 << 40))
    digests = digests_of(range(n))
    put(store, digests, nbytes=nbytes)
    put(store, digests[:3], namespace=OTHER_NAMESPACE)
    before = entry_of(store)
    random.Random(0).shuffle(digests)
    assert store.delete_many(NAMESPACE, digests[: n // 2]) == n // 2
    left = entry_of(store)
    assert (left.rows, left.nbytes) == (n - n // 2, before.nbytes * (n - n // 2) // n)
    assert store.delete_many(NAMESPACE, digests[n // 2 :]) == n - n // 2
    assert entry_of(store) is None
    assert entry_of(store, OTHER_NAMESPACE).rows == 3
    assert segments_of_open(store) == 1
    put(store, digests, nbytes=nbytes)
    assert hits_of(store, digests) == set(range(n))


def test_a_segment_whose_end_cannot_be_walked_stays(store):
    """A damaged header hides the records behind it, which the index still knows."""
    digests = digests_of(range(6))
    put(store, digests)
    close_environments()
    with lmdb.open(str(store.path)) as env, env.begin(write=True) as txn:
        ((key, segment),) = [(key, value) for key, value in txn.cursor() if key[:1] == b"s"]
        at = segment.index(digests[2]) - 14
        txn.put(key, segment[:at] + b"\0" + segment[at + 1 :])
    assert store.delete_many(NAMESPACE, digests[:2]) == 2
    assert hits_of(store, digests) == {3, 4, 5}
    put(store, digests)
    assert hits_of(store, digests) == set(range(6))
    assert store.delete_many(NAMESPACE, digests) == 6
    store.delete_all()


def test_deleting_a_sample_takes_the_place_that_its_twin_has(store):
    """The index has half a digest; the value that was to go must never be the one that stays."""
    one = digest_of(1)
    twin = one[:8] + bytes(8)
    put(store, [one])
    store.delete_many(NAMESPACE, [twin])
    put(store, [twin])
    assert hits_of(store, [one, twin]) == {1}


def test_a_deletion_goes_to_the_file_that_another_process_made(store):
    put(store, digests_of(range(10)))
    in_child(delete_and_put, store, digests_of(range(5)))
    assert store.delete_many(NAMESPACE, digests_of(range(3))) == 3
    assert in_child(hits_of, store, digests_of(range(10))) == {3, 4}
    in_child(store.delete_all)
    assert store.delete_many(NAMESPACE, digests_of(range(10))) == 0


def cancel_after(n):
    """Return a function that says to give up when it is asked the ``n``-th time."""
    answers = iter([False] * (n - 1))
    return lambda: next(answers, True)


def test_a_deletion_can_be_given_up_between_its_transactions_and_made_again(store, monkeypatch):
    monkeypatch.setattr(budgets, "deletable", lambda *_: (12, 1 << 40))
    digests = digests_of(range(60))
    put(store, digests)
    with pytest.raises(TurnCancelledError):
        store.delete_many(NAMESPACE, digests, cancel_after(3))
    assert hits_of(store, digests) == set(range(20, 60))
    assert store.delete_many(NAMESPACE, digests, cancel_after(99)) == 40
    assert hits_of(store, digests) == set()


def test_others_may_write_between_the_transactions_of_a_deletion(store, root, monkeypatch):
    monkeypatch.setattr(budgets, "deletable", lambda *_: (12, 1 << 40))
    other, number = open_store(root, "another-hash", lock_timeout_seconds=0.0), iter(range(100, 1000))
    put(store, digests_of(range(60)))
    store.delete_many(NAMESPACE, digests_of(range(60)), lambda: put(other, digests_of([next(number)])).rows != 1)
    assert next(number) > 103


# -- verdicts -------------------------------------------------------------------------------------------------


def test_a_namespace_has_no_verdict_before_it_is_judged(store):
    assert verdict_of(store) is Verdict.UNKNOWN
    put(store, digests_of(range(3)))
    assert store.get_many(NAMESPACE, digests_of([1])).verdict is Verdict.UNKNOWN
    assert verdict_of(store, OTHER_NAMESPACE) is Verdict.UNKNOWN


def test_a_verdict_is_kept_beside_the_rows_for_every_process(store, root):
    put(store, digests_of(range(3)))
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    put(store, digests_of([3]))
    for _ in range(2):
        assert hits_of(store, digests_of(range(4))) == {0, 1, 2, 3}
        assert verdict_of(store) is in_child(verdict_of, store) is Verdict.INDEPENDENT
        assert verdict_of(store, OTHER_NAMESPACE) is Verdict.UNKNOWN
        forget_environments()
        store = open_store(root)


@pytest.mark.parametrize("verdict", [Verdict.INDEPENDENT, Verdict.DEPENDENT])
def test_a_namespace_can_be_judged_before_it_has_rows(store, verdict):
    store.judge(NAMESPACE, verdict)
    assert verdict_of(store) is verdict
    assert (entry_of(store).rows, entry_of(store).nbytes) == (0, 0)
    written = put(store, digests_of(range(3)))
    assert written.rows == (3 if verdict is Verdict.INDEPENDENT else 0)
    assert verdict_of(store) is verdict


@pytest.mark.parametrize("entries", [1, 20, 4096])
@pytest.mark.parametrize("nbytes", [100, 70_000])
def test_rows_that_depend_on_their_batch_are_deleted_and_never_stored(store, monkeypatch, entries, nbytes):
    monkeypatch.setattr(budgets, "deletable", lambda *_: (entries, 1 << 40))
    digests = digests_of(range(30))
    put(store, digests, nbytes=nbytes)
    put(store, digests, namespace=OTHER_NAMESPACE)
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    lookup = store.get_many(NAMESPACE, digests)
    assert (lookup.found, lookup.missing, lookup.corrupt) == ([], list(range(30)), 0)
    assert lookup.verdict is in_child(verdict_of, store) is Verdict.DEPENDENT
    assert (entry_of(store).rows, entry_of(store).nbytes) == (0, 0)
    assert segments_of_open(store) == 1
    written = put(store, digests, nbytes=nbytes)
    assert (written.rows, written.nbytes, dict(written.dropped)) == (0, 0, {"rows_depend_on_batch": 30})
    assert segments_of_open(store) == 1
    assert hits_of(store, digests, OTHER_NAMESPACE) == set(range(30))


def test_rows_of_a_judged_namespace_cost_only_themselves_in_a_commit(store):
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    packed = packed_of(store, digests_of(range(4))) + packed_of(store, digests_of(range(5)), namespace=OTHER_NAMESPACE)
    written = store.put_many(packed + packed)
    assert (written.rows, dict(written.dropped)) == (10, {"rows_depend_on_batch": 8})
    assert hits_of(store, digests_of(range(5)), OTHER_NAMESPACE) == set(range(5))


def test_that_rows_depend_on_their_batch_is_final(store):
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    assert verdict_of(store) is Verdict.DEPENDENT
    with pytest.raises(AssertionError):
        store.judge(NAMESPACE, Verdict.UNKNOWN)
    store.delete_all()
    assert verdict_of(store) is Verdict.UNKNOWN


def test_a_verdict_outlives_the_last_row(store):
    put(store, digests_of(range(3)))
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    assert store.delete_many(NAMESPACE, digests_of(range(3))) == 3
    assert verdict_of(store) is Verdict.INDEPENDENT
    assert (entry_of(store).rows, entry_of(store).nbytes) == (0, 0)


def test_a_verdict_counts_from_its_own_commit_on(store, monkeypatch):
    """A process killed before the rows are deleted: nobody reads them, and the next judge deletes them."""
    put(store, digests_of(range(3)))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Deletion, "delete_segments", die)
        with pytest.raises(KeyboardInterrupt):
            store.judge(NAMESPACE, Verdict.DEPENDENT)
    assert hits_of(store, digests_of(range(3))) == set()
    assert verdict_of(store) is Verdict.DEPENDENT
    assert put(store, digests_of([5])).rows == 0
    assert segments_of_open(store) == 1
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    assert segments_of_open(store) == 0


def test_judging_can_be_given_up_between_its_transactions_and_done_again(store, monkeypatch):
    monkeypatch.setattr(budgets, "deletable", lambda *_: (12, 1 << 40))
    put(store, digests_of(range(60)))
    with pytest.raises(TurnCancelledError):
        store.judge(NAMESPACE, Verdict.DEPENDENT, cancel_after(2))
    assert 0 < entry_of(store).rows < 60
    assert hits_of(store, digests_of(range(60))) == set()
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    assert (entry_of(store).rows, segments_of_open(store)) == (0, 0)


def test_a_verdict_goes_to_the_file_that_another_process_made(store):
    put(store, digests_of(range(10)))
    in_child(delete_and_put, store, digests_of(range(5)))
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    assert in_child(verdict_of, store) is Verdict.INDEPENDENT


def test_a_verdict_that_is_there_is_not_written_again(store):
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    before = (store.path / "data.mdb").read_bytes()
    store.judge(NAMESPACE, Verdict.INDEPENDENT)
    assert (store.path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("more", [[], [0], [5], [-1], [1 << 40], [True], [1.0], [None], [[]], [9, 1]], ids=repr)
def test_an_entry_without_a_verdict_that_this_version_knows_has_none(store, more):
    """Entries of the version before this one, and of later ones."""
    put(store, digests_of(range(5)))
    entry = entry_of(store)
    fields = [entry.number, entry.next_segment, entry.rows, entry.nbytes, entry.created_at, entry.touched_at]
    close_environments()
    with lmdb.open(str(store.path)) as env, env.begin(write=True) as txn:
        txn.put(b"n" + NAMESPACE, msgpack.packb([*fields, *more]))
    assert hits_of(store, digests_of(range(5))) == set(range(5))
    assert verdict_of(store) is Verdict.UNKNOWN
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    assert verdict_of(store) is Verdict.DEPENDENT


def test_a_verdict_is_one_more_field_of_the_entry_and_of_one_byte(store):
    store.judge(NAMESPACE, Verdict.DEPENDENT)
    with store._environment.reading() as txn:
        value = bytes(txn.get(b"n" + NAMESPACE))
    assert len(msgpack.unpackb(value)) == 7
    assert value[-1:] == b"\x02"


# -- turns ----------------------------------------------------------------------------------------------------


def test_a_commit_measures_the_directory_once(store, monkeypatch):
    put(store, digests_of([0]))
    calls = []
    measure = CacheDirectory.measure
    monkeypatch.setattr(CacheDirectory, "measure", lambda self: calls.append(1) or measure(self))
    put(store, digests_of([1]))
    assert len(calls) == 1


# -- what children do -----------------------------------------------------------------------------------------


def delete_and_put(store, digests):
    store.delete_all()
    put(store, digests)


def use_a_damaged_store(root: Path, digests, nbytes: int) -> int:
    """Look up, write and look up; return how many rows were found at first. Only ``StoreError`` may come."""
    forget_environments()
    store = open_store(root)
    found = 0
    for namespace in (NAMESPACE, OTHER_NAMESPACE):
        with contextlib.suppress(StoreError):
            found += len(hits_of(store, digests, namespace))
        with contextlib.suppress(StoreError):
            put(store, digests, nbytes=nbytes, namespace=namespace)
        with contextlib.suppress(StoreError):
            hits_of(store, digests, namespace)
        with contextlib.suppress(StoreError):
            store.delete_many(namespace, digests[::2])
        with contextlib.suppress(StoreError):
            store.judge(namespace, Verdict.DEPENDENT)
        with contextlib.suppress(StoreError):
            hits_of(store, digests, namespace)
    return found


# -- looking inside ---------------------------------------------------------------------------------------------


def look_at_the_file_again(store) -> None:
    """Make the next lookup look whether its file is still the one on disk, as it does once a second."""
    store._environment._checked_at = 0.0


def segments_of(path: Path) -> int:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as txn:
        return sum(key[:1] == b"s" for key, _ in txn.cursor())


def segments_of_open(store) -> int:
    with store._environment.reading() as txn:
        return sum(bytes(key[:1]) == b"s" for key, _ in txn.cursor())


def damage(path: Path, needle: bytes) -> None:
    """Flip a bit in the middle of the one place in a file that has these bytes."""
    data = path.read_bytes()
    assert data.count(needle) >= 1
    at = data.index(needle)
    while at >= 0:
        data = data[: at + 7] + bytes([data[at + 7] ^ 4]) + data[at + 8 :]
        at = data.find(needle, at + 1)
    path.write_bytes(data)


def test_a_closed_store_holds_nothing_open_and_opens_again(root):
    one, other = open_store(root), open_store(root)
    put(one, digests_of(range(10)))

    def is_open():
        return "data.mdb" in Path("/proc/self/maps").read_text()

    assert is_open()
    one.close()
    assert not is_open()
    assert hits_of(other, digests_of(range(10))) == set(range(10))
    put(one, digests_of(range(10, 20)))
    other.close()
    assert not is_open()
    assert hits_of(one, digests_of(range(20))) == set(range(20))


def test_a_store_may_be_closed_while_others_read_and_write(root):
    stores = [open_store(root) for _ in range(3)]
    put(stores[0], digests_of(range(50)))
    stop, wrong = threading.Event(), []

    def read(store):
        while not stop.is_set():
            if hits_of(store, digests_of(range(50))) != set(range(50)):
                wrong.append(1)

    def write(store):
        number = 1000
        while not stop.is_set():
            put(store, digests_of(range(number, number + 5)))
            number += 5

    threads = [threading.Thread(target=read, args=(stores[0],)), threading.Thread(target=write, args=(stores[1],))]
    for thread in threads:
        thread.start()
    for _ in range(200):
        stores[2].close()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
