"""Rows of bytes to 128-bit digests: XXH3-128 in two levels.

A row is cut into leaves of 16 KiB. One leaf: its XXH3-128. More: the XXH3-128 of the leaves' digests
one after the other. Leaves are independent, so the same digest can be computed in parallel on an
accelerator. XXH3 is specified at https://github.com/Cyan4973/xxHash; it guards against accident, not
against an attacker. On one CPU core a 600 kB row costs about 22 us (in one piece 16, BLAKE2b 445).

This module does not import torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
from xxhash import xxh3_128_digest

DIGEST_BYTES = 16
LEAF_BYTES = 16384


def digest_bytes(data: bytes | memoryview) -> bytes:
    """Return the digest of one row."""
    if len(data) <= LEAF_BYTES:
        return xxh3_128_digest(data)
    return digest_of_leaves(digest_leaves(memoryview(data)))


def digest_leaves(data: memoryview) -> bytes:
    """Return the digests of the leaves of one row, which is not empty, one after the other."""
    return b"".join([xxh3_128_digest(data[i : i + LEAF_BYTES]) for i in range(0, len(data), LEAF_BYTES)])


def digest_of_leaves(leaves: bytes) -> bytes:
    """Return the digest of the row that has these digests of leaves."""
    return leaves if len(leaves) == DIGEST_BYTES else xxh3_128_digest(leaves)


def digest_rows(data: memoryview, n: int) -> list[bytes]:
    """Return the digest of each of ``n`` rows of equal length that lie in ``data`` one after the other.

    Args:
        data: Flat bytes, a multiple of ``n`` long.
        n: Number of rows, at least 1.
    """
    width = len(data) // n
    if width == 0:
        return [xxh3_128_digest(b"")] * n
    if width <= LEAF_BYTES:
        return [xxh3_128_digest(data[i : i + width]) for i in range(0, n * width, width)]
    return [digest_bytes(data[i : i + width]) for i in range(0, n * width, width)]


def combine(signature: bytes, parts: Sequence[list[bytes]]) -> list[bytes]:
    """Return one digest a sample from the digests of its rows in each tensor argument.

    One argument: its digest. More: the digest of their digests. Then the digest of the call's
    signature (names, dtypes, row shapes, plain arguments) is XORed in: it differs wherever the same
    bytes could mean another call.

    Args:
        signature: Digest of everything the samples of the call share.
        parts: For each tensor argument the digests of its ``n`` rows.
    """
    rows = parts[0] if len(parts) == 1 else [xxh3_128_digest(b"".join(row)) for row in zip(*parts, strict=True)]
    if not rows:
        return []
    mixed = np.frombuffer(b"".join(rows), dtype=np.uint64).reshape(-1, 2)
    flat = (mixed ^ np.frombuffer(signature, dtype=np.uint64)).tobytes()
    return [flat[i : i + DIGEST_BYTES] for i in range(0, len(flat), DIGEST_BYTES)]


def digest_parts(parts: Iterable[bytes]) -> bytes:
    """Return the digest of a sequence of byte strings; where one ends and the next begins counts."""
    parts = list(parts)
    n = len(parts)
    lengths = struct.pack(f"<{n + 1}Q", n, *map(len, parts))
    return digest_bytes(b"".join([lengths, *parts]))


def digest_named(pairs: Iterable[tuple[str, bytes]], *, front: Sequence[bytes] = ()) -> bytes:
    """Return the digest of byte strings that have names; their order counts.

    Args:
        pairs: Name and bytes of each.
        front: Byte strings without a name, in front of them.
    """
    parts = list(front)
    for name, value in pairs:
        parts.append(name.encode())
        parts.append(value)
    return digest_parts(parts)
