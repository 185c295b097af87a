"""The attributes of objects, and whether an object has any other state."""

from __future__ import annotations

import struct
import sys
import types
from typing import Any

_SLOT = types.MemberDescriptorType
_POINTER_BYTES = struct.calcsize("P")

#: Members of this kind that some classes of C have, and that hold no attribute.
_NO_SLOTS = frozenset({"__dict__", "__dictoffset__", "__vectorcalloffset__", "__weaklistoffset__"})

#: Flags of a type whose objects have their ``__dict__``, or their list of weak references, in front of them, where
#: ``__basicsize__`` does not count it (Include/object.h, from CPython 3.11 and 3.12 on).
_MANAGED_DICT = 1 << 4 if sys.version_info >= (3, 11) else 0
_MANAGED_WEAKREF = 1 << 3 if sys.version_info >= (3, 12) else 0


def attributes_of(value: object) -> dict[str, Any] | None:
    """Return the attributes in an object's ``__dict__`` and slots; None if its class provides for none."""
    attributes = getattr(value, "__dict__", None)
    slots = _slots_of(type(value))
    if not slots:
        return attributes if isinstance(attributes, dict) else None
    present: dict[str, Any] = {}
    for base, name, slot in slots:
        try:
            held = slot.__get__(value)
        except AttributeError:  # it is not set
            continue
        # A derived class may have a slot of the same name.
        present[name if name not in present else f"{base.__qualname__}.{name}"] = held
    return {**present, **attributes} if isinstance(attributes, dict) else present


def slots_of(cls: type) -> list[str]:
    """Return the names of the slots of a class and its bases, whether they are set or not."""
    return [name for _, name, _ in _slots_of(cls)]


def _slots_of(cls: type) -> list[tuple[type, str, types.MemberDescriptorType]]:
    """Return the slots of a class and its bases, each with the class that has it, and its name."""
    return [
        (base, name, slot)
        for base in cls.__mro__
        for name, slot in vars(base).items()
        if isinstance(slot, _SLOT) and name not in _NO_SLOTS
    ]


def adds_attributes_only(cls: type, base: type = object) -> bool:
    """Tell whether all that instances of a class hold beyond what ``base`` holds are attributes.

    By the room that they take: a class written in C has room for more, and so have those derived from it.
    """
    return cls.__itemsize__ == base.__itemsize__ and _bytes_beside_attributes(cls) == _bytes_beside_attributes(base)


def _bytes_beside_attributes(cls: type) -> int:
    has_dict = bool(cls.__dictoffset__) and not cls.__flags__ & _MANAGED_DICT
    has_weakrefs = bool(cls.__weakrefoffset__) and not cls.__flags__ & _MANAGED_WEAKREF
    return cls.__basicsize__ - (len(slots_of(cls)) + has_dict + has_weakrefs) * _POINTER_BYTES
