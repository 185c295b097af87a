"""Functions that answer with a digest of everything they are given, and calls of them in any form, as data.

A ``Form`` is one call. It pickles, so another interpreter can make it. What is answered for a sample is a function of
all that the sample's call says of it, in whole numbers: it does not depend on the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from stress.programs import Answer, bytes_of, commit_and_close, identity_of
from stress.trees import (
    Couple,
    Frame,
    FrozenInputs,
    Inputs,
    Pair,
    Rows,
    Sequences,
    Values,
    build,
    choose_rows,
    parts_of,
)
from stress.trees import places as places_in
from torchcache import Cache, cache_of, sample_keys, torchcache

#: The parameters that may be given by position.
POSITIONAL = ("a", "b", "c")
#: How a result follows the length of its sequences: as many dimensions behind the batch as its name says.
_FOLLOWING = {"states": 1, "pairs": 2}
_NUMBERS = 4
_CLASSES = (Pair, Couple, Inputs, FrozenInputs)

RAN: list[int] = []  # samples of each forward; what the code changes itself does not count


class Answers(nn.Module):
    """Answers with what it is given.

    Args:
        batch_dim: Where the batch lies; None if a call is one sample.
        unbatched: Arguments that all samples share.
        padded: Names of padded tensors, the mask's last; none if nothing is padded.
        result: Which form the answer has.
        classes: Of its results, to be known before one is computed.
    """

    def __init__(
        self, batch_dim: int | None, unbatched: tuple[str, ...], padded: tuple[str, ...], result: str,
        classes: tuple[type, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        self.classes = classes
        self.batch_dim = batch_dim
        self.unbatched = unbatched
        self.padded = padded
        self.result = result
        self.salt: object = None

    def forward(self, a: Any, b: Any = None, c: Any = 0, *, d: Any = None, **more: Any) -> Any:  # noqa: ANN401
        return answer(self, {"a": a, "b": b, "c": c, "d": d, **more}, list(more))


class Sums(nn.Module):
    """A function that sees nothing of how it is cached."""

    def __init__(self) -> None:
        super().__init__()
        self.salt: object = None

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        RAN.append(1)
        return a * 3 + b


def answer(asked: Answers, given: Mapping[str, Any], more: list[str]) -> Any:  # noqa: ANN401 - a result of any form
    """Answer a call; ``more`` names what the function has no parameters for, in order."""
    common: list[object] = [identity_of(asked.salt), more]
    columns: list[list[bytes]] = []
    parts = [(name, *part) for name, value in given.items() for part in parts_of(value, name)]
    spans = _spans({path: value for _, path, value in parts}[asked.padded[-1]], asked.batch_dim) if asked.padded else []
    for name, path, value in parts:
        if asked.batch_dim is None or name in asked.unbatched or not isinstance(value, (torch.Tensor, list)):
            common.append((path, _identity(value)))
        elif isinstance(value, list) and value:
            common.append((path, "values"))
            columns.append([repr(identity_of(item)).encode() for item in value])
        elif isinstance(value, torch.Tensor):
            rows = value.movedim(asked.batch_dim, 0)
            is_padded = path in asked.padded
            common.append((path, str(value.dtype), tuple(rows.shape[2 if is_padded else 1 :])))
            parts_of_rows = bytes_of(rows)
            if is_padded:
                step = len(parts_of_rows[0]) // rows.shape[1]
                parts_of_rows = [
                    row[start * step : end * step] for row, (start, end) in zip(parts_of_rows, spans, strict=True)
                ]
            columns.append(parts_of_rows)
    digests = [
        hashlib.blake2b(repr((common, row)).encode(), digest_size=8 * _NUMBERS).digest()
        for row in (zip(*columns, strict=True) if columns else [()])
    ]
    RAN.append(len(digests))
    if asked.batch_dim is None:
        return _WHOLE_RESULTS[digests[0][0] % len(_WHOLE_RESULTS)](digests[0])
    rows = torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy()).view(-1, _NUMBERS)
    if asked.padded:
        width = next(v for _, path, v in parts if path == asked.padded[-1]).shape[1 - asked.batch_dim]
        return _padded_result(asked, rows, spans, width)
    return _result(asked, rows, hashlib.blake2b(repr(common).encode()).hexdigest())


def _result(asked: Answers, rows: torch.Tensor, text: str) -> Any:  # noqa: ANN401
    dim = asked.batch_dim or 0
    turned, small = rows.movedim(0, dim), (rows[:, None] % 127).to(torch.int8).movedim(0, dim)
    if asked.result == "dict":
        return {"rows": turned, "text": text, "more": [small, 2.5, None]}
    if asked.result == "pair":
        return Pair(turned, Inputs(small, text))
    if asked.result == "halves":
        return (rows % 2048).half().movedim(0, dim), turned
    return turned


def _padded_result(asked: Answers, rows: torch.Tensor, spans: list[tuple[int, int]], width: int) -> Any:  # noqa: ANN401
    n = len(rows)
    states = torch.full((n, width, 2), 7, dtype=torch.int64)  # what the padding holds is no result
    pairs = torch.full((n, width, width), 7, dtype=torch.int64)
    for i, (start, end) in enumerate(spans):
        steps = torch.arange(1, end - start + 1)
        states[i, start:end] = rows[i, :2] * steps[:, None]
        pairs[i, start:end, start:end] = rows[i, 2] * steps[:, None] + rows[i, 3] * steps
    dim = asked.batch_dim or 0
    named = {"states": states.movedim(0, dim), "pooled": rows.movedim(0, dim)}
    if asked.result == "dict":
        return named | {"pairs": pairs.movedim(0, dim), "text": "plain"}
    return [named["states"]] if asked.result == "pair" else named


def _spans(mask: torch.Tensor, batch_dim: int | None) -> list[tuple[int, int]]:
    rows = mask.movedim(batch_dim or 0, 0) != 0
    return [(min(real), max(real) + 1) for real in ([i for i, r in enumerate(row.tolist()) if r] for row in rows)]


def _identity(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), b"".join(bytes_of(value[None]))
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.generic):
        return "scalar", value.dtype.str, value.tobytes()
    if isinstance(value, Image.Image):
        return "image", value.mode, value.size, value.tobytes(), value.getpalette()
    return ("values", [identity_of(item) for item in value]) if isinstance(value, list) else identity_of(value)


_Digest = bytes


def _numbers(digest: _Digest, dtype: str = "int16") -> np.ndarray[Any, Any]:
    numbers: np.ndarray[Any, Any] = np.frombuffer(digest, dtype).copy()
    return numbers


def _image(digest: _Digest, mode: str) -> Image.Image:
    image = Image.fromarray(_numbers(digest, "uint8").reshape(4, 8))
    return image.convert(mode)


#: Results of a call that is one sample; all but the last ones hold the whole digest.
_WHOLE_RESULTS = (
    lambda digest: torch.from_numpy(_numbers(digest)),
    lambda digest: torch.from_numpy(_numbers(digest, "int64"))[0],
    lambda digest: torch.from_numpy(_numbers(digest, "uint8")).view(torch.bfloat16).view(2, 8),
    lambda digest: (torch.from_numpy(_numbers(digest)).view(4, 4).t(), digest.hex(), 3),
    lambda digest: {"array": _numbers(digest, ">u4").reshape(2, 4), "label": digest[0], "none": None},
    lambda digest: np.asfortranarray(_numbers(digest).reshape(4, 4)),
    lambda digest: [_numbers(digest, "float64")[0], np.bool_(True), digest],
    lambda digest: np.array([digest.hex(), "é"]),
    lambda digest: _image(digest, "L"),
    lambda digest: Pair(_image(digest, "RGB"), [_image(digest, "1"), _image(digest, "P")]),
    lambda digest: Inputs(digest.hex(), {"image": _image(digest, "F"), (1, "k"): -0.0}),
    lambda digest: FrozenInputs(int.from_bytes(digest, "big"), Couple(torch.empty(0, 3), ())),
    lambda digest: digest.decode("latin-1") + "\ud800",
    lambda digest: digest,
    lambda digest: int.from_bytes(digest, "big", signed=True),
    lambda digest: [float.fromhex("0x1p-1074"), complex(*_numbers(digest, "int32")[:2].tolist()), digest.hex()],
    lambda digest: float(_numbers(digest, "int64")[0]),
    lambda digest: bool(digest[1] % 2),
    lambda _: None,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One call.

    Attributes:
        args: The arguments by name, as trees, in the order in which they are given.
        n_positional: So many of ``POSITIONAL`` are given by position.
        batch_dim: As the cache's option.
        unbatched: As the cache's option.
        padded: As the cache's option, pairs of names.
        frame: How sequences are padded; None where there are none.
        ids: One key a sample; None where the digests of the inputs are the keys.
        ids_form: One of ``ID_FORMS``.
        result: Which form the answers have.
        salt: A plain attribute of the module.
        is_blind: Whether the function sees nothing of the options: then it is ``Sums``.
        is_function: Whether a function is cached, and not a module.
        do_check: The cache's option ``check_rows``.
    """

    args: Mapping[str, Any]
    n_positional: int = 0
    batch_dim: int | None = 0
    unbatched: tuple[str, ...] = ()
    padded: tuple[tuple[str, str], ...] = ()
    frame: Frame | None = None
    ids: tuple[Any, ...] | None = None
    ids_form: str = "list"
    result: str = "tensor"
    salt: Any = None
    is_blind: bool = False
    is_function: bool = False
    do_check: bool = True

    @property
    def n(self) -> int:
        """The number of samples."""
        if self.batch_dim is None:
            return 1
        sizes = {size for _, leaf in self.leaves() if (size := _size_of(leaf)) is not None}
        (n,) = sizes
        return n

    def leaves(self) -> Iterator[tuple[tuple[str, tuple[int, ...]], Any]]:
        """Yield every place in the arguments and what is there."""
        for name, tree in self.args.items():
            for at, value in places_in(tree):
                yield (name, at), value

    def start(self, directory: Path | None) -> Answering:
        """Make what is called, with a cache."""
        return Answering(self, directory)

    def choose(self, positions: list[int]) -> Form:
        """Return the call with some of its samples."""
        frame = self.frame and replace(self.frame, starts=tuple(self.frame.starts[p] for p in positions))
        return replace(
            self,
            args={
                name: tree if name in self.unbatched else choose_rows(tree, positions)
                for name, tree in self.args.items()
            },
            frame=frame,
            ids=self.ids and tuple(self.ids[p] for p in positions),
        )

    def alone(self, position: int) -> Form:
        """Return the call with one sample, which is not padded."""
        if self.batch_dim is None:
            return self
        form = self.choose([position])
        return replace(form, frame=form.frame and Frame(form.lengths()[0], (0,)))

    def lengths(self) -> list[int]:
        """Return the length of each sample's sequences."""
        sequences = next(leaf for _, leaf in self.leaves() if isinstance(leaf, Sequences))
        return [len(row) for row in sequences.rows]

    def call(self) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments made anew."""
        built = {name: build(tree, self._dim_of(name), self.frame) for name, tree in self.args.items()}
        positional = POSITIONAL[: self.n_positional]
        return [built[name] for name in positional], {k: v for k, v in built.items() if k not in positional}

    def keys(self) -> contextlib.AbstractContextManager[None]:
        """Return what lets the call have its own keys."""
        return contextlib.nullcontext() if self.ids is None else sample_keys(ID_FORMS[self.ids_form](self.ids))

    def rows_of(self, result: object) -> tuple[bytes, ...]:
        """Return each sample's part of a result, as bytes that name types, dtypes and shapes."""
        parts = list(parts_of(result, ""))
        if self.batch_dim is None:
            return (repr([(path, _identity(value)) for path, value in parts]).encode(),)
        shared = [(path, _identity(v)) for path, v in parts if not isinstance(v, torch.Tensor)]
        columns: list[list[bytes]] = [[repr(shared).encode()] * self.n]
        for path, value in parts:
            if isinstance(value, torch.Tensor):
                columns.append(self._rows_of_leaf(path, value.movedim(self.batch_dim, 0)))
        return tuple(map(b"".join, zip(*columns, strict=True)))

    def shown(self) -> str:
        """Return all of it for a reader."""
        return "\n".join(f"{name} = {getattr(self, name)!r}" for name in self.__slots__)

    def _dim_of(self, name: str) -> int:
        return 0 if name in self.unbatched else self.batch_dim or 0

    def _rows_of_leaf(self, path: str, leaf: torch.Tensor) -> list[bytes]:
        assert leaf.shape[0] == self.n
        n_following = 0
        if self.frame is not None:
            n_following = next((n for name, n in _FOLLOWING.items() if name in path), 1 if path == "[0]" else 0)
        if not n_following:
            head = repr((path, leaf.dtype, tuple(leaf.shape[1:]))).encode()
            return [head + row for row in bytes_of(leaf)]
        assert self.frame is not None
        rows = []
        for row, start, length in zip(leaf, self.frame.starts, self.lengths(), strict=True):
            full = torch.zeros_like(row)
            cut, into = row, full
            for dim in range(n_following):
                cut, into = (part.narrow(dim, start, length) for part in (cut, into))
            into.copy_(cut)
            around = b"" if torch.equal(full, row) and row.shape[0] == self.frame.width else b"not zero outside"
            rows.append(repr((path, row.dtype, tuple(cut.shape))).encode() + bytes_of(cut[None])[0] + around)
        return rows


def _size_of(leaf: object) -> int | None:
    if isinstance(leaf, Rows):
        return len(leaf.tensor)
    if isinstance(leaf, Sequences):
        return len(leaf.rows)
    return len(leaf.values) if isinstance(leaf, Values) else None


#: Ways to give the keys of a batch; the last ones are for integers of 64 bits.
ID_FORMS: dict[str, Any] = {
    "list": list, "tuple": tuple, "scalars": lambda ids: [np.int64(key) for key in ids], "tensor": torch.tensor,
    "array": np.array,
}  # fmt: skip


@dataclass(slots=True)
class _Call:
    """What is called, and the module that has its state."""

    function: Any
    module: Any
    options: dict[str, Any] = field(default_factory=dict)


class Answering:
    """What a form calls, in this process.

    Args:
        form: Says what is called and how it is cached; its call is not made yet.
        directory: Of a persistent cache; None for one in memory.
        is_cached: False leaves it as it is.
    """

    def __init__(self, form: Form, directory: Path | None = None, *, is_cached: bool = True) -> None:
        names = tuple(name for name, _ in form.padded) + tuple(mask for _, mask in form.padded[:1])
        classes = _CLASSES if form.batch_dim is None or form.result == "pair" else ()
        self._module = Sums() if form.is_blind else Answers(form.batch_dim, form.unbatched, names, form.result, classes)
        self._called: Any = _function_of(self._module) if form.is_function else self._module
        self._is_cached = is_cached
        if is_cached:
            options: dict[str, Any] = {"batch_dim": form.batch_dim, "check_rows": form.do_check}
            if form.unbatched:
                options["unbatched"] = form.unbatched
            if form.padded:
                options["padded"] = dict(form.padded)
            if directory is not None:
                options |= {"persistent": True, "persistent_cache_dir": directory, "flush_timeout_seconds": 60.0}
            self._called = torchcache(**options)(self._called)

    @property
    def cache(self) -> Cache:
        """The cache of what is called."""
        return cache_of(self._called)

    def call(self, form: Form) -> Answer:
        """Make a call, in its state, and look afterwards at its key: the call must notice by itself."""
        RAN.clear()
        self._module.salt = form.salt
        args, kwargs = form.call()
        if not self._is_cached:
            return Answer((), form.rows_of(self._called(*args, **kwargs)), ())
        before = self.cache.stats()
        with form.keys():
            result = self._called(*args, **kwargs)
            rows = form.rows_of(result)
            for _, part in parts_of(result, ""):
                _write_into(part)  # it is the caller's own: no later hit may show that
            with contextlib.redirect_stdout(io.StringIO()):
                explained = self.cache.explain(*args, **kwargs)
        return Answer.of_call(explained, rows, tuple({"n": n} for n in RAN), before, self.cache.stats())

    def close(self) -> None:
        """Commit what is to be stored, and let go of it.

        Raises:
            TimeoutError: If that takes too long.
        """
        commit_and_close(self.cache)


def _function_of(module: nn.Module) -> Any:  # noqa: ANN401 - a function of any arguments
    def answer(a: Any, b: Any = None, c: Any = 0, *, d: Any = None, **more: Any) -> Any:  # noqa: ANN401
        return module(a, b, c, d=d, **more)

    return answer


def _write_into(part: object) -> None:
    if isinstance(part, torch.Tensor):
        part.fill_(77)
    elif isinstance(part, np.ndarray) and part.dtype.kind in "iuf":
        part.fill(77)
    elif isinstance(part, Image.Image) and part.mode in "LF":
        part.putpixel((0, 0), 77)
