"""One leaf of a result: a tensor, and its bytes in each row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from torchcache.keys.tensor_kinds import AS_INTEGER, DTYPE_NAMES, NUMPY_DTYPES
from torchcache.keys.tensors import to_numpy
from torchcache.layout import (
    CHANNELS_LAST,
    CHANNELS_LAST_3D,
    CONTIGUOUS,
    DTYPE_SIZES,
    Bytes2D,
    Layout,
    Leaf,
    empty_rows,
)

CPU = torch.device("cpu")

#: The dtypes of this torch by their names in a layout.
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class _Format:
    """A memory format other than contiguous.

    Attributes:
        n_dims: The dimensions of a tensor that can have it, with the batch.
        torch_format: torch's name.
        order: The dimensions in the order in which they are stored.
        back: The stored dimensions in the order of the tensor.
    """

    n_dims: int
    torch_format: torch.memory_format
    order: tuple[int, ...]
    back: tuple[int, ...]


_FORMATS = {
    CHANNELS_LAST: _Format(4, torch.channels_last, (0, 2, 3, 1), (0, 3, 1, 2)),
    CHANNELS_LAST_3D: _Format(5, torch.channels_last_3d, (0, 2, 3, 4, 1), (0, 4, 1, 2, 3)),
}


def stored_form(tensor: torch.Tensor, cache_dtype: torch.dtype | None) -> tuple[Leaf, torch.Tensor, int]:
    """Return how a leaf is stored, the tensor with its bytes in that order, and how many values overflowed."""
    cast, overflowed = _cast(tensor.detach(), cache_dtype)
    memory_format = CONTIGUOUS
    if not cast.is_contiguous():
        for code, form in _FORMATS.items():
            if cast.dim() == form.n_dims and cast.is_contiguous(memory_format=form.torch_format):
                memory_format = code
                cast = cast.permute(form.order)
    leaf = Leaf(DTYPE_NAMES[cast.dtype], DTYPE_NAMES[tensor.dtype], tuple(tensor.shape[1:]), memory_format)
    return leaf, cast, overflowed


def copy_leaves(stored: Iterable[tuple[Leaf, torch.Tensor]], rows: Bytes2D) -> None:
    """Copy leaves in their stored form into rows of bytes, one after the other."""
    end = 0
    for leaf, tensor in stored:
        start, end = end, end + leaf.nbytes
        if len(rows) and leaf.nbytes:
            array = to_numpy(tensor)
            # A view: splitting the last dimension never copies.
            np.copyto(rows[:, start:end].view(array.dtype).reshape(array.shape), array)


def put_leaf(leaf: Leaf, data: Bytes2D | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a leaf's tensor of its bytes in each row, without a copy where the device is the CPU."""
    n = data.shape[0]
    shape: tuple[int, ...] = (n, *leaf.shape)
    form = _FORMATS.get(leaf.memory_format)
    if form is not None:
        shape = _in_order(shape, form.order)

    dtype = DTYPES[leaf.dtype]
    if not n or not leaf.nbytes:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
    elif isinstance(data, torch.Tensor):
        tensor = data.view(-1).view(dtype).view(shape)
    elif dtype in AS_INTEGER:
        integer = AS_INTEGER[dtype]
        tensor = torch.from_numpy(data.view(NUMPY_DTYPES[integer]).reshape(shape)).view(dtype)
    else:
        # Views of NumPy cost less than those of torch.
        tensor = torch.from_numpy(data.view(NUMPY_DTYPES[dtype]).reshape(shape))

    if form is not None:
        tensor = tensor.permute(form.back)
    return tensor.to(device=device, dtype=DTYPES[leaf.output_dtype])


def rounded_leaf(tensor: torch.Tensor, cache_dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor rounded through ``cache_dtype``, detached."""
    plain = tensor.detach()
    dtype = _stored_dtype(plain, cache_dtype)
    return plain if dtype == plain.dtype else plain.to(dtype).to(plain.dtype)


def byte_ranges(layout: Layout) -> list[tuple[Leaf, int, int]]:
    """Return each leaf with the first of its bytes in a row and the end of them."""
    ranges: list[tuple[Leaf, int, int]] = []
    end = 0
    for leaf in layout.leaves:
        start, end = end, end + leaf.nbytes
        ranges.append((leaf, start, end))
    return ranges


def columns(data: Bytes2D | torch.Tensor, start: int, end: int) -> Bytes2D | torch.Tensor:
    """Copy some bytes of each row: a leaf that lay between others could not be viewed as its dtype."""
    if isinstance(data, torch.Tensor):
        return data[:, start:end].clone(memory_format=torch.contiguous_format)
    part = empty_rows(data.shape[0], end - start)
    np.copyto(part, data[:, start:end])
    return part


def in_format(part: Bytes2D, leaf: Leaf, memory_format: int) -> Bytes2D:
    """Return a leaf's rows with their bytes in the order of another memory format."""
    shape: tuple[int, ...] = (len(part), *leaf.shape)
    size = DTYPE_SIZES[leaf.dtype]
    n_dims = len(shape)

    form = _FORMATS.get(leaf.memory_format)
    if form is None:
        plain = part.reshape(*shape, size)
    else:
        stored = part.reshape(*_in_order(shape, form.order), size)
        plain = stored.transpose(*form.back, n_dims)

    wanted = _FORMATS.get(memory_format)
    if wanted is not None:
        plain = plain.transpose(*wanted.order, n_dims)
    return np.ascontiguousarray(plain).reshape(len(part), -1)


def has_known_dtypes(layout: Layout) -> bool:
    """Tell whether this torch has the dtypes of all leaves."""
    for leaf in layout.leaves:  # noqa: SIM110 - each hit comes here, and a generator costs it calls
        if leaf.dtype not in DTYPES or leaf.output_dtype not in DTYPES:
            return False
    return True


def stand_ins(layout: Layout) -> list[torch.Tensor]:
    """Make leaves of one row, never written nor read, to try a structure with."""
    return [torch.empty((1, *leaf.shape), dtype=DTYPES[leaf.output_dtype], device="cpu") for leaf in layout.leaves]


def _in_order(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([shape[dim] for dim in order])


def _stored_dtype(tensor: torch.Tensor, cache_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a tensor is stored in."""
    return cache_dtype if cache_dtype is not None and tensor.is_floating_point() else tensor.dtype


def _cast(tensor: torch.Tensor, cache_dtype: torch.dtype | None) -> tuple[torch.Tensor, int]:
    """Return a tensor as it is stored, and how many finite values that made infinite."""
    dtype = _stored_dtype(tensor, cache_dtype)
    if dtype == tensor.dtype:
        return tensor, 0
    cast = tensor.to(dtype)
    # Compared as float32 or wider: float8 has no isfinite.
    wide = torch.promote_types(torch.float32, tensor.dtype) if tensor.itemsize > 1 else torch.float32
    lost = ~torch.isfinite(cast.to(wide)) & torch.isfinite(tensor.to(wide))
    return cast, int(lost.sum())
