"""``mode`` says what a call may do: look up, store, compute."""

from __future__ import annotations

import importlib
import pickle
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.storage.known_values import forget_environments
from torchcache import CacheMissError, ConfigError, cache_of, disabled, sample_keys, torchcache
from torchcache.call.flights import Flights
from torchcache.storage import temporary

X = torch.arange(12.0).reshape(4, 3) + 1


@pytest.fixture(autouse=True)
def opened_afresh():
    """No environment of another test is open, so that one that only reads opens it as such."""
    yield
    forget_environments()


@pytest.fixture
def factor(tmp_path):
    path = tmp_path / "factor"
    path.write_text("2")
    return path


def make(path, cache_dir=None, **options):
    """Decorate a function that reads what it multiplies with from a file, of which the key knows nothing.

    The rows that ``check_rows`` computes once more are another file's matter.
    """
    name, sizes = str(path), []
    if cache_dir is not None:
        options |= {"persistent": True, "persistent_cache_dir": cache_dir}

    @torchcache(**{"check_rows": False, **options})
    def scaled(x):
        sizes.append(len(x))
        text = Path(name).read_text()
        return x * (torch.rand(()) if text == "random" else float(text))

    return scaled, sizes


def fill(path, cache_dir, x=X, **options):
    """Store the values of ``x`` and close the environment, as another program would have."""
    scaled, _ = make(path, cache_dir, **options)
    scaled(x)
    assert scaled.cache_instance.flush()
    forget_environments()
    return scaled.cache_instance


def stats_of(target):
    return cache_of(target).stats()


def files_in(path):
    """Return what lies under a directory; of the table of readers, which LMDB keeps, only its size."""
    return {
        entry.relative_to(path): (entry.stat().st_size, entry.name == "lock.mdb" or hash(entry.read_bytes()))
        for entry in path.rglob("*")
        if entry.is_file()
    }


# -- off ------------------------------------------------------------------------------------------------------------


def test_off_computes_as_if_there_were_no_cache(cache_dir):
    linear = torchcache(mode="off", persistent=True, persistent_cache_dir=cache_dir)(nn.Linear(3, 2))
    for _ in range(2):
        assert linear(X).requires_grad
    stats = stats_of(linear)
    assert (stats.misses, stats.hits, stats.memory_rows, dict(stats.bypasses)) == (0, 0, 0, {})
    assert cache_of(linear).cache_dir is None
    assert cache_of(linear).explain(X).bypass_reason == "disabled"
    assert not cache_dir.exists()


# -- read -----------------------------------------------------------------------------------------------------------


def test_read_finds_what_is_stored_computes_the_rest_and_writes_nothing(factor, cache_dir):
    written = fill(factor, cache_dir, X[:2])
    before = files_in(cache_dir)
    scaled, sizes = make(factor, cache_dir, mode="read")
    for _ in range(2):
        assert torch.equal(scaled(X), X * 2)
    cache = scaled.cache_instance
    assert cache.module_hash == written.module_hash
    assert cache.cache_dir == written.cache_dir
    assert cache.flush()
    stats = cache.stats()
    assert (stats.store_hits, stats.misses, stats.memory_hits, sizes) == (2, 2, 4, [2])
    assert (stats.queued_rows, stats.written_rows, dict(stats.dropped_rows), dict(stats.faults)) == (0, 0, {}, {})
    cache.close()
    assert torch.equal(scaled(X[:2]), X[:2] * 2)
    assert cache.stats().store_hits == 4
    assert files_in(cache_dir) == before


def test_read_takes_a_directory_that_is_not_there_for_an_empty_cache(factor, cache_dir, caplog):
    scaled, sizes = make(factor, cache_dir, mode="read")
    for _ in range(2):
        scaled(X)
    stats = stats_of(scaled)
    assert (stats.misses, stats.memory_hits, dict(stats.faults), sizes) == (4, 4, {}, [4])
    assert scaled.cache_instance.cache_dir.parent == cache_dir
    scaled.cache_instance.clear()
    scaled.cache_instance.close()
    assert not cache_dir.exists()
    assert [line for line in caplog.messages if "module hash" not in line and "clear()" not in line] == []


def test_read_without_a_directory_keeps_values_in_memory_and_makes_no_temporary_one(factor, monkeypatch, caplog):
    def refuse():
        raise AssertionError("it asked for a temporary directory")

    monkeypatch.setattr(temporary, "reserve", refuse)
    monkeypatch.setattr("torchcache.tiers.disk.temporary_directory", refuse)
    scaled, sizes = make(factor, mode="read", persistent=True)
    for _ in range(2):
        scaled(X)
    assert (sizes, stats_of(scaled).memory_hits, dict(stats_of(scaled).faults)) == ([4], 4, {})
    assert scaled.cache_instance.cache_dir is None
    assert sum("there is nothing to read" in line for line in caplog.messages) == 1


def test_read_in_a_process_that_also_writes_finds_what_is_queued_and_what_is_committed(factor, cache_dir):
    fill(factor, cache_dir, X[:1])
    reading, _ = make(factor, cache_dir, mode="read", max_memory_cache_size=0)
    reading(X[:1])  # opens the environment for reading only
    writing, _ = make(factor, cache_dir, max_memory_cache_size=0)
    writing(X)
    writing.cache_instance.flush()
    assert dict(stats_of(writing).faults) == {}
    assert stats_of(writing).written_rows == 3
    factor.write_text("3")
    assert torch.equal(reading(X), X * 2)
    assert (stats_of(reading).misses, dict(stats_of(reading).faults)) == (0, {})


def test_read_with_verify_hits_replaces_in_memory_only(factor, cache_dir, caplog):
    fill(factor, cache_dir, check_rows=False)
    before = files_in(cache_dir)
    factor.write_text("3")
    scaled, _ = make(factor, cache_dir, mode="read", verify_hits=1.0, check_rows=False)
    for _ in range(2):
        assert torch.equal(scaled(X), X * 3)
    stats = stats_of(scaled)
    assert (stats.verified_rows, stats.mismatched_rows, stats.store_hits, stats.memory_hits) == (8, 4, 4, 4)
    assert sum("in memory only since mode='read'" in line for line in caplog.messages) == 1
    assert stats.queued_rows == 0
    assert files_in(cache_dir) == before


def test_read_keeps_what_it_finds_out_about_rows_to_itself(cache_dir):
    def make(mode):
        @torchcache(mode=mode, persistent=True, persistent_cache_dir=cache_dir)
        def centered(x):
            return x - x.mean(0)

        return centered

    writing = make("on")
    writing(X)
    writing.cache_instance.flush()
    forget_environments()
    before = files_in(cache_dir)
    reading = make("read")
    others = torch.rand(4, 3)
    for _ in range(2):
        assert torch.allclose(reading(torch.cat([X, others])), torch.cat([X, others]) - torch.cat([X, others]).mean(0))
    assert dict(stats_of(reading).bypasses) == {"rows_depend_on_batch": 2}
    assert reading.cache_instance.flush()
    assert files_in(cache_dir) == before


def test_clear_leaves_what_is_only_read_on_disk_and_says_so(factor, cache_dir, caplog):
    fill(factor, cache_dir)
    before = files_in(cache_dir)
    scaled, sizes = make(factor, cache_dir, mode="read")
    scaled(X)
    scaled.cache_instance.clear()
    assert (stats_of(scaled).memory_rows, dict(stats_of(scaled).faults)) == (0, {})
    assert sum("clear() empties memory only" in line for line in caplog.messages) == 1
    scaled(X)
    assert (stats_of(scaled).store_hits, sizes) == (8, [])
    assert files_in(cache_dir) == before


# -- refresh --------------------------------------------------------------------------------------------------------


def test_refresh_computes_every_row_and_overwrites_what_is_cached(factor, cache_dir):
    fill(factor, cache_dir)
    factor.write_text("3")
    scaled, sizes = make(factor, cache_dir, mode="refresh")
    for _ in range(2):
        assert torch.equal(scaled(X), X * 3)
    assert sizes == [4, 4]
    stats = stats_of(scaled)
    assert (stats.misses, stats.hits, stats.memory_rows, dict(stats.faults)) == (8, 0, 4, {})
    assert scaled.cache_instance.flush()
    forget_environments()
    later, later_sizes = make(factor, cache_dir)
    assert torch.equal(later(X), X * 3)
    assert (stats_of(later).store_hits, later_sizes) == (4, [])


def test_refresh_overwrites_what_is_still_queued(factor, cache_dir):
    scaled, _ = make(factor, cache_dir, max_memory_cache_size=0)
    again, _ = make(factor, cache_dir, max_memory_cache_size=0, mode="refresh")
    scaled(X)
    factor.write_text("3")
    again(X)
    assert torch.equal(scaled(X), X * 3)
    again.cache_instance.flush()
    assert torch.equal(scaled(X), X * 3)
    assert stats_of(scaled).misses == 4


def test_refresh_computes_equal_rows_of_a_batch_once(factor):
    scaled, sizes = make(factor, mode="refresh")
    x = torch.cat([X, X[:2]])
    assert torch.equal(scaled(x), x * 2)
    assert (sizes, stats_of(scaled).misses, stats_of(scaled).duplicates) == ([4], 4, 2)


def test_refresh_computes_also_what_another_thread_has_just_computed(factor, monkeypatch):
    scaled, _ = make(factor, mode="refresh", check_rows=False)
    scaled(X)
    factor.write_text("3")
    claim = Flights.claim

    def claim_late(flights, flight, digests, *, joins):
        flights.landings += 1
        return claim(flights, flight, digests, joins=joins)

    monkeypatch.setattr(Flights, "claim", claim_late)
    assert torch.equal(scaled(X), X * 3)


def test_refresh_forgets_what_it_computed_and_cannot_keep(factor, cache_dir):
    fill(factor, cache_dir)
    factor.write_text("random")
    scaled, _ = make(factor, cache_dir, mode="refresh")
    scaled(X)
    assert dict(stats_of(scaled).dropped_rows) == {"random_numbers": 4}
    assert scaled.cache_instance.flush()
    forget_environments()
    factor.write_text("5")
    later, sizes = make(factor, cache_dir)
    assert torch.equal(later(X), X * 5)
    assert sizes == [4]


def test_refresh_deletes_on_disk_what_finds_no_room_in_the_queue(factor, cache_dir):
    fill(factor, cache_dir)
    factor.write_text("3")
    scaled, _ = make(factor, cache_dir, mode="refresh", queue_bytes=1, queue_timeout_seconds=0)
    for rows in X.split(1):  # the first finds the queue empty
        scaled(rows)
    assert scaled.cache_instance.flush()
    forget_environments()
    later, _ = make(factor, cache_dir)
    assert torch.equal(later(X), X * 3)


# -- require --------------------------------------------------------------------------------------------------------


def test_require_answers_from_the_cache_and_never_runs_the_function(factor, cache_dir):
    fill(factor, cache_dir)
    before = files_in(cache_dir)
    factor.unlink()
    scaled, sizes = make(factor, cache_dir, mode="require", verify_hits=1.0)
    for _ in range(2):
        assert torch.equal(scaled(X), X * 2)
    stats = stats_of(scaled)
    assert (stats.store_hits, stats.memory_hits, stats.verified_rows, sizes) == (4, 4, 0, [])
    assert files_in(cache_dir) == before


def test_require_raises_before_anything_is_forwarded_and_says_what_is_missing_where(factor, cache_dir, capsys):
    fill(factor, cache_dir, X[:1])
    before = files_in(cache_dir)
    scaled, sizes = make(factor, cache_dir, mode="require")
    x = torch.cat([X, X + 100, X[:1]])
    with pytest.raises(LookupError) as caught:
        scaled(x)
    error = caught.value
    assert isinstance(error, CacheMissError)
    assert error.missing == (1, 2, 3, 4, 5, 6, 7)
    text = str(error)
    assert scaled.cache_instance.module_hash in text
    assert str(scaled.cache_instance.cache_dir) in text
    explained = scaled.cache_instance.explain(x)
    assert explained == error.explanation
    named = ", ".join(f"{p} ({explained.samples[p].digest[:8]})" for p in range(1, 6))
    assert f"(positions {named}, ...)" in text
    assert all(f"{name} " in text and digest[:8] in text for name, digest in explained.parts.items())
    assert capsys.readouterr().out.count("module hash") == 1, "the error printed as well"
    assert (sizes, stats_of(scaled).misses, stats_of(scaled).queued_rows) == ([], 0, 0)
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.explanation, twin.missing) == (text, error.explanation, error.missing)
    assert files_in(cache_dir) == before


def test_two_errors_of_require_show_which_part_makes_the_difference(cache_dir):
    torch.manual_seed(0)
    linear = torchcache(mode="require", persistent=True, persistent_cache_dir=cache_dir)(nn.Linear(3, 2))
    linear.requires_grad_(False)
    errors = []
    for _ in range(2):
        with pytest.raises(CacheMissError) as caught:
            linear(X)
        errors.append(caught.value.explanation)
        linear.weight.add_(1)
    (line,) = errors[0].differences(errors[1])
    assert "weight" in line


def test_the_error_of_require_names_the_parts_of_a_large_model_together(cache_dir):
    def lines_of(module):
        module = torchcache(mode="require", persistent=True, persistent_cache_dir=cache_dir)(module)
        with pytest.raises(CacheMissError) as caught:
            module(X)
        assert len(caught.value.explanation.parts) > 400
        return str(caught.value).splitlines()[2:]

    def make():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(3, 3) for _ in range(100))).eval().requires_grad_(False)

    one, same, other = make(), make(), make()
    other[70].bias.add_(1)
    lines = lines_of(one)
    assert len(lines) < 60
    assert lines_of(same) == lines
    (line,) = set(lines_of(other)) - set(lines)
    assert line.split()[:3] == ["weights,", "all", "200"]


def test_require_says_that_nothing_is_there_yet(factor, cache_dir):
    scaled, _ = make(factor, cache_dir, mode="require")
    with pytest.raises(CacheMissError, match="where nothing is yet"):
        scaled(X)
    assert not cache_dir.exists()


@pytest.mark.filterwarnings("ignore:argument 'named' of")
def test_require_says_that_nobody_else_can_have_filled_what_has_no_stable_name(cache_dir):
    @torchcache(mode="require", persistent=True, persistent_cache_dir=cache_dir)
    class Named(nn.Module):
        def __init__(self, named):
            super().__init__()

        def forward(self, x):
            return x + 1

    with pytest.raises(CacheMissError, match=r"no stable name.*persistent_module_hash"):
        Named(i for i in ())(X)
    assert not cache_dir.exists()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.dropout(self.linear(x))


@pytest.mark.parametrize(
    ("reason", "remedy", "call"),
    [
        ("dropout_in_training_mode", "eval()", lambda net: net.train()(X)),
        ("input_requires_grad", "detach", lambda net: net(X.clone().requires_grad_())),
        ("parameters_require_grad", "requires_grad_(False)", lambda net: net.requires_grad_()(X)),
        ("functorch_transform", "outside of it", lambda net: torch.func.vmap(net)(X[None])),
        ("empty_batch", "leave empty batches out", lambda net: net(X[:0])),
        ("sparse_tensor", "plain strided tensors", lambda net: net(X.to_sparse())),
        ("export_or_trace", "exported", lambda net: torch.jit.trace(net, X)),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_require_raises_where_the_call_would_go_around_the_cache(cache_dir, reason, remedy, call):
    net = Net().eval().requires_grad_(False)
    options = {"persistent": True, "persistent_cache_dir": cache_dir, "when_grad": "bypass"}
    net = torchcache(mode="require", **options)(net)
    with pytest.raises(CacheMissError) as caught:
        call(net)
    assert reason in str(caught.value)
    assert remedy in str(caught.value)
    assert caught.value.missing == ()
    assert caught.value.explanation is None or caught.value.explanation.bypass_reason == reason
    assert net.calls == []


REPEATED = torch.ones(8, 3)

#: Functions, batches to fill a cache with, and a batch that all of it can answer.
HARD_TO_CHECK = {
    "zeros": (lambda x: x * 0, [X], X),
    "zeros of several leaves": (lambda x: {"a": x * 0, "b": x.sum(1) * 0}, [X, X + 9], X.flip(0)),
    "not a number": (lambda x: x * float("nan"), [X], X),
    "zeros in many batches": (lambda x: x * 0, [X + 9 * i for i in range(5)], torch.cat([X[:2], X[:2] + 36])),
    "one sample repeated": (lambda x: x * 2, [REPEATED], REPEATED),
    "one sample repeated otherwise": (lambda x: x * 2, [REPEATED], REPEATED[:3]),
    "one sample repeated, all zeros": (lambda x: x * 0, [REPEATED], REPEATED),
    "one sample repeated and others later": (lambda x: x * 2, [REPEATED, X], torch.cat([X, REPEATED])),
}


def fill_with(function, batches, options):
    """Compute some batches, as another program does that fills a cache."""
    cached = torchcache(**options)(function)
    for part in batches:
        cached(part)
    assert cache_of(cached).flush()
    forget_environments()


@pytest.mark.parametrize("kind", HARD_TO_CHECK)
def test_require_answers_where_there_was_little_to_check(kind, cache_dir):
    function, fills, x = HARD_TO_CHECK[kind]

    def forward(x):
        return function(x)

    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    fill_with(forward, fills, options)
    requiring = torchcache(**options, mode="require")(forward)
    for _ in range(2):
        assert repr(requiring(x)) == repr(function(x))
    assert stats_of(requiring).misses == 0


@pytest.mark.parametrize("fills", [[X[:1]], [X[:1], X[1:2]], [REPEATED], [REPEATED[:1], REPEATED]], ids=len)
def test_require_does_not_believe_rows_of_other_batches_than_were_compared(fills, cache_dir):
    def forward(x):
        return x - x.mean(0)  # zeros in a batch of one, and in one of copies

    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    fill_with(forward, fills, options)
    requiring = torchcache(**options, mode="require")(forward)
    for x in (X, torch.cat([X, REPEATED]), torch.cat([X[:1], REPEATED[:1]])):
        with pytest.raises(CacheMissError):
            requiring(x)


def test_zeros_that_are_kept_answer_nothing_until_it_is_known_what_they_are(cache_dir):
    def forward(x):
        return (x - x.amax(0) - 1).clamp(min=0) + (x < 0) * x.sum(0)  # zeros, as long as all numbers are positive

    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    for _ in range(2):
        cached = torchcache(**options)(forward)
        for x in (X, X.flip(0), torch.cat([X[:2], -X]), X, torch.cat([X, -X[:1]])):
            assert torch.equal(cached(x), forward(x))
        assert stats_of(cached).hits == 0
        assert "rows_depend_on_batch" in stats_of(cached).bypasses
        cache_of(cached).close()
        forget_environments()


def test_require_gives_way_to_disabled(factor, cache_dir):
    scaled, sizes = make(factor, cache_dir, mode="require")
    with disabled():
        assert torch.equal(scaled(X), X * 2)
    assert sizes == [4]


def test_require_says_of_what_is_cached_that_its_class_is_not_known(cache_dir, monkeypatch):
    elsewhere = types.ModuleType("torchcache_test_elsewhere")
    elsewhere.Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - as others write them
    elsewhere.Pair.__module__ = elsewhere.__name__
    monkeypatch.setitem(sys.modules, elsewhere.__name__, elsewhere)

    def make(mode):
        @torchcache(mode=mode, persistent=True, persistent_cache_dir=cache_dir)
        def pair(x):
            return vars(importlib.import_module("torchcache_test_elsewhere"))["Pair"](x, x * 2)

        return pair

    writing = make("on")
    writing(X)
    writing.cache_instance.flush()
    with pytest.raises(CacheMissError, match="a class that this program does not know"):
        make("require")(X)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"persistent": True},
        {"persistent_cache_dir": "somewhere"},
        {"persistent": True, "persistent_cache_dir": "somewhere", "max_persistent_cache_size": 0},
    ],
)
def test_require_without_anything_that_could_answer_is_refused(options):
    with pytest.raises(ConfigError, match="persistent=True and persistent_cache_dir") as caught:
        torchcache(mode="require", **options)(nn.Linear(2, 2))
    assert caught.value.argument == "mode"


@pytest.mark.parametrize("options", [{"batch_dim": None}, {"batch_dim": 1}], ids=["one sample", "another dimension"])
def test_every_mode_holds_for_calls_of_another_kind(factor, cache_dir, options):
    requiring, sizes = make(factor, cache_dir, mode="require", **options)
    with pytest.raises(CacheMissError) as caught:
        requiring(X)
    assert len(caught.value.missing) == len(caught.value.explanation.samples)
    writing, _ = make(factor, cache_dir, **options)
    writing(X)
    assert writing.cache_instance.flush()
    assert torch.equal(requiring(X), X * 2)
    factor.write_text("3")
    refreshing, _ = make(factor, cache_dir, mode="refresh", **options)
    assert torch.equal(refreshing(X), X * 3)
    assert refreshing.cache_instance.flush()
    reading, _ = make(factor, cache_dir, mode="read", **options)
    assert torch.equal(reading(X), X * 3)
    assert (stats_of(reading).misses, sizes) == (0, [])


def test_refresh_replaces_what_stands_under_keys_of_the_users_own(factor, cache_dir):
    ids = ["a", "b", "c", "d"]
    for mode, text in (("on", "2"), ("refresh", "3"), ("read", "4")):
        factor.write_text(text)
        scaled, _ = make(factor, cache_dir, mode=mode)
        with sample_keys(ids):
            assert torch.equal(scaled(X), X * (2 if mode == "on" else 3))
        assert scaled.cache_instance.flush()


# -- per instance ---------------------------------------------------------------------------------------------------


def test_an_instance_has_a_mode_of_its_own(cache_dir):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = 2

        def forward(self, x):
            return x * self.factor

    writing, requiring = Doubled(), Doubled()
    requiring.torchcache_mode = "require"
    with pytest.raises(CacheMissError):
        requiring(X)
    writing(X)
    assert torch.equal(requiring(X), X * 2)
    assert stats_of(requiring).misses == 0
