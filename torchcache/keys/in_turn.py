"""Values too large to be compared as a whole at each call: each call compares the next share.

Every part is compared again within a number of calls that the size of all of them decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from torchcache.keys.digest import digest_bytes

#: At most this many entries of containers and objects are compared at each call, and as many more in turn: some 300
#: microseconds.
MOST_ENTRIES = 16_384

#: At most this many bytes of arrays are hashed at each call, and as many more in turn: some 50 microseconds.
MOST_BYTES = 1 << 20

#: How many elements of an array that is hashed in turn are compared at each call: dense changes are seen at once.
_SAMPLED_ELEMENTS = 1024

#: What it costs to turn to the next container, in entries.
_ENTRIES_PER_CONTAINER = 4


class ContainersInTurn:
    """Containers that are too large to be compared at each call."""

    def __init__(self) -> None:
        self._containers: list[Callable[[], Iterator[object]]] = []
        self._seen: list[list[object]] = []
        self._place = 0  # which container comes next, or is under way
        self._offset = 0  # and how much of it was compared
        self._rest: Iterator[object] | None = None

    def __len__(self) -> int:
        return len(self._containers)

    def add(self, entries: Callable[[], Iterator[object]]) -> None:
        """Compare one more container, whose entries a function returns."""
        self._containers.append(entries)

    def remember(self) -> None:
        """Remember what is there now."""
        self._seen = [list(entries()) for entries in self._containers]

    def have_moved(self) -> bool:
        """Compare the next share."""
        left = MOST_ENTRIES
        for _ in range(len(self._containers) + 1):
            if left <= 0 or not self._containers:
                break
            n_compared, is_at_end = self._compare(left)
            if n_compared is None:
                self._rest = None
                return True
            left -= n_compared + _ENTRIES_PER_CONTAINER
            if is_at_end:
                self._place = (self._place + 1) % len(self._containers)
                self._offset = 0
                self._rest = None
        return False

    def _compare(self, most: int) -> tuple[int | None, bool]:
        """Compare the next entries of the container under way.

        Returns:
            How many were compared, or None if something differs, and whether the container's end was reached.
        """
        seen = self._seen[self._place]
        try:
            if self._rest is None:
                self._rest = self._containers[self._place]()
            part = list(itertools.islice(self._rest, most))
        except RuntimeError:  # it has got another size
            return None, False
        is_at_end = len(part) < most
        end = self._offset + len(part)
        if list(map(id, part)) != list(map(id, seen[self._offset : end])):
            return None, is_at_end
        if is_at_end and end != len(seen):
            return None, is_at_end
        self._offset = end
        return len(part), is_at_end


class ArrayBytes:
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


class ArraysInTurn:
    """Arrays that are too large to be hashed at each call.

    Nothing of an array is held between two calls: a bytearray could not be resized meanwhile.
    """

    def __init__(self) -> None:
        self._arrays: list[Callable[[], ArrayBytes]] = []
        self._samples: list[bytes] = []
        self._parts: list[tuple[Callable[[], ArrayBytes], int, bytes]] = []  # the digest of each part, as it was
        self._next = 0

    def __len__(self) -> int:
        return len(self._arrays)

    def add(self, read: Callable[[], ArrayBytes]) -> None:
        """Compare one more array, which a function reads."""
        self._arrays.append(read)

    def remember(self) -> None:
        """Remember what is there now."""
        self._samples = self._sample()
        self._parts = []
        for read in self._arrays:
            for number in range(read().n_parts):
                self._parts.append((read, number, read().part(number)))

    def have_moved(self) -> bool:
        """Compare samples of all, and the next part."""
        if not self._parts:
            return False
        read, number, seen = self._parts[self._next]
        self._next = (self._next + 1) % len(self._parts)
        return self._sample() != self._samples or read().part(number) != seen

    def _sample(self) -> list[bytes]:
        return [read().sample() for read in self._arrays]


def bytes_of_array(array: np.ndarray[Any, Any]) -> ArrayBytes:
    """Return the bytes of an array of numbers as they are now."""
    elements = array.reshape(-1) if array.flags.c_contiguous else array.flat
    return ArrayBytes(f"{array.dtype} {array.shape}", elements, array.itemsize)


def bytes_of_bytearray(value: bytearray) -> ArrayBytes:
    """Return the bytes of a bytearray as they are now."""
    elements = np.frombuffer(value, np.uint8) if value else np.empty(0, np.uint8)
    return ArrayBytes(f"bytearray {len(value)}", elements, 1)


def _digest(part: np.ndarray[Any, Any]) -> bytes:
    return digest_bytes(part.view(np.uint8).data) if part.nbytes else b""
