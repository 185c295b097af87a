"""Calls that are one sample each (``batch_dim=None``), and batches along another dimension than the first."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import enum
import functools
import io
import math
import random
import re
import time
import uuid
from collections import OrderedDict, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from torchcache import ConfigError, UncacheableError, cache_of, sample_keys, torchcache
from torchcache.inputs.signature import CallSignature
from torchcache.layout import MAX_TENSORS

Point = namedtuple("Point", "x y")  # noqa: PYI024 - an untyped one is what is tested


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: int
    name: str = ""


def counted(function, **options):
    """Return a cached function and the list of the arguments it was really called with."""
    calls = []

    def called(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    called.__qualname__ = f"counted {function.__qualname__}"
    return torchcache(batch_dim=None, **options)(called), calls


def two_calls(function, *args, **options):
    """Call a cached function twice; return what both gave, which ran once."""
    cached, calls = counted(function, **options)
    first, second = cached(*args), cached(*args)
    assert len(calls) == 1
    return first, second


def same(a, b):
    """Tell whether two results are the same by type and by value."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b) and math.copysign(1, a) == math.copysign(1, b)
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    return a == b


def bytes_of(tensor):
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


RESULTS = [
    torch.tensor(3.5),
    torch.tensor([1, 2, 3]),
    torch.rand(2, 3, 4, 5),
    torch.rand(0, 3),
    torch.tensor([True, False]),
    torch.rand(3).to(torch.bfloat16),
    3,
    -(2**80),
    2**63,
    True,
    None,
    0.1,
    -0.0,
    float("nan"),
    1 + 2j,
    "text",
    "\ud800 lone",
    "x" * 100_000,
    b"",
    b"bytes" * 10_000,
    (),
    [],
    {},
    Color.RED,
    torch.float16,
    torch.Size([2, 3]),
    [1, "a", None, [2.5, {"k": b"v"}]],
    (torch.rand(4), 7, "name"),
    {"image": torch.rand(3, 2), "boxes": [torch.rand(4), torch.rand(2, 4)], "label": 1},
    OrderedDict(b=1, a=torch.tensor(2)),
    Point(1, torch.rand(2)),
    Sample(torch.rand(2), 5, "five"),
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(3.5, dtype=">f4"),
    np.array(["ab", "c"]),
    np.array(["2024-01-01"], dtype="datetime64[D]"),
    np.zeros((0, 4), dtype=np.int8),
    np.float32(1.5),
    np.int64(-3),
    np.bool_(True),
    np.str_("text"),
    (np.arange(3, dtype=np.float16), torch.arange(3), 3),
]


@pytest.mark.parametrize("value", RESULTS, ids=lambda value: f"{type(value).__name__}")
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_any_result_comes_back_by_value(tmp_path, value, where):
    options = {} if where == "memory" else {
        "persistent": True, "persistent_cache_dir": tmp_path, "max_memory_cache_size": 0
    }  # fmt: skip
    cached, calls = counted(lambda i: value, **options)
    first = cached(1)
    cache_of(cached).flush()
    second = cached(1)
    assert len(calls) == 1
    assert same(first, value)
    assert same(second, value)


def modes():
    gray = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image = Image.fromarray(gray)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=5)
    palette.info["transparency"] = 2
    return [image, palette, image.convert("1"), *(image.convert(mode) for mode in ("RGB", "RGBA", "CMYK", "F", "I"))]


@pytest.mark.parametrize("image", modes(), ids=lambda image: image.mode)
def test_images_come_back_by_value(image):
    first, second = two_calls(lambda i: {"image": image, "label": i}, 3)
    for result in (first, second):
        got = result["image"]
        assert got.mode == image.mode
        assert got.size == image.size
        assert got.tobytes() == image.tobytes()
        assert got.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
    assert second["image"] is not image


def test_an_image_that_was_opened_from_a_file_is_decoded_once(tmp_path):
    modes()[3].save(tmp_path / "image.png")
    first, second = two_calls(Image.open, tmp_path / "image.png")
    assert first.tobytes() == second.tobytes()


def test_what_is_returned_belongs_to_the_caller():
    cached, _ = counted(lambda i: (torch.zeros(3), np.zeros(3), [1]))
    for _ in range(3):
        tensor, array, items = cached(1)
        assert tensor.tolist() == array.tolist() == [0, 0, 0]
        assert items == [1]
        tensor += 1
        array += 1
        items.append(2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1,), (True,)),
        ((1,), (1.0,)),
        (("1",), (1,)),
        (([1, 2],), ((1, 2),)),
        (([1, 2],), ([2, 1],)),
        (([],), ({},)),
        ((1, 2), ([1, 2],)),
        (({"a": 1, "b": 2},), ({"b": 2, "a": 1},)),
        ((torch.zeros(2),), (torch.zeros(2, 1),)),
        ((torch.zeros(2),), (torch.zeros(2, dtype=torch.int32),)),
        ((torch.tensor(0.0),), (torch.tensor(-0.0),)),
        ((torch.zeros(3),), (np.zeros(3, dtype=np.float32),)),
        ((np.zeros(3),), (np.zeros(3, dtype=np.int64),)),
        ((np.zeros((2, 3)),), (np.zeros((3, 2)),)),
        ((Path("a"),), ("a",)),
        ((Path("a"),), (Path("b"),)),
        (("a\ud800",), ("a",)),
        (([torch.zeros(2), 1],), ([1, torch.zeros(2)],)),
        ((Color.RED,), (1,)),
        ((np.int64(1),), (1,)),
        ((np.int64(1),), (np.int32(1),)),
        ((np.float64(1),), (1.0,)),
        ((np.float32(0.0),), (np.float32(-0.0),)),
        ((np.array(1),), (np.int64(1),)),
        (([np.int64(1)],), ([1],)),
        (([np.str_("a")],), (["a"],)),
        (([Path("a")],), (["a"],)),
        (([Path("a")],), ([Path("b")],)),
        ((PurePosixPath("a"),), (PureWindowsPath("a"),)),
        (([PurePosixPath("a")],), ([PureWindowsPath("a")],)),
        (({1},), (frozenset({1}),)),
        ((b"a",), (bytearray(b"a"),)),
        ((range(2),), ([0, 1],)),
        ((Decimal("1.0"),), (Decimal("1.00"),)),
        ((Fraction(1, 2),), (Decimal("0.5"),)),
        ((dt.date(2020, 1, 1),), (dt.datetime(2020, 1, 1),)),  # noqa: DTZ001 - what has no time zone is the point
    ],
)
def test_calls_that_differ_share_nothing(one, other):
    cached, calls = counted(lambda *args: len(args))
    cached(*one)
    cached(*other)
    assert len(calls) == 2


@settings(max_examples=50)
@given(st.lists(st.one_of(st.integers(), st.floats(), st.text(), st.binary(), st.booleans(), st.none()), max_size=5))
def test_equal_plain_arguments_hit(values):
    cached, calls = counted(lambda values: values)
    a, b = cached(values), cached(list(values))
    assert len(calls) == 1
    assert same(a, b)


@settings(max_examples=100)
@given(st.lists(st.one_of(st.integers(), st.floats(), st.text(), st.binary(), st.booleans(), st.none()), max_size=3))
def test_many_plain_calls_are_named_as_each_of_them_is(args):
    def function(index, version=None, c=3, *, d="x"):
        raise NotImplementedError

    args = tuple(args) or (0,)
    signature = CallSignature(function, is_method=False, label="label", batch_dim=None)
    each = [signature.split(given, {}) for given in (args, args[:1], (*args[:1], "other"))]
    digests = [batch.digests(batch.signature())[0] for batch in each]
    assert signature.digests_of_plain([args, args[:1], (*args[:1], "other")]) == digests


@pytest.mark.parametrize(
    "args", [(1, 2, 3, 4, 5), (Path("a"),), (torch.ones(1),), ((1, 2),), (Color.RED,), (np.int64(1),)]
)
def test_calls_that_are_not_plain_are_not_named_together(args):
    def function(index, version=None, c=3, *, d="x"):
        raise NotImplementedError

    signature = CallSignature(function, is_method=False, label="label", batch_dim=None)
    assert signature.digests_of_plain([(1,), args]) is None


@pytest.mark.parametrize("n", [1, 255, MAX_TENSORS])
def test_as_many_tensors_as_of_a_batch_are_stored(n, cache_dir):
    def many(start):
        return {"x": [torch.full((2,), start + i) for i in range(n)], "n": n}

    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    cached, _ = counted(many, **options)
    cached(3)
    cache_of(cached).flush()
    assert dict(cache_of(cached).stats().dropped_rows) == {}
    cache_of(cached).close()
    again, calls = counted(many, **options)
    assert same(again(3), many(3))
    assert not calls
    cache_of(again).close()


def test_as_many_tensors_are_stored_under_a_key_too(cache_dir):
    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    cached = torchcache(**options)(lambda x: [x * i for i in range(MAX_TENSORS)])
    x = torch.ones(2, 3) * torch.tensor([[1.0], [2.0]])
    for _ in range(2):
        with sample_keys(["a", "b"]):
            cached(x)
    cache_of(cached).flush()
    assert dict(cache_of(cached).stats().dropped_rows) == {}
    assert cache_of(cached).stats().written_rows == 2
    cache_of(cached).close()


@pytest.mark.parametrize("is_writable", [True, False])
@pytest.mark.parametrize("dtype", ["f4", "U3", "M8[s]"])
def test_an_array_can_be_written_if_the_function_s_could(dtype, is_writable, cache_dir):
    def make(n):
        array = np.zeros(n).astype(dtype)
        array.flags.writeable = is_writable
        return {"a": array, "b": array[:1]}

    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    for _ in range(2):
        cached, calls = counted(make, **options)
        for _ in range(2):
            found = cached(4)
            assert found["a"].flags.writeable is found["b"].flags.writeable is is_writable
            assert same(found, make(4))
        cache_of(cached).flush()
        cache_of(cached).close()
    assert not calls


def test_an_index_of_numpy_and_paths_hit():
    cached, calls = counted(lambda i, paths: int(i))
    for _ in range(2):
        for i in np.arange(3):
            assert cached(i, [Path("a"), {"b": Path("b")}]) == i
    assert len(calls) == 3


def test_strides_do_not_count():
    cached, calls = counted(lambda x: x.sum())
    x = torch.rand(3, 4)
    cached(x)
    cached(x.t().contiguous().t())
    assert len(calls) == 1


def test_the_name_of_an_argument_counts_and_its_way_does_not():
    cached, calls = counted(lambda a=0, b=0: a - b)
    del calls[:]

    def difference(a=0, b=0):
        calls.append((a, b))
        return a - b

    cached = torchcache(batch_dim=None)(difference)
    assert (cached(1), cached(a=1), cached(1, 0), cached(b=1)) == (1, 1, 1, -1)
    assert calls == [(1, 0), (0, 1)]


def test_many_calls_share_one_namespace(tmp_path):
    cached, _ = counted(lambda i: (torch.full((3,), i), i, str(i)), persistent=True, persistent_cache_dir=tmp_path)
    for i in range(300):
        cached(i)
    cache = cache_of(cached)
    cache.flush()
    first, second = cache.explain(1), cache.explain(2)
    assert first.namespace == second.namespace
    assert first.samples[0].found_in == "memory"
    cache.close()
    for i in range(300):
        tensor, number, text = cached(i)
        assert (tensor.tolist(), number, text) == ([i] * 3, i, str(i))
    assert cache.stats().store_hits == 300


def test_a_module_s_weights_count():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * self.factor, "text"

    module = torchcache(batch_dim=None)(Scale().requires_grad_(False))
    assert module(torch.tensor(3.0))[0] == 6
    module.factor += 1
    assert module(torch.tensor(3.0))[0] == 9


def test_cache_dtype_concerns_tensors_alone():
    first, second = two_calls(lambda i: (torch.tensor([1 / 3]), 1 / 3, np.array([1 / 3])), 1, cache_dtype=torch.half)
    for tensor, number, array in (first, second):
        assert tensor.dtype == torch.float32
        assert tensor.item() == torch.tensor(1 / 3).half().item()
        assert number == array[0] == 1 / 3


def test_random_numbers_are_noticed():
    cached, calls = counted(lambda i: torch.rand(2))
    assert not torch.equal(cached(1), cached(1))
    assert len(calls) == 2
    assert cache_of(cached).stats().bypasses["random_numbers"] == 2


def test_an_audit_compares_all_values(caplog):
    cached, _ = counted(lambda i: [np.array([1.0]), str(time.perf_counter_ns())], verify_hits=1.0)
    cached(1)
    cached(1)
    assert cache_of(cached).stats().mismatched_rows == 1


def test_audited_calls_that_agree_stay():
    cached, _ = counted(lambda i: [torch.ones(3), np.array(["a"]), "text", 1, b"x", None, 1j], verify_hits=1.0)
    for _ in range(3):
        cached(1)
    stats = cache_of(cached).stats()
    assert (stats.verified_rows, stats.mismatched_rows) == (2, 0)


def test_an_audit_compares_large_ints_by_value():
    cached, _ = counted(lambda i: [10**30 + i, -(10**30)], verify_hits=1.0)
    for _ in range(3):
        cached(1)
    stats = cache_of(cached).stats()
    assert (stats.verified_rows, stats.mismatched_rows) == (2, 0)


def test_a_module_as_an_argument_is_refused():
    with pytest.raises(UncacheableError, match=r"argument 'x'.*Linear") as refused:
        torchcache(batch_dim=None)(lambda x: 1)(nn.Linear(1, 1))
    assert refused.value.argument == "x"


@pytest.mark.parametrize(
    ("argument", "named"),
    [((i for i in ()), "generator"), ({"a": [nn.ReLU()]}, "ReLU"), (io.TextIOWrapper, None)],
)
def test_an_argument_that_cannot_be_seen_goes_around_and_is_named(argument, named, caplog):
    calls = []

    @torchcache(batch_dim=None)
    def cached(x):
        calls.append(1)
        return [1]

    assert cached(argument) == cached(argument) == [1]
    stats = cache_of(cached).stats()
    if named is None:
        assert (stats.hits, len(calls)) == (1, 1)
        return
    assert len(calls) == 2
    assert stats.bypasses == {"opaque_state": 2}
    (line,) = caplog.messages
    assert "i" in line
    assert named in line


@dataclasses.dataclass
class Config:
    size: int
    notes: list


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Config(1, [1]), Config(1, [2])),
        (np.ma.masked_array([1.0, 2.0], [0, 1]), np.ma.masked_array([1.0, 2.0], [0, 0])),
        (np.rec.array([(1, 2.0)]), np.rec.array([(1, 3.0)])),
        (Image.new("L", (2, 2), 3), Image.new("L", (2, 2), 4)),
        (io.BytesIO(b"ab"), io.BytesIO(b"ac")),
        ({1, 2}, {1, 3}),
        (range(3), range(4)),
        (lambda x: x + 1, lambda x: x + 2),
        (functools.partial(max, 3), functools.partial(max, 4)),
        (dt.date(2020, 1, 1), dt.date(2020, 1, 2)),
        (dt.time(1, 2), dt.time(1, 3)),
        (dt.timedelta(1), dt.timedelta(2)),
        (dt.timezone.utc, dt.timezone(dt.timedelta(hours=1))),
        (ZoneInfo("Europe/Berlin"), ZoneInfo("Europe/Paris")),
        (dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc), dt.datetime(2020, 1, 1, tzinfo=ZoneInfo("Europe/London"))),
        (Decimal("1.5"), Decimal("1.6")),
        (Fraction(1, 3), Fraction(2, 3)),
        (frozenset({1}), frozenset({2})),
        (uuid.UUID(int=1), uuid.UUID(int=2)),
        (bytearray(b"a"), bytearray(b"b")),
        (1 + 2j, 1 + 3j),
        (Color.RED, Color.BLUE),
        (re.IGNORECASE | re.MULTILINE, re.IGNORECASE),
        (np.array([[1], "a"], dtype=object), np.array([[2], "a"], dtype=object)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_argument_of_any_kind_counts_by_value(one, other):
    calls = []

    @torchcache(batch_dim=None)
    def cached(x):
        calls.append(1)
        return str(type(x))

    cached(one), cached(copy.deepcopy(one))
    assert len(calls) == 1, "an equal one hits"
    cached(other)
    assert len(calls) == 2, "another one does not"


def test_a_generator_that_a_call_draws_from_is_never_frozen():
    generator = random.Random(1)
    cached, _ = counted(lambda rng: rng.random())
    assert len({cached(generator) for _ in range(5)}) == 5
    same = random.Random(1)
    assert same.random() == random.Random(1).random()


@pytest.mark.parametrize("value", [object(), {object()}, np.array([object()]), np.zeros(2, dtype="i4,O"), iter([])])
def test_a_result_that_would_not_come_back_as_it_is_is_not_kept(value, caplog):
    cached, calls = counted(lambda x: [value])
    assert cached(1)[0] is cached(1)[0] is value
    assert len(calls) == 2
    assert cache_of(cached).stats().bypasses == {"unsupported_result": 2}
    assert sum("the cached call returned" in line for line in caplog.messages) == 1


def test_sparse_tensors_go_around():
    cached, calls = counted(lambda x: x)
    for _ in range(2):
        cached(torch.eye(2).to_sparse())
    assert len(calls) == 2
    assert cache_of(cached).stats().bypasses == {"sparse_tensor": 2}


def test_unbatched_has_no_meaning_for_them():
    with pytest.raises(ConfigError, match="unbatched has no meaning") as refused:
        torchcache(batch_dim=None, unbatched=("x",))(lambda x: x)
    assert refused.value.argument == "unbatched"


# -- another dimension ----------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Sequence first, as recurrent layers are by default."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5)
        self.seen = []

    def forward(self, x, mask=None):
        self.seen.append(x.shape[1])
        y = self.lstm(x)[0]
        return y if mask is None else (y * mask, mask)


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_batch_may_lie_along_another_dimension(with_mask):
    plain, x = Recurrent().eval().requires_grad_(False), torch.rand(7, 6, 3)
    mask = torch.rand(7, 6, 1).round() if with_mask else None
    expected = plain(x, mask)
    module = torchcache(batch_dim=1)(plain)
    del module.seen[:]

    def part(columns):
        return module(x[:, columns], mask if mask is None else mask[:, columns])

    def check(got, columns):
        got, want = (got, expected) if with_mask else ((got,), (expected,))
        for a, b in zip(got, want, strict=True):
            assert a.is_contiguous()
            assert torch.allclose(a, b[:, columns], atol=1e-6)

    check(part([0, 1, 2]), [0, 1, 2])
    check(part([3, 1, 4]), [3, 1, 4])
    check(part([4, 0, 3]), [4, 0, 3])
    check(part([5, 5]), [5, 5])
    assert module.seen == [3, 4, 6, 1]  # a few rows of the first once more, and copies of one with the second
    assert cache_of(module).stats().misses == 6


@pytest.mark.parametrize("batch_dim", [-1, True, 1.0, "1"])
def test_a_dimension_that_is_none_is_refused(batch_dim):
    with pytest.raises(ConfigError, match="batch_dim=") as refused:
        torchcache(batch_dim=batch_dim)
    assert refused.value.argument == "batch_dim"


def test_a_tensor_without_that_dimension_is_refused():
    cached = torchcache(batch_dim=1)(lambda x, y: x)
    with pytest.raises(UncacheableError, match="'y' has shape \\(3,\\) and so no dimension 1") as refused:
        cached(torch.rand(2, 3), torch.rand(3))
    assert refused.value.argument == "y"


@pytest.mark.parametrize("result", [torch.rand(3), torch.rand(3, 2), torch.rand(3, 4, 2)])
def test_a_result_without_that_dimension_is_refused(result):
    with pytest.raises(UncacheableError, match="dimension 1 of the result must be the batch"):
        torchcache(batch_dim=1)(lambda x: result)(torch.rand(2, 3))


def test_calls_along_different_dimensions_share_nothing(tmp_path):
    def total(x):
        return x.cumsum(0)

    hashes = {
        cache_of(torchcache(batch_dim=dim, persistent=True, persistent_cache_dir=tmp_path)(total)).module_hash
        for dim in (0, 1, None)
    }
    assert len(hashes) == 3


class Mode(enum.Enum):
    FAST = 1

    def factor(self):
        return 2


class Setting(NamedTuple):
    number: int

    def factor(self):
        return 2


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: (value, 1)])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("setting", [Mode.FAST, Setting(1)], ids=["enum", "named tuple"])
def test_methods_of_a_plain_argument_count(setting, batch_dim, wrap, monkeypatch):
    @torchcache(batch_dim=batch_dim)
    def scaled(x, given):
        holder = given[0] if type(given) is tuple else given
        return x * holder.factor()

    x = torch.ones(3, 2)
    assert torch.equal(scaled(x, wrap(setting)), 2 * x)
    assert torch.equal(scaled(x, wrap(setting)), 2 * x)
    assert cache_of(scaled).stats().memory_hits > 0
    monkeypatch.setattr(type(setting), "factor", lambda self: 3)
    assert torch.equal(scaled(x, wrap(setting)), 3 * x)
