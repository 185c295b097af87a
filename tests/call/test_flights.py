"""Two threads that miss one sample at the same time compute it once."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from torchcache import cache_of, torchcache
from torchcache.call import flights

WAIT_SECONDS = 30


class Slow:
    """A function whose calls wait until the test lets them go on."""

    def __init__(self, **options):
        self.started = threading.Semaphore(0)
        self.may_end = threading.Event()
        self.rows = []
        slow = self

        def forward(x):
            slow.rows.append(x[:, 0].tolist())
            slow.started.release()
            assert slow.may_end.wait(WAIT_SECONDS)
            return x * 2

        # The object holds events: it is no part of what the function computes.
        self.function = torchcache(persistent_module_hash="slow", check_rows=False, **options)(forward)

    def stats(self):
        return cache_of(self.function).stats()


def rows(*numbers):
    return torch.tensor([[float(n), 1.0] for n in numbers])


def until_waiting(slow):
    """Wait until a second call found its rows under way."""
    own_flights = cache_of(slow.function)._core.caller.joining.flights
    original = own_flights.claim
    seen = threading.Event()

    def claim(*args, **kwargs):
        result = original(*args, **kwargs)
        if result:
            seen.set()
        return result

    own_flights.claim = claim
    return seen


@pytest.mark.parametrize("memory", [0, 1e6])
def test_a_sample_that_another_thread_computes_is_waited_for(memory):
    slow = Slow(max_memory_cache_size=memory)
    waiting = until_waiting(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow.function, rows(1, 2, 3))
        assert slow.started.acquire(timeout=WAIT_SECONDS)
        second = pool.submit(slow.function, rows(2, 3, 4))
        assert slow.started.acquire(timeout=WAIT_SECONDS)  # its own row only
        assert waiting.is_set()
        slow.may_end.set()
        assert torch.equal(first.result(WAIT_SECONDS), rows(1, 2, 3) * 2)
        assert torch.equal(second.result(WAIT_SECONDS), rows(2, 3, 4) * 2)
    assert slow.rows == [[1, 2, 3], [4]]
    assert (slow.stats().misses, slow.stats().shared_rows) == (4, 2)


def test_what_is_shared_belongs_to_each_caller():
    slow = Slow(max_memory_cache_size=0)
    waiting = until_waiting(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow.function, rows(1))
        assert slow.started.acquire(timeout=WAIT_SECONDS)
        second = pool.submit(slow.function, rows(1))
        assert waiting.wait(WAIT_SECONDS)
        slow.may_end.set()
        first.result(WAIT_SECONDS).zero_()
        assert torch.equal(second.result(WAIT_SECONDS), rows(1) * 2)


def test_when_the_other_thread_fails_the_sample_is_computed_here():
    started, may_fail = threading.Event(), threading.Event()
    calls = []

    def forward(x):
        calls.append(len(x))
        if len(calls) == 1:
            started.set()
            assert may_fail.wait(WAIT_SECONDS)
            raise RuntimeError("the first one")
        return x * 2

    function = torchcache(persistent_module_hash="failing", check_rows=False)(forward)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(function, rows(1, 2))
        assert started.wait(WAIT_SECONDS)
        own_flights = cache_of(function)._core.caller.joining.flights
        original, waiting = own_flights.claim, threading.Event()

        def claim(*args, **kwargs):
            result = original(*args, **kwargs)
            if result:
                waiting.set()
            return result

        own_flights.claim = claim
        second = pool.submit(function, rows(2, 3))
        assert waiting.wait(WAIT_SECONDS)
        may_fail.set()
        with pytest.raises(RuntimeError, match="the first one"):
            first.result(WAIT_SECONDS)
        assert torch.equal(second.result(WAIT_SECONDS), rows(2, 3) * 2)
    assert not own_flights._under_way


def test_waiting_has_a_bound_for_all_rows_together_and_is_given_up_then(monkeypatch, caplog):
    monkeypatch.setattr(flights, "JOIN_SECONDS", 0.05)
    slow = Slow()
    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(slow.function, rows(i)) for i in (1, 2)]
        for _ in first:
            assert slow.started.acquire(timeout=WAIT_SECONDS)
        second = pool.submit(slow.function, rows(1, 2))
        assert slow.started.acquire(timeout=WAIT_SECONDS)  # they did not come, so it computes them itself
        waiting = until_waiting(slow)
        with ThreadPoolExecutor(1) as other_pool:
            third = other_pool.submit(slow.function, rows(2))
            assert slow.started.acquire(timeout=WAIT_SECONDS)
            slow.may_end.set()
            assert torch.equal(second.result(WAIT_SECONDS), rows(1, 2) * 2)
            assert torch.equal(third.result(WAIT_SECONDS), rows(2) * 2)
        assert not waiting.is_set()
    assert sorted(slow.rows) == [[1], [1, 2], [2], [2]]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "do not wait for each other's rows" in said


def test_a_cached_function_may_wait_for_a_thread_that_asks_for_the_same_sample(monkeypatch):
    monkeypatch.setattr(flights, "JOIN_SECONDS", 0.05)
    calls = []

    def forward(x):
        calls.append(x[:, 0].tolist())
        if len(calls) % 2:
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(function, x).result(WAIT_SECONDS), x * 2)
        return x * 2

    function = torchcache(persistent_module_hash="asks_a_thread", check_rows=False)(forward)
    for number in (1, 2):
        assert torch.equal(function(rows(number)), rows(number) * 2)
    assert calls == [[1], [1], [2], [2]]
    assert torch.equal(function(rows(1, 2)), rows(1, 2) * 2)
    assert len(calls) == 4


def test_calls_inside_of_cached_calls_do_not_wait_for_each_other():
    barrier = threading.Barrier(2)

    def inner_a(x):
        return x + 1

    def inner_b(x):
        return x + 2

    a = torchcache(persistent_module_hash="a", check_rows=False)(inner_a)
    b = torchcache(persistent_module_hash="b", check_rows=False)(inner_b)

    def outer_a(x):
        barrier.wait(WAIT_SECONDS)
        return b(x) * 2

    def outer_b(x):
        barrier.wait(WAIT_SECONDS)
        return a(x) * 3

    one = torchcache(persistent_module_hash="one", check_rows=False)(outer_a)
    other = torchcache(persistent_module_hash="other", check_rows=False)(outer_b)
    with ThreadPoolExecutor(2) as pool:
        results = pool.submit(one, rows(1)), pool.submit(other, rows(1))
        assert torch.equal(results[0].result(WAIT_SECONDS), (rows(1) + 2) * 2)
        assert torch.equal(results[1].result(WAIT_SECONDS), (rows(1) + 1) * 3)


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent():
    slow = Slow()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.function, rows(1))
        assert slow.started.acquire(timeout=WAIT_SECONDS)
        pid = os.fork()
        if not pid:
            slow.may_end = threading.Event()
            slow.may_end.set()
            right = torch.equal(slow.function(rows(1)), rows(1) * 2)
            os._exit(0 if right else 1)
        slow.may_end.set()
        first.result(WAIT_SECONDS)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_many_threads_with_many_samples_compute_each_once():
    module = torchcache(check_rows=False)(nn.Linear(4, 3).requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    expected = nn.functional.linear(x, module.weight, module.bias)
    order = [torch.randint(0, 64, (16,), generator=generator) for _ in range(8 * 20)]
    barrier = threading.Barrier(8)

    def work(thread):
        barrier.wait(WAIT_SECONDS)
        return all(torch.allclose(module(x[i]), expected[i], atol=1e-5) for i in order[thread * 20 : (thread + 1) * 20])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    stats = cache_of(module).stats()
    assert stats.misses == len({int(i) for rows in order for i in rows})
    assert stats.hits + stats.misses + stats.duplicates + stats.shared_rows == 8 * 20 * 16
