"""The result of a call that is one sample, as one row: tensors, arrays, images and plain values, by value.

What is a tensor here (a tensor, the bytes of an array or of an image) is a leaf of the layout, whole, and the last
leaf says of each value of the result, in order, what it is::

    nil, bool, int, float, str, bin   the plain value itself
    [0]                               a tensor: the next leaf
    [1, dtype, [size...]]             a NumPy array: the next leaf has its bytes
    [2, dtype, bin]                   a NumPy scalar
    [3, mode, [width, height], palette | nil, [key, value, ...]]    a PIL image: the next leaf has its bytes
    [4, bin]                          int beyond 64 bits, signed, big-endian
    [5, real, imaginary]              complex

The structure of the layout is what they hang in, empty for a lone value. So results that differ in their values only
share a layout, and plain values may be of any length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgpack
import numpy as np
import torch

from torchcache import outputs, structure
from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.keys.digest import digest_bytes
from torchcache.keys.plain import encode_plain
from torchcache.layout import Bytes2D, Found, Layout, Leaf, empty_rows
from torchcache.results import Results
from torchcache.structure import KnownClasses, Tree

(_TENSOR, _ARRAY, _SCALAR, _IMAGE, _LARGE_INT, _COMPLEX) = range(6)

#: Kinds of NumPy dtypes whose items are bytes: bool, numbers, dates, strings of one length.
_KINDS = frozenset("?biufcmMSU")

_AS_THEY_ARE = (bool, float, str, bytes)
_CPU = torch.device("cpu")

_REMEDY = (
    "return tensors, NumPy arrays, PIL images and plain values, in tuples, lists, dicts, named tuples, dataclasses or "
    "classes registered with torch.utils._pytree.register_pytree_node"
)

#: What an image's ``info`` keeps: what Pillow itself reads when it converts or saves, if it is plain.
_IMAGE_INFO = ("transparency", "gamma", "dpi", "icc_profile", "exif", "background", "duration", "loop")


class CallResults(Results):
    """Results of calls that are one sample each."""

    def flatten(self, output: object) -> Tree:
        return structure.flatten(output, _is_leaf, _REMEDY)

    def take_apart(
        self, tree: Tree, n: int, cache_dtype: torch.dtype | None, known: KnownClasses
    ) -> tuple[list[Found], int]:
        assert n == 1
        encoded = tree.encode()
        tensors: list[torch.Tensor] = []
        entries = [_entry(leaf, path, tensors) for leaf, path in zip(tree.leaves, tree.paths, strict=True)]
        packed = msgpack.packb(entries, use_bin_type=True, unicode_errors="surrogatepass")
        parts = [outputs.stored_form(tensor.detach().unsqueeze(0), cache_dtype) for tensor in tensors]
        layout = Layout((*(leaf for leaf, _, _ in parts), Leaf("uint8", "uint8", (len(packed),))), encoded)
        row = empty_rows(1, layout.nbytes)
        outputs.copy_leaves([(leaf, stored) for leaf, stored, _ in parts], row)
        row[0, layout.nbytes - len(packed) :] = np.frombuffer(packed, np.uint8)
        if encoded:
            known.learn_from(tree)
        return [Found([0], layout, row)], sum(overflowed for _, _, overflowed in parts)

    def devices(self, tree: Tree) -> tuple[torch.device, ...]:
        stored = [leaf for leaf in tree.leaves if _has_leaf(leaf)]
        return (*(leaf.device if isinstance(leaf, torch.Tensor) else _CPU for leaf in stored), _CPU)

    def rounded(self, tree: Tree, cache_dtype: torch.dtype | None) -> object:
        return tree.build(
            outputs.rounded_leaf(leaf, cache_dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in tree.leaves
        )

    def assemble(self, found: Sequence[Found], n: int, devices: Sequence[torch.device], known: KnownClasses) -> object:
        assert n == 1
        layout, data = found[0].layout, found[0].data
        values = list(_values(layout, data, devices))
        if not layout.structure:
            return values[0]
        node = known.decode(layout.structure, _stand_ins)
        if node is None or node.n_leaves != len(values):
            raise CorruptRecordError("the result is of classes this process does not know")
        try:
            return node.build(iter(values))
        except Exception as error:
            raise CorruptRecordError(f"a class of the result refuses to be rebuilt: {error!r}") from error

    def is_known(self, layout: Layout, known: KnownClasses) -> bool:
        if not outputs.has_known_dtypes(layout) or layout.leaves[-1].dtype != "uint8":
            return False
        if not layout.structure:
            return True
        node = known.decode(layout.structure, _stand_ins)
        return node is not None and known.is_certain(node)

    def plain_numbers(self, layout: Layout, known: KnownClasses) -> frozenset[int]:  # noqa: ARG002 - there is no batch
        return frozenset()

    def leaves(self, layout: Layout, data: Bytes2D, known: KnownClasses) -> list[torch.Tensor]:  # noqa: ARG002
        return [_comparable(value) for value in _values(layout, data, [_CPU] * len(layout.leaves))]


def _is_leaf(value: object) -> bool:
    # Of arrays and scalars just those that come back as they are: a class derived from them may hold more.
    return (
        isinstance(value, torch.Tensor)
        or type(value) in (np.ndarray, int, complex, *_AS_THEY_ARE)
        or (isinstance(value, np.generic) and encode_plain(value) is not None)
        or _is_image(value)
    )


def _has_leaf(value: object) -> bool:
    """Tell whether a value has a leaf of its own, beside what the last one says of it."""
    return isinstance(value, (torch.Tensor, np.ndarray)) or _is_image(value)


def _is_image(value: object) -> bool:
    pil = sys.modules.get("PIL.Image")  # who has an image has imported it
    return pil is not None and isinstance(value, pil.Image)


def _entry(value: Any, path: str, tensors: list[torch.Tensor]) -> object:  # noqa: ANN401 - any leaf
    """Return what the last leaf says of a value; what it has as bytes is added to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return [_TENSOR]
    if isinstance(value, (np.ndarray, np.generic)):
        return _array_entry(np.asarray(value), path, tensors, is_scalar=isinstance(value, np.generic))
    if type(value) is int and not -(2**63) <= value < 2**64:
        return [_LARGE_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)]
    if type(value) is complex:
        return [_COMPLEX, value.real, value.imag]
    if _is_image(value):
        return _image_entry(value, path, tensors)
    return value


def _array_entry(
    array: np.ndarray[Any, Any], path: str, tensors: list[torch.Tensor], *, is_scalar: bool
) -> list[object]:
    if array.dtype.kind not in _KINDS or array.dtype.metadata is not None:
        raise UncacheableError(
            f"the cached call returned an array of {array.dtype} at {path}, whose items are not plain numbers or "
            "strings of one length; return arrays of these, or lists of plain values"
        )
    if is_scalar:
        return [_SCALAR, array.dtype.str, array.tobytes()]
    tensors.append(_as_tensor(array.tobytes()))
    return [_ARRAY, array.dtype.str, list(array.shape)]


def _image_entry(image: Any, path: str, tensors: list[torch.Tensor]) -> list[object]:  # noqa: ANN401 - Pillow is no dependency
    tensors.append(_as_tensor(image.tobytes()))  # decodes it first, if that was not done
    palette = None
    if image.palette is not None:
        palette = [image.palette.mode, bytes(image.im.getpalette(image.palette.mode, image.palette.mode))]
    info: list[object] = []
    for key in _IMAGE_INFO:
        value = image.info.get(key)
        if type(value) in (int, *_AS_THEY_ARE):
            info += [key, value]
        elif isinstance(value, tuple) and all(type(item) in (int, float) for item in value):
            info += [key, list(value)]
    if image.mode not in sys.modules["PIL.Image"].MODES:
        raise UncacheableError(
            f"the cached call returned an image of mode {image.mode!r} at {path}; convert it to one of Pillow's modes"
        )
    return [_IMAGE, image.mode, list(image.size), palette, info]


def _as_tensor(data: bytes) -> torch.Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )


def _values(layout: Layout, data: Bytes2D | torch.Tensor, devices: Sequence[torch.device]) -> Iterator[object]:
    """Yield the values of a result.

    Raises:
        CorruptRecordError: If they are not as this module writes them.
    """
    start = layout.nbytes - layout.leaves[-1].nbytes
    last = data[0, start:]
    packed = (last if isinstance(last, np.ndarray) else last.cpu().numpy()).tobytes()
    tensors = zip(layout.leaves[:-1], devices, strict=False)
    end = 0

    def next_tensor(*, on_cpu: bool = False) -> torch.Tensor:
        nonlocal end
        leaf, device = next(tensors)
        begin, end = end, end + leaf.nbytes
        return outputs.put_leaf(leaf, outputs.columns(data, begin, end), _CPU if on_cpu else device)[0]

    try:
        entries = msgpack.unpackb(packed, raw=False, use_list=True, unicode_errors="surrogatepass", max_map_len=0)
        for entry in entries:
            yield _value(entry, next_tensor) if isinstance(entry, list) else entry
    except CorruptRecordError:
        raise
    except Exception as error:
        raise CorruptRecordError(f"the values of a result cannot be read: {error!r}") from error


def _value(entry: list[Any], next_tensor: Callable[..., torch.Tensor]) -> object:
    kind, *rest = entry
    if kind == _TENSOR:
        return next_tensor()
    if kind == _ARRAY:
        dtype, shape = rest
        return next_tensor(on_cpu=True).numpy().view(_dtype(dtype)).reshape(shape)
    if kind == _SCALAR:
        dtype, item = rest
        return np.frombuffer(item, _dtype(dtype), count=1)[0]
    if kind == _IMAGE:
        return _image(rest, next_tensor(on_cpu=True).numpy().tobytes())
    if kind == _LARGE_INT:
        return int.from_bytes(rest[0], "big", signed=True)
    if kind == _COMPLEX:
        return complex(*rest)
    raise CorruptRecordError("a result has a value of an unknown kind")


def _dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise CorruptRecordError("a result has an array of objects")
    return dtype


def _image(entry: list[Any], data: bytes) -> object:
    from PIL import Image  # noqa: PLC0415 - only those who cached images need it

    mode, size, palette, info = entry
    image = Image.frombytes(mode, tuple(size), data)
    if palette is not None:
        image.putpalette(palette[1], palette[0])
    values = zip(info[::2], info[1::2], strict=True)
    image.info = {key: tuple(value) if isinstance(value, list) else value for key, value in values}
    return image


def _stand_ins(n_leaves: int) -> list[object]:
    return [object() for _ in range(n_leaves)]


def _comparable(value: object) -> torch.Tensor:
    """Return a value as a tensor of one row: numbers as they are, what has no distance as its digest."""
    if isinstance(value, torch.Tensor):
        return value.unsqueeze(0)
    if isinstance(value, (np.ndarray, np.generic, bool, int, float, complex)):
        array = np.asarray(value)
        if array.dtype.kind in "biufc":
            return torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)).unsqueeze(0)
        value = array.tobytes()
    if _is_image(value):
        return torch.from_numpy(np.array(value)).unsqueeze(0)
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    assert isinstance(data, bytes)
    return torch.frombuffer(bytearray(digest_bytes(data)), dtype=torch.uint8).unsqueeze(0)
