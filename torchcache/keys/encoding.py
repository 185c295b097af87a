"""One encoding of a value: what was encoded so far, and where it comes to an end."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch

from torchcache.keys.digest import digest_parts
from torchcache.keys.observer import Observer, Read
from torchcache.keys.plain import BRINGS_CODE, attributes_of_member, classes_in, encode_plain, type_name

#: What lies deeper in an encoding has no value that can be seen; the stack of the interpreter bounds it too.
DEEPEST = 100

#: At most this many values are encoded at once; what comes after them has no value that can be seen.
_MOST_VALUES = 10_000_000

#: After how many values it is asked whether an encoding takes too long.
_CHECKED_EVERY = 256

#: The types of plain values that long lists are made of.
_FREQUENT = frozenset({str, int, float, bool, type(None)})

#: How objects of a class are encoded.
Way = Callable[["Encoding", Any, str], bytes]


class Encoding:
    """One encoding; the same value is encoded once, and one that contains itself comes to an end.

    Args:
        observer: Is asked and told what is come upon.
        way_of: Returns how objects of a class are encoded.
        is_content: Whether what is encoded was made for it, or is encoded at each call anyway: then it is not noted
            again.

    Attributes:
        is_in_library: Whether what is encoded belongs to an object of a library.
    """

    def __init__(self, observer: Observer, way_of: Callable[[type], Way], *, is_content: bool = False) -> None:
        self.observer = observer
        self.way_of = way_of
        self.is_content: bool = is_content
        self.is_in_library = False
        self._inside: dict[int, int] = {}
        self._done: dict[int, bytes] = {}
        self._kept: list[object] = []  # ids stay unique while the objects live

    def enter(self, owner: object) -> None:
        """Let ``owner`` be a cycle where it is found."""
        self._inside[id(owner)] = 0

    def encode(self, value: object, path: str) -> bytes:
        """Return the bytes of a value; ``path`` says where it lies."""
        plain = encode_plain(value)
        if plain is not None and isinstance(value, BRINGS_CODE):
            for kind in classes_in(value):
                self.observer.note_code(kind)
            if isinstance(value, enum.Enum) and attributes_of_member(value):
                plain = None  # they are watched
        if plain is not None:
            return plain
        return self.encode_in(self.way_of(type(value)), value, path)

    def encode_in(self, way: Way, value: object, path: str) -> bytes:
        """Encode a value that is not plain in a way of its own."""
        number = id(value)
        if number in self._inside:
            return f"cycle {self._inside[number]}".encode()
        known = self._done.get(number)
        if known is not None:
            return known

        if self.observer.limit is not None and not len(self._done) % _CHECKED_EVERY:
            self.observer.limit.check()
        if len(self._done) >= _MOST_VALUES or len(self._inside) >= DEEPEST:
            return self.opaque(value, path)

        self._inside[number] = len(self._inside)
        try:
            encoded = way(self, value, path)
        finally:
            del self._inside[number]
        self._done[number] = encoded
        self._kept.append(value)
        return encoded

    def opaque(self, value: object, path: str) -> bytes:
        """Say that a value cannot be seen."""
        self.observer.note_opaque(path, value)
        return digest_parts([b"opaque", type_name(type(value))])

    # -- several values --------------------------------------------------------------------------------------------

    def items(self, name: bytes, values: Iterable[Any], path: str) -> bytes:
        """Encode values in their order."""
        parts = [name]
        for i, item in enumerate(values):
            # Most items of a long list are plain, and saying where they lie would cost more than they do.
            is_plain = type(item) in _FREQUENT or (type(item) is tuple and _FREQUENT.issuperset(map(type, item)))
            encoded = encode_plain(item) if is_plain else None
            parts.append(encoded or self.encode(item, f"{path}[{i}]"))
        return digest_parts(parts)

    def pairs(self, name: bytes, pairs: Iterable[tuple[Any, Any]], path: str, *, is_order_kept: bool) -> bytes:
        """Encode keys, each with its value."""
        keyed = [(self.encode(key, f"{path} key"), key, value) for key, value in pairs]
        if not is_order_kept:
            keyed.sort(key=itemgetter(0))  # before the values are encoded: what they lead to is noted in this order
        parts = [name]
        for encoded, key, value in keyed:
            named = f"{path}[{key!r}]"
            encoded_value = self.encode(value, named)
            self.observer.note_inner(named, encoded_value)
            parts += [encoded, encoded_value]
        return digest_parts(parts)

    # -- what is encoded again at each call --------------------------------------------------------------------------

    def whole(self, name: bytes, value: object, parts: Sequence[object], path: str) -> bytes:
        """Encode the parts of an object that is encoded again at each call."""
        self.note_content(value, path, self.way_of(type(value)))
        return self.inside_content(lambda: self.items(name, parts, path))

    def note_content(self, value: object, path: str, way: Way, quick: Callable[[Any], object] | None = None) -> Read:
        """Note an object that is encoded again at each call, unless it lies in another one; return what does that."""
        observer = _SilentObserver(self.observer)

        def read() -> bytes:
            return Encoding(observer, self.way_of, is_content=True).encode_in(way, value, path)

        def quick_read() -> bytes:
            assert quick is not None
            return Encoding(observer, self.way_of, is_content=True).encode(quick(value), path)

        if not self.is_content:
            self.observer.note_content(value, read, None if quick is None else quick_read)
        return read

    def inside_content(self, encode: Callable[[], bytes]) -> bytes:
        """Encode parts of what is encoded as a whole at each call: they need no watching of their own."""
        outer, self.is_content = self.is_content, True
        try:
            return encode()
        finally:
            self.is_content = outer


class _SilentObserver(Observer):
    """Encodes what ``note_content`` is told of once more, with nothing to note."""

    def __init__(self, told: Observer) -> None:
        self.counts_generators = told.counts_generators
        self.asks_for_state = told.asks_for_state
        self.looks_again = told.looks_again
        self.leaves_out = told.leaves_out  # type: ignore[method-assign]

    def refer(self, value: torch.nn.Module | torch.Tensor, path: str) -> bytes | None:  # noqa: ARG002 - as of Observer
        return None if isinstance(value, torch.Tensor) else str(id(value)).encode()
