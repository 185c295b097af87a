"""Tensors, modules of torch and random number generators."""

from __future__ import annotations

from typing import Any

import torch

from torchcache.keys.digest import digest_parts
from torchcache.keys.encoders.objects import attributes
from torchcache.keys.encoding import Encoding
from torchcache.keys.generators import generator_state, is_global, is_seeded
from torchcache.keys.plain import type_name
from torchcache.keys.tensor_digest import encode_tensor
from torchcache.keys.tensor_kinds import notes_on


def module(encoding: Encoding, value: torch.nn.Module, path: str) -> bytes:
    """Encode a module as the observer refers to it, or else by its attributes."""
    referred = encoding.observer.refer(value, path)
    if referred is None:
        return attributes(encoding, value, path)
    return digest_parts([b"module", type_name(type(value)), referred])


def tensor(encoding: Encoding, value: torch.Tensor, path: str) -> bytes:
    """Encode a tensor as the observer refers to it, or else by its values and what somebody hung on it."""
    referred = None if encoding.is_content else encoding.observer.refer(value, path)
    if referred is not None:
        return digest_parts([b"tensor", type_name(type(value)), referred])
    content = encode_tensor(value)
    if content is None:
        return encoding.opaque(value, path)
    parts = [b"tensor", type_name(type(value)), content]
    notes = notes_on(value)
    if notes:
        parts.append(encoding.encode(notes, f"{path}.__dict__"))
    return digest_parts(parts)


def generator(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - one of ``GENERATORS``
    """Encode a random number generator.

    What it draws is seen by comparing its state before and after. Its state counts where somebody seeded it, as far
    as that shows, or where the code reads states: then two seeds may give two results without a draw.
    """
    encoding.observer.note_generator(value)
    name = type_name(type(value))
    if getattr(value, "__dict__", None):  # of a class derived from one of a library's
        name = digest_parts([name, attributes(encoding, value, path)])
    counts = encoding.observer.counts_generators or is_seeded(value)
    if not counts or is_global(value):
        return digest_parts([b"generator", name])
    return encoding.whole(name, value, [generator_state(value)], path)
