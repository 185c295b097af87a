"""Who an encoding asks and tells what it comes upon."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from torchcache.keys.canonical import fingerprint_code
from torchcache.keys.digest import digest_parts
from torchcache.keys.plain import type_name
from torchcache.keys.time_limit import TimeLimit

#: Encodes an object once more: the bytes are other ones once it has changed.
Read = Callable[[], bytes]


class Observer:
    """Is told what an encoding comes upon. By default, modules and tensors count by value, and nothing is noted."""

    #: Whether generators count by the state they are in, although nobody seeded them.
    counts_generators = False
    #: Whether an object's own ``__getstate__`` says what it is made of.
    asks_for_state = False
    #: Whether the order of a dict counts: code may go through it in order.
    is_order_kept = True
    #: Ends an encoding that takes too long.
    limit: TimeLimit | None = None
    #: Whether values are looked at again later: an iterator that code consumes is another one then.
    looks_again = True

    def refer(self, value: torch.nn.Module | torch.Tensor, path: str) -> bytes | None:  # noqa: ARG002 - for those who ask
        """Return the bytes of a module or a tensor; None if it is to be encoded as any other object."""
        if isinstance(value, torch.Tensor):
            return None
        return _encode_architecture(value)

    def code_of(self, function: types.FunctionType) -> bytes:
        """Return the bytes of a function's code, without its defaults and closure."""
        return fingerprint_code(function.__code__)  # its helpers are walked for those who heed note_code

    def leaves_out(self, owner: object, name: str, value: object, path: str) -> bool:  # noqa: ARG002 - for those who do
        """Tell whether an attribute does not count."""
        return False

    def note_code(self, code: object) -> None:
        """Note a function, or the class of an object: code that may run."""

    def note_opaque(self, path: str, value: object) -> None:
        """Note where something lies that cannot be seen."""

    def note_generator(self, generator: object) -> None:
        """Note a random number generator."""

    def note_container(self, value: Any) -> bool:  # noqa: ANN401, ARG002 - any container of a built-in type
        """Note a container that may change; return whether all that lies in it is taken care of."""
        return False

    def note_attributes(self, value: object, names: Sequence[str]) -> None:
        """Note an object whose attributes of these names count."""

    def note_array(self, value: np.ndarray[Any, Any]) -> None:
        """Note an array of numbers."""

    def note_inner(self, path: str, encoded: bytes) -> None:
        """Note the bytes of what lies inside an attribute, for who wants to know what of it moved."""

    def note_content(self, value: object, read: Read, quick_read: Read | None) -> None:
        """Note an object that has to be encoded again to see whether it has changed, with all that lies in it.

        Args:
            value: The object.
            read: Returns other bytes once it has changed.
            quick_read: Returns other bytes once it has changed in a way that shows at once, for one that is large.
        """


def _encode_architecture(module: torch.nn.Module) -> bytes:
    """Say what a module is but not its weights: they count wherever the module is used."""
    shown = repr(module)
    parts = [b"" if " at 0x" in shown else shown.encode()]
    for name, child in module.named_modules():
        parts += [name.encode(), type_name(type(child))]
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return digest_parts(parts)
