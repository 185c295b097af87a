"""What lies in containers and objects, to be compared quickly."""

from __future__ import annotations

import itertools
import marshal
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

from torchcache.keys.attributes import attributes_of

#: What marshal writes by type and value.
MARSHALLED = (int, float, complex, bool, str, bytes, type(None))

#: How many characters of a string cost as much as one more value.
_CHARACTERS_PER_VALUE = 64


def entries_of(value: Any) -> Iterator[object]:  # noqa: ANN401 - any container
    """Iterate over what lies in a container, by the methods of the built-in class."""
    if isinstance(value, OrderedDict):
        return itertools.chain.from_iterable(OrderedDict.items(value))
    if isinstance(value, dict):
        entries = itertools.chain.from_iterable(dict.items(value))
        return itertools.chain(entries, [value.default_factory]) if isinstance(value, defaultdict) else entries
    if isinstance(value, list):
        return list.__iter__(value)
    if isinstance(value, set):
        return set.__iter__(value)
    return deque.__iter__(value)


def attribute_entries_of(value: object) -> Iterator[object]:
    """Iterate over an object's class, and names and values of its attributes."""
    return itertools.chain((type(value),), *(attributes_of(value) or {}).items())


def identities_of(value: Any) -> list[int]:  # noqa: ANN401 - any container
    """Return the identities of what lies in a container."""
    return list(map(id, entries_of(value)))


def dump(value: object) -> bytes:
    """Return plain values as bytes, types and all; raises ValueError for anything else."""
    return marshal.dumps(value, 2)  # type: ignore[arg-type] # that is what the ValueError says


def count_if_plain(value: object, most: int) -> int | None:
    """Count the values in a container that holds nothing but what marshal writes by value.

    None if it holds other things, or more than ``most``; a long string counts as many.
    """
    waiting: list[Any] = [value]
    seen = set[int]()
    size = 0
    while waiting:
        item = waiting.pop()
        kind = type(item)
        size += 1
        if kind in (str, bytes):
            size += len(item) // _CHARACTERS_PER_VALUE
        elif kind not in MARSHALLED:
            # What was seen before may contain itself, and marshal would not come to an end.
            if kind not in (list, tuple, set, frozenset, dict) or id(item) in seen:
                return None
            seen.add(id(item))
            waiting += [*item, *item.values()] if kind is dict else item
        if size + len(waiting) > most:
            return None
    return size
