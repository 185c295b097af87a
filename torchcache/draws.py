"""Random numbers that are drawn while a call is computed, and whether what was drawn shapes the result."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchcache.keys.values import generator_state

#: So many outputs of a generator are replaced by the lowest, or the highest: ``random()`` takes two. Few enough for a
#: loop that draws until it likes the number.
_REPLACED = 128

#: Words of the state of a Mersenne Twister that come out as 0 and as 2**32 - 1: the inverse of the tempering of MT19937
#: (Matsumoto and Nishimura, 1998).
_LOWEST, _HIGHEST = 0, 0x12DD9BB3


class Draws:
    """The generators that a call may draw from, as they were before it was computed.

    Args:
        generators: Those that the state leads to. The global ones are looked at anyway.
    """

    def __init__(self, generators: Sequence[Any]) -> None:
        self._generators = generators
        self._before = [_frozen(generator_state(generator)) for generator in generators]
        self._global_before = _global_states()

    def are_there(self) -> bool:
        """Tell whether numbers were drawn since."""
        return bool(self._moved()) or _global_states() != self._global_before

    def can_be_tried(self) -> bool:
        """Tell whether all that was drawn came from generators that can be made to give other numbers.

        Those of ``random.Random`` can. Libraries of augmentations ask one whether to apply a transform at all.
        """
        moved = self._moved()
        can_all = all(isinstance(generator, random.Random) for generator in moved)
        return bool(moved) and can_all and _global_states() == self._global_before

    def tries(self) -> Iterator[None]:
        """Make the generators give the lowest numbers, then the highest, while the iteration is at one step each.

        Afterwards they go on as if nothing had been tried.
        """
        moved = self._moved()
        states = [generator.getstate() for generator in moved]
        try:
            for word in (_LOWEST, _HIGHEST):
                for generator, (version, words, _) in zip(moved, states, strict=True):
                    edge = (*[word] * _REPLACED, *words[_REPLACED:-1], 0)
                    generator.setstate((version, edge, None))
                yield
        finally:
            for generator, state in zip(moved, states, strict=True):
                generator.setstate(state)

    def _moved(self) -> list[Any]:
        pairs = zip(self._generators, self._before, strict=True)
        return [generator for generator, before in pairs if _frozen(generator_state(generator)) != before]


def _global_states() -> tuple[object, ...]:
    """Return something that differs if random numbers were drawn from a global generator meanwhile."""
    legacy = np.random.get_state()  # noqa: NPY002 - the global generator is what is asked about
    states: list[object] = [torch.default_generator.get_state().numpy().tobytes(), random.getstate(), _frozen(legacy)]
    if torch.cuda.is_initialized():
        states += [g.get_state().numpy().tobytes() for g in torch.cuda.default_generators]
    return tuple(states)


def _frozen(state: object) -> object:
    """Return a state in which arrays are bytes, so that it can be compared."""
    if isinstance(state, np.ndarray):
        return state.tobytes()
    if isinstance(state, Mapping):
        return [(key, _frozen(value)) for key, value in state.items()]
    return [_frozen(item) for item in state] if isinstance(state, tuple) and len(state) < _REPLACED else state
