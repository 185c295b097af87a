"""Python values as bytes: by type and by value, the same in every process."""

from __future__ import annotations

import collections
import ctypes
import datetime as dt
import enum
import functools
import math
import pathlib
import re
import types
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchcache.keys.observer import Observer
from torchcache.keys.plain import encode_plain
from torchcache.keys.values import UnnamedValueError, encode_argument, encode_value


def unseen():
    """Return something that has no value which can be seen."""
    return (i for i in ())


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


def test_an_object_that_remembers_what_pickle_asked_of_it_has_one_value():
    """pandas reduces a period by its ``freq``, which it computes once and keeps among its attributes."""
    period = pd.Period("2000-01-22", freq="D")
    first = encode_argument(period, "day")
    assert encode_argument(period, "day") == first


@pytest.mark.parametrize(
    ("value", "ask"),
    [
        (pd.array([1, None], dtype="Int64"), lambda value: value.dtype),
        (pd.DataFrame({"a": pd.array([1.5, None], dtype="Float64")}), lambda value: value["a"].array.dtype),
        (pd.Int8Dtype(), lambda value: value.numpy_dtype),
        (pd.CategoricalDtype(["a", "b"]), hash),
        (pd.DatetimeTZDtype("ns", "UTC"), lambda value: value.base),
    ],
)
def test_what_pandas_remembers_of_a_value_is_no_part_of_it(value, ask):
    """Its dtypes are objects of the whole process: who asked one before would decide whether another program hits."""
    before = encode_argument(value, "value")
    ask(value)
    assert encode_argument(value, "value") == before


def test_an_array_of_ctypes_is_the_same_whichever_module_made_its_type():
    value = eval("(ctypes.c_char * 977)()", {"__name__": "a_module", "ctypes": ctypes})
    assert type(value).__module__ == "a_module"
    before = encode_argument(value, "text")
    type(value).__module__ = "another_module"
    assert encode_argument(value, "text") == before


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
        (unseen(), "argument"),
        ([1, unseen()], "argument[1]"),
        ({"a": (unseen(),)}, "argument['a'][0]"),
        (Settings(unseen()), "argument.width"),
        (Opaque([unseen()]), "argument.value[0]"),
        (functools.partial(twice, unseen()), "argument[1][0]"),
        (np.array([unseen()]), "argument[2]"),
    ],
    ids=["itself", "in a list", "in a dict", "in a dataclass", "in an object", "in a partial", "in an array"],
)
def test_what_cannot_be_seen_is_named(value, path):
    with pytest.raises(UnnamedValueError) as caught:
        encode_argument(value, "argument")
    assert caught.value.path == path
    assert caught.value.type_name == "generator"


def test_a_lambda_that_holds_an_opaque_object_is_named():
    opaque = unseen()
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


class Noting(Observer):
    """Remembers what could not be seen."""

    def __init__(self):
        self.opaque = []

    def note_opaque(self, path, value):
        self.opaque.append((path, type(value).__qualname__))


def encode_state(value, path="x"):
    """Return the bytes of a value in some state, all of which must be seen."""
    noting = Noting()
    encoded = encode_value(value, path, noting)
    assert noting.opaque == []
    return encoded


def opaque_in(value):
    """Return where a value holds something that cannot be seen."""
    noting = Noting()
    encode_value(value, "x", noting)
    return noting.opaque


def test_an_object_of_ones_own_in_the_state_counts_by_its_attributes():
    assert encode_state(Opaque(1)) == encode_state(Opaque(1))
    assert encode_state(Opaque(1)) != encode_state(Opaque(2))
    assert encode_state([Opaque([1])]) != encode_state([Opaque([2])])


def test_a_foreign_object_without_a_name_counts_by_its_type():
    import threading

    assert encode_state(threading.Lock()) == encode_state(threading.Lock())
    assert encode_state(threading.Lock()) != encode_state(threading.Event())
