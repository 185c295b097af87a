"""NumPy dtypes as plain data, and back: numbers, strings of one length, dates, and structures of these."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchcache.errors import CorruptRecordError, UncacheableError

#: Kinds of NumPy dtypes whose items are bytes: bool, numbers, dates, strings of one length.
_DTYPE_KINDS = frozenset("?biufcmMSU")

#: A structure in a structure is kept to this depth.
_MAX_DEPTH = 8


def check_dtype(dtype: np.dtype[Any], path: str) -> None:
    """Raise unless the items of a dtype are bytes, and no structure.

    Raises:
        UncacheableError: If they are not; ``path`` says where it is.
    """
    if dtype.kind not in _DTYPE_KINDS or dtype.metadata is not None:
        raise UncacheableError(
            f"the cached call returned an array of {dtype} at {path}, whose items are not plain numbers, strings of "
            "one length or structures of these; return arrays of these, or lists of plain values"
        )


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the dtype that ``check_dtype`` has nothing against, by its ``str``.

    Raises:
        CorruptRecordError: If its items are objects.
        Exception: Of any other kind, if there is no such dtype.
    """
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise CorruptRecordError("a result has an array of objects")
    return dtype


def pack_structure(dtype: np.dtype[Any], path: str) -> list[object]:
    """Return a structured dtype as plain data.

    Raises:
        UncacheableError: If ``unpack_structure`` would not make the very dtype of it; ``path`` says where it is.
    """
    try:
        packed = _pack(dtype, 0)
        if packed is not None and _are_same(unpack_structure(packed), dtype):
            return packed
    except (TypeError, ValueError, CorruptRecordError):
        pass
    raise UncacheableError(
        f"the cached call returned a structured array of {dtype} at {path}, whose fields hold objects, or have titles "
        "or metadata; return one array per field, or lists of plain values"
    )


def unpack_structure(packed: object, depth: int = 0) -> np.dtype[Any]:
    """Return the structured dtype of plain data.

    Raises:
        Exception: Of any kind, if ``pack_structure`` gave no such data.
    """
    if not isinstance(packed, list) or depth > _MAX_DEPTH:
        raise CorruptRecordError("a result has an array of an unknown dtype")
    names, fields, offsets, itemsize, is_aligned, titles = packed
    formats: list[Any] = []
    for base, shape in fields:
        dtype = dtype_of(base) if isinstance(base, str) else unpack_structure(base, depth + 1)
        formats.append((dtype, tuple(shape)) if shape else dtype)
    spec: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize}
    if titles is not None:
        spec["titles"] = titles
    made: np.dtype[Any] = np.dtype(spec, align=bool(is_aligned))
    if made.hasobject:
        raise CorruptRecordError("a result has an array of objects")
    return made


def _pack(dtype: np.dtype[Any], depth: int) -> list[object] | None:
    """Return a structured dtype as plain data; None if it is not made of the kinds we keep."""
    if dtype.names is None or dtype.fields is None or dtype.type is not np.void or depth > _MAX_DEPTH:
        return None
    fields: list[object] = []
    offsets: list[int] = []
    titles: list[str | None] = []
    for name in dtype.names:
        field = dtype.fields[name]
        title: Any = field[2] if len(field) > 2 else None
        if title is not None and type(title) is not str:
            return None
        titles.append(title)
        offsets.append(field[1])
        base, shape = field[0].subdtype or (field[0], ())
        packed: object = base.str
        if base.names is not None:
            packed = _pack(base, depth + 1)
        elif base.kind not in _DTYPE_KINDS:
            packed = None
        if packed is None:
            return None
        fields.append([packed, list(shape)])
    any_titles = titles if any(titles) else None
    return [list(dtype.names), fields, offsets, dtype.itemsize, dtype.isalignedstruct, any_titles]


def _are_same(made: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    return made == dtype and repr(made) == repr(dtype) and not _has_metadata(dtype)


def _has_metadata(dtype: np.dtype[Any]) -> bool:
    if dtype.metadata is not None:
        return True
    if dtype.subdtype is not None:
        return _has_metadata(dtype.subdtype[0])
    return any(_has_metadata(field[0]) for field in (dtype.fields or {}).values())
