"""What torch says of tensors without reading them: where they lie, what form they have, how often they were written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch

from torchcache.keys.fast.mode import autocast_in_force

#: One list for each question, with an answer for each tensor.
Answers = tuple[list[object], ...]


class Marks:
    """What torch says of some tensors, asked again at each call.

    A write through ``.data`` counts no version, but the tensor it puts in place may lie elsewhere or, if it is a
    part or a view of the old one, have another form. Built for speed: one call of C for each tensor and question, and
    for the form one for all, where torch's own guards of compiled code can be asked.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._counted = [t for t in tensors if not t.is_inference()]  # the others count no versions
        self._matrices = [t for t in tensors if t.dim() > 1]
        self._guards: dict[tuple[object, ...], Any] = {}

    def read(self) -> Answers:
        """Return where the tensors lie and how often they were written."""
        return list(map(_POINTER, self._tensors)), list(map(_VERSION, self._counted))

    def forms(self) -> Answers:
        """Return sizes, strides, dtypes, who is lazily conjugated or negated, and who requires grad."""
        return (
            list(map(_BYTES, self._tensors)),
            list(map(_STRIDES, self._matrices)),
            list(map(_DTYPE, self._tensors)),
            [(tensor.is_conj(), tensor.is_neg()) for tensor in self._tensors],
            list(map(_REQUIRES_GRAD, self._tensors)),
        )

    def each(self, marks: Answers, forms: Answers) -> list[tuple[object, ...]]:
        """Return what ``read`` and ``forms`` answered, tensor by tensor: pointer, version (None: not counted), form."""
        pointers, versions = map(iter, marks)
        n_bytes, strides, dtypes, lazies = map(iter, forms[:-1])
        counted, matrices = set(map(id, self._counted)), set(map(id, self._matrices))
        found: list[tuple[object, ...]] = []
        for tensor in self._tensors:
            version = next(versions) if id(tensor) in counted else None
            stride = next(strides) if id(tensor) in matrices else ()
            found.append((next(pointers), version, next(n_bytes), stride, next(dtypes), next(lazies)))
        return found

    def have_form(self, seen: Answers) -> bool:
        """Tell whether ``forms`` would still return what was ``seen``."""
        if not self._tensors:
            return True

        # What a guard sees depends on these: the tensors' dispatch keys are masked by them.
        surroundings = torch.is_inference_mode_enabled(), autocast_in_force()
        guard = self._guards.get(surroundings)
        if guard is not None and guard.check(*self._tensors):
            return True

        # The slow way, and what a guard is made from.
        if self.forms() != seen:
            return False
        if len(self._guards) < _MOST_GUARDS:
            self._guards[surroundings] = _make_guard(self._tensors)
        return True


#: Guards are kept for at most this many surroundings (inference mode, autocast).
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
