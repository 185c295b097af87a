"""Kinds of tensors: which have plain rows of bytes, and which dtypes NumPy has too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchcache.layout import DTYPE_SIZES
from torchcache.report.reasons import Reason

#: Classes whose tensors have just the values and attributes that torch gives them.
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

#: Dtypes that NumPy lacks are moved as integers of the same size in bytes.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _known_dtypes() -> dict[torch.dtype, str]:
    """Return the dtypes of ``DTYPE_SIZES`` that this torch has, with their names."""
    dtypes: dict[torch.dtype, str] = {}
    for name in DTYPE_SIZES:
        dtype = getattr(torch, name, None)
        if dtype is not None:
            dtypes[dtype] = name
    return dtypes


def _is_unknown_to_numpy(name: str) -> bool:
    return name in ("bfloat16", "complex32") or name.startswith("float8")


#: The dtypes whose rows are bytes to us, with the names they have in a layout.
DTYPE_NAMES = _known_dtypes()

#: The integers to move a dtype as, where NumPy lacks it.
AS_INTEGER: dict[torch.dtype, torch.dtype] = {
    dtype: INTEGERS[DTYPE_SIZES[name]] for dtype, name in DTYPE_NAMES.items() if _is_unknown_to_numpy(name)
}

#: What NumPy calls the others.
NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    dtype: np.dtype(name) for dtype, name in DTYPE_NAMES.items() if dtype not in AS_INTEGER
}


def unsupported_kind(tensor: torch.Tensor) -> Reason | None:
    """Name the kind of tensor that has no plain rows of bytes, or return None."""
    if type(tensor) not in PLAIN_TENSORS:
        return Reason.TENSOR_SUBCLASS
    if tensor.is_meta:
        return Reason.META_TENSOR
    if tensor.is_nested:
        return Reason.NESTED_TENSOR
    if tensor.layout is not torch.strided:
        return Reason.SPARSE_TENSOR
    if tensor.is_quantized:
        return Reason.QUANTIZED_TENSOR
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - torch has no public test
        return Reason.FUNCTORCH_TRANSFORM
    if tensor.dtype not in DTYPE_NAMES:
        return Reason.UNSUPPORTED_DTYPE
    return None


def has_elements(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's elements lie in memory one by one: it is not sparse, quantized, nested or on "meta"."""
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized and not tensor.is_nested


def as_plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor as one of torch's own class; None if its class decides what its values are."""
    if type(tensor) in PLAIN_TENSORS:
        return tensor
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return None
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents it for subclasses
        return tensor.as_subclass(torch.Tensor)


def notes_on(tensor: torch.Tensor) -> dict[str, object]:
    """Return the attributes that somebody hung on a tensor; not those of torch's compiler, which shape no result."""
    notes: dict[str, object] = getattr(tensor, "__dict__", None) or {}
    return {key: note for key, note in notes.items() if not key.startswith("_dynamo_") and key not in _OF_COMPILER}


#: Others that ``torch._dynamo.mark_dynamic`` hangs on a tensor.
_OF_COMPILER = frozenset({"_specialize_on", "_has_dynamo_dim_marking"})
