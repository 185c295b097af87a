"""The queue in front of the stores and the thread behind it."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.storage.fakes import FakeStore, Observer
from tests.storage.known_values import NAMESPACE, check, digest_of, digests_of, hits_of, open_store, rows_of, value_of
from torchcache.errors import StoreError
from torchcache.layout import Layout, Leaf, Rows
from torchcache.storage import writer as writer_module
from torchcache.storage.contract import Lookup, Verdict
from torchcache.storage.directory import TurnCancelledError
from torchcache.storage.writer import Writer

OTHER_NAMESPACE = b"another one.....".ljust(16)


@pytest.fixture
def writer(monkeypatch):
    """A writer of the test's own; its thread has ended when the test has."""
    monkeypatch.setattr(writer_module, "_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(writer_module.exits, "at_exit", lambda *a, **k: None)
    writer = Writer()
    yield writer
    thread = writer._thread
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def store():
    store = FakeStore()
    yield store
    store.let_through.set()


@pytest.fixture
def observer():
    return Observer()


def offer(writer, store, observer, numbers, *, nbytes=100, namespace=NAMESPACE, queue_bytes=10_000, timeout=0.1):
    rows = rows_of(digests_of(numbers), nbytes, namespace)
    return writer.put(
        store, observer, namespace, rows, queue_bytes=queue_bytes, timeout_seconds=timeout, flush_seconds=5.0
    )


def queue_hits(writer, store, digests, namespace=NAMESPACE):
    return check(Lookup(*writer.get_many(store, namespace, digests)), digests, namespace)


def wait_until(claim, timeout_seconds=10.0):
    deadline = time.monotonic() + timeout_seconds
    while not claim():
        assert time.monotonic() < deadline, "it did not come to that in time"
        os.sched_yield()


# -- the queue ------------------------------------------------------------------------------------------------------


def test_what_is_accepted_is_a_hit_until_it_is_committed(writer, store, observer):
    digests = digests_of(range(10))
    assert offer(writer, store, observer, range(5))
    assert store.entered.wait(10)  # the first rows are under way, the others wait
    assert offer(writer, store, observer, range(5, 10))
    assert queue_hits(writer, store, [*digests, digest_of(99)]) == set(range(10))
    assert writer.queued(store) == (10, 1000)
    store.let_through.set()
    assert writer.flush(10)
    assert queue_hits(writer, store, digests) == set()
    assert writer.queued(store) == (0, 0)
    assert store.written == set(digests)
    assert observer.written == 10


def test_what_the_queue_gives_belongs_to_the_caller(writer, store, observer):
    assert offer(writer, store, observer, range(5))
    found, _ = writer.get_many(store, NAMESPACE, digests_of(range(5)))
    for item in found:
        item.data[:] = 0
    assert queue_hits(writer, store, digests_of(range(5))) == set(range(5))


def test_queued_rows_of_another_namespace_or_store_are_no_hits(writer, store, observer):
    assert offer(writer, store, observer, range(5))
    assert queue_hits(writer, store, digests_of(range(5)), OTHER_NAMESPACE) == set()
    assert queue_hits(writer, FakeStore(), digests_of(range(5))) == set()


def test_a_sample_that_is_queued_twice_is_a_hit_until_both_are_committed(writer, store, observer):
    assert offer(writer, store, observer, [1, 2])
    assert store.entered.wait(10)
    assert offer(writer, store, observer, [2, 3])
    assert queue_hits(writer, store, digests_of([1, 2, 3])) == {0, 1, 2}
    store.let_through.set()
    assert writer.flush(10)
    assert queue_hits(writer, store, digests_of([1, 2, 3])) == set()
    assert writer._pending == {}
    assert writer._bytes == 0


def test_a_full_queue_waits_its_time_and_then_refuses(writer, store, observer):
    assert offer(writer, store, observer, range(50), queue_bytes=10_000)
    assert offer(writer, store, observer, range(50, 100), queue_bytes=10_000)
    before = time.monotonic()
    assert not offer(writer, store, observer, [100], queue_bytes=10_000, timeout=0.2)
    assert 0.2 <= time.monotonic() - before < 1.0
    assert queue_hits(writer, store, digests_of([99, 100])) == {0}
    assert writer.queued(store) == (100, 10_000)


def test_a_full_queue_accepts_as_soon_as_there_is_room(writer, store, observer):
    assert offer(writer, store, observer, range(100))
    assert store.entered.wait(10)
    accepted = []
    thread = threading.Thread(
        target=lambda: accepted.append(offer(writer, store, observer, range(100, 150), timeout=10.0))
    )
    thread.start()
    store.let_through.set()
    thread.join(10)
    assert accepted == [True]
    assert writer.flush(10)
    assert observer.written == 150


def test_the_queue_never_holds_more_than_its_bound_from_many_threads(writer, store, observer):
    most, refused, is_over = [0], [0], threading.Event()

    def call(first):
        for i in range(first, first + 200, 5):
            if not offer(writer, store, observer, range(i, i + 5), queue_bytes=3000, timeout=0.01):
                refused[0] += 5

    def sample():
        while not is_over.is_set():
            most[0] = max(most[0], writer._bytes)

    store.let_through.set()
    threads = [threading.Thread(target=call, args=(1000 * i,)) for i in range(8)]
    sampler = threading.Thread(target=sample)
    sampler.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert writer.flush(10)
    is_over.set()
    sampler.join(10)
    assert 0 < most[0] <= 3000
    assert observer.written + refused[0] == 1600
    assert (writer._bytes, writer._pending) == (0, {})


def test_rows_larger_than_the_queue_are_accepted_when_it_is_empty(writer, store, observer):
    assert offer(writer, store, observer, [1], nbytes=50_000)
    assert not offer(writer, store, observer, [2], nbytes=50_000, timeout=0.05)
    store.let_through.set()
    assert offer(writer, store, observer, [3], nbytes=50_000, timeout=10.0)
    assert writer.flush(10)
    assert store.written == set(digests_of([1, 3]))


def test_rows_without_bytes_go_through_the_queue_too(writer, store, observer):
    store.let_through.set()
    assert offer(writer, store, observer, range(10), nbytes=0)
    assert writer.flush(10)
    assert observer.written == 10


# -- commits --------------------------------------------------------------------------------------------------------


def test_what_waits_is_committed_together_within_the_bound_of_a_commit(writer, store, observer):
    store.most_commit_bytes = 1000
    assert offer(writer, store, observer, [0])
    assert store.entered.wait(10)
    for i in range(1, 61):
        assert offer(writer, store, observer, [i])
    store.let_through.set()
    assert writer.flush(10)
    sizes = [sum(sum(map(len, item.records)) for item in commit) for commit in store.commits]
    assert max(sizes) == 1000
    assert len(sizes) <= 8
    assert store.written == set(digests_of(range(61)))


def test_a_large_batch_is_cut_into_commits(writer, store, observer):
    store.most_commit_bytes = 1000
    store.let_through.set()
    assert offer(writer, store, observer, range(95))
    assert writer.flush(10)
    assert [sum(sum(map(len, item.records)) for item in commit) for commit in store.commits] == [1000] * 9 + [500]
    assert store.written == set(digests_of(range(95)))


def test_one_row_larger_than_a_commit_is_a_commit(writer, store, observer):
    store.most_commit_bytes = 1000
    store.let_through.set()
    assert offer(writer, store, observer, [1], nbytes=5000)
    assert writer.flush(10)
    assert store.written == {digest_of(1)}


def test_each_store_gets_its_own_rows(writer, store, observer):
    other, other_observer = FakeStore(), Observer()
    for i in range(20):
        assert offer(writer, (store, other)[i % 2], (observer, other_observer)[i % 2], [i])
    store.let_through.set()
    other.let_through.set()
    assert writer.flush(10)
    assert store.written == set(digests_of(range(0, 20, 2)))
    assert other.written == set(digests_of(range(1, 20, 2)))
    assert (observer.written, other_observer.written) == (10, 10)


def test_marks_of_use_are_passed_on(writer, store, observer):
    writer.do(store, observer, functools.partial(store.touch, NAMESPACE))
    assert writer.flush(10)
    assert store.touched == [NAMESPACE]


ERRORS = {
    "a fault": lambda: StoreError("a fault", kind="disk"),
    "no space": lambda: OSError(28, "No space left on device"),
    "no memory": MemoryError,
    "unexpected": lambda: RuntimeError("unexpected"),
    "an assertion": AssertionError,
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "recursion": RecursionError,
}
EXITS = {"exit": SystemExit, "interrupt": KeyboardInterrupt, "generator exit": GeneratorExit}


# -- tasks ----------------------------------------------------------------------------------------------------------


def test_a_task_keeps_its_place_among_the_rows(writer, store, observer):
    seen = []
    store.let_through.set()
    assert offer(writer, store, observer, [0])
    assert store.entered.wait(10)
    for i in range(1, 4):
        assert offer(writer, store, observer, [2 * i - 1])
        assert offer(writer, store, observer, [2 * i])
        assert writer.do(store, observer, lambda cancel: seen.append((cancel(), set(store.written))))
    assert offer(writer, store, observer, [7])
    assert writer.flush(10)
    assert seen == [(False, set(digests_of(range(2 * i + 1)))) for i in range(1, 4)]
    assert store.written == set(digests_of(range(8)))


def test_a_task_of_a_store_waits_for_those_of_others_before_it(writer, store, observer):
    other, seen = FakeStore(), []
    assert offer(writer, store, observer, [1])
    assert writer.do(other, observer, lambda _: seen.append(set(store.written)))
    assert not writer.flush(0.05, other)
    store.let_through.set()
    assert writer.flush(10, other)
    assert seen == [{digest_of(1)}]


@pytest.mark.parametrize("error", [*ERRORS, *EXITS])
def test_a_task_that_raises_costs_nobody_else(writer, store, observer, error):
    def fail(cancel):
        raised = {**ERRORS, **EXITS}[error]()
        raise raised

    store.let_through.set()
    assert writer.do(store, observer, fail)
    assert offer(writer, store, observer, range(3))
    assert writer.flush(10)
    assert [rows for _, rows in observer.faults] == [0]
    assert store.written == set(digests_of(range(3)))
    assert (writer._bytes, writer._tasks, writer._pending) == (0, 0, {})


def test_a_task_that_is_given_up_for_a_fork_is_run_again_in_its_place(writer, store, observer):
    begun, seen = threading.Event(), []

    def wait_for_the_fork(cancel):
        seen.append(set(store.written))
        begun.set()
        while not cancel():
            if len(seen) > 1:
                return
            os.sched_yield()
        raise TurnCancelledError

    store.let_through.set()
    assert writer.do(store, observer, wait_for_the_fork)
    assert offer(writer, store, observer, range(5))
    assert begun.wait(10)
    assert writer.before_fork(time.monotonic() + 10)
    assert [job.n for job in writer._waiting] == [0, 5]
    writer.after_fork_in_parent()
    assert writer.flush(10)
    assert seen == [set(), set()]
    assert store.written == set(digests_of(range(5)))
    assert (writer._tasks, observer.faults) == (0, [])


def test_tasks_are_the_parents_after_a_fork(writer, store, observer):
    assert offer(writer, store, observer, [1])
    assert store.entered.wait(10)
    assert writer.do(store, observer, lambda _: None)
    with ThreadPoolExecutor(1) as pool:
        fork = pool.submit(writer.before_fork, time.monotonic() + 10)
        with writer._mutex:
            assert writer._changed.wait_for(lambda: writer._is_parked, timeout=10)
        store.let_through.set()  # not before: the thread could go on with the task
        assert fork.result(10)
    assert writer._tasks == 1
    writer.after_fork_in_child()
    assert (writer._tasks, len(writer._waiting)) == (0, 0)


def test_no_more_tasks_wait_than_their_bound(writer, store, observer, monkeypatch):
    monkeypatch.setattr(writer_module, "_MOST_TASKS", 5)
    done = []
    assert offer(writer, store, observer, [1])
    assert store.entered.wait(10)
    accepted = [writer.do(store, observer, lambda _: done.append(1)) for _ in range(8)]
    assert accepted == [True] * 5 + [False] * 3
    assert writer._tasks == 5
    store.let_through.set()
    assert writer.flush(10)
    assert len(done) == 5
    assert writer.do(store, observer, lambda _: done.append(1))
    assert writer.flush(10)
    assert len(done) == 6


def test_the_end_of_the_program_waits_for_tasks_as_long_as_they_ask(writer, store, observer):
    done = []
    assert writer.do(store, observer, lambda _: done.append(1), flush_seconds=5.0)
    writer.end()
    assert done == [1]
    assert not writer.do(store, observer, lambda _: done.append(1))


def test_tasks_lost_at_the_end_are_no_rows(writer, store, observer, caplog):
    rows = rows_of(digests_of([1]))
    assert writer.put(store, observer, NAMESPACE, rows, queue_bytes=10_000, timeout_seconds=0.1, flush_seconds=0.2)
    assert store.entered.wait(10)
    assert writer.do(store, observer, lambda _: None, flush_seconds=0.0)
    writer.end()
    assert [record.getMessage()[:6] for record in caplog.records] == ["1 rows"]
    assert writer._tasks == 0
    store.let_through.set()


# -- rows that turned out wrong -------------------------------------------------------------------------------------


def test_rows_that_are_forgotten_are_no_hits_though_they_may_be_committed(writer, store, observer):
    assert offer(writer, store, observer, range(5))
    assert offer(writer, store, observer, range(5), namespace=OTHER_NAMESPACE)
    assert store.entered.wait(10)
    assert offer(writer, store, observer, range(5, 10))
    writer.forget(store, NAMESPACE, digests_of([1, 7, 99]))
    assert queue_hits(writer, store, digests_of(range(10))) == set(range(10)) - {1, 7}
    writer.forget(FakeStore(), NAMESPACE)
    assert queue_hits(writer, store, digests_of(range(10))) == set(range(10)) - {1, 7}
    writer.forget(store, NAMESPACE)
    assert queue_hits(writer, store, digests_of(range(10))) == set()
    assert queue_hits(writer, store, digests_of(range(5)), OTHER_NAMESPACE) == set(range(5))
    assert writer.queued(store) == (15, 1500)
    assert offer(writer, store, observer, [1])
    assert queue_hits(writer, store, digests_of(range(10))) == {1}
    store.let_through.set()
    assert writer.flush(10)
    assert (writer._bytes, writer._pending) == (0, {})
    assert store.written == set(digests_of(range(10)))


def test_a_row_that_took_the_place_of_a_forgotten_one_stays_a_hit(writer, store, observer):
    assert offer(writer, store, observer, [1])
    assert store.entered.wait(10)
    writer.forget(store, NAMESPACE, digests_of([1]))
    rows = rows_of(digests_of([1]), 300)
    assert writer.put(store, observer, NAMESPACE, rows, queue_bytes=10_000, timeout_seconds=0.1, flush_seconds=5.0)
    store.entered.clear()
    store.let_through.set()
    assert store.entered.wait(10)
    found, _ = writer.get_many(store, NAMESPACE, digests_of([1]))
    assert all(item.layout.nbytes == 300 for item in found)
    assert writer.flush(10)


def test_the_queue_says_what_it_has(writer, store, observer):
    assert writer.has_many(store, NAMESPACE, digests_of(range(3))) == [False] * 3
    assert offer(writer, store, observer, [1, 2])
    assert writer.has_many(store, NAMESPACE, digests_of([2, 0, 1, 2])) == [True, False, True, True]
    assert writer.has_many(store, OTHER_NAMESPACE, digests_of([1])) == [False]
    assert writer.has_many(FakeStore(), NAMESPACE, digests_of([1])) == [False]
    assert writer.has_many(store, NAMESPACE, []) == []


def test_wrong_rows_that_are_queued_are_gone_when_the_task_behind_them_is_done(writer, root, observer):
    store = open_store(root)
    assert offer(writer, store, observer, range(10))
    assert offer(writer, store, observer, range(10), namespace=OTHER_NAMESPACE)
    writer.forget(store, NAMESPACE, digests_of([3]))
    assert writer.do(store, observer, functools.partial(store.delete_many, NAMESPACE, digests_of([3])))
    right = rows_of(digests_of([3]), 400)
    assert writer.put(store, observer, NAMESPACE, right, queue_bytes=10_000, timeout_seconds=1, flush_seconds=5.0)
    assert writer.do(store, observer, functools.partial(store.judge, OTHER_NAMESPACE, Verdict.DEPENDENT))
    assert writer.flush(10)
    found = store.get_many(NAMESPACE, digests_of(range(10))).found
    assert {item.layout.nbytes: list(item.positions) for item in found} == {100: [0, 1, 2, *range(4, 10)], 400: [3]}
    assert store.get_many(OTHER_NAMESPACE, digests_of(range(10))).verdict is Verdict.DEPENDENT
    assert observer.faults == []


def test_rows_that_replace_others_are_what_the_queue_answers_and_reach_a_store_that_is_full(writer, store, observer):
    assert offer(writer, store, observer, range(3))
    assert store.entered.wait(10)
    store.short = "budget"
    rows = rows_of(digests_of([1]), 400)
    assert writer.put(
        store, observer, NAMESPACE, rows, queue_bytes=10_000, timeout_seconds=1, flush_seconds=5.0, replaces=True
    )
    found, _ = writer.get_many(store, NAMESPACE, digests_of(range(3)))
    assert {item.layout.nbytes: item.positions for item in found} == {100: [0, 2], 400: [1]}
    store.let_through.set()
    assert writer.flush(10)
    assert [list(item.replaces) for commit in store.commits for item in commit] == [[], digests_of([1])]


# -- faults and refusals --------------------------------------------------------------------------------------------


def structured_rows(numbers, structure):
    layout = Layout((Leaf("uint8", "uint8", (10,)),), structure)
    return Rows(digests_of(numbers), layout, np.zeros((len(numbers), 10), np.uint8))


def test_the_structure_of_a_value_counts_in_a_commit_too(writer, store, observer):
    """It is in every record, and a queue of small rows could make very large commits."""
    store.most_commit_bytes = 10_000
    for some in (range(1), range(1, 60), range(60, 61), range(61, 120)):
        rows = structured_rows(some, bytes(2000))
        assert writer.put(store, observer, NAMESPACE, rows, queue_bytes=10_000, timeout_seconds=1, flush_seconds=5)
        assert store.entered.wait(10)
    store.let_through.set()
    assert writer.flush(10)
    assert max(sum(len(item.digests) for item in commit) for commit in store.commits) <= 4
    assert store.written == set(digests_of(range(120)))


@pytest.mark.parametrize("n", [1, 10_000])
def test_rows_that_no_record_can_hold_are_counted_and_cost_nobody_else(writer, root, observer, n):
    store = open_store(root)
    rows = structured_rows(range(n), bytes(100_000))
    assert writer.put(store, observer, NAMESPACE, rows, queue_bytes=10_000, timeout_seconds=1, flush_seconds=5)
    assert offer(writer, store, observer, range(n, n + 5), timeout=10.0)
    assert writer.flush(20)
    assert (observer.written, observer.dropped, observer.faults) == (5, {"too_large_to_describe": n}, [])
    assert hits_of(store, digests_of(range(n + 5))) == set(range(n, n + 5))


@pytest.mark.parametrize("short", ["budget", "min_free_disk"])
def test_a_full_store_is_not_packed_for(writer, store, observer, short):
    store.short = short
    assert offer(writer, store, observer, range(7))
    assert writer.flush(10)
    assert (store.commits, observer.dropped) == ([], {short: 7})


@pytest.mark.parametrize(
    ("error", "where"),
    [(error, where) for error in ERRORS for where in ("put_many", "pack", "shortage")]
    + [(error, "put_many") for error in EXITS],
)
def test_a_store_that_raises_costs_only_its_rows(writer, store, observer, error, where):
    good, good_observer = FakeStore(), Observer()
    good.let_through.set()
    store.errors, store.fails_in = [{**ERRORS, **EXITS}[error]()], where
    assert offer(writer, store, observer, range(5))
    assert offer(writer, good, good_observer, range(5))
    store.let_through.set()
    assert writer.flush(5)
    assert offer(writer, store, observer, range(5, 10))
    assert writer.flush(5)
    assert store.written == set(digests_of(range(5, 10)))
    assert good.written == set(digests_of(range(5)))
    assert observer.faulted_rows == 5
    assert (writer._bytes, writer._pending) == (0, {})
    assert queue_hits(writer, store, digests_of(range(10))) == set()


def test_every_accepted_row_is_counted_once_when_a_later_commit_of_a_batch_fails(writer, store, observer):
    store.most_commit_bytes = 1000
    store.let_through.set()
    store.fails_in = "nowhere"
    put_many, failing = store.put_many, StoreError("a fault", kind="disk")

    def fail_third(packed, cancel=None):
        if len(store.commits) == 2:
            raise failing
        return put_many(packed, cancel)

    store.put_many = fail_third
    assert offer(writer, store, observer, range(50))
    assert writer.flush(10)
    assert observer.written == len(store.written)
    assert observer.written + observer.faulted_rows == 50


def test_an_observer_that_raises_costs_nobody_else(writer, store, observer, caplog):
    class Broken(Observer):
        def on_written(self, *_):
            raise RuntimeError("a broken observer")

        on_fault = on_written

    good = FakeStore()
    good.let_through.set()
    store.let_through.set()
    assert offer(writer, store, Broken(), range(5))
    assert offer(writer, good, observer, range(5))
    assert writer.flush(5)
    assert good.written == set(digests_of(range(5)))
    assert (writer._bytes, writer._pending) == (0, {})


# -- the thread -----------------------------------------------------------------------------------------------------


def test_the_thread_ends_when_it_is_idle_and_starts_again(writer, store, observer):
    store.let_through.set()
    assert writer._thread is None
    for i in range(3):
        assert offer(writer, store, observer, [i])
        assert writer.flush(10)
        thread = writer._thread
        if thread is not None:
            assert thread.daemon
            thread.join(10)
            assert not thread.is_alive()
        wait_until(lambda: writer._thread is None)
    assert store.written == set(digests_of(range(3)))


def test_rows_that_come_as_the_thread_ends_are_not_forgotten(writer, store, observer, monkeypatch):
    monkeypatch.setattr(writer_module, "_IDLE_SECONDS", 0.0)
    store.let_through.set()
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for i in range(300):
            assert offer(writer, store, observer, [i])
            wait_until(lambda i=i: len(store.commits) == i + 1)
    finally:
        sys.setswitchinterval(old)
    assert store.written == set(digests_of(range(300)))


def test_rows_that_come_when_the_thread_has_decided_to_end_get_another(writer, store, observer, monkeypatch):
    """The one instant that the race above may not hit."""
    late, work = [], writer._work

    def end_late(until):
        work(until)
        if not late:
            late.append(offer(writer, store, observer, [2]))

    monkeypatch.setattr(writer, "_work", end_late)
    store.let_through.set()
    assert offer(writer, store, observer, [1])
    wait_until(lambda: store.written == set(digests_of([1, 2])))
    assert late == [True]


def test_without_a_thread_flush_does_the_work(writer, store, observer, monkeypatch):
    """No thread can be started while the interpreter ends."""

    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    store.let_through.set()
    assert offer(writer, store, observer, range(5))
    assert writer.flush(5)
    assert store.written == set(digests_of(range(5)))


# -- flush and end --------------------------------------------------------------------------------------------------


def test_flush_is_bounded_and_says_whether_it_was_reached(writer, store, observer):
    assert offer(writer, store, observer, range(5))
    before = time.monotonic()
    assert not writer.flush(0.2)
    assert 0.2 <= time.monotonic() - before < 1.5
    store.let_through.set()
    assert writer.flush(10)
    assert writer.flush(0)


def test_flush_of_one_store_does_not_wait_for_another(writer, store, observer):
    good = FakeStore()
    good.let_through.set()
    assert offer(writer, good, observer, range(5))
    assert writer.flush(10, good)
    assert offer(writer, store, observer, range(5))
    assert store.entered.wait(10)
    assert writer.flush(0.1, good)
    assert not writer.flush(0.1, store)


def test_flush_does_not_wait_for_rows_that_come_after_it(writer, store, observer):
    store.let_through.set()
    is_over = threading.Event()

    def go_on():
        i = 0
        while not is_over.is_set():
            offer(writer, store, observer, [i], queue_bytes=1_000_000)
            i += 1

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(20):
            assert writer.flush(5)
    finally:
        is_over.set()
        thread.join(10)
    assert writer.flush(10)


def test_end_commits_what_was_accepted_and_accepts_no_more(writer, store, observer, caplog):
    store.let_through.set()
    assert offer(writer, store, observer, range(50))
    with caplog.at_level(logging.INFO, logger="torchcache"):
        writer.end()
    assert store.written == set(digests_of(range(50)))
    before = time.monotonic()
    assert not offer(writer, store, observer, [99], timeout=5.0)
    assert time.monotonic() - before < 1
    assert caplog.records == []


def test_end_says_how_many_rows_were_lost(writer, store, observer, caplog):
    rows = rows_of(digests_of(range(30)))
    assert writer.put(store, observer, NAMESPACE, rows, queue_bytes=10_000, timeout_seconds=0.1, flush_seconds=0.2)
    assert store.entered.wait(10)
    more = rows_of(digests_of(range(30, 40)))
    assert writer.put(store, observer, NAMESPACE, more, queue_bytes=10_000, timeout_seconds=0.1, flush_seconds=0.1)
    before = time.monotonic()
    with caplog.at_level(logging.INFO, logger="torchcache"):
        writer.end()
    assert time.monotonic() - before < 1.5
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("40 rows were not committed within flush_timeout_seconds=0.2")
    store.let_through.set()


def test_a_caller_that_waits_for_room_is_let_go_at_the_end(writer, store, observer):
    rows = rows_of(digests_of(range(100)))
    assert writer.put(store, observer, NAMESPACE, rows, queue_bytes=10_000, timeout_seconds=1, flush_seconds=0.1)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(offer(writer, store, observer, [200], timeout=20.0)))
    thread.start()
    writer.end()
    thread.join(5)
    assert answers == [False]


def test_the_writer_fills_a_real_store(writer, root, observer):
    store = open_store(root, max_persistent_cache_size=50_000_000)
    for i in range(0, 500, 10):
        assert offer(writer, store, observer, range(i, i + 10), nbytes=3000, queue_bytes=100_000, timeout=10.0)
    assert writer.flush(20)
    assert hits_of(store, digests_of(range(500))) == set(range(500))
    assert (observer.written, observer.faults) == (500, [])


def test_rows_are_not_copied_on_their_way_into_the_queue(writer, store, observer):
    """Tiers keep rows without copying, so nobody may write into them; the queue holds the same memory."""
    rows = rows_of(digests_of(range(3)))
    assert writer.put(store, observer, NAMESPACE, rows, queue_bytes=10_000, timeout_seconds=1, flush_seconds=1)
    assert any(np.shares_memory(pending.data, rows.data) for pending, _ in writer._pending.values())
    assert rows.data[0].tobytes() == value_of(NAMESPACE, digest_of(0), 100)
