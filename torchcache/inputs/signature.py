"""The arguments of a call by the names of its parameters: those with samples, and what all samples share."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from torchcache.errors import ConfigError
from torchcache.inputs.arguments import FREQUENT, Argument, open_argument
from torchcache.inputs.batch import Batch, Call, CallArguments
from torchcache.inputs.leaves import Tensors, Values
from torchcache.inputs.padded import padded_batch
from torchcache.inputs.shared import SharedArgument, encode_plain_argument
from torchcache.inputs.tuples import argument_of, name_of_texts
from torchcache.keys.digest import digest_parts
from torchcache.keys.plain import encode_plain
from torchcache.keys.tensor_kinds import unsupported_kind
from torchcache.options import CacheOptions
from torchcache.results.batches import Results
from torchcache.results.whole_calls import CallResults

_NONE = encode_plain(None) or b""

#: How a call with a single text lies in its result: it may return anything.
_RESULTS_OF_TEXT = CallResults()


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
        self._batch_dim = batch_dim
        self._results = CallResults() if batch_dim is None else Results(batch_dim)
        self._signature = _signature_of(function, is_method=is_method)
        self._parameters = _Parameters.of(self._signature)
        self._unbatched = frozenset(unbatched)

        padded = padded or {}
        self._padded = frozenset({*padded, *padded.values()})
        self._mask = next(iter(padded.values()), None)
        self._plain_forms: dict[int, _PlainForm] = {}  # by the number of arguments
        if not self._parameters.takes_any_keyword:
            names = list(self._signature.parameters)
            _check_names("unbatched", unbatched, names)
            _check_names("padded", map(argument_of, (*padded, *padded.values())), names)

        #: What all samples of any call share.
        self._shared = {"": (f"{label} along {batch_dim}" if batch_dim else label).encode()}
        for parameter in self._signature.parameters.values():
            if parameter.default is not parameter.empty:
                encoded = encode_plain_argument(parameter.name, parameter.name, parameter.default)
                if encoded is not None:  # one that is not plain is part of the code and counts there
                    self._shared[parameter.name] = encoded

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
        given = self._sort(args, kwargs)
        if self._batch_dim is None:
            return Call(given, self._results)

        if all(argument.is_shared for argument in given.others):
            if self._is_single_text(args, kwargs):
                return Call(given, _RESULTS_OF_TEXT)
            _take_texts_for_batch(given)
        if self._mask is not None and not _has_unsupported(given):
            batch = padded_batch(given, self._padded, self._mask, self._batch_dim)
            if batch is not None:
                return batch
        return Batch(given, self._results)

    def digests_of_plain(self, calls: Sequence[tuple[object, ...]]) -> list[bytes] | None:
        """Return the digest of each of many calls that are one sample each and have plain arguments, by position.

        It is the one that ``split`` leads to, at a tenth of the cost.

        Returns:
            The digests; None if an argument is of another kind, or there are too many.
        """
        digests: list[bytes] = []
        for args in calls:
            form = self._plain_forms.get(len(args)) or self._plain_form(len(args))
            parts = list(form.parts)
            if len(args) > len(form.places):
                return None
            for place, value in zip(form.places, args, strict=True):
                if type(value) not in FREQUENT:
                    return None
                parts[place] = _NONE if value is None else encode_plain(value) or b""
            digests.append(digest_parts(parts))
        return digests

    def _plain_form(self, n: int) -> _PlainForm:
        """Return the form of a call with ``n`` plain arguments by position."""
        names = self._parameters.positional[:n]
        given = CallArguments((), {}, {**self._shared, **dict.fromkeys(names, b"")})
        parts: list[bytes] = []
        places: dict[str, int] = {}
        for label, value in Call(given, self._results).shared_parts():
            places[label] = len(parts) + 1
            parts += [label.encode(), value]
        form = _PlainForm(parts, [places[f"argument {name}"] for name in names])
        self._plain_forms[n] = form
        return form

    def _is_single_text(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Tell whether a call that has no batch has a text where others have it: as the first argument.

        What the function makes of one text, only itself knows: encode("a") of sentence-transformers returns an
        embedding, not a batch of one. So the call is one sample, which counts by value with all its arguments.
        """
        names = self._parameters.positional
        first = args[0] if args else kwargs.get(names[0]) if names else None
        return isinstance(first, str)

    def _sort(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> CallArguments:
        """Name the arguments of a call, and encode the plain ones."""
        given = CallArguments(args, kwargs, dict(self._shared))
        parameters = self._parameters
        n_names = len(parameters.positional)
        if len(args) > n_names and parameters.rest is None:
            self._signature.bind(*args, **kwargs)
        for place, value in enumerate(args):
            name = parameters.positional[place] if place < n_names else f"{parameters.rest}[{place - n_names}]"
            self._sort_argument(name, place, value, given)

        surplus: list[bytes] = []
        for key, value in kwargs.items():
            # One that only **kwargs takes may be called like an argument that is given by position, or anything else.
            name = f"**{key}" if key in parameters.positional_only or not key.isidentifier() else key
            self._sort_argument(name, key, value, given)
            if key not in parameters.keywords:
                surplus.append(key.encode("utf-8", "surrogatepass"))
        if len(surplus) > 1:  # code that goes through **kwargs sees their order
            given.plain["*"] = digest_parts(surplus)
        return given

    def _sort_argument(self, name: str, place: int | str, value: object, given: CallArguments) -> None:
        """Put an argument among those whose samples are told apart, or among what all samples share."""
        given.plain.pop(name, None)  # the default
        batch_dim = None if self._is_unbatched(name) else self._batch_dim
        if isinstance(value, torch.Tensor) and batch_dim is not None:
            given.others.append(Argument(name, place, [Tensors(name, value, batch_dim)]))
            return

        encoded = encode_plain_argument(name, place, value)
        if encoded is not None:
            given.plain[name] = encoded
            if isinstance(value, tuple) and batch_dim is not None:
                given.tuples[name] = place, value
        elif batch_dim is None:
            given.others.append(SharedArgument(name, place, value))
        else:
            given.others.append(open_argument(name, place, value, batch_dim))

    def _is_unbatched(self, name: str) -> bool:
        """Tell whether all samples share an argument, whatever it is."""
        if name in self._unbatched:
            return True
        rest = self._parameters.rest
        return rest in self._unbatched and name.startswith(f"{rest}[")


@dataclass(frozen=True, slots=True)
class _PlainForm:
    """What is digested of a call with so many plain arguments by position.

    Attributes:
        parts: As ``digest_named`` has them, empty for the arguments.
        places: Where each argument goes.
    """

    parts: Sequence[bytes]
    places: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The names of a function's parameters.

    Attributes:
        positional: Those that take a positional argument each.
        positional_only: Those that take no other.
        keywords: Those that take an argument by keyword.
        rest: The one that takes all other positional arguments.
        takes_any_keyword: Whether one takes all other arguments by keyword.
    """

    positional: Sequence[str]
    positional_only: frozenset[str]
    keywords: frozenset[str]
    rest: str | None
    takes_any_keyword: bool

    @classmethod
    def of(cls, signature: inspect.Signature) -> _Parameters:
        by_kind: dict[object, list[str]] = {kind: [] for kind in inspect._ParameterKind}  # noqa: SLF001
        for parameter in signature.parameters.values():
            by_kind[parameter.kind].append(parameter.name)

        positional_only = by_kind[inspect.Parameter.POSITIONAL_ONLY]
        either = by_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]
        rest = by_kind[inspect.Parameter.VAR_POSITIONAL]
        return cls(
            positional=(*positional_only, *either),
            positional_only=frozenset(positional_only),
            keywords=frozenset({*either, *by_kind[inspect.Parameter.KEYWORD_ONLY]}),
            rest=rest[0] if rest else None,
            takes_any_keyword=bool(by_kind[inspect.Parameter.VAR_KEYWORD]),
        )


def _signature_of(function: Callable[..., object], *, is_method: bool) -> inspect.Signature:
    """Return the signature of a function, without what is bound already."""
    parameters = list(inspect.signature(function).parameters.values())
    if is_method and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    return inspect.Signature(parameters)


def _check_names(option: str, given: Iterable[str], names: Sequence[str]) -> None:
    for name in given:
        if name in names:
            continue
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"its parameters are {', '.join(names)}"
        raise ConfigError(f"{option} names {name!r}, which is no parameter of what is cached; {hint}", argument=option)


def _has_unsupported(given: CallArguments) -> bool:
    """Tell whether there is a tensor in the arguments that has no plain bytes."""
    for argument in given.others:
        for leaf in argument.tensors():
            if unsupported_kind(leaf.tensor):
                return True
    return False


def _take_texts_for_batch(given: CallArguments) -> None:
    """Take a tuple of str, if there is only one, for the batch of a call that has no other."""
    name = name_of_texts(given.tuples)
    if name is not None:
        place, value = given.tuples.pop(name)
        del given.plain[name]
        given.others.append(Argument(name, place, [Values(name, value)]))
