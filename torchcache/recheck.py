"""Rows that are computed although they are cached: which ones, and whether both values agree."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from torchcache.errors import CorruptRecordError
from torchcache.keys.mode import is_precision_reduced
from torchcache.layout import Bytes2D, Found, Layout
from torchcache.outputs import are_alike
from torchcache.process import ForkLock
from torchcache.results import Results
from torchcache.storage.contract import Verdict
from torchcache.structure import KnownClasses

#: So many namespaces are remembered with what was found out about them, and so many rows to check others with.
_MOST_NAMESPACES = 4096
_MOST_WITNESSES = 16

#: So many comparisons may prove nothing, of rows of zeros for example, before the check is given up.
_VACUOUS_CHECKS = 3

#: A namespace whose computed calls moved a global generator so many times in a row is not cached for so many calls.
_EFFECTS = 3
_CALLS_UNTIL_TRIED = 64

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

#: A row that is next to nothing beside the others of its batch is compared with these.
_FLOOR_SHARE = 1e-3
_FLOOR_ROWS = 16


@dataclass(frozen=True, slots=True)
class Witness:
    """A sample whose value is cached, with which another batch can be checked.

    Attributes:
        row: Its rows of the tensor arguments, as ``Batch.row`` gave them; None if it is in the batch itself.
        cached: Its value, at its position in the batch if it is in there.
        marks: Of the weights it was computed with.
        key: Of the user's own, if it had one.
    """

    row: tuple[torch.Tensor, ...] | None
    cached: Found
    marks: object = None
    key: bytes | None = None


class Verdicts:
    """What is known of namespaces: whether their rows depend on their batch, and a witness to find out.

    The first computed batch of a namespace leaves its first row as a witness, which the second one carries at its
    end: a row that depends on those before it, or on all, comes back changed.
    """

    def __init__(self) -> None:
        self._lock = ForkLock()
        # Guarded by _lock:
        self._verdicts: OrderedDict[bytes, Verdict | None] = OrderedDict()  # None: it cannot be found out
        self._witnesses: OrderedDict[bytes, Witness] = OrderedDict()
        self._singles: OrderedDict[bytes, None] = OrderedDict()  # namespaces that refused a batch of two
        self._vacuous: OrderedDict[bytes, int] = OrderedDict()  # comparisons that proved nothing
        # Computed calls in a row with an effect beside their result, and which the last one had.
        self._effects: OrderedDict[bytes, tuple[int, str]] = OrderedDict()
        self._changing: OrderedDict[bytes, None] = OrderedDict()  # namespaces whose calls change their input
        self._alone: OrderedDict[bytes, None] = OrderedDict()  # namespaces that were computed without other ranks

    def of(self, namespace: bytes) -> Verdict | None:
        """Return the verdict; None if it could not be found out and is not to be tried again."""
        with self._lock.raw:
            return self._verdicts.get(namespace, Verdict.UNKNOWN)

    def note(self, namespace: bytes, verdict: Verdict | None) -> None:
        """Remember a verdict, or with None that there will be none. One that says dependent stays."""
        with self._lock.raw:
            if self._verdicts.get(namespace) is not Verdict.DEPENDENT:
                self._verdicts[namespace] = verdict
            while len(self._verdicts) > _MOST_NAMESPACES:
                self._verdicts.popitem(last=False)
            self._witnesses.pop(namespace, None)

    def note_effect(self, namespace: bytes, effect: str | None) -> None:
        """Remember whether something else happened during a computed call: random numbers or collectives.

        It may have been another thread, so one such call says little and three in a row a lot.
        """
        with self._lock.raw:
            if effect is None:
                self._effects.pop(namespace, None)
                return
            self._alone.pop(namespace, None)
            self._effects[namespace] = self._effects.get(namespace, (0, ""))[0] + 1, effect
            if len(self._effects) > _MOST_NAMESPACES:
                self._effects.popitem(last=False)

    def effect(self, namespace: bytes) -> str | None:
        """Return the effect that calls are known to have, or None; now and then one is tried again."""
        with self._lock.raw:
            if namespace in self._changing:
                return "input_changed_in_place"
            count, effect = self._effects.get(namespace, (0, ""))
            if count < _EFFECTS:
                return None
            if count >= _EFFECTS + _CALLS_UNTIL_TRIED:
                self._effects[namespace] = _EFFECTS - 1, effect
                return None
            self._effects[namespace] = count + 1, effect
            return effect

    def note_changed_input(self, namespace: bytes) -> None:
        """Remember that a call changed its input: no call of the namespace is cached from then on."""
        with self._lock.raw:
            self._changing[namespace] = None
            if len(self._changing) > _MOST_NAMESPACES:
                self._changing.popitem(last=False)

    def note_alone(self, namespace: bytes) -> None:
        """Remember that a call was computed in a job of several ranks without anything that they do together."""
        with self._lock.raw:
            self._alone[namespace] = None
            if len(self._alone) > _MOST_NAMESPACES:
                self._alone.popitem(last=False)

    def is_alone(self, namespace: bytes) -> bool:
        """Tell whether ``note_alone`` was told so."""
        with self._lock.raw:
            return namespace in self._alone

    def note_vacuous(self, namespace: bytes) -> None:
        """Remember that a comparison proved nothing; after some of these there will be no verdict."""
        with self._lock.raw:
            count = self._vacuous[namespace] = self._vacuous.get(namespace, 0) + 1
            if len(self._vacuous) > _MOST_NAMESPACES:
                self._vacuous.popitem(last=False)
        if count >= _VACUOUS_CHECKS:
            self.note(namespace, None)

    def note_single(self, namespace: bytes) -> None:
        """Remember that a batch of two was refused: batches of one are not to be extended again."""
        with self._lock.raw:
            self._singles[namespace] = None
            if len(self._singles) > _MOST_NAMESPACES:
                self._singles.popitem(last=False)

    def is_single(self, namespace: bytes) -> bool:
        """Tell whether a batch of two was refused."""
        with self._lock.raw:
            return namespace in self._singles

    def witness(self, namespace: bytes) -> Witness | None:
        """Return the witness that an earlier batch left."""
        with self._lock.raw:
            return self._witnesses.get(namespace)

    def leave(self, namespace: bytes, witness: Witness) -> None:
        """Leave a witness in place of any other."""
        with self._lock.raw:
            self._witnesses[namespace] = witness
            if len(self._witnesses) > _MOST_WITNESSES:
                self._witnesses.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock.raw:
            self._verdicts.clear()
            self._witnesses.clear()
            self._singles.clear()
            self._effects.clear()
            self._changing.clear()
            self._alone.clear()
            self._vacuous.clear()


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


def largest_row(rows: Bytes2D, layout: Layout, results: Results, known: KnownClasses) -> int:
    """Return which of the first rows has the largest norm: one of zeros would prove nothing."""
    some = rows[:_FLOOR_ROWS]
    try:
        leaves = results.leaves(layout, some.copy(), known)
    except CorruptRecordError:
        return 0
    norms = sum(_numbers(leaf).reshape(len(some), -1).nan_to_num(0.0, 0.0, 0.0).norm(dim=1) for leaf in leaves)
    return int(torch.as_tensor(norms).argmax())


def row_distance(cached: Found, computed: Found, batch: Bytes2D, results: Results, known: KnownClasses) -> float | None:
    """Return how far two values of one row are apart, as a share of their norm.

    Args:
        cached: One row as it is cached.
        computed: The row computed again.
        batch: What was computed with it and has its layout, one row a sample.
        results: What rows consist of.
        known: What classes the values may have.

    Returns:
        The largest share over the leaves; infinity where the form differs; None where nothing can be said: all
        numbers are zero, or none is finite.
    """
    layout = computed.layout
    if not are_alike(cached.layout, layout):
        return math.inf
    stored = cached.data if isinstance(cached.data, np.ndarray) else cached.data.cpu().numpy()
    try:
        a, b, rows = (
            results.leaves(form, data.copy(), known)
            for form, data in ((cached.layout, stored), (layout, computed.data), (layout, batch[:_FLOOR_ROWS]))
        )
    except CorruptRecordError:
        return None  # the call itself will say so
    distances = [_leaf_distance(*leaves) for leaves in zip(a, b, rows, strict=True)]
    return max((distance for distance in distances if distance is not None), default=None)


def _leaf_distance(cached: torch.Tensor, computed: torch.Tensor, batch: torch.Tensor) -> float | None:
    """Return the norm of the difference of two rows over that of the larger one.

    It is 0 for integers of which next to none differ, infinity where too many numbers are finite on one side
    only, and None where there is nothing to compare.
    """
    if not cached.numel():
        return None
    is_exact = not (cached.is_floating_point() or cached.is_complex())
    if is_exact and float((cached != computed).double().mean()) <= _FLIPPED_SHARE:
        return 0.0
    a, b = _numbers(cached), _numbers(computed)
    one_sided = (a.isfinite() != b.isfinite()) | (a.isnan() != b.isnan())
    if float(one_sided.double().mean()) > _NOT_FINITE_SHARE:
        return math.inf
    both = a.isfinite() & b.isfinite()
    a, b = a[both], b[both]
    rows = _numbers(batch).reshape(len(batch), -1).nan_to_num(0.0, 0.0, 0.0)
    scale = max(float(a.norm()), float(b.norm()), _FLOOR_SHARE * float(rows.norm(dim=1).median()))
    return float((a - b).norm()) / scale if scale else None


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values as float64; complex ones as pairs."""
    plain = tensor.detach().cpu()
    if plain.is_complex():
        plain = torch.view_as_real(plain.to(torch.complex128))
    if plain.dtype.itemsize == 1 and plain.is_floating_point():
        plain = plain.float()
    return plain.double()
