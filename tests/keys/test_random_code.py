"""Code that draws random numbers that no seed decides is computed at each call, in every form of a call."""

from __future__ import annotations

import logging
import os
import random
import secrets
import uuid

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset

from torchcache import CachedDataset, CachedIterableDataset, CacheMissError, cache_of, lazy, torchcache
from torchcache.keys.code import walk_code

X = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
CALLS = 4

SEED: int | None = None


def of_a_generator():
    generator = torch.Generator()
    generator.seed()
    return torch.rand(1, generator=generator).item()


DRAWS = {
    "os.urandom": lambda: int.from_bytes(os.urandom(4), "big") / 2**32,
    "secrets.randbelow": lambda: secrets.randbelow(2**32) / 2**32,
    "uuid.uuid4": lambda: uuid.uuid4().int % 2**32 / 2**32,
    "random.SystemRandom": lambda: random.SystemRandom().random(),
    "random.Random": lambda: random.Random().random(),
    "numpy.random.default_rng": lambda: np.random.default_rng().random(),
    "numpy.random.RandomState": lambda: np.random.RandomState(SEED).rand(),
    "numpy.random.SeedSequence": lambda: np.random.SeedSequence().entropy % 2**32 / 2**32,
    "numpy.random.PCG64": lambda: np.random.Generator(np.random.PCG64()).random(),
    "seed()": of_a_generator,
}
SEEDED = {
    "random.Random": lambda: random.Random(3).random(),
    "numpy.random.default_rng": lambda: np.random.default_rng(3).random(),
    "torch.Generator": lambda: torch.rand(1, generator=torch.Generator().manual_seed(3)).item(),
}


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + self.draw()


class Encoder:
    def __init__(self, draw):
        self.draw = draw

    def encode(self, x):
        return x + self.draw()


class Samples(Dataset):
    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[i] + self.draw()


class Stream(IterableDataset):
    """Yields its samples in another order at each epoch."""

    def __iter__(self):
        for i in np.random.default_rng().permutation(3):
            yield int(i), X[i]


class Shuffled(Samples):
    """Is asked for samples by index, and can be iterated over in another order at each epoch."""

    def __iter__(self):
        return map(self.__getitem__, np.random.default_rng().permutation(3))


def function(draw):
    def noisy(x):
        return x + draw()

    return noisy


def calling(cached):
    return lambda: cached(X), cached


def forms():
    """Return for each form of a call what makes it of what draws: what to call, and what has the cache."""

    def of_method(draw):
        encoder = Encoder(draw)
        encoder.encode = torchcache()(encoder.encode)
        return lambda: encoder.encode(X), encoder.encode

    def of_dataset(dataset):
        return lambda: torch.stack([dataset[i] for i in range(3)]), dataset

    def of_stream(draw):
        dataset = CachedIterableDataset(Stream(), deterministic=lambda sample: sample + draw())
        return lambda: torch.stack(sorted(dataset, key=lambda sample: sample[0].item())), dataset

    return {
        "function": lambda draw: calling(torchcache()(function(draw))),
        "module": lambda draw: calling(torchcache()(Noisy(draw))),
        "method": of_method,
        "whole call": lambda draw: calling(torchcache(batch_dim=None)(function(draw))),
        "dataset": lambda draw: of_dataset(CachedDataset(Samples(draw))),
        "part of a dataset": lambda draw: of_dataset(CachedDataset(Subset(Shuffled(draw), [0, 1, 2]))),
        "deterministic=": lambda draw: of_dataset(CachedDataset(list(X), deterministic=lambda sample: sample + draw())),
        "iterable dataset": of_stream,
    }


FORMS = forms()


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("form", FORMS)
def test_what_no_seed_decides_is_drawn_at_each_call(form, draw):
    call, cached = FORMS[form](DRAWS[draw])
    results = [call() for _ in range(CALLS)]
    for i in range(CALLS):
        for j in range(i):
            assert not torch.equal(results[i], results[j])
    stats = cache_of(cached).stats()
    calls = CALLS * (3 if "dataset" in form or form == "deterministic=" else 1)
    assert (stats.hits, stats.misses, stats.bypasses) == (0, 0, {"random_numbers": calls})


GENERATOR = torch.Generator()
OF_TORCH = {
    "torch.seed": lambda x: x + torch.seed(),
    "torch.cuda.seed": lambda x: x + torch.cuda.seed(),
    "torch.cuda.seed_all": lambda x: x + torch.cuda.seed_all(),
    "torch.mps.seed": lambda x: x + torch.mps.seed(),
    "torch.xpu.seed": lambda x: x + torch.xpu.seed(),
    "torch.Generator.seed": lambda x: x + GENERATOR.seed(),
    "seed()": lambda x: x + torch.Generator().seed(),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_generators_of_torch_that_choose_a_seed_are_found(name):
    assert walk_code(OF_TORCH[name]).draws.sources == (name,)


def test_generators_of_torch_that_are_given_a_seed_are_not():
    def target(x):
        GENERATOR.manual_seed(3)
        return x + torch.rand(1, generator=torch.Generator().manual_seed(0)) + torch.initial_seed()

    assert walk_code(target).draws.sources == ()


class Held(nn.Module):
    """Draws from what it holds."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        draw = self.held[0] if isinstance(self.held, list) else self.held
        return x + draw().int % 2**32 / 2**32


@pytest.mark.parametrize("held", [uuid.uuid4, [uuid.uuid4]], ids=["function", "list"])
def test_what_the_state_holds_of_entropy_is_drawn_at_each_call(held):
    module = torchcache()(Held(held))
    assert not torch.equal(module(X), module(X))
    assert cache_of(module).stats().bypasses == {"random_numbers": 2}


def test_a_hook_that_draws_is_found():
    module = nn.Sequential(nn.Identity())
    module[0].register_forward_hook(lambda module, args, output: output + DRAWS["uuid.uuid4"]())
    module = torchcache()(module)
    assert not torch.equal(module(X), module(X))
    assert cache_of(module).stats().bypasses == {"random_numbers": 2}


@pytest.mark.parametrize("draw", SEEDED)
@pytest.mark.parametrize("form", FORMS)
def test_what_a_seed_decides_is_cached(form, draw):
    call, cached = FORMS[form](SEEDED[draw])
    results = [call() for _ in range(CALLS)]
    assert all(torch.equal(result, results[0]) for result in results)
    stats = cache_of(cached).stats()
    assert not stats.bypasses
    assert stats.hits >= CALLS - 1


def test_the_line_names_what_draws_and_what_to_do(caplog):
    caplog.set_level(logging.WARNING)
    for form in "module", "dataset":
        call, _ = FORMS[form](DRAWS["uuid.uuid4"])
        call()
        call()
    ours, of_dataset = (record.getMessage() for record in caplog.records)
    assert "(random_numbers: uuid.uuid4)" in ours
    assert "(random_numbers: uuid.uuid4)" in of_dataset
    assert "draw them outside of the cached code" in ours
    assert "augment=" in of_dataset
    assert all("persistent_module_hash" in line for line in (ours, of_dataset))


def test_what_is_only_noticed_when_it_runs_is_said_as_before(caplog):
    cached = torchcache()(lambda x: x + random.random())
    cached(X)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "random numbers were drawn while the call ran" in line


def test_a_name_of_the_users_own_vouches_for_the_code():
    module = torchcache(persistent_module_hash="noisy-1")(Noisy(DRAWS["uuid.uuid4"]))
    dataset = CachedDataset(Samples(DRAWS["uuid.uuid4"]), persistent_module_hash="samples-1")
    assert torch.equal(module(X), module(X))
    assert torch.equal(dataset[1], dataset[1])
    for cached in module, dataset:
        assert not cache_of(cached).stats().bypasses


def test_a_seed_that_becomes_none_is_noticed(monkeypatch):
    cached = torchcache()(function(DRAWS["numpy.random.RandomState"]))
    for seed in (1, None, 2):
        monkeypatch.setitem(globals(), "SEED", seed)
        is_drawn = not torch.equal(cached(X), cached(X))
        assert is_drawn == (seed is None)
    assert cache_of(cached).stats().bypasses == {"random_numbers": 2}


def test_code_that_comes_to_draw_is_noticed():
    module = torchcache()(Noisy(SEEDED["random.Random"]))
    assert torch.equal(module(X), module(X))
    module.draw = DRAWS["random.Random"]
    assert not torch.equal(module(X), module(X))
    assert cache_of(module).stats().bypasses == {"random_numbers": 2}


def test_mode_require_raises_and_says_why(cache_dir):
    module = torchcache(mode="require", persistent=True, persistent_cache_dir=cache_dir)(Noisy(DRAWS["uuid.uuid4"]))
    with pytest.raises(CacheMissError, match=r"uuid\.uuid4"):
        module(X)


def test_explain_says_so():
    module = torchcache()(Noisy(DRAWS["uuid.uuid4"]))
    assert cache_of(module).explain(X).bypass_reason == "random_numbers"


def test_warm_counts_what_is_not_stored():
    warmed = CachedDataset(Samples(DRAWS["uuid.uuid4"])).warm(progress=False)
    assert (warmed.found, warmed.computed, warmed.not_stored) == (0, 0, 3)


class Named(nn.Module):
    """Draws a name when it is made, and tells others."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.tell = uuid.uuid4().int >= 0

    def forward(self, x):
        return self.linear(x) if self.tell else x

    def push(self):
        return uuid.uuid4()


def make_named():
    return Named()


@pytest.mark.parametrize("make", [Named, make_named])
def test_a_model_that_draws_only_when_it_is_made_is_cached(make):
    torch.manual_seed(0)
    for module in torchcache()(make().requires_grad_(False)), lazy(make):
        with torch.no_grad():
            assert torch.equal(module(X), module(X))
        stats = cache_of(module).stats()
        assert (stats.hits, stats.misses, stats.bypasses) == (3, 3, {})


def test_a_lazy_model_whose_forward_draws_is_computed_at_each_call():
    module = lazy(lambda: Noisy(DRAWS["uuid.uuid4"]))
    results = [module(X) for _ in range(CALLS)]
    assert len({tuple(result.flatten().tolist()) for result in results}) == CALLS
    stats = cache_of(module).stats()
    assert (stats.hits, stats.misses, stats.bypasses) == (0, 0, {"random_numbers": CALLS})
