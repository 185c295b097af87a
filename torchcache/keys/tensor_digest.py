"""Tensors and arrays of numbers by value: the digest of their bytes, with dtype and shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchcache.keys.digest import digest_bytes, digest_of_leaves, digest_parts
from torchcache.keys.fast.device_digest import digest_on_device
from torchcache.keys.fast.host_memory import bytes_of
from torchcache.keys.tensor_kinds import PLAIN_TENSORS, as_plain
from torchcache.keys.tensors import byte_view


def digest_tensor(tensor: torch.Tensor) -> bytes | None:
    """Return the digest of a tensor's values as bytes in row-major order, or None if it has no plain bytes.

    A contiguous tensor is never copied as a whole, neither to the host nor on its device. One that is not
    contiguous, or lazily conjugated or negated, is copied once on its device.

    Args:
        tensor: On any device. Its dtype and shape are not part of the digest.
    """
    view = byte_view(tensor)
    if view is None:
        return None
    if view.device.type == "cpu":
        return digest_bytes(bytes_of(view))
    return digest_on_device(view)


def encode_tensor(tensor: torch.Tensor, leaves: bytes | None = None) -> bytes | None:
    """Return dtype, shape and content digest of a tensor on any device; None for one without bytes that can be seen.

    What a class derived from Tensor adds as attributes is left to the caller.

    Args:
        tensor: The tensor.
        leaves: The digests of the leaves of its values, where they are known.
    """
    inner = inner_tensors(tensor)
    if inner is not None:  # a wrapper around other tensors, which have the bytes
        parts = [b"wrapper"]
        for _, part in inner:
            encoded = encode_tensor(part)
            if encoded is None:
                return None
            parts.append(encoded)
        return digest_parts(parts)

    plain = as_plain(tensor)
    if plain is None:
        return None
    content = digest_tensor(plain) if leaves is None else digest_of_leaves(leaves)
    if content is None:
        return None
    form = f"{plain.dtype} {tuple(plain.shape)} {plain.layout}".encode()
    return digest_parts([form, content])


def inner_tensors(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]] | None:
    """Return the tensors that a wrapper subclass (quantized weights, DTensor) is made of; None if it is none."""
    if type(tensor) in PLAIN_TENSORS or not hasattr(tensor, "__tensor_flatten__"):
        return None
    names, _ = tensor.__tensor_flatten__()
    inner: list[tuple[str, torch.Tensor]] = []
    for name in names:
        value = getattr(tensor, name)
        if isinstance(value, torch.Tensor):
            inner.append((name, value))
    return inner


def encode_array(array: np.ndarray[Any, Any]) -> bytes:
    """Return the bytes of an array that holds no objects; what lies between the fields of records does not count."""
    if array.dtype.names is not None:
        fields = [encode_array(array[name]) for name in array.dtype.names]
        return digest_parts([b"records", *fields])
    flat = b"" if not array.nbytes else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return digest_parts([b"array", str(array.dtype).encode(), str(array.shape).encode(), digest_bytes(flat)])
