"""A call split into samples, and rows selected."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from torchcache.errors import UncacheableError
from torchcache.keys.digest import combine, digest_parts, digest_rows
from torchcache.keys.values import encode_plain
from torchcache.layout import DTYPE_SIZES

#: Dtypes that NumPy lacks are moved as integers of the same size.
_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_WITHOUT_NUMPY = {
    dtype: _AS_INTEGER[DTYPE_SIZES[name]]
    for name in DTYPE_SIZES
    if name in ("bfloat16", "complex32") or name.startswith("float8")
    if (dtype := getattr(torch, name, None)) is not None
}
#: The dtypes whose rows are bytes to us, with the names they have in a layout.
DTYPE_NAMES: dict[torch.dtype, str] = {
    dtype: name for name in DTYPE_SIZES if (dtype := getattr(torch, name, None)) is not None
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
        self._positional_only = frozenset(by_kind.get(inspect.Parameter.POSITIONAL_ONLY, ()))
        self._keywords = frozenset({
            *by_kind.get(inspect.Parameter.POSITIONAL_OR_KEYWORD, ()), *by_kind.get(inspect.Parameter.KEYWORD_ONLY, ()),
        })  # fmt: skip
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
        surplus = [key for key in kwargs if key not in self._keywords]
        if len(surplus) > 1:  # code that goes through **kwargs sees their order
            plain["**order"] = digest_parts(key.encode("utf-8", "surrogatepass") for key in surplus)
        for key, value in kwargs.items():
            # One that only **kwargs takes may be called like an argument that is given by position.
            name = f"**{key}" if key in self._positional_only or "[" in key else key
            plain.pop(name, None)
            _sort_argument(name, key, value, tensors, plain)
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
        if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001 - torch has no public test
            return "functorch_transform"  # it may wrap weights, and wraps what is made while it lasts
        if forward_ad._current_level >= 0:  # noqa: SLF001 - as above
            return "forward_mode_gradients"
        if torch.is_grad_enabled() and any(argument.tensor.requires_grad for argument in self._tensors):
            return "input_requires_grad"
        return None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensor arguments, in the order of their names."""
        return [argument.tensor for argument in self._tensors]

    def shared_parts(self) -> list[tuple[str, bytes]]:
        """Return what all samples of the call have in common: plain arguments, dtypes and row shapes, by name."""
        parts = [(f"argument {name}" if name else "function", self._plain[name]) for name in sorted(self._plain)]
        for argument in self._tensors:
            tensor = argument.tensor
            parts.append((f"tensor {argument.name}", f"{tensor.dtype} {tuple(tensor.shape[1:])}".encode()))
        return parts

    def signature(self) -> bytes:
        """Return the digest of what all samples of the call have in common."""
        return digest_parts(part for name, value in self.shared_parts() for part in (name.encode(), value))

    def digests(self, signature: bytes) -> list[bytes]:
        """Return the 16-byte digest of each sample, in order."""
        parts = [digest_rows(flat_bytes(argument.tensor), self.n) for argument in self._tensors]
        return combine(signature, parts)

    def row(self, position: int) -> tuple[torch.Tensor, ...]:
        """Return copies of one sample's rows, each of shape ``(1, ...)``, in the order of ``tensors``."""
        return tuple(tensor.detach()[position : position + 1].clone() for tensor in self.tensors)

    def select(
        self, positions: Sequence[int], extra: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return the arguments of a call that has the samples at ``positions`` only.

        Args:
            positions: In the order wanted.
            extra: What ``row`` returned for another call of the same signature: one sample more, at the end.
        """
        args, kwargs = list(self._args), dict(self._kwargs)
        first, last = positions[0], positions[-1]
        is_range = last - first == len(positions) - 1 and all(p == first + i for i, p in enumerate(positions))
        for i, argument in enumerate(self._tensors):
            tensor = argument.tensor.detach()
            rows = (
                tensor[first : last + 1]
                if is_range
                else tensor.index_select(0, torch.tensor(positions, dtype=torch.int64, device=tensor.device))
            )
            if extra is not None:
                rows = torch.cat([rows, extra[i].to(tensor.device)])
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
    integer = _WITHOUT_NUMPY.get(plain.dtype)
    array: np.ndarray[Any, Any] = (plain if integer is None else plain.view(integer)).numpy()
    return array
