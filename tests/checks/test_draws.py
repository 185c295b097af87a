"""Random numbers from generators that state leads to: what they shape is not frozen, what they do not shape is kept."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchcache import CachedDataset, cache_of, torchcache
from torchcache.checks.draws import Draws
from torchcache.keys.fast import random_states

X = torch.arange(1.0, 7.0).reshape(2, 3)

GENERATORS = {
    "random": random.Random,
    "numpy": np.random.default_rng,
    "legacy": np.random.RandomState,
    "bits": lambda seed=None: np.random.Generator(np.random.PCG64(seed)),
    "torch": lambda seed=None: _torch_generator(seed),
}


def _torch_generator(seed):
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


def drawn(generator):
    """Draw a number from a generator of any library."""
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random() if not isinstance(generator, np.random.RandomState) else generator.rand())


class Transform:
    """As libraries of augmentations have them: with a generator of its own, asked at each call."""

    def __init__(self, p, rng=None):
        self.p, self.rng = p, rng or random.Random()

    def __call__(self, sample):
        return -sample if self.rng.random() < self.p else sample


class Samples(Dataset):
    def __init__(self, *transforms):
        self.transforms = [*transforms]
        self.asked = []

    def __len__(self):
        return 4

    def __getitem__(self, i):
        sample = torch.full((2,), i + 1.0)
        for transform in self.transforms:
            sample = transform(sample)
        return sample


def _in_a_fork(x):
    with torch.random.fork_rng():
        return x + torch.randn(x.shape[1:])


def _put_back_in_torch(x):
    state = torch.get_rng_state()
    noise = torch.rand(())
    torch.set_rng_state(state)
    return x * noise


def _put_back_in_numpy(x):
    state = np.random.get_state()  # noqa: NPY002
    noise = np.random.rand()  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    return x * noise


def _put_back_in_python(x):
    state = random.getstate()
    noise = random.random()
    random.setstate(state)
    return x * noise


@pytest.mark.parametrize("function", [_in_a_fork, _put_back_in_torch, _put_back_in_numpy, _put_back_in_python])
@pytest.mark.parametrize("n", [2, 6])
def test_who_draws_and_puts_the_generator_back_as_it_was_is_not_frozen(function, n):
    cached = torchcache()(function)
    x = torch.randn(n, 3)
    for seed in (5, 6, 7, 6):
        for generator in (torch.manual_seed, np.random.seed, random.seed):
            generator(seed)
        result = cached(x)
        for generator in (torch.manual_seed, np.random.seed, random.seed):
            generator(seed)
        assert torch.equal(result, function(x))
    assert cache_of(cached).stats().hits == 0
    assert set(cache_of(cached).stats().bypasses) == {"random_numbers"}


def _project(x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x @ torch.randn(3, 3)


def test_a_check_of_rows_leaves_the_generators_of_everybody_as_they_were():
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(3)
    expected = torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), [random.gauss(0, 1) for _ in range(3)]  # noqa: NPY002
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(3)
    numbers = torch.rand(1).tolist(), np.random.standard_normal(1).tolist(), [random.gauss(0, 1)]  # noqa: NPY002
    torchcache()(_project)(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    numbers[0].extend(torch.rand(2).tolist())
    numbers[1].extend(np.random.standard_normal(2).tolist())  # noqa: NPY002
    numbers[2].extend(random.gauss(0, 1) for _ in range(2))
    assert numbers == expected


def test_who_seeds_the_generator_in_a_fork_hits():
    cached = torchcache()(_project)
    x = torch.randn(6, 3)
    for _ in range(2):
        assert torch.equal(cached(x), _project(x))
    assert cache_of(cached).stats().hits == 6


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_drawn_from_a_generator_in_the_state_is_never_frozen(kind, seed):
    generator = GENERATORS[kind](seed)

    def noisy(x):
        return x + drawn(generator)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = {"deep": [generator]}

        def forward(self, x):
            return noisy(x)

    dataset = CachedDataset(Samples(lambda sample: sample + drawn(generator)))
    for call in (torchcache()(noisy), torchcache()(Noisy()), torchcache(batch_dim=None)(noisy), lambda _: dataset[1]):
        results = {call(X).flatten()[0].item() for _ in range(6)}
        assert len(results) == 6


@pytest.mark.parametrize("kind", GENERATORS)
def test_an_unseeded_generator_that_nobody_draws_from_is_no_part_of_the_key(kind, cache_dir):
    class Holds(nn.Module):
        def forward(self, x):
            return x * 2

    first, second = (torchcache(persistent=True, persistent_cache_dir=cache_dir)(Holds()) for _ in range(2))
    first.generator, second.generator = GENERATORS[kind](), GENERATORS[kind]()
    first(X)
    cache_of(first).close()
    second(X)
    assert cache_of(second).stats().store_hits == 2
    drawn(second.generator)
    second(X)
    assert cache_of(second).stats().misses == 0
    cache_of(second).close()


def test_a_generator_s_state_counts_where_code_copies_it():
    generator = random.Random(1)

    @torchcache()
    def peeks(x):
        return x * copy.deepcopy(generator).random()

    first = peeks(X)
    assert torch.equal(peeks(X), first)
    generator.seed(2)
    assert torch.equal(peeks(X), X * random.Random(2).random())


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_seed_of_a_generator_counts(kind):
    held = [GENERATORS[kind](1)]

    def look(x):
        return x * len(held)

    one, other = torchcache(version="a")(look), torchcache(version="a")(look)
    one(X)
    held[0] = GENERATORS[kind](2)
    assert cache_of(one).explain(X).namespace == cache_of(other).explain(X).namespace
    one(X)
    assert cache_of(one).stats().misses == 4


def test_children_of_a_generator_are_never_frozen():
    generator = np.random.default_rng()

    @torchcache(batch_dim=None)
    def spawning(x):
        return x + generator.spawn(1)[0].random()

    assert len({spawning(X)[0, 0].item() for _ in range(5)}) == 5


def test_a_draw_that_decides_nothing_does_not_keep_a_sample_from_the_cache(tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path}
    first = CachedDataset(Samples(Transform(1.0), Transform(0.0)), **options)
    right = [-(i + 1.0) for i in range(4)]
    assert [first[i][0].item() for i in range(4)] == right
    assert first.cache_instance.stats().misses == 4
    assert first.cache_instance.stats().bypasses == {}
    first.cache_instance.close()
    again = CachedDataset(Samples(Transform(1.0), Transform(0.0)), **options)
    assert [again[i][0].item() for i in range(4)] == right
    assert again.cache_instance.stats().store_hits == 4
    again.cache_instance.close()


@pytest.mark.parametrize("p", [0.02, 0.5, 0.98])
def test_a_draw_that_decides_something_keeps_a_sample_from_the_cache(p):
    cached = CachedDataset(Samples(Transform(1.0), Transform(p)))
    for i in (0, 1, 2, 3) * 3:
        cached[i]
    assert cached.cache_instance.stats().memory_rows == 0


def test_trying_other_draws_leaves_the_generator_as_it_would_be():
    plain, tried = random.Random(5), random.Random(5)
    draws = Draws([tried])
    assert not draws.are_there()
    assert plain.gauss(0, 1) == tried.gauss(0, 1)
    assert draws.can_be_tried()
    edges = [[tried.random() for _ in range(3)] for _ in draws.tries()]
    assert edges[0] == [0.0] * 3
    assert min(edges[1]) > 1 - 1e-9
    assert plain.gauss(0, 1) == tried.gauss(0, 1)
    assert plain.random() == tried.random()


def test_loops_that_draw_until_they_like_the_number_come_to_an_end():
    generator = random.Random(1)

    @torchcache(batch_dim=None)
    def picky(x):
        while not 0.3 < generator.random() < 0.7:
            pass
        return x

    for _ in range(3):
        assert torch.equal(picky(X), X)
    assert cache_of(picky).stats().hits == 2


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_do_not_freeze_what_their_copies_draw(start):
    cached = CachedDataset(Samples(Transform(0.5)))
    loader = DataLoader(cached, batch_size=4, num_workers=1, multiprocessing_context=start, persistent_workers=True)
    seen = {tuple(batch[:, 0].tolist()) for _ in range(12) for batch in loader}
    assert len(seen) > 2


DRAWS = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.shuffle([1, 2, 3]),
    "seed": lambda: random.seed(random.getrandbits(60)),
    "numpy": np.random.rand,
    "normal": np.random.standard_normal,
    "permutation": lambda: np.random.permutation(3),  # noqa: NPY002
    "numpy seed": lambda: np.random.seed(random.getrandbits(30)),  # noqa: NPY002
    "torch": lambda: torch.rand(()),
    "torch normal": lambda: torch.randn(()),
    "torch seed": torch.seed,
}


@pytest.fixture(params=["where the states lie", "by asking"])
def reads(request, monkeypatch):
    """Read the states in both ways; both are there in this Python and NumPy."""
    assert random_states.IS_PYTHON_SUPPORTED
    assert random_states.IS_NUMPY_SUPPORTED
    if request.param == "by asking":
        monkeypatch.setattr(random_states, "IS_PYTHON_SUPPORTED", False)
        monkeypatch.setattr(random_states, "IS_NUMPY_SUPPORTED", False)


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("kind", DRAWS)
def test_each_draw_from_a_global_generator_is_seen(kind):
    for _ in range(4):  # of two normal numbers that are made at once, the second waits
        draws = Draws([])
        assert not draws.are_there()
        DRAWS[kind]()
        assert draws.are_there()


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.PCG64])
def test_each_normal_number_of_a_legacy_generator_is_seen(bits):
    generator = np.random.RandomState(bits(1))
    for draw in (generator.standard_normal, generator.rand, lambda: generator.binomial(9, 0.3)) * 3:
        draws = Draws([generator])
        assert not draws.are_there()
        draw()
        assert draws.are_there()


@pytest.mark.usefixtures("reads")
def test_a_generator_that_goes_back_to_its_state_has_drawn_nothing():
    generator = random.Random(1)
    draws = Draws([generator])
    state, before = random.getstate(), generator.getstate()
    generator.random()
    random.random()
    random.setstate(state)
    generator.setstate(before)
    assert not draws.are_there()


def test_a_derived_generator_is_asked():
    class Own(random.Random):
        def __init__(self):
            super().__init__(1)
            self.position = 0

        def random(self):
            self.position += 1
            return 0.5

        def getstate(self):
            return self.position

    generator = Own()
    draws = Draws([generator])
    generator.random()
    assert draws.are_there()
