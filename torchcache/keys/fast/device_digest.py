"""The digest of a tensor that is not in host memory, computed on its device.

It is what ``digest_bytes`` returns for the same bytes. Integer tensor operations do what XXH3 does to the full
leaves, and only 64 bytes per leaf, 1/256 of the tensor, come to the host. The slow way, for devices that lack the
operations, copies leaves to the host piece by piece.

XXH3 is specified at https://github.com/Cyan4973/xxHash, in doc/xxhash_spec.md ("for large inputs"); the
constants are those of xxhash.h. A leaf of 16 KiB is 16 blocks of 16 stripes of 8 words. Stripes only add to
the 8 accumulators, so all blocks of all leaves are summed in parallel, and 15 scrambles follow one after the
other.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from torchcache.keys.digest import LEAF_BYTES, digest_of_leaves

#: A tensor that is not in host memory is read in pieces of this size, a multiple of a leaf. The temporaries
#: of a piece take at most 3.25 times its size, all on the tensor's device.
PIECE_BYTES = 1 << 26

_BLOCKS = _STRIPES = 16
_WORDS = 8

_PRIME32_1 = 0x9E3779B1
_PRIME32_2 = 0x85EBCA77
_PRIME32_3 = 0xC2B2AE3D
_PRIME64_1 = 0x9E3779B185EBCA87
_PRIME64_2 = 0xC2B2AE3D27D4EB4F
_PRIME64_3 = 0x165667B19E3779F9
_PRIME64_4 = 0x85EBCA77C2B2AE63
_PRIME64_5 = 0x27D4EB2F165667C5
_PRIME_MX1 = 0x165667919E3779F9
_LOW32 = 0xFFFFFFFF
_LOW64 = 0xFFFFFFFFFFFFFFFF

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def digest_on_device(view: torch.Tensor, piece_bytes: int = PIECE_BYTES) -> bytes:
    """Return ``digest_bytes`` of a flat uint8 tensor; what leaves its device is small.

    Args:
        view: Contiguous, on any device.
        piece_bytes: Bytes worked on at a time; a multiple of a leaf.
    """
    n = view.numel()
    full = n - n % LEAF_BYTES
    leaves = [_digest_leaves(view[i : min(i + piece_bytes, full)]) for i in range(0, full, piece_bytes)]
    if full < n:
        leaves.append(xxh3_128_digest(view[full:].cpu().numpy().data))
    return digest_of_leaves(b"".join(leaves))


def _digest_leaves(leaves: torch.Tensor) -> bytes:
    """Return the digests of full leaves, one after the other."""
    if _computes_exactly(leaves.device):
        return _merge(_accumulate(leaves).cpu().numpy().view(np.uint64))
    data = leaves.cpu().numpy().data
    return b"".join(xxh3_128_digest(data[i : i + LEAF_BYTES]) for i in range(0, len(data), LEAF_BYTES))


@lru_cache(maxsize=64)
def _computes_exactly(device: torch.device) -> bool:
    """Tell whether a device's 64-bit integers wrap around as they must; asked once a process and device.

    A back end may lack an operation, or compute it in fewer bits. Then leaves are copied to the host, piece
    by piece: slow, but right.
    """
    data = np.random.default_rng(0).bytes(2 * LEAF_BYTES)
    expected = xxh3_128_digest(data[:LEAF_BYTES]) + xxh3_128_digest(data[LEAF_BYTES:])
    try:
        leaves = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)).to(device)
        return _merge(_accumulate(leaves).cpu().numpy().view(np.uint64)) == expected
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _secret_words(offset: int) -> NDArray[np.uint64]:
    """Return 64 bytes of the secret as words."""
    return np.frombuffer(_SECRET, "<u8", _WORDS, offset).astype(np.uint64)


def _leaf_pad() -> NDArray[np.uint64]:
    """Return what a leaf is XORed with, ``(blocks, stripes, words)``: the secret, 8 bytes on at each stripe.

    The last stripe of the input has a place of its own in the secret.
    """
    block = np.stack([_secret_words(8 * stripe) for stripe in range(_STRIPES)])
    pad = np.repeat(block[None], _BLOCKS, axis=0)
    pad[-1, -1] = _secret_words(len(_SECRET) - 71)
    return pad


_PAD = _leaf_pad()
_SCRAMBLE = _secret_words(len(_SECRET) - 64)
_INITIAL = np.array(
    [_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1], np.uint64
)


def _accumulate(leaves: torch.Tensor) -> torch.Tensor:
    """Return the accumulators of full leaves, int64 ``(n, 8)``, on the device the leaves lie on.

    torch has no arithmetic on uint64 on all devices. int64 adds and multiplies to the same bits; a right
    shift copies the sign and needs a mask.
    """
    if leaves.storage_offset() % 8 or leaves.data_ptr() % 8:
        leaves = leaves.clone()  # words must be aligned
    words = leaves.view(torch.int64).view(-1, _BLOCKS, _STRIPES, _WORDS)
    pad, scramble, acc = (_to(words.device, constant) for constant in (_PAD, _SCRAMBLE, _INITIAL))

    # In place where it can be: each of these is as large as the piece.
    keyed = words ^ pad
    high = (keyed >> 32).bitwise_and_(_LOW32)
    sums = keyed.bitwise_and_(_LOW32).mul_(high).sum(dim=2)
    # A word itself is added to its neighbour's accumulator.
    sums += words.sum(dim=2).view(-1, _BLOCKS, _WORDS // 2, 2).flip(-1).view_as(sums)

    for block in range(_BLOCKS - 1):
        acc = acc + sums[:, block]
        acc = (acc ^ ((acc >> 47) & 0x1FFFF) ^ scramble) * _PRIME32_1
    return acc + sums[:, -1]


def _to(device: torch.device, constant: NDArray[np.uint64]) -> torch.Tensor:
    return torch.from_numpy(constant.view(np.int64)).to(device)


def _merge(acc: NDArray[np.uint64]) -> bytes:
    """Return the digests that the accumulators ``(n, 8)`` of full leaves end in, one after the other."""
    low = _merge_half(acc, LEAF_BYTES * _PRIME64_1, secret_offset=11)
    high = _merge_half(acc, ~(LEAF_BYTES * _PRIME64_2), secret_offset=len(_SECRET) - 75)
    return np.stack([high, low], axis=1).astype(">u8").tobytes()


def _merge_half(acc: NDArray[np.uint64], initial: int, *, secret_offset: int) -> NDArray[np.uint64]:
    keyed = acc ^ _secret_words(secret_offset)
    products = _fold(keyed[:, 0::2], keyed[:, 1::2])
    merged: NDArray[np.uint64] = products.sum(axis=1, dtype=np.uint64) + np.uint64(initial & _LOW64)
    merged ^= merged >> np.uint64(37)
    merged *= np.uint64(_PRIME_MX1)
    merged ^= merged >> np.uint64(32)
    return merged


def _fold(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the two halves of the 128-bit products, XORed."""
    half, mask = np.uint64(32), np.uint64(_LOW32)
    a_low, a_high, b_low, b_high = a & mask, a >> half, b & mask, b >> half
    crossed = a_high * b_low + (a_low * b_low >> half)
    middle = a_low * b_high + (crossed & mask)
    folded: NDArray[np.uint64] = (a * b) ^ (a_high * b_high + (crossed >> half) + (middle >> half))
    return folded
