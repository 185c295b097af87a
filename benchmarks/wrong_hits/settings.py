"""A file of the user's own that the programs of ``wrong-hits`` import, as ``settings``."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

FACTOR = 2  # next run: FACTOR = 3


def twice(x: T) -> T:
    """Scale a tensor or an array."""
    return x * 2  # next run: return x * 3
