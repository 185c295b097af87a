"""Values that are functions of their keys: any process can check any read, alone and at full concurrency."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchcache.layout import Bytes2D, Layout, Leaf, Rows
from torchcache.storage.contract import Lookup

#: Each namespace has values of one size: many in a segment, one beside few others, one that fills one, longer.
VALUE_BYTES = {
    b"a hundred bytes.": 100,
    b"three kilobytes.": 3000,
    b"twenty kilobytes": 20_000,
    b"longer than 64k.": 200_000,
}
NAMESPACES = tuple(VALUE_BYTES)
BATCH_ROWS = 8

_DIGEST_BYTES = 64
_HALF = max(VALUE_BYTES.values()) // 2
#: Says where in a value a byte lies, so that a shifted value is seen. The second half is left zero: there the
#: bytes of the key repeat and can be compressed.
_PLACES = np.frombuffer(hashlib.shake_128(b"places").digest(_HALF) + bytes(_HALF), np.uint8)


class ViolationError(AssertionError):
    """Something happened that never may.

    Attributes:
        kind: What, as one word.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call commits: the batch ``number`` of a line of batches."""

    line: int
    number: int

    @property
    def namespace(self) -> bytes:
        return NAMESPACES[self.number % len(NAMESPACES)]

    @property
    def digests(self) -> list[bytes]:
        return [
            hashlib.blake2b(b"%d %d %d" % (self.line, self.number, row), digest_size=16).digest()
            for row in range(BATCH_ROWS)
        ]

    def rows(self) -> Rows:
        """Return the right values."""
        nbytes, digests = VALUE_BYTES[self.namespace], self.digests
        return Rows(digests, Layout((Leaf("uint8", "uint8", (nbytes,)),)), values_of(self.namespace, digests))


def values_of(namespace: bytes, digests: Sequence[bytes]) -> Bytes2D:
    """Return the one right value of each digest, shape ``(n, nbytes)``; the caller's own."""
    nbytes = VALUE_BYTES[namespace]
    keys = b"".join(hashlib.blake2b(namespace + digest, digest_size=_DIGEST_BYTES).digest() for digest in digests)
    repeated = np.tile(
        np.frombuffer(keys, np.uint8).reshape(len(digests), _DIGEST_BYTES), (1, math.ceil(nbytes / _DIGEST_BYTES))
    )
    half = nbytes // 2
    values = np.ascontiguousarray(repeated[:, :nbytes])
    values[:, :half] ^= _PLACES[:half]
    return values


def check(namespace: bytes, digests: Sequence[bytes], lookup: Lookup) -> set[int]:
    """Check every byte that was found; return the positions that were.

    Raises:
        ViolationError: If a value is wrong, a record is corrupt or a position is not answered exactly once.
    """
    if lookup.corrupt:
        raise ViolationError("corrupt", f"{lookup.corrupt} of {len(digests)} records of {namespace!r} fail their check")
    answered = list(lookup.missing)
    for item in lookup.found:
        expected = values_of(namespace, [digests[position] for position in item.positions])
        if item.data.shape != expected.shape:
            raise ViolationError("wrong", f"{namespace!r} answers {item.data.shape} in place of {expected.shape}")
        if not np.array_equal(item.data, expected):
            row = int(np.flatnonzero((item.data != expected).any(axis=1))[0])
            offset = int(np.flatnonzero(item.data[row] != expected[row])[0])
            digest = digests[item.positions[row]].hex()
            raise ViolationError("wrong", f"the value of {digest} in {namespace!r} is wrong from byte {offset} on")
        answered += item.positions
    if sorted(answered) != list(range(len(digests))):
        raise ViolationError("unanswered", f"{len(digests)} digests got the answers {sorted(answered)}")
    return set(range(len(digests))) - set(lookup.missing)
