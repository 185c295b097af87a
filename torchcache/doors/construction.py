"""The arguments that an instance of a decorated class was made with, as a part of its key."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchcache.keys.digest import digest_bytes, digest_named
from torchcache.keys.values import UnnamedValueError, encode_argument


@dataclass(frozen=True, slots=True)
class UnnamedArgument:
    """A construction argument that is known by its address only: what it was called, and its type."""

    path: str
    type_name: str


@dataclass(frozen=True, slots=True)
class NamedArguments:
    """A digest of all construction arguments, and name and digest of each."""

    digest: bytes
    parts: tuple[tuple[str, bytes], ...]


def name_arguments(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NamedArguments | UnnamedArgument:
    """Return a digest of the arguments that a class is called with, or the first that has no stable name.

    A default that is given counts as one that is left out.
    """
    encoded: dict[str, bytes] = {}
    try:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        bound = signature.bind(None, *args, **kwargs)
    except (TypeError, ValueError):
        # What the constructor does not take it will refuse; and some, written in C, have no signature.
        positional = [(f"args[{i}]", value) for i, value in enumerate(args)]
        named = [*positional, *kwargs.items()]
    else:
        named = [*bound.arguments.items()][1:]
        encoded = _defaults_of(signature)

    try:
        for name, value in named:
            encoded[name] = encode_argument(value, name)
    except UnnamedValueError as error:
        return UnnamedArgument(error.path, error.type_name)

    named_parts = sorted(encoded.items())
    return NamedArguments(digest_named(named_parts), tuple((name, digest_bytes(value)) for name, value in named_parts))


def _defaults_of(signature: inspect.Signature) -> dict[str, bytes]:
    """Return the defaults that have a stable name; one without is part of the code, and counts there."""
    encoded: dict[str, bytes] = {}
    for parameter in signature.parameters.values():
        if parameter.default is not parameter.empty:
            with contextlib.suppress(UnnamedValueError):
                encoded[parameter.name] = encode_argument(parameter.default, parameter.name)
    return encoded
