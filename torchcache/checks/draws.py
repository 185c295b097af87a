"""Random numbers that are drawn while a call is computed, and whether what was drawn shapes the result."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from torchcache.keys.fast.random_states import global_marks, state_mark
from torchcache.keys.own_state import OwnState

#: So many outputs of a generator are replaced by the lowest, or the highest: ``random()`` takes two. Few enough for a
#: loop that draws until it likes the number.
_REPLACED = 128

#: A seed that nobody has.
_OTHER_SEED = 0x7C3A91E5D

#: Words of the state of a Mersenne Twister that come out as 0 and as 2**32 - 1: the inverse of the tempering of MT19937
#: (Matsumoto and Nishimura, 1998).
_LOWEST, _HIGHEST = 0, 0x12DD9BB3


@contextmanager
def other_numbers(which: int) -> Iterator[None]:
    """Let the generators that everybody draws from give other numbers for a while; then they go on where they were.

    So a call shows that it draws although it puts a generator back as it was, as under ``torch.random.fork_rng()``.

    Args:
        which: Which other numbers.
    """
    of_torch = [torch.default_generator]
    if torch.cuda.is_initialized():
        of_torch += torch.cuda.default_generators
    states = [generator.get_state() for generator in of_torch]
    of_python, of_numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 - the global one
    try:
        for generator in of_torch:
            generator.manual_seed(_OTHER_SEED + which)
        random.seed(_OTHER_SEED + which)
        np.random.random_sample(1 + which)  # noqa: NPY002 - not every kind that it may be of can be seeded
        yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)
        for generator, state in zip(of_torch, states, strict=True):
            generator.set_state(state)


class Draws:
    """The generators that a call may draw from, as they were before it was computed.

    Args:
        generators: Those that the state leads to. The global ones are looked at anyway.
    """

    def __init__(self, generators: Sequence[Any]) -> None:
        self._generators = generators
        self._before = [state_mark(generator) for generator in generators]
        self._global_before = global_marks()

    def are_there(self) -> bool:
        """Tell whether numbers were drawn since."""
        return bool(self._moved()) or global_marks() != self._global_before

    def can_be_tried(self) -> bool:
        """Tell whether all that was drawn came from generators that can be made to give other numbers.

        Those of ``random.Random`` can. Libraries of augmentations ask one whether to apply a transform at all.
        """
        moved = self._moved()
        can_all = all(isinstance(generator, (random.Random, OwnState)) for generator in moved)
        return bool(moved) and can_all and global_marks() == self._global_before

    def tries(self) -> Iterator[None]:
        """Make the generators give the lowest numbers, then the highest, while the iteration is at one step each.

        State that code changes itself is what it is by now. Afterwards all go on as if nothing had been tried.
        """
        own = [generator for generator in self._moved() if isinstance(generator, OwnState)]
        values = [changed.saved() for changed in own]
        moved = [generator for generator in self._moved() if isinstance(generator, random.Random)]
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
            for changed, saved in zip(own, values, strict=True):
                changed.restore(saved)

    def note_without_effect(self) -> None:
        """Note that what was tried came to the same result each time."""
        for generator in self._generators:
            if isinstance(generator, OwnState):
                generator.note_without_effect()

    def _moved(self) -> list[Any]:
        pairs = zip(self._generators, self._before, strict=True)
        return [generator for generator, before in pairs if state_mark(generator) != before]
