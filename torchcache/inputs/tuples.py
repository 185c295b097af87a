"""Tuples of plain values: all samples share them, though they may look like one value per sample."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

#: The plain arguments of a call that are tuples, by name, each with its place in args or kwargs.
Tuples = dict[str, tuple["int | str", tuple[Any, ...]]]


def is_text(value: object) -> bool:
    """Tell whether a value is a str or a tuple of str."""
    if type(value) is str:
        return True
    return type(value) is tuple and bool(value) and all(type(part) is str for part in value)


def name_of_texts(tuples: Tuples) -> str | None:
    """Return the name of the only tuple whose items are str or tuples of str; None if there are none or several."""
    names: list[str] = []
    for name, (_, value) in tuples.items():
        if type(value) is tuple and value and all(map(is_text, value)):
            names.append(name)
    return names[0] if len(names) == 1 else None


def plain_sequences(path: str, value: object) -> Iterator[tuple[str, Sequence[object]]]:
    """Yield the tuples in a plain value by path, without named ones: each may hold one value per sample."""
    if not isinstance(value, tuple) or isinstance(value, torch.Size):
        return
    if not hasattr(value, "_fields") and not hasattr(value, "n_sequence_fields"):
        yield path, value
    for i, item in enumerate(value):
        yield from plain_sequences(f"{path}[{i}]", item)


def describe_ambiguity(tuples: Tuples, sequences: Iterable[tuple[str, Sequence[object]]], n: int) -> str:
    """Say what to pass in place of the outermost tuple of plain values that is as long as the batch.

    Args:
        tuples: The plain arguments that are tuples.
        sequences: The tuples and lists in other arguments, by path.
        n: Number of samples.

    Returns:
        What to log; "" if there is no such tuple.
    """
    found: list[tuple[str, Sequence[object], bool]] = []
    for name, (_, value) in tuples.items():
        can_be_named = name.isidentifier()
        found += [(path, items, can_be_named) for path, items in plain_sequences(name, value)]
    found += [(path, items, False) for path, items in sequences]
    found = [entry for entry in found if len(entry[1]) == n > 0]
    if not found:
        return ""

    path, items, can_be_named = min(found, key=lambda entry: len(entry[0]))
    own = f"list({path})" if isinstance(items, tuple) else f"a list of plain values as {path}"
    name = argument_of(path)
    shared = f'set unbatched=("{name}",)' if can_be_named else "make it an argument that unbatched names"
    return f"{path!r} is as long as the batch: pass {own} if each sample has its own, or {shared} if all share it"


def argument_of(path: str) -> str:
    """Return the argument that a path such as ``batch['input_ids'][0]`` leads into."""
    return re.split(r"[\[.]", path)[0]
