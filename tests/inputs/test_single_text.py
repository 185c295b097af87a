"""A call with one text where others have a list: what the function makes of it is its own matter, and is cached."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from torchcache import UncacheableError, cache_of, sample_keys, torchcache


def stats_of(target):
    return cache_of(target).stats()


def numbers(texts):
    return torch.tensor([[float(len(text)), float(text.count("a"))] for text in texts])


def as_encode(texts, prompt="", as_array=False):
    """Do as ``encode`` of sentence-transformers: an embedding of a text, embeddings of a list."""
    is_one = isinstance(texts, str)
    found = numbers([prompt + text for text in ([texts] if is_one else texts)])
    found = found[0] if is_one else found
    return found.numpy() if as_array else found


#: What functions make of one text: nothing, one row, a batch of one, a number, a dict, or one row per letter.
KINDS = {
    "one row": as_encode,
    "a batch of one": lambda text: numbers([text] if isinstance(text, str) else text),
    "letters": numbers,
    "a number": lambda text: float(len(text)) if isinstance(text, str) else numbers(text),
    "a dict": lambda text: {"x": numbers(text), **({"n": len(text)} if isinstance(text, str) else {})},
    "an array": lambda text: np.float32(3) * as_encode(text, as_array=True),
    "a text": lambda text: text.upper() if isinstance(text, str) else numbers(text),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_text_comes_back_as_the_function_makes_it(kind, cache_dir):
    function = KINDS[kind]
    calls = []

    def embed(texts):
        calls.append(texts)
        return function(texts)

    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    for program in range(2):
        cached = torchcache(**options)(embed)
        for text in ("a cat", "a cat", "two dogs", "", "a cat"):
            assert repr(cached(text)) == repr(function(text))
            assert repr(cached([text, "a cat"])) == repr(function([text, "a cat"]))
        assert not stats_of(cached).bypasses
        singles = [text for text in calls if isinstance(text, str)]
        assert singles == ([] if program else ["a cat", "two dogs", ""])
        del calls[:]
        cache_of(cached).flush()
        cache_of(cached).close()


def test_a_text_by_keyword_is_the_same_call_and_all_other_arguments_count():
    calls = []

    def embed(texts, prompt="", as_array=False):
        calls.append((texts, prompt, as_array))
        return as_encode(texts, prompt, as_array)

    cached = torchcache()(embed)
    for _ in range(2):
        assert torch.equal(cached("a cat"), as_encode("a cat"))
        assert torch.equal(cached(texts="a cat"), as_encode("a cat"))
        assert torch.equal(cached("a cat", prompt="query: "), as_encode("a cat", "query: "))
        assert np.array_equal(cached("a cat", as_array=True), as_encode("a cat", as_array=True))
    assert calls == [("a cat", "", False), ("a cat", "query: ", False), ("a cat", "", True)]


def test_a_method_and_a_module_take_one_text():
    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

        def encode(self, sentences, *, normalize=False):
            return as_encode(sentences) * self.scale * (2 if normalize else 1)

        def forward(self, text):
            return self.encode(text)

    embedder = Embedder()
    embed, module = torchcache()(embedder.encode), torchcache()(Embedder())
    for _ in range(2):
        assert torch.equal(embed("a cat", normalize=True), as_encode("a cat") * 2)
        assert torch.equal(module("a cat"), as_encode("a cat"))
    assert stats_of(embed).misses == stats_of(embed).memory_hits == 1
    assert stats_of(module).misses == stats_of(module).memory_hits == 1

    embedder.scale.data.fill_(3)
    assert torch.equal(embed("a cat"), as_encode("a cat") * 3)


def test_a_text_that_draws_random_numbers_is_not_kept():
    cached = torchcache()(lambda text: torch.rand(2) if isinstance(text, str) else numbers(text))
    assert not torch.equal(cached("a cat"), cached("a cat"))
    assert stats_of(cached).hits == 0


def test_a_text_beside_a_batch_is_shared_by_it_and_keys_are_of_batches():
    cached = torchcache()(lambda texts, mode: numbers(texts) * len(mode))
    assert torch.equal(cached(["a", "b"], "ab"), numbers(["a", "b"]) * 2)
    with sample_keys(["x"]):
        for text in ("a cat", "two dogs"):
            assert torch.equal(cached(text, "a"), numbers(text))
    assert stats_of(cached).misses == 4


@pytest.mark.parametrize(
    "call", [lambda f: f(3), lambda f: f(3, "a"), lambda f: f(None), lambda f: f(b"a"), lambda f: f(x="a")]
)
def test_what_is_no_text_is_still_refused(call):
    with pytest.raises((UncacheableError, TypeError)):
        call(torchcache()(lambda texts, y=0: numbers(texts)))
