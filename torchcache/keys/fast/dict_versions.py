"""Whether dictionaries were changed at all, asked of the interpreter at once.

CPython up to 3.12 gives each dictionary a number that is new after each change (PEP 509). It has no function
for Python code, so it is read where it lies, behind the number of items; a trial at import sees whether that
is so and whether every way to change a dictionary gives a new number. Where not, there is no reader, and whoever wants
to know compares what the dictionaries hold.

This module does not import torch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from typing import Any

#: Reference count, type and number of items come first.
_OFFSET = object.__basicsize__ + ctypes.sizeof(ctypes.c_ssize_t)
_SIZE = ctypes.sizeof(ctypes.c_uint64)

Reader = Callable[[], bytes]


def versions_of(dictionaries: Iterable[dict[str, Any]]) -> Reader | None:
    """Return a function whose result differs once one of the dictionaries was changed; None where there is none.

    Its owner keeps the dictionaries alive.
    """
    return _reader(dictionaries) if IS_SUPPORTED else None


def _reader(dictionaries: Iterable[dict[str, Any]]) -> Reader:
    # Of a memoryview, bytes are had a quarter faster than of what it shows.
    views = [memoryview((ctypes.c_char * _SIZE).from_address(id(d) + _OFFSET)) for d in dictionaries]
    return lambda: b"".join(views)


class _Trial:
    """An object whose attributes are set as users set them."""


def _set_attribute(trial: _Trial, value: object) -> None:
    trial.a = value  # type: ignore[attr-defined]


def _works() -> bool:
    """Change a dictionary in every way and see whether its number does."""
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 13):
        return False
    trial = _Trial()
    trial.a = trial.b = 0  # type: ignore[attr-defined]
    plain: dict[str, Any] = vars(trial)
    changes: list[Callable[[], object]] = [
        lambda: plain.__setitem__("a", object()),
        lambda: plain.update(a=object()),
        lambda: plain.__setitem__("c", 1),
        lambda: plain.pop("c"),
        lambda: plain.setdefault("c", 2),
        plain.popitem,
        lambda: plain.__ior__({"a": object()}),
        lambda: setattr(trial, "a", object()),
        lambda: delattr(trial, "b"),
        lambda: object.__setattr__(trial, "b", object()),
        # Often enough that the interpreter has specialised the instruction.
        *[lambda: _set_attribute(trial, object())] * 100,
        plain.clear,
        lambda: _set_attribute(trial, object()),
    ]
    read = _reader([plain])
    seen = {read()}
    for change in changes:
        change()
        if read() in seen or read() != read():
            return False
        seen.add(read())
    return True


IS_SUPPORTED = _works()
