"""Tensors as bytes: which have plain ones, and how to get at them without torch's parallel copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchcache.layout import DTYPE_SIZES

#: Dtypes that NumPy lacks are moved as integers of the same size.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
AS_INTEGER = {
    dtype: _INTEGERS[DTYPE_SIZES[name]]
    for name in DTYPE_SIZES
    if name in ("bfloat16", "complex32") or name.startswith("float8")
    if (dtype := getattr(torch, name, None)) is not None
}
#: The dtypes whose rows are bytes to us, with the names they have in a layout.
DTYPE_NAMES: dict[torch.dtype, str] = {
    dtype: name for name in DTYPE_SIZES if (dtype := getattr(torch, name, None)) is not None
}
#: What NumPy calls the others.
NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    dtype: np.dtype(name) for dtype, name in DTYPE_NAMES.items() if dtype not in AS_INTEGER
}


def unsupported_kind(tensor: torch.Tensor) -> str | None:
    """Name the kind of tensor that has no plain rows of bytes, or return None."""
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return "tensor_subclass"
    if tensor.is_meta:
        return "meta_tensor"
    if tensor.is_nested:
        return "nested_tensor"
    if tensor.layout is not torch.strided:
        return "sparse_tensor"
    if tensor.is_quantized:
        return "quantized_tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - torch has no public test
        return "functorch_transform"
    if tensor.dtype not in DTYPE_NAMES:
        return "unsupported_dtype"
    return None


def flat_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's values as flat bytes in row-major order; a view where that is possible.

    NumPy does the copying where one is needed: torch's parallel copies hang in a forked child whose
    parent has used intra-op threads.
    """
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
    array: np.ndarray[Any, Any] = (plain if integer is None else plain.view(integer)).numpy()
    return array
