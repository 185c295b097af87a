"""Whether tensors were changed, without their bytes: what torch counts of them, and a probe of their memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from torchcache.keys.mode import autocast_in_force
from torchcache.keys.tensor_digest import is_freed

_PROBE_BYTES = 64


class Marks:
    """What torch says of tensors without their bytes: where they lie, what form they have, how often written.

    A write through ``.data`` counts no version, but the tensor it puts in place may lie elsewhere or, if it is a
    part or a view of the old one, have another form. Built for speed: one call of C a tensor and question, and
    for the form one for all, where torch's own guards of compiled code can be asked.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._counted = [t for t in tensors if not t.is_inference()]  # the others count no versions
        self._matrices = [t for t in tensors if t.dim() > 1]
        self._guards: dict[tuple[object, ...], Any] = {}

    def read(self) -> tuple[list[object], ...]:
        """Return where the tensors lie and how often they were written."""
        return list(map(_POINTER, self._tensors)), list(map(_VERSION, self._counted))

    def forms(self) -> tuple[list[object], ...]:
        """Return sizes, strides, dtypes, who is lazily conjugated or negated, and who requires grad."""
        return (
            list(map(_BYTES, self._tensors)),
            list(map(_STRIDES, self._matrices)),
            list(map(_DTYPE, self._tensors)),
            [(tensor.is_conj(), tensor.is_neg()) for tensor in self._tensors],
            list(map(_REQUIRES_GRAD, self._tensors)),
        )

    def have_form(self, seen: tuple[list[object], ...]) -> bool:
        """Tell whether ``forms`` would still return what was ``seen``."""
        if not self._tensors:
            return True
        # What a guard sees depends on these: the tensors' dispatch keys are masked by them.
        surroundings = torch.is_inference_mode_enabled(), autocast_in_force()
        guard = self._guards.get(surroundings)
        if guard is not None and guard.check(*self._tensors):
            return True
        if self.forms() != seen:
            return False
        if len(self._guards) < _MOST_GUARDS:
            self._guards[surroundings] = _make_guard(self._tensors)
        return True


#: Guards are kept for so many surroundings (inference mode, autocast).
_MOST_GUARDS = 8

_POINTER = torch.Tensor.data_ptr
_VERSION = attrgetter("_version")
_BYTES = attrgetter("nbytes")
_STRIDES = torch.Tensor.stride
_DTYPE = attrgetter("dtype")
_REQUIRES_GRAD = attrgetter("requires_grad")


def _make_guard(tensors: Sequence[torch.Tensor]) -> Any:  # noqa: ANN401 - a class of torch without a public name
    """Return torch's check that tensors keep their form; None where this torch has none that does."""
    return _guard_of(tensors) if _guards_work() else None


def _guard_of(tensors: Sequence[torch.Tensor]) -> Any:  # noqa: ANN401 - as above
    guards: Any = torch._C._dynamo.guards  # noqa: SLF001 - what it promises is tried below
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


@lru_cache(maxsize=1)
def _guards_work() -> bool:
    """Try the guards of this torch once: they are no public interface."""
    tensor = torch.zeros(4, 4, device="cpu", dtype=torch.float32)
    forms = (tensor.t(), tensor[:2], tensor.view(torch.int32), tensor.view(2, 8))
    try:
        guard = _guard_of([tensor])
        return bool(guard.check(tensor)) and not any(map(guard.check, forms))
    except Exception:  # noqa: BLE001 - whatever a later torch makes of it: the tensors are asked one by one
        return False


def probes_of(tensor: torch.Tensor) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """Yield the first and last bytes of a tensor in host memory, as live views.

    They are read only while the tensor's pointer is unchanged, so they cannot outlive its memory.
    """
    if tensor.device.type != "cpu" or type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.numel():
        return
    if is_freed(tensor):
        return
    pointer = tensor.data_ptr()
    if not pointer:
        return
    size = tensor.numel() * tensor.element_size()
    if not (tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)):
        size = tensor.element_size()
    first = min(size, _PROBE_BYTES)
    yield (ctypes.c_char * first).from_address(pointer)
    if size > first:
        last = min(size - first, _PROBE_BYTES)
        yield (ctypes.c_char * last).from_address(pointer + size - last)
