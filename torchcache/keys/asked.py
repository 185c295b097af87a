"""What code can ask of functions and classes beside what they do: their names, and their annotations.

These count only where code asks for them: a function does the same under another name. This module does not import
torch.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator

from torchcache.keys.calls import uses_of
from torchcache.keys.operands import Operand
from torchcache.keys.reads import reads_of

_NAMES = frozenset({"__name__", "__qualname__"})
_ANNOTATIONS = frozenset({"__annotations__", "annotation", "get_annotations", "get_type_hints"})
_FIELDS_OF_DATACLASS = frozenset({"fields", "type"})


def parts_asked_for(
    functions: Iterable[tuple[str, types.FunctionType]], classes: Iterable[type]
) -> Iterator[tuple[str, list[str]]]:
    """Yield what code asks for of functions and classes, if it asks at all.

    Args:
        functions: The functions that were visited, with what to call them.
        classes: The classes of the user's own that were visited.

    Yields:
        What it is called, and the words.
    """
    functions = list(functions)
    codes = [function.__code__ for _, function in functions]
    if any(map(_asks_for_names, codes)):
        for label, function in functions:
            yield f"name of {label}", [function.__name__, function.__qualname__]
    if any(map(_asks_for_annotations, codes)):
        for label, function in functions:
            yield f"annotations of {label}", _words_of(function)
        for cls in classes:
            yield f"annotations of {cls.__name__}", _words_of(cls)


def _asks_for_names(code: types.CodeType) -> bool:
    """Tell whether code reads the name of what may be a function; the names of classes count anyway."""
    if _NAMES.isdisjoint(reads_of(code).attributes):
        return False
    uses = uses_of(code)
    for operand in uses.read:
        if not operand.keys or operand.keys[-1] not in _NAMES:
            continue
        is_of_class = operand.keys[-2:-1] == ("__class__",)
        if operand.kind == "result" and len(operand.keys) == 1:
            is_of_class = uses.calls[int(operand.root)].callee == (Operand("global", "type"),)
        if not is_of_class:
            return True
    return False


def _asks_for_annotations(code: types.CodeType) -> bool:
    reads = reads_of(code)
    names = {*reads.names, *reads.attributes}
    return not names.isdisjoint(_ANNOTATIONS) or names >= _FIELDS_OF_DATACLASS


def _words_of(owner: types.FunctionType | type) -> list[str]:
    """Return the annotations of a function or class in words that are the same in each process."""
    try:
        annotations = vars(owner).get("__annotations__") if isinstance(owner, type) else owner.__annotations__
    except Exception:  # noqa: BLE001 - from Python 3.14 on, to ask for them runs the user's code
        return ["unknown"]
    words: list[str] = []
    if not isinstance(annotations, dict):
        return words
    for key, value in annotations.items():
        shown = value.__qualname__ if isinstance(value, type) else str(value)
        words += [key, shown.partition(" at 0x")[0]]
    return words
