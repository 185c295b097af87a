"""Where a value comes from, as far as the instructions of code tell it. This module does not import torch."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple


class Operand(NamedTuple):
    """Where a value comes from; a tuple, because walks hash thousands of them.

    Attributes:
        kind: "global" for a global or builtin, "variable" for any other, "module" for what an import returns,
            "result" for what a call returns, "constant", "start" for a text of which the front is known, or "unknown".
        root: The global, the variable, the module (with dots in front if it is relative), the call's number, the
            front of a text, or the constant as it is written, if it is None, an int or a text.
        keys: The attributes that are read of it, of that, and so on; of a constant, the names in it.
    """

    kind: str
    root: str = ""
    keys: tuple[str, ...] = ()


#: What a value may be: which one it is depends on how the code ran.
Operands = tuple[Operand, ...]

NONE: Operands = (Operand("constant", "None"),)
UNKNOWN: Operands = (Operand("unknown"),)

#: More possibilities for one value are taken for an unknown one.
_MOST_POSSIBILITIES = 16


def text_of(operand: Operand) -> str | None:
    """Return the text that an operand is, or None."""
    is_text = operand.kind == "constant" and operand.root[:1] in ("'", '"')
    return str(ast.literal_eval(operand.root)) if is_text else None


def either(*possible: Iterable[Operand]) -> Operands:
    """Return what a value may be that comes from any of several places."""
    together = tuple(dict.fromkeys(chain(*possible)))
    return together if len(together) <= _MOST_POSSIBILITIES else UNKNOWN


def attribute_of(owners: Operands, key: str) -> Operands:
    """Return what an attribute of a value may be."""
    return tuple([Operand(owner.kind, owner.root, (*owner.keys, key)) for owner in owners])


def constant_of(value: object) -> Operands:
    """Return the operand of a constant in code."""
    is_told = value is None or type(value) in (int, str)
    return (Operand("constant", repr(value) if is_told else "", names_in(value)),)


def names_in(value: object) -> tuple[str, ...]:
    """Return the names in a constant, which may be those of a call's keywords."""
    return value if isinstance(value, tuple) and all(type(item) is str for item in value) else ()


def start_of(operands: Operands) -> Operands:
    """Return what is known of a text that starts with a value."""
    starts = []
    for operand in operands:
        text = operand.root if operand.kind == "start" else text_of(operand)
        starts.append(Operand("start", text) if text else UNKNOWN[0])
    return tuple(starts)


def imported(module: str, level: Operands, wanted: Operands) -> Operands:
    """Return the module that an import returns: the outermost one where nothing is wanted from it."""
    if wanted == NONE:
        return (Operand("module", module.partition(".")[0]),)
    dots = level[0].root
    return (Operand("module", "." * (int(dots) if dots.isdecimal() else 0) + module),)
