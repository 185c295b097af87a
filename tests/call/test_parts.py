"""A large call is computed in parts: what comes back, what is kept when it fails, and how far it is."""

from __future__ import annotations

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchcache import CachedDataset, ConfigError, cache_of, sample_keys, torchcache
from torchcache.storage.writer import writer


def stats_of(target):
    return cache_of(target).stats()


def counted(function, **options):
    """Return a cached function of one argument and the sizes of the batches that reached it."""
    sizes = []

    def called(x):
        sizes.append(len(x))
        return function(x)

    called.__qualname__ = f"counted {function.__qualname__}"
    return torchcache(**options)(called), sizes


def numbers(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None] * torch.tensor([1.0, -2.0, 0.5])


def all_different(n, start=0):
    return numbers(*range(start + 1, start + n + 1))


# -- what comes back -----------


@given(
    batch_size=st.integers(1, 9),
    calls=st.lists(st.lists(st.integers(1, 12), min_size=0, max_size=24), min_size=1, max_size=5),
    options=st.sampled_from([{}, {"check_rows": False}, {"verify_hits": 0.5}, {"mode": "refresh"}]),
)
def test_a_call_in_parts_returns_what_it_returns_at_once(batch_size, calls, options):
    cached, sizes = counted(lambda x: (x * 2, {"sum": x.sum(1, keepdim=True)}), batch_size=batch_size, **options)
    for values in calls:
        x = numbers(*values) if values else torch.empty(0, 3)
        doubled, rest = cached(x)
        assert torch.equal(doubled, x * 2)
        assert torch.equal(rest["sum"], x.sum(1, keepdim=True))
    assert not stats_of(cached).bypasses
    stats = stats_of(cached)
    assert not stats.mismatched_rows
    if options == {"check_rows": False}:
        assert max(sizes, default=0) <= batch_size


@pytest.mark.parametrize("n", [5, 8, 9, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_no_more_rows_than_that_reach_the_function_once_it_is_checked(n, batch_size):
    cached, sizes = counted(lambda x: x * 2, batch_size=batch_size)
    cached(all_different(12))
    del sizes[:]
    x = all_different(n, start=100)
    assert torch.equal(cached(x), x * 2)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1  # no small rest: a batch of one is something else to some modules
    assert sum(sizes) == n
    assert stats_of(cached).misses == 12 + n


def test_equal_rows_of_different_parts_are_computed_once():
    cached, sizes = counted(lambda x: x * 2, batch_size=3, check_rows=False)
    x = numbers(1, 2, 1, 2, 3, 1, 4, 4, 4, 5)
    assert torch.equal(cached(x), x * 2)
    assert sum(sizes) == stats_of(cached).misses == 5
    assert stats_of(cached).duplicates == 5


@pytest.mark.parametrize("batch_size", [1, 3])
def test_copies_of_one_row_are_computed_in_a_first_part_and_not_again(batch_size):
    cached, sizes = counted(lambda x: x * 2, batch_size=batch_size)
    x = numbers(*[3] * 50)
    assert torch.equal(cached(x), x * 2)
    assert sum(sizes) < 15
    assert torch.equal(cached(x), x * 2)
    assert stats_of(cached).misses <= max(2, batch_size)
    assert stats_of(cached).memory_hits == 50


def test_one_part_is_forwarded_as_the_caller_made_it():
    seen = []
    cached = torchcache(batch_size=8)(lambda x: seen.append(x) or x * 2)
    x = all_different(8)
    cached(x)
    assert seen[0] is x


DEPENDENT = {
    "mean": lambda x: x - x.mean(0),
    "size": lambda x: x * len(x),
    "pairs": lambda x: x @ x.T,
    "sum up": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", DEPENDENT)
def test_rows_that_depend_on_their_batch_come_back_as_of_the_whole_call(kind, batch_size):
    function = DEPENDENT[kind]
    cached, _ = counted(function, batch_size=batch_size)
    for seed in range(3):
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(cached(x), function(x))
    assert stats_of(cached).hits == stats_of(cached).memory_rows == 0
    assert set(stats_of(cached).bypasses) == {"rows_depend_on_batch"}


def test_rows_of_several_shapes_go_around():
    cached, _ = counted(lambda texts: torch.ones(len(texts), max(map(len, texts))), batch_size=4, check_rows=False)
    texts = ["a", "b", "c", "d", "eeee", "f"]
    assert cached(texts).shape == (6, 4)
    assert dict(stats_of(cached).bypasses) == {"rows_do_not_stack": 1}


def test_texts_arrays_and_channels_last_come_back_in_parts():
    embed, _ = counted(lambda texts: np.array([[len(t), t.count("a")] for t in texts], np.float32), batch_size=3)
    texts = [f"{'a' * (i % 5)}{'b' * i}" for i in range(20)]
    expected = np.array([[len(t), t.count("a")] for t in texts], np.float32)
    for _ in range(2):
        found = embed(texts)
        assert type(found) is np.ndarray
        assert np.array_equal(found, expected)
    conv = nn.Conv2d(3, 4, 3).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(9, 3, 8, 8).to(memory_format=torch.channels_last)
    plain = conv(x)
    cached = torchcache(batch_size=4)(conv)
    for _ in range(2):
        out = cached(x)
        assert torch.allclose(out, plain, atol=1e-6)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(100, 8)

    def forward(self, ids, mask):
        states = self.words(ids) * mask[:, :, None]
        return states, states.sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_come_back_in_parts(side):
    model = Encoder().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (17, 12), generator=generator)
    lengths = torch.randint(1, 12, (17, 1), generator=generator)
    places = torch.arange(12)[None]
    mask = ((places < lengths) if side == "right" else (places >= 12 - lengths)).float()
    expected = model(ids, mask)
    cached = torchcache(batch_size=4, padded={"ids": "mask"})(model)
    for _ in range(2):
        states, mean = cached(ids, mask)
        assert torch.allclose(states, expected[0], atol=1e-6)
        assert torch.allclose(mean, expected[1], atol=1e-6)
    assert stats_of(cached).misses == 17
    assert stats_of(cached).memory_hits == 17


def test_keys_of_the_users_own_hold_in_parts():
    cached, _ = counted(lambda x: x * 2, batch_size=3)
    x = all_different(10)
    for _ in range(2):
        with sample_keys(range(10)):
            assert torch.equal(cached(x), x * 2)
    assert stats_of(cached).misses == 10
    assert stats_of(cached).memory_hits == 10


# -- what is kept --------------


def test_a_call_that_fails_at_the_end_has_lost_its_last_part_only(cache_dir):
    class BadTextError(Exception):
        pass

    def embed(texts):
        if "bad" in texts:
            raise BadTextError
        return torch.tensor([[float(len(text))] for text in texts])

    def make():
        return counted(embed, batch_size=16, persistent=True, persistent_cache_dir=cache_dir)

    texts = ["a" * i for i in range(1, 200)]
    cached, _ = make()
    with pytest.raises(BadTextError):
        cached([*texts, "bad"])
    assert cache_of(cached).flush()
    cache_of(cached).close()
    kept = stats_of(cached).written_rows
    assert kept >= 199 - 16

    again, sizes = make()
    assert torch.equal(again(texts), embed(texts))
    assert stats_of(again).store_hits == kept
    assert sum(sizes) == 199 - kept
    cache_of(again).close()


def test_each_part_is_kept_before_the_next_one_is_computed():
    kept = []

    def forward(x):
        kept.append(stats_of(cached).memory_rows)
        return x * 2

    cached = torchcache(batch_size=5, check_rows=False)(forward)
    cached(all_different(20))
    assert kept == [0, 5, 10, 15]


def test_a_part_that_cannot_be_kept_leaves_the_call_to_be_computed_whole():
    def forward(x):
        return {"out": x * 2, **({"odd": {1}} if (x == 77).any() else {})}

    cached, _ = counted(forward, batch_size=10, check_rows=False)
    assert torch.equal(cached(all_different(30))["out"], all_different(30) * 2)
    result = cached(all_different(100))
    assert result["odd"] == {1}
    assert torch.equal(result["out"], all_different(100) * 2)
    assert dict(stats_of(cached).bypasses) == {"unsupported_result": 1}


def test_threads_share_the_parts_of_one_call():
    computed = []
    lock = threading.Lock()

    def forward(x):
        with lock:
            computed.extend(x[:, 0].tolist())
        return x * 2

    cached = torchcache(batch_size=8)(forward)
    cached(all_different(8, start=1000))
    del computed[:]
    x = all_different(200)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cached(x), range(4)))
    assert all(torch.equal(result, x * 2) for result in results)
    assert sorted(n for n in computed if n < 1000) == sorted(x[:, 0].tolist())


def test_the_write_queue_gets_part_after_part(cache_dir):
    cached, _ = counted(lambda x: x * 2, batch_size=4, persistent=True, persistent_cache_dir=cache_dir)
    cached(all_different(20))
    assert writer.flush(10)
    assert stats_of(cached).written_rows == 20
    cache_of(cached).close()


def test_calls_under_other_batch_sizes_share_their_rows(cache_dir):
    def make(**options):
        return counted(lambda x: x * 2, persistent=True, persistent_cache_dir=cache_dir, **options)

    first, _ = make(batch_size=4)
    first(all_different(20))
    cache_of(first).flush()
    cache_of(first).close()
    second, sizes = make(batch_size=7)
    third, more = make()
    assert torch.equal(second(all_different(20)), all_different(20) * 2)
    assert torch.equal(third(all_different(20)), all_different(20) * 2)
    assert not sizes
    assert not more
    cache_of(second).close()
    cache_of(third).close()


# -- how far it is -------------


def test_a_bar_shows_how_far_a_call_is(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    cached, _ = counted(lambda x: x * 2, batch_size=4, progress=True, check_rows=False)
    cached(torch.cat([all_different(30), all_different(10)]))
    shown = stream.getvalue()
    assert "counted" in shown
    assert "40/40" in shown
    before = len(shown)
    cached(all_different(30))
    cached(all_different(33))
    assert len(stream.getvalue()) == before  # hits, and what is one part, need none


@pytest.mark.parametrize("broken", ["closed", "write"])
def test_a_bar_that_cannot_be_shown_ends_no_call(broken, monkeypatch, caplog):
    class Broken(io.StringIO):
        def write(self, _):
            raise OSError("no such terminal")

    stream = io.StringIO() if broken == "closed" else Broken()
    if broken == "closed":
        stream.close()
    cached, _ = counted(lambda x: x * 2, batch_size=4, progress=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert torch.equal(cached(all_different(30)), all_different(30) * 2)
    if broken == "write":  # tqdm itself is silent where the stream is closed
        assert caplog.text.count("progress bar is gone") == 1


def test_without_tqdm_one_line_says_what_to_install(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    cached, _ = counted(lambda x: x * 2, batch_size=4, progress=True)
    for start in (0, 100):
        cached(all_different(30, start=start))
    assert caplog.text.count("pip install 'torchcache[progress]'") == 1


# -- what is refused -----------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a number of samples, 1 or more"),
        ({"batch_size": True}, "batch_size=True must be"),
        ({"batch_size": 2.0}, "batch_size=2.0 must be"),
        ({"batch_size": "8"}, "batch_size='8' must be"),
        ({"progress": 1}, "progress=1 must be True or False"),
        ({"progress": True}, "set batch_size, or drop progress"),
        ({"batch_size": 8, "batch_dim": None}, "batch_size has no meaning with batch_dim=None"),
    ],
)
def test_what_has_no_meaning_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        torchcache(**options)(lambda x: x)


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"progress": True}])
def test_a_dataset_has_no_parts(options):
    with pytest.raises(ConfigError, match="has no meaning for a dataset"):
        CachedDataset([1, 2], **options)


def test_an_attribute_sets_the_size_of_one_module():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes = []
            self.torchcache_batch_size = 5

        def forward(self, x):
            self.sizes.append(len(x))
            return x * 2

    module = torchcache(check_rows=False)(Doubling)()
    module(all_different(20))
    assert module.sizes == [5, 5, 5, 5]
