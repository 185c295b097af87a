"""Parts that change their input: the caller sees what it would see without a cache."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from torchcache import cache_of, torchcache


def stats_of(cached):
    return cache_of(cached).stats()


def rows(*numbers):
    return torch.tensor([[float(number), -float(number)] for number in numbers])


# -- a network around an in-place part --------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-activation block: its residual is what the first layer has left of the input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))

    def forward(self, x):
        return x + self.body(x)


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    plain = Block().eval().requires_grad_(False)
    around = copy.deepcopy(plain)
    around.body = torchcache()(around.body)
    return plain, around


FIRST_CALLS = {"whole": [0, 1, 2, 3, 4, 5], "equal rows": [0, 0, 1, 1, 1, 5], "one row": [3]}


@pytest.mark.parametrize("first", FIRST_CALLS)
def test_a_residual_around_an_inplace_layer_is_right_in_every_epoch(blocks, first):
    plain, around = blocks
    x = torch.randn(6, 4)
    epoch = [FIRST_CALLS[first], [0, 1, 2], [2, 3, 4, 5], [5, 0]]
    for _ in range(5):
        for ids in epoch:
            assert torch.equal(around(x[ids]), plain(x[ids]))
    assert stats_of(around.body).bypasses == {"input_changed_in_place": 20}
    assert stats_of(around.body).misses == 0


def test_the_line_names_the_argument_and_what_to_do(blocks, caplog):
    _, around = blocks
    with caplog.at_level(logging.WARNING, "torchcache"):
        around(torch.randn(3, 4))
        around(torch.randn(3, 4))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "input_changed_in_place: argument 'input'" in line
    assert "inplace=False" in line


def test_rows_that_are_known_do_not_hide_a_change():
    """It shows only when the rows that are missing are forwarded, which are copies."""

    @torchcache()
    def clip(x):
        if x.max() > 10:
            x.clamp_(max=10)
        return x * 2

    for _ in range(2):
        assert torch.equal(clip(rows(1, 2, 3)), rows(2, 4, 6))
    x = rows(1, 20, 3)
    assert torch.equal(clip(x)[1], torch.tensor([20.0, -40.0]))
    assert torch.equal(x[1], torch.tensor([10.0, -20.0])), "as without a cache"
    assert stats_of(clip).bypasses == {"input_changed_in_place": 1}
    x = rows(1, 2, 3)
    clip(x)
    assert stats_of(clip).bypasses == {"input_changed_in_place": 2}
    assert stats_of(clip).memory_rows == 0


def test_the_result_is_the_modules_own():
    @torchcache(cache_dtype=torch.float16)
    def activate(x):
        return torch.relu_(x)

    for x in (rows(1.0001, -1), rows(2, 3)):
        assert activate(x) is x
    x = rows(1.0001, 1.0001)
    assert torchcache()(lambda x: x.add_(1))(x) is x, "also where copies were forwarded first"


def test_explain_says_so(capsys):
    @torchcache()
    def activate(x):
        return torch.relu_(x)

    assert cache_of(activate).explain(rows(1, 2)).bypass_reason is None
    activate(rows(1, 2))
    assert cache_of(activate).explain(rows(1, 2)).bypass_reason == "input_changed_in_place"
    cache_of(activate).clear()
    assert cache_of(activate).explain(rows(1, 2)).bypass_reason is None


# -- every way to change an argument ----------------------------------------------------------------------------------


@dataclass
class Inputs:
    x: torch.Tensor
    names: Any


def activate(x):
    return torch.relu_(x)


def write_by_numpy(x):
    x.numpy()[...] *= 2
    return x + 1


def write_into_shared(x, mask):
    mask["m"].mul_(0.5)
    return x * mask["m"]


def write_into_array(x, table):
    table += 1
    return x * float(table.sum())


def pop(batch):
    return batch.pop("x") * 2


def replace_item(batch):
    batch["x"] = batch["x"] * 2
    return batch["x"]


def append(x, history):
    history.append(len(history))
    return x * len(history)


def append_inside(batch):
    batch["more"][0].append("new")
    return batch["x"] * len(batch["more"][0])


def assign(inputs):
    inputs.x = inputs.x + 1
    return inputs.x


def update(batch):
    batch.update(seen=True)
    return batch["x"] * 3


def replace_names(batch):
    batch["names"] = [*batch["names"][1:], "d"]
    return batch["x"] * torch.tensor([[float(len(name))] for name in batch["names"]])


def move(batch):
    batch["inner"] = {"x": batch["inner"]["x"].clone()}
    return batch["inner"]["x"] * 2


def sort(x, names):
    names.sort()
    return x * torch.tensor([[float(len(name))] for name in names])


WAYS = {
    "relu_": (activate, lambda x: [x]),
    "a view of it": (lambda x: x[:, :1].neg_() * 1 + x, lambda x: [x]),
    "out=": (lambda x: torch.mul(x, 2, out=x) + 1, lambda x: [x]),
    "data": (lambda x: x.data.mul_(2) + 1, lambda x: [x]),
    "numpy": (write_by_numpy, lambda x: [x]),
    "set_": (lambda x: x.set_(x.clone() * 2) + 1, lambda x: [x]),
    "transposed": (lambda x: (x.t_().mul_(1)).t() + 1, lambda x: [x]),
    "a shared tensor": (write_into_shared, lambda x: [x, {"m": torch.ones(2)}], {"unbatched": ("mask",)}),
    "a shared array": (write_into_array, lambda x: [x, np.ones(2)], {"unbatched": ("table",)}),
    "pop": (pop, lambda x: [{"x": x, "n": 1}]),
    "pop of an ordered dict": (pop, lambda x: [OrderedDict(x=x, n=1)]),
    "pop of a mapping": (pop, lambda x: [UserDict(x=x, n=1)]),
    "replaced": (replace_item, lambda x: [{"x": x}]),
    "one key more": (update, lambda x: [{"x": x}]),
    "append": (append, lambda x: [x, [1, 2]], {"unbatched": ("history",)}),
    "append inside": (append_inside, lambda x: [{"x": x, "more": [[], 1]}]),
    "assigned": (assign, lambda x: [Inputs(x, {"a": 1})]),
    "sort": (sort, lambda x: [x, ["c", "bb", "aaa"][: len(x)]]),
    "a list replaced": (replace_names, lambda x: [{"x": x, "names": ["a", "bb", "ccc"]}]),
    "a tensor replaced inside": (move, lambda x: [{"inner": {"x": x}}]),
    "whole: append": (append, lambda x: [x, [1, 2]], {"batch_dim": None}),
    "whole: tensor": (activate, lambda x: [x], {"batch_dim": None}),
    "whole: numpy": (write_by_numpy, lambda x: [x], {"batch_dim": None}),
    "whole: array": (write_into_array, lambda x: [x, np.ones(2)], {"batch_dim": None}),
    "whole: pop": (pop, lambda x: [{"x": x, "n": 1}], {"batch_dim": None}),
}


def seen(value):
    """Return what a caller can see of its arguments."""
    if isinstance(value, Inputs):
        return seen(vars(value))
    if isinstance(value, (dict, UserDict)):
        return {key: seen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [seen(item) for item in value]
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["different rows", "equal rows"])
def test_the_caller_sees_what_it_would_see_without_a_cache(way, first):
    function, make, *options = WAYS[way]
    cached = torchcache(**(options[0] if options else {}))(function)
    numbers = [1, 2, 3] if first == "different rows" else [1, 1, 3]
    for call in range(3):
        here, there = make(rows(*numbers)), make(rows(*numbers))
        assert torch.equal(cached(*there), function(*here)), f"call {call}"
        assert seen(there) == seen(here), f"call {call}"
    assert stats_of(cached).bypasses == {"input_changed_in_place": 3}
    assert stats_of(cached).memory_rows == 0


@pytest.mark.parametrize("first", [[1, 2, 3], [1, 1, 3]], ids=["different rows", "equal rows"])
def test_tensors_of_inference_mode_are_watched_too(first):
    @torchcache()
    def activate(x):
        return torch.neg_(x)

    with torch.inference_mode():
        for _ in range(3):
            x = rows(*first)
            assert torch.equal(activate(x), rows(*first).neg())
            assert torch.equal(x, rows(*first).neg())
    assert stats_of(activate).bypasses == {"input_changed_in_place": 3}


# -- what only reads --------------------------------------------------------------------------------------------------


@dataclass
class Lengths:
    x: torch.Tensor

    @cached_property
    def length(self):
        return self.x.shape[1]


def read_all(batch, mask=None):
    x = batch["x"]
    view = x[:, :1].detach().requires_grad_(False)
    words = list(batch["words"])
    table = {**batch, "x": x.numpy().copy() * 2}
    return x * 2 + view + len(words) * 0 + torch.from_numpy(table["x"]) * 0 + (0 if mask is None else mask.sum())


READERS = {
    "of a dict": (read_all, lambda x: [{"x": x, "words": ["a", "b", "c"]}], {}),
    "of what all share": (
        read_all,
        lambda x: [{"x": x, "words": ["a", "b", "c"]}, torch.ones(2)],
        {"unbatched": ("mask",)},
    ),
    "of a whole call": (read_all, lambda x: [{"x": x, "words": ["a", "b"]}, np.ones(2)], {"batch_dim": None}),
    "what an object remembers": (lambda inputs: inputs.x * inputs.length, lambda x: [Lengths(x)], {}),
    "moved to where it is": (
        lambda batch: batch.to("cpu")["x"] * 2,
        lambda x: [BatchEncoding({"x": x}, n_sequences=1)],
        {},
    ),
    "replaced by an equal one": (
        lambda batch: batch.update(names=list(batch["names"])) or batch["x"] * 2,
        lambda x: [{"x": x, "names": ["a", "b", "c"]}],
        {},
    ),
    "after a reshape": (lambda x: x.view(-1, 1, 2).squeeze(1).t().t() * 2, lambda x: [x], {}),
}


@pytest.mark.parametrize("name", READERS)
def test_what_only_reads_its_input_is_cached(name):
    function, make, options = READERS[name]
    cached = torchcache(**options)(function)
    for _ in range(2):
        cached(*make(rows(1, 2, 3)))
    assert not stats_of(cached).bypasses
    assert stats_of(cached).memory_hits == (1 if options.get("batch_dim", 0) is None else 3)


# -- other places where rows are forwarded ----------------------------------------------------------------------------


def test_an_audit_that_finds_a_change_leaves_it_to_the_caller():
    @torchcache(verify_hits=1.0)
    def shrink(x):
        if len(x) == 1:
            x.mul_(0.5)
        return x * 2

    shrink(rows(1, 2, 3))
    x = rows(2)
    assert torch.equal(shrink(x), rows(2))
    assert torch.equal(x, rows(1)), "changed once"
    assert stats_of(shrink).bypasses == {"input_changed_in_place": 1}


def test_an_audit_of_a_whole_call_changes_its_input_once(tmp_path):
    flag = tmp_path / "flag"  # which no key holds

    @torchcache(batch_dim=None, verify_hits=1.0)
    def shrink(x):
        if flag.exists():
            x.mul_(0.5)
        return x * 2

    shrink(rows(2))
    flag.touch()
    x = rows(2)
    assert torch.equal(shrink(x), rows(2))
    assert torch.equal(x, rows(1))


def test_a_failed_composition_leaves_no_trace():
    """Rows are computed with the witness first, which fails after it has written."""

    @torchcache(unbatched=("mask",))
    def halve(x, mask):
        if len(x) != 2:
            x.mul_(0.5)
            mask.mul_(0.5)
            raise ValueError("two at a time")
        return x * mask

    mask = torch.ones(2)
    for numbers in ([1, 2], [3, 4], [5, 5]):
        x = rows(*numbers)
        assert torch.equal(halve(x, mask), rows(*numbers))
        assert torch.equal(x, rows(*numbers))
    assert torch.equal(mask, torch.ones(2))


def test_the_check_of_the_padding_leaves_no_trace():
    @torchcache(padded={"ids": "mask"})
    def embed(ids, mask):
        if len(ids) == 1:
            ids.zero_()
            mask.zero_()
        return torch.stack([ids, ids * 2], 2).float() * (ids[:, :, None] != 0)

    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    embed(ids, mask)
    assert ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("own", [slice(1, 3), [0, 2]], ids=["neighbours", "apart"])
def test_rows_are_forwarded_as_copies(batch_dim, own):
    """A function that keeps its input and writes later must not reach the caller."""
    kept = []

    @torchcache(batch_dim=batch_dim)
    def keep(x):
        kept.append(x)
        return x * 2

    x = torch.arange(12.0).reshape(3, 2, 2).movedim(0, batch_dim)
    known = x.select(batch_dim, 0 if own == slice(1, 3) else 1).unsqueeze(batch_dim)
    keep(known.clone())
    before = x.clone()
    keep(x)
    assert kept[-1].shape[batch_dim] >= 2
    kept[-1].fill_(7)
    assert torch.equal(x, before)
