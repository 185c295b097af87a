"""The states of random number generators as bytes, to see whether somebody drew from them.

Python and NumPy make 624 ints of a Mersenne Twister's state whenever they are asked for it: 25 and 100 microseconds. So
the bytes are read where they lie. A trial at import sees whether that is so and whether each kind of draw changes them;
where not, the generator is asked. torch copies 5 kB, which is quick enough.

- ``random.Random``: behind the head of the object are an index and 624 words. A second number of ``gauss`` waits in an
  attribute.
- ``np.random.RandomState`` over ``MT19937``: 624 words and a position, at an address that NumPy tells. In the object
  itself a second number of ``standard_normal`` waits.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from torchcache.keys.generators import generator_state
from torchcache.keys.own_state import OwnState

_WORDS = 624
_TWISTER_BYTES = 4 * (_WORDS + 1)
_HEAD = object.__basicsize__


def state_mark(generator: Any) -> object:  # noqa: ANN401 - one of ``generators.GENERATORS``
    """Return something that differs once numbers were drawn from a generator."""
    kind = type(generator)
    if kind is torch.Generator:
        return generator.get_state().numpy().tobytes()
    if kind is OwnState:
        return generator.mark()
    if kind is random.Random and IS_PYTHON_SUPPORTED:
        return _python_mark(generator)
    if kind is np.random.RandomState and IS_NUMPY_SUPPORTED:
        bits = generator._bit_generator  # noqa: SLF001 - no public name
        if type(bits) is np.random.MT19937:
            return _numpy_mark(generator, bits)
    if isinstance(generator, np.random.RandomState):  # with a second number of standard_normal, if one waits
        return _frozen(generator.get_state(legacy=False))
    return _frozen(generator_state(generator))


def global_marks() -> tuple[object, ...]:
    """Return something that differs once numbers were drawn from a generator that everybody draws from."""
    of_python = getattr(random.getstate, "__self__", None)
    marks: list[object] = [
        torch.default_generator.get_state().numpy().tobytes(),
        random.getstate() if of_python is None else state_mark(of_python),
        state_mark(np.random.mtrand._rand),  # noqa: SLF001 - the global generator has no public name
    ]
    if torch.cuda.is_initialized():
        marks += [generator.get_state().numpy().tobytes() for generator in torch.cuda.default_generators]
    return tuple(marks)


def _python_mark(generator: random.Random) -> object:
    return ctypes.string_at(id(generator) + _HEAD, _TWISTER_BYTES), generator.gauss_next  # type: ignore[attr-defined]


def _numpy_mark(generator: Any, bits: Any) -> object:  # noqa: ANN401 - of NumPy
    words = ctypes.string_at(bits.ctypes.state_address, _TWISTER_BYTES)
    return words, ctypes.string_at(id(generator) + _HEAD, type(generator).__basicsize__ - _HEAD)


def _frozen(state: object) -> object:
    """Return a state in which arrays are bytes, so that it can be compared."""
    if isinstance(state, np.ndarray):
        return state.tobytes()
    if isinstance(state, Mapping):
        return [(key, _frozen(value)) for key, value in state.items()]
    return [_frozen(item) for item in state] if isinstance(state, tuple) and len(state) < _WORDS else state


# -- the trials --------------------------------------------------------------------------------------------------------


def _shows(mark: Callable[[], object], draws: list[Callable[[], object]]) -> bool:
    """Tell whether a mark stands still by itself and moves at each draw."""
    for draw in draws:
        before = mark()
        if mark() != before:
            return False
        draw()
        if mark() == before:
            return False
    return True


def _python_works() -> bool:
    if sys.implementation.name != "cpython":
        return False
    generator = random.Random(1)  # noqa: S311 - nothing secret
    if random.Random.__basicsize__ < _HEAD + _TWISTER_BYTES or not hasattr(generator, "gauss_next"):
        return False
    data = ctypes.string_at(id(generator) + _HEAD, _TWISTER_BYTES)
    *words, index = generator.getstate()[1]
    are_there = np.frombuffer(data, np.uint32).tolist() == [index, *words]
    draws: list[Callable[[], object]] = [
        generator.random,
        lambda: generator.gauss(0, 1),
        lambda: generator.gauss(0, 1),  # the number that waited
        lambda: generator.getrandbits(1),
    ]
    return are_there and _shows(lambda: _python_mark(generator), draws)


def _numpy_works() -> bool:
    if sys.implementation.name != "cpython":
        return False
    generator = np.random.RandomState(1)
    bits = generator._bit_generator  # noqa: SLF001 - no public name
    if type(bits) is not np.random.MT19937:
        return False
    data = np.frombuffer(ctypes.string_at(bits.ctypes.state_address, _TWISTER_BYTES), np.uint32)
    state = bits.state["state"]
    are_there = data.tolist() == [*state["key"].tolist(), state["pos"]]
    draws: list[Callable[[], object]] = [
        generator.standard_normal,
        generator.standard_normal,  # the number that waited
        generator.random_sample,
        lambda: generator.bytes(1),
    ]
    return are_there and _shows(lambda: _numpy_mark(generator, bits), draws)


IS_PYTHON_SUPPORTED: bool = _python_works()
IS_NUMPY_SUPPORTED: bool = _numpy_works()
