"""The interpreter's numbers of dictionary changes, where it has them."""

from __future__ import annotations

import sys

import pytest

from torchcache.keys.fast import dict_versions
from torchcache.keys.fast.dict_versions import versions_of


class Thing:
    def __init__(self):
        self.a, self.b = 1, 2


CHANGES = {
    "an attribute": lambda thing, d: setattr(thing, "a", 5),
    "an equal value": lambda thing, d: setattr(thing, "a", float(1)),
    "a new attribute": lambda thing, d: setattr(thing, "c", 5),
    "a deleted attribute": lambda thing, d: delattr(thing, "b"),
    "an item": lambda thing, d: d.__setitem__("a", 5),
    "update": lambda thing, d: d.update(a=5),
    "another order": lambda thing, d: d.__setitem__("a", d.pop("a")),
    "clear": lambda thing, d: d.clear(),
}


def test_versions_are_found_up_to_python_312():
    assert (sys.version_info < (3, 13)) == dict_versions.IS_SUPPORTED


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_gives_another_version(change):
    thing, other = Thing(), Thing()
    read = versions_of([vars(other), vars(thing)])
    if read is None:
        assert sys.version_info >= (3, 13)
        return
    before = read()
    CHANGES[change](thing, vars(thing))
    assert read() != before


def test_reading_and_other_dictionaries_change_nothing():
    thing, other = Thing(), Thing()
    read = versions_of([vars(thing)])
    if read is None:
        assert sys.version_info >= (3, 13)
        return
    before = read()
    for _ in range(1000):
        assert thing.a == 1
        assert list(vars(thing).items())
        other.a = object()
    assert read() == before


def test_an_attribute_that_is_set_in_a_hot_loop_gives_another_version_each_time():
    thing = Thing()
    read = versions_of([vars(thing)])
    if read is None:
        assert sys.version_info >= (3, 13)
        return
    seen = set()
    for i in range(2000):
        thing.a = i
        seen.add(read())
    assert len(seen) == 2000
