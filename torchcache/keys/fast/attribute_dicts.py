"""Which dictionaries have the attributes of many objects, asked of the interpreter at once.

CPython keeps a pointer to it in each object, or in front of it. Whether it lies there is looked up for each object;
where one has it elsewhere, all are asked by name, which takes three times as long. This module does not import torch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter

_POINTER = ctypes.sizeof(ctypes.c_void_p)
_View = ctypes.c_char * _POINTER

#: A flag of types whose objects have the pointer in front of them (CPython 3.11), and how far in front.
_IS_MANAGED = 1 << 4
_IN_FRONT = -3 * _POINTER

_attributes_of = attrgetter("__dict__")  # a third faster than vars


def reader_of(objects: Sequence[object]) -> Callable[[], object]:
    """Return a function whose result differs once one of the objects has its attributes in another dictionary.

    Its owner keeps the objects alive, and the dictionaries that they have now.
    """
    views = list(map(_view_of, objects))
    if all(view is not None for view in views):
        return lambda: b"".join(views)  # type: ignore[arg-type] # none is None
    return lambda: list(map(id, map(_attributes_of, objects)))


def _view_of(owner: object) -> memoryview | None:
    """Return a live view of the pointer in an object; None where it is not found."""
    cls = type(owner)
    offset = _IN_FRONT if cls.__flags__ & _IS_MANAGED else cls.__dictoffset__
    if sys.implementation.name != "cpython" or (offset <= 0 and offset != _IN_FRONT):
        return None
    attributes = _attributes_of(owner)  # which some objects have from now on only
    view = memoryview(_View.from_address(id(owner) + offset))
    return view if int.from_bytes(view, sys.byteorder) == id(attributes) else None
