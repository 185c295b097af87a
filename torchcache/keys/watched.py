"""Values in state, compared at each call, so that a change is noticed.

An encoding of state tells ``Watched`` what it came upon. What is small is compared at each call; of what is large, a
share at each call, in turn, so that every part is compared again within a number of calls that its size decides:

- containers and attributes: the first ``MOST_ENTRIES`` at each call, then ``MOST_ENTRIES`` per call of the others;
- arrays: the first ``MOST_BYTES`` at each call, then a sample of each at each call and ``MOST_BYTES`` per call.

Objects of registered classes, and those that are known by what pickle would keep, are encoded again at each call, but
for tokenizers, whose vocabulary is after ``CALLS_BETWEEN_LOOKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from torchcache.keys.attributes import slots_of
from torchcache.keys.entries import (
    MARSHALLED,
    attribute_entries_of,
    count_if_plain,
    dump,
    entries_of,
    identities_of,
)
from torchcache.keys.fast import dict_versions
from torchcache.keys.fast.attribute_dicts import Makeup
from torchcache.keys.fast.dict_versions import Reader
from torchcache.keys.holders import Holders
from torchcache.keys.in_turn import (
    MOST_BYTES,
    MOST_ENTRIES,
    ArrayBytes,
    ArraysInTurn,
    ContainersInTurn,
    bytes_of_array,
    bytes_of_bytearray,
)
from torchcache.keys.observer import Read

#: After how many calls what shows most of its changes at a quick look is looked at as a whole.
CALLS_BETWEEN_LOOKS = 64


class Watched:
    """What was come upon in state, as it was then.

    Not thread-safe: its owner asks it under a lock.

    Attributes:
        holders: What holds the values that a change would be assigned to.
    """

    def __init__(self) -> None:
        self.holders: Holders = Holders()
        self._known: dict[int, bool] = {}  # containers by id, and whether what lies inside is taken care of
        self._known_objects: set[int] = set()  # an object may be a container, or registered, and have attributes too
        self._known_contents: set[int] = set()
        self._objects: list[object] = []  # of which the class, or the dictionary of attributes, may be replaced
        self._attributes: list[object] = []  # kept alive, so that no other dictionary takes the place of one
        self._makeup: Makeup = Makeup([])
        self._entries_left = MOST_ENTRIES
        self._bytes_left = MOST_BYTES
        self._dicts: list[tuple[dict[Any, Any], Callable[[Any], object]]] = []  # compared only where one was changed
        self._read_versions: Reader | None = None
        self._versions = b""
        self._dumped: list[object] = []  # compared by value
        self._listed: list[Callable[[], Iterator[object]]] = []  # compared by identity
        self._arrays: list[Callable[[], ArrayBytes]] = []
        self._contents: list[Read] = []
        self._large_contents: list[Read] = []  # looked at now and then
        self._seen_large: list[bytes] = []
        self._calls = 0
        self._containers_in_turn = ContainersInTurn()
        self._arrays_in_turn = ArraysInTurn()
        self._held: list[list[object]] = []  # identities that were seen cannot be another object's by now
        self._in_dicts: list[object] = []
        self._seen: tuple[object, ...] = ()
        self._questions: list[Callable[[], bool]] = []  # whether something has moved, of all that there is

    # -- being told -------------------------------------------------------------------------------------------------

    def add_container(self, value: Any) -> bool:  # noqa: ANN401 - of any built-in type
        """Watch a container; return whether all that lies in it is watched with it."""
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = self._add_new_container(value)
        return known

    def _add_new_container(self, value: Any) -> bool:  # noqa: ANN401 - as above
        if isinstance(value, bytearray):
            self._add_array(partial(bytes_of_bytearray, value), len(value))
            return False

        has_version = dict_versions.IS_SUPPORTED and type(value) is dict
        if has_version and all(type(entry) in MARSHALLED for entry in entries_of(value)):
            self._entries_left -= 1
            self._dicts.append((value, dump))
            return True

        size = count_if_plain(value, self._entries_left)
        if size is not None:
            self._entries_left -= size
            self._dumped.append(value)
            return True

        if has_version:
            self._entries_left -= 1
            self._dicts.append((value, identities_of))
        else:
            self._add_entries(partial(entries_of, value), len(value))
        return False

    def add_attributes(self, value: object, names: Sequence[str]) -> None:
        """Watch the attributes of an object."""
        if id(value) in self._known_objects:
            return
        self._known_objects.add(id(value))

        plain = getattr(value, "__dict__", None)
        has_version = dict_versions.IS_SUPPORTED and plain is not None
        size = 1 if has_version else len(names)
        is_readable = plain is None or isinstance(plain, dict)
        if size > self._entries_left or not is_readable:
            self._add_entries(partial(attribute_entries_of, value), len(names))
            return

        self._entries_left -= size
        self.add_object(value)
        if plain is not None:
            self.holders.watch(plain, [name for name in names if name in plain])
        if slots_of(type(value)):
            self.holders.watch_slots(value)

    def add_object(self, value: object) -> None:
        """Watch of which class an object is, and which dictionary has its attributes."""
        self._objects.append(value)

    def add_array(self, value: np.ndarray[Any, Any]) -> None:
        """Watch an array of numbers."""
        self._add_array(partial(bytes_of_array, value), value.nbytes)

    def add_content(self, value: object, read: Read, quick_read: Read | None) -> None:
        """Watch an object that has to be encoded again to see whether it has changed."""
        if id(value) in self._known_contents:
            return
        self._known_contents.add(id(value))
        if quick_read is not None:
            self._large_contents.append(read)
        self._contents.append(quick_read or read)

    def _add_entries(self, entries: Callable[[], Iterator[object]], size: int) -> None:
        if size > self._entries_left:
            self._containers_in_turn.add(entries)
            return
        self._entries_left -= size
        self._listed.append(entries)

    def _add_array(self, read: Callable[[], ArrayBytes], size: int) -> None:
        if size > self._bytes_left:
            self._arrays_in_turn.add(read)
            return
        self._bytes_left -= size
        self._arrays.append(read)

    # -- comparing --------------------------------------------------------------------------------------------------

    def remember(self) -> None:
        """Remember what is there now; nothing is watched afterwards that was not before."""
        self.holders.remember()
        self._read_versions = dict_versions.versions_of([value for value, _ in self._dicts])

        # Versions before entries: what changes in between is then looked at again.
        self._versions = self._read_versions() if self._read_versions else b""
        self._held = [list(entries()) for entries in self._listed]
        self._held += [list(entries_of(value)) for value, _ in self._dicts]
        self._in_dicts = [way(value) for value, way in self._dicts]
        self._containers_in_turn.remember()
        self._arrays_in_turn.remember()
        self._attributes = [getattr(value, "__dict__", None) for value in self._objects]
        self._makeup = Makeup(self._objects)
        self._seen = self._read()
        self._seen_large = [read() for read in self._large_contents]
        self._questions = self._needed_questions()

    def _needed_questions(self) -> list[Callable[[], bool]]:
        """Return what to ask at each call, in this order: most states hold little that has to be asked for."""
        questions = [self.holders.have_moved]
        if self._objects:
            questions.append(self._objects_moved)
        if self._dicts:
            questions.append(self._dicts_moved)
        if self._dumped or self._listed or self._arrays or self._contents:
            questions.append(self._values_moved)
        if self._containers_in_turn:
            questions.append(self._containers_in_turn.have_moved)
        if self._arrays_in_turn:
            questions.append(self._arrays_in_turn.have_moved)
        if self._large_contents:
            questions.append(self._large_contents_moved)
        return questions

    def have_moved(self) -> bool:
        """Tell whether anything differs from what was there; raises KeyError where something is gone."""
        for has_moved in self._questions:  # noqa: SIM110 - a generator would cost as much as the questions
            if has_moved():
                return True
        return False

    def _objects_moved(self) -> bool:
        return self._makeup.has_changed(self._objects)

    def _dicts_moved(self) -> bool:
        versions = self._read_versions() if self._read_versions else b""
        if versions == self._versions:
            return False
        if [way(value) for value, way in self._dicts] != self._in_dicts:
            return True
        self._versions = versions  # something was assigned that was there
        return False

    def _values_moved(self) -> bool:
        return self._read() != self._seen

    def _large_contents_moved(self) -> bool:
        self._calls = (self._calls + 1) % CALLS_BETWEEN_LOOKS
        return not self._calls and [read() for read in self._large_contents] != self._seen_large

    def _read(self) -> tuple[object, ...]:
        return (
            [dump(value) for value in self._dumped],
            [list(map(id, entries())) for entries in self._listed],
            [read().digest() for read in self._arrays],
            [read() for read in self._contents],
        )
