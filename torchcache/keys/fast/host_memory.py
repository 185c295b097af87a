"""Tensors in host memory, read where they lie instead of through torch.

``Tensor.numpy`` is the slow way. After it torch never lets the storage be resized again, which is how FSDP frees
weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import torch

from torchcache.keys.tensor_kinds import INTEGERS, PLAIN_TENSORS, as_plain

#: How many bytes ``probes_of`` yields of each end of a tensor.
PROBE_BYTES = 64


def bytes_of(view: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous uint8 tensor in host memory, valid as long as the tensor is.

    Only a tensor without an address, or of a class that decides for itself, is asked by ``Tensor.numpy``.
    """
    pointer = view.data_ptr() if type(view) is torch.Tensor else 0
    if not pointer:
        return view.numpy().data
    return _memory_at(pointer, view.nbytes)


def contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values one after the other: torch's parallel copies hang in a forked child."""
    size, storage = tensor.element_size(), tensor.untyped_storage()
    pointer = storage.data_ptr() if type(tensor) is torch.Tensor else 0
    if not pointer:
        integer = INTEGERS.get(size, tensor.dtype)
        return torch.from_numpy(np.ascontiguousarray(tensor.view(integer).numpy()))

    # Elements as NumPy's void of their size: it lacks some dtypes, and has no need to know what they are.
    elements = np.ndarray(
        tuple(tensor.shape),
        f"V{size}",
        _memory_at(pointer, storage.nbytes()),
        tensor.storage_offset() * size,
        [stride * size for stride in tensor.stride()],
    )
    return torch.from_numpy(np.ascontiguousarray(elements).reshape(-1).view(np.uint8))


def memory_of(tensor: torch.Tensor) -> memoryview | None:
    """Return a live view of a tensor in host memory, from its first to its last element; None if it is elsewhere.

    It is read only while the tensor's pointer is unchanged, so it cannot outlive its memory.
    """
    place = _place_of(tensor)
    return None if place is None else _memory_at(*place)


def probes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the first and last bytes of a tensor in host memory, as live views.

    They are read only while the tensor's pointer is unchanged, so they cannot outlive its memory.
    """
    place = _place_of(tensor)
    if place is None:
        return
    pointer, size = place
    first = min(size, PROBE_BYTES)
    yield _memory_at(pointer, first)
    if size > first:
        last = min(size - first, PROBE_BYTES)
        yield _memory_at(pointer + size - last, last)


def is_freed(tensor: torch.Tensor) -> bool:
    """Tell whether the memory of a plain tensor was given back, as FSDP does between calls.

    The address of such a tensor may be other than 0, and is nobody's.
    """
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is torch.strided
        and bool(tensor.numel())
        and not tensor.untyped_storage().nbytes()
    )


def extent_of(tensor: torch.Tensor) -> int:
    """Return how many elements its storage has from a tensor's first one to its last one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _place_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the address of a tensor in host memory and how far it is from its first byte to its last one."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return None
    plain = as_plain(tensor)
    if plain is None or is_freed(plain):
        return None
    pointer = plain.data_ptr()
    if not pointer:
        return None
    return pointer, extent_of(plain) * plain.element_size()


def _memory_at(pointer: int, n_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * n_bytes).from_address(pointer)).cast("B")
