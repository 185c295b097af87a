"""What the code of one function says: its digest, and names of what it refers to. This module does not import torch."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator

from torchcache.keys.canonical import constant, fingerprint_code, is_constant
from torchcache.keys.per_code import PerCode
from torchcache.keys.places import MISSING, Name, defaults_of
from torchcache.keys.reads import Reads, all_codes

#: Globals that say where code lies, not what it does; a script's are others in a spawned worker.
SKIPPED_GLOBALS = frozenset({
    "__name__", "__qualname__", "__module__", "__file__", "__spec__", "__package__", "__loader__", "__builtins__",
    "__doc__", "__annotations__", "__class__",
})  # fmt: skip

_ENVIRONMENT = frozenset({"environ", "getenv"})
_NUMBERS = (int, float, complex, bool)


def code_of(function: types.FunctionType) -> Iterator[bytes]:
    """Yield a digest of the code, and the defaults that are constants."""
    yield fingerprint_code(function.__code__)
    for key, value in defaults_of(function):
        yield key.encode()
        yield constant(value) if is_constant(value) else b"by value"


def identifiers_in(function: types.FunctionType) -> tuple[str, ...]:
    """Return the texts in a function's code that could be names."""
    return _identifiers(function.__code__)


@PerCode
def _identifiers(code: types.CodeType) -> tuple[str, ...]:
    texts = set[str]()
    for inner in all_codes(code):
        texts.update(value for value in inner.co_consts if type(value) is str)
    return tuple(sorted(filter(str.isidentifier, texts)))


def names_of_environment(function: types.FunctionType, reads: Reads) -> list[Name]:
    """Return the variables of the environment that a function may ask for: each text in it that could name one."""
    if _ENVIRONMENT.isdisjoint(reads.names) and _ENVIRONMENT.isdisjoint(reads.attributes):
        return []
    return [Name(f"environment {text}", os.environ, text) for text in identifiers_in(function)]


def names_in_library(function: types.FunctionType, reads: Reads) -> Iterator[tuple[Name, bool]]:
    """Yield what code of the target's own distribution refers to and counts beside its version.

    That is other code of it, and numbers that somebody may set; with each, whether it is code.
    """
    for key in reads.names:
        value = function.__globals__.get(key, MISSING)
        is_number = type(value) in _NUMBERS and not key.startswith("_")
        if is_number or isinstance(value, (types.FunctionType, type)):
            yield Name(key, function.__globals__, key, is_own=False), not is_number
