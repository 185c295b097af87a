"""What every kind of value of a whole call's result can do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import msgpack
import numpy as np
import torch

from torchcache.keys.digest import digest_bytes

#: The tags of what holds items in no order: sets and frozensets.
WITHOUT_ORDER = (20, 21)


class PlainValue:
    """A plain value, which is its own entry. The other kinds of values are subclasses.

    Attributes:
        tag: What an entry starts with.
        has_leaf: Whether a leaf has the bytes of the value.
        can_be_key: Whether it is immutable, so that a dict or a set may have it.
    """

    tag: ClassVar[int]
    has_leaf: ClassVar[bool] = False
    can_be_key: ClassVar[bool] = True

    @classmethod
    def take_apart(cls, value: Any, path: str) -> tuple[object, torch.Tensor | None]:  # noqa: ANN401 - here and below: any value of its kind
        """Return the entry of a value, and its leaf if it has one.

        Raises:
            UncacheableError: If it cannot be kept; ``path`` says where it is.
        """
        return [cls.tag, *cls.parts(value, path, 0)], None

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401
        """Return the entry of a value without a leaf, but for its tag.

        Raises:
            UncacheableError: If it cannot be kept; ``path`` says where it is.
        """
        raise NotImplementedError

    @classmethod
    def put_together(cls, rest: list[Any], next_tensor: Any) -> object:  # noqa: ANN401, ARG003 - for those with a leaf
        """Return the value of an entry, which is given without its tag.

        Raises:
            Exception: Of any kind, if ``take_apart`` gave no such entry.
        """
        return cls.value_of(rest, 0)

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:
        """Return the value of an entry without a leaf, which is given without its tag.

        Raises:
            Exception: Of any kind, if ``parts`` gave no such entry.
        """
        raise NotImplementedError

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401
        """Return a value as a tensor of one row: numbers as they are, what has no distance as its digest."""
        return digest_row(canonical(cls.take_apart(value, "")[0]))


def digest_row(data: bytes) -> torch.Tensor:
    """Return the digest of what has no distance as a tensor of one row."""
    return torch.frombuffer(bytearray(digest_bytes(data)), dtype=torch.uint8).unsqueeze(0)


def comparable_array(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return an array as a tensor of one row: its numbers with the widest precision, or its digest."""
    if array.dtype.kind not in "biufc":
        return digest_row(array.tobytes())
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    return torch.from_numpy(array.astype(wide)).unsqueeze(0)


def canonical(entry: object) -> bytes:
    """Return an entry as bytes; what has no order is sorted."""
    if isinstance(entry, list) and entry and entry[0] in WITHOUT_ORDER:
        return b"".join([bytes([entry[0]]), *sorted(map(canonical, entry[1:]))])
    if isinstance(entry, list):
        return b"".join([b"list", *map(canonical, entry)])
    packed: bytes = msgpack.packb(entry, use_bin_type=True, unicode_errors="surrogatepass")
    return packed


def name_of(value: object) -> str:
    """Name the class of a value in a message."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
