"""Defects of the library that a run can be given, to see that it finds them: each replaces one function of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from torchcache.checks.changed_inputs import InputWatch
from torchcache.checks.draws import Draws
from torchcache.checks.few_rows import Comparison, SmallBatches
from torchcache.inputs import arguments, leaves
from torchcache.inputs.batch import Batch
from torchcache.inputs.leaves import Tensors
from torchcache.inputs.padded import PaddedTensors
from torchcache.inputs.shared import SharedArgument
from torchcache.keys import values
from torchcache.keys.attributes import attributes_of
from torchcache.keys.digest import digest_rows
from torchcache.keys.encoders import containers, objects, tensors
from torchcache.keys.fast import mode
from torchcache.keys.in_turn import ContainersInTurn
from torchcache.keys.tensors import flat_bytes
from torchcache.keys.watched import Watched
from torchcache.keys.weights import Contents
from torchcache.results.tree import Tree
from torchcache.results.values import ArrayValue
from torchcache.tiers.memory import MemoryTier


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
        lookup = true_get(self, namespace, digests)
        if next(calls) % 5 == 4 and lookup.found and len(lookup.found[0].positions) > 1:
            first = lookup.found[0].data
            first[0] = first[-1]
        return lookup

    MemoryTier.get_many = get_many  # type: ignore[method-assign,assignment]


def _short_sighted() -> None:
    """Let the key see only the beginning of each row."""
    true_digests = leaves.digest_rows

    def digest_rows(data: memoryview, n: int) -> list[bytes]:
        width = len(data) // n
        return true_digests(memoryview(b"".join(data[i * width : i * width + width // 2] for i in range(n))), n)

    leaves.digest_rows = digest_rows  # type: ignore[attr-defined]


def _no_containers() -> None:
    """Let the key not tell containers apart."""

    def form_of(name: str, tree: Tree, wrap: type | None, attributes: object) -> bytes:  # noqa: ARG001 - as the true one
        return b"container" if tree.encode() or wrap else b""

    arguments._form_of = form_of


def _padding_counts() -> None:
    """Let the key depend on what a batch is padded with, and how far."""
    PaddedTensors.digests = Tensors.digests  # type: ignore[method-assign]


def _no_unbatched() -> None:
    """Let the key not depend on what all samples share."""
    SharedArgument.encode = lambda self: b""  # type: ignore[method-assign] # noqa: ARG005 - as the true one


def _first_dimension() -> None:
    """Let the key take rows for samples wherever the batch lies."""
    Tensors.digests = lambda self, n: digest_rows(flat_bytes(self.tensor), n)  # type: ignore[method-assign]


def _keys_alone() -> None:
    """Let keys of the user's own stand for plain arguments too."""
    true_digests = Batch.digests

    def digests(self: Batch, signature: bytes, keys: Sequence[bytes] | None = None) -> list[bytes]:
        return true_digests(self, signature if keys is None else bytes(16), keys)

    Batch.digests = digests  # type: ignore[method-assign]
    Batch.form = lambda self, signature: b""  # type: ignore[method-assign] # noqa: ARG005 - as the true one


def _attributes_for_all() -> None:
    """Let the attributes of an object stand for all of it, whatever its class holds besides."""
    values.adds_attributes_only = lambda cls, base=object: True  # type: ignore[attr-defined] # noqa: ARG005 - as the true one
    values.find_registration = lambda cls: None  # type: ignore[attr-defined] # noqa: ARG005


def _trusting() -> None:
    """Let an object that has to be encoded to see whether it changed be looked at once."""
    Watched.add_content = lambda *_: None  # type: ignore[method-assign]


def _mask_blind() -> None:
    """Let a masked array count by its data alone."""
    values._KINDS = tuple(entry for entry in values._KINDS if entry[0] is not np.ma.MaskedArray)
    containers._NOTES_OF_MASKED_ARRAYS = frozenset()
    objects.attributes_of = lambda value: None if isinstance(value, np.ndarray) else attributes_of(value)  # type: ignore[attr-defined]


def _first_share() -> None:
    """Let large containers be compared as far as one look goes."""
    ContainersInTurn.have_moved = lambda self: False  # type: ignore[method-assign] # noqa: ARG005


def _frozen_generators() -> None:
    """Let what is drawn from generators in the state go unnoticed."""
    true_init = Draws.__init__
    Draws.__init__ = lambda self, generators: true_init(self, [])  # type: ignore[method-assign] # noqa: ARG005
    tensors.is_seeded = lambda value: False  # type: ignore[attr-defined] # noqa: ARG005


def _plain_results() -> None:
    """Let results be kept as what they are derived from."""
    ArrayValue.fits = classmethod(lambda cls, value: isinstance(value, np.ndarray))  # type: ignore[method-assign] # noqa: ARG005 - as the true one


def _marks_only() -> None:
    """Let weights be known by what torch counts of them, and by their first and last bytes."""
    Contents.have_moved = lambda self, hashed_bytes=0: False  # type: ignore[method-assign] # noqa: ARG005


def _old_switches() -> None:
    """Let the precisions that each backend has not count."""
    mode._float32_precisions = str


def _careless() -> None:
    """Let what a call does to its arguments go unnoticed."""
    InputWatch.changed = lambda self: ""  # type: ignore[method-assign] # noqa: ARG005


def _witness_only() -> None:
    """Let rows be checked by the witness alone."""
    SmallBatches.compare = lambda *_: Comparison(0.0)  # type: ignore[method-assign]


DEFECTS: dict[str, Callable[[], None]] = {
    "blind": _blind, "restless": _restless, "short-sighted": _short_sighted, "wrong-value": _wrong_value,
    "no-containers": _no_containers, "padding-counts": _padding_counts, "no-unbatched": _no_unbatched,
    "first-dimension": _first_dimension, "keys-alone": _keys_alone, "attributes-for-all": _attributes_for_all,
    "trusting": _trusting, "mask-blind": _mask_blind, "first-share": _first_share,
    "frozen-generators": _frozen_generators, "plain-results": _plain_results, "careless": _careless,
    "marks-only": _marks_only, "old-switches": _old_switches, "witness-only": _witness_only,
}  # fmt: skip
