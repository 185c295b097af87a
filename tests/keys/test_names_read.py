"""Which attributes code may read, and what that means for the notes of frameworks."""

from __future__ import annotations

import functools
import operator
import pickle

import pytest

from torchcache.keys import frameworks
from torchcache.keys.names_read import NamesRead


def by_name(self):
    return self._note


def by_a_text(self):
    return getattr(self, "_note", None)


def by_a_name_that_starts_so(self, number):
    return getattr(self, f"_no{number}")


def by_any_name(self, name):
    return getattr(self, name)


def by_one_of_several_names(self):
    return [getattr(self, name) for name in ("_note", "_other")]


def by_all_of_them(self):
    return vars(self)


def by_their_dict(self):
    return self.__dict__


def by_a_getter(self, name):
    return operator.attrgetter(name)(self)


def by_a_pickle(self):
    return pickle.dumps(self)


def by_handing_on_what_reads(self, names):
    return [*map(getattr, [self] * len(names), names)]


READING = [value for name, value in list(globals().items()) if name.startswith("by_")]


def another_name(self):
    return self.note


def a_name_that_starts_otherwise(self, number):
    return getattr(self, f"layer{number}")


def another_text(self):
    return getattr(self, "note", None), hasattr(self, "note")


NOT_READING = [another_name, a_name_that_starts_otherwise, another_text]


def reads(function):
    read = NamesRead()
    read.note(function)
    return read.may_read(["_note"])


@pytest.mark.parametrize("function", READING)
def test_what_may_read_an_attribute_is_seen(function):
    assert reads(function)


@pytest.mark.parametrize("function", NOT_READING)
def test_what_reads_others_does_not_read_it(function):
    assert not reads(function)


def test_a_class_of_the_users_own_has_no_notes_of_frameworks():
    own = type("LightningModule", (), {"__module__": "lightning.pytorch.core.module"})
    assert not frameworks.leaves_out(own, "_trainer", NamesRead())


class _Base:
    def __init__(self):
        self._note = None

    @property
    def note(self):
        return self._note

    @functools.cached_property
    def cached_note(self):
        return self.note

    @staticmethod
    def of(other):
        return other.cached_note

    def log(self):
        if self._note is not None:
            print(self._note)

    def other(self):
        return self.log()


def test_a_note_is_also_read_by_the_names_that_hand_it_out():
    names = frameworks._names_that_give(_Base, "_note", (_Base.__module__.partition(".")[0],))
    assert names == {"_note", "note", "cached_note", "of"}
