"""A call split into samples, rows selected, results taken apart and put together again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchcache.errors import UncacheableError
from torchcache.keys.digest import combine, digest_parts, digest_rows
from torchcache.keys.values import encode_plain
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

#: Dtypes that NumPy lacks are moved as integers of the same size.
_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_WITHOUT_NUMPY = {
    dtype: _AS_INTEGER[DTYPE_SIZES[name]]
    for name in DTYPE_SIZES
    if name in ("bfloat16", "complex32") or name.startswith("float8")
    if (dtype := getattr(torch, name, None)) is not None
}
_DTYPE_NAMES: dict[torch.dtype, str] = {
    dtype: name for name in DTYPE_SIZES if (dtype := getattr(torch, name, None)) is not None
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

#: Memory formats other than contiguous: dimensions of the batch, torch's name, order of the bytes.
_FORMATS = {
    CHANNELS_LAST: (4, torch.channels_last, (0, 2, 3, 1), (0, 3, 1, 2)),
    CHANNELS_LAST_3D: (5, torch.channels_last_3d, (0, 2, 3, 4, 1), (0, 4, 1, 2, 3)),
}

_PLAIN_KINDS = "int, float, str, bool, None, bytes, enum, torch.dtype, torch.device or a tuple of these"


class CallSignature:
    """The names of a function's parameters, so that ``f(x, 3)`` and ``f(x, scale=3)`` are one call.

    Args:
        function: The function, not bound.
        is_method: Its first parameter is bound already.
        label: Enters the digest of every sample.
    """

    def __init__(self, function: Callable[..., object], *, is_method: bool, label: str) -> None:
        self._label = label.encode()
        parameters = list(inspect.signature(function).parameters.values())
        if is_method and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            del parameters[0]
        self._signature = inspect.Signature(parameters)
        by_kind: dict[Any, list[str]] = {}
        for parameter in parameters:
            by_kind.setdefault(parameter.kind, []).append(parameter.name)
        self._names = (*by_kind.get(inspect.Parameter.POSITIONAL_ONLY, ()),
                       *by_kind.get(inspect.Parameter.POSITIONAL_OR_KEYWORD, ()))  # fmt: skip
        self._rest = next(iter(by_kind.get(inspect.Parameter.VAR_POSITIONAL, ())), None)
        # A default that is not plain is part of the code and counts there.
        self._defaults = {
            p.name: encoded
            for p in parameters
            if p.default is not p.empty and (encoded := encode_plain(p.default)) is not None
        }

    def split(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Batch:
        """Name the arguments of a call and find its samples.

        Raises:
            UncacheableError: If the call has no batch dimension or an argument that cannot be named.
            TypeError: If the call does not fit the signature; the function itself would raise the same.
        """
        if len(args) > len(self._names) and self._rest is None:
            self._signature.bind(*args, **kwargs)
        tensors: list[_TensorArgument] = []
        plain: dict[str, bytes] = {"": self._label, **self._defaults}
        for place, value in enumerate(args):
            name = self._names[place] if place < len(self._names) else f"{self._rest}[{place - len(self._names)}]"
            plain.pop(name, None)
            _sort_argument(name, place, value, tensors, plain)
        for key, value in kwargs.items():
            plain.pop(key, None)
            _sort_argument(key, key, value, tensors, plain)
        unsupported = next(filter(None, (unsupported_kind(argument.tensor) for argument in tensors)), None)
        n = 0 if unsupported else _batch_size(tensors)
        tensors.sort(key=lambda argument: argument.name)
        return Batch(args, kwargs, tensors, plain, n, unsupported)


@dataclass(frozen=True, slots=True)
class _TensorArgument:
    name: str
    place: int | str  # index into args, or key of kwargs
    tensor: torch.Tensor


def _sort_argument(
    name: str, place: int | str, value: object, tensors: list[_TensorArgument], plain: dict[str, bytes]
) -> None:
    if isinstance(value, torch.Tensor):
        tensors.append(_TensorArgument(name, place, value))
        return
    encoded = encode_plain(value)
    if encoded is None:
        if isinstance(value, torch.nn.Module):
            raise UncacheableError(
                f"argument {name!r} is a {type(value).__qualname__}, which cannot be part of a cache key; decorate "
                "the module's class or the module itself instead of its method or of a function that takes it",
                argument=name,
            )
        raise UncacheableError(
            f"argument {name!r} of type {type(value).__qualname__} cannot be part of a cache key; pass "
            f"tensors as arguments of their own, and anything else as {_PLAIN_KINDS}",
            argument=name,
        )
    plain[name] = encoded


def _batch_size(tensors: Sequence[_TensorArgument]) -> int:
    if not tensors:
        raise UncacheableError(
            "the call has no tensor argument; a cached call needs at least one tensor of shape "
            "(batch, ...) with two dimensions or more"
        )
    sizes: dict[str, int] = {}
    for argument in tensors:
        if argument.tensor.dim() == 0:
            raise UncacheableError(
                f"argument {argument.name!r} is a 0-d tensor and has no batch dimension; pass a plain "
                f"number ({argument.name}.item()) or expand it to (batch,)",
                argument=argument.name,
            )
        sizes[argument.name] = argument.tensor.shape[0]
    if all(argument.tensor.dim() == 1 for argument in tensors):
        name = tensors[0].name
        raise UncacheableError(
            f"argument {name!r} has shape {tuple(tensors[0].tensor.shape)}, one dimension only, so it is "
            f"not clear which is the batch; pass {name}.unsqueeze(0) for one sample of features or "
            f"{name}.unsqueeze(1) for a batch of numbers",
            argument=name,
        )
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        first = next(iter(sizes))
        other = next(name for name, size in sizes.items() if size != sizes[first])
        raise UncacheableError(
            f"arguments {first!r} and {other!r} differ in their batch dimension ({shown}); dimension 0 of "
            "every tensor must be the batch: expand shared tensors to it",
            argument=other,
        )
    return sizes[tensors[0].name]


class Batch:
    """One call, seen as ``n`` samples. The arguments stay the caller's and are not changed."""

    __slots__ = ("_args", "_kwargs", "_plain", "_tensors", "_unsupported", "n")

    def __init__(
        self,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        tensors: Sequence[_TensorArgument],
        plain: Mapping[str, bytes],
        n: int,
        unsupported: str | None,
    ) -> None:
        self._args = args
        self._kwargs = kwargs
        self._tensors = tensors
        self._plain = plain
        self._unsupported = unsupported
        self.n = n

    @property
    def first_device(self) -> torch.device:
        """The device of the first tensor argument."""
        return self._tensors[0].tensor.device

    def bypass_reason(self) -> str | None:
        """Why this call cannot be cached whatever its state, or None."""
        if self._unsupported:
            return self._unsupported
        if torch.is_grad_enabled() and any(argument.tensor.requires_grad for argument in self._tensors):
            return "input_requires_grad"
        return None

    def digests(self) -> list[bytes]:
        """Return the 16-byte digest of each sample, in order."""
        signature = [*(part for name in sorted(self._plain) for part in (name.encode(), self._plain[name]))]
        for argument in self._tensors:
            tensor = argument.tensor
            signature += [b"tensor", argument.name.encode(), f"{tensor.dtype} {tuple(tensor.shape[1:])}".encode()]
        parts = [digest_rows(flat_bytes(argument.tensor), self.n) for argument in self._tensors]
        return combine(digest_parts(signature), parts)

    def select(self, positions: Sequence[int]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return the arguments of a call that has the samples at ``positions`` only."""
        args, kwargs = list(self._args), dict(self._kwargs)
        first, last = positions[0], positions[-1]
        is_range = last - first == len(positions) - 1 and all(p == first + i for i, p in enumerate(positions))
        for argument in self._tensors:
            tensor = argument.tensor.detach()
            rows = (
                tensor[first : last + 1]
                if is_range
                else tensor.index_select(0, torch.tensor(positions, dtype=torch.int64, device=tensor.device))
            )
            if isinstance(argument.place, int):
                args[argument.place] = rows
            else:
                kwargs[argument.place] = rows
        return tuple(args), kwargs


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
    if tensor.dtype not in _DTYPE_NAMES:
        return "unsupported_dtype"
    return None


def flat_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's values as flat bytes in row-major order; a view where that is possible.

    NumPy does the copying where one is needed: torch's parallel copies hang in a forked child whose
    parent has used intra-op threads.
    """
    if not tensor.numel():
        return memoryview(b"")
    array = np.ascontiguousarray(_to_numpy(tensor))
    return array.data.cast("B")


def _to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    if plain.device.type != "cpu":
        plain = plain.contiguous().cpu()
    integer = _WITHOUT_NUMPY.get(plain.dtype)
    array: np.ndarray[Any, Any] = (plain if integer is None else plain.view(integer)).numpy()
    return array


def take_apart(output: object, n: int, cache_dtype: torch.dtype | None) -> tuple[Layout, Bytes2D, int]:
    """Copy a module's result into rows of bytes that belong to the cache.

    Args:
        output: What the module returned for ``n`` samples.
        n: Number of samples.
        cache_dtype: Store floating values in it.

    Returns:
        The layout of one row, the rows ``(n, layout.nbytes)``, and how many finite values the cast made
        infinite.

    Raises:
        UncacheableError: If the result is not a tensor with the batch in front.
    """
    tensor = check_output(output, n)
    cast, overflowed = _cast(tensor.detach(), cache_dtype)
    memory_format = CONTIGUOUS
    if not cast.is_contiguous():
        for code, (dims, torch_format, order, _) in _FORMATS.items():
            if cast.dim() == dims and cast.is_contiguous(memory_format=torch_format):
                memory_format, cast = code, cast.permute(order)
    shape = tuple(tensor.shape[1:])
    leaf = Leaf(_DTYPE_NAMES[cast.dtype], _DTYPE_NAMES[tensor.dtype], shape, memory_format)
    rows = empty_rows(n, leaf.nbytes)
    if rows.size:
        array = _to_numpy(cast)
        np.copyto(rows.view(array.dtype).reshape(array.shape), array)
    return Layout((leaf,)), rows, overflowed


def check_output(output: object, n: int) -> torch.Tensor:
    """Return ``output`` if it is a tensor of ``n`` rows.

    Raises:
        UncacheableError: If it is not.
    """
    if not isinstance(output, torch.Tensor):
        raise UncacheableError(
            f"the cached call returned {type(output).__qualname__}, not a tensor; return one tensor of shape "
            "(batch, ...), or decorate the part of the model that does"
        )
    if output.dim() == 0 or output.shape[0] != n:
        raise UncacheableError(
            f"the cached call returned shape {tuple(output.shape)} for a batch of {n}; dimension 0 of the "
            "result must be the batch, one row a sample"
        )
    return output


def rounded(output: torch.Tensor, cache_dtype: torch.dtype | None) -> torch.Tensor:
    """Return what a later hit will return for ``output``: rounded through ``cache_dtype``, detached."""
    plain = output.detach()
    if cache_dtype is None or not plain.is_floating_point() or plain.dtype == cache_dtype:
        return plain
    return plain.to(cache_dtype).to(plain.dtype)


def _cast(tensor: torch.Tensor, cache_dtype: torch.dtype | None) -> tuple[torch.Tensor, int]:
    if cache_dtype is None or not tensor.is_floating_point() or tensor.dtype == cache_dtype:
        return tensor, 0
    cast = tensor.to(cache_dtype)
    # Compared as float32 or wider: float8 has no isfinite.
    wide = torch.promote_types(torch.float32, tensor.dtype) if tensor.itemsize > 1 else torch.float32
    lost = ~torch.isfinite(cast.to(wide)) & torch.isfinite(tensor.to(wide))
    return cast, int(lost.sum())


def put_together(layout: Layout, data: Bytes2D | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Make the module's result from rows of bytes, without copying where the device is the CPU.

    Args:
        layout: The layout of one row; its dtypes must be known to this torch.
        data: Shape ``(n, layout.nbytes)``; belongs to the result from now on.
        device: Where the result goes.
    """
    (leaf,) = layout.leaves
    n = data.shape[0]
    _, _, order, back = _FORMATS.get(leaf.memory_format, (0, None, (), ()))
    shape = (n, *leaf.shape)
    stored_shape = tuple(shape[i] for i in order) if order else shape
    dtype = _DTYPES[leaf.dtype]
    if n and layout.nbytes:
        flat = (torch.from_numpy(data) if isinstance(data, np.ndarray) else data).view(-1)
        tensor = (flat if dtype is torch.uint8 else flat.view(dtype)).view(stored_shape)
    else:
        tensor = torch.empty(stored_shape, dtype=dtype, device="cpu")
    if back:
        tensor = tensor.permute(back)
    return tensor.to(device=device, dtype=_DTYPES[leaf.output_dtype])


def is_known(layout: Layout) -> bool:
    """Tell whether this torch has every dtype of a layout that came from a store."""
    return (
        len(layout.leaves) == 1
        and not layout.structure
        and all(leaf.dtype in _DTYPES and leaf.output_dtype in _DTYPES for leaf in layout.leaves)
    )
