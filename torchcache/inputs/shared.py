"""Arguments that all samples of a call share: they count by value, whatever they are."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchcache.inputs.arguments import refuse_module
from torchcache.inputs.leaves import Tensors
from torchcache.keys.code import walk_code
from torchcache.keys.digest import digest_parts
from torchcache.keys.observer import Observer
from torchcache.keys.operators import operators_at
from torchcache.keys.origins import is_own_class, is_own_module
from torchcache.keys.places import Name
from torchcache.keys.plain import BRINGS_CODE, classes_in, encode_plain
from torchcache.keys.tensor_kinds import unsupported_kind
from torchcache.keys.time_limit import TakesTooLongError
from torchcache.keys.values import encode_name, encode_value
from torchcache.keys.walked import CodeWalk


class SharedArgument:
    """An argument of a call that is one sample, or one that ``unbatched`` names.

    Args:
        name: Of the parameter.
        place: Index into args, or key of kwargs.
        value: The argument.

    Attributes:
        leaves: The tensors in it.
        opaque: Where it holds something that cannot be seen, and of what type.
        generators: The random number generators in it.

    Raises:
        UncacheableError: If it is a module.
    """

    is_shared = True
    sequences: Sequence[tuple[str, Sequence[object]]] = ()

    __slots__ = ("_encoded", "_value", "generators", "leaves", "name", "opaque", "place")

    def __init__(self, name: str, place: int | str, value: object) -> None:
        refuse_module(name, value)
        self.name: str = name
        self.place: int | str = place
        self._value = value
        seen = _Seen()
        self._encoded = self._encode(seen)
        self.leaves: list[Tensors] = [Tensors(path, tensor) for path, tensor in seen.tensors]
        self.opaque: list[tuple[str, str]] = seen.opaque
        self.generators: list[object] = seen.generators

    def tensors(self) -> list[Tensors]:
        """Return the tensors in it."""
        return self.leaves

    def encode(self) -> bytes:
        """Return the bytes of all of it, as it was when the call came."""
        return self._encoded

    def has_changed(self) -> bool:
        """Tell whether it is another value now."""
        return self._encode(_Seen()) != self._encoded

    def copied(self) -> object:
        """Return a copy of it, as far as it is made of tensors, arrays and built-in containers."""
        return _copied(self._value, 0)

    def _encode(self, seen: _Seen) -> bytes:
        encoded = encode_value(self._value, self.name, seen)
        return digest_parts([b"shared", encoded, *seen.codes()])


def encode_plain_argument(name: str, place: int | str, value: object) -> bytes | None:
    """Return the bytes of a plain argument, with code of the user's own that it brings; None for one that is not."""
    encoded = encode_plain(value)
    if encoded is None or not isinstance(value, BRINGS_CODE) or not any(map(is_own_class, classes_in(value))):
        return encoded
    return SharedArgument(name, place, value).encode()


def _copied(value: Any, depth: int) -> Any:  # noqa: ANN401 - of any kind
    if isinstance(value, torch.Tensor):
        clone = value.detach().clone()
        vars(clone).update(_copied(vars(value), depth + 1))  # code may read what somebody hung on it
        return clone
    if type(value) in (np.ndarray, bytearray):
        return value.copy()
    if depth == _DEEPEST:
        return value
    if type(value) in (list, tuple, set):
        return type(value)(_copied(item, depth + 1) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item, depth + 1)) for key, item in value.items())
    return value  # code may ask whether it is this very object


#: Containers in containers are copied this deep.
_DEEPEST = 32


class _Seen(Observer):
    """What an encoding of an argument comes upon."""

    #: A generator that is handed over may be copied, which draws nothing.
    counts_generators = True

    def __init__(self) -> None:
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.opaque: list[tuple[str, str]] = []
        self.generators: list[object] = []
        self._own: dict[Any, None] = {}  # classes and modules of the user's own, and operators
        self._walked: set[object] = set()  # whose globals are being encoded

    def refer(self, value: torch.nn.Module | torch.Tensor, path: str) -> bytes | None:
        if not isinstance(value, torch.Tensor):
            self.note_opaque(path, value)
            return b"module"
        self.tensors.append((path, value))
        return None if unsupported_kind(value) is None else b"unsupported"

    def code_of(self, function: types.FunctionType) -> bytes:
        return self._encode_code(function)

    def note_code(self, code: object) -> None:
        if isinstance(code, type):
            is_own = is_own_class(code)
        else:
            is_own = isinstance(code, types.ModuleType) and is_own_module(code.__name__)
        if is_own or operators_at(code) is not None:
            self._own.setdefault(code)

    def note_opaque(self, path: str, value: object) -> None:
        self.opaque.append((path, type(value).__qualname__))

    def note_generator(self, generator: object) -> None:
        self.generators.append(generator)

    def codes(self) -> list[bytes]:
        """Return the bytes of the code of the user's own classes and modules, and of what runs behind operators."""
        return [self._encode_code(code) for code in [*self._own]]

    def _encode_code(self, code: Any) -> bytes:  # noqa: ANN401 - a function, or one of those
        """Encode a function, class or module: its code, the helpers that it calls, and the globals that these read."""
        if code in self._walked:
            return b"again"
        self._walked.add(code)
        walk = _walk_of(code)
        if walk is None:
            self.note_opaque(code.__name__, code)
            return b"takes too long"
        values = list(map(self._encode_name, walk.names))
        self.opaque += [(name, "operator of which it is not known what runs") for name in walk.unseen]
        self._walked.discard(code)
        return digest_parts([walk.fingerprint, *values])

    def _encode_name(self, name: Name) -> bytes:
        return encode_name(name, lambda value: encode_value(value, name.label, self), self.opaque)


#: The walks from code in arguments, the latest last.
_walks: OrderedDict[Any, CodeWalk | None] = OrderedDict()
_MOST_WALKS = 256


def _walk_of(code: Any) -> CodeWalk | None:  # noqa: ANN401 - as of _Seen
    """Walk from code, or return the walk of an earlier call, if nothing has changed since.

    None if that takes too long; it is not tried again.
    """
    is_new = code not in _walks
    walk = _walks.pop(code, None)
    if is_new or (walk is not None and walk.has_changed()):
        try:
            walk = walk_code(code)
        except TakesTooLongError:
            walk = None
    _walks[code] = walk
    if len(_walks) > _MOST_WALKS:
        _walks.popitem(last=False)
    return walk
