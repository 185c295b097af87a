"""How one value lies in memory and on disk: the bytes of its leaves, one after the other.

Everything below ``results/rows.py`` (memory tier, records, store, writer) moves rows of bytes with a
``Layout`` beside them and never looks inside. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes2D = NDArray[np.uint8]

#: Of the records on disk, and part of every module hash.
FORMAT_VERSION = 1

#: Item size in bytes of every dtype a value may have, by torch's name. Its order is part of the
#: record format: new dtypes are appended.
DTYPE_SIZES: dict[str, int] = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
    "complex32": 4,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}

#: The names of memory formats as stored; the row itself has one dimension less than the batch.
CONTIGUOUS, CHANNELS_LAST, CHANNELS_LAST_3D = 0, 1, 2


#: How many tensors one value may have, and how many leaves: the plain values of a whole call are one more, and the
#: digest of the inputs of a sample that has a key. Both are part of the record format.
MAX_TENSORS = 256
MAX_LEAVES = MAX_TENSORS + 2


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a value, without its batch dimension.

    ``shape`` is the logical shape of one row; the bytes lie in the order of ``memory_format``.
    ``output_dtype`` is what the module returned, ``dtype`` what is stored (they differ under
    ``cache_dtype``).
    """

    dtype: str
    output_dtype: str
    shape: tuple[int, ...]
    memory_format: int = CONTIGUOUS

    @property
    def nbytes(self) -> int:
        return DTYPE_SIZES[self.dtype] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The leaves of one value and ``structure``, the encoded tree they hang in (empty: one tensor)."""

    leaves: tuple[Leaf, ...]
    structure: bytes = b""
    nbytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(leaf.nbytes for leaf in self.leaves))


@dataclass(frozen=True, slots=True)
class Rows:
    """Values of one layout with the digests of their samples.

    ``data`` has shape ``(len(digests), layout.nbytes)``, is C-contiguous and never changes after
    construction: tiers keep it without copying.
    """

    digests: Sequence[bytes]
    layout: Layout
    data: Bytes2D

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


@dataclass(frozen=True, slots=True)
class Found:
    """Values of one layout that a tier found: row ``i`` answers the request at ``positions[i]``.

    ``data`` belongs to the receiver.
    """

    positions: Sequence[int]
    layout: Layout
    data: Any  # Bytes2D; a uint8 tensor of that shape from a memory tier on an accelerator


def at_positions(found: Sequence[Found], positions: Sequence[int]) -> list[Found]:
    """Return values whose positions are numbers of ``positions`` at those."""
    return [Found([positions[i] for i in item.positions], item.layout, item.data) for item in found]


def empty_rows(n: int, nbytes: int) -> Bytes2D:
    """Allocate ``(n, nbytes)`` bytes through NumPy.

    NumPy asks for huge pages, torch does not: a fresh 38 MB batch costs 36 us instead of 230 us a
    600 kB row in page faults.
    """
    rows: NDArray[Any] = np.empty((n, nbytes), dtype=np.uint8)
    return rows
