"""What the rest of the library asks of an identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from torchcache.keys.identity import Look
from torchcache.keys.key_parts import Part
from torchcache.keys.moves import Move


class FollowsState(Protocol):
    """Knows the state behind the results of a target, and whether it has moved since the last look."""

    def has_moved(self, since: Look) -> bool:
        """Tell whether code or state differ from what a look saw."""

    def look_past_flags(self, since: Look) -> Look | None:
        """Look again, if nothing but training flags that no code reads moved since a look; else return None."""

    def moves(self) -> list[Move]:
        """Return what moved when the state moved last."""

    def marks(self) -> object:
        """Return something that differs once a weight was changed in a way that torch counts."""

    def parameters(self) -> list[torch.Tensor]:
        """Return the parameters last seen."""

    def requires_grad(self) -> bool:
        """Tell whether a parameter last seen required grad."""

    def whole_bytes(self) -> int:
        """Return how many bytes of weights are compared at each call, all of them."""

    def note_hashed(self, n_bytes: int) -> None:
        """Note that a call hashed so many bytes of its inputs: the next one looks at the more weights."""

    def generators(self) -> list[object]:
        """Return the random number generators that the state last seen leads to."""

    def sets_generators(self) -> bool:
        """Tell whether the code may put a random number generator back as it was."""


class AnyIdentity(FollowsState, Protocol):
    """Names what is computed, and the state that it is computed in: the front half of every key.

    Safe from any thread.
    """

    def module_hash(self) -> str:
        """Return the name of code, construction arguments and the options that shape the values."""

    def look(self) -> Look:
        """Look at the present state."""

    def settle(self, look: Look) -> bool:
        """Make what computes, if it is not there; tell whether the state is another then than a look said."""

    def refresh(self) -> None:
        """Look at everything afresh next time."""

    def apart(self) -> AnyIdentity:
        """Return the same as another object, which may be asked without this one remembering it."""

    def classes(self) -> tuple[type, ...]:
        """Return the user's own classes that the code refers to."""

    def key_parts(self) -> tuple[list[Part], list[Part]]:
        """Return the parts of the module hash and of the state last seen, without a new look at either."""

    def describe(self) -> Iterator[tuple[str, bytes]]:
        """Yield each part of module hash and fingerprint with its digest."""
