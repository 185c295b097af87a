"""Whether attributes are all that objects of a class hold, on every version of Python. This file needs no torch."""

from __future__ import annotations

import array
import collections
import datetime as dt
import decimal
import functools
import io
import itertools
import queue
import threading
import types

import pytest

from torchcache.keys.attributes import adds_attributes_only, attributes_of


class Plain:
    pass


class Slots:
    __slots__ = ("a", "b")


class MoreSlots(Slots):
    __slots__ = ("__weakref__", "c")


class SlotsAndMore(Slots):
    pass


BUILT_IN = (
    int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset, collections.deque,
    collections.OrderedDict, collections.defaultdict, array.array, dt.date, dt.datetime, io.BytesIO,
    Exception, decimal.Decimal, threading.local,
)  # fmt: skip


@pytest.mark.parametrize("cls", [object, Plain, Slots, MoreSlots, SlotsAndMore, types.SimpleNamespace])
def test_objects_of_classes_in_python_hold_attributes_only(cls):
    assert adds_attributes_only(cls)


@pytest.mark.parametrize(
    "cls",
    [base for base in BUILT_IN if base is not complex] + [itertools.count, queue.SimpleQueue, functools.lru_cache],
)
def test_objects_of_classes_in_c_hold_more(cls):
    if not isinstance(cls, type):
        cls = type(cls(len))
    assert not adds_attributes_only(cls)
    if cls in BUILT_IN:
        assert not adds_attributes_only(type("Derived", (cls,), {}))


@pytest.mark.parametrize("base", BUILT_IN)
def test_a_class_that_is_derived_in_python_adds_attributes_only(base):
    derived = type("Derived", (base,), {})
    assert adds_attributes_only(base, base)
    assert adds_attributes_only(derived, base)
    assert adds_attributes_only(type("Bare", (base,), {"__slots__": ()}), base)
    assert adds_attributes_only(type("Further", (derived,), {"a": 1}), base)
    if not base.__itemsize__:
        assert adds_attributes_only(type("Slotted", (base,), {"__slots__": ("x", "y")}), base)


def test_a_class_in_c_that_is_derived_from_another_holds_more_than_that():
    assert not adds_attributes_only(collections.OrderedDict, dict)
    assert adds_attributes_only(collections.Counter, dict)
    assert not adds_attributes_only(dt.datetime, dt.date)


def test_attributes_lie_in_slots_and_in_a_dict():
    made = SlotsAndMore()
    made.a, made.z = 1, 2
    assert attributes_of(made) == {"a": 1, "z": 2}
    assert attributes_of(3) is None
    assert attributes_of(types.SimpleNamespace(k=1)) == {"k": 1}
