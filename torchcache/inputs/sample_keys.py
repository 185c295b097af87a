"""Keys of the user's own in place of the digests of a call's inputs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

import numpy as np
import torch

from torchcache.errors import UncacheableError
from torchcache.inputs.batch import Batch
from torchcache.keys.digest import digest_bytes
from torchcache.keys.plain import encode_plain
from torchcache.layout import Found
from torchcache.results.seals import without_seals

#: One key in this many is watched for other inputs: always the same ones, so that a second use is seen.
_WATCHED_SHARE = 16

#: The first batches that find rows are watched whole in each process: the keys may be another program's.
_WHOLE_BATCHES = 16

_keys: ContextVar[tuple[bytes, ...] | None] = ContextVar("torchcache_sample_keys", default=None)


@contextlib.contextmanager
def sample_keys(ids: Sequence[str | int | bytes] | torch.Tensor) -> Iterator[None]:
    """Use your own keys for the samples of all cached calls in the body, instead of every byte of their inputs.

    The body may call a model of which a cached part lies deep inside. Code, weights, mode, plain arguments, dtypes and
    shapes of rows count as ever. It holds for this thread (or asyncio task). In nested bodies the innermost counts;
    ``sample_keys(None)`` is an error, and calls with ``batch_dim=None`` have no samples and go by their arguments.

    Args:
        ids: One key a sample, in the order of the batch: str, int or bytes (1 and "1" differ), or an integer tensor of
            shape ``(batch,)``. Every cached call in the body must have a batch of that size. A key must stand for one
            input, in all programs that share a directory. The cache keeps a digest of the inputs with each row and
            compares it in the first batches of each process, then for one key in sixteen and for those that a batch
            repeats. A call that has another input is computed without the cache (``sample_key_of_other_inputs``).

    Raises:
        UncacheableError: If a key is of another type. A cached call in the body raises it if its batch has another
            size.
    """
    token = _keys.set(tuple(_digests(ids)))
    try:
        yield
    finally:
        _keys.reset(token)


def _digests(ids: object) -> Iterator[bytes]:
    for position, key in enumerate(_listed(ids)):
        plain = int(key) if isinstance(key, np.integer) else key
        if type(plain) not in (str, int, bytes):
            raise UncacheableError(
                f"sample_keys() got a key of type {type(key).__qualname__} for sample {position}; a key is a str, an "
                "int or bytes",
                argument="ids",
            )
        yield digest_bytes(b"key of a sample " + (encode_plain(plain) or b""))


def _listed(ids: object) -> Sequence[object]:
    """Return the keys that a user gave as a sequence of them."""
    if isinstance(ids, torch.Tensor):
        is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.dim() != 1 or not is_integer:
            raise UncacheableError(
                f"sample_keys() got a tensor of {ids.dtype} and shape {tuple(ids.shape)}; give integers of shape "
                "(batch,)",
                argument="ids",
            )
        ids = ids.tolist()
    elif isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise UncacheableError(
            f"sample_keys() got {type(ids).__qualname__}; give a list with one str, int or bytes for each sample, or "
            "an integer tensor of shape (batch,)",
            argument="ids",
        )
    return ids


def current_keys(n: int) -> tuple[bytes, ...] | None:
    """Return the digests of the keys in force for a batch of ``n``, or None.

    Raises:
        UncacheableError: If there are keys for another number of samples.
    """
    keys = _keys.get()
    if keys is not None and len(keys) != n:
        raise UncacheableError(
            f"sample_keys() got {len(keys)} keys, and a cached call in its body has a batch of {n}; give one key a "
            "sample, or enter sample_keys() around that call alone",
            argument="ids",
        )
    return keys


def keys_of(batch: Batch) -> tuple[bytes, ...] | None:
    """Return the digests of the keys in force for the samples of a call, or None; one that is one sample has none.

    Raises:
        UncacheableError: If there are keys for another number of samples.
    """
    return current_keys(batch.n) if batch.is_divisible else None


@contextlib.contextmanager
def keys_in_force(keys: Sequence[bytes] | None) -> Iterator[None]:
    """Let cached calls in the body have these digests of keys: those of the samples that are forwarded."""
    token = _keys.set(None if keys is None else tuple(keys))
    try:
        yield
    finally:
        _keys.reset(token)


class WatchedKeys:
    """Compares keys with the inputs that the rows found for them were computed from.

    One key in ``_WATCHED_SHARE`` is watched, always the same ones, and those that a batch repeats. All keys are
    watched in the first batches of a process that find rows, and from then on that a key came with other inputs.
    """

    def __init__(self) -> None:
        self._whole_batches = _WHOLE_BATCHES  # how many more; a race of two threads makes it one more or less
        self._is_any_wrong = False

    def open(self, batch: Batch, digests: Sequence[bytes], found: Sequence[Found]) -> list[Found] | None:
        """Return rows without their seals; None if a watched key comes with other inputs than before.

        Args:
            batch: The call.
            digests: Of its samples, from their keys.
            found: Sealed rows.
        """
        opened: list[Found] = []
        seals: dict[int, bytes] = {}
        for item in found:
            rows, inputs = without_seals(item)
            opened.append(rows)
            seals.update(zip(item.positions, inputs, strict=True))

        watched = self._choose(digests, seals)
        before: dict[bytes, bytes] = {}
        for position, inputs_now in zip(watched, batch.inputs(watched), strict=True):
            expected = before.setdefault(digests[position], seals.get(position, inputs_now))
            if inputs_now != expected:
                self._is_any_wrong = True
                return None
        if seals:
            self._whole_batches -= 1
        return opened

    def _choose(self, digests: Sequence[bytes], found: Iterable[int]) -> list[int]:
        """Return the positions to watch: of rows that were found, and of keys that come more than once."""
        is_whole = self._is_any_wrong or self._whole_batches > 0
        watched = {p for p in found if is_whole or not digests[p][0] % _WATCHED_SHARE}
        if len(set(digests)) < len(digests):
            counts = Counter(digests)
            watched.update(p for p, digest in enumerate(digests) if counts[digest] > 1)
        return sorted(watched)


def open_fitting(batch: Batch, found: Sequence[Found]) -> list[Found]:
    """Return those of sealed rows that were computed from the inputs that a batch has now, without their seals."""
    fitting: list[Found] = []
    for item in found:
        rows, inputs = without_seals(item)
        inputs_now = batch.inputs(item.positions)
        fits = [i for i in range(len(inputs)) if inputs[i] == inputs_now[i]]
        if len(fits) == len(inputs):
            fitting.append(rows)
        elif fits:
            fitting.append(Found([item.positions[i] for i in fits], rows.layout, rows.data[fits]))
    return fitting
