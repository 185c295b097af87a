"""Programs that call a cached module or function, as data: text, how it is used, one call.

A ``Side`` is one program with one call. It pickles, so another interpreter can run it. ``Running`` runs it with a
cache or without. What a program does is arithmetic on bounded numbers, whatever bits its inputs have.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import struct
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from torchcache import Cache, CacheStats, Explanation, cache_of, torchcache

_FLUSH_SECONDS = 60.0
_JOIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One program and one call of it.

    Attributes:
        door: "class", "instance" or "function": what is decorated.
        blocks: The text in pieces, by name, with slots such as ``@global.G0@``.
        slots: What stands in the slots.
        make: An expression, with slots too, that makes what is called.
        edits: Statements that change it afterwards; ``target`` is the module or the function itself.
        options: Of the cache.
        names: The parameters of what is called, in order.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        mode: One of ``MODES``, in which the call is made.
    """

    door: str
    blocks: Mapping[str, str]
    slots: Mapping[str, str]
    make: str
    edits: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mode: str = ""

    @property
    def text(self) -> str:
        """The program's source text."""
        return "\n".join(self.block(name) for name in self.blocks)

    @property
    def made_by(self) -> str:
        """The expression that makes the target."""
        return self.fill(self.make)

    def block(self, name: str) -> str:
        """Return one piece of the text."""
        return self.fill(self.blocks[name])

    def fill(self, text: str) -> str:
        """Put into each slot what stands there, which may have slots of its own."""
        return _SLOT.sub(lambda match: self.fill(self.slots[match[1]]), text)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the call by name, with what stands for those left out."""
        given = dict(zip(self.names, self.args, strict=False)) | dict(self.kwargs)
        return {name: given[name] if name in given else self._default(name) for name in self.names}

    def _default(self, name: str) -> object:
        literal = self.slots.get(f"default.{name}")
        return None if literal is None else value_of(literal)

    def start(self, directory: Path | None) -> Running:
        """Run the program."""
        return Running(self, directory)

    def shown(self) -> str:
        """Return all of it for a reader."""
        lines = [self.text, f"target = {self.made_by}"]
        lines += [f"# door {self.door}, options {dict(self.options)!r}, mode {self.mode!r}"]
        lines += [*self.edits, f"# args {self.args!r}", f"# kwargs {dict(self.kwargs)!r}"]
        return "\n".join(lines)


def value_of(literal: str) -> Any:  # noqa: ANN401 - any plain value
    """Return the value of a literal that needs no program."""
    return eval(literal, {"torch": torch, "HTTPStatus": HTTPStatus})


_SLOT = re.compile(r"@([a-z]\w*(?:\.\w+)*)@")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call gave.

    Attributes:
        keys: Of each sample, namespace and digest as ``explain`` says them; none without a cache.
        rows: The bytes of each sample's result, with dtypes and shapes.
        forwarded: The arguments with which the user's own function ran meanwhile.
        misses: How many samples the cache says it computed.
        trouble: Bypasses, faults and dropped rows, which no case expects.
    """

    keys: tuple[str, ...]
    rows: tuple[bytes, ...]
    forwarded: tuple[Mapping[str, Any], ...]
    misses: int = 0
    trouble: str = ""

    @classmethod
    def of_call(
        cls,
        explained: Explanation,
        rows: tuple[bytes, ...],
        forwarded: tuple[Mapping[str, Any], ...],
        before: CacheStats,
        after: CacheStats,
    ) -> Answer:
        """Return what a call gave that a cache was asked for."""
        keys = tuple(f"{explained.namespace} {sample.digest}" for sample in explained.samples)
        trouble = {"bypasses": after.bypasses, "faults": after.faults, "dropped": after.dropped_rows}
        shown = ", ".join(f"{name} {dict(counts)}" for name, counts in trouble.items() if counts)
        return cls(keys, rows, forwarded, after.misses - before.misses, shown)


def commit_and_close(cache: Cache) -> None:
    """Commit what is to be stored, and let go of it.

    Raises:
        TimeoutError: If that takes too long.
    """
    if not cache.flush(_FLUSH_SECONDS):
        raise TimeoutError(f"the queue was not committed within {_FLUSH_SECONDS} s")
    cache.close()


class Running:
    """A program that runs in this process.

    Args:
        side: The program; its call is not made yet.
        directory: Of a persistent cache; None for one in memory.
        is_cached: False runs it as it is written.
    """

    def __init__(self, side: Side, directory: Path | None = None, *, is_cached: bool = True) -> None:
        self._names: dict[str, Any] = {"__name__": "program"}
        for name in side.blocks:  # one by one: what many programs share is compiled once
            exec(_compiled(side.block(name)), self._names)
        decorate: Callable[[Any], Any] = _leave
        if is_cached:
            options: dict[str, Any] = dict(side.options)
            if directory is not None:
                options |= {"persistent": True, "persistent_cache_dir": directory, "flush_timeout_seconds": 60.0}
            decorate = torchcache(**options)
        if side.door == "class":
            decorate(self._names["Net"])
        target = eval(_compiled_expression(side.made_by), self._names)
        self._names["target"] = target
        self._called = target if side.door == "class" else decorate(target)
        self._is_cached = is_cached
        self.edit(side.edits)

    @property
    def cache(self) -> Cache:
        """The cache of what is called."""
        return cache_of(self._called)

    def edit(self, statements: tuple[str, ...]) -> None:
        """Change the program while it runs."""
        for statement in statements:
            exec(_compiled(statement), self._names)

    def copy(self) -> None:
        """Go on with a deep copy of the module."""
        self._called = self._names["target"] = self._names["deepcopy"](self._called)

    def call(self, side: Side) -> Answer:
        """Make the call of a side, in its mode, and look afterwards at the key: the call must notice by itself."""
        ran: list[Mapping[str, Any]] = self._names["RAN"]
        ran.clear()
        before = self.cache.stats() if self._is_cached else None
        with MODES[side.mode]():
            result = _run(self._called, side)
            if before is None:
                return Answer((), rows_of(_rounded(result, side.options.get("cache_dtype"))), ())
            rows, forwarded = rows_of(result), tuple(ran)
            for tensor in _tensors_of(result):
                tensor.fill_(77)  # it is the caller's own: no later hit may show that
            with contextlib.redirect_stdout(io.StringIO()):
                explained = self.cache.explain(*side.args, **side.kwargs)
        return Answer.of_call(explained, rows, forwarded, before, self.cache.stats())

    def close(self) -> None:
        """Commit what is to be stored, and let go of it.

        Raises:
            TimeoutError: If that takes too long.
        """
        commit_and_close(self.cache)


def _leave(target: object) -> object:
    return target


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> types.CodeType:
    return compile(text, "<program>", "exec", dont_inherit=True)


@functools.lru_cache(maxsize=256)
def _compiled_expression(text: str) -> types.CodeType:
    return compile(text, "<program>", "eval", dont_inherit=True)


def _run(called: Callable[..., object], side: Side) -> object:
    if side.mode != "thread":
        return called(*side.args, **side.kwargs)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(called(*side.args, **side.kwargs)), daemon=True)
    thread.start()
    thread.join(_JOIN_SECONDS)
    return results[0]


# -- modes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _setting(get: Callable[[], Any], put: Callable[[Any], None], value: object) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def _precision(value: str) -> Iterator[None]:
    """Set the precision of float32 matrix products; to set it back leaves marks that are taken away here."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend in ("cuda", "mkldnn"):
            torch._C._set_fp32_precision_setter(backend, "matmul", "none")


@contextlib.contextmanager
def _backend_precision(value: str) -> Iterator[None]:
    """Set the precision of float32 matrix products in the way of torch 2.9, or in the old one before."""
    if not hasattr(torch._C, "_set_fp32_precision_setter"):
        with _precision("medium"):
            yield
        return
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", value)
    try:
        yield
    finally:
        torch._C._set_fp32_precision_setter("mkldnn", "matmul", "none")


#: What is in force while a call is made. The first ones change the key, those at the end do not.
MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast_half": lambda: torch.autocast("cpu", torch.float16),
    "double": lambda: _setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "precision": lambda: _precision("medium"),
    "backend_precision": lambda: _backend_precision("bf16"),
    "fastpath": lambda: _setting(
        torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, value=False
    ),
    "deterministic": lambda: _setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, value=True
    ),
    "thread": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


# -- what makes two samples the same, said without the library -----------------------------------------------------


def identify(arguments: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Return what identifies each sample of a call with these arguments by name."""
    tensors = {name: value for name, value in sorted(arguments.items()) if isinstance(value, torch.Tensor)}
    common = [(name, identity_of(value)) for name, value in sorted(arguments.items()) if name not in tensors]
    common += [(name, (str(tensor.dtype), tuple(tensor.shape[1:]))) for name, tensor in tensors.items()]
    head = repr(common).encode()
    parts = zip(*(bytes_of(tensor) for tensor in tensors.values()), strict=True)
    return tuple(hashlib.blake2b(repr((head, part)).encode()).digest() for part in parts)


def identity_of(value: object) -> object:
    """Return type and value of a plain argument; bits decide of a number."""
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, complex):
        return "complex", struct.pack("<dd", value.real, value.imag)
    if isinstance(value, tuple):
        return "tuple", tuple(map(identity_of, value))
    return type(value).__name__, repr(value)


def is_ambiguous(value: object, n: int) -> bool:
    """Tell whether a plain argument may be one value per sample of a batch: the call goes around the cache then."""
    return isinstance(value, tuple) and (len(value) == n or any(is_ambiguous(item, n) for item in value))


def bytes_of(tensor: torch.Tensor) -> list[bytes]:
    """Return the bytes of each row."""
    if not tensor.numel():
        return [b""] * len(tensor)
    # contiguous() leaves a dimension of one element any stride, which view() refuses
    raw = tensor.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy()
    return [row.tobytes() for row in raw.reshape(len(tensor), -1)]


def rows_of(result: object) -> tuple[bytes, ...]:
    """Return each sample's part of a result, as bytes that name dtypes and shapes."""
    tensors = _tensors_of(result)
    heads = repr((type(result).__name__, [(tensor.dtype, tensor.shape[1:]) for tensor in tensors])).encode()
    return tuple(b"".join((heads, *parts)) for parts in zip(*map(bytes_of, tensors), strict=True))


def _tensors_of(result: Any) -> list[torch.Tensor]:  # noqa: ANN401 - whatever a program returns
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result.values()) if isinstance(result, dict) else list(result)


def _rounded(result: Any, dtype: object) -> Any:  # noqa: ANN401
    """Return a result as a cache gives it that keeps values in another dtype."""
    if not isinstance(dtype, torch.dtype):
        return result
    if isinstance(result, torch.Tensor):
        return result.to(dtype).to(result.dtype) if result.is_floating_point() else result
    if isinstance(result, dict):
        return {name: _rounded(value, dtype) for name, value in result.items()}
    return type(result)(_rounded(value, dtype) for value in result)
