"""Objects whose state torchcache cannot see, and what a user can say of them."""

from __future__ import annotations

import queue

import pytest
import torch
from torch import nn

from torchcache import ConfigError, cache_of, register_value, torchcache
from torchcache.keys import registry

X = torch.arange(1.0, 7.0).reshape(2, 3)


class Table:
    """Stands for a class written in C: what it holds is behind a handle."""

    def __init__(self, value):
        self._handle = queue.SimpleQueue()
        self._handle.put(value)

    @property
    def value(self):
        value = self._handle.get()
        self._handle.put(value)
        return value

    @value.setter
    def value(self, value):
        self._handle.get()
        self._handle.put(value)


class Scales(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return x * self.table.value


@pytest.fixture(autouse=True)
def registrations():
    """Forget what a test registers."""
    before = dict(registry._by_class)
    yield
    registry._by_class.clear()
    registry._by_class.update(before)
    registry._registered.append(object)  # what was found before is asked again


def test_an_unregistered_class_goes_around_and_a_registered_one_is_cached_by_content():
    module = torchcache()(Scales(Table(2)))
    module(X)
    assert cache_of(module).stats().bypasses == {"opaque_state": 1}
    register_value(Table, lambda table: table.value)
    module = torchcache()(Scales(Table(2)))
    module(X)
    assert torch.equal(module(X), X * 2)
    assert cache_of(module).stats().hits == 2
    module.table.value = 5
    assert torch.equal(module(X), X * 5), "changed in place"
    module.table = Table(2)
    assert torch.equal(module(X), X * 2)
    assert cache_of(module).stats().hits == 4, "an equal one, made anew"


def test_another_registration_takes_the_place_of_the_first():
    register_value(Table, lambda table: 0)
    register_value(Table, lambda table: table.value)
    module = torchcache()(Scales(Table(2)))
    module(X)
    module.table.value = 3
    assert torch.equal(module(X), X * 3)


def test_a_registration_that_raises_says_that_there_is_no_value():
    def fails(table):
        raise OSError("gone")

    register_value(Table, fails)
    module = torchcache()(Scales(Table(2)))
    assert torch.equal(module(X), X * 2)
    assert cache_of(module).stats().bypasses == {"opaque_state": 1}
    assert cache_of(module).stats().faults == {}


def test_parts_of_a_registered_object_may_be_of_any_kind_and_must_be_seen():
    register_value(Table, lambda table: {"a": [torch.ones(2), table.value], "b": (i for i in ())})
    module = torchcache()(Scales(Table(2)))
    module(X)
    assert cache_of(module).stats().bypasses == {"opaque_state": 1}


def test_attributes_that_a_derived_class_adds_count_beside_the_registration():
    class Slotted:
        __slots__ = ("_handle",)

        def __init__(self, handle):
            self._handle = handle

    class Further(Slotted):
        pass

    register_value(Slotted, lambda made: 1)

    @torchcache()
    def scaled(x):
        return x * made.scale

    made = Further(1)
    made.scale = 2
    assert torch.equal(scaled(X), X * 2)
    made.scale = 3
    assert torch.equal(scaled(X), X * 3)


@pytest.mark.parametrize(("cls", "encode", "named"), [(Table(1), len, "cls"), (Table, 3, "encode")])
def test_wrong_registrations_are_refused(cls, encode, named):
    with pytest.raises(ConfigError, match=f"{named}=") as refused:
        register_value(cls, encode)
    assert refused.value.argument == named
