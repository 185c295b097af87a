"""A call as samples, and rows of it selected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch.autograd import forward_ad

from torchcache.inputs.arguments import Argument
from torchcache.inputs.leaves import Leaf, Tensors
from torchcache.inputs.shared import SharedArgument
from torchcache.inputs.sizes import batch_size
from torchcache.inputs.tuples import Tuples, describe_ambiguity
from torchcache.keys.digest import DIGEST_BYTES, combine, digest_named
from torchcache.keys.plain import BRINGS_CODE, encode_plain
from torchcache.keys.tensor_kinds import notes_on, unsupported_kind
from torchcache.report.reasons import Reason
from torchcache.results.batches import Results

AnyArgument = Argument | SharedArgument

#: The arguments of a call on some rows, positional and by keyword, and the form of its results.
Selection = tuple[tuple[object, ...], dict[str, object], Results]

_by_name = attrgetter("name")


@dataclass(slots=True)
class CallArguments:
    """The arguments of one call; they stay the caller's and are not changed.

    Attributes:
        args: The positional ones, as they were given.
        kwargs: Those by keyword, as they were given.
        plain: The bytes of the plain ones by name, and of what else all samples share.
        others: Those that are not plain, in the order in which they were given.
        tuples: The plain ones that are tuples.
    """

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    plain: dict[str, bytes]
    others: list[AnyArgument] = field(default_factory=list)
    tuples: Tuples = field(default_factory=dict)


class Batch:
    """One call, seen as ``n`` samples."""

    __slots__ = ("_given", "_leaves", "_notes", "_unclear", "_unsupported", "arguments", "evidence", "generators", "n",
                 "results", "tensors")  # fmt: skip

    #: Whether rows of several calls may be forwarded together.
    is_divisible = True

    def __init__(self, given: CallArguments, results: Results) -> None:
        self.results: Results = results
        self._given = given
        #: Those that are not plain, by name however they were given.
        self.arguments: list[AnyArgument] = sorted(given.others, key=_by_name)
        self._leaves = self._find_leaves(self.arguments)

        #: The tensors that hold the samples, in the order of their names.
        self.tensors: list[torch.Tensor] = []
        noted: list[Tensors] = []
        for leaf in self._leaves:
            if isinstance(leaf, Tensors):
                self.tensors.append(leaf.tensor)
                if leaf.tensor.__dict__:
                    noted.append(leaf)
        #: What somebody hung on these tensors, by the name of the tensor; all samples share it.
        self._notes: dict[str, dict[str, object]] = {}
        if noted and self.is_divisible:  # a call that is one sample counts all of its arguments by value
            self._notes = {leaf.name: notes for leaf in noted if (notes := notes_on(leaf.tensor))}
        self._unsupported = self._find_unsupported()
        self.n: int = 0 if self._unsupported else self._count()

        #: The random number generators in the arguments.
        self.generators: list[object] = []
        opaque: list[str] = []
        for argument in self.arguments:
            if isinstance(argument, SharedArgument):
                self.generators += argument.generators
                opaque += [f"{path} is a {kind}" for path, kind in argument.opaque]

        #: What to say of the reason to go around the cache, if there is one: what cannot be seen, or which tuple may
        #: hold one value per sample and what to pass in its place.
        self.evidence: str = ", ".join(opaque)
        self._unclear = Reason.OPAQUE_STATE
        if self._notes and not opaque:
            self.evidence, self._unclear = self._find_unclear_note(), Reason.ATTRIBUTE_OF_INPUT
        if not self.evidence:
            self.evidence, self._unclear = self._find_ambiguity(), Reason.AMBIGUOUS_TUPLE

    def _find_leaves(self, arguments: Sequence[AnyArgument]) -> list[Leaf]:
        """Return what holds the samples, in the order of the arguments."""
        leaves: list[Leaf] = []
        for argument in arguments:
            if not argument.is_shared:
                leaves += argument.leaves
        return leaves

    def _count(self) -> int:
        """Return the number of samples."""
        # Messages name what comes first in the call.
        return batch_size(self._find_leaves(self._given.others), self._given.tuples)

    def _find_unsupported(self) -> Reason | None:
        """Name the first kind of tensor in the arguments that has no plain bytes, or return None."""
        everywhere = [*self.tensors]
        for argument in self.arguments:
            if isinstance(argument, SharedArgument):
                everywhere += [leaf.tensor for leaf in argument.leaves]
        for tensor in everywhere:
            kind = unsupported_kind(tensor)
            if kind is not None:
                return kind
        return None

    def _find_ambiguity(self) -> str:
        """Say which tuple of plain values is as long as the batch; return "" if there is none."""
        sequences: list[tuple[str, Sequence[object]]] = []
        for argument in self.arguments:
            sequences += argument.sequences
        if not sequences and not self._given.tuples:
            return ""
        return describe_ambiguity(self._given.tuples, sequences, self.n)

    def _find_unclear_note(self) -> str:
        """Say which attribute of a tensor may hold a value for each sample, or cannot be seen; "" if there is none."""
        for name, notes in self._notes.items():
            for key, note in notes.items():
                if isinstance(note, BRINGS_CODE) or encode_plain(note) is None:
                    return f"{name}.{key} is a {type(note).__qualname__}"
        return ""

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors that hold the samples, the batch in front, each with the name of its argument."""
        return [(leaf.name, leaf.batch_first()) for leaf in self._leaves if isinstance(leaf, Tensors)]

    @property
    def first_device(self) -> torch.device:
        """The device of the first tensor argument."""
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    @property
    def host_bytes(self) -> int:
        """How many bytes of samples lie in host memory."""
        nbytes = 0
        for tensor in self.tensors:
            if tensor.is_cpu:
                nbytes += tensor.nbytes
        return nbytes

    def bypass_reason(self) -> Reason | None:
        """Why this call cannot be cached whatever its state, or None."""
        if self._unsupported:
            return self._unsupported
        if self.evidence:
            return self._unclear
        if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001 - torch has no public test
            return Reason.FUNCTORCH_TRANSFORM  # it may wrap weights, and wraps what is made while it lasts
        if forward_ad._current_level >= 0:  # noqa: SLF001 - as above
            return Reason.FORWARD_MODE_GRADIENTS
        if torch.is_grad_enabled() and self._requires_grad():
            return Reason.INPUT_REQUIRES_GRAD
        return None

    def _requires_grad(self) -> bool:
        for argument in self.arguments:
            for leaf in argument.leaves:
                if isinstance(leaf, Tensors) and leaf.tensor.requires_grad:
                    return True
        return False

    def shared_parts(self) -> list[tuple[str, bytes]]:
        """Return what all samples of the call have in common: plain arguments, dtypes and row shapes, by name."""
        shared = dict(self._given.plain)
        for argument in self.arguments:
            encoded = argument.encode()
            if encoded:
                shared[argument.name] = encoded

        parts = [(f"argument {name}" if name else "function", shared[name]) for name in sorted(shared)]
        for name, notes in self._notes.items():
            noted = [(key, encode_plain(notes[key]) or b"") for key in sorted(notes)]
            parts.append((f"attributes {name}", digest_named(noted)))
        return parts + self._forms()

    def _forms(self) -> list[tuple[str, bytes]]:
        return [leaf.describe() for leaf in self._leaves]

    def signature(self) -> bytes:
        """Return the digest of what all samples of the call have in common."""
        return digest_named(self.shared_parts())

    def form(self, signature: bytes) -> bytes:
        """Return what tells namespaces of one state apart: whether rows depend on their batch is a matter of both."""
        return signature

    def digests(self, signature: bytes, keys: Sequence[bytes] | None = None) -> list[bytes]:
        """Return the 16-byte digest of each sample, in order; ``keys`` of the user's own stand for the inputs."""
        if keys is not None:
            return combine(signature, [[*keys]])
        return combine(signature, [leaf.digests(self.n) for leaf in self._leaves])

    def inputs(self, positions: Sequence[int]) -> list[bytes]:
        """Return digests of the inputs of some samples, whatever keys stand for them."""
        if len(positions) > self.n // 2:  # all at once costs less
            every = combine(bytes(DIGEST_BYTES), [leaf.digests(self.n) for leaf in self._leaves])
            return [every[p] for p in positions]
        return combine(bytes(DIGEST_BYTES), [[leaf.digest(p) for p in positions] for leaf in self._leaves])

    def rows(self, positions: Sequence[int]) -> tuple[Any, ...]:
        """Return copies of some samples' rows, as ``select`` takes them; of a padded batch, those of one sample."""
        return tuple([leaf.select(positions, None, is_range=False) for leaf in self._leaves])

    def loudest(self, positions: Sequence[int]) -> list[int]:
        """Return which of some samples have the largest number and the largest magnitude in their floating tensors."""
        floating = [leaf for leaf in self._leaves if isinstance(leaf, Tensors) and leaf.tensor.is_floating_point()]
        peaks = [leaf.peaks(positions) for leaf in floating if leaf.tensor.numel()]
        return torch.stack(peaks).amax(0).argmax(0).tolist() if peaks else []

    def select(self, positions: Sequence[int], extra: tuple[Any, ...] | None = None) -> Selection:
        """Return the arguments of a call that has the samples at ``positions`` only, and the form of its results.

        Nothing in them that can be changed is the caller's own, unless the call is one sample.

        Args:
            positions: In the order wanted.
            extra: What ``rows`` returned for another call of the same signature: more samples, at the end.
        """
        is_range = list(positions) == list(range(positions[0], positions[0] + len(positions)))
        more = extra if extra is not None else [None] * len(self._leaves)
        rows = [leaf.select(positions, one, is_range=is_range) for leaf, one in zip(self._leaves, more, strict=True)]
        return (*self._with_leaves(rows), self.results)

    def _with_leaves(self, values: Iterable[object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return the arguments with other tensors and lists in them, in the order of ``_leaves``, and copies beside."""
        args = list(self._given.args)
        kwargs = dict(self._given.kwargs)
        rest = iter(self._noted(values) if self._notes else values)
        for argument in self.arguments:
            if isinstance(argument, SharedArgument):
                value = argument.copied()
            else:
                value = argument.with_leaves([next(rest) for _ in argument.leaves])
            if isinstance(argument.place, int):
                args[argument.place] = value
            else:
                kwargs[argument.place] = value
        return tuple(args), kwargs

    def _noted(self, values: Iterable[object]) -> Iterator[object]:
        """Yield tensors and lists in the order of ``_leaves``, the tensors with what was hung on the caller's."""
        for leaf, value in zip(self._leaves, values, strict=True):
            if isinstance(value, torch.Tensor):
                vars(value).update(self._notes.get(leaf.name, {}))
            yield value


class Call(Batch):
    """One call that is one sample, whatever its arguments: all of them count by value."""

    __slots__ = ()
    is_divisible = False

    def _find_leaves(self, arguments: Sequence[AnyArgument]) -> list[Leaf]:
        return [leaf for argument in arguments for leaf in argument.leaves]

    def _count(self) -> int:
        return 1

    def _forms(self) -> list[tuple[str, bytes]]:
        return []

    def form(self, signature: bytes) -> bytes:  # noqa: ARG002 - as of Batch
        return b"call"

    def digests(self, signature: bytes, keys: Sequence[bytes] | None = None) -> list[bytes]:  # noqa: ARG002 - as of Batch
        return [signature]

    def select(self, positions: Sequence[int], extra: tuple[Any, ...] | None = None) -> Selection:  # noqa: ARG002 - as of Batch
        return self._given.args, dict(self._given.kwargs), self.results


class ManyCalls(Call):
    """Many calls that are one sample each, as far as they are looked up together: what their digests are is known."""

    __slots__ = ()

    def __init__(self, n: int, results: Results) -> None:
        super().__init__(CallArguments((), {}, {}), results)
        self.n = n
