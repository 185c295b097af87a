"""Calls as people make them: tensors in containers, lists of text, tensors that all samples share."""

from __future__ import annotations

import enum
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from torchcache import ConfigError, UncacheableError, cache_of, torchcache


def batch(n=6, width=3, start=0):
    return torch.arange(start, start + n * width, dtype=torch.float32).reshape(n, width)


def misses(cached):
    return cache_of(cached).stats().misses


class Pair(NamedTuple):
    a: torch.Tensor
    b: Any


@dataclass
class Inputs:
    a: torch.Tensor
    b: Any
    scale: float = 1.0


@dataclass(frozen=True)
class FrozenInputs:
    a: torch.Tensor
    b: Any


class Color(enum.Enum):
    RED = 1
    BLUE = 2


# -- containers -------------------------------------------------------------------------------------------------------

CONTAINERS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered dict": lambda a, b: OrderedDict(a=a, b=b),
    "named tuple": Pair,
    "dataclass": Inputs,
    "frozen dataclass": FrozenInputs,
    "user dict": lambda a, b: UserDict(a=a, b=b),
    "batch encoding": lambda a, b: BatchEncoding({"a": a, "b": b}),
    "nested": lambda a, b: {"x": [(a, 3)], "y": Inputs(b, None, 2.5)},
}


def parts_of(value):
    """Return the two tensors of each of the containers above."""
    if isinstance(value, (dict, UserDict)):
        if "x" in value:
            return value["x"][0][0], value["y"].a
        return value["a"], value["b"]
    return (value.a, value.b) if hasattr(value, "a") else tuple(value)


@pytest.fixture(params=CONTAINERS)
def make(request):
    return CONTAINERS[request.param]


def test_samples_in_a_container_are_found_again_one_by_one(make):
    seen = []

    @torchcache()
    def add(inputs):
        seen.append((id(inputs), type(inputs).__name__))
        a, b = parts_of(inputs)
        return a * 2 + b[:, :1]

    a, b = batch(), batch(width=2, start=100)
    expected = a * 2 + b[:, :1]
    given = make(a, b)
    assert torch.equal(add(given), expected)
    assert seen[0][0] == id(given), "the caller's own object is passed on where nothing is left out"
    rows = [4, 1, 1]
    assert torch.equal(add(make(a[rows], b[rows])), expected[rows])
    assert misses(add) == 6
    more_a, more_b = torch.cat([a[2:3], batch(start=50)]), torch.cat([b[2:3], batch(width=2, start=500)])
    assert torch.equal(add(inputs=make(more_a, more_b)), more_a * 2 + more_b[:, :1])
    assert misses(add) == 12
    assert seen[-1][1] == type(given).__name__
    assert all(len(part) == 6 for part in parts_of(given)), "the caller's container was changed"


def test_each_part_of_a_container_counts(make):
    @torchcache()
    def add(inputs):
        a, b = parts_of(inputs)
        return a[:, :2] + b * 10

    a, b = batch(width=2), batch(width=2, start=100)
    for first, second in ((a, b), (b, a), (a, a), (a, b + 1), (a.double(), b), (a, b.int())):
        assert torch.equal(add(make(first, second)), first + second * 10)
    assert misses(add) == 36


def test_the_kind_of_a_container_its_keys_and_what_lies_beside_the_tensors_count():
    @torchcache(check_rows=False)
    def describe(inputs, flag=None):
        return tensor_in(inputs) * 0 + float(len(str(type(inputs))) + hash(repr(rest_of(inputs))) % 1000)

    def tensor_in(inputs):
        if isinstance(inputs, (dict, UserDict)):
            return next(v for v in inputs.values() if isinstance(v, torch.Tensor))
        return next(v for v in (vars(inputs).values() if isinstance(inputs, Inputs) else inputs) if torch.is_tensor(v))

    def rest_of(inputs):
        if isinstance(inputs, (dict, UserDict)):
            return [(k, v) for k, v in inputs.items() if not torch.is_tensor(v)] + list(inputs)
        return [v for v in (vars(inputs).items() if isinstance(inputs, Inputs) else inputs) if not torch.is_tensor(v)]

    x = batch(2)
    forms = [
        (x, 1), (x, True), (x, 1.0), (x, "1"), (x, b"1"), (x, None), (1, x), [x, 1], {"a": x, "b": 1}, {"b": 1, "a": x},
        {"a": x, "c": 1}, OrderedDict(a=x, b=1), UserDict(a=x, b=1), Pair(x, 1), Inputs(x, 1), Inputs(x, 1, 2.0),
        (x, Color.RED), (x, Color.BLUE), (x, torch.float32), (x, (1, 2, 3)), (x, [1, 2]), (x, -0.0), (x, 0.0),
    ]  # fmt: skip
    for form in forms:
        describe(form)
    assert misses(describe) == 2 * len(forms)
    for form in forms:
        describe(form)
    assert misses(describe) == 2 * len(forms)


def test_a_container_and_plain_arguments_may_stand_side_by_side():
    @torchcache()
    def scale(inputs, x, factor=2):
        return inputs["a"] * factor + x

    a, x = batch(), batch(start=7)
    assert torch.equal(scale({"a": a}, x, 3), a * 3 + x)
    assert torch.equal(scale(x=x[:2], factor=3, inputs={"a": a[:2]}), (a * 3 + x)[:2])
    assert misses(scale) == 6


def test_a_module_that_takes_a_mapping_is_cached_through_all_doors():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 4).requires_grad_(False)

        def forward(self, inputs):
            return {"pooled": (self.table(inputs["ids"]) * inputs["mask"][..., None]).sum(1)}

    ids = torch.arange(12).reshape(4, 3)
    inputs = BatchEncoding({"ids": ids, "mask": torch.ones(4, 3)})
    for module in (torchcache()(Encoder()), torchcache()(Encoder)()):
        first = module(inputs)["pooled"]
        assert torch.equal(module(BatchEncoding({k: v[[2, 0]] for k, v in inputs.items()}))["pooled"], first[[2, 0]])
        assert misses(module) == 4


def test_an_input_that_requires_grad_inside_a_container_goes_around():
    @torchcache()
    def double(inputs):
        return inputs["a"] * 2

    x = batch().requires_grad_(True)
    assert double({"a": x}).requires_grad
    assert dict(cache_of(double).stats().bypasses) == {"input_requires_grad": 1}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": object()}, "'inputs'"),
        ({"a": 1}, "'inputs'"),
        ((batch(), object()), "'inputs'"),
        ((batch(), {1}), "'inputs'"),
    ],
    ids=["object", "no tensor", "object beside", "set beside"],
)
def test_what_cannot_be_named_is_refused_with_the_remedy(value, path):
    @torchcache()
    def f(inputs, x):
        return x

    with pytest.raises(UncacheableError, match="tensors with the batch in front or lists with one") as caught:
        f(value, batch())
    assert path in str(caught.value)
    assert caught.value.argument == "inputs"


def test_different_batch_sizes_inside_a_container_are_named_by_their_path():
    @torchcache()
    def f(inputs):
        return inputs["a"]

    with pytest.raises(UncacheableError, match=r"inputs\['a'\].*inputs\['b'\]\[0\].*unbatched"):
        f({"a": batch(6), "b": [batch(5)]})
    with pytest.raises(UncacheableError, match=r"inputs\['b'\].*0-d"):
        f({"a": batch(6), "b": torch.tensor(1.0)})


def test_a_mapping_that_cannot_be_made_anew_is_sent_to_dict():
    class Strange(UserDict):
        def __init__(self, data, more):
            super().__init__(data)

    @torchcache()
    def f(inputs):
        return inputs["a"]

    with pytest.raises(UncacheableError, match=r"pass dict\(inputs\)"):
        f(Strange({"a": batch()}, 1))


class Tagged(UserDict):
    tag = 1


def test_attributes_of_a_mapping_count_and_are_passed_on():
    @torchcache()
    def scale(inputs):
        return inputs["a"] * inputs.tag

    def tagged(a, tag):
        made = Tagged(a=a)
        made.tag = tag
        return made

    a = torch.cat([batch(3), batch(3)])  # equal rows: the function gets a mapping made anew
    for tag in (2, 5, 2.5):
        assert torch.equal(scale(tagged(a, tag)), a * tag)
    assert torch.equal(scale(tagged(a[1:2], 5)), a[1:2] * 5)
    assert misses(scale) == 9
    with pytest.raises(UncacheableError, match=r"attribute 'tag' of type list.*pass dict\(inputs\)") as refused:
        torchcache()(scale.__wrapped__)(tagged(a, [2]))
    assert refused.value.argument == "inputs"


def test_what_a_tokenizer_keeps_beside_its_tensors_does_not_matter():
    @torchcache()
    def double(inputs):
        return inputs["a"] * 2

    a = batch(3)
    for encodings in ([object()], [object()]):
        made = BatchEncoding({"a": a}, n_sequences=1)
        made._encodings = encodings
        assert torch.equal(double(made), a * 2)
    assert misses(double) == 3


# -- text -------------------------------------------------------------------------------------------------------------


@torchcache()
def embed(texts, scale=1):
    """Embed each text by its length and its first letter."""
    words = [text if isinstance(text, str) else " ".join(text) for text in texts]
    return torch.tensor([[float(len(word)), float(ord(word[0])) if word else -1.0] for word in words]) * scale


@pytest.fixture(autouse=True)
def forget():
    cache_of(embed).clear()


def test_a_list_of_texts_is_a_batch():
    before = misses(embed)
    texts = ["a cat", "two dogs", "", "été", "a cat", "\ud800"]
    first = embed(texts)
    assert first.tolist() == [[float(len(t)), float(ord(t[0])) if t else -1.0] for t in texts]
    assert misses(embed) - before == 5
    assert torch.equal(embed([texts[3], texts[0]]), first[[3, 0]])
    assert torch.equal(embed(["two dogs", "three dogs"])[:1], first[1:2])
    assert misses(embed) - before == 6
    assert torch.equal(embed(texts, 2), first * 2)
    assert misses(embed) - before == 11


def test_pairs_of_texts_are_samples_too():
    before = misses(embed)
    embed([("a", "b"), ("a b", "c"), ("a", "b c")])
    embed([("a", "b c"), ("a", "b")])
    embed(["a b"])
    assert misses(embed) - before == 4


def test_an_empty_list_of_texts_works():
    @torchcache()
    def lengths(texts):
        return torch.zeros(len(texts), 2)

    assert lengths([]).shape == (0, 2)


def test_texts_and_tensors_go_together():
    @torchcache()
    def both(texts, x, ids):
        return x + torch.tensor([[float(len(t))] for t in texts]) + ids[:, None]

    texts, x, ids = ["a", "bb", "ccc"], batch(3), torch.tensor([1, 2, 3])
    first = both(texts, x, ids)
    assert torch.equal(both(texts[::-1], x.flip(0), ids.flip(0)), first.flip(0))
    assert misses(both) == 3
    both(texts, x, ids + 1)
    both(["a", "bb", "ccd"], x, ids)
    assert misses(both) == 7
    with pytest.raises(UncacheableError, match="differ in their batch dimension"):
        torchcache()(both.__wrapped__)(texts[:2], x, ids)


def test_texts_are_kept_on_disk(cache_dir):
    def make():
        @torchcache(persistent=True, persistent_cache_dir=cache_dir)
        def encode(batch):
            return torch.tensor([[float(len(t))] for t in batch["text"]])

        return encode

    first = make()
    first({"text": ["a", "bb"]})
    cache_of(first).close()
    second = make()
    assert second({"text": ["bb", "a"]}).tolist() == [[2.0], [1.0]]
    assert (misses(second), cache_of(second).stats().store_hits) == (0, 2)


@given(st.lists(st.text(max_size=4), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_a_text_is_found_whatever_the_list_and_never_for_another(texts, random):
    shuffled = random.sample(texts, len(texts))
    before = misses(embed)
    embed(texts)
    distinct = misses(embed) - before
    assert distinct <= len(set(texts))
    result = embed(shuffled)
    assert misses(embed) - before == distinct
    assert result.tolist() == [[float(len(t)), float(ord(t[0])) if t else -1.0] for t in shuffled]


# -- attributes of tensors ---------------------------------------------------------------------------------------------


def tagged(tensor, tag):
    """Return a tensor with an attribute; it is a copy."""
    made = tensor.clone()
    made.tag = tag
    return made


@pytest.mark.parametrize("given", ["positional", "in a dict"])
def test_numbers_hung_on_a_tensor_of_the_batch_count_and_are_passed_on(given):
    @torchcache()
    def scale(x):
        if isinstance(x, dict):
            x = x["a"]
        return x * getattr(x, "tag", 1)

    def call(x):
        return scale(x if given == "positional" else {"a": x})

    a = torch.cat([batch(3), batch(3)])  # equal rows: the function gets tensors made anew
    assert torch.equal(call(a), a)
    for tag in (2, 5, 2.5, True):
        assert torch.equal(call(tagged(a, tag)), a * tag)
        assert torch.equal(call(tagged(a, tag)), a * tag)
    assert torch.equal(call(tagged(batch(4), 5)), batch(4) * 5)  # one row is missing, and is computed with it
    assert torch.equal(call(a), a)
    assert misses(scale) == 5 * 3 + 1
    assert cache_of(scale).stats().bypasses == {}


@pytest.mark.parametrize("tag", [torch.ones(6), [1], (1, 2), object(), Color.RED], ids=lambda tag: type(tag).__name__)
def test_what_else_is_hung_on_a_tensor_of_the_batch_goes_around(tag, caplog):
    @torchcache()
    def double(x):
        return x * 2

    for _ in range(2):
        assert torch.equal(double(tagged(batch(), tag)), batch() * 2)
    assert cache_of(double).stats().bypasses == {"attribute_of_input": 2}
    assert f"x.tag is a {type(tag).__name__}" in caplog.text


def test_what_the_compiler_hangs_on_a_tensor_does_not_count():
    @torchcache()
    def double(x):
        return x * 2

    marked = batch()
    double(marked)
    torch._dynamo.mark_dynamic(marked, 0)
    double(marked)
    assert (misses(double), cache_of(double).stats().bypasses) == (6, {})


def test_what_is_hung_on_an_unbatched_tensor_counts_and_is_passed_on():
    @torchcache(unbatched=["u"])
    def scale(x, u):
        return x * u.tag[0]

    a = torch.cat([batch(3), batch(3)])
    for tag in (2, 5):
        assert torch.equal(scale(a, tagged(torch.ones(2), [tag])), a * tag)
        longer = batch(4)  # one row is missing, and is computed with a copy of the tensor
        assert torch.equal(scale(longer, tagged(torch.ones(2), [tag])), longer * tag)
    assert misses(scale) == 8


# -- what all samples share -------------------------------------------------------------------------------------------


def test_an_unbatched_tensor_counts_by_its_value():
    @torchcache(unbatched=("mask",))
    def masked(x, mask=None):
        return x if mask is None else x * mask

    x = batch(6, 6)  # as many columns as rows: only the name tells them apart
    mask, other = (torch.arange(6) % 2).float(), torch.ones(6)
    assert torch.equal(masked(x, mask), x * mask)
    assert torch.equal(masked(x[[3, 1]], mask=mask.clone()), (x * mask)[[3, 1]])
    assert misses(masked) == 6
    assert torch.equal(masked(x, other), x)
    assert torch.equal(masked(x, mask.double()), x * mask.double())
    assert torch.equal(masked(x), x)
    assert torch.equal(masked(x, mask[None]), x * mask[None])
    assert misses(masked) == 30


@pytest.mark.parametrize("shape", [(), (6,), (6, 6), (1, 3), (2, 6, 6)], ids=str)
def test_an_unbatched_tensor_may_have_any_shape(shape):
    @torchcache(unbatched=["shared"])
    def add(x, shared):
        return x + shared.sum()

    shared = torch.ones(shape)
    first = add(batch(), shared)
    assert torch.equal(add(batch(), shared.clone()), first)
    assert misses(add) == 6


def test_a_bias_of_batch_by_batch_shape_is_shared_whatever_the_batch():
    """Where the length of a sequence happens to be the batch size, only the name tells."""

    @torchcache(unbatched=("bias",))
    def attend(x, bias):
        return bias @ x  # (L, L) @ (n, L, d)

    bias, x = batch(4, 4) / 10, torch.arange(4 * 4 * 2, dtype=torch.float32).reshape(4, 4, 2)
    first = attend(x, bias)
    assert torch.equal(attend(x[1:3], bias), first[1:3])
    assert misses(attend) == 4


def test_an_unbatched_container_counts_by_all_of_it():
    @torchcache(unbatched=("extras",))
    def add(x, extras):
        return x + extras["a"].sum() + extras["k"]

    a = torch.arange(3.0)
    add(batch(), {"a": a, "k": 1})
    add(batch(), {"a": a.clone(), "k": 1})
    assert misses(add) == 6
    add(batch(), {"a": a, "k": 2})
    add(batch(), {"a": a + 1, "k": 1})
    assert misses(add) == 18


def test_an_unbatched_tensor_that_requires_grad_goes_around():
    @torchcache(unbatched=("w",))
    def scaled(x, w):
        return x * w

    assert scaled(batch(), torch.ones(3, requires_grad=True)).requires_grad
    assert dict(cache_of(scaled).stats().bypasses) == {"input_requires_grad": 1}


def test_an_unbatched_variable_argument_is_named_by_its_star():
    @torchcache(unbatched=("masks",))
    def masked(x, *masks):
        for mask in masks:
            x = x * mask
        return x

    mask = (torch.arange(3) % 2).float()
    assert torch.equal(masked(batch(), mask, mask + 1), batch() * mask * (mask + 1))


def test_a_name_that_is_no_parameter_is_refused_where_it_is_decorated():
    with pytest.raises(ConfigError, match=r"unbatched names 'masc'.*did you mean 'mask'") as caught:
        torchcache(unbatched=("masc",))(lambda x, mask: x)
    assert caught.value.argument == "unbatched"

    @torchcache(unbatched=("masc",))
    class Module(nn.Module):
        def forward(self, x, mask):
            return x

    with pytest.raises(ConfigError, match="did you mean 'mask'"):
        Module()
    with pytest.raises(ConfigError, match="parameters are"):
        torchcache(unbatched=("self",))(nn.Linear(2, 2))
    torchcache(unbatched=("anything",))(lambda x, **kwargs: x)  # which only a call can tell


def test_an_unbatched_tensor_without_plain_bytes_goes_around():
    @torchcache(unbatched=("mask",))
    def masked(x, mask):
        return x

    assert torch.equal(masked(batch(), torch.eye(3).to_sparse()), batch())
    assert cache_of(masked).stats().bypasses == {"sparse_tensor": 1}
