"""Rows that are computed although they are cached: which ones, and whether both values agree."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchcache.errors import CorruptRecordError
from torchcache.keys.mode import is_precision_reduced
from torchcache.layout import Found
from torchcache.outputs import are_alike
from torchcache.process import ForkLock
from torchcache.results import Results
from torchcache.samples import Batch
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

#: A row that is next to nothing beside the others of its batch is compared with these: by a share of their norm. For
#: rows that are picked to check others it is all of it: small ones may be what is left of larger numbers.
_FLOOR_SHARE = 1e-3
_FLOOR_SHARE_OF_PICKED = 1.0
_FLOOR_ROWS = 16

#: How many rows of a batch others are picked from, and how many it takes to pick more than one.
_SAMPLE_ROWS = 16
_LEAST_ROWS_OF_SEVERAL = 8

#: How many small batches are tried.
_MOST_BATCHES = 2

#: To a batch of up to this many rows one says little: the witness of so few is copied until copies are the most.
_LONE_ROWS = 4


@dataclass(frozen=True, slots=True)
class Witness:
    """A sample whose value is known, with which another batch can be checked.

    Attributes:
        rows: Its rows of the arguments, as ``Batch.rows`` returned them, as often as it is to be computed.
        n: How often that is.
        digest: Its own.
        cached: Its value.
        marks: Of the weights it was computed with.
        key: Of the user's own, if it had one.
    """

    rows: tuple[Any, ...]
    n: int
    digest: bytes
    cached: Found
    marks: object
    key: bytes | None


@dataclass(frozen=True, slots=True)
class FewRows:
    """Rows of a batch that are computed once more by themselves, most of them as copies of one or two.

    What the rows of a batch share is its size, mean, median, largest value. A batch of copies has none of that in
    common with the one that they come from, unless the row that has the largest value is among them. So that one is
    left out, and of the others those with small results are taken: what is dropped from a large batch would not be from
    one of its like. One that is not zero is among them where there is one.

    Attributes:
        values: What was computed first, by position; one row each.
        sample: Rows of the first batch, beside which those computed again are compared.
        order: The positions in the order in which they are computed again; the last one may be repeated.
        witness: The position of the row to compute with the next batch: the largest, or the smallest if it is the one
            that was left out.
    """

    values: dict[int, Found]
    sample: list[Found]
    order: list[int]
    witness: int

    @classmethod
    def of_batch(cls, computed: Sequence[Found], batch: Batch, results: Results, known: KnownClasses) -> FewRows | None:
        """Pick them.

        Args:
            computed: The values of a batch's rows; all rows are different.
            batch: The call.
            results: What rows consist of.
            known: What classes the values may have.

        Returns:
            None if nothing can be said of them.
        """
        places = [(item, i) for item in computed for i in range(len(item.positions))]
        n = min(len(places), _SAMPLE_ROWS)
        if not n:
            return None
        chosen = [places[k * (len(places) - 1) // max(1, n - 1)] for k in range(n)]
        sample = [Found([item.positions[i]], item.layout, item.data[i : i + 1]) for item, i in chosen]
        try:
            norms = [_norm_of(row, results, known) for row in sample]
        except CorruptRecordError:
            return None  # the call itself will say so
        ranked = sorted(range(n), key=norms.__getitem__)
        loudest = batch.loudest([row.positions[0] for row in sample])
        quiet = [i for i in ranked if i not in loudest] or [i for i in ranked if i != loudest[0]] or ranked
        smallest = quiet[0]
        order = [*quiet[1:][-1:], smallest, smallest, smallest]
        if n >= _LEAST_ROWS_OF_SEVERAL:
            small = quiet[2]
            order = [quiet[n * 3 // 8], small, smallest, small, smallest, small, quiet[n * 5 // 8]]
        if not any(norms[i] for i in order):
            order = [i for i in ranked if norms[i]][:1] + order
        values = {sample[i].positions[0]: sample[i] for i in order}
        witness = ranked[0] if ranked[0] not in quiet else ranked[-1]
        return cls(values, sample, [sample[i].positions[0] for i in order], sample[witness].positions[0])

    def batches(self, n: int) -> Iterator[list[int]]:
        """Yield batches to compute them in: of two sizes other than ``n``, one of them even."""
        batch = self.order
        for _ in range(_MOST_BATCHES):
            if len(batch) == n:
                batch = [*batch, batch[-1]]
            yield batch
            batch = [*batch, batch[-1]]

    @property
    def are_copies(self) -> bool:
        """Whether there was one row to choose from: copies of it show whether their number matters, and no more."""
        return len(self.sample) == 1

    @staticmethod
    def witnesses(n: int) -> int:
        """Return how often the witness of ``n`` rows is computed with the next batch."""
        return n + 1 if 1 < n <= _LONE_ROWS else 1

    def beside(self, value: Found) -> Found:
        """Return the rows of the sample that are of the same form as one, which may be none of them."""
        alike = [row.data for row in self.sample if row.layout == value.layout] or [value.data]
        return Found(range(len(alike)), value.layout, np.concatenate(alike))


def _remember(namespaces: OrderedDict[bytes, None], namespace: bytes) -> None:
    """Add a namespace to some, of which the oldest are forgotten."""
    namespaces[namespace] = None
    if len(namespaces) > _MOST_NAMESPACES:
        namespaces.popitem(last=False)


class Verdicts:
    """What is known of namespaces: whether their rows depend on their batch, and a witness to find out.

    A few rows of the first computed batch of a namespace are computed once more by themselves. The batch also leaves
    one row as a witness, which the second one carries at its end: a row that depends on those before it, or on all,
    comes back changed.
    """

    def __init__(self) -> None:
        self._lock = ForkLock()
        # Guarded by _lock:
        self._verdicts: OrderedDict[bytes, Verdict | None] = OrderedDict()  # None: it cannot be found out
        self._witnesses: OrderedDict[bytes, Witness] = OrderedDict()
        self._vacuous: OrderedDict[bytes, int] = OrderedDict()  # comparisons that proved nothing
        # Computed calls in a row with an effect beside their result, and which the last one had.
        self._effects: OrderedDict[bytes, tuple[int, str]] = OrderedDict()
        self._changing: OrderedDict[bytes, None] = OrderedDict()  # namespaces whose calls change their input
        self._alone: OrderedDict[bytes, None] = OrderedDict()  # namespaces that were computed without other ranks
        self._repeated: OrderedDict[bytes, None] = OrderedDict()  # namespaces where the number of copies did not matter

    def of(self, namespace: bytes) -> Verdict | None:
        """Return the verdict; None if it could not be found out and is not to be tried again."""
        with self._lock.raw:
            return self._verdicts.get(namespace, Verdict.UNKNOWN)

    def note(self, namespace: bytes, verdict: Verdict | None) -> None:
        """Remember a verdict, or with None that there will be none, and forget the witness.

        One that says dependent stays, and None does not replace any.
        """
        with self._lock.raw:
            before = self._verdicts.get(namespace)
            if before is None or (before is not Verdict.DEPENDENT and verdict is not None):
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
            _remember(self._changing, namespace)

    def note_alone(self, namespace: bytes) -> None:
        """Remember that a call was computed in a job of several ranks without anything that they do together."""
        with self._lock.raw:
            _remember(self._alone, namespace)

    def is_alone(self, namespace: bytes) -> bool:
        """Tell whether ``note_alone`` was told so."""
        with self._lock.raw:
            return namespace in self._alone

    def note_repeated(self, namespace: bytes) -> None:
        """Remember that a row came back the same in two batches of copies of itself, of two sizes."""
        with self._lock.raw:
            _remember(self._repeated, namespace)

    def is_repeated(self, namespace: bytes) -> bool:
        """Tell whether ``note_repeated`` was told so."""
        with self._lock.raw:
            return namespace in self._repeated

    def note_vacuous(self, namespace: bytes) -> None:
        """Remember that a comparison proved nothing; after some of these there will be no verdict."""
        with self._lock.raw:
            count = self._vacuous[namespace] = self._vacuous.get(namespace, 0) + 1
            if len(self._vacuous) > _MOST_NAMESPACES:
                self._vacuous.popitem(last=False)
        if count >= _VACUOUS_CHECKS:
            self.note(namespace, None)

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
            self._effects.clear()
            self._changing.clear()
            self._alone.clear()
            self._repeated.clear()
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


def _norm_of(row: Found, results: Results, known: KnownClasses) -> float:
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
