"""Random number generators: what they draw from, whether somebody seeded them, and which everybody draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

#: An unseeded generator of NumPy draws 128 bits to start from, one of torch 53: no user chooses a seed that large.
_LARGEST_SEED = 1 << 64
_LARGEST_TORCH_SEED = 1 << 40

#: The classes of random number generators.
GENERATORS = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)


def generator_state(value: Any) -> object:  # noqa: ANN401 - one of ``GENERATORS``
    """Return the state of a random number generator as plain data."""
    if isinstance(value, torch.Generator):
        return str(value.device), value.get_state().numpy()
    if isinstance(value, random.Random):
        return value.getstate()
    bits = _bits_of(value)
    # Children that are spawned draw from the sequence of seeds, and leave the generator's own state as it is.
    return bits.state, getattr(getattr(bits, "_seed_seq", None), "state", None)


def is_seeded(value: Any) -> bool:  # noqa: ANN401 - as above
    """Tell whether somebody gave a generator its seed, as far as it shows: of ``random.Random`` it does not."""
    if isinstance(value, torch.Generator):
        seed = value.initial_seed()
        return seed < _LARGEST_TORCH_SEED or seed == torch.Generator(device="cpu").initial_seed()
    if isinstance(value, random.Random):
        return False
    entropy = getattr(getattr(_bits_of(value), "_seed_seq", None), "entropy", None)
    return not isinstance(entropy, int) or entropy < _LARGEST_SEED


def is_global(value: object) -> bool:
    """Tell whether a generator is one of those that everybody draws from."""
    held = getattr(random.random, "__self__", None), np.random.mtrand._rand, torch.default_generator  # noqa: SLF001
    return any(value is generator for generator in held)


def _bits_of(value: Any) -> Any:  # noqa: ANN401 - a generator of NumPy and the bit generator in it
    if isinstance(value, np.random.Generator):
        return value.bit_generator
    if isinstance(value, np.random.RandomState):
        return value._bit_generator  # noqa: SLF001 - no public name
    return value
