"""Results taken apart into rows of bytes, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from torchcache.errors import UncacheableError
from torchcache.keys.tensor_kinds import notes_on, unsupported_kind
from torchcache.layout import CONTIGUOUS, MAX_TENSORS, Bytes2D, Layout, Leaf, empty_rows
from torchcache.report.reasons import Reason
from torchcache.results import tree as trees
from torchcache.results.array_nodes import tensor_of
from torchcache.results.classes import KnownClasses
from torchcache.results.leaves import (
    byte_ranges,
    columns,
    copy_leaves,
    has_known_dtypes,
    in_format,
    put_leaf,
    rounded_leaf,
    stand_ins,
    stored_form,
)
from torchcache.results.nodes import Node, TooLargeError, type_of
from torchcache.results.tree import Tree


def flatten(output: object) -> Tree:
    """Find the tensors and arrays of what a module returned, as tensors; never raises for what it contains."""
    tree = trees.flatten(output, _is_tensor, kinds=trees.KINDS_OF_BATCHES)
    if not any(isinstance(leaf, np.ndarray) for leaf in tree.leaves):
        return tree
    leaves = [tensor_of(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in tree.leaves]
    return replace(tree, leaves=leaves)


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
    stored: list[tuple[Leaf, torch.Tensor]] = []
    overflowed = 0
    for tensor in tree.leaves:
        leaf, in_order, more = stored_form(tensor, cache_dtype)
        stored.append((leaf, in_order))
        overflowed += more

    layout = Layout(tuple([leaf for leaf, _ in stored]), encoded)
    rows = empty_rows(n, layout.nbytes)
    copy_leaves(stored, rows)
    if encoded:
        known.learn_from(tree)
    return layout, rows, overflowed


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

    leaves: list[torch.Tensor] = []
    for (leaf, start, end), device in zip(byte_ranges(layout), devices, strict=True):
        part = data if leaf.nbytes == layout.nbytes else columns(data, start, end)
        leaves.append(put_leaf(leaf, part, device))
    return trees.rebuild(node_of(layout, known), leaves)


def rounded(tree: Tree, cache_dtype: torch.dtype | None) -> object:
    """Return what a later hit will return: the result rounded through ``cache_dtype``, detached.

    Its containers are new: the module's own are not changed.
    """
    return tree.build([rounded_leaf(leaf, cache_dtype) for leaf in tree.leaves])


def detached(output: object) -> object:
    """Return a result with its tensors detached; what cannot be taken apart stays as it is."""
    return rounded(flatten(output), None)


def unsupported_leaf(tree: Tree) -> tuple[Reason, str] | None:
    """Find the first tensor in a result that would not come back as it is.

    Returns:
        The reason, and what it is and where; None if there is none.
    """
    for leaf, path in zip(tree.leaves, tree.paths, strict=True):
        reason = _unsupported_result(leaf) if _is_tensor(leaf) else None
        if reason is not None:
            return reason, f"{type_of(leaf)} at {path}"
    return None


def devices_of(tree: Tree) -> tuple[torch.device, ...]:
    """Return the device of each leaf, in the order in which ``put_together`` wants them."""
    return tuple([leaf.device for leaf in tree.leaves])


def is_known(layout: Layout, known: KnownClasses) -> bool:
    """Tell whether this process can rebuild a layout that came from a store: its dtypes, tree and classes."""
    if not has_known_dtypes(layout):
        return False
    if not layout.structure:
        return len(layout.leaves) == 1
    node = node_of(layout, known)
    # Counted here too: what is remembered was tried with the leaves of another layout.
    return node is not None and node.n_leaves == len(layout.leaves) and known.is_certain(node)


def node_of(layout: Layout, known: KnownClasses) -> Node | None:
    """Return the tree that a layout's leaves hang in, which has some; None if this process cannot rebuild it."""
    return known.decode(layout.structure, lambda _: stand_ins(layout))


def are_alike(one: Layout, other: Layout) -> bool:
    """Tell whether rows of two layouts go into one result: they may differ in their memory formats."""
    if one == other:
        return True
    return one.structure == other.structure and _formless(one) == _formless(other)


def reform(layout: Layout, data: Bytes2D | torch.Tensor, wanted: Layout) -> Bytes2D:
    """Return rows in the memory formats of a layout that is alike."""
    rows: Bytes2D = data if isinstance(data, np.ndarray) else data.cpu().numpy()
    if layout == wanted:
        return rows

    parts: list[Bytes2D] = []
    for (leaf, start, end), target in zip(byte_ranges(layout), wanted.leaves, strict=True):
        part = np.ascontiguousarray(rows[:, start:end])
        if leaf.memory_format != target.memory_format and part.size:
            part = in_format(part, leaf, target.memory_format)
        parts.append(part)
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def plain_numbers(layout: Layout, known: KnownClasses) -> frozenset[int]:
    """Return the ints among the plain values of a known layout: one may be the batch's size."""
    if not layout.structure:
        return frozenset()
    node = node_of(layout, known)
    return frozenset() if node is None else frozenset(node.numbers())


def check_leaves(tree: Tree, n: int, batch_dim: int = 0) -> None:
    """Raise unless a tree can be kept, and has leaves, not too many, each with ``n`` rows along ``batch_dim``.

    Raises:
        UncacheableError: If it has not.
    """
    if tree.problem is not None:
        raise tree.problem
    if not tree.leaves:
        raise UncacheableError(
            f"the cached call returned {type(tree.build(())).__qualname__}, not a tensor nor anything with a tensor in "
            "it; return tensors or NumPy arrays with the batch in front, or set batch_dim=None to cache each call as "
            "one sample, whatever it returns"
        )
    if len(tree.leaves) > MAX_TENSORS:
        raise TooLargeError(
            f"the cached call returned {len(tree.leaves)} tensors, and at most {MAX_TENSORS} can be kept; stack "
            "those of one shape along a dimension behind the batch"
        )
    for tensor, path in zip(tree.leaves, tree.paths, strict=True):
        if tensor.dim() > batch_dim and tensor.shape[batch_dim] == n:
            continue
        if path == "output":
            at, what = "", "the result"
        else:
            at, what = f" at {path}", "every tensor in the result"
        raise UncacheableError(
            f"the cached call returned shape {tuple(tensor.shape)}{at} for a batch of {n}; dimension {batch_dim} "
            f"of {what} must be the batch, one row a sample"
        )


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _unsupported_result(tensor: torch.Tensor) -> Reason | None:
    if type(tensor) is torch.nn.Parameter:
        return Reason.PARAMETER_AS_RESULT
    if notes_on(tensor):
        return Reason.ATTRIBUTES_OF_RESULT
    return unsupported_kind(tensor)


def _formless(layout: Layout) -> list[Leaf]:
    return [replace(leaf, memory_format=CONTIGUOUS) for leaf in layout.leaves]
