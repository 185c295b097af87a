"""What is said names the true cause, and what to type instead."""

from __future__ import annotations

import inspect
import io
import re
import warnings

import pytest
import torch
from torch import nn

from torchcache import ConfigError, UncacheableError, cache_of, torchcache


def batch(n=4):
    return torch.arange(float(n * 3)).reshape(n, 3)


# -- objects of other libraries in a result ----------


def class_of(module, *names):
    """Return a class as a library has it: each name is that of a base of the next."""
    made = object
    for name in names:
        made = type(name, (made,), {"__module__": module})
    return made


RESULTS = {
    "a cache of transformers": (
        class_of("transformers.cache_utils", "Cache", "DynamicCache"),
        "past_key_values",
        r"use_cache=False",
    ),
    "a cache of one architecture": (
        class_of("transformers.models.mamba.modeling_mamba", "MambaCache"),
        "cache_params",
        r"use_cache=False",
    ),
    "a cache of the user's own": (
        type("MyCache", (class_of("transformers.cache_utils", "Cache", "DynamicCache"),), {"__module__": "__main__"}),
        "cache",
        r"use_cache=False",
    ),
    "a distribution of diffusers": (
        class_of("diffusers.models.autoencoders.vae", "DiagonalGaussianDistribution"),
        "latent_dist",
        r"\.latent_dist\.mean or \.latent_dist\.parameters",
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_an_object_of_a_library_has_a_remedy_of_its_own(kind, batch_dim, caplog):
    cls, name, remedy = RESULTS[kind]
    cached = torchcache(batch_dim=batch_dim)(lambda x: {"x": x, name: cls()})
    if batch_dim is None:  # any result of a whole call is returned
        cached(batch())
        assert re.search(remedy, caplog.text)
        return
    with pytest.raises(UncacheableError, match=remedy):
        cached(batch())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.distributions.Normal(x, 1.0),
        lambda x: {"dist": torch.distributions.Categorical(logits=x)},
        lambda x: (x, torch.distributions.Independent(torch.distributions.Normal(x, 1.0), 1)),
    ],
)
def test_a_distribution_of_torch_names_what_it_is_made_of(make):
    with pytest.raises(UncacheableError, match=r"\.mean and .*\.stddev, or .*\.logits"):
        torchcache()(make)(batch())


# -- training mode -------------


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_training_mode_says_how_the_frozen_part_stays_in_eval_mode(layer, caplog):
    model = torchcache()(nn.Sequential(layer)).requires_grad_(False)
    model.train()(batch())
    assert "def train(self, mode=True): return super().train(False)" in caplog.text
    assert "Trainer" in caplog.text


def test_what_is_said_of_training_mode_works():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).eval()

        def train(self, mode=True):
            return super().train(False)

        def forward(self, x):
            return self.layers(x)

    model = nn.Sequential(torchcache()(Frozen().requires_grad_(False)), nn.Linear(2, 2))
    for _ in range(3):
        model.train()
        model(batch())
    assert cache_of(model[0]).stats().misses == 4
    assert cache_of(model[0]).stats().memory_hits == 8
    assert model[1].training


# -- scripting -----------------


def deprecated(make, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make(*args)


def test_to_script_a_cached_module_names_what_works_instead():
    module = torchcache()(nn.Linear(3, 2).eval())
    for target in (module, nn.Sequential(module)):
        with pytest.raises(AttributeError, match=r"use torch\.jit\.trace, which sees the undecorated module"):
            deprecated(torch.jit.script, target)
    traced = deprecated(torch.jit.trace, module, batch())
    assert torch.equal(traced(batch()), module(batch()))


@pytest.mark.parametrize("make", [torch.jit.script, lambda function: torch.jit.trace(function, batch())])
def test_what_was_scripted_names_what_to_decorate(make):
    with pytest.raises(ConfigError, match="decorate the function that it was made of, or one of your own"):
        torchcache()(deprecated(make, doubled))


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_a_cached_module_has_the_signature_of_its_forward():
    """Trainers leave out what is no parameter of it."""
    module = torchcache()(nn.LSTM(3, 2).eval())
    assert list(inspect.signature(module.forward).parameters) == ["input", "hx"]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert list(inspect.signature(again.forward).parameters) == ["input", "hx"]
