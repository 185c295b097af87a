"""State that a first call settles: weights made anew and equal, and training flags that the call sets itself."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from torchcache import CacheMissError, cache_of, torchcache

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

ROWS = torch.rand(6, 3, 8, generator=torch.Generator().manual_seed(2))


# -- weights that hooks make anew at each call ----------


def pruned():
    layer = nn.Linear(8, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


MAKE = {
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(8, 4)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 4)),
    "prune": pruned,
}


@pytest.mark.parametrize("name", MAKE)
def test_an_equal_weight_made_anew_at_each_call_has_not_moved(name, cache_dir):
    for misses in (6, 0):
        torch.manual_seed(0)
        model = nn.Sequential(MAKE[name](), nn.ReLU()).eval().requires_grad_(False)
        expected = model(ROWS)
        model = torchcache(persistent=True, persistent_cache_dir=cache_dir)(model)
        for rows in (slice(0, 3), slice(3, 6), slice(0, 6)):
            assert torch.equal(model(ROWS[rows]), expected[rows])
        stats = cache_of(model).stats()
        assert (stats.misses, stats.dropped_rows) == (misses, {})
        cache_of(model).close()


def test_another_weight_made_by_a_hook_counts():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 4))).eval().requires_grad_(False)
    cached = torchcache()(model)
    before = cached(ROWS)
    assert torch.equal(cached(ROWS), before)
    with torch.no_grad():
        model[0].weight_g.mul_(2)
    after = cached(ROWS)
    assert not torch.equal(after, before)
    assert torch.equal(after, model[0](ROWS))
    assert torch.equal(cached(ROWS), after)


class ScaledByItsInput(nn.Module):
    """Makes a weight of its input, so that what a call leaves says nothing of the next one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)
        self.factor = torch.ones(1)

    def forward(self, x):
        y = self.layer(x) * self.factor
        self.factor = self.factor * (2 if x.sum() > 0 else 1)
        return y


def test_a_weight_that_differs_after_the_call_moves_the_state():
    torch.manual_seed(0)
    plain = ScaledByItsInput()
    torch.manual_seed(0)
    cached = torchcache()(ScaledByItsInput())
    for _ in range(4):
        for x in (ROWS, -ROWS, ROWS[:2]):
            assert torch.equal(cached(x), plain(x))


def test_a_weight_that_another_thread_writes_and_restores_during_the_call_has_moved():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.ones(8)

        def forward(self, x):
            # As if another thread trained: what is read here is not what is there before and after.
            thread = threading.Thread(target=self.weight.mul_, args=(2,))
            thread.start()
            thread.join()
            y = x * self.weight
            self.weight.div_(2)
            return y

    cached = torchcache()(Watched())
    for _ in range(2):
        cached(ROWS)
    assert cache_of(cached).stats().dropped_rows == {"state_moved": 12}


# -- training flags that the call sets itself ----------


class Encoder(nn.Module):
    """Calls ``eval()`` itself, as the encoders of sentence-transformers do."""

    def __init__(self, inner=None):
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)
        self.inner = nn.Sequential(nn.ReLU(), nn.Linear(4, 4)) if inner is None else inner

    def encode(self, x):
        self.eval()
        return self.forward(x)

    def forward(self, x):
        return self.inner(self.layer(x))


class Scaled(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x * 3


class Clamped(nn.Module):
    """Differs in training mode for large inputs only."""

    def forward(self, x):
        return x.clamp(-0.1, 0.1) if self.training else x


class LeftToTheParent(nn.Module):
    """Reads the flag of another module, of a class that does not read any."""

    def __init__(self):
        super().__init__()
        self.child = nn.Identity()

    def forward(self, x):
        return x * 2 if self.child.training else x * 3


class ByName(nn.Module):
    def forward(self, x):
        return x * 2 if getattr(self, "training") else x * 3  # noqa: B009 - that is the point


class ThroughAProperty(nn.Module):
    @property
    def factor(self):
        return 2 if self.training else 3

    def forward(self, x):
        return x * self.factor


class EvalAtTheEnd(Encoder):
    def encode(self, x):
        y = self.forward(x)
        self.eval()
        return y


class EvalForSome(Encoder):
    def encode(self, x):
        self.train(bool(x.sum() > 0))
        return self.forward(x)


def made(cls, *inner):
    torch.manual_seed(0)
    return cls(*[make() for make in inner]).requires_grad_(False)


def programs(make, cache_dir, modes, batches, **options):
    """Run several programs; return the counts of each, having compared each result with that without a cache."""
    counts = []
    for mode in modes:
        plain, model = make(), make()
        options = {**options, "persistent": True, "persistent_cache_dir": cache_dir, "mode": mode}
        encode = torchcache(**options)(model.encode)
        for x in batches:
            with torch.no_grad():
                expected = plain.encode(x)
            assert torch.allclose(encode(x), expected, atol=1e-6)
        counts.append(cache_of(encode).stats())
        cache_of(encode).close()
    return counts


def test_a_method_that_calls_eval_itself_computes_nothing_in_a_second_program(cache_dir):
    batches = [ROWS[:3], ROWS[3:], ROWS]
    first, second, third, required = programs(lambda: made(Encoder), cache_dir, ("on", "on", "on", "require"), batches)
    assert (first.misses, first.memory_hits, first.dropped_rows) == (6, 6, {})
    assert [counts.misses for counts in (second, third, required)] == [0, 0, 0]


def test_it_is_found_in_either_mode_and_explained(cache_dir):
    model = made(Encoder)
    encode = torchcache(persistent=True, persistent_cache_dir=cache_dir)(model.encode)
    encode(ROWS)
    cache_of(encode).flush()
    for is_training in (True, False):
        model.train(is_training)
        explanation = cache_of(encode).explain(ROWS)
        assert {sample.found_in for sample in explanation.samples} == {"memory"}
        assert model.training is is_training
        encode(ROWS)
    assert cache_of(encode).stats().misses == 6


@pytest.mark.parametrize("inner", [Scaled, Clamped, LeftToTheParent, ByName, ThroughAProperty])
@pytest.mark.parametrize("cls", [Encoder, EvalAtTheEnd, EvalForSome])
def test_flags_that_code_reads_are_never_passed_over(cls, inner, cache_dir):
    small = ROWS / 100
    batches = [small, ROWS, -ROWS, small[:2], -small, ROWS[2:]]
    for order in (batches, batches[::-1], batches[2:] + batches[:2]):
        # Rows are not compared, which would find some of it too.
        programs(lambda: made(cls, inner), cache_dir, ("on", "on"), order, check_rows=False)


def test_a_required_call_in_another_mode_says_so(cache_dir):
    programs(lambda: made(Encoder, Scaled), cache_dir, ("on",), [ROWS])
    with pytest.raises(CacheMissError):
        programs(lambda: made(Encoder, Scaled), cache_dir, ("require",), [ROWS])


def embedding(model):
    def embed(x):
        return model.encode(x)

    return embed


def test_a_function_around_it_is_cached_too(cache_dir):
    for misses in (6, 0):
        embed = torchcache(persistent=True, persistent_cache_dir=cache_dir)(embedding(made(Encoder)))
        for rows in (slice(0, 3), slice(3, 6), slice(0, 6)):
            embed(ROWS[rows])
        assert cache_of(embed).stats().misses == misses
        cache_of(embed).close()
