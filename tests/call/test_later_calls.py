"""Once a call was cached, no error of ours ends a run: what cannot be cached is computed, counted, and said once."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchcache import CachedDataset, CacheMissError, UncacheableError, cache_of, sample_keys, torchcache
from torchcache.layout import MAX_TENSORS
from torchcache.results import rows as rows_of_results
from torchcache.results import whole_calls
from torchcache.results.nodes import MAX_DEPTH, MAX_NODES
from torchcache.results.tree import MAX_STRUCTURE_BYTES
from torchcache.storage import record


def batch(n=4):
    return torch.arange(float(n * 3)).reshape(n, 3)


def bypasses(target):
    return dict(cache_of(target).stats().bypasses)


def with_keys(function, x):
    with sample_keys(range(len(x) + 1)):
        return function(x)


#: Calls that raise as the first one of a cache, and what a program without a cache returns.
REFUSED_CALLS = {
    "a tensor without dimensions": lambda f: f(torch.tensor(2.0)),
    "one dimension": lambda f: f(torch.ones(3)),
    "no tensor": lambda f: f(2),
    "an object": lambda f: f(batch(), by=np.ones(3, np.float32)),
    "a module": lambda f: f(batch(), by=nn.Identity()),
    "another size": lambda f: f(batch(4), by=torch.ones(1, 3)),
    "keys of another size": lambda f: with_keys(f, batch()),
}


def scale(x, by=2):
    if isinstance(by, nn.Module):
        return by(x)
    return x * torch.as_tensor(by)


@pytest.mark.parametrize("kind", REFUSED_CALLS)
def test_a_call_that_is_refused_at_first_is_computed_later(kind, caplog):
    call = REFUSED_CALLS[kind]
    with pytest.raises(UncacheableError) as refused:
        call(torchcache()(scale))
    cached = torchcache()(scale)
    cached(batch())
    for _ in range(2):
        assert torch.equal(call(cached), call(scale))
    assert bypasses(cached) == {"unsupported_call": 2}
    assert torch.equal(cached(batch()), batch() * 2)
    assert cache_of(cached).stats().memory_hits == 4
    assert caplog.text.count(str(refused.value)) == 1


#: Results that do not fit the batch.
MISFITS = {
    "another size": lambda x: torch.ones(len(x) + 1, 3),
    "no dimension": lambda x: x.sum(),
    "nothing": lambda _: None,
    "plain values": lambda _: (1, 2),
    "an object": lambda _: object(),
    "one tensor of two": lambda x: (x, x[:1]),
}


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("n_good", [1, 2, 5])
def test_a_result_that_does_not_fit_the_batch_is_returned_later(kind, n_good, caplog):
    make = MISFITS[kind]

    def forward(x):
        return make(x) if x[0, 0] < 0 else x * 2

    with pytest.raises(UncacheableError):
        torchcache()(forward)(-batch() - 1)
    cached = torchcache()(forward)
    for i in range(n_good):
        cached(batch() + 100 * i)
    x = -batch() - 1
    for _ in range(2):
        result, expected = cached(x), forward(x)
        assert type(result) is type(expected)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(result, expected)
    # A second batch carries a row more, which is not why.
    assert bypasses(cached) == {"unsupported_result": 2}
    assert caplog.text.count("the cache is bypassed") == 1
    cached(batch())
    assert cache_of(cached).stats().memory_hits == 4


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("options", [{}, {"check_rows": False}, {"verify_hits": 1.0}], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(torch.ones(3, 3), id="equal rows"),
        pytest.param(torch.tensor([[1.0] * 3, [1.0] * 3, [2.0] * 3]), id="some equal rows"),
        pytest.param(torch.cat([batch(2), batch(3) + 50]), id="some known rows"),
    ],
)
def test_the_reason_of_a_misfit_is_the_misfit_whatever_the_rows(kind, options, rows, caplog):
    make = MISFITS[kind]
    is_wrong = []

    def forward(x):
        return make(x) if is_wrong else x * 2

    cached = torchcache(**options)(forward)
    cached(batch())
    is_wrong.append(True)
    cache_of(cached).refresh()
    for _ in range(2):
        result, expected = cached(rows), forward(rows)
        assert type(result) is type(expected)
    assert "rows_depend_on_batch" not in bypasses(cached)
    assert "other_batch_failed" not in bypasses(cached)

    fits_one_row = kind == "one tensor of two" and not options.get("check_rows", True) and len(rows.unique(dim=0)) == 1
    if not fits_one_row:
        with pytest.raises(UncacheableError):
            torchcache(**options)(forward)(rows)


def test_what_went_around_first_ends_no_run_later(caplog):
    """As a module in training mode for an epoch, and then evaluated with a result that cannot be kept."""
    dropout = nn.Dropout(0.5)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = dropout

        def forward(self, x):
            x = self.dropout(x)
            return x if self.training else {"x": x, "odd": {1}}

    model = torchcache()(Model())
    for _ in range(3):
        model(batch())
    assert model.eval()(batch())["odd"] == {1}
    assert bypasses(model) == {"dropout_in_training_mode": 3, "unsupported_result": 1}


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_result_that_fails_when_it_is_copied_is_returned(batch_dim, monkeypatch, caplog):
    monkeypatch.setattr(rows_of_results, "copy_leaves", lambda *_: (_ for _ in ()).throw(OSError("truncated")))
    monkeypatch.setattr(whole_calls, "copy_leaves", lambda *_: (_ for _ in ()).throw(OSError("truncated")))
    cached = torchcache(batch_dim=batch_dim)(scale)
    for _ in range(2):
        assert torch.equal(cached(batch()), batch() * 2)
    assert bypasses(cached) == {"unsupported_result": 2}
    assert "truncated" in caplog.text


def test_an_epoch_does_not_end_at_a_sample_that_cannot_be_kept(caplog):
    class Samples(Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, i):
            return {"x": torch.ones(3), "odd": threading.Lock() if i == 77 else None}

    dataset = CachedDataset(Samples())
    for _ in range(2):
        samples = [sample["x"] for sample in DataLoader(dataset, batch_size=None, num_workers=0)]
        assert len(samples) == 100
    assert dict(dataset.cache_instance.stats().bypasses) == {"unsupported_result": 2}
    assert dataset.cache_instance.stats().memory_hits == 99
    assert caplog.text.count("unsupported_result") == 1
    warmed = CachedDataset(Samples()).warm(num_workers=0, progress=False)
    assert (warmed.computed, warmed.not_stored) == (99, 1)


def test_a_later_misfit_of_a_padded_batch_is_returned():
    def forward(ids, mask):
        return {"a": (ids * mask)[:, :, None], **({"b": ids.sum()} if ids[0, 0] == 9 else {})}

    cached = torchcache(padded={"ids": "mask"})(forward)
    ids = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    cached(ids, (ids != 0).float())
    other = torch.tensor([[9.0, 2.0], [3.0, 0.0]])
    assert cached(other, (other != 0).float())["b"] == 14
    assert sum(bypasses(cached).values()) == 1


def nested(x, depth):
    return x if not depth else [nested(x, depth - 1)]


#: Results that cannot be kept for their size, whatever the first call was.
TOO_LARGE = {
    "deep": lambda x: nested(x, MAX_DEPTH + 2),
    "very deep": lambda x: nested(x, 300),
    "many values": lambda x: (x, [0] * MAX_NODES),
    "long values": lambda x: (x, "a" * MAX_STRUCTURE_BYTES),
    "many tensors": lambda x: [x] * (MAX_TENSORS + 1),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_result_that_is_too_large_is_returned_at_the_first_call_too(kind, batch_dim, caplog):
    make = TOO_LARGE[kind]
    cached = torchcache(batch_dim=batch_dim)(make)
    for _ in range(2):
        assert repr(cached(batch())) == repr(make(batch()))
    if batch_dim is not None or kind not in ("many tensors", "long values", "many values"):
        assert bypasses(cached) == {"result_too_large": 2}
        assert cache_of(cached).stats().memory_rows == 0
        assert caplog.text.count("result_too_large") == 1
    else:
        assert bypasses(cached) == {}


def test_a_result_that_is_too_large_for_some_rows_is_returned_whole():
    def forward(x):
        return [x] * (MAX_TENSORS + 1) if (x < 0).any() else [x]

    cached = torchcache()(forward)
    cached(batch())
    x = torch.cat([batch(2), -batch(3) - 1])
    for _ in range(2):
        assert len(cached(x)) == MAX_TENSORS + 1
        assert torch.equal(cached(x)[-1], x)
    assert bypasses(cached) == {"result_too_large": 4}


@pytest.mark.parametrize("limit", ["MAX_VALUE_BYTES", "MAX_HEADER_BYTES"])
def test_a_value_that_no_record_can_hold_is_returned_counted_and_said_once(limit, cache_dir, monkeypatch, caplog):
    monkeypatch.setattr(record, limit, 8)
    record.refusal_of.cache_clear()
    cached = torchcache(persistent=True, persistent_cache_dir=cache_dir)(scale)
    try:
        for start in (0, 100):
            x = batch() + start
            assert torch.equal(cached(x), x * 2)
            assert torch.equal(cached(x), x * 2)
            assert cache_of(cached).flush()
    finally:
        record.refusal_of.cache_clear()
        cache_of(cached).close()
    reason = "too_large" if limit == "MAX_VALUE_BYTES" else "too_large_to_describe"
    stats = cache_of(cached).stats()
    assert (stats.dropped_rows, stats.memory_hits, stats.bypasses) == ({reason: 8}, 8, {})
    assert caplog.text.count(f"({reason}, said once)") == 1


@pytest.mark.parametrize("batch_dim", [0, None])
def test_an_argument_that_lies_too_deep_goes_around(batch_dim):
    deep = ()
    for _ in range(100_000):
        deep = (deep,)
    cached = torchcache(batch_dim=batch_dim)(lambda x, _: x * 2)
    assert torch.equal(cached(batch(), deep), batch() * 2)
    assert bypasses(cached) == {"opaque_state": 1}


def test_a_dataset_that_is_asked_for_something_else_later_returns_it(caplog):
    class Numbers(Dataset):
        def __getitem__(self, i):
            return torch.tensor([1.0]) * (i if isinstance(i, int) else sum(i))

    versions = {}
    dataset = CachedDataset(Numbers(), item_version=versions.get)
    with pytest.raises(UncacheableError, match="one sample at a time"):
        dataset[[1, 2]]
    assert dataset[3] == 3
    assert dataset[[1, 2]] == 3
    versions[5] = [1]
    assert dataset[5] == 5
    assert dict(dataset.cache_instance.stats().bypasses) == {"unsupported_call": 2}
    assert caplog.text.count("unsupported_call") == 1


def test_what_is_asked_for_still_raises_later(cache_dir):
    linear = torchcache(when_grad="raise")(nn.Linear(3, 2).requires_grad_(False))
    linear(batch())
    linear.requires_grad_(True)
    with pytest.raises(UncacheableError, match="when_grad='raise'"):
        linear(batch())

    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    filling = torchcache(**options)(scale)
    filling(batch())
    assert cache_of(filling).flush()
    cache_of(filling).close()
    requiring = torchcache(**options, mode="require")(scale)
    assert torch.equal(requiring(batch()), batch() * 2)
    with pytest.raises(CacheMissError, match="unsupported_call"):
        requiring(2)
    cache_of(requiring).close()


# -- what a call that goes around returns ----------


def test_a_call_that_goes_around_is_neither_detached_nor_rounded():
    linear = torchcache(cache_dtype=torch.half, when_grad="bypass")(nn.Linear(3, 2))
    for _ in range(2):
        around = linear(batch() / 7)
        assert around.requires_grad
        assert not torch.equal(around, around.half().float())
    linear.requires_grad_(False)
    cached = linear(batch() / 7)
    assert not cached.requires_grad
    assert torch.equal(cached, cached.half().float())


def test_a_cache_that_is_closed_again_and_again_breaks_no_call_of_another_thread(cache_dir):
    cached = torchcache(persistent=True, persistent_cache_dir=cache_dir)(lambda x: x * 2)
    batches = [torch.randn(4, 3) for _ in range(8)]
    end = time.monotonic() + 2
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread may lose its turn between any two lines

    def call():
        while time.monotonic() < end:
            for x in batches:
                assert torch.equal(cached(x), x * 2)
            cache_of(cached).stats()

    try:
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(call) for _ in range(3)]
            while time.monotonic() < end:
                cache_of(cached).close()
            for done in calls:
                done.result(timeout=60)
    finally:
        sys.setswitchinterval(interval)
