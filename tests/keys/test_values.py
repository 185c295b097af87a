"""Python values as bytes: by type and by value, the same in every process."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import functools
import math
import os
import pathlib
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchcache.keys.values import (
    UnnamedValueError,
    encode_argument,
    encode_plain,
    encode_state,
    encode_tensor,
)


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Shade(enum.IntEnum):
    RED = 1


class Flags(enum.Flag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: int
    y: int


@dataclass
class Settings:
    width: int = 1
    names: tuple = ()


class Described:
    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"Described({self.value})"


class Opaque:
    def __init__(self, value=0):
        self.value = value


class Text(str):
    __slots__ = ()


def twice(x):
    return x * 2


def thrice(x):
    return x * 3


def scaled(factor):
    return lambda x: x * factor


PLAIN = [
    1, 2, -1, 2**70, True, False, 1.0, 0.0, -0.0, math.nan, math.inf, -math.inf, 1e-320, 1j, 0j, complex(0, -0.0),
    "", "1", "a", "é", "\ud800", "None", b"", b"1", b"a", None, ..., torch.float32, torch.float16, torch.device("cpu"),
    torch.device("cuda:1"), torch.strided, torch.channels_last, Color.RED, Color.BLUE, Shade.RED, Flags.A, Flags.B,
    Flags.A | Flags.B, slice(1, 2), slice(None, 1), (), (1,), (1.0,), (True,), (1, 2), ((1, 2),), ((1,), 2),
    (1, (2,)), ("ab",), ("a", "b"), (("a",), "b"), Point(1, 2), (None,),
]  # fmt: skip

ARGUMENTS = [
    *PLAIN, [], [1], [1, 2], [2, 1], [[1], 2], [(1,)], {}, {"a": 1}, {"a": 2}, {"b": 1}, {1: "a"}, {"a": {"b": 1}},
    set(), {1, 2}, {1, 3}, frozenset({1, 2}), {"a": [1]}, {"a": (1,)}, bytearray(b"1"), range(3), range(0, 6, 2),
    Settings(), Settings(2), Settings(names=("a",)), Described(1), Described(2), Text("a"),
    collections.OrderedDict(a=1), collections.deque([1]), types.SimpleNamespace(a=1), types.SimpleNamespace(a=2),
    pathlib.PurePosixPath("a"), pathlib.PurePosixPath("b"), dt.date(2020, 1, 1), dt.date(2020, 1, 2),
    dt.timedelta(1), re.compile("a"), re.compile("b"), re.compile("a", re.IGNORECASE), np.float32(1), np.float64(1),
    np.int64(1), np.zeros(3), np.zeros((3, 1)), np.zeros(3, np.float32), np.ones(3), np.array(["a", None],
    dtype=object), np.array(["b", None], dtype=object), np.dtype("f4"), np.dtype("f8"), torch.zeros(3),
    torch.zeros(3, 1), torch.ones(3), torch.zeros(3, dtype=torch.half), torch.zeros(3, dtype=torch.int32),
    nn.ReLU(), nn.GELU(), nn.Linear(2, 3), nn.Linear(2, 4), nn.Dropout(0.1), nn.Dropout(0.2),
    nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU()), twice, thrice, scaled(1), scaled(2), lambda x: x, lambda x:
    x + 1, lambda x, y=1: x, lambda x, y=2: x, len, max, torch.relu, torch.tanh, np.add, np.multiply, int, float,
    Opaque, Settings, nn.ReLU, nn.GELU, math, re, functools.partial(twice, 1), functools.partial(twice, 2),
    functools.partial(twice, x=1), functools.partial(thrice, 1), Described(1).__repr__, Described(2).__repr__,
    lambda x, *, y=1: x, lambda x, *, y=2: x, Point(1, 3), [Point(1, 2)],
]  # fmt: skip


def test_plain_values_differ_by_type_and_value():
    encoded = [encode_plain(value) for value in PLAIN]
    assert None not in encoded
    assert len(set(encoded)) == len(encoded)


def test_arguments_differ_by_type_and_value():
    encoded = {}
    for i, value in enumerate(ARGUMENTS):
        previous = encoded.setdefault(encode_argument(value, "argument"), i)
        assert previous == i, f"{ARGUMENTS[previous]!r} and {value!r} have the same bytes"


def test_equal_arguments_have_equal_bytes():
    pairs = [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"x", "y", "z"}, {"z", "y", "x"}),
        ([1, [2]], [1, [2]]),
        (Settings(3), Settings(3)),
        (scaled(3), scaled(3)),
        (nn.Linear(2, 3), nn.Linear(2, 3)),
        (torch.ones(2, 3), torch.ones(3, 2).t()),
        (np.ones((2, 3)), np.ones((3, 2)).T),
        (functools.partial(twice, 1), functools.partial(twice, 1)),
        (Described(1), Described(1)),
        (math.nan, float("nan")),
    ]
    for a, b in pairs:
        assert encode_argument(a, "argument") == encode_argument(b, "argument")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.tuples(inner) | st.just(()),
    max_leaves=8,
)


def typed(value):
    """Say type and value in a form that Python compares by both."""
    if isinstance(value, tuple):
        return tuple(map(typed, value))
    return type(value).__name__, repr(value)


@given(values, values)
def test_plain_values_have_equal_bytes_exactly_if_they_are_equal_by_type_and_value(a, b):
    assert (encode_plain(a) == encode_plain(b)) == (typed(a) == typed(b))


@pytest.mark.parametrize("value", [[1], {}, object(), np.zeros(3), ([1],), slice([1]), Opaque(), twice, int])
def test_what_may_change_is_not_plain(value):
    assert encode_plain(value) is None


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (Opaque(), "argument"),
        ([1, Opaque()], "argument[1]"),
        ({"a": (Opaque(),)}, "argument['a'][0]"),
        (Settings(Opaque()), "argument['width']"),
        (functools.partial(twice, Opaque()), "argument[1][0]"),
        (object(), "argument"),
        (open, None),
    ],
    ids=["itself", "in a list", "in a dict", "in a dataclass", "in a partial", "object", "a builtin"],
)
def test_what_is_known_by_its_address_only_is_named(value, path):
    if path is None:
        assert encode_argument(value, "argument")
        return
    with pytest.raises(UnnamedValueError) as caught:
        encode_argument(value, "argument")
    assert caught.value.path == path
    assert caught.value.type_name in ("Opaque", "object")


def test_a_lambda_that_holds_an_opaque_object_is_named():
    opaque = Opaque()
    with pytest.raises(UnnamedValueError, match="closure opaque"):
        encode_argument(lambda x: (x, opaque), "argument")


def test_values_that_contain_themselves_come_to_an_end():
    a, b, c = [1], [1], [2]
    for value in (a, b, c):
        value.append(value)
    assert encode_argument(a, "argument") == encode_argument(b, "argument") != encode_argument(c, "argument")
    mapping = {}
    mapping["self"] = [mapping]
    assert encode_argument(mapping, "argument")


def no_module(value):
    return b"referred"


def test_an_object_of_ones_own_in_the_state_counts_by_its_attributes():
    assert encode_state(Opaque(1), "x", no_module) == encode_state(Opaque(1), "x", no_module)
    assert encode_state(Opaque(1), "x", no_module) != encode_state(Opaque(2), "x", no_module)
    assert encode_state([Opaque([1])], "x", no_module) != encode_state([Opaque([2])], "x", no_module)


def test_a_foreign_object_without_a_name_counts_by_its_type():
    import threading

    assert encode_state(threading.Lock(), "x", no_module) == encode_state(threading.Lock(), "x", no_module)
    assert encode_state(threading.Lock(), "x", no_module) != encode_state(threading.Event(), "x", no_module)


def test_a_network_of_objects_comes_to_an_end():
    a, b = Opaque(), Opaque()
    a.value, b.value = [b, 1], {"a": a}
    assert encode_state(a, "x", no_module)


# -- tensors ----------


def test_a_tensor_counts_by_dtype_shape_and_every_byte():
    tensor = torch.zeros(70_000)
    encoded = encode_tensor(tensor)
    for place in (0, 1, 4095, 4096, 40_000, 69_999):
        changed = tensor.clone()
        changed[place] = 1e-45
        assert encode_tensor(changed) != encoded
    assert encode_tensor(tensor.view(torch.int32)) != encoded
    assert encode_tensor(tensor.view(700, 100)) != encoded
    assert encode_tensor(tensor.clone()) == encoded


def test_the_strides_of_a_tensor_do_not_count():
    tensor = torch.rand(3, 4, 5, 6)
    assert encode_tensor(tensor.contiguous(memory_format=torch.channels_last)) == encode_tensor(tensor)
    assert encode_tensor(tensor.transpose(1, 3).contiguous().transpose(1, 3)) == encode_tensor(tensor)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.uint16], ids=str
)
def test_a_tensor_of_any_dtype_counts_by_value(dtype):
    zeros = torch.zeros(16, dtype=torch.uint8)
    ones = torch.ones(16, dtype=torch.uint8)
    assert encode_tensor(zeros.view(dtype)) != encode_tensor(ones.view(dtype))
    assert encode_tensor(zeros.view(dtype)) == encode_tensor(zeros.view(dtype).clone())


def test_conjugate_and_negative_views_count_by_value():
    tensor = torch.complex(torch.rand(4), torch.rand(4))
    assert encode_tensor(tensor.conj()) != encode_tensor(tensor)
    assert encode_tensor(tensor.conj()) == encode_tensor(tensor.conj().resolve_conj())
    assert encode_tensor(tensor.conj().imag) == encode_tensor(-tensor.imag)


def test_tensors_without_bytes_count_by_type_and_shape():
    assert encode_tensor(torch.empty(3, device="meta")) != encode_tensor(torch.empty(4, device="meta"))
    assert encode_tensor(torch.empty(0, 3)) != encode_tensor(torch.empty(3, 0))


# -- in other processes ----------

CHILD = """
import sys
sys.path.insert(0, {root!r})
import datetime, functools, pathlib, torch, numpy
from dataclasses import dataclass
from torchcache.keys.values import encode_argument

@dataclass
class Settings:
    words: frozenset

def twice(x):
    return x * 2

for value in (
    {{"a", "b", "c"}}, {{"x": 1, "y": {{"p", "q"}}}}, Settings(frozenset("xyz")), twice, functools.partial(twice, 1),
    torch.arange(5), numpy.arange(5), torch.nn.Linear(2, 3), pathlib.Path("a"), torch.nn.ReLU, print, 1.5, "é",
    datetime.date(2020, 1, 1),
):
    print(encode_argument(value, "argument").hex())
"""


def in_a_child(seed):
    code = CHILD.format(root=str(Path(__file__).parents[2]))
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


def test_other_processes_and_other_hash_seeds_give_the_same_bytes():
    first = in_a_child("1")
    assert len(first) == 14
    assert in_a_child("2") == first
