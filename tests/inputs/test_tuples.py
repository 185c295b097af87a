"""One plain value per sample: tuples as collate functions make them, lists, and batches of other libraries."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from torchcache import CacheMissError, UncacheableError, cache_of, torchcache


def stats_of(cached):
    return cache_of(cached).stats()


def images(n=4, start=0):
    return torch.arange(start, start + 3 * n, dtype=torch.float32).reshape(n, 3)


class Captioned(Dataset):
    """Images with two captions each, as in COCO."""

    def __init__(self):
        self.images = images(5)

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return self.images[i // 2], f"caption {i} " * (i + 1)


def score(images, captions):
    assert len(images) == len(captions)
    return images * torch.tensor([[float(len(caption))] for caption in captions])


def batches(batch_size, epochs=5):
    loader = DataLoader(Captioned(), batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    for _ in range(epochs):
        yield from loader


# -- beside a batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 4, 8])
def test_captions_beside_images_are_never_taken_for_each_other(batch_size):
    cached = torchcache()(score)
    calls = 0
    for pictures, captions in batches(batch_size):
        assert type(captions) is tuple, "what default_collate makes"
        assert torch.equal(cached(pictures, captions), score(pictures, captions))
        calls += 1
    assert stats_of(cached).bypasses == {"ambiguous_tuple": calls}
    assert stats_of(cached).misses == 0


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_captions_in_a_list_are_cached_with_their_images(batch_size):
    cached = torchcache()(score)
    for pictures, captions in batches(batch_size):
        assert torch.equal(cached(pictures, list(captions)), score(pictures, captions))
    assert stats_of(cached).misses == 10
    assert stats_of(cached).memory_hits == 40
    assert not stats_of(cached).bypasses


def test_the_line_names_the_argument_and_both_remedies_once(caplog):
    cached = torchcache()(score)
    with caplog.at_level(logging.WARNING, "torchcache"):
        for _ in range(2):
            cached(images(2), ("a", "bb"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "ambiguous_tuple: 'captions'" in line
    assert "list(captions)" in line
    assert 'unbatched=("captions",)' in line


class Named(NamedTuple):
    a: Any
    b: Any


@dataclass
class Inputs:
    a: Any
    b: Any


class Registered:
    def __init__(self, a, b):
        self.a, self.b = a, b


pytree.register_pytree_node(
    Registered, lambda r: ([r.a], (r.b,)), lambda children, context: Registered(*children, *context)
)


class Tagged(UserDict):
    tags = ()


def tagged(x, tags):
    made = Tagged(x=x)
    made.tags = tags
    return made


x = images(3)
AMBIGUOUS = {
    "by position": ((x, ("a", "b", "c")), {}, "list(b)"),
    "by keyword": ((x,), {"c": (1, 2, 3)}, 'unbatched=("c",)'),
    "of *rest": ((x, 1, 2, (1.0, None, True)), {}, "list(rest[0])"),
    "of **more": ((x,), {"surplus": ("a", "b", "c")}, 'unbatched=("surplus",)'),
    "a tuple of tuples": ((x, ((4, 5), (4, 6), (4, 7))), {}, "list(b)"),
    "tuples in a tuple": ((x, (("q", "r", "s"), ("a", "b", "c"))), {}, "list(b[0])"),
    "in a named tuple of plain values": ((x, Named(1, ("a", "b", "c"))), {}, "list(b[1])"),
    "in a list": (([x, ("a", "b", "c")],), {}, "list(a[1])"),
    "in a tuple": (((x, ("a", "b", "c")),), {}, "list(a[1])"),
    "in a dict": (({"x": x, "lang": ("a", "b", "c")},), {}, "list(a['lang'])"),
    "deeper": (({"x": [x, {"lang": ("a", "b", "c")}]},), {}, "list(a['x'][1]['lang'])"),
    "in a named tuple": ((Named(x, ("a", "b", "c")),), {}, "list(a.b)"),
    "in a dataclass": ((Inputs(x, ("a", "b", "c")),), {}, "list(a.b)"),
    "an attribute of a mapping": ((tagged(x, (1, 2, 3)),), {}, "list(a.tags)"),
    "in the context of a registered class": ((Registered(x, ("a", "b", "c")),), {}, "a list of plain values as a (con"),
    "a list of dicts": (({"x": x, "meta": [{"id": 1}, {"id": 2}, {"id": 3}]},), {}, "plain values as a['meta']"),
}


def double(a, b=None, c=None, *rest, **more):
    parts = list(a.values()) if isinstance(a, UserDict) else [a.a] if isinstance(a, Inputs) else pytree.tree_leaves(a)
    return next(leaf for leaf in parts if isinstance(leaf, torch.Tensor)) * 2


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_tuple_as_long_as_the_batch_goes_around_wherever_it_lies(name, cache_dir):
    args, kwargs, remedy = AMBIGUOUS[name]
    cached = torchcache()(double)
    for _ in range(2):
        assert torch.equal(cached(*args, **kwargs), x * 2)
    assert stats_of(cached).bypasses == {"ambiguous_tuple": 2}
    strict = torchcache(mode="require", persistent=True, persistent_cache_dir=cache_dir)(double)
    with pytest.raises(CacheMissError, match="ambiguous_tuple") as caught:
        strict(*args, **kwargs)
    assert remedy in str(caught.value)
    assert caught.value.explanation.bypass_reason == "ambiguous_tuple"


CLEAR = {
    "another length": ((x, ("a", "b")), {}),
    "empty": ((x, ()), {}),
    "a named tuple": ((x, Named(1, 2), torch.Size([1, 2, 3])), {}),
    "a shape": ((x, torch.Size([3, 4, 5])), {}),
    "a str": ((x, "abc"), {}),
    "a key of a dict": (({("a", "b", "c"): x},), {}),
    "names of the parts of a registered class": ((Registered(x[:2], ("a", "b")),), {}),
    "pairs in a list": ((x, [(1, 2, 3), (4, 5, 6), (7, 8, 9)]), {}),
}


@pytest.mark.parametrize("name", CLEAR)
def test_other_tuples_are_plain_values(name):
    args, kwargs = CLEAR[name]
    cached = torchcache()(double)
    for _ in range(2):
        result = cached(*args, **kwargs)
    assert (stats_of(cached).misses, stats_of(cached).memory_hits) == (len(result), len(result))


def test_a_default_an_unbatched_tuple_and_one_of_a_whole_call_are_not_ambiguous():
    @torchcache()
    def with_default(x, sizes=(1, 2, 3)):
        return x * sum(sizes)

    @torchcache(unbatched=("sizes",))
    def shared(x, sizes):
        return x * sum(sizes)

    @torchcache(batch_dim=None)
    def whole(x, sizes):
        return x * sum(sizes)

    for _ in range(2):
        with_default(x)
        shared(x, (1, 2, 3))
        whole(x, (1, 2, 3))
    assert [stats_of(f).memory_hits for f in (with_default, shared, whole)] == [3, 3, 1]
    with_default(x, (1, 2, 3))
    assert stats_of(with_default).bypasses == {"ambiguous_tuple": 1}
    shared(x[:2], (1, 2, 4))
    assert stats_of(shared).misses == 5


class Adapters(nn.Module):
    """A layer as PEFT makes it: each row names its adapter."""

    def __init__(self):
        super().__init__()
        self.adapters = nn.ParameterDict({"en": torch.tensor([2.0, 3.0, 4.0]), "de": torch.tensor([5.0, 6.0, 7.0])})

    def forward(self, x, adapter_names=None):
        if adapter_names is None:
            return x
        if len(x) != len(adapter_names):
            raise ValueError("Length of `adapter_names` should be the same as the number of inputs")
        scales = [self.adapters[name] if name in self.adapters else torch.ones(3) for name in adapter_names]
        return x * torch.stack(scales)


@pytest.mark.parametrize("kind", [list, tuple])
def test_names_of_adapters_count_for_each_row(kind):
    plain = Adapters().eval().requires_grad_(False)
    cached = torchcache()(Adapters().eval().requires_grad_(False))
    order = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 3, generator=order)
    for _ in range(5):
        for i in torch.randperm(6, generator=order).split(2):
            names = kind(("en", "de", "__base__")[int(number) % 3] for number in i // 2)
            assert torch.equal(cached(rows[i], adapter_names=names), plain(rows[i], adapter_names=names))
    if kind is tuple:
        assert stats_of(cached).bypasses == {"ambiguous_tuple": 15}
    else:
        assert (stats_of(cached).misses, stats_of(cached).memory_hits) == (6, 24)


# -- the only batch of a call -----------------------------------------------------------------------------------------


def test_a_tuple_of_str_that_is_the_only_batch_is_one():
    seen = []

    @torchcache(check_rows=False)
    def embed(texts, scale=1):
        seen.append(texts)
        return torch.tensor([[float(len(text))] for text in texts]) * scale

    class Texts(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return "text" * (i % 4), i

    for _ in range(2):
        for texts, labels in DataLoader(Texts(), batch_size=3):
            assert embed(texts).flatten().tolist() == [4.0 * (i % 4) for i in labels.tolist()]
    assert [texts[0] for texts in seen] == ["", "texttexttext"], "only what is missing"
    assert all(type(texts) is tuple for texts in seen)
    assert (stats_of(embed).misses, stats_of(embed).memory_hits) == (4, 8)
    embed(["", "text"])
    assert stats_of(embed).misses == 6, "a list is another argument"
    embed((("a", "b"), ("a", "c")), scale=2)
    assert stats_of(embed).misses == 8


def test_of_two_tuples_neither_is_the_batch():
    @torchcache()
    def embed(titles, texts):
        return torch.zeros(len(texts), 1)

    with pytest.raises(UncacheableError, match=r"list\(titles\) and list\(texts\)"):
        embed(("a", "b"), ("c", "d"))
    embed(["a", "b"], ["c", "d"])
    assert stats_of(embed).misses == 2


# -- lists of plain values ---------------------------------------------------------------------------------------------

LISTS = {
    "int": [3, 1, 2], "float": [0.5, -0.0, 0.0], "bool": [True, False, True], "none": [None, 1, None],
    "tuples": [(4, 5), (4, 6), (4, 5)], "alike": [1, 1.0, True], "like strings": [1, "1", b"1"],
    "mixed": ["1", (1, ("a", None)), b"1"],
    "torch": [torch.float32, torch.float16, torch.device("cpu")],
}  # fmt: skip


def number(value):
    return float(sum(repr((type(value), value)).encode()))


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("wrap", [lambda x, v: (x, v), lambda x, v: ({"x": x, "v": v},)], ids=["beside", "inside"])
def test_a_list_of_plain_values_has_one_per_sample(name, wrap):
    seen = []

    def multiply(x, values=None):
        if isinstance(x, dict):
            x, values = x["x"], x["v"]
        seen.append(values)
        return x * torch.tensor([[number(value)] for value in values])

    cached = torchcache()(multiply)
    values = LISTS[name]
    same = torch.ones(3, 2)
    assert torch.equal(cached(*wrap(same, values)), multiply(*wrap(same, values)))
    different = len({(type(value), repr(value)) for value in values})
    assert stats_of(cached).misses == different
    assert all(type(given) is list for given in seen)
    assert torch.equal(cached(*wrap(same, values[::-1])), multiply(*wrap(same, values[::-1])))
    assert torch.equal(cached(*wrap(same[:2], values[1:])), multiply(*wrap(same[:2], values[1:])))
    assert stats_of(cached).misses == different


def test_a_list_of_numbers_may_be_the_only_batch():
    @torchcache()
    def halve(numbers):
        return torch.tensor([[value / 2] for value in numbers])

    assert halve([1, 2, 3]).flatten().tolist() == [0.5, 1.0, 1.5]
    assert halve([3, 4]).flatten().tolist() == [1.5, 2.0]
    assert stats_of(halve).misses == 4


def test_a_list_of_another_length_is_refused_with_what_to_pass_for_all_samples():
    def scale(x, sizes):
        return x * sum(sizes)

    with pytest.raises(UncacheableError, match=r"sizes: 2.*pass tuple\(sizes\) or name it in unbatched") as caught:
        torchcache()(scale)(x, [2, 3])
    assert caught.value.argument == "sizes"
    assert torch.equal(torchcache()(scale)(x, (2, 3)), x * 5)
    with pytest.raises(UncacheableError, match=r"pass tuple\(x\['size'\]\)"):
        torchcache()(lambda x: x["x"])({"size": [2, 3], "x": x})
    assert torch.equal(torchcache(unbatched=("sizes",))(scale)(x, [2, 3]), x * 5)


# -- what comes from other libraries ----------------------------------------------------------------------------------


class Column(Sequence):
    """As ``datasets`` gives a column of a table."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


FOREIGN = {
    "array": (np.ones((3, 2)), "torch.from_numpy({})"),
    "array of str": (np.array(["a", "b", "c"]), "{}.tolist()"),
    "array of objects": (np.array(["a", None, "c"], dtype=object), "{}.tolist()"),
    "list of arrays": ([np.ones(2), np.zeros(2), np.ones(2)], "torch.from_numpy(np.stack({}))"),
    "list of NumPy strings": (list(np.array(["a", "b", "c"])), "list(map(str, {}))"),
    "list of NumPy numbers": (list(np.arange(3)), "[item.item() for item in {}]"),
    "list of images": ([Image.new("L", (2, 2), i) for i in range(3)], "torch.from_numpy(np.stack({}))"),
    "list of lists": ([[1, 2], [3, 4], [5, 6]], "torch.tensor({})"),
    "series": (pd.Series([1.0, 2.0, 3.0]), "torch.tensor({}.to_numpy())"),
    "series of str": (pd.Series(["a", "b", "c"]), "{}.to_list()"),
    "series that may have holes": (pd.Series([1, 2, 3], dtype="Int64"), "{}.to_list()"),
    "index": (pd.Index(["a", "b", "c"]), "{}.to_list()"),
    "frame": (pd.DataFrame({"a": [1.0, 2.0, 3.0]}), "torch.tensor({}.to_numpy())"),
    "column": (Column(["a", "b", "c"]), "list({})"),
    "range": (range(3), "list({})"),
    "values of a dict": ({1: "a", 2: "b", 3: "c"}.values(), "list({})"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
def test_a_batch_of_another_library_is_refused_with_what_to_pass(name, inside):
    @torchcache()
    def cached(x, batch):
        return x * 2

    value, remedy = FOREIGN[name]
    path = "batch['v']" if inside else "batch"
    wrapped = {"v": value, "x": x} if inside else value
    with pytest.raises(UncacheableError) as caught:
        cached(x, wrapped)
    assert f"argument {path!r} is a" in str(caught.value)
    assert f"pass {remedy.format(path)}" in str(caught.value)
    assert caught.value.argument in ("batch", path)
    known = {"np": np, "torch": torch, "batch": wrapped}
    instead = eval(remedy.format(path), known)
    assert torch.equal(cached(x, {"v": instead, "x": x} if inside else instead), x * 2)


def test_an_image_is_refused_in_a_batch_and_sent_to_whole_calls():
    image = Image.new("RGB", (4, 3))
    with pytest.raises(UncacheableError, match=r"'image' is a Image of PIL; pass torch.from_numpy.*batch_dim=None"):
        torchcache()(lambda image: image)(image)


def test_a_numpy_string_is_a_plain_value_that_all_samples_share():
    @torchcache()
    def cached(x, name):
        return x * len(name)

    for name in ("a", "bb", "a"):
        assert torch.equal(cached(x, np.str_(name)), x * len(name))
    assert (stats_of(cached).misses, stats_of(cached).memory_hits) == (6, 3)
