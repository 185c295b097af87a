"""What to pass in place of arguments that hold a batch in a form of another library."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence, ValuesView
from typing import Any

import numpy as np

from torchcache.keys.origins import module_of
from torchcache.results.values import is_image

#: Containers in an argument are searched to this depth.
_MAX_DEPTH = 8

#: Sequences that are one value, or are looked into.
_NO_BATCHES = (str, bytes, bytearray, memoryview, tuple)

#: Kinds of NumPy dtypes that torch has.
_NUMBERS = "biufc"


def advice_for(value: object, path: str) -> str | None:
    """Say what to pass in place of an argument that cannot be split into samples.

    Args:
        value: The argument.
        path: What to call it.

    Returns:
        A message for an error, about the first value in it that there is advice for, or None.
    """
    for where, part in _walk(value, path, 0):
        advice = _of_list(part) if isinstance(part, list) else _of_object(part)
        if advice is not None:
            what, remedy = advice
            return f"argument {where!r} is {what}; pass {remedy.format(where)}"
    return None


def _walk(value: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    """Yield a value and what its containers hold, by path."""
    yield path, value
    if depth == _MAX_DEPTH:
        return
    parts: list[tuple[str, object]] = []
    if isinstance(value, (dict, UserDict)):
        parts = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value):
        parts = [(f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items()]
    for where, part in parts:
        yield from _walk(part, where, depth + 1)


def _of_list(value: list[Any]) -> tuple[str, str] | None:
    if type(value) is not list:
        return f"a {type(value).__qualname__}", "list({0})"
    for what, remedy, is_one in _LISTS:
        if value and all(map(is_one, value)):
            return what, remedy
    return None


def _of_object(value: object) -> tuple[str, str] | None:
    if isinstance(value, np.ndarray):
        return "a NumPy array", _instead_of_array(value)
    if isinstance(value, np.generic):
        return "a NumPy scalar in a container", "{0}.item()"
    for base in type(value).__mro__:
        name = module_of(base).partition(".")[0], base.__name__
        if name in _COLUMNS:
            dtype = getattr(value, "dtype", None)
            is_numeric = isinstance(dtype, np.dtype) and dtype.kind in _NUMBERS
            return f"a {base.__name__} of {name[0]}", "torch.tensor({0}.to_numpy())" if is_numeric else "{0}.to_list()"
        if name in _OTHERS:
            return f"a {base.__name__} of {name[0]}", _OTHERS[name]
    package = module_of(type(value)).partition(".")[0]
    if hasattr(type(value), "__dlpack__") and package != "torch":
        return f"an array of {package}", "torch.from_dlpack({0})"
    if isinstance(value, (Sequence, ValuesView, Iterator)) and not isinstance(value, _NO_BATCHES):
        return f"a {type(value).__qualname__}", "list({0})"
    return None


def _instead_of_array(array: np.ndarray[Any, Any]) -> str:
    if not array.ndim:
        return "{0}.item()"
    return "torch.from_numpy({0})" if array.dtype.kind in _NUMBERS else "{0}.tolist()"


#: Lists by what their items are: what to call them, and what to pass.
_LISTS: tuple[tuple[str, str, Callable[[object], bool]], ...] = (
    ("a list of NumPy strings", "list(map(str, {0}))", lambda item: isinstance(item, np.str_)),
    ("a list of NumPy scalars", "[item.item() for item in {0}]", lambda item: isinstance(item, np.generic)),
    ("a list of NumPy arrays", "torch.from_numpy(np.stack({0}))", lambda item: isinstance(item, np.ndarray)),
    (
        "a list of PIL images",
        "torch.from_numpy(np.stack({0})), or one image per call with batch_dim=None",
        is_image,
    ),
    (
        "a list of lists",
        (
            "torch.tensor({0}), list(map(tuple, {0})) if each inner list is one sample, or tuple(map(tuple, {0})) if "
            "all samples share them"
        ),
        lambda item: isinstance(item, list),
    ),
)

#: Classes with one column of a table, by package and name: a tensor if it holds numbers, else a list.
_COLUMNS = {("pandas", "Series"), ("pandas", "Index"), ("polars", "Series")}

#: Other classes by package and name, and what to pass.
_OTHERS = {
    ("pandas", "DataFrame"): "torch.tensor({0}.to_numpy())",
    ("PIL", "Image"): "torch.from_numpy(np.array({0})), or set batch_dim=None so that the call is one sample",
    ("pyarrow", "Array"): "{0}.to_pylist()",
    ("pyarrow", "ChunkedArray"): "{0}.to_pylist()",
}
