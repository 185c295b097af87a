"""``verify_hits`` computes a share of the hits again, and replaces what differs."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from torchcache import ConfigError, cache_of, torchcache


def stats_of(target):
    return cache_of(target).stats()


def make(path, **options):
    """Decorate a function that reads what it multiplies with from a file, of which the key knows nothing."""
    name, sizes = str(path), []

    @torchcache(**{"check_rows": False, **options})
    def scaled(x):
        sizes.append(len(x))
        return x * float(Path(name).read_text())

    return scaled, sizes


X = torch.arange(12.0).reshape(4, 3) + 1


@pytest.fixture
def factor(tmp_path):
    path = tmp_path / "factor"
    path.write_text("2")
    return path


def test_all_hits_are_computed_again_with_a_share_of_one(factor):
    scaled, sizes = make(factor, verify_hits=1.0)
    scaled(X)
    assert torch.equal(scaled(X), X * 2)
    stats = stats_of(scaled)
    assert (stats.misses, stats.memory_hits, stats.verified_rows, stats.mismatched_rows) == (4, 4, 4, 0)
    assert sizes == [4, 4]


def test_a_share_of_the_hits_is_computed_again(factor):
    scaled, _ = make(factor, verify_hits=0.1)
    x = torch.randn(500, 3)
    scaled(x)
    for _ in range(4):
        scaled(x)
    assert 100 < stats_of(scaled).verified_rows < 320  # 200 expected, sigma 13


def test_without_the_option_no_hit_is_computed_again(factor):
    scaled, sizes = make(factor)
    for _ in range(5):
        scaled(X)
    assert sizes == [4]


def test_a_hit_that_differs_is_said_once_counted_and_replaced(factor, caplog):
    scaled, _ = make(factor, verify_hits=1.0)
    scaled(X)
    factor.write_text("3")
    assert torch.equal(scaled(X), X * 3)
    assert torch.equal(scaled(X), X * 3)
    stats = stats_of(scaled)
    assert (stats.verified_rows, stats.mismatched_rows) == (8, 4)
    assert sum("computed again" in line for line in caplog.messages) == 1
    assert not stats.bypasses


def test_a_difference_within_the_tolerance_is_kept(factor):
    scaled, _ = make(factor, verify_hits=1.0)
    scaled(X)
    factor.write_text("2.001")
    assert torch.equal(scaled(X), torch.as_tensor(X * 2.001)) or torch.equal(scaled(X), X * 2)
    assert stats_of(scaled).mismatched_rows == 0


@pytest.mark.parametrize("memory", [0, 1e9])
def test_a_record_that_differs_is_replaced_on_disk(factor, cache_dir, memory):
    options = {"persistent": True, "persistent_cache_dir": cache_dir, "max_memory_cache_size": memory}
    scaled, _ = make(factor, **options)
    scaled(X)
    cache_of(scaled).close()
    factor.write_text("3")
    scaled, _ = make(factor, **options, verify_hits=1.0)
    assert torch.equal(scaled(X), X * 3)
    assert stats_of(scaled).store_hits == stats_of(scaled).mismatched_rows == 4
    cache_of(scaled).close()
    scaled, sizes = make(factor, **options)
    assert torch.equal(scaled(X), X * 3)
    assert stats_of(scaled).store_hits == 4
    assert sizes == []
    cache_of(scaled).close()


def test_hits_are_verified_beside_missing_rows_in_one_call(factor):
    scaled, sizes = make(factor, verify_hits=1.0, check_rows=False)
    scaled(X)
    x = torch.cat([X[1:], X[:2] + 100, X[:1]])
    assert torch.equal(scaled(x), x * 2)
    assert sizes == [4, 6]
    assert stats_of(scaled).verified_rows == 4


def test_an_audit_that_fails_costs_nobody_the_hit(tmp_path):
    path = tmp_path / "factor"
    path.write_text("2")
    scaled, _ = make(path, verify_hits=1.0)
    scaled(X)
    path.unlink()
    assert torch.equal(scaled(X), X * 2)
    assert torch.equal(scaled(X[:2]), X[:2] * 2)
    stats = stats_of(scaled)
    assert (stats.memory_hits, stats.faults, stats.bypasses) == (6, {"verify_hits": 2}, {})


def test_neither_choosing_nor_checking_draws_from_a_global_generator(factor):
    scaled, _ = make(factor, verify_hits=0.5)
    scaled(X)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for i in range(4):
        scaled(X + i % 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize("value", [-0.1, 1.1, True, "1%", None, float("nan")])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(ConfigError, match=r"verify_hits=.*share between 0 and 1"):
        torchcache(verify_hits=value)
