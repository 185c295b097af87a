"""Padded batches of models that shorten their input, as those of speech do: cached where they say how, never wrong."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from torchcache import cache_of, torchcache

PADDED = {"x": "mask"}


def stats_of(target):
    return cache_of(target).stats()


def shorten(n, kernel, stride):
    return torch.div(n - kernel, stride, rounding_mode="floor") + 1


class Shortening(nn.Module):
    """Two convolutions, and attention that knows how much of them is real."""

    def __init__(self, kernels=((10, 5), (3, 2))):
        super().__init__()
        torch.manual_seed(0)
        self.kernels = kernels
        self.layers = nn.ModuleList()
        for i, (kernel, stride) in enumerate(kernels):
            self.layers.append(nn.Conv1d(6 if i else 1, 6, kernel, stride=stride))
        self.sizes = []

    def lengths(self, n):
        for kernel, stride in self.kernels:
            n = shorten(n, kernel, stride)
        return n

    def forward(self, x, mask):
        self.sizes.append(len(x))
        states = x[:, None]
        for layer in self.layers:
            states = layer(states).tanh()
        states = states.transpose(1, 2)
        n = self.lengths(mask.sum(1).long())
        real = torch.arange(states.shape[1])[None] < n[:, None]
        states = states * real[:, :, None]
        scores = (states @ states.transpose(1, 2)).masked_fill(~real[:, None], float("-inf")).softmax(-1)
        states = scores @ states
        return {
            "states": states,
            "mean": (states * real[:, :, None]).sum(1) / n[:, None],
            "scores": scores,
            "x": x * mask,
        }


class SaysHow(Shortening):
    def _get_feat_extract_output_lengths(self, input_lengths):
        return self.lengths(input_lengths)


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, mask):
        return self.model(x, mask)


def batch(lengths, width=None, side="right"):
    width = width or max(lengths)
    x, mask = torch.zeros(len(lengths), width), torch.zeros(len(lengths), width)
    for i, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        x[i, place] = torch.randn(n, generator=torch.Generator().manual_seed(n))
        mask[i, place] = 1
    return x, mask


def check(cached, plain, x, mask):
    """Assert that what is real of a result is what the model returns, and that its shapes are."""
    found, expected = cached(x, mask), plain(x, mask)
    n_real = plain.lengths(mask.sum(1).long()).tolist()
    for name, value in expected.items():
        assert found[name].shape == value.shape
    assert torch.allclose(found["mean"], expected["mean"], atol=1e-5)
    assert torch.equal(found["x"], expected["x"])
    for i, n in enumerate(n_real):
        assert torch.allclose(found["states"][i, :n], expected["states"][i, :n], atol=1e-5)
        assert torch.allclose(found["scores"][i, :n, :n], expected["scores"][i, :n, :n], atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda m: m, Around], ids=["itself", "around"])
@pytest.mark.parametrize("first", [[400, 700, 1000], [1000, 1000], [701, 700], [700, 1000, 999], [64, 1000]], ids=str)
def test_a_model_that_says_how_it_shortens_is_cached(wrap, first, cache_dir):
    plain = SaysHow()
    options = {"padded": PADDED, "persistent": True, "persistent_cache_dir": cache_dir}
    cached = torchcache(**options)(wrap(SaysHow()))
    check(cached, plain, *batch(first))
    rng = random.Random(0)
    for _ in range(6):
        lengths = [rng.choice([64, 400, 700, 701, 999, 1000, 1001]) for _ in range(4)]
        check(cached, plain, *batch(lengths))
    stats = stats_of(cached)
    assert not stats.bypasses
    assert stats.misses <= 8
    assert stats.hits > 4
    cache_of(cached).flush()
    cache_of(cached).close()

    again = torchcache(**options)(wrap(SaysHow()))
    check(again, plain, *batch(first))
    assert stats_of(again).misses == 0
    cache_of(again).close()


def test_a_mask_that_no_row_fills_is_computed():
    plain = SaysHow()
    cached = torchcache(padded=PADDED)(SaysHow())
    check(cached, plain, *batch([400, 800]))
    for width in (801, 1200):
        check(cached, plain, *batch([400, 800], width=width))
    assert stats_of(cached).misses == 2
    assert set(stats_of(cached).bypasses) == {"rows_do_not_stack"}


def test_padding_on_the_left_is_computed(caplog):
    plain = SaysHow()
    cached = torchcache(padded=PADDED)(SaysHow())
    check(cached, plain, *batch([400, 800]))
    x, mask = batch([400, 800], side="left")
    for _ in range(2):
        found, expected = cached(x, mask), plain(x, mask)
        assert all(torch.equal(found[name], expected[name]) for name in ("states", "mean", "scores"))
    x, mask = batch([300, 900], side="left")
    found, expected = cached(x, mask), plain(x, mask)
    assert all(torch.equal(found[name], expected[name]) for name in ("states", "mean", "scores"))
    assert set(stats_of(cached).bypasses) == {"rows_do_not_stack", "other_lengths"}


class SaysWrong(Shortening):
    def _get_feat_extract_output_lengths(self, input_lengths):
        return input_lengths // 3


class FailsToSay(Shortening):
    def _get_feat_extract_output_lengths(self, input_lengths):
        raise RuntimeError("no config")


class Leaks(SaysHow):
    """Normalizes over all positions, as wav2vec2-base does: its padding shapes its result."""

    def forward(self, x, mask):
        return super().forward((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), mask)


@pytest.mark.parametrize("kind", [Shortening, SaysWrong, FailsToSay, Leaks])
@pytest.mark.parametrize("first", [[400, 700, 1000], [1000, 1000], [701, 700]], ids=str)
def test_other_models_that_shorten_are_never_cached(kind, first, caplog):
    plain = kind()
    cached = torchcache(padded=PADDED)(kind())
    for lengths, width in ((first, None), (first, 1400), ([400, 1400], None), (first, None)):
        x, mask = batch(lengths, width)
        found, expected = cached(x, mask), plain(x, mask)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    reason = "rows_depend_on_batch" if kind is Leaks else "other_lengths"
    assert set(stats_of(cached).bypasses) == {reason}
    if reason == "other_lengths":
        assert "output['states'] has rows of shape" in caplog.text
        assert "take its mask into account" not in caplog.text


STRIDES = {
    "half": lambda x: x[:, ::2],
    "a quarter": lambda x: x[:, ::4],
    "a class token": lambda x: torch.cat([x[:, :1], x], 1),
    "without its ends": lambda x: x[:, 1:-1],
    "windows": lambda x: x.unfold(1, 4, 2),
    "twice": lambda x: x.repeat_interleave(2, 1),
    "a square": lambda x: (x[:, :, None] * x[:, None]).flatten(1),
    "blocks of 8": lambda x: nn.functional.pad(x, (0, -x.shape[1] % 8)),
    "at most 12": lambda x: x[:, :12],
}


@pytest.mark.parametrize("lengths", [[16, 16], [15, 16], [9, 16, 12], [16, 8], [16, 3]], ids=str)
@pytest.mark.parametrize("kind", STRIDES)
def test_lengths_of_any_other_kind_are_never_served_to_another_padding(kind, lengths):
    function = STRIDES[kind]
    cached = torchcache(padded=PADDED)(lambda x, mask: function(x * mask))
    for width in (None, 24, 17, 40, None):
        x, mask = batch(lengths, width)
        assert torch.equal(cached(x, mask), function(x * mask))
    assert stats_of(cached).hits == 0 or kind == "at most 12"


def test_a_deep_copy_says_how_for_itself():
    cached = torchcache(padded=PADDED)(SaysHow())
    check(copy.deepcopy(cached), SaysHow(), *batch([400, 1000]))
