"""The canonical form of a code object, and its digest: what tells code that computes something else.

Instructions are hashed one by one with their operands resolved, so that docstrings, line numbers, file
and module names do not count. This module does not import torch.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterator
from itertools import pairwise

from torchcache.keys.digest import digest_parts
from torchcache.keys.instructions import JUMPS, SAYS_NOTHING
from torchcache.keys.per_code import PerCode

#: Flags of a code object that say how it runs (generator, coroutine, *args, ...); the rest, such as
#: "has a docstring", does not count.
_FLAG_MASK = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_ITERABLE_COROUTINE
)

#: What the body of a class inside a function says of itself: texts, line numbers, and from Python 3.13 on
#: names in an order that the hash seed decides.
_SELF_DESCRIPTIONS = frozenset({"__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__"})

_HAS_CONSTANT = frozenset(dis.hasconst)

_CONSTANTS = frozenset({type(None), bool, int, float, complex, str, bytes, type(...)})


@PerCode
def fingerprint_code(code: types.CodeType) -> bytes:
    """Return the digest of one code object and of those inside it."""
    shape = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAG_MASK
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    parts = [str(shape).encode(), " ".join(parameters).encode()]

    kept, numbers = _canonical(code)
    for start, end, target, depth in _protected(code):
        # Ranges that hold nothing that counts protect nothing.
        if numbers[start] < numbers[end]:
            parts.append(f"protect {numbers[start]} {numbers[end]} {numbers[target]} {depth}".encode())

    for instruction in kept:
        parts.append(instruction.opname.encode())
        if instruction.opcode in _HAS_CONSTANT:
            # dis does not resolve the names of keyword arguments of Python 3.11.
            parts.append(constant(code.co_consts[instruction.arg or 0]))
        elif instruction.opcode in JUMPS:
            parts.append(str(numbers[instruction.argval]).encode())
        elif isinstance(instruction.argval, str):
            parts.append(instruction.argval.encode())
        elif instruction.arg is not None:
            parts.append(str(instruction.arg).encode())
    return digest_parts(parts)


def _canonical(code: types.CodeType) -> tuple[list[dis.Instruction], dict[int, int]]:
    """Return the instructions that count, and for every offset the number of such instructions before it."""
    everything = list(dis.get_instructions(code))
    silent = set[int]()
    for before, store in pairwise(everything):
        describes = store.opname == "STORE_NAME" and store.argval in _SELF_DESCRIPTIONS
        if describes and before.opname.startswith("LOAD_"):
            silent |= {before.offset, store.offset}

    kept: list[dis.Instruction] = []
    numbers: dict[int, int] = {}
    for instruction in everything:
        numbers[instruction.offset] = len(kept)
        if instruction.opname not in SAYS_NOTHING and instruction.offset not in silent:
            kept.append(instruction)

    # Offsets of inline caches, which a range of protected code may end in, belong to what precedes them.
    number = len(kept)
    for offset in range(len(code.co_code), -1, -2):
        number = numbers.setdefault(offset, number)
    return kept, numbers


def _protected(code: types.CodeType) -> Iterator[tuple[int, int, int, int]]:
    """Yield start, end and handler of each protected range, with depth and flag (Python 3.11 and later)."""
    numbers = _varints(getattr(code, "co_exceptiontable", b""))
    for start, length, target, depth in zip(numbers, numbers, numbers, numbers, strict=True):
        yield 2 * start, 2 * (start + length), 2 * target, depth


def _varints(table: bytes) -> Iterator[int]:
    """Decode the numbers of an exception table: six bits a byte, the seventh says that more follow."""
    value = 0
    for byte in table:
        value = value << 6 | byte & 63
        if not byte & 64:
            yield value
            value = 0


def constant(value: object) -> bytes:
    """Return a stable name of a constant of code; of anything that cannot be one, of its type."""
    if isinstance(value, types.CodeType):
        return b"code" + fingerprint_code(value)
    if isinstance(value, tuple):
        return digest_parts([b"tuple", *map(constant, value)])
    if isinstance(value, frozenset):
        return digest_parts([b"frozenset", *sorted(map(constant, value))])
    if is_constant(value):
        return f"{type(value).__name__} {value!r}".encode()
    return type(value).__qualname__.encode()


def is_constant(value: object) -> bool:
    """Tell whether ``constant`` names all of a value: a plain one that nothing changes."""
    if type(value) in (tuple, frozenset):
        return all(map(is_constant, value))  # type: ignore[call-overload]
    return type(value) in _CONSTANTS
