"""The dictionaries, slots and variables that hold the values in the key, watched so that an assignment is noticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from operator import getitem, itemgetter
from typing import Any

from torchcache.keys.attributes import attributes_of
from torchcache.keys.entries import dump
from torchcache.keys.fast import dict_versions
from torchcache.keys.fast.dict_versions import Reader
from torchcache.keys.places import Name

_NUMBERS = (int, float, complex, bool)
_COMPARABLE = (str, bytes, type(None))

#: Reads some keys of each of several dictionaries.
_Group = tuple["itemgetter[Any]", list[Mapping[str, Any]]]


class Holders:
    """What holds values that count, and the values that it held.

    Dictionaries of the same keys are read by one ``itemgetter`` each, which costs a tenth of a microsecond.
    Numbers are compared as marshalled bytes, because equal ones of another type (1 and True), and 0.0 and -0.0,
    compare equal; strings by ``==``, which asks for identity first; anything else by identity alone: equal
    dictionaries may have another order, a tensor of one element is equal to another one that is written later, and a
    class may call anything equal. What was seen is held, so an identity cannot be another object's by now.

    Where the interpreter numbers the changes of dictionaries, all of that is asked only once one was changed.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[Mapping[str, Any], tuple[str, ...]]] = []
        self._sized: list[Sized] = []
        self._without_hooks: list[Sized] = []
        self._ordered: list[Mapping[str, Any]] = []
        self._slotted: list[object] = []
        self._named: list[Name] = []
        self._numbers: list[_Group] = []
        self._comparable: list[_Group] = []
        self._owners: list[Mapping[str, Any]] = []  # of the values that are compared by identity,
        self._owned: list[str] = []  # under these keys
        self._held: list[object] = []
        self._seen: tuple[object, ...] = ()
        self._seen_names: list[int] = []
        self._plain: list[dict[str, Any]] = []  # kept alive for their versions
        self._read_versions: Reader | None = None
        self._versions = b""

    def watch(self, values: Mapping[str, Any], keys: Iterable[str], *, may_grow: bool = True) -> None:
        """Watch some keys of a dictionary, and its length if it may grow."""
        self._keys.append((values, tuple(keys)))
        if may_grow:
            self._sized.append(values)

    def watch_order(self, values: Mapping[str, Any]) -> None:
        """Watch the order of a dictionary that code may go through."""
        self._ordered.append(values)

    def watch_for_hooks(self, hooks: Sized) -> None:
        """Watch a dictionary of hooks that has none."""
        self._without_hooks.append(hooks)

    def watch_slots(self, value: object) -> None:
        """Watch the slots of an object."""
        self._slotted.append(value)

    def watch_names(self, names: Iterable[Name]) -> None:
        """Watch variables that code reads."""
        self._named += names

    def remember(self) -> None:
        """Remember what is there now; nothing is watched afterwards that was not before."""
        self._divide_by_comparison()
        watched = [values for values, _ in self._keys]
        self._keys.clear()
        self._plain = [values for values in watched if isinstance(values, dict) and type(values) is dict]
        if len(self._plain) == len(watched):
            self._read_versions = dict_versions.versions_of(self._plain)

        # Versions before values: what changes in between is then looked at again.
        self._versions = self._read_versions() if self._read_versions else b""
        self._held = self._by_identity()
        self._seen = self._read()
        self._seen_names = self._names_by_identity()

    def _divide_by_comparison(self) -> None:
        """Tell apart the keys of numbers, of what compares by ``==``, and of the rest, and group equal sets of keys."""
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Mapping[str, Any]]] = {}
        for values, keys in self._keys:
            numbers: list[str] = []
            comparable: list[str] = []
            for key in keys:
                if type(values[key]) in _NUMBERS:
                    numbers.append(key)
                elif type(values[key]) in _COMPARABLE:
                    comparable.append(key)
                else:
                    self._owners.append(values)
                    self._owned.append(key)
            groups.setdefault((tuple(numbers), tuple(comparable)), []).append(values)

        for (numbers_of_all, comparable_of_all), members in groups.items():
            if numbers_of_all:
                self._numbers.append((itemgetter(*numbers_of_all), members))
            if comparable_of_all:
                self._comparable.append((itemgetter(*comparable_of_all), members))

    def have_moved(self) -> bool:
        """Tell whether anything differs from what was there; raises KeyError where something is gone."""
        # Torch numbers the hooks that it registers, but who copies a module writes them by himself.
        if any(map(len, self._without_hooks)):
            return True
        if self._read_versions is None:
            return self._read() != self._seen

        versions = self._read_versions()
        has_names = self._named or self._slotted
        if versions == self._versions and (not has_names or self._names_by_identity() == self._seen_names):
            return False
        if self._read() != self._seen:
            return True
        self._versions = versions  # something changed that does not count
        return False

    def _names_by_identity(self) -> list[int]:
        """Return the identities of what lies in variables and slots, which have no versions."""
        return list(map(id, self._in_names()))

    def _by_identity(self) -> list[object]:
        """Return the values that are compared by identity."""
        return [*map(getitem, self._owners, self._owned), *self._in_names()]

    def _in_names(self) -> list[object]:
        values = [name.read() for name in self._named]
        for slotted in self._slotted:
            values += (attributes_of(slotted) or {}).values()
        return values

    def _read(self) -> tuple[object, ...]:
        return (
            list(map(len, self._sized)),
            list(map(list, self._ordered)),
            [list(map(getter, members)) for getter, members in self._comparable],
            dump([list(map(getter, members)) for getter, members in self._numbers]),
            list(map(id, self._by_identity())),
        )
