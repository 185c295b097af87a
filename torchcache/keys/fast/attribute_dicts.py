"""Of which classes many objects are, and which dictionaries have their attributes, asked of the interpreter at once.

CPython keeps a pointer to the dictionary in each object, or in front of it. Whether it lies there is looked up for each
object; one that has it elsewhere is asked by name, and not at all if its class makes another one each time. This module
does not import torch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from operator import attrgetter

_POINTER = ctypes.sizeof(ctypes.c_void_p)
_View = ctypes.c_char * _POINTER

#: A flag of types whose objects have the pointer in front of them (CPython 3.11), and how far in front.
_IS_MANAGED = 1 << 4
_IN_FRONT = -3 * _POINTER

_attributes_of = attrgetter("__dict__")  # a third faster than vars


class Makeup:
    """Of which classes some objects are, and which dictionaries have their attributes: both can be assigned.

    Holds none of the objects. Whoever has this keeps their dictionaries, or another one may take the place of one.
    """

    def __init__(self, objects: Sequence[object]) -> None:
        self._types = list(map(type, objects))
        views = [_view_of(owner) for owner in objects]
        self._views = [view for view in views if view is not None]
        self._named = [i for i, view in enumerate(views) if view is None and _has_one(objects[i])]
        self._seen = b"".join(self._views)
        self._seen_named = self._ask(objects)

    def has_changed(self, objects: Sequence[object]) -> bool:
        """Compare with what is so now of the same objects, which are alive, or None where one is gone."""
        if list(map(type, objects)) != self._types or b"".join(self._views) != self._seen:
            return True
        return bool(self._named) and self._ask(objects) != self._seen_named

    def _ask(self, objects: Sequence[object]) -> list[int]:
        return [id(_attributes_of(objects[i])) for i in self._named]


def _view_of(owner: object) -> memoryview | None:
    """Return a live view of the pointer in an object; None where it is not found."""
    cls = type(owner)
    offset = _IN_FRONT if cls.__flags__ & _IS_MANAGED else cls.__dictoffset__
    if sys.implementation.name != "cpython" or (offset <= 0 and offset != _IN_FRONT):
        return None
    attributes = _attributes_of(owner)  # which some objects have from now on only
    view = memoryview(_View.from_address(id(owner) + offset))
    return view if int.from_bytes(view, sys.byteorder) == id(attributes) else None


def _has_one(owner: object) -> bool:
    """Tell whether an object has the same dictionary each time."""
    one = getattr(owner, "__dict__", None)
    return one is not None and getattr(owner, "__dict__", None) is one
