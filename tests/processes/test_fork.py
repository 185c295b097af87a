"""What a fork means for the writer, the open environment and the rows that are not committed yet."""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import threading
import time

import pytest

from tests.processes.programs import HOLD_FILE_LOCK, Observer, enqueue, queue_hits, store_hits, wait_until
from tests.storage.children import finish, fork, in_child, read_line, start, wait_for
from tests.storage.known_values import NAMESPACE, digest_of, digests_of, hits_of, open_store, put
from torchcache import process
from torchcache.errors import StoreError
from torchcache.storage.commit import Commit
from torchcache.storage.files import FORMAT
from torchcache.storage.writer import writer

LARGE = 100_000


def in_a_process_of_its_own(test):
    """Run a test in a forked child: it may leave writer, queue and hooks in any state."""

    @functools.wraps(test)
    def run(**arguments):
        in_child(lambda: test(**arguments), timeout_seconds=60)

    return run


@in_a_process_of_its_own
def test_a_forked_child_opens_an_environment_of_its_own_and_so_does_the_parent_again(root):
    store = open_store(root)
    put(store, digests_of(range(10)))
    before = store._environment._handles
    inherited = before.env

    def child():
        assert store._environment._handles is None, "the child inherited an open environment"
        assert hits_of(store, digests_of(range(10))) == set(range(10))
        handles = store._environment._handles
        assert handles.env is not inherited
        readers = [line.split()[0] for line in handles.env.readers().splitlines()[1:]]
        assert str(os.getpid()) in readers
        put(store, [digest_of(11)])
        return handles.inode

    assert in_child(child) == before.inode
    assert hits_of(store, digests_of([0, 11])) == {0, 1}
    assert store._environment._handles.env is not inherited
    readers = store._environment._handles.env.readers()
    assert len(readers.splitlines()) == 2, "the child's reader slot is still there"


@in_a_process_of_its_own
def test_no_thread_opens_the_environment_again_between_its_closing_and_the_fork(root):
    """The child would inherit it open, and closing it there would free the reader slots of its parent."""
    store = open_store(root)
    put(store, digests_of(range(10)))
    close, threads = store._environment.at_rest, []

    def close_and_let_a_thread_look():
        close()
        thread = threading.Thread(target=lambda: store_hits(store, range(10)))
        threads.append(thread)
        thread.start()
        thread.join(0.3)

    store._environment.at_rest = close_and_let_a_thread_look

    def child():
        assert store._environment._handles is None
        del store._environment.at_rest
        assert store_hits(store, range(10)) == set(range(10))

    in_child(child)
    threads[0].join(10)
    assert not threads[0].is_alive()
    assert store_hits(store, range(10)) == set(range(10))


@in_a_process_of_its_own
def test_a_lookup_succeeds_however_often_forks_of_other_threads_close_the_environment(root):
    store = open_store(root)
    put(store, digests_of(range(10)))
    ready = store._environment._ready

    def ready_and_closed_by_a_fork():
        handles = ready()
        in_child(lambda: None)
        return handles

    store._environment._ready = ready_and_closed_by_a_fork
    assert store_hits(store, range(10)) == set(range(10))


@in_a_process_of_its_own
def test_nothing_keeps_an_inherited_environment_alive(root):
    """LMDB refuses to open a file twice, so one forgotten reference would cost the child its disk tier."""
    store = open_store(root)
    assert enqueue(store, range(10))
    hits_of(store, digests_of(range(10)))

    def child():
        gc.collect()
        assert store_hits(store, range(10)) == set(range(10))
        put(store, [digest_of(10)])

    writer.flush(10)
    in_child(child)


@in_a_process_of_its_own
def test_what_the_parent_has_not_committed_is_a_hit_in_the_child(root):
    root.mkdir(mode=0o700)
    store = open_store(root, lock_timeout_seconds=30)
    holder = start(HOLD_FILE_LOCK, root)
    assert read_line(holder) == "ready"
    assert enqueue(store, range(100))

    def child():
        assert queue_hits(store, range(-5, 105)) == set(range(100))
        assert writer.queued(store) == (0, 0), "the child would write its parent's rows a second time"

    before = time.monotonic()
    in_child(child)
    assert time.monotonic() - before < 3
    assert queue_hits(store, range(100)) == set(range(100))
    finish(holder)
    assert writer.flush(10)
    assert store_hits(store, range(100)) == set(range(100))


@in_a_process_of_its_own
def test_a_fork_while_the_writer_waits_for_a_lock_of_another_process_is_quick_and_loses_nothing(root):
    root.mkdir(mode=0o700)
    store = open_store(root, lock_timeout_seconds=30)
    holder = start(HOLD_FILE_LOCK, root)
    assert read_line(holder) == "ready"
    observer = Observer()
    assert enqueue(store, range(50), observer=observer)
    wait_until(store._directory._mine.raw.locked)
    before = time.monotonic()
    pid = fork()
    if pid == 0:
        os._exit(0 if enqueue(store, range(50, 60)) and queue_hits(store, range(60)) == set(range(60)) else 1)
    assert time.monotonic() - before < 1
    assert wait_for(pid, 60) == 0
    assert enqueue(store, range(60, 70), observer=observer)
    finish(holder)
    assert writer.flush(10)
    assert store_hits(store, range(70)) >= {*range(50), *range(60, 70)}
    assert (observer.written_rows, observer.faults) == (60, [])


@in_a_process_of_its_own
def test_a_thread_that_waits_for_room_in_the_queue_gets_it_after_a_fork(root):
    """The fork ends the writer's thread, and nobody else calls who would start it again."""
    root.mkdir(mode=0o700)
    store = open_store(root, lock_timeout_seconds=30)
    holder = start(HOLD_FILE_LOCK, root)
    assert read_line(holder) == "ready"
    assert enqueue(store, range(50))
    accepted = []
    thread = threading.Thread(
        target=lambda: accepted.append(enqueue(store, [50], queue_bytes=1000, timeout_seconds=20))
    )
    thread.start()
    wait_until(lambda: len(writer._changed._waiters) == 1)
    in_child(lambda: None)
    finish(holder)
    thread.join(5)
    assert accepted == [True]
    assert writer.flush(10)
    assert store_hits(store, range(51)) == set(range(51))


@in_a_process_of_its_own
def test_a_flush_beside_a_fork_leaves_the_work_to_the_thread_which_the_next_fork_can_park(root):
    store, work, workers = open_store(root), writer._work, []
    writer._work = lambda until: (workers.append(threading.current_thread().name), work(until))
    writer._is_parked = True
    assert enqueue(store, [1])
    thread = threading.Thread(target=lambda: writer.flush(10))
    thread.start()
    wait_until(lambda: workers or writer._changed._waiters)
    writer.after_fork_in_parent()
    thread.join(10)
    assert set(workers) == {"torchcache-writer"}
    assert store_hits(store, [1]) == {1}


@in_a_process_of_its_own
def test_a_fork_in_the_middle_of_a_commit_waits_for_it_and_both_sides_go_on(root):
    store = open_store(root)
    inside, carry_out = threading.Event(), Commit.carry_out

    def slow_carry_out(write):
        inside.set()
        return carry_out(write)

    Commit.carry_out = slow_carry_out
    observer = Observer()
    for number in range(200):
        assert enqueue(store, [number], nbytes=LARGE, observer=observer)
    for round_number in range(5):
        assert inside.wait(10)

        def child(base=1000 + round_number):
            assert not store._environment._is_forsaken
            everything = queue_hits(store, range(200)) | store_hits(store, range(200))
            assert everything == set(range(200))
            assert enqueue(store, [base])
            assert writer.flush(10)
            assert store_hits(store, [base]) == {base}

        in_child(child)
        inside.clear()
        assert enqueue(store, range(200 + 10 * round_number, 210 + 10 * round_number), nbytes=LARGE, observer=observer)
    assert writer.flush(20)
    everything = [*range(250), *range(1000, 1005)]
    assert store_hits(store, everything) == set(everything)
    assert observer.faults == []
    assert observer.written_rows == 250


@in_a_process_of_its_own
def test_the_writer_thread_does_not_live_through_a_fork_and_starts_again(root):
    def writers():
        return {thread for thread in threading.enumerate() if thread.name == "torchcache-writer"}

    store = open_store(root)
    assert enqueue(store, [1])
    before = writers()
    assert len(before) == 1
    assert in_child(lambda: len(writers())) == 0
    # Where something waits it starts again at once, unless Python would warn of it.
    assert not writers() & before
    assert enqueue(store, [2])
    assert writer.flush(10)
    assert store_hits(store, [1, 2]) == {1, 2}


@in_a_process_of_its_own
def test_a_hundred_children_come_and_go_beside_a_committing_writer(root):
    store = open_store(root)
    observer = Observer()
    numbers = iter(range(10**6))
    rng = random.Random(0)
    longest, written = 0.0, []
    for cycle in range(100):
        mine = [next(numbers) for _ in range(20)]
        written += mine
        assert enqueue(store, mine, nbytes=3000, observer=observer)
        own = 10**6 + cycle
        before = time.monotonic()
        pid = fork()
        if pid == 0:
            status = 1
            try:
                asked = rng.sample(written, min(50, len(written)))
                seen = queue_hits(store, asked)
                rest = [number for number in asked if number not in seen]
                assert seen | store_hits(store, rest) == set(asked)
                if cycle % 4 == 0:
                    put(store, [digest_of(own)], nbytes=3000)
                status = 0
            finally:
                os._exit(status)
        longest = max(longest, time.monotonic() - before)
        if cycle % 4 == 0:
            written.append(own)
        assert wait_for(pid, 60) == 0
    assert longest < 2.0
    assert writer.flush(20)
    assert store_hits(store, written) == set(written)
    assert observer.faults == []


@in_a_process_of_its_own
def test_forks_while_threads_read_and_write(root):
    store = open_store(root)
    put(store, digests_of(range(100)), nbytes=3000)
    failures, is_over = [], threading.Event()

    def read():
        try:
            while not is_over.is_set():
                assert hits_of(store, digests_of(range(100))) == set(range(100))
        except Exception as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(30):
            assert enqueue(store, range(1000 + 10 * i, 1010 + 10 * i), nbytes=3000)
            before = time.monotonic()
            in_child(lambda: store_hits(store, range(100)))
            assert time.monotonic() - before < 5
    finally:
        is_over.set()
        for thread in threads:
            thread.join(20)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


@in_a_process_of_its_own
def test_a_child_of_a_fork_that_did_not_come_to_rest_goes_on_without_the_disk(root):
    """A thread is inside a transaction and stays there: the child must not touch what it inherited."""
    process.FORK_DRAIN_SECONDS = 0.3
    store = open_store(root)
    put(store, digests_of(range(10)))
    inside, leave, seen = threading.Event(), threading.Event(), []

    def stay_inside():
        with store._environment.reading() as txn:
            inside.set()
            leave.wait(20)
            seen.append(txn.get(b"a format"))

    thread = threading.Thread(target=stay_inside)
    thread.start()
    assert inside.wait(10)

    def child():
        before = time.monotonic()
        for operation in (
            lambda: store.get_many(NAMESPACE, digests_of([1])),
            lambda: put(store, digests_of([50])),
            lambda: store.touch(NAMESPACE),
        ):
            with pytest.raises(StoreError) as caught:
                operation()
            assert caught.value.kind == "fork"
        assert time.monotonic() - before < 3
        other = open_store(root, "another-hash")
        put(other, digests_of([1]))
        assert hits_of(other, digests_of([1])) == {0}

    before = time.monotonic()
    in_child(child)
    assert time.monotonic() - before < 6
    leave.set()
    thread.join(10)
    assert bytes(seen[0]) == FORMAT
    put(store, digests_of([60]))
    assert hits_of(store, digests_of([*range(10), 60])) == set(range(11))


@in_a_process_of_its_own
def test_children_may_fork_and_fork_from_threads(root):
    store = open_store(root)
    assert enqueue(store, range(20))

    def child(depth):
        everything = queue_hits(store, range(20)) | store_hits(store, range(20))
        assert everything == set(range(20))
        assert enqueue(store, [100 + depth])
        if depth:
            in_child(child, depth - 1)
        assert writer.flush(10)
        assert store_hits(store, [100 + depth]) == {100 + depth}

    failures = []

    def fork_in_a_thread():
        try:
            in_child(child, 2)
        except Exception as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    thread = threading.Thread(target=fork_in_a_thread)
    thread.start()
    thread.join(30)
    assert failures == []
    in_child(child, 3)
    assert writer.flush(10)
    assert store_hits(store, [*range(20), 100, 101, 102, 103]) == {*range(20), 100, 101, 102, 103}


@in_a_process_of_its_own
def test_a_child_killed_inside_a_read_does_not_pin_pages_for_ever(root):
    """Its reader slot would keep every page that is overwritten for as long as anybody has the file open."""
    store = open_store(root)
    put(store, [digest_of(0)])
    reader, ready = os.pipe()
    pid = fork()
    if pid == 0:
        with store._environment.reading():
            os.write(ready, b"x")
            while True:
                os.sched_yield()
    os.read(reader, 1)
    hits_of(store, [digest_of(0)])  # open here too, so that the table outlives the child
    assert str(pid) in store._environment._handles.env.readers()
    os.kill(pid, 9)
    wait_for(pid, 5)
    put(store, [digest_of(1)])
    assert str(pid) not in store._environment._handles.env.readers()


@in_a_process_of_its_own
def test_locks_held_by_another_thread_at_the_fork_are_free_in_the_child(root):
    process.FORK_LOCK_SECONDS = 0.2
    broken = []
    lock = process.ForkLock(on_broken=lambda: broken.append(os.getpid()))
    held, leave = threading.Event(), threading.Event()

    def hold():
        with lock.raw:
            held.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(5)

    def child():
        assert broken == [os.getpid()]
        assert lock.raw.acquire(timeout=0)

    in_child(child)
    leave.set()
    thread.join(5)
    assert lock.raw.acquire(timeout=0)
    assert broken == []


@in_a_process_of_its_own
def test_threads_that_fork_at_the_same_moment_all_succeed(root):
    """From Python 3.12 on, filelock alone makes all but one of them raise RuntimeError."""
    store = open_store(root)
    observer = Observer()
    assert enqueue(store, range(20), observer=observer)
    failures = []
    start_together = threading.Barrier(4)

    def fork_again_and_again():
        try:
            for _ in range(25):
                start_together.wait(20)
                assert in_child(lambda: len(queue_hits(store, range(20)) | store_hits(store, range(20)))) == 20
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)
            start_together.abort()

    threads = [threading.Thread(target=fork_again_and_again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert failures == []
    assert writer.flush(10)
    assert store_hits(store, range(20)) == set(range(20))
    assert observer.faults == []


@in_a_process_of_its_own
def test_forks_of_the_main_thread_beside_others_interrupt_nobody(root):
    """The main thread holds signals while it waits for its turn, and nobody else may let them go."""
    store = open_store(root)
    put(store, digests_of(range(10)))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("a signal that nobody sent"))
    handlers[1] = signal.getsignal(signal.SIGTERM)
    is_over, failures = threading.Event(), []

    def fork_again_and_again():
        try:
            while not is_over.is_set():
                in_child(lambda: None)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=fork_again_and_again) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            assert in_child(lambda: store_hits(store, range(10))) == set(range(10))
    finally:
        is_over.set()
        for thread in threads:
            thread.join(20)
    assert failures == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == handlers


@in_a_process_of_its_own
def test_a_forward_may_fork_and_both_sides_go_on(root):
    import torch

    import torchcache

    torch.set_num_threads(1)  # a parallel operation hangs in a forked child

    def forked(x):
        """Compute in a child, as a forward that uses a process pool does; the child calls cached code as well."""
        values = in_child(lambda: (x * other(x)).tolist())  # noqa: PLW0108 - called in the child
        return torch.tensor(values)

    @torchcache.torchcache(persistent=True, persistent_cache_dir=root)
    def other(x):
        return x + 1

    caching = torchcache.torchcache(persistent=True, persistent_cache_dir=root, max_memory_cache_size=0)(forked)
    x = torch.arange(12.0).reshape(6, 2)
    for rows in (x[:2], x[1:4], x, x):
        assert torch.equal(caching(rows), rows * (rows + 1))
        assert torchcache.flush_all()
    stats = torchcache.cache_of(caching).stats()
    assert (stats.misses, dict(stats.faults)) == (6, {})
    assert stats.store_hits > 0
