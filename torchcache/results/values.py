"""The values of a whole call's result, each as an entry of the row's last leaf.

An entry is::

    nil, bool, int, float, str, bin   the plain value itself
    [0]                               a tensor: the next leaf
    [1, dtype, [size...], false]      a NumPy array: the next leaf has its bytes; without false it can be written
    [2, dtype, bin]                   a NumPy scalar
    [3, mode, [width, height], palette | nil, [key, value, ...]]    a PIL image: the next leaf has its bytes
    [4, bin]                          int beyond 64 bits, signed, big-endian
    [5, real, imaginary]              complex
    [6, structure, [size...], is writable]    a structured NumPy array: the next leaf has its bytes
    [7, structure, bin]               an item of one
    [8, class, text]                  a path of pathlib
    [9, year, month, day]             date
    [10, year, month, day, hour, minute, second, microsecond, fold, zone]    datetime
    [11, hour, minute, second, microsecond, fold, zone]    time
    [12, days, seconds, microseconds] timedelta
    [13, days, seconds, microseconds, name?]    timezone
    [14, name]                        ZoneInfo
    [15, text]                        Decimal
    [16, bin, safe]                   UUID
    [17, numerator, denominator]      Fraction
    [18, start, stop, step]           range
    [19, start, stop, step]           slice
    [20, item...], [21, item...]      set, frozenset
    [22, item...]                     a tuple in one of these
    [23, bin]                         bytearray

A structure is ``[[name...], [[dtype | structure, [size...]]...], [offset...], itemsize, is aligned, [title | nil...] |
nil]``. What lies in another entry, such as a zone or an item, is an entry without a leaf.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.results.dtypes import check_dtype, dtype_of, pack_structure, unpack_structure
from torchcache.results.leaves import CPU
from torchcache.results.plain_values import BY_TAG, BY_TYPE, BareValue, kind_by_type
from torchcache.results.tensor_classes import is_kept_whole
from torchcache.results.value_kinds import PlainValue, comparable_array

#: Returns the next leaf: on the device where the result has it, or on the one given.
NextTensor = Callable[..., torch.Tensor]

#: What an image's ``info`` keeps: what Pillow itself reads when it converts or saves, if it is plain.
_IMAGE_INFO = ("transparency", "gamma", "dpi", "icc_profile", "exif", "background", "duration", "loop")

_PLAIN = (int, bool, float, str, bytes)


class TensorValue(PlainValue):
    """A tensor."""

    tag = 0
    has_leaf = True

    @classmethod
    def take_apart(cls, value: Any, path: str) -> tuple[object, torch.Tensor | None]:  # noqa: ANN401, ARG003
        return [cls.tag], value

    @classmethod
    def put_together(cls, rest: list[Any], next_tensor: NextTensor) -> object:  # noqa: ARG003
        return next_tensor()

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401 - a tensor
        row: torch.Tensor = value.unsqueeze(0)
        return row


class ArrayValue(PlainValue):
    """A NumPy array of the very class: one derived from it may hold more."""

    tag = 1
    has_leaf = True

    @classmethod
    def take_apart(cls, value: Any, path: str) -> tuple[object, torch.Tensor | None]:  # noqa: ANN401 - an array
        check_dtype(value.dtype, path)
        entry: list[object] = [cls.tag, value.dtype.str, list(value.shape)]
        if not value.flags.writeable:
            entry.append(False)
        return entry, _as_tensor(value.tobytes())

    @classmethod
    def put_together(cls, rest: list[Any], next_tensor: NextTensor) -> object:
        dtype, shape, *flags = rest
        array = next_tensor(CPU).numpy().view(dtype_of(dtype)).reshape(shape)
        if flags == [False]:
            array.flags.writeable = False
        return array

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401 - an array
        return comparable_array(value)


class StructuredArrayValue(PlainValue):
    """A NumPy array whose items have fields."""

    tag = 6
    has_leaf = True

    @classmethod
    def take_apart(cls, value: Any, path: str) -> tuple[object, torch.Tensor | None]:  # noqa: ANN401 - an array
        packed = pack_structure(value.dtype, path)
        return [cls.tag, packed, list(value.shape), value.flags.writeable], _as_tensor(value.tobytes())

    @classmethod
    def put_together(cls, rest: list[Any], next_tensor: NextTensor) -> object:
        dtype, shape, is_writable = rest
        array = next_tensor(CPU).numpy().view(unpack_structure(dtype)).reshape(shape)
        array.flags.writeable = bool(is_writable)
        return array

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401 - an array
        return comparable_array(value)


class ImageValue(PlainValue):
    """A PIL image."""

    tag = 3
    has_leaf = True

    @classmethod
    def take_apart(cls, value: Any, path: str) -> tuple[object, torch.Tensor | None]:  # noqa: ANN401 - an image
        pixels = _as_tensor(value.tobytes())  # decodes it first, if that was not done
        palette = None
        if value.palette is not None:
            mode = value.palette.mode
            palette = [mode, bytes(value.im.getpalette(mode, mode))]
        if value.mode not in sys.modules["PIL.Image"].MODES:
            raise UncacheableError(
                f"the cached call returned an image of mode {value.mode!r} at {path}; convert it to one of Pillow's "
                "modes"
            )
        return [cls.tag, value.mode, list(value.size), palette, _plain_info(value.info)], pixels

    @classmethod
    def put_together(cls, rest: list[Any], next_tensor: NextTensor) -> object:
        from PIL import Image  # noqa: PLC0415 - only those who cached images need it

        mode, size, palette, info = rest
        image = Image.frombytes(mode, tuple(size), next_tensor(CPU).numpy().tobytes())
        if palette is not None:
            image.putpalette(palette[1], palette[0])
        image.info = {}
        for key, value in zip(info[::2], info[1::2], strict=True):
            image.info[key] = tuple(value) if isinstance(value, list) else value
        return image

    @classmethod
    def comparable(cls, value: Any) -> torch.Tensor:  # noqa: ANN401 - an image
        return torch.from_numpy(np.array(value)).unsqueeze(0)


_WITH_LEAF = (TensorValue, ArrayValue, StructuredArrayValue, ImageValue)

#: The entry of a tensor.
TENSOR_ENTRY: list[object] = [TensorValue.tag]

_BY_TAG = {**BY_TAG, **{kind.tag: kind for kind in _WITH_LEAF}}


def is_image(value: object) -> bool:
    """Tell whether a value is a PIL image."""
    pil = sys.modules.get("PIL.Image")  # who has an image has imported it
    return pil is not None and isinstance(value, pil.Image)


def is_value(value: object) -> bool:
    """Tell whether a value is of one of the kinds that have entries, and so a leaf of the tree."""
    kind = _find_kind(value)
    # None and tuples are nodes of the tree, and have entries only inside of others.
    return kind is not None and value is not None and type(value) is not tuple


def kind_of(value: object) -> type[PlainValue]:
    """Return the kind of a value that has an entry; plain ones for what the walk left as it is."""
    return _find_kind(value) or BareValue


def value_of(entry: object, next_tensor: NextTensor) -> object:
    """Return the value of an entry.

    Raises:
        CorruptRecordError: If there is no such kind of values.
        Exception: Of any other kind, if nobody wrote such an entry.
    """
    if not isinstance(entry, list):
        return entry
    tag, *rest = entry
    kind = _BY_TAG.get(tag)
    if kind is None:
        raise CorruptRecordError("a result has a value of an unknown kind")
    return kind.put_together(rest, next_tensor)


def _find_kind(value: object) -> type[PlainValue] | None:
    """Return the kind of a value; None if it has no entry."""
    kind = BY_TYPE.get(type(value))
    if kind is not None:
        return kind
    if isinstance(value, torch.Tensor):
        return None if is_kept_whole(value) else TensorValue
    if type(value) is np.ndarray:  # one derived from it may hold more
        if value.dtype.names is not None:
            return StructuredArrayValue
        return None if value.dtype == np.dtype(object) else ArrayValue
    return ImageValue if is_image(value) else kind_by_type(value)


def _plain_info(info: dict[Any, Any]) -> list[object]:
    """Return what of an image's ``info`` is kept: key, value, key, value, ..."""
    kept: list[object] = []
    for key in _IMAGE_INFO:
        value = info.get(key)
        if type(value) in _PLAIN:
            kept += [key, value]
        elif isinstance(value, tuple) and all(type(item) in (int, float) for item in value):
            kept += [key, list(value)]
    return kept


def _as_tensor(data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
