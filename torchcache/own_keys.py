"""Keys of the user's own in place of the digests of a call's inputs."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import numpy as np
import torch

from torchcache.errors import UncacheableError
from torchcache.keys.digest import digest_bytes
from torchcache.keys.plain import encode_plain
from torchcache.process import ForkLock

#: One key in so many is watched for other inputs: always the same ones, so that a second use is seen.
_WATCHED_SHARE = 16
_MOST_WATCHED = 1 << 16

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
            input: for some of the keys, and for those that a batch repeats, that is checked in this process, and a call
            that has another input is computed without the cache (``sample_key_of_other_inputs``).

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
    if isinstance(ids, torch.Tensor):
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
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
    for position, key in enumerate(ids):
        plain = int(key) if isinstance(key, np.integer) else key
        if type(plain) not in (str, int, bytes):
            raise UncacheableError(
                f"sample_keys() got a key of type {type(key).__qualname__} for sample {position}; a key is a str, an "
                "int or bytes",
                argument="ids",
            )
        yield digest_bytes(b"sample key " + (encode_plain(plain) or b""))


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


@contextlib.contextmanager
def keys_in_force(keys: Sequence[bytes] | None) -> Iterator[None]:
    """Let cached calls in the body have these digests of keys: those of the samples that are forwarded."""
    token = _keys.set(None if keys is None else tuple(keys))
    try:
        yield
    finally:
        _keys.reset(token)


class WatchedKeys:
    """The inputs that some keys were used with."""

    def __init__(self) -> None:
        self._lock = ForkLock()
        self._inputs: OrderedDict[bytes, bytes] = OrderedDict()  # guarded by _lock

    @staticmethod
    def choose(digests: Sequence[bytes]) -> list[int]:
        """Return the positions of the keys to watch, and of those that come more than once."""
        if len(set(digests)) == len(digests):
            return [i for i, digest in enumerate(digests) if not digest[0] % _WATCHED_SHARE]
        seen: set[bytes] = set()
        repeated = {digest for digest in digests if digest in seen or seen.add(digest)}  # type: ignore[func-returns-value]
        return [i for i, digest in enumerate(digests) if digest in repeated or not digest[0] % _WATCHED_SHARE]

    def agree(self, digest: bytes, inputs: bytes) -> bool:
        """Tell whether a key comes with the inputs of its last use, and remember them."""
        with self._lock.raw:
            before = self._inputs.setdefault(digest, inputs)
            self._inputs.move_to_end(digest)
            if len(self._inputs) > _MOST_WATCHED:
                self._inputs.popitem(last=False)
        return before == inputs
