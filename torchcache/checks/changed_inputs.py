"""Whether a computed call changed its arguments, which a hit would leave as they are."""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict, UserDict, deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torchcache.checks.plan import Check, Plan, Returned
from torchcache.checks.verdicts import Condemned, remember
from torchcache.inputs.batch import Batch
from torchcache.inputs.shared import SharedArgument
from torchcache.keys.attributes import attributes_of
from torchcache.keys.digest import digest_bytes
from torchcache.keys.tensor_digest import digest_tensor, encode_array
from torchcache.keys.tensors import flat_bytes
from torchcache.process import ForkLock
from torchcache.report.go_around import NOTHING
from torchcache.report.reasons import Reason

#: At most this many tensors, arrays and containers of one call are watched.
_MAX_WATCHED = 10_000

#: Containers that were replaced by equal ones are compared to this depth.
_MAX_DEPTH = 8

#: Values of these types cannot change and hold nothing that can.
_IMMUTABLE = frozenset({str, int, float, bool, type(None), bytes, complex, torch.dtype, torch.device, torch.Size})


class ChangedInputs(Check):
    """Notices calls that change their arguments; none of their namespace is cached from then on.

    Attributes:
        noted: The namespaces of such calls; changed under a lock.
    """

    def __init__(self) -> None:
        self._lock = ForkLock()
        self.noted: OrderedDict[bytes, None] = OrderedDict()

    def returned(self, plan: Plan, returned: Returned) -> Returned:
        if not returned.changed:
            return returned
        with self._lock.raw:
            remember(self.noted, plan.call.namespace, None)
        # What came of the caller's own arguments is the result. Of copies, the caller's are still to be changed.
        are_own = plan.is_as_given or not plan.call.batch.is_divisible
        result = returned.given if are_own else NOTHING
        raise Condemned(Reason.INPUT_CHANGED_IN_PLACE, f"argument {returned.changed!r}", result)

    def forget(self) -> None:
        with self._lock.raw:
            self.noted.clear()

    def reason_against(self, namespace: bytes) -> Reason | None:
        """Say that calls of a namespace are known to change their input, or return None."""
        with self._lock.raw:
            return Reason.INPUT_CHANGED_IN_PLACE if namespace in self.noted else None


class InputWatch:
    """The arguments of a call before it is computed, to compare them afterwards.

    - A tensor is compared by its version, address, shape and strides. In host memory, and where torch counts no
      versions, all its bytes are compared too: NumPy and ``.data`` write without torch's counter.
    - An array is compared by its bytes, a container by the identity of the tensors, arrays and objects in it.
    - An argument that all samples share is also encoded again, as for the key.

    Args:
        batch: The call.
        args: The positional arguments that are forwarded, the caller's own or copies.
        kwargs: The keyword arguments that are forwarded.
    """

    def __init__(self, batch: Batch, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        self._by_bytes = batch.is_divisible  # what a call of one sample holds is compared as it is encoded
        self._marks: list[tuple[str, object, _Mark]] = []
        self._shared: list[SharedArgument] = []
        for argument in batch.arguments:
            place = argument.place
            if isinstance(argument, SharedArgument):
                self._shared.append(argument)
            self._watch(argument.name, args[place] if isinstance(place, int) else kwargs[place])

    def changed(self) -> str:
        """Return the name of an argument that was changed since; "" if there is none."""
        for name, value, mark in self._marks:
            if not mark.is_same(_mark(value, by_bytes=self._by_bytes)):
                return name
        return next((argument.name for argument in self._shared if argument.has_changed()), "")

    def _watch(self, name: str, value: object) -> None:
        """Mark an argument and everything in it that can be changed."""
        seen: set[int] = set()
        to_visit = [value]
        while to_visit and len(self._marks) < _MAX_WATCHED:
            item = to_visit.pop()
            mark = None if id(item) in seen else _mark(item, by_bytes=self._by_bytes)
            if mark is None:
                continue
            seen.add(id(item))
            self._marks.append((name, item, mark))
            to_visit += [part for part in mark.items if type(part) not in _IMMUTABLE]


@dataclasses.dataclass(frozen=True, slots=True)
class _Mark:
    """What one object is: ``value`` is compared by value, ``items`` by identity."""

    value: object
    items: Sequence[object] = ()

    def is_same(self, other: _Mark | None, depth: int = 0) -> bool:
        if other is None or self.value != other.value or len(self.items) != len(other.items):
            return False
        return all(map(operator.is_, self.items, other.items)) or all(
            _is_same(*pair, depth) for pair in zip(self.items, other.items, strict=True)
        )


def _is_same(one: object, other: object, depth: int) -> bool:
    """Tell whether an item is what it was, or another container of the same items, as BatchEncoding.to() makes."""
    if one is other:
        return True
    if type(one) is not type(other) or depth == _MAX_DEPTH:
        return False
    if type(one) in _IMMUTABLE:
        return one == other
    before = None if isinstance(one, (torch.Tensor, np.ndarray)) else _mark(one, by_bytes=False)
    return before is not None and before.is_same(_mark(other, by_bytes=False), depth + 1)


def _mark(value: Any, *, by_bytes: bool) -> _Mark | None:  # noqa: ANN401 - any object
    """Return the mark of an object, or None for one that is not watched."""
    kind = type(value)  # its ``__class__`` may say something else
    if issubclass(kind, torch.Tensor):
        return _Mark(_tensor_mark(value, by_bytes=by_bytes))
    if issubclass(kind, np.ndarray):
        return _Mark(encode_array(value) if by_bytes else (value.shape, value.dtype))
    if issubclass(kind, bytearray):
        return _Mark(bytes(value))
    items: list[object] = []
    if issubclass(kind, dict):
        items += [*value.keys(), *value.values()]
    elif issubclass(kind, (list, tuple, set, frozenset, deque)):
        items += value
    elif not issubclass(kind, UserDict) and not dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
        return None
    for name, attribute in (attributes_of(value) or {}).items():
        # What an object computes from itself and remembers is no change.
        if not isinstance(getattr(kind, name, None), cached_property):
            items += [name, attribute]
    return _Mark(len(items), items)


def _tensor_mark(tensor: torch.Tensor, *, by_bytes: bool) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    content: bytes | None = None
    if by_bytes and tensor.device.type == "cpu":
        content = digest_bytes(flat_bytes(tensor))
    elif by_bytes and version is None:
        content = digest_tensor(tensor)
    return version, tensor.data_ptr(), tensor.shape, tensor.stride(), content
