"""Defects of the library that a run can be given, to see that it finds them: each replaces one function of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchcache import arguments, padding
from torchcache.keys.digest import digest_rows
from torchcache.memory import MemoryTier
from torchcache.samples import Batch
from torchcache.structure import Tree
from torchcache.tensors import flat_bytes


def _blind() -> None:
    """Let the key not tell dtypes apart."""
    true_parts = Batch.shared_parts

    def parts(self: Batch) -> list[tuple[str, bytes]]:
        return [
            (name, value.partition(b" ")[2] if name.startswith("tensor ") else value)
            for name, value in true_parts(self)
        ]

    Batch.shared_parts = parts  # type: ignore[method-assign]


def _restless() -> None:
    """Let the key depend on the hash seed."""
    true_signature = Batch.signature
    seeded = hash("torchcache").to_bytes(8, "little", signed=True)

    def signature(self: Batch) -> bytes:
        return bytes(a ^ b for a, b in zip(true_signature(self), 2 * seeded, strict=True))

    Batch.signature = signature  # type: ignore[method-assign]


def _wrong_value() -> None:
    """Let a hit in memory give another row's value now and then."""
    true_get = MemoryTier.get_many
    calls = iter(range(1 << 60))

    def get_many(self: MemoryTier, namespace: bytes, digests: list[bytes]) -> object:
        found, missing = true_get(self, namespace, digests)
        if next(calls) % 5 == 4 and found and len(found[0].positions) > 1:
            found[0].data[0] = found[0].data[-1]
        return found, missing

    MemoryTier.get_many = get_many  # type: ignore[method-assign,assignment]


def _short_sighted() -> None:
    """Let the key see only the beginning of each row."""
    true_digests = arguments.digest_rows

    def digest_rows(data: memoryview, n: int) -> list[bytes]:
        width = len(data) // n
        return true_digests(memoryview(b"".join(data[i * width : i * width + width // 2] for i in range(n))), n)

    arguments.digest_rows = digest_rows  # type: ignore[attr-defined]


def _no_containers() -> None:
    """Let the key not tell containers apart."""

    def form_of(name: str, tree: Tree, wrap: type | None, attributes: object) -> bytes:  # noqa: ARG001 - as the true one
        return b"container" if tree.encode() or wrap else b""

    arguments._form_of = form_of


def _padding_counts() -> None:
    """Let the key depend on what a batch is padded with, and how far."""
    padding.PaddedTensors.digests = arguments.Tensors.digests  # type: ignore[method-assign]


def _no_unbatched() -> None:
    """Let the key not depend on what all samples share."""
    true_encode = arguments.Argument.encode
    arguments.Argument.encode = lambda self: b"" if self.is_shared else true_encode(self)  # type: ignore[method-assign]


def _first_dimension() -> None:
    """Let the key take rows for samples wherever the batch lies."""
    arguments.Tensors.digests = lambda self, n: digest_rows(flat_bytes(self.tensor), n)  # type: ignore[method-assign]


def _keys_alone() -> None:
    """Let keys of the user's own stand for plain arguments too."""
    true_digests = Batch.digests

    def digests(self: Batch, signature: bytes, keys: Sequence[bytes] | None = None) -> list[bytes]:
        return true_digests(self, signature if keys is None else bytes(16), keys)

    Batch.digests = digests  # type: ignore[method-assign]
    Batch.form = lambda self, signature: b""  # type: ignore[method-assign] # noqa: ARG005 - as the true one


DEFECTS: dict[str, Callable[[], None]] = {
    "blind": _blind, "restless": _restless, "short-sighted": _short_sighted, "wrong-value": _wrong_value,
    "no-containers": _no_containers, "padding-counts": _padding_counts, "no-unbatched": _no_unbatched,
    "first-dimension": _first_dimension, "keys-alone": _keys_alone,
}  # fmt: skip
