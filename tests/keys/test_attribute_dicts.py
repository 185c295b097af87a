"""Another dictionary of attributes is seen by its address, and without the interpreter's help."""

from __future__ import annotations

import sys
import types

import pytest

from torchcache.keys.fast import attribute_dicts


class Slotted:
    __slots__ = ("__dict__", "a")


class OfList(list):
    pass


def function():
    """Have attributes at a place of its own."""


MAKE = [
    type("Plain", (), {}),
    Slotted,
    OfList,
    Exception,
    types.SimpleNamespace,
    lambda: types.FunctionType(function.__code__, {}),
]


@pytest.fixture(params=[True, False], ids=["pointers", "names"])
def pointers(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(attribute_dicts, "_view_of", lambda owner: None)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("make", MAKE)
def test_another_dictionary_is_seen(make):
    objects = [make() for _ in range(3)]
    before = [vars(held) for held in objects]
    makeup = attribute_dicts.Makeup(objects)
    objects[1].some = 1
    assert not makeup.has_changed(objects)
    if not isinstance(objects[1], types.SimpleNamespace):  # whose dictionary cannot be assigned
        objects[1].__dict__ = dict(before[1])
        assert makeup.has_changed(objects)
        objects[1].__dict__ = before[1]
        assert not makeup.has_changed(objects)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="other interpreters keep it elsewhere")
def test_where_the_pointer_lies_it_is_found():
    assert [attribute_dicts._view_of(make()) for make in MAKE].count(None) == 0


def test_a_dictionary_that_is_made_anew_each_time_is_no_change():
    class Shown:
        @property
        def __dict__(self):
            return {}

    objects = [Shown(), Slotted()]
    makeup = attribute_dicts.Makeup(objects)
    assert not makeup.has_changed(objects)
    objects[1].__dict__ = {}
    assert makeup.has_changed(objects)
