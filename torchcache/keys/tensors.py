"""Ways to a tensor's bytes that need none of torch's parallel copies.

Those hang in a forked child whose parent has used intra-op threads, so NumPy does the copying where one is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchcache.keys.fast import host_memory
from torchcache.keys.tensor_kinds import AS_INTEGER, has_elements


def flat_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's values as flat bytes in row-major order; a view where that is possible."""
    if not tensor.numel():
        return memoryview(b"")
    array = np.ascontiguousarray(to_numpy(tensor))
    return array.data.cast("B")


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the tensor's values on the host, a view where that is possible; without a dtype of NumPy, as integers."""
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    if plain.device.type != "cpu":
        plain = plain.contiguous().cpu()
    integer = AS_INTEGER.get(plain.dtype)
    if integer is not None:
        plain = plain.view(integer)
    array: np.ndarray[Any, Any] = plain.numpy()
    return array


def byte_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor's values as a flat uint8 tensor on its device; None if it has no plain bytes.

    Meta, sparse, quantized, nested and freed tensors have none. The result shares the tensor's memory where it can.
    """
    if not has_elements(tensor) or host_memory.is_freed(tensor):
        return None
    plain = tensor.detach().resolve_conj().resolve_neg()
    try:
        if plain.device.type == "cpu" and not plain.is_contiguous():
            plain = host_memory.contiguous_copy(plain)
        flat = plain.reshape(-1).contiguous()
        if flat.numel() < 2:  # torch calls it contiguous whatever its stride
            flat = flat.as_strided(flat.shape, (1,))
        return flat.view(torch.uint8)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
