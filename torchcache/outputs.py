"""Results taken apart into rows of bytes, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from torchcache import structure
from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.layout import (
    CHANNELS_LAST,
    CHANNELS_LAST_3D,
    CONTIGUOUS,
    DTYPE_SIZES,
    MAX_LEAVES,
    Bytes2D,
    Layout,
    Leaf,
    empty_rows,
)
from torchcache.structure import KnownClasses, TooLargeError, Tree
from torchcache.tensors import AS_INTEGER, DTYPE_NAMES, NUMPY_DTYPES, to_numpy, unsupported_kind

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

#: Memory formats other than contiguous: dimensions of the batch, torch's name, order of the bytes.
_FORMATS = {
    CHANNELS_LAST: (4, torch.channels_last, (0, 2, 3, 1), (0, 3, 1, 2)),
    CHANNELS_LAST_3D: (5, torch.channels_last_3d, (0, 2, 3, 4, 1), (0, 4, 1, 2, 3)),
}


def flatten(output: object) -> Tree:
    """Find the tensors of what a module returned; never raises for what it contains."""
    return structure.flatten(output, _is_tensor)


def take_apart(tree: Tree, n: int, cache_dtype: torch.dtype | None, known: KnownClasses) -> tuple[Layout, Bytes2D, int]:
    """Copy a module's result into rows of bytes that belong to the cache.

    Args:
        tree: What the module returned for ``n`` samples; ``unsupported_leaf`` and ``check_leaves`` have nothing
            against it.
        n: Number of samples.
        cache_dtype: Store floating values in it.
        known: Learns the classes of the result.

    Returns:
        The layout of one row, the rows ``(n, layout.nbytes)``, and how many finite values the cast made
        infinite.

    Raises:
        UncacheableError: If the result is not made of tensors with the batch in front and plain values.
    """
    encoded = tree.encode()
    stored = [stored_form(tensor, cache_dtype) for tensor in tree.leaves]
    layout = Layout(tuple([leaf for leaf, _, _ in stored]), encoded)
    rows = empty_rows(n, layout.nbytes)
    copy_leaves([(leaf, tensor) for leaf, tensor, _ in stored], rows)
    if encoded:
        known.learn_from(tree)
    return layout, rows, sum([overflowed for _, _, overflowed in stored])


def copy_leaves(stored: Iterable[tuple[Leaf, torch.Tensor]], rows: Bytes2D) -> None:
    """Copy leaves in their stored form into rows of bytes, one after the other."""
    end = 0
    for leaf, tensor in stored:
        start, end = end, end + leaf.nbytes
        if len(rows) and leaf.nbytes:
            array = to_numpy(tensor)
            # A view: splitting the last dimension never copies.
            np.copyto(rows[:, start:end].view(array.dtype).reshape(array.shape), array)


def put_together(
    layout: Layout, data: Bytes2D | torch.Tensor, devices: Sequence[torch.device], known: KnownClasses
) -> object:
    """Make a module's result from rows of bytes, without copying a lone tensor where the device is the CPU.

    No two leaves share memory.

    Args:
        layout: The layout of one row, as ``take_apart`` gave it or ``is_known``.
        data: Shape ``(n, layout.nbytes)``, contiguous; belongs to the result from now on.
        devices: Where each leaf goes.
        known: What classes the result may have.

    Raises:
        CorruptRecordError: If the result cannot be rebuilt after all.
    """
    if not layout.structure:
        return put_leaf(layout.leaves[0], data, devices[0])
    node = known.decode(layout.structure, lambda _: stand_ins(layout))
    if node is None:
        raise CorruptRecordError("the result is of classes this process does not know")
    leaves = []
    end = 0
    for leaf, device in zip(layout.leaves, devices, strict=True):
        start, end = end, end + leaf.nbytes
        part = data if leaf.nbytes == layout.nbytes else columns(data, start, end)
        leaves.append(put_leaf(leaf, part, device))
    try:
        return node.build(iter(leaves))
    except Exception as error:
        raise CorruptRecordError(f"a class of the result refuses to be rebuilt: {error!r}") from error


def rounded(tree: Tree, cache_dtype: torch.dtype | None) -> object:
    """Return what a later hit will return: the result rounded through ``cache_dtype``, detached.

    Its containers are new: the module's own are not changed.
    """
    return tree.build(rounded_leaf(leaf, cache_dtype) for leaf in tree.leaves)


def detached(output: object) -> object:
    """Return a result with its tensors detached; what cannot be taken apart stays as it is."""
    return rounded(flatten(output), None)


def unsupported_leaf(tree: Tree) -> str | None:
    """Name the first kind of tensor in a result that would not come back as it is, or return None."""
    return next(filter(None, map(_unsupported_result, filter(_is_tensor, tree.leaves))), None)


def _unsupported_result(tensor: torch.Tensor) -> str | None:
    if type(tensor) is torch.nn.Parameter:
        return "parameter_as_result"
    notes = getattr(tensor, "__dict__", None) or ()
    if any(not name.startswith("_dynamo_") for name in notes):
        return "attributes_of_result"
    return unsupported_kind(tensor)


def devices_of(tree: Tree) -> tuple[torch.device, ...]:
    """Return the device of each leaf, in the order in which ``put_together`` wants them."""
    return tuple([leaf.device for leaf in tree.leaves])


def has_known_dtypes(layout: Layout) -> bool:
    """Tell whether this torch has the dtypes of all leaves."""
    return all(leaf.dtype in _DTYPES and leaf.output_dtype in _DTYPES for leaf in layout.leaves)


def is_known(layout: Layout, known: KnownClasses) -> bool:
    """Tell whether this process can rebuild a layout that came from a store: its dtypes, tree and classes."""
    if not has_known_dtypes(layout):
        return False
    if not layout.structure:
        return len(layout.leaves) == 1
    node = known.decode(layout.structure, lambda _: stand_ins(layout))
    # Counted here too: what is remembered was tried with the leaves of another layout.
    return node is not None and node.n_leaves == len(layout.leaves) and known.is_certain(node)


def are_alike(one: Layout, other: Layout) -> bool:
    """Tell whether rows of two layouts go into one result: they may differ in their memory formats."""
    return one == other or (one.structure == other.structure and _formless(one) == _formless(other))


def _formless(layout: Layout) -> list[Leaf]:
    return [replace(leaf, memory_format=CONTIGUOUS) for leaf in layout.leaves]


def reform(layout: Layout, data: Bytes2D | torch.Tensor, wanted: Layout) -> Bytes2D:
    """Return rows in the memory formats of a layout that is alike."""
    rows: Bytes2D = data if isinstance(data, np.ndarray) else data.cpu().numpy()
    if layout == wanted:
        return rows
    parts, end = [], 0
    for leaf, target in zip(layout.leaves, wanted.leaves, strict=True):
        start, end = end, end + leaf.nbytes
        part = np.ascontiguousarray(rows[:, start:end])
        if leaf.memory_format != target.memory_format and part.size:
            part = _in_format(part, leaf, target.memory_format)
        parts.append(part)
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def _in_format(part: Bytes2D, leaf: Leaf, memory_format: int) -> Bytes2D:
    """Return a leaf's rows with their bytes in the order of another memory format."""
    shape = (len(part), *leaf.shape)
    size = DTYPE_SIZES[leaf.dtype]
    _, _, order, back = _FORMATS.get(leaf.memory_format, (0, None, (), ()))
    stored = part.reshape(*(shape[i] for i in order), size) if order else part.reshape(*shape, size)
    plain = stored.transpose(*back, len(shape)) if back else stored
    _, _, wanted, _ = _FORMATS.get(memory_format, (0, None, (), ()))
    turned = plain.transpose(*wanted, len(shape)) if wanted else plain
    return np.ascontiguousarray(turned).reshape(len(part), -1)


def plain_numbers(layout: Layout, known: KnownClasses) -> frozenset[int]:
    """Return the ints among the plain values of a known layout: one may be the batch's size."""
    if not layout.structure:
        return frozenset()
    node = known.decode(layout.structure, lambda _: stand_ins(layout))
    return frozenset() if node is None else frozenset(node.numbers())


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def check_leaves(tree: Tree, n: int, batch_dim: int = 0) -> None:
    """Raise unless a tree can be kept, and has leaves, not too many, each with ``n`` rows along ``batch_dim``."""
    if tree.problem is not None:
        raise tree.problem
    if not tree.leaves:
        raise UncacheableError(
            f"the cached call returned {type(tree.build(())).__qualname__}, not a tensor nor anything with a tensor in "
            "it; return tensors with the batch in front, or set batch_dim=None to cache each call as one sample, "
            "whatever it returns"
        )
    if len(tree.leaves) > MAX_LEAVES:
        raise TooLargeError(
            f"the cached call returned {len(tree.leaves)} tensors, and at most {MAX_LEAVES} can be kept; stack "
            "those of one shape along a dimension behind the batch"
        )
    for tensor, path in zip(tree.leaves, tree.paths, strict=True):
        if tensor.dim() <= batch_dim or tensor.shape[batch_dim] != n:
            at, what = ("", "the result") if path == "output" else (f" at {path}", "every tensor in the result")
            raise UncacheableError(
                f"the cached call returned shape {tuple(tensor.shape)}{at} for a batch of {n}; dimension {batch_dim} "
                f"of {what} must be the batch, one row a sample"
            )


def stored_form(tensor: torch.Tensor, cache_dtype: torch.dtype | None) -> tuple[Leaf, torch.Tensor, int]:
    """Return how a leaf is stored, the tensor with its bytes in that order, and how many values overflowed."""
    cast, overflowed = _cast(tensor.detach(), cache_dtype)
    memory_format = CONTIGUOUS
    if not cast.is_contiguous():
        for code, (dims, torch_format, order, _) in _FORMATS.items():
            if cast.dim() == dims and cast.is_contiguous(memory_format=torch_format):
                memory_format, cast = code, cast.permute(order)
    leaf = Leaf(DTYPE_NAMES[cast.dtype], DTYPE_NAMES[tensor.dtype], tuple(tensor.shape[1:]), memory_format)
    return leaf, cast, overflowed


def _cast(tensor: torch.Tensor, cache_dtype: torch.dtype | None) -> tuple[torch.Tensor, int]:
    if cache_dtype is None or not tensor.is_floating_point() or tensor.dtype == cache_dtype:
        return tensor, 0
    cast = tensor.to(cache_dtype)
    # Compared as float32 or wider: float8 has no isfinite.
    wide = torch.promote_types(torch.float32, tensor.dtype) if tensor.itemsize > 1 else torch.float32
    lost = ~torch.isfinite(cast.to(wide)) & torch.isfinite(tensor.to(wide))
    return cast, int(lost.sum())


def rounded_leaf(tensor: torch.Tensor, cache_dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor rounded through ``cache_dtype``, detached."""
    plain = tensor.detach()
    if cache_dtype is None or not plain.is_floating_point() or plain.dtype == cache_dtype:
        return plain
    return plain.to(cache_dtype).to(plain.dtype)


def columns(data: Bytes2D | torch.Tensor, start: int, end: int) -> Bytes2D | torch.Tensor:
    """Copy some bytes of each row: a leaf that lay between others could not be viewed as its dtype."""
    if isinstance(data, torch.Tensor):
        return data[:, start:end].clone(memory_format=torch.contiguous_format)
    part = empty_rows(data.shape[0], end - start)
    np.copyto(part, data[:, start:end])
    return part


def put_leaf(leaf: Leaf, data: Bytes2D | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a leaf's tensor of its bytes in each row, without a copy where the device is the CPU."""
    n = data.shape[0]
    _, _, order, back = _FORMATS.get(leaf.memory_format, (0, None, (), ()))
    shape = (n, *leaf.shape)
    stored_shape = tuple(shape[i] for i in order) if order else shape
    dtype = _DTYPES[leaf.dtype]
    if n and leaf.nbytes:
        if isinstance(data, np.ndarray):  # whose views cost less
            integer = AS_INTEGER.get(dtype)
            tensor = torch.from_numpy(data.view(NUMPY_DTYPES[integer or dtype]).reshape(stored_shape))
            tensor = tensor if integer is None else tensor.view(dtype)
        else:
            tensor = data.view(-1).view(dtype).view(stored_shape)
    else:
        tensor = torch.empty(stored_shape, dtype=dtype, device="cpu")
    if back:
        tensor = tensor.permute(back)
    return tensor.to(device=device, dtype=_DTYPES[leaf.output_dtype])


def stand_ins(layout: Layout) -> list[torch.Tensor]:
    """Make leaves of one row, never written nor read, to try a structure with."""
    return [torch.empty((1, *leaf.shape), dtype=_DTYPES[leaf.output_dtype], device="cpu") for leaf in layout.leaves]
