"""Plain state that the code of an object changes while it computes, such as the seed of a generator of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torchcache.keys.entries import count_if_plain, dump
from torchcache.keys.origins import is_own_class

#: So many objects are looked into, through so many objects and containers, and values of so many parts are compared.
_MOST_OBJECTS = 64
_DEEPEST = 4
_MOST_PARTS = 64

#: After so many computations that changed it and came to the same again it is taken for a note, such as of the last
#: file that was opened, or a counter.
_MOST_TRIES = 8


class OwnState:
    """The plain attributes of some objects of the user's own classes, as far as they may be such state.

    It stands beside the random number generators: whether it changed is asked, and whether that shapes a result tried.

    Args:
        roots: Where to look for the objects; they are held.
        counts: Tells of a class and an attribute whether code assigns it, and some code reads it.
    """

    def __init__(self, roots: Iterable[object], counts: Callable[[type, str], bool]) -> None:
        self._tries_left = _MOST_TRIES
        self._places: list[tuple[dict[str, Any], str]] = []
        for found in _objects_in(roots):
            held = vars(found)
            self._places += [(held, name) for name in held if counts(type(found), name)]

    def mark(self) -> bytes:
        """Return something that differs once the state was changed; always the same once it was tried often."""
        if not self._tries_left:
            return b""
        return dump([held.get(name) if _is_plain(held.get(name)) else None for held, name in self._places])

    def note_without_effect(self) -> None:
        """Note that a result came out the same although the state was another one."""
        self._tries_left = max(0, self._tries_left - 1)

    def saved(self) -> list[Any]:
        """Return copies of the values, for ``restore``."""
        return [copy.deepcopy(held.get(name)) if _is_plain(held.get(name)) else None for held, name in self._places]

    def restore(self, values: list[Any]) -> None:
        """Set the attributes to what they were."""
        for (held, name), value in zip(self._places, values, strict=True):
            now = held.get(name)
            if type(value) is list and type(now) is list:  # others may hold it too
                now[:] = value
            elif value is not None and now != value:
                held[name] = value


def _is_plain(value: object) -> bool:
    return count_if_plain(value, _MOST_PARTS) is not None


def _objects_in(roots: Iterable[object]) -> list[object]:
    """Return the objects of the user's own classes that lie in some values, each once."""
    found: list[object] = []
    seen: set[int] = set()
    waiting = [(root, 0) for root in roots]
    while waiting and len(found) < _MOST_OBJECTS:
        value, depth = waiting.pop(0)
        if id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if type(value) in (list, tuple) and len(value) <= _MOST_OBJECTS:  # type: ignore[arg-type]
            waiting += [(item, depth + 1) for item in value]  # type: ignore[attr-defined]
        held = getattr(value, "__dict__", None)
        if isinstance(value, type) or not isinstance(held, dict):
            continue
        # A library's Subset holds the dataset, and changes nothing of its own.
        waiting += [(item, depth + 1) for item in held.values()]
        if is_own_class(type(value)):
            found.append(value)
    return found
