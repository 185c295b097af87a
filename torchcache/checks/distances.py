"""How far two computations of one row are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from torchcache.checks.parts import row_at
from torchcache.errors import CorruptRecordError
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.contract import FollowsState
from torchcache.keys.fast.mode import is_precision_reduced
from torchcache.layout import Found
from torchcache.results.batches import Results
from torchcache.results.classes import KnownClasses
from torchcache.results.rows import are_alike
from torchcache.results.tree import Tree

#: How far two computations of one row may be apart, as a share of its norm, by the coarsest dtype at work: kernels
#: add in another order when the batch has another size, and a deep net amplifies that. A row that depends on
#: its batch is usually further off by far.
_TOLERANCES = {torch.bfloat16: 0.1, torch.float16: 0.05}
_FLOAT8_TOLERANCE = 0.3
_ACCELERATOR_TOLERANCE = 0.05  # where float32 may be computed with 10 bits
_TOLERANCE = 0.001
_REDUCED_PRECISION_TOLERANCE = 0.1

#: So much of an integer row may differ, and of a floating one be finite on one side only: near ties flip.
_FLIPPED_SHARE = 0.1
_NOT_FINITE_SHARE = 0.01

#: A row that is next to nothing beside the others of its batch is compared with these: by a share of their norm. For
#: rows that are picked to check others it is all of it: small ones may be what is left of larger numbers.
_FLOOR_SHARE = 1e-3
_FLOOR_SHARE_OF_PICKED = 1.0
_FLOOR_ROWS = 16


class Distances:
    """Compares rows of the calls of one cache.

    Args:
        cache_dtype: What values are rounded to, if they are.
        identity: Knows the parameters that take part.
        known: What classes the values may have.
    """

    def __init__(self, cache_dtype: torch.dtype | None, identity: FollowsState, known: KnownClasses) -> None:
        self._cache_dtype = cache_dtype
        self._identity = identity
        self._known = known

    def allowed(self, call: CachedCall, tree: Tree) -> float:
        """Return how far two computations of one row of a call may be apart, by what takes part and its result."""
        leaves = [leaf for leaf in tree.leaves if isinstance(leaf, torch.Tensor)]
        return tolerance([*call.batch.tensors, *self._identity.parameters(), *leaves], self._cache_dtype)

    def of(
        self,
        call: CachedCall,
        cached: Found,
        row: int,
        parts: Sequence[Found],
        beside: Found | None = None,
        *,
        is_picked: bool = True,
    ) -> float | None:
        """Return how far a known value and what was computed at ``row`` are apart; see ``row_distance``."""
        part, computed = row_at(parts, row)
        results = call.batch.results
        return row_distance(cached, computed, beside or part, results, self._known, is_picked=is_picked)


def tolerance(tensors: Iterable[torch.Tensor], cache_dtype: torch.dtype | None) -> float:
    """Return how far two computations of one row may be apart.

    Args:
        tensors: What takes part: inputs, parameters, results.
        cache_dtype: What values are rounded to.
    """
    dtypes = {cache_dtype} if cache_dtype is not None else set()
    widest = _TOLERANCE
    for tensor in tensors:
        dtypes.add(tensor.dtype)
        if tensor.device.type != "cpu":
            widest = max(widest, _ACCELERATOR_TOLERANCE)
            if torch.is_autocast_enabled(tensor.device.type):
                dtypes.add(torch.get_autocast_dtype(tensor.device.type))
    if torch.is_autocast_enabled("cpu"):
        dtypes.add(torch.get_autocast_dtype("cpu"))
    if is_precision_reduced():
        widest = max(widest, _REDUCED_PRECISION_TOLERANCE)
    for dtype in dtypes:
        is_float8 = dtype.is_floating_point and dtype.itemsize == 1
        widest = max(widest, _FLOAT8_TOLERANCE if is_float8 else _TOLERANCES.get(dtype, 0.0))
    return widest


def row_distance(
    cached: Found,
    computed: Found,
    beside: Found,
    results: Results,
    known: KnownClasses,
    *,
    is_picked: bool = True,
) -> float | None:
    """Return how far two values of one row are apart, as a share of their norm.

    Args:
        cached: One row as it is cached.
        computed: The row computed again.
        beside: Rows of its batch; these are of the same form.
        results: What rows consist of.
        known: What classes the values may have.
        is_picked: The row was picked to check the batch, and not one of those that are checked.

    Returns:
        The largest share over the leaves; infinity where the form differs; None where nothing can be said: all
        numbers are zero, or none is finite.
    """
    if not are_alike(cached.layout, computed.layout):
        return math.inf
    if not computed.layout.nbytes:
        return 0.0
    some = Found(beside.positions, beside.layout, beside.data[:_FLOOR_ROWS])
    try:
        a, b, rows = (_leaves_of(item, results, known) for item in (cached, computed, some))
    except CorruptRecordError:
        return None  # the call itself will say so
    share = _FLOOR_SHARE_OF_PICKED if is_picked else _FLOOR_SHARE
    distances = [_leaf_distance(*leaves, share) for leaves in zip(a, b, rows, strict=True)]
    return max((distance for distance in distances if distance is not None), default=None)


def _leaves_of(item: Found, results: Results, known: KnownClasses) -> list[torch.Tensor]:
    """Return what rows consist of as tensors of their own."""
    data = item.data if isinstance(item.data, np.ndarray) else item.data.cpu().numpy()
    return results.leaves(item.layout, data.copy(), known)


def norm_of(row: Found, results: Results, known: KnownClasses) -> float:
    """Return the norm of one row, as that of its mean number: padded rows have several lengths."""
    norms = [_norms(leaf) / math.sqrt(leaf.numel()) for leaf in _leaves_of(row, results, known) if leaf.numel()]
    return float(sum(norms))


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row, of the numbers that are finite."""
    finite = _numbers(rows).reshape(len(rows), -1).nan_to_num(0.0, 0.0, 0.0)
    norms: torch.Tensor = torch.linalg.vector_norm(finite, dim=1)
    return norms


def _leaf_distance(
    cached: torch.Tensor, computed: torch.Tensor, batch: torch.Tensor, floor_share: float
) -> float | None:
    """Return the norm of the difference of two rows over that of the larger one.

    It is 0 for integers of which next to none differ, infinity where too many numbers are finite on one side
    only, and None where there is nothing to compare.
    """
    if not cached.numel():
        return None
    is_exact = not (cached.is_floating_point() or cached.is_complex())
    a, b, rows = map(_numbers, (cached, computed, batch))
    if len(rows) > 1 and rows.shape[1:] == a.shape[1:]:
        varies = (rows != rows[:1]).any(0, keepdim=True) | (a != b)
        if varies.any():  # a mask or an offset that is the same in all rows says nothing
            a, b, rows = a[varies], b[varies], rows[:, varies[0]]
    if is_exact and float((a != b).double().mean()) <= _FLIPPED_SHARE:
        return 0.0
    one_sided = (a.isfinite() != b.isfinite()) | (a.isnan() != b.isnan())
    if float(one_sided.double().mean()) > _NOT_FINITE_SHARE:
        return math.inf
    both = a.isfinite() & b.isfinite()
    a, b = a[both], b[both]
    scale = max(float(a.norm()), float(b.norm()), floor_share * float(_norms(rows).median()))
    return float((a - b).norm()) / scale if scale else None


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values as float64; complex ones as pairs."""
    plain = tensor.detach().cpu()
    if plain.is_complex():
        plain = torch.view_as_real(plain.to(torch.complex128))
    if plain.dtype.itemsize == 1 and plain.is_floating_point():
        plain = plain.float()
    return plain.double()
