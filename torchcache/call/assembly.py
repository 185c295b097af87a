"""The result of a call, made from its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.contract import AnyIdentity
from torchcache.layout import Found
from torchcache.tiers.tiers import Tiers


class Assembly:
    """Puts results together, on the devices where calls of their form have them.

    Args:
        identity: Knows where the module lies.
        tiers: Knows classes, and where computed results had their leaves.
    """

    def __init__(self, identity: AnyIdentity, tiers: Tiers) -> None:
        self._identity = identity
        self._known = tiers.known
        self._devices = tiers.devices

    def note_devices(self, call: CachedCall, devices: tuple[torch.device, ...]) -> None:
        """Remember where a computed result has its leaves."""
        self._devices.note(call, self._module_device(), devices)

    def assemble(self, found: Sequence[Found], call: CachedCall) -> object:
        """Return the result of a call.

        Args:
            found: The rows of all its samples, which stack.
            call: The call.

        Raises:
            CorruptRecordError: If a class of the result refuses to be rebuilt.
        """
        module_device = self._module_device()
        n_leaves = len(found[0].layout.leaves)
        devices = self._devices.of(call, module_device)
        if len(devices) != n_leaves:
            devices = (module_device or call.batch.first_device,) * n_leaves
        return call.batch.results.assemble(found, call.batch.n, devices, self._known)

    def _module_device(self) -> torch.device | None:
        parameters = self._identity.parameters()
        return parameters[0].device if parameters else None
