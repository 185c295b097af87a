"""A model that need not exist: built at the first miss, known by what it was before."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from torchcache import CacheMissError, ConfigError, cache_of, lazy

BUILT: list[str] = []


class _Noting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        BUILT.append(record.getMessage())


logging.getLogger("tests.built").addHandler(_Noting())
logging.getLogger("tests.built").setLevel(logging.INFO)
logging.getLogger("tests.built").propagate = False


class Encoder(nn.Module):
    def __init__(self, seed: int = 0, width: int = 4) -> None:
        super().__init__()
        logging.getLogger("tests.built").info("%s %s", seed, width)  # no state that the factory refers to
        self.linear = nn.Linear(3, width)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.linear(x) * scale


def encoder() -> nn.Module:
    return Encoder()


WEIGHTS = Path()


def loaded() -> nn.Module:
    """Make an encoder as a checkpoint says."""
    model = Encoder()
    model.load_state_dict(torch.load(WEIGHTS))
    return model


@pytest.fixture(autouse=True)
def nothing_built():
    del BUILT[:]


@pytest.fixture
def options(tmp_path):
    return {"persistent": True, "persistent_cache_dir": tmp_path / "cache"}


def batch(n=6, start=0):
    return torch.arange(start, start + 3 * n, dtype=torch.float32).reshape(n, 3)


def warm(factory, options, x=None, **kwargs):
    module = lazy(factory, **options)
    result = module(batch() if x is None else x, **kwargs)
    cache_of(module).flush()
    cache_of(module).close()
    return result


def test_the_model_is_built_at_the_first_miss(options):
    module = lazy(encoder, **options)
    assert BUILT == []
    assert not module.is_built
    assert torch.equal(module(batch()), encoder()(batch()))
    assert module.is_built
    module(batch())
    assert len(BUILT) == 2


def test_it_works_in_memory_alone():
    module = lazy(encoder)
    first = module(batch())
    assert torch.equal(module(batch()), first)
    assert cache_of(module).stats().misses == 6


def test_with_a_warm_cache_it_is_never_built(options):
    expected = warm(encoder, options)
    del BUILT[:]
    module = lazy(encoder, **options)
    assert torch.equal(module(batch()), expected)
    assert torch.equal(module(batch()[[4, 1]]), expected[[4, 1]])
    assert (BUILT, module.is_built) == ([], False)
    assert cache_of(module).stats().misses == 0


def test_what_is_missing_later_builds_it_and_the_rest_still_hits(options):
    expected = warm(encoder, options)
    module = lazy(encoder, **options)
    del BUILT[:]
    result = module(batch(8))
    assert torch.equal(result[:6], expected)
    assert torch.equal(result, encoder()(batch(8)))
    assert cache_of(module).stats().misses == 2
    assert len(BUILT) == 2


def test_training_without_the_encoder(options):
    expected = warm(encoder, options)
    del BUILT[:]
    module = lazy(encoder, **options, mode="require")
    model = nn.Sequential(module, nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        loss = model(batch()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(module(batch()), expected)
    with pytest.raises(CacheMissError):
        module(batch(8))
    assert BUILT == []


def test_an_empty_cache_says_so_instead_of_building(options):
    module = lazy(encoder, **options, mode="require")
    with pytest.raises(CacheMissError):
        module(batch())
    assert BUILT == []


def test_explain_builds_nothing(options):
    module = lazy(encoder, **options)
    explanation = cache_of(module).explain(batch())
    assert [sample.found_in for sample in explanation.samples] == ["nowhere"] * 6
    warm(encoder, options)
    del BUILT[:]
    explanation = cache_of(module).explain(batch())
    assert [sample.found_in for sample in explanation.samples] == ["store"] * 6
    assert cache_of(module).cache_dir is not None
    assert BUILT == []


def test_another_program_finds_what_was_computed(options):
    expected = warm(encoder, options)
    code = (
        "import sys, torch; from tests.doors import test_lazy; from torchcache import lazy\n"
        "module = lazy(test_lazy.encoder, persistent=True, persistent_cache_dir=sys.argv[1], mode='require')\n"
        "print(float(module(test_lazy.batch()).sum()), test_lazy.BUILT)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, options["persistent_cache_dir"]], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1:] == ["[]"]
    assert float(done.stdout.split()[0]) == float(expected.sum())


# -- what it is known by ----------


@pytest.mark.parametrize(
    "other",
    [
        functools.partial(Encoder, 1),
        functools.partial(Encoder, width=5),
        lambda: Encoder(seed=1),
        lambda: nn.Sequential(Encoder(), nn.ReLU()),
    ],
)
def test_another_factory_shares_nothing(options, other):
    warm(encoder, options)
    module = lazy(other, **options, mode="require")
    with pytest.raises(CacheMissError):
        module(batch())


def test_equal_partials_share(options):
    warm(functools.partial(Encoder, 3, width=5), options)
    module = lazy(functools.partial(Encoder, 3, width=5), **options, mode="require")
    assert module(batch()).shape == (6, 5)


def test_plain_arguments_autocast_and_dtype_count(options):
    module = lazy(encoder, **options)
    x = batch()
    plain = module(x)
    assert torch.equal(module(x, scale=2.0), plain * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    doubled = lazy(encoder, **options).double()
    assert doubled(x.double()).dtype == torch.float64
    assert torch.equal(module(x), plain)
    assert cache_of(module).stats().misses == 18


def test_a_checkpoint_that_has_changed_is_said_and_starts_afresh(options, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys.modules[__name__], "WEIGHTS", tmp_path / "weights.pt")
    torch.save(Encoder(1).state_dict(), WEIGHTS)
    old = warm(loaded, options)
    torch.save(Encoder(2).state_dict(), WEIGHTS)
    module = lazy(loaded, **options)
    assert torch.equal(module(batch()), old)  # files are not looked at before it is built
    new = module(batch(8))
    assert torch.equal(new, Encoder(2)(batch(8)))
    assert "built another model" in caplog.text
    assert torch.equal(module(batch()), new[:6])
    cache_of(module).flush()
    cache_of(module).close()
    del BUILT[:]
    assert torch.equal(lazy(loaded, **options, mode="require")(batch(8)), new)
    assert BUILT == []


def test_weights_that_are_changed_by_hand_are_not_what_the_factory_makes(options):
    module = lazy(encoder, **options)
    first = module(batch())
    module.model.linear.weight.add_(1)
    changed = module(batch())
    assert not torch.equal(changed, first)
    cache_of(module).flush()
    cache_of(module).close()
    assert torch.equal(lazy(encoder, **options, mode="require")(batch()), first)


def test_weights_that_are_changed_where_torch_counts_nothing_are_not_what_the_factory_makes_either(options):
    module = lazy(encoder, **options)
    first = module(batch())
    module.model.linear.weight.data[1, 1] = 5
    changed = module(batch())
    assert not torch.equal(changed, first)
    cache_of(module).flush()
    cache_of(module).close()
    assert torch.equal(lazy(encoder, **options, mode="require")(batch()), first)


def test_version_starts_afresh(options):
    warm(encoder, options)
    with pytest.raises(CacheMissError):
        lazy(encoder, **options, version="2", mode="require")(batch())


# -- as a module ----------


@pytest.mark.parametrize("is_built", [False, True])
def test_parameters_and_state_are_empty_and_say_where_they_are(is_built, caplog):
    module = lazy(encoder)
    if is_built:
        module(batch())
    assert list(module.parameters()) == []
    assert "ask .model.parameters()" in caplog.text
    assert module.state_dict() == {}
    assert "ask .model.state_dict()" in caplog.text
    assert len(list(module.model.parameters())) == 2


def test_the_state_of_what_contains_it_leaves_it_out_without_a_word(caplog):
    outer = nn.Sequential(lazy(encoder), nn.Linear(4, 2))
    before = outer.state_dict()
    outer(batch())
    assert list(outer.state_dict()) == list(before) == ["1.weight", "1.bias"]
    outer.load_state_dict(before)
    assert len(list(outer.parameters())) == 2
    assert ".model" not in caplog.text


def test_train_does_not_reach_it():
    outer = nn.Sequential(lazy(lambda: nn.Sequential(Encoder(), nn.Dropout(0.5)).eval()), nn.Linear(4, 2))
    outer.train()
    outer(batch())
    assert not outer[0].model.training
    assert dict(cache_of(outer[0]).stats().bypasses) == {}


@pytest.mark.parametrize("when", ["before", "after"])
def test_to_reaches_it(when):
    module = lazy(encoder)
    if when == "after":
        module(batch())
    module.to(torch.bfloat16)
    assert module(batch().bfloat16()).dtype == torch.bfloat16
    assert module.model.linear.weight.dtype == torch.bfloat16


def test_a_model_that_moved_nowhere_stays_as_its_factory_made_it():
    assert lazy(lambda: Encoder().double()).model.linear.weight.dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_a_cache_of_its_own_and_no_model(options, copied):
    module = lazy(encoder, **options)
    first = module(batch())
    cache_of(module).flush()
    other = copied(nn.Sequential(module))[0]
    assert not other.is_built
    assert cache_of(other) is not cache_of(module)
    assert torch.equal(other(batch()), first)
    assert not other.is_built


def test_two_threads_build_it_once():
    module, ready = lazy(encoder), threading.Barrier(4)

    def call(start):
        ready.wait()
        module(batch(2, start))

    threads = [threading.Thread(target=call, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(BUILT) == 1


def test_switched_off_it_is_the_model():
    module = lazy(encoder, enabled=False)
    assert torch.equal(module(batch()), encoder()(batch()))
    with pytest.raises(ConfigError, match="has no cache"):
        cache_of(module)


def test_an_error_of_the_factory_is_the_caller_s():
    def fails():
        raise OSError("no such checkpoint")

    module = lazy(fails)
    for _ in range(2):
        with pytest.raises(OSError, match="no such checkpoint"):
            module(batch())


@pytest.mark.parametrize(
    "factory", [nn.Linear(1, 1), "minilm", None, [].copy, functools.partial(Encoder, (i for i in ()))]
)
def test_what_is_no_factory_is_refused(factory):
    with pytest.raises(ConfigError, match=r"lazy") as refused:
        lazy(factory)
    assert refused.value.argument == "factory"


def test_a_factory_that_returns_something_else_is_refused():
    with pytest.raises(ConfigError, match="returned int, and must return"):
        lazy(lambda: 3)(batch())


def test_padded_batches_and_own_keys_work(options):
    def masked():
        class Masked(nn.Module):
            def forward(self, ids, mask):
                return ids * mask

        return Masked()

    module = lazy(masked, **options, padded={"ids": "mask"})
    ids = torch.tensor([[1.0, 2, 0]])
    module(ids=ids, mask=ids != 0)
    ids = torch.tensor([[1.0, 2, 0, 0]])
    assert torch.equal(module(ids=ids, mask=ids != 0), ids)
    assert cache_of(module).stats().misses == 1


def test_a_lazy_module_is_turned_off_and_on_as_every_module_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = lazy(encoder), torch.rand(3, 3)
    before = module(x)
    module.torchcache_enabled = False
    assert torch.equal(module(x), before)
    assert not hasattr(module, "cache_instance")
    with pytest.raises(ConfigError, match="has no cache"):
        cache_of(module)
    module.torchcache_enabled = True
    assert torch.equal(module(x), before)
    assert cache_of(module).stats().memory_hits == 3
    del module.torchcache_enabled
    monkeypatch.setattr(type(module), "torchcache_enabled", False, raising=False)
    assert not hasattr(module, "cache_instance")
    monkeypatch.undo()
    replica = module._replicate_for_data_parallel()
    assert torch.equal(replica(x), before)
    assert not hasattr(replica, "cache_instance")


def test_options_of_a_lazy_module_may_be_attributes() -> None:
    module = lazy(encoder, enabled=False)
    module.torchcache_enabled, module.torchcache_version = True, "2"
    assert cache_of(module).options.version == "2"


def test_options_that_attributes_set_are_checked_together() -> None:
    module = lazy(encoder)
    module.torchcache_zstd_compression = True
    with pytest.raises(ConfigError, match="zstd_compression=True has no effect without persistent=True"):
        module(batch())


def test_a_shallow_copy_of_a_lazy_module_builds_its_own() -> None:
    module, x = lazy(encoder), torch.rand(3, 3)
    before = module(x)
    twin = copy.copy(module)
    assert not twin.is_built
    assert torch.equal(twin(x), before)
    assert cache_of(twin) is not cache_of(module)
    assert twin.model is not module.model
