"""Where results had their leaves: rows say nothing of devices, and a key neither."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol

import torch

from torchcache import process

#: The devices of at most this many forms of calls are remembered.
_MOST_FORMS = 4096

_device_of = attrgetter("device")


class _Batch(Protocol):
    @property
    def tensors(self) -> Sequence[torch.Tensor]: ...
    @property
    def is_divisible(self) -> bool: ...


class _Call(Protocol):
    """What of a call says where its result will be."""

    @property
    def namespace(self) -> bytes: ...
    @property
    def digests(self) -> Sequence[bytes]: ...
    @property
    def batch(self) -> _Batch: ...


class ResultDevices:
    """Where computed results had their leaves, by the form of their calls and the devices of what went in.

    Of whole calls each has a form of its own; one that was not computed here goes by the one computed last.

    Attributes:
        latest: Of the result that was computed last.
        are_host: Whether all results that were computed here had their leaves in host memory.
    """

    def __init__(self) -> None:
        self.latest: tuple[torch.device, ...] = ()
        self.are_host: bool = True
        self._lock = process.ForkLock()
        self._known: OrderedDict[tuple[object, ...], tuple[torch.device, ...]] = OrderedDict()  # guarded by _lock

    def note(self, call: _Call, module_device: torch.device | None, devices: tuple[torch.device, ...]) -> None:
        """Remember where a computed result has its leaves."""
        with self._lock.raw:
            self.latest = devices
            self.are_host = self.are_host and all(device.type == "cpu" for device in devices)
            for form in _forms(call, module_device):
                self._known[form] = devices
                self._known.move_to_end(form)
                if len(self._known) > _MOST_FORMS:
                    self._known.popitem(last=False)

    def of(self, call: _Call, module_device: torch.device | None) -> tuple[torch.device, ...]:
        """Return where results of such a call have their leaves; nothing if none was computed here."""
        for form in _forms(call, module_device):
            devices = self._known.get(form)
            if devices is not None:
                return devices
        return ()


def _forms(call: _Call, module_device: torch.device | None) -> list[tuple[object, ...]]:
    """Return what the devices of a call's result depend on, the narrowest form first."""
    form = (call.namespace, module_device, *map(_device_of, call.batch.tensors))
    return [form] if call.batch.is_divisible else [(*form, call.digests[0]), form]
