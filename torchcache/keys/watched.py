"""Values in state, compared at each call, so that a change is noticed.

An encoding of state tells ``Watched`` what it came upon. What is small is compared at each call; of what is large, a
share at each call, in turn, so that every part is compared again within a number of calls that its size decides:

- containers and attributes: the first ``MOST_ENTRIES`` at each call, then ``MOST_ENTRIES`` per call of the others;
- arrays: the first ``MOST_BYTES`` at each call, then a sample of each at each call and ``MOST_BYTES`` per call.

Objects of registered classes, and those that are known by what pickle would keep, are encoded again at each call, but
for tokenizers, whose vocabulary is after ``CALLS_BETWEEN_LOOKS``.
"""

from __future__ import annotations

import itertools
import marshal
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from operator import getitem, itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torchcache.keys.attributes import attributes_of, slots_of
from torchcache.keys.dict_versions import IS_SUPPORTED, Reader, versions_of
from torchcache.keys.digest import digest_bytes
from torchcache.keys.places import Name
from torchcache.keys.values import Look

#: At most so many entries of containers and objects are compared at each call, and so many more in turn: some 300
#: microseconds.
MOST_ENTRIES = 16_384

#: At most so many bytes of arrays are hashed at each call, and so many more in turn: some 50 microseconds.
MOST_BYTES = 1 << 20

#: After so many calls, what shows most of its changes at a quick look is looked at as a whole.
CALLS_BETWEEN_LOOKS = 64

#: So many elements of an array that is hashed in turn are compared at each call: dense changes are seen at once.
_SAMPLED_ELEMENTS = 1024

#: What it costs to turn to the next container, in entries.
_ENTRIES_PER_CONTAINER = 4

_NUMBERS = (int, float, complex, bool)
_PLAIN = (str, bytes, type(None))
_MARSHALLED = (int, float, complex, bool, str, bytes, type(None))


class Watched:
    """What was come upon in state, as it was then.

    Not thread-safe: its owner asks it under a lock.

    Attributes:
        places: Where values lie that a change would be assigned to.
    """

    def __init__(self) -> None:
        self.places = Places()
        self._known: dict[int, bool] = {}  # containers by id, and whether what lies inside is taken care of
        self._known_objects: set[int] = set()  # an object may be a container, or registered, and have attributes too
        self._known_contents: set[int] = set()
        self._entries_left = MOST_ENTRIES
        self._bytes_left = MOST_BYTES
        self._dicts: list[tuple[dict[Any, Any], Callable[[Any], object]]] = []  # compared only where one was changed
        self._read_versions: Reader | None = None
        self._versions = b""
        self._dumped: list[object] = []  # compared by value
        self._listed: list[Callable[[], Iterator[object]]] = []  # compared by identity
        self._arrays: list[Callable[[], _Bytes]] = []
        self._contents: list[Look] = []
        self._large_contents: list[Look] = []  # looked at now and then
        self._seen_large: list[bytes] = []
        self._calls = 0
        self._containers_in_turn = _ContainersInTurn()
        self._arrays_in_turn = _ArraysInTurn()
        self._held: list[list[object]] = []  # identities that were seen cannot be another object's by now
        self._in_dicts: list[object] = []
        self._seen: tuple[object, ...] = ()

    # -- being told -------------------------------------------------------------------------------------------------

    def add_container(self, value: Any) -> bool:  # noqa: ANN401 - of any built-in type
        """Watch a container; return whether all that lies in it is watched with it."""
        if id(value) in self._known:
            return self._known[id(value)]
        self._known[id(value)] = False
        if isinstance(value, bytearray):
            self._add_array(partial(_bytes_of_bytearray, value), len(value))
            return False
        has_version = IS_SUPPORTED and type(value) is dict
        is_flat = has_version and all(type(entry) in _MARSHALLED for entry in _entries_of(value))
        size = None if is_flat else _count_if_plain(value, self._entries_left)
        if size is not None:
            self._entries_left -= size
            self._dumped.append(value)
        elif has_version:
            self._entries_left -= 1
            self._dicts.append((value, _dump if is_flat else _identities))
        else:
            self._add_entries(partial(_entries_of, value), len(value))
        self._known[id(value)] = is_flat or size is not None
        return self._known[id(value)]

    def add_attributes(self, value: object, names: Sequence[str]) -> None:
        """Watch the attributes of an object."""
        if id(value) in self._known_objects:
            return
        self._known_objects.add(id(value))
        plain = getattr(value, "__dict__", None)
        size = 1 if IS_SUPPORTED and plain is not None else len(names)
        if size > self._entries_left or not (plain is None or isinstance(plain, dict)):
            self._add_entries(partial(_attributes, value), len(names))
            return
        self._entries_left -= size
        if plain is not None:
            self.places.watch(plain, [name for name in names if name in plain])
        if slots_of(type(value)):
            self.places.watch_slots(value)

    def add_array(self, value: np.ndarray[Any, Any]) -> None:
        """Watch an array of numbers."""
        self._add_array(partial(_bytes_of_array, value), value.nbytes)

    def add_content(self, value: object, look: Look, quick_look: Look | None) -> None:
        """Watch an object that has to be looked at again to see whether it has changed."""
        if id(value) in self._known_contents:
            return
        self._known_contents.add(id(value))
        if quick_look is not None:
            self._large_contents.append(look)
        self._contents.append(quick_look or look)

    def _add_entries(self, entries: Callable[[], Iterator[object]], size: int) -> None:
        if size > self._entries_left:
            self._containers_in_turn.add(entries)
            return
        self._entries_left -= size
        self._listed.append(entries)

    def _add_array(self, read: Callable[[], _Bytes], size: int) -> None:
        if size > self._bytes_left:
            self._arrays_in_turn.add(read)
            return
        self._bytes_left -= size
        self._arrays.append(read)

    # -- comparing --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Remember what is there now; nothing is watched afterwards that was not before."""
        self.places.settle()
        self._read_versions = versions_of([value for value, _ in self._dicts])
        # Before the entries: what changes in between is then looked at again.
        self._versions = self._read_versions() if self._read_versions else b""
        self._held = [list(entries()) for entries in self._listed]
        self._held += [list(_entries_of(value)) for value, _ in self._dicts]
        self._in_dicts = [way(value) for value, way in self._dicts]
        self._containers_in_turn.settle()
        self._arrays_in_turn.settle()
        self._seen = self._read()
        self._seen_large = [look() for look in self._large_contents]

    def have_moved(self) -> bool:
        """Tell whether anything differs from what was there; raises KeyError where something is gone."""
        return (
            self.places.have_moved()
            or self._dicts_moved()
            or self._read() != self._seen
            or self._containers_in_turn.have_moved()
            or self._arrays_in_turn.have_moved()
            or self._large_contents_moved()
        )

    def _large_contents_moved(self) -> bool:
        self._calls = (self._calls + 1) % CALLS_BETWEEN_LOOKS
        return not self._calls and [look() for look in self._large_contents] != self._seen_large

    def _dicts_moved(self) -> bool:
        versions = self._read_versions() if self._read_versions else b""
        if versions == self._versions:
            return False
        if [way(value) for value, way in self._dicts] != self._in_dicts:
            return True
        self._versions = versions  # something was assigned that was there
        return False

    def _read(self) -> tuple[object, ...]:
        return (
            [_dump(value) for value in self._dumped],
            [list(map(id, entries())) for entries in self._listed],
            [read().digest() for read in self._arrays],
            [look() for look in self._contents],
        )


class Places:
    """Where the counted values lie that a change would be assigned to: dictionaries, slots, variables.

    Dictionaries of the same keys are read by one ``itemgetter`` each, which costs a tenth of a microsecond.
    Numbers are compared as marshalled bytes, because equal ones of another type (1 and True), and 0.0 and -0.0,
    compare equal; texts, modules and tensors by ``==``, which asks for identity first; anything else by identity
    alone: equal dictionaries may have another order, and a class may call anything equal. What was seen is
    held, so an identity cannot be another object's by now.

    Where the interpreter numbers the changes of dictionaries, all of that is asked only once one was changed.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[Mapping[str, Any], tuple[str, ...]]] = []
        self._sized: list[Sized] = []
        self._without_hooks: list[Sized] = []
        self._hooks_ever = 0
        self._ordered: list[Mapping[str, Any]] = []
        self._slotted: list[object] = []
        self._named: list[Name] = []
        self._numbers: list[tuple[itemgetter[Any], list[Mapping[str, Any]]]] = []
        self._comparable: list[tuple[itemgetter[Any], list[Mapping[str, Any]]]] = []
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
        self._slotted.append(value)

    def watch_names(self, names: Iterable[Name]) -> None:
        self._named += names

    def settle(self) -> None:
        """Remember what is there now; nothing is watched afterwards that was not before."""
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Mapping[str, Any]]] = {}
        for values, keys in self._keys:
            numbers = tuple(key for key in keys if type(values[key]) in _NUMBERS)
            comparable = tuple(key for key in keys if _is_comparable(values[key]))
            groups.setdefault((numbers, comparable), []).append(values)
            for key in keys:
                if key not in numbers and key not in comparable:
                    self._owners.append(values)
                    self._owned.append(key)
        for (numbers, comparable), members in groups.items():
            if numbers:
                self._numbers.append((itemgetter(*numbers), members))
            if comparable:
                self._comparable.append((itemgetter(*comparable), members))
        watched = [values for values, _ in self._keys]
        self._plain = [values for values in watched if isinstance(values, dict) and type(values) is dict]
        if len(self._plain) == len(watched):
            self._read_versions = versions_of(self._plain)
        self._keys.clear()
        self._hooks_ever = RemovableHandle.next_id
        # Before the values: what changes in between is then looked at again.
        self._versions = self._read_versions() if self._read_versions else b""
        self._held = self._by_identity()
        self._seen = self._read()
        self._seen_names = self._names_by_identity()

    def have_moved(self) -> bool:
        """Tell whether anything differs from what was there; raises KeyError where something is gone."""
        if self._have_got_hooks():
            return True
        if self._read_versions is None:
            return self._read() != self._seen
        versions = self._read_versions()
        if versions == self._versions and self._names_by_identity() == self._seen_names:
            return False
        if self._read() != self._seen:
            return True
        self._versions = versions  # something changed that does not count
        return False

    def _names_by_identity(self) -> list[int]:
        """Return the identities of what lies in variables and slots, which have no versions."""
        ids = [id(name.read()) for name in self._named]
        for slotted in self._slotted:
            ids += map(id, (attributes_of(slotted) or {}).values())
        return ids

    def _have_got_hooks(self) -> bool:
        """Tell whether hooks came; torch numbers them all, so mostly nobody has to be asked."""
        if RemovableHandle.next_id == self._hooks_ever:
            return False
        if any(map(len, self._without_hooks)):
            return True
        self._hooks_ever = RemovableHandle.next_id
        return False

    def _read(self) -> tuple[object, ...]:
        return (
            list(map(len, self._sized)),
            list(map(list, self._ordered)),
            [list(map(getter, members)) for getter, members in self._comparable],
            _dump([list(map(getter, members)) for getter, members in self._numbers]),
            list(map(id, self._by_identity())),
        )

    def _by_identity(self) -> list[object]:
        values: list[object] = list(map(getitem, self._owners, self._owned))
        values += [name.read() for name in self._named]
        for slotted in self._slotted:
            values += (attributes_of(slotted) or {}).values()
        return values


def _is_comparable(value: object) -> bool:
    """Tell whether a value is equal to another one only if it is the same for us, and tells that quickly."""
    return type(value) in _PLAIN or isinstance(value, (nn.Module, torch.Tensor))


class _ContainersInTurn:
    """Containers that are too large to be compared at each call."""

    def __init__(self) -> None:
        self._containers: list[Callable[[], Iterator[object]]] = []
        self._seen: list[list[object]] = []
        self._place = 0  # which container comes next, or is under way
        self._offset = 0  # and how much of it was compared
        self._rest: Iterator[object] | None = None

    def add(self, entries: Callable[[], Iterator[object]]) -> None:
        self._containers.append(entries)

    def settle(self) -> None:
        self._seen = [list(entries()) for entries in self._containers]

    def have_moved(self) -> bool:
        """Compare the next share."""
        left = MOST_ENTRIES
        for _ in range(len(self._containers) + 1):
            if left <= 0 or not self._containers:
                break
            seen = self._seen[self._place]
            try:
                if self._rest is None:
                    self._rest = self._containers[self._place]()
                part = list(itertools.islice(self._rest, left))
            except RuntimeError:  # it has got another size
                self._rest = None
                return True
            known = seen[self._offset : self._offset + len(part)]
            at_end = len(part) < left
            if list(map(id, part)) != list(map(id, known)) or (at_end and self._offset + len(part) != len(seen)):
                self._rest = None
                return True
            self._offset += len(part)
            left -= len(part) + _ENTRIES_PER_CONTAINER
            if at_end:
                self._place, self._offset, self._rest = (self._place + 1) % len(self._containers), 0, None
        return False


class _Bytes:
    """The bytes of an array as they are now, in row-major order, read in parts without a copy of the whole."""

    def __init__(self, form: str, elements: Any, item_size: int) -> None:  # noqa: ANN401 - an array or its flat iterator
        self._form = form.encode()
        self._elements = elements
        self._step = max(1, MOST_BYTES // max(1, item_size))

    def digest(self) -> bytes:
        """Return the digest of all of it, and of its dtype and shape."""
        return self._form + _digest(self._elements[:])

    def sample(self) -> bytes:
        """Return some elements, spread over all of it, and its dtype and shape."""
        step = max(1, len(self._elements) // _SAMPLED_ELEMENTS)
        some: bytes = self._elements[::step].tobytes()
        return self._form + some

    @property
    def n_parts(self) -> int:
        """How many parts of ``MOST_BYTES`` there are."""
        return -(-len(self._elements) // self._step)

    def part(self, number: int) -> bytes:
        """Return the digest of one part."""
        return _digest(self._elements[number * self._step : (number + 1) * self._step])


class _ArraysInTurn:
    """Arrays that are too large to be hashed at each call.

    Nothing of an array is held between two calls: a bytearray could not be resized meanwhile.
    """

    def __init__(self) -> None:
        self._arrays: list[Callable[[], _Bytes]] = []
        self._samples: list[bytes] = []
        self._parts: list[tuple[Callable[[], _Bytes], int, bytes]] = []  # the digest of each part, as it was
        self._next = 0

    def add(self, read: Callable[[], _Bytes]) -> None:
        self._arrays.append(read)

    def settle(self) -> None:
        self._samples = self._sample()
        self._parts = [(read, i, read().part(i)) for read in self._arrays for i in range(read().n_parts)]

    def have_moved(self) -> bool:
        """Compare samples of all, and the next part."""
        if not self._parts:
            return False
        read, number, seen = self._parts[self._next]
        self._next = (self._next + 1) % len(self._parts)
        return self._sample() != self._samples or read().part(number) != seen

    def _sample(self) -> list[bytes]:
        return [read().sample() for read in self._arrays]


def _bytes_of_array(array: np.ndarray[Any, Any]) -> _Bytes:
    elements = array.reshape(-1) if array.flags.c_contiguous else array.flat
    return _Bytes(f"{array.dtype} {array.shape}", elements, array.itemsize)


def _bytes_of_bytearray(value: bytearray) -> _Bytes:
    elements = np.frombuffer(value, np.uint8) if value else np.empty(0, np.uint8)
    return _Bytes(f"bytearray {len(value)}", elements, 1)


def _digest(part: np.ndarray[Any, Any]) -> bytes:
    return digest_bytes(part.view(np.uint8).data) if part.nbytes else b""


def _entries_of(value: Any) -> Iterator[object]:  # noqa: ANN401 - any container
    """Iterate over what lies in a container, by the methods of the built-in class."""
    if isinstance(value, dict):
        items = OrderedDict.items(value) if isinstance(value, OrderedDict) else dict.items(value)
        entries: Iterator[object] = itertools.chain.from_iterable(items)
        return itertools.chain(entries, [value.default_factory]) if isinstance(value, defaultdict) else entries
    if isinstance(value, list):
        return list.__iter__(value)
    return set.__iter__(value) if isinstance(value, set) else deque.__iter__(value)


def _identities(value: Any) -> list[int]:  # noqa: ANN401 - any container
    return list(map(id, _entries_of(value)))


def _attributes(value: object) -> Iterator[object]:
    return itertools.chain.from_iterable((attributes_of(value) or {}).items())


def _dump(value: object) -> bytes:
    """Return plain values as bytes, types and all; raises ValueError for anything else."""
    return marshal.dumps(value, 2)  # type: ignore[arg-type] # that is what the ValueError says


def _count_if_plain(value: object, most: int) -> int | None:
    """Count the values in a container that holds nothing but what marshal writes by value.

    None if it holds other things, or more than ``most``; a long text counts as many.
    """
    waiting: list[Any] = [value]
    seen = set[int]()
    size = 0
    while waiting:
        item = waiting.pop()
        kind = type(item)
        size += 1
        if kind in _MARSHALLED:
            size += len(item) // 64 if kind in (str, bytes) else 0
        elif kind not in (list, tuple, set, frozenset, dict) or id(item) in seen:
            return None
        else:
            seen.add(id(item))
            waiting += [*item, *item.values()] if kind is dict else item
        if size + len(waiting) > most:
            return None
    return size
