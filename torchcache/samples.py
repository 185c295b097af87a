"""A call split into samples, and rows selected."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import forward_ad

from torchcache.arguments import Argument, Tensors, Values, is_batch_of_texts, open_argument, plain_sequences
from torchcache.call_results import CallResults
from torchcache.errors import ConfigError, UncacheableError
from torchcache.keys.digest import DIGEST_BYTES, combine, digest_parts
from torchcache.options import CacheOptions
from torchcache.padding import PaddedResults, PaddedTensors, Spans
from torchcache.results import Results
from torchcache.shared_arguments import SharedArgument, encode_plain_argument
from torchcache.tensors import unsupported_kind

AnyArgument = Argument | SharedArgument

#: The plain arguments of a call that are tuples, by name, each with its place in args or kwargs.
Tuples = dict[str, tuple["int | str", tuple[Any, ...]]]


class CallSignature:
    """The names of a function's parameters, so that ``f(x, 3)`` and ``f(x, scale=3)`` are one call.

    Args:
        function: The function, not bound.
        is_method: Its first parameter is bound already.
        label: Enters the digest of every sample.
        unbatched: Names of arguments that all samples share, although they are or hold tensors.
        batch_dim: The dimension of tensors that samples lie along; None if a call is one sample.
        padded: Names of tensors that are padded, each with that of its mask, which is one for all.

    Raises:
        ConfigError: If ``unbatched`` or ``padded`` names no parameter.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *,
        is_method: bool,
        label: str,
        unbatched: Sequence[str] = (),
        batch_dim: int | None = 0,
        padded: Mapping[str, str] | None = None,
    ) -> None:
        self._label = (f"{label} along {batch_dim}" if batch_dim else label).encode()
        self._batch_dim = batch_dim
        self._results = CallResults() if batch_dim is None else Results(batch_dim)
        parameters = list(inspect.signature(function).parameters.values())
        if is_method and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            del parameters[0]
        self._signature = inspect.Signature(parameters)
        by_kind: dict[Any, list[str]] = {}
        for parameter in parameters:
            by_kind.setdefault(parameter.kind, []).append(parameter.name)
        self._names = (*by_kind.get(inspect.Parameter.POSITIONAL_ONLY, ()),
                       *by_kind.get(inspect.Parameter.POSITIONAL_OR_KEYWORD, ()))  # fmt: skip
        self._rest = next(iter(by_kind.get(inspect.Parameter.VAR_POSITIONAL, ())), None)
        self._positional_only = frozenset(by_kind.get(inspect.Parameter.POSITIONAL_ONLY, ()))
        self._keywords = frozenset({
            *by_kind.get(inspect.Parameter.POSITIONAL_OR_KEYWORD, ()), *by_kind.get(inspect.Parameter.KEYWORD_ONLY, ()),
        })  # fmt: skip
        self._unbatched = frozenset(unbatched)
        padded = padded or {}
        self._padded = frozenset({*padded, *padded.values()})
        self._mask = next(iter(padded.values()), None)
        if inspect.Parameter.VAR_KEYWORD not in by_kind:
            names = [p.name for p in parameters]
            _check_names("unbatched", unbatched, names)
            # A tensor in a container is named with its way: batch['input_ids'].
            _check_names("padded", (re.split(r"[\[.]", name)[0] for name in (*padded, *padded.values())), names)
        # A default that is not plain is part of the code and counts there.
        self._defaults = {
            p.name: encoded
            for p in parameters
            if p.default is not p.empty and (encoded := encode_plain_argument(p.name, p.name, p.default)) is not None
        }

    @classmethod
    def of_options(
        cls, function: Callable[..., object], options: CacheOptions, *, is_method: bool, label: str = ""
    ) -> CallSignature:
        """Make one for what options say of a function's arguments."""
        return cls(
            function,
            is_method=is_method,
            label=label,
            unbatched=options.unbatched,
            batch_dim=options.batch_dim,
            padded=dict(options.padded),
        )

    def split(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Batch:
        """Name the arguments of a call and find its samples.

        Raises:
            UncacheableError: If the call has no batch dimension or an argument that cannot be named.
            TypeError: If the call does not fit the signature; the function itself would raise the same.
        """
        if len(args) > len(self._names) and self._rest is None:
            self._signature.bind(*args, **kwargs)
        arguments: list[AnyArgument] = []
        plain: dict[str, bytes] = {"": self._label, **self._defaults}
        tuples: Tuples = {}
        for place, value in enumerate(args):
            name = self._names[place] if place < len(self._names) else f"{self._rest}[{place - len(self._names)}]"
            self._sort_argument(name, place, value, arguments, plain, tuples)
        surplus = [key for key in kwargs if key not in self._keywords]
        if len(surplus) > 1:  # code that goes through **kwargs sees their order
            plain["*"] = digest_parts(key.encode("utf-8", "surrogatepass") for key in surplus)
        for key, value in kwargs.items():
            # One that only **kwargs takes may be called like an argument that is given by position, or anything else.
            name = f"**{key}" if key in self._positional_only or not key.isidentifier() else key
            self._sort_argument(name, key, value, arguments, plain, tuples)
        if self._batch_dim is None:
            return Call(args, kwargs, arguments, plain, self._results, tuples)
        if tuples and all(argument.is_shared for argument in arguments):
            _take_for_batch(tuples, arguments, plain)
        if self._mask is not None and not any(unsupported_kind(t.tensor) for a in arguments for t in a.tensors()):
            return self._split_padded(args, kwargs, arguments, plain, tuples)
        return Batch(args, kwargs, arguments, plain, self._results, tuples)

    def _split_padded(
        self,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        arguments: Sequence[AnyArgument],
        plain: Mapping[str, bytes],
        tuples: Tuples,
    ) -> Batch:
        assert self._batch_dim is not None
        leaves = {leaf.name: leaf for a in arguments if not a.is_shared for leaf in a.tensors()}
        named = self._padded & leaves.keys()
        if not named:
            return Batch(args, kwargs, arguments, plain, self._results, tuples)
        mask = leaves.get(self._mask or "")
        if mask is None:
            raise UncacheableError(
                f"argument {min(named)!r} is padded, and the call has no tensor {self._mask!r}, which is its mask; "
                "pass one, of ones where nothing is padded",
                argument=self._mask,
            )
        spans = Spans.of_mask(mask)
        padded = [
            replace(a, leaves=[_padded(leaf, spans) if leaf.name in named else leaf for leaf in a.leaves])
            if isinstance(a, Argument)
            else a
            for a in arguments
        ]
        return PaddedBatch(args, kwargs, padded, plain, PaddedResults(self._batch_dim, spans), tuples)

    def _sort_argument(
        self,
        name: str,
        place: int | str,
        value: object,
        arguments: list[AnyArgument],
        plain: dict[str, bytes],
        tuples: Tuples,
    ) -> None:
        """Put an argument among those whose samples are told apart, or among what all samples share."""
        plain.pop(name, None)
        is_shared = name in self._unbatched or (self._rest in self._unbatched and name.startswith(f"{self._rest}["))
        batch_dim = None if is_shared else self._batch_dim
        if isinstance(value, torch.Tensor) and batch_dim is not None:
            arguments.append(Argument(name, place, [Tensors(name, value, batch_dim)]))
            return
        encoded = encode_plain_argument(name, place, value)
        if encoded is None:
            arguments.append(
                SharedArgument(name, place, value)
                if batch_dim is None
                else open_argument(name, place, value, batch_dim)
            )
            return
        plain[name] = encoded
        if isinstance(value, tuple) and batch_dim is not None:
            tuples[name] = place, value


def _take_for_batch(tuples: Tuples, arguments: list[AnyArgument], plain: dict[str, bytes]) -> None:
    """Take a tuple of str, if there is only one, for the batch of a call that has no other."""
    texts = [name for name, (_, value) in tuples.items() if is_batch_of_texts(value)]
    if len(texts) == 1:
        (name,) = texts
        place, value = tuples.pop(name)
        del plain[name]
        arguments.append(Argument(name, place, [Values(name, value)]))


def _check_names(option: str, given: Iterable[str], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"its parameters are {', '.join(names)}"
            raise ConfigError(
                f"{option} names {name!r}, which is no parameter of what is cached; {hint}", argument=option
            )


def _batch_size(arguments: Sequence[AnyArgument], tuples: Tuples) -> int:
    leaves = [leaf for argument in arguments if not argument.is_shared for leaf in argument.leaves]
    if not leaves:
        shown = " and ".join(f"list({name})" for name in tuples)
        raise UncacheableError(
            "the call has no tensor argument; a cached call needs at least one tensor of shape (batch, ...) with two "
            "dimensions or more, or a list with one plain value per sample, such as str"
            + (f": pass {shown} if each sample has its own" if shown else "")
        )
    sizes: dict[str, int] = {}
    for leaf in leaves:
        if isinstance(leaf, Values):
            sizes[leaf.name] = len(leaf.values)
            continue
        if leaf.tensor.dim() == 0:
            raise UncacheableError(
                f"argument {leaf.name!r} is a 0-d tensor and has no batch dimension; pass a plain "
                f"number ({leaf.name}.item()), expand it to (batch,), or name it in unbatched if all samples share it",
                argument=leaf.name,
            )
        if leaf.tensor.dim() <= leaf.batch_dim:
            raise UncacheableError(
                f"argument {leaf.name!r} has shape {tuple(leaf.tensor.shape)} and so no dimension {leaf.batch_dim}, "
                "which is batch_dim; name it in unbatched if all samples share it",
                argument=leaf.name,
            )
        sizes[leaf.name] = leaf.tensor.shape[leaf.batch_dim]
    flat = [leaf for leaf in leaves if isinstance(leaf, Tensors) and leaf.tensor.dim() == 1]
    if len(flat) == len(leaves):
        name = flat[0].name
        raise UncacheableError(
            f"argument {name!r} has shape {tuple(flat[0].tensor.shape)}, one dimension only, so it is "
            f"not clear which is the batch; pass {name}.unsqueeze(0) for one sample of features or "
            f"{name}.unsqueeze(1) for a batch of numbers",
            argument=name,
        )
    if len(set(sizes.values())) > 1:
        differing = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        first = next(iter(sizes))
        other = next(name for name, size in sizes.items() if size != sizes[first])
        lists = [leaf.name for leaf in leaves if isinstance(leaf, Values) and leaf.name in (other, first)]
        if lists:
            name = lists[-1]
            remedy = (
                f"a list has one value per sample: if all samples share {name!r}, pass tuple({name}) or name it in "
                "unbatched"
            )
        else:
            name = other
            remedy = (
                f"dimension {_batch_dim_of(leaves)} of every tensor must be the batch: expand shared tensors to it, or "
                "name them in unbatched"
            )
        raise UncacheableError(
            f"arguments {first!r} and {other!r} differ in their batch dimension ({differing}); {remedy}", argument=name
        )
    return sizes[leaves[0].name]


def _padded(leaf: Tensors, spans: Spans) -> PaddedTensors:
    return PaddedTensors(leaf.name, leaf.tensor, leaf.batch_dim, spans)


def _batch_dim_of(leaves: Sequence[Tensors | Values]) -> int:
    return next((leaf.batch_dim for leaf in leaves if isinstance(leaf, Tensors)), 0)


class Batch:
    """One call, seen as ``n`` samples. The arguments stay the caller's and are not changed."""

    __slots__ = (
        "_args", "_is_opaque", "_kwargs", "_leaves", "_plain", "_unsupported", "arguments", "evidence", "generators",
        "n", "results", "tensors",
    )  # fmt: skip

    #: Whether rows of several calls may be forwarded together.
    is_divisible = True

    def __init__(
        self,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        arguments: Sequence[AnyArgument],
        plain: Mapping[str, bytes],
        results: Results,
        tuples: Tuples,
    ) -> None:
        self.results = results
        self._args = args
        self._kwargs = kwargs
        #: Those that are not plain, by name however they were given.
        self.arguments = sorted(arguments, key=lambda argument: argument.name)
        self._plain = plain
        self._leaves = self._find_leaves()
        #: The tensors that hold the samples, in the order of their names.
        self.tensors = [leaf.tensor for leaf in self._leaves if isinstance(leaf, Tensors)]
        shared = [argument for argument in self.arguments if isinstance(argument, SharedArgument)]
        everywhere = [*self.tensors, *(leaf.tensor for argument in shared for leaf in argument.leaves)]
        self._unsupported = next(filter(None, map(unsupported_kind, everywhere)), None)
        self.n = 0 if self._unsupported else self._count(arguments, tuples)
        #: The random number generators in the arguments.
        self.generators = [generator for argument in shared for generator in argument.generators]
        #: What to say of the reason to go around the cache, if there is one: what cannot be seen, or which tuple may
        #: hold one value per sample and what to pass in its place.
        self.evidence = ", ".join(f"{path} is a {kind}" for argument in shared for path, kind in argument.opaque)
        self._is_opaque = bool(self.evidence)
        if not self._is_opaque and (tuples or any(argument.sequences for argument in arguments)):
            self.evidence = self._find_ambiguity(tuples)

    def _find_leaves(self) -> list[Any]:
        return [leaf for argument in self.arguments if not argument.is_shared for leaf in argument.leaves]

    def _count(self, arguments: Sequence[AnyArgument], tuples: Tuples) -> int:
        return _batch_size(arguments, tuples)

    def _find_ambiguity(self, tuples: Tuples) -> str:
        """Describe the outermost tuple of plain values that is as long as the batch; return "" if there is none."""
        found: list[tuple[str, Sequence[object], bool]] = []
        for name, (_, value) in tuples.items():
            can_be_named = name.isidentifier()
            found += [(path, items, can_be_named) for path, items in plain_sequences(name, value)]
        for argument in self.arguments:
            if not argument.is_shared:
                found += [(path, items, False) for path, items in argument.sequences]
        found = [entry for entry in found if len(entry[1]) == self.n > 0]
        if not found:
            return ""

        path, items, can_be_named = min(found, key=lambda entry: len(entry[0]))
        own = f"list({path})" if isinstance(items, tuple) else f"a list of plain values as {path}"
        name = re.split(r"[\[.]", path)[0]
        shared = f'set unbatched=("{name}",)' if can_be_named else "make it an argument that unbatched names"
        return f"{path!r} is as long as the batch: pass {own} if each sample has its own, or {shared} if all share it"

    @property
    def first_device(self) -> torch.device:
        """The device of the first tensor argument."""
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    @property
    def host_bytes(self) -> int:
        """How many bytes of samples lie in host memory."""
        return sum([tensor.nbytes for tensor in self.tensors if tensor.is_cpu])

    def bypass_reason(self) -> str | None:
        """Why this call cannot be cached whatever its state, or None."""
        if self._unsupported:
            return self._unsupported
        if self.evidence:
            return "opaque_state" if self._is_opaque else "ambiguous_tuple"
        if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001 - torch has no public test
            return "functorch_transform"  # it may wrap weights, and wraps what is made while it lasts
        if forward_ad._current_level >= 0:  # noqa: SLF001 - as above
            return "forward_mode_gradients"
        if torch.is_grad_enabled() and any(
            leaf.tensor.requires_grad
            for argument in self.arguments
            for leaf in argument.leaves
            if isinstance(leaf, Tensors)
        ):
            return "input_requires_grad"
        return None

    def shared_parts(self) -> list[tuple[str, bytes]]:
        """Return what all samples of the call have in common: plain arguments, dtypes and row shapes, by name."""
        plain = {**self._plain, **{a.name: encoded for a in self.arguments if (encoded := a.encode())}}
        parts = [(f"argument {name}" if name else "function", plain[name]) for name in sorted(plain)]
        return parts + self._forms()

    def _forms(self) -> list[tuple[str, bytes]]:
        return [leaf.describe() for leaf in self._leaves]

    def signature(self) -> bytes:
        """Return the digest of what all samples of the call have in common."""
        return digest_parts(part for name, value in self.shared_parts() for part in (name.encode(), value))

    def form(self, signature: bytes) -> bytes:
        """Return what tells namespaces of one state apart: whether rows depend on their batch is a matter of both."""
        return signature

    def digests(self, signature: bytes, keys: Sequence[bytes] | None = None) -> list[bytes]:
        """Return the 16-byte digest of each sample, in order; ``keys`` of the user's own stand for the inputs."""
        return combine(signature, [leaf.digests(self.n) for leaf in self._leaves] if keys is None else [[*keys]])

    def inputs(self, positions: Sequence[int]) -> list[bytes]:
        """Return digests of the inputs of some samples, whatever keys stand for them."""
        if len(positions) > self.n // 2:  # all at once costs less
            every = combine(bytes(DIGEST_BYTES), [leaf.digests(self.n) for leaf in self._leaves])
            return [every[p] for p in positions]
        return combine(bytes(DIGEST_BYTES), [[leaf.digest(p) for p in positions] for leaf in self._leaves])

    def rows(self, positions: Sequence[int]) -> tuple[Any, ...]:
        """Return copies of some samples' rows, as ``select`` takes them; of a padded batch, those of one sample."""
        return tuple(leaf.select(positions, None, is_range=False) for leaf in self._leaves)

    def loudest(self, positions: Sequence[int]) -> list[int]:
        """Return which of some samples have the largest number and the largest magnitude in their floating tensors."""
        floating = [leaf for leaf in self._leaves if isinstance(leaf, Tensors) and leaf.tensor.is_floating_point()]
        peaks = [leaf.peaks(positions) for leaf in floating if leaf.tensor.numel()]
        return torch.stack(peaks).amax(0).argmax(0).tolist() if peaks else []

    def select(
        self, positions: Sequence[int], extra: tuple[Any, ...] | None = None
    ) -> tuple[tuple[object, ...], dict[str, object], Results]:
        """Return the arguments of a call that has the samples at ``positions`` only, and the form of its results.

        Nothing in them that can be changed is the caller's own, unless the call is one sample.

        Args:
            positions: In the order wanted.
            extra: What ``rows`` returned for another call of the same signature: more samples, at the end.
        """
        first, last = positions[0], positions[-1]
        is_range = last - first == len(positions) - 1 and all(p == first + i for i, p in enumerate(positions))
        more = extra if extra is not None else [None] * len(self._leaves)
        rows = [leaf.select(positions, one, is_range=is_range) for leaf, one in zip(self._leaves, more, strict=True)]
        return (*self._with_leaves(rows), self.results)

    def _with_leaves(self, values: Iterable[object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return the arguments with other tensors and lists in them, in the order of ``_leaves``, and copies beside."""
        args, kwargs, rest = list(self._args), dict(self._kwargs), iter(values)
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


class PaddedBatch(Batch):
    """One call whose samples are sequences, padded to one length."""

    __slots__ = ()
    results: PaddedResults

    @property
    def spans(self) -> Spans:
        """Where the rows lie."""
        return self.results.spans

    def bypass_reason(self) -> str | None:
        return super().bypass_reason() or ("fully_masked_row" if self.spans.are_empty_somewhere else None)

    def select(
        self, positions: Sequence[int], extra: tuple[Any, ...] | None = None
    ) -> tuple[tuple[object, ...], dict[str, object], PaddedResults]:
        args, kwargs, _ = super().select(positions, extra)
        lengths = [
            row.shape[leaf.length_dim]
            for leaf, row in zip(self._leaves, extra or (), strict=False)
            if isinstance(leaf, PaddedTensors)
        ]
        spans = self.spans.select(positions, lengths[0] if lengths else None)
        return args, kwargs, self.results.at(spans)

    def alone(self, position: int, width: int) -> tuple[tuple[object, ...], dict[str, object], PaddedResults]:
        """Return the arguments of a call that has one sample only, padded or cut to ``width`` positions."""
        rows = [leaf.select([position], None, is_range=True) for leaf in self._leaves]
        rows = [
            leaf.widen(row, width) if isinstance(leaf, PaddedTensors) else row
            for leaf, row in zip(self._leaves, rows, strict=True)
        ]
        return (*self._with_leaves(rows), self.results.at(self.spans.alone(position, width)))


class Call(Batch):
    """One call that is one sample, whatever its arguments: all of them count by value."""

    __slots__ = ()
    is_divisible = False

    def _find_leaves(self) -> list[Any]:
        return [leaf for argument in self.arguments for leaf in argument.leaves]

    def _count(self, arguments: Sequence[AnyArgument], tuples: Tuples) -> int:  # noqa: ARG002 - as of Batch
        return 1

    def _forms(self) -> list[tuple[str, bytes]]:
        return []

    def form(self, signature: bytes) -> bytes:  # noqa: ARG002 - as of Batch
        return b"call"

    def digests(self, signature: bytes, keys: Sequence[bytes] | None = None) -> list[bytes]:  # noqa: ARG002 - as of Batch
        return [signature]

    def select(
        self,
        positions: Sequence[int],  # noqa: ARG002 - as of Batch
        extra: tuple[Any, ...] | None = None,  # noqa: ARG002
    ) -> tuple[tuple[object, ...], dict[str, object], Results]:
        return self._args, dict(self._kwargs), self.results
