"""Every way in which a second call of any form may differ from a first one, or be the same by the rules: one table.

A change takes the first call and returns the second, and the first one too where it had to be prepared. Changes that
concern a leaf choose one wherever it lies: alone, in a container, among what all samples share, in a padded batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import numpy as np
import torch

from stress.answers import ID_FORMS, POSITIONAL, Answering, Form
from stress.generator import DTYPES, random_tensor
from stress.literals import PLAIN, choose, of_another_type, of_another_value
from stress.programs import identity_of, is_ambiguous, value_of
from stress.trees import KINDS as CONTAINERS
from stress.trees import (
    LIES,
    Frame,
    Node,
    Rows,
    Sequences,
    Values,
    Whole,
    fits,
    from_raw,
    has_keys,
    lay,
    places,
    put,
    raw_of,
)

#: The forms of calls.
FORMS = ("rows", "padded", "keys", "whole")
_BATCHES = ("rows", "padded", "keys")

Changed = Form | tuple[Form, Form]  # the second call, or both


@dataclass(frozen=True, slots=True)
class Case:
    """Two calls, and what the rules say of them.

    Attributes:
        kind: Its name.
        how: "live": one cache in memory takes both calls. "fresh": two caches, in memory. "stored": two caches, one
            after the other, that share a directory. Else where the second one is, with the same directory:
            "process", "fork"; or "inherited": in a child forked from the process that made the first call.
        first: The first call.
        second: The second call.
        right: Of each call, what is right for each sample.
    """

    kind: str
    how: str
    first: Form
    second: Form
    right: tuple[tuple[bytes, ...], tuple[bytes, ...]]

    @property
    def differs(self) -> bool:
        """Whether at least one sample of the second call must not share a key with the first call."""
        return KINDS[self.kind].differs

    def identities(self) -> tuple[list[object], list[object]]:
        """Return what identifies each sample of both calls."""
        return _identities_of(self.first, self.right[0]), _identities_of(self.second, self.right[1])

    def shown(self) -> str:
        """Return both calls for a reader."""
        return f"{self.first.shown()}\n\nsecond:\n{self.second.shown()}"


def _identities_of(form: Form, right: tuple[bytes, ...]) -> list[object]:
    common = form.batch_dim, form.unbatched, identity_of(form.salt)
    return [(common, form.ids and identity_of(form.ids[i]), row) for i, row in enumerate(right)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to differ or to be the same.

    Attributes:
        differs: Whether at least one sample of the second call must not share a key with the first call.
        change: Makes the second call; None for that of any other difference.
        forms: Of the calls.
        where: How it may run; one cache serves both calls of "live" where they have the same options.
        share: How often it is dealt, beside the others.
    """

    differs: bool
    change: Callable[[Form, random.Random], Changed] | None
    forms: tuple[str, ...] = FORMS
    where: tuple[str, ...] = (*9 * ("live",), "fresh", "fresh", "stored")  # an environment stays open to the end
    share: int = 16


class _Unfit(Exception):  # noqa: N818 - no error: another call is written
    """A call has nothing that a change could concern."""


def deal(name: str, rng: random.Random) -> Case:
    """Generate a case of a kind."""
    for _ in range(_MOST_TRIES):
        try:
            case = _deal(name, rng)
        except _Unfit:
            continue
        before, after = case.identities()
        if any(sample not in before for sample in after) == KINDS[name].differs:
            return case
    raise AssertionError(f"{name!r} does not come about in {_MOST_TRIES} tries")


def _deal(name: str, rng: random.Random) -> Case:
    kind = KINDS[name]
    if kind.change is None:
        kind = replace(KINDS[rng.choice(_PORTABLE)], where=kind.where)
    assert kind.change is not None
    written = write(rng, rng.choice(kind.forms))
    made = kind.change(written, rng)
    first, second = made if isinstance(made, tuple) else (written, made)
    if not (_is_plain(first) and _is_plain(second)):
        raise _Unfit
    how = rng.choice(kind.where)
    if how in ("live", "inherited") and not _share_a_cache(first, second):
        how = "stored"
    return Case(name, how, first, second, (right_rows(first), right_rows(second)))


#: A change may find nothing in a call that it could concern, or change nothing.
_MOST_TRIES = 300


def right_rows(form: Form) -> tuple[bytes, ...]:
    """Return what is right for each sample: computed without a cache, alone and without padding."""
    uncached = Answering(form, is_cached=False)
    return tuple(uncached.call(alone).rows[0] for alone in map(form.alone, range(form.n)))


def _share_a_cache(first: Form, second: Form) -> bool:
    one, other = ((f.batch_dim, f.unbatched, f.padded, f.result, f.is_blind) for f in (first, second))
    return one == other


def _is_plain(form: Form) -> bool:
    """Tell whether a call is one that can be cached, and its trees mean what they seem to."""
    trees = list(form.args.items())
    for name, tree in trees:
        is_whole = form.batch_dim is None or name in form.unbatched
        if isinstance(tree, Node) and not is_whole and not any(map(_is_batch, (leaf for _, leaf in places(tree)))):
            return False  # nothing in it tells where the batch lies
        for _, node in places(tree):
            if not is_whole and (_is_batch_in_disguise(node) or _is_ambiguous(node, form.n)):
                return False
            if isinstance(node, Rows) and form.batch_dim and node.tensor.dim() <= form.batch_dim:
                return False
    leaves = [leaf for _, leaf in form.leaves()]
    return form.batch_dim is None or any(
        isinstance(leaf, (Values, Sequences)) or (isinstance(leaf, Rows) and leaf.tensor.dim() > 1) for leaf in leaves
    )


def _is_batch(leaf: object) -> bool:
    return isinstance(leaf, (Rows, Sequences, Values))


def _is_batch_in_disguise(node: object) -> bool:
    """Tell whether a list in a call is a batch of plain values, or of lists, which is refused."""
    if not isinstance(node, Node) or node.kind != "list" or not node.children:
        return False
    return all(map(_is_value, node.children)) or all(isinstance(child, Values) for child in node.children)


def _is_value(tree: object) -> bool:
    if isinstance(tree, Node):
        return tree.kind in ("tuple", "Pair", "Couple") and all(map(_is_value, tree.children))
    return _is_literal(tree)


def _is_ambiguous(tree: object, n: int) -> bool:
    """Tell whether plain values in a call may be one per sample: it goes around the cache then."""
    if not isinstance(tree, Node):
        return is_ambiguous(tree, n)
    leaves = [leaf for _, leaf in places(tree)]
    is_sequence = tree.kind in ("tuple", "list") and len(tree.children) == n and not any(map(_is_batch, leaves))
    return is_sequence or is_ambiguous(tree.note, n)


# -- calls ----------------------------------------------------------------------------------------------------------

_ROW_SHAPES: tuple[tuple[int, ...], ...] = ((3,), (1,), (2, 3), (2, 1, 4), (3, 2, 2), (7,), (1, 1, 5, 2))
_WHOLE_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (3,), (0, 3), (2, 3), (2, 3, 2, 2), (5000,))
_MOST_ROWS = 5
_KEYS: tuple[Any, ...] = ("a", "b", "ids", "é", "a.b", 0, 1, True, 1.5, (1, "a"), None, HTTPStatus.OK)
_WORDS = ("", "a", "b", "ab", "bc", "a cat", "été", "\ud800", "a\0", " a", "1")
#: Families of plain values that may lie in containers.
_INNER = tuple(
    family for family in (tuple(v for v in f if "slice" not in v and "(" not in v) for f in PLAIN) if len(family) > 1
)
_NUMPY_DTYPES = tuple(d for d in DTYPES if d is not torch.bfloat16 and "float8" not in str(d))


def write(rng: random.Random, form: str) -> Form:
    """Write a call of a form."""
    return replace(_WRITERS[form](_Draft(rng)), is_function=rng.random() < 0.3, do_check=rng.random() < 0.6)


class _Draft:
    """Writes what a call takes, for a batch of one size."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.n = rng.randint(1, _MOST_ROWS)
        self.data = np.random.default_rng(rng.getrandbits(32))

    def tensor(self, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = DTYPES) -> torch.Tensor:
        return random_tensor(self.data, self.rng.choice(dtypes), shape)

    def rows(self) -> Rows:
        return Rows(self.tensor((self.n, *self.rng.choice(_ROW_SHAPES))), self.lie())

    def lie(self) -> str:
        return self.rng.choice((*LIES, "", "", ""))

    def texts(self) -> Values:
        return Values(tuple(self.text() for _ in range(self.n)))

    def values(self) -> Values:
        return Values(tuple(self.value() for _ in range(self.n)))

    def value(self) -> Any:  # noqa: ANN401 - any plain value
        return value_of(choose(self.rng, PLAIN)) if self.rng.random() < 0.8 else self.text()

    def text(self) -> object:
        words = self.rng.choices(_WORDS, k=self.rng.randint(1, 3))
        return words[0] if self.rng.random() < 0.6 else tuple(words)

    def batch(self) -> Rows | Values:
        choice = self.rng.random()
        return self.texts() if choice < 0.15 else self.values() if choice < 0.25 else self.rows()

    def whole(self) -> Any:  # noqa: ANN401 - a tensor, an array or a number of NumPy's
        shape = self.rng.choice(_WHOLE_SHAPES)
        if self.rng.random() < 0.6:
            return Whole(self.tensor(shape), self.lie())
        array = self.tensor(shape, _NUMPY_DTYPES).numpy()
        return np.asfortranarray(array) if self.rng.random() < 0.3 else array

    def plain(self) -> Any:  # noqa: ANN401 - any plain value
        return value_of(self.rng.choice(self.rng.choice(_INNER)))

    def container(self, leaf: Callable[[], Any], depth: int = 2, *, is_outermost: bool = True) -> Node:
        rng = self.rng
        n = rng.choice((1, 2, 2, 3))
        kind = rng.choice([kind for kind in CONTAINERS if fits(kind, n, is_outermost=is_outermost)])
        children = [self._child(leaf, depth) for _ in range(n)]
        if is_outermost or rng.random() < 0.8:
            children[rng.randrange(n)] = leaf()
        return Node(kind, tuple(children), tuple(self.keys(n)) if has_keys(kind) else ())

    def keys(self, n: int) -> list[Any]:
        while True:
            keys = self.rng.sample(_KEYS, n)
            if len(set(keys)) == n:  # 1 and True are one key of a dict
                return keys

    def _child(self, leaf: Callable[[], Any], depth: int) -> Any:  # noqa: ANN401 - any tree
        choice = self.rng.random()
        if depth and choice < 0.25:
            return self.container(leaf, depth - 1, is_outermost=False)
        return self.plain() if choice < 0.55 else leaf()

    def argument(self, leaf: Callable[[], Any]) -> Any:  # noqa: ANN401 - any tree
        return self.container(leaf) if self.rng.random() < 0.6 else leaf()

    def others(self, leaf: Callable[[], Any]) -> dict[str, Any]:
        """Write arguments beside the first one, in any order."""
        rng = self.rng
        args = {name: self.argument(leaf) for name in ("b", "d", "x", "y") if rng.random() < 0.3}
        args |= {name: self.plain() for name in ("c", "z") if rng.random() < 0.5}
        if rng.random() < 0.3:
            args["w"] = tuple(self.plain() for _ in range(rng.randint(0, 2)))
        names = list(args)
        rng.shuffle(names)
        return {name: args[name] for name in names}


def _write_rows(draft: _Draft) -> Form:
    rng = draft.rng
    args = {"a": draft.argument(draft.batch), **draft.others(draft.batch)}
    unbatched = tuple(name for name in ("d", "x", "u") if rng.random() < 0.3)
    args |= {name: draft.argument(draft.whole) for name in unbatched if name in args or rng.random() < 0.7}
    return Form(
        args=args, n_positional=_any_positional(args, rng), batch_dim=rng.choice((0, 0, 1)), unbatched=unbatched,
        result=rng.choice(("tensor", "dict", "pair", "halves")),
    )  # fmt: skip


def _write_padded(draft: _Draft) -> Form:
    rng = draft.rng
    lengths = [rng.randint(1, 6) for _ in range(draft.n)]
    shape = rng.choice(((), (), (2,), (1, 3)))
    dtype = rng.choice(DTYPES)
    ids = Sequences(tuple(random_tensor(draft.data, dtype, (length, *shape)) for length in lengths))
    dtype = rng.choice((torch.int64, torch.float32, torch.bool, torch.uint8))
    mask = Sequences(tuple(_mask(rng, length, dtype) for length in lengths), is_mask=True)
    args: dict[str, Any]
    if rng.random() < 0.5:
        args, padded = {"a": ids, "b": mask}, (("a", "b"),)
    else:
        more = {"x": draft.batch(), "n": draft.plain()} if rng.random() < 0.5 else {}
        kind = rng.choice(("dict", "OrderedDict", "UserDict", "Encoding"))
        args = {"a": Node(kind, (ids, *more.values(), mask), ("ids", *more, "mask"))}
        padded = (("a['ids']", "a['mask']"),)
    args |= {name: tree for name, tree in draft.others(draft.batch).items() if name not in args}
    form = Form(
        args=args, n_positional=_any_positional(args, rng), batch_dim=rng.choice((0, 0, 1)), padded=padded,
        frame=Frame(0, ()), result=rng.choice(("tensor", "dict", "pair")),
    )  # fmt: skip
    return _framed(form, rng)


def _mask(rng: random.Random, length: int, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.ones(length, dtype=dtype)
    for i in range(1, length - 1):
        mask[i] = rng.random() < 0.8
    return mask


def _framed(form: Form, rng: random.Random) -> Form:
    """Return a call whose sequences are padded in any way."""
    lengths = form.lengths()
    width = max(lengths) + rng.choice((0, 0, 1, 2, 5, 9))
    side = rng.choice(("right", "right", "left", "anywhere"))
    starts = (
        0 if side == "right" else width - length if side == "left" else rng.randint(0, width - length)
        for length in lengths
    )
    return replace(form, frame=Frame(width, tuple(starts), rng.choice((0, 1, 255, 7))))


def _write_keys(draft: _Draft) -> Form:
    form = (_write_padded if draft.rng.random() < 0.3 else _write_rows)(draft)
    draft = _Draft(draft.rng)
    if draft.rng.random() < 0.5:
        ids: Iterable[Any] = draft.rng.sample(range(-3, 30), form.n)
    else:
        ids = draft.rng.sample(("a", "b", "1", "2", b"a", b"1", 1, 2, 2**70, "", "\ud800"), form.n)
    return _in_another_id_form(replace(form, ids=tuple(ids)), draft.rng)


def _in_another_id_form(form: Form, rng: random.Random) -> Form:
    assert form.ids is not None
    are_numbers = all(type(key) is int and abs(key) < 2**63 for key in form.ids)
    return replace(form, ids_form=rng.choice(tuple(ID_FORMS) if are_numbers else ("list", "tuple")))


def _write_whole(draft: _Draft) -> Form:
    rng = draft.rng

    def leaf() -> Any:  # noqa: ANN401 - any leaf
        return draft.plain() if rng.random() < 0.3 else draft.texts() if rng.random() < 0.1 else draft.whole()

    args = {"a": draft.argument(leaf), **draft.others(leaf)}
    return Form(args=args, n_positional=_any_positional(args, rng), batch_dim=None)


_WRITERS = {"rows": _write_rows, "padded": _write_padded, "keys": _write_keys, "whole": _write_whole}


def _any_positional(args: Mapping[str, Any], rng: random.Random) -> int:
    n = next((i for i, name in enumerate(POSITIONAL) if name not in args), len(POSITIONAL))
    return rng.randint(0, n)


# -- differences: leaves ----------------------------------------------------------------------------------------------

Spot = tuple[str, tuple[int, ...]]


def _put(form: Form, spot: Spot, value: object) -> Form:
    name, at = spot
    return replace(form, args={**form.args, name: put(form.args[name], at, value)})


def _choose(form: Form, rng: random.Random, fits_here: Callable[[Any], bool]) -> tuple[Spot, Any]:
    """Choose a place in the arguments where something of a kind lies."""
    spots = [(spot, value) for spot, value in form.leaves() if fits_here(value)]
    if not spots:
        raise _Unfit
    return rng.choice(spots)


def _has_bytes(value: object) -> bool:
    if isinstance(value, (Rows, Whole)):
        return bool(value.tensor.numel())
    return (isinstance(value, Sequences) and not value.is_mask) or (isinstance(value, np.ndarray) and bool(value.size))


def _map_tensors(leaf: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:  # noqa: ANN401 - any leaf
    if isinstance(leaf, (Rows, Whole)):
        return replace(leaf, tensor=change(leaf.tensor))
    if isinstance(leaf, Sequences):
        return replace(leaf, rows=tuple(map(change, leaf.rows)))
    return change(torch.from_numpy(np.ascontiguousarray(leaf).reshape(leaf.shape))).numpy()


def _dtype_of(leaf: Rows | Whole | Sequences | np.ndarray[Any, Any]) -> torch.dtype:
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(leaf).dtype
    return leaf.rows[0].dtype if isinstance(leaf, Sequences) else leaf.tensor.dtype


def _flip_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    raw = raw_of(tensor)
    bit = 0 if tensor.dtype is torch.bool else rng.randrange(8)
    raw[rng.randrange(raw.shape[0]), rng.randrange(raw.shape[1])] ^= 1 << bit
    return torch.from_numpy(raw).view(-1).view(tensor.dtype).reshape(tensor.shape)


def _flip(form: Form, rng: random.Random) -> Form:
    spot, leaf = _choose(form, rng, _has_bytes)
    if isinstance(leaf, Sequences):
        rows = list(leaf.rows)
        i = rng.randrange(len(rows))
        rows[i] = _flip_tensor(rows[i], rng)
        return _put(form, spot, replace(leaf, rows=tuple(rows)))
    return _put(form, spot, _map_tensors(leaf, lambda tensor: _flip_tensor(tensor, rng)))


def _view_otherwise(form: Form, rng: random.Random) -> Form:
    """Let the same bytes be of another dtype of the same size."""
    spot, leaf = _choose(form, rng, _has_bytes)
    old = _dtype_of(leaf)
    allowed = _NUMPY_DTYPES if isinstance(leaf, np.ndarray) else DTYPES
    dtypes = [d for d in allowed if d.itemsize == old.itemsize and d not in (old, torch.bool)]
    if not dtypes:
        raise _Unfit
    dtype = rng.choice(dtypes)
    return _put(form, spot, _map_tensors(leaf, lambda t: t.contiguous().view(-1).view(dtype).view(t.shape)))


def _convert(form: Form, rng: random.Random) -> Changed:
    """Let the same numbers be of another dtype."""
    spot, leaf = _choose(form, rng, _has_bytes)
    one, other = rng.sample(_NUMPY_DTYPES if isinstance(leaf, np.ndarray) else DTYPES, 2)
    seed = rng.randrange(1000)

    def numbers(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda t: torch.randint(0, 2, t.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    first, second = (_put(form, spot, _map_tensors(leaf, numbers(dtype))) for dtype in (one, other))
    return first, second


def _reshape(form: Form, rng: random.Random) -> Form:
    """Let the same bytes have another shape, such as one dimension more."""
    spot, leaf = _choose(form, rng, lambda value: isinstance(value, (Rows, Whole, Sequences, np.ndarray)))
    if isinstance(leaf, Sequences) and leaf.is_mask:
        raise _Unfit
    kept = 1 if isinstance(leaf, (Rows, Sequences)) else 0

    def change(tensor: torch.Tensor) -> torch.Tensor:
        head, shape = tensor.shape[:kept], tensor.shape[kept:]
        numel = int(np.prod(shape))
        shapes = [(numel,), (numel, 1), (1, numel), tuple(reversed(shape)), (*shape, 1), (1, *shape)]
        shapes += [()] * (numel == 1) + [shape[1:]] * (shape[:1] == (1,))
        return tensor.reshape((*head, *shapes[choice % len(shapes)]))

    choice = rng.randrange(1000)
    return _put(form, spot, _map_tensors(leaf, change))


def _exchange_rows(form: Form, rng: random.Random) -> Form:
    """Let the samples of one leaf come with other samples of the others: each text, say, with another image."""
    spot, leaf = _choose(form, rng, lambda value: isinstance(value, (Rows, Values)))
    if form.n < 2 or spot[0] in form.unbatched:
        raise _Unfit
    if isinstance(leaf, Values):
        return _put(form, spot, Values((*leaf.values[1:], leaf.values[0])))
    raw = np.roll(raw_of(leaf.tensor), 1, 0)
    return _put(form, spot, replace(leaf, tensor=from_raw(raw, leaf.tensor.dtype, leaf.tensor.shape[1:])))


def _pass_as(kinds: tuple[type, type]) -> Callable[[Form, random.Random], Form]:
    """Let an array be a tensor, or a tensor an array."""

    def change(form: Form, rng: random.Random) -> Form:
        one, other = rng.sample(kinds, 2)
        spot, leaf = _choose(form, rng, lambda value: type(value) is one)
        if one is np.ndarray:
            return _put(form, spot, Whole(torch.from_numpy(np.ascontiguousarray(leaf).reshape(leaf.shape))))
        if leaf.tensor.dtype not in _NUMPY_DTYPES:
            raise _Unfit
        del other
        return _put(form, spot, lay(leaf.tensor, "").numpy())

    return change


def _number_as_array(form: Form, rng: random.Random) -> Changed:
    """Let a number be one of NumPy's, a 0-d array, or a 0-d tensor."""
    spot, _ = _choose(form, rng, lambda value: isinstance(value, (Whole, np.ndarray)))
    value = rng.choice((3, 0.5, True))
    array = np.array(value)
    forms = (value, array[()], array, Whole(torch.tensor(value)), array[None])
    one, other = rng.sample(forms, 2)
    return _put(form, spot, one), _put(form, spot, other)


# -- differences: texts and plain values ------------------------------------------------------------------------------


def _change_text(change: Callable[[Any, random.Random], Any]) -> Callable[[Form, random.Random], Form]:
    def changed(form: Form, rng: random.Random) -> Form:
        spot, leaf = _choose(form, rng, lambda value: isinstance(value, Values))
        texts = [i for i, value in enumerate(leaf.values) if _is_text(value)]
        if not texts:
            raise _Unfit
        i = rng.choice(texts)
        return _put(form, spot, _with_value(leaf, i, change(leaf.values[i], rng)))

    return changed


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, tuple) and bool(value) and all(isinstance(part, str) for part in value)
    )


def _with_value(leaf: Values, i: int, value: object) -> Values:
    return Values((*leaf.values[:i], value, *leaf.values[i + 1 :]))


def _change_value(other: Callable[..., str]) -> Callable[[Form, random.Random], Changed]:
    """Let one sample have another plain value; the first one is a literal whose relatives are known."""

    def change(form: Form, rng: random.Random) -> Changed:
        spot, leaf = _choose(form, rng, lambda value: isinstance(value, Values))
        i = rng.randrange(len(leaf.values))
        literal = choose(rng, PLAIN)
        second = other(rng, literal, PLAIN)
        one, another = (_with_value(leaf, i, value_of(text)) for text in (literal, second))
        return _put(form, spot, one), _put(form, spot, another)

    return change


def _another_text(text: Any, rng: random.Random) -> Any:  # noqa: ANN401 - str or tuple of str
    if isinstance(text, tuple):
        i = rng.randrange(len(text))
        return (*text[:i], _another_text(text[i], rng), *text[i + 1 :])
    at = rng.randint(0, len(text))
    return rng.choice((text[:at] + rng.choice("a\0\u0301") + text[at:], text[1:], text.upper(), text + " "))


def _split_text(text: Any, rng: random.Random) -> Any:  # noqa: ANN401 - as above
    """Let the same letters be other texts."""
    if isinstance(text, str):
        at = rng.randint(0, len(text))
        return rng.choice(((text,), (text[:at], text[at:]), (text, "")))
    joined = "".join(text)
    at = rng.randint(0, len(joined))
    return rng.choice(((joined[:at], joined[at:]), joined, (joined,), tuple(reversed(text)), (*text, "")))


def _is_literal(value: object) -> bool:
    return not isinstance(value, (Node, Rows, Whole, Sequences, Values, np.ndarray))


def _change_plain(other: Callable[..., str]) -> Callable[[Form, random.Random], Changed]:
    """Give another plain value, alone or in a container; the first one is a literal whose relatives are known."""

    def change(form: Form, rng: random.Random) -> Changed:
        spot, _ = _choose(form, rng, _is_literal)
        families = _INNER if spot[1] else PLAIN
        literal = rng.choice(rng.choice(families))
        second = value_of(other(rng, literal, families))
        return _put(form, spot, value_of(literal)), _put(form, spot, second)

    return change


# -- differences: containers ------------------------------------------------------------------------------------------


def _node(form: Form, rng: random.Random, fits_here: Callable[[Node], bool] = lambda _: True) -> tuple[Spot, Node]:
    return _choose(form, rng, lambda value: isinstance(value, Node) and fits_here(value))


def _change_kind(form: Form, rng: random.Random) -> Form:
    spot, node = _node(form, rng)
    if _holds_padding(node):
        kinds = [kind for kind in CONTAINERS if has_keys(kind) and kind != node.kind]
    else:
        kinds = [k for k in CONTAINERS if k != node.kind and fits(k, len(node.children), is_outermost=not spot[1])]
    kind = rng.choice(kinds)
    keys = node.keys or ("a", "b", "c")[: len(node.children)]
    return _put(form, spot, Node(kind, node.children, keys if has_keys(kind) else ()))


def _holds_padding(node: object) -> bool:
    """Tell whether a container's keys are names of padded tensors."""
    return isinstance(node, Node) and any(isinstance(leaf, Sequences) for _, leaf in places(node))


def _rename(form: Form, rng: random.Random) -> Form:
    spot, node = _node(form, rng, lambda node: bool(node.keys))
    i = rng.randrange(len(node.keys))
    if isinstance(node.children[i], Sequences):
        raise _Unfit
    key = rng.choice([key for key in _KEYS if key not in node.keys])
    return _put(form, spot, replace(node, keys=(*node.keys[:i], key, *node.keys[i + 1 :])))


def _reorder(form: Form, rng: random.Random) -> Form:
    """Let a mapping have the same items in another order: code can see it."""
    spot, node = _node(form, rng, lambda node: len(node.keys) > 1)
    order = rng.sample(range(len(node.keys)), len(node.keys))
    keys, children = (tuple(items[i] for i in order) for items in (node.keys, node.children))
    return _put(form, spot, replace(node, keys=keys, children=children))


def _exchange_places(form: Form, rng: random.Random) -> Form:
    """Let two things lie in each other's places, in one container or in two arguments."""
    spots = [
        (spot, value) for spot, value in form.leaves()
        if not isinstance(value, Sequences) and not _holds_padding(value)
    ]  # fmt: skip
    if len(spots) < 2:
        raise _Unfit
    (one, a), (other, b) = rng.sample(spots, 2)
    if one[0] == other[0] and (one[1] == other[1][: len(one[1])] or other[1] == one[1][: len(other[1])]):
        raise _Unfit  # one lies in the other
    if (one[0] in form.unbatched) != (other[0] in form.unbatched):
        raise _Unfit
    if any(isinstance(v, Node) and not fits(v.kind, len(v.children), is_outermost=False) for v in (a, b)):
        raise _Unfit
    return _put(_put(form, one, b), other, a)


def _wrap(form: Form, rng: random.Random) -> Form:
    """Put something into a container of its own."""
    spot, value = _choose(form, rng, lambda v: not isinstance(v, Sequences) and not _holds_padding(v))
    if isinstance(value, Node) and not fits(value.kind, len(value.children), is_outermost=False):
        raise _Unfit
    kind = rng.choice(("tuple", "list", "dict"))
    return _put(form, spot, Node(kind, (value,), ("a",) if kind == "dict" else ()))


def _add_plain(form: Form, rng: random.Random) -> Form:
    """Let a container hold one plain value more."""
    spot, node = _node(form, rng, lambda node: CONTAINERS[node.kind][1] != "fields")
    keys = (*node.keys, rng.choice([key for key in _KEYS if key not in node.keys])) if node.keys else ()
    return _put(form, spot, replace(node, children=(*node.children, rng.choice((None, 0, ""))), keys=keys))


def _change_note(form: Form, rng: random.Random) -> Changed:
    """Let a mapping have another attribute beside its items."""
    spot, node = _node(form, rng, lambda node: node.kind == "Encoding")
    one, other = rng.sample((None, 1, True, "1", 1.0, (1,)), 2)
    return _put(form, spot, replace(node, note=one)), _put(form, spot, replace(node, note=other))


def _empty(form: Form, rng: random.Random) -> Changed:
    """Let one empty container be another."""
    spot, _ = _choose(form, rng, lambda value: isinstance(value, (Whole, np.ndarray)))
    one, other = rng.sample([None, *(Node(kind, ()) for kind in ("tuple", "list", "dict", "OrderedDict"))], 2)
    return _put(form, spot, one), _put(form, spot, other)


# -- differences: arguments, options, padding, keys -------------------------------------------------------------------


def _rename_argument(form: Form, rng: random.Random) -> Form:
    names = [name for name in form.args if name not in ("a", *form.unbatched) and not _holds_padding_at(form, name)]
    names = [name for name in names if name not in POSITIONAL[: form.n_positional]]
    if not names:
        raise _Unfit
    old = rng.choice(names)
    free = [name for name in ("b", "c", "d", "x", "y", "z") if name not in form.args and name not in form.unbatched]
    new = rng.choice([*free, "v"])
    return replace(form, args={new if name == old else name: tree for name, tree in form.args.items()})


def _holds_padding_at(form: Form, name: str) -> bool:
    return any(isinstance(leaf, Sequences) for _, leaf in places(form.args[name]))


def _leave_out(form: Form, rng: random.Random) -> Form:
    names = [name for name in form.args if name != "a" and not _holds_padding_at(form, name)]
    names = [name for name in names if name not in POSITIONAL[: form.n_positional]]
    if not names:
        raise _Unfit
    left = rng.choice(names)
    return replace(form, args={name: tree for name, tree in form.args.items() if name != left})


def _reorder_surplus(form: Form, rng: random.Random) -> Form:
    """Give what only ``**more`` takes in another order: code that goes through it sees that."""
    surplus = [name for name in form.args if name not in (*POSITIONAL, "d")]
    if len(surplus) < 2:
        raise _Unfit
    named = [name for name in form.args if name not in surplus]
    rng.shuffle(surplus)
    return replace(form, args={name: form.args[name] for name in (*named, *surplus)})


def _blind(form: Form, rng: random.Random) -> Form:
    """Let a function that sees nothing of the options add two tensors."""
    size = rng.randint(1, 3)
    numbers = torch.randint(0, 99, (size, size, 2), generator=torch.Generator().manual_seed(rng.randrange(1000)))
    both = {"a": Rows(numbers + numbers.transpose(0, 1)), "b": Rows(2 * numbers.transpose(0, 1) + 2 * numbers)}
    return replace(
        form, args=both, n_positional=rng.randint(0, 2), batch_dim=0, unbatched=(), padded=(), frame=None, ids=None,
        is_blind=True, is_function=False,
    )  # fmt: skip


def _along_another(form: Form, rng: random.Random) -> Changed:
    """Let the same tensors be batches along another dimension; their rows are the same there."""
    first = _blind(form, rng)
    return first, replace(first, batch_dim=1)


def _shared_or_not(form: Form, rng: random.Random) -> Changed:
    """Let one sample have a tensor of its own, or share it."""
    first = _blind(form, rng).choose([0])
    second = replace(first, args={**first.args, "b": Whole(first.args["b"].tensor)}, unbatched=("b",))
    return (first, second) if rng.random() < 0.5 else (second, first)


def _sequences(form: Form) -> tuple[Spot, Sequences, Spot, Sequences]:
    (ids_at, ids), = ((spot, v) for spot, v in form.leaves() if isinstance(v, Sequences) and not v.is_mask)  # fmt: skip
    (mask_at, mask), = ((spot, v) for spot, v in form.leaves() if isinstance(v, Sequences) and v.is_mask)  # fmt: skip
    return ids_at, ids, mask_at, mask


def _lengthen(form: Form, rng: random.Random) -> Form:
    """Let one sequence have a position more: a real one that is like the padding, or like its neighbour."""
    assert form.frame is not None
    ids_at, ids, mask_at, mask = _sequences(form)
    i = rng.randrange(form.n)
    last = ids.rows[i][-1:]
    fill = form.frame.fill % 2 if last.dtype is torch.bool else form.frame.fill
    like_padding = torch.full((last.numel() * last.itemsize,), fill, dtype=torch.uint8).view(last.dtype)
    more = rng.choice((like_padding.reshape(last.shape), last))
    at_front = rng.random() < 0.3
    longer = [
        from_raw(np.concatenate([raw_of(one), raw_of(two)][:: -1 if at_front else 1]), one.dtype, one.shape[1:])
        for one, two in ((ids.rows[i], more), (mask.rows[i], mask.rows[i][-1:]))
    ]
    form = _put(form, ids_at, replace(ids, rows=(*ids.rows[:i], longer[0], *ids.rows[i + 1 :])))
    form = _put(form, mask_at, replace(mask, rows=(*mask.rows[:i], longer[1], *mask.rows[i + 1 :])))
    return _framed(form, rng)


def _change_mask(choose: Callable[[random.Random, int], int], values: tuple[int, ...]) -> Callable[..., Form]:
    def change(form: Form, rng: random.Random) -> Form:
        *_, mask_at, mask = _sequences(form)
        i = rng.randrange(form.n)
        row = mask.rows[i].clone()
        row[choose(rng, len(row))] = rng.choice(values)
        return _framed(_put(form, mask_at, replace(mask, rows=(*mask.rows[:i], row, *mask.rows[i + 1 :]))), rng)

    return change


def _inner_position(rng: random.Random, length: int) -> int:
    if length < 3:
        raise _Unfit
    return rng.randint(1, length - 2)


def _another_id(form: Form, rng: random.Random) -> Form:
    assert form.ids is not None
    i = rng.randrange(form.n)
    key = rng.choice([key for key in (77, "77", b"77", -1, 2**64, form.ids[i] * 2) if key not in form.ids])
    return replace(form, ids=(*form.ids[:i], key, *form.ids[i + 1 :]), ids_form="list")


def _id_of_another_type(form: Form, rng: random.Random) -> Changed:
    forms = [
        replace(form, ids=tuple(make(i) for i in range(form.n)), ids_form="list")
        for make in (int, str, lambda i: str(i).encode(), lambda i: f"{i}.0")
    ]
    one, other = rng.sample(forms, 2)
    return one, other


def _exchange_ids(form: Form, rng: random.Random) -> Form:
    assert form.ids is not None
    return replace(form, ids=tuple(rng.sample(form.ids, form.n)), ids_form="list")


def _without_ids(form: Form, rng: random.Random) -> Changed:
    """Let the samples be named by their inputs once."""
    without = replace(form, ids=None)
    return (form, without) if rng.random() < 0.5 else (without, form)


def _change_salt(other: Callable[..., str]) -> Callable[[Form, random.Random], Changed]:
    def change(form: Form, rng: random.Random) -> Changed:
        literal = rng.choice(rng.choice(PLAIN))
        second = value_of(other(rng, literal, PLAIN))
        return replace(form, salt=value_of(literal)), replace(form, salt=second)

    return change


# -- the same by the rules --------------------------------------------------------------------------------------------


def _nothing(form: Form, rng: random.Random) -> Form:
    del rng
    return form


def _lie_otherwise(form: Form, rng: random.Random) -> Form:
    spot, leaf = _choose(form, rng, lambda value: isinstance(value, (Rows, Whole, np.ndarray)))
    if isinstance(leaf, np.ndarray):
        is_turned = leaf.flags.f_contiguous and not leaf.flags.c_contiguous
        return _put(form, spot, leaf.copy(order="C" if is_turned else "F"))
    return _put(form, spot, replace(leaf, lie=rng.choice([lie for lie in ("", *LIES) if lie != leaf.lie])))


def _channels_last(form: Form, rng: random.Random) -> Form:
    def is_image(value: object) -> bool:
        return isinstance(value, (Rows, Whole)) and value.tensor.dim() == 4

    spot, leaf = _choose(form, rng, is_image)
    return _put(form, spot, replace(leaf, lie="" if leaf.lie == "channels last" else "channels last"))


def _call_otherwise(form: Form, rng: random.Random) -> Form:
    """Give arguments by position or by keyword, and keywords in another order, but for those in ``**more``."""
    surplus = [name for name in form.args if name not in (*POSITIONAL, "d")]
    names = [name for name in form.args if name not in surplus]
    rng.shuffle(names)
    merged = [*names, *surplus] if rng.random() < 0.5 else [*surplus, *names]
    args = {name: form.args[name] for name in merged}
    return replace(form, args=args, n_positional=_any_positional(args, rng))


def _say_default(form: Form, rng: random.Random) -> Changed:
    args = {name: tree for name, tree in form.args.items() if name != "c"}
    without = replace(form, args=args, n_positional=min(form.n_positional, 2))
    said = replace(without, args={**args, "c": 0})
    return (without, said) if rng.random() < 0.5 else (said, without)


def _compose(choose: Callable[[random.Random, int], list[int]]) -> Callable[[Form, random.Random], Form]:
    def change(form: Form, rng: random.Random) -> Form:
        if form.n < 2:
            raise _Unfit
        form = form.choose(choose(rng, form.n))
        return form if form.frame is None else _framed(form, rng)

    return change


def _subset(rng: random.Random, n: int) -> list[int]:
    return sorted(rng.sample(range(n), rng.randint(1, n - 1)))


def _shuffled(rng: random.Random, n: int) -> list[int]:
    return rng.sample(range(n), n)


def _repeated(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(n) for _ in range(n + rng.randint(1, 4))]


def _with_new_rows(form: Form, rng: random.Random) -> Changed:
    """Let a batch come that holds another one, in another order."""
    first = _compose(_subset)(form, rng)
    return first, _compose(lambda rng, n: _shuffled(rng, n) + _repeated(rng, n)[:2])(form, rng)


def _frame_otherwise(form: Form, rng: random.Random) -> Form:
    return _framed(form, rng)


def _frame_on_a_side(form: Form, rng: random.Random) -> Form:
    """Pad a batch on the other side, as far."""
    assert form.frame is not None
    starts = [form.frame.width - length for length in form.lengths()]
    if tuple(starts) == form.frame.starts:
        starts = [0] * form.n
    return replace(form, frame=replace(form.frame, starts=tuple(starts), fill=rng.choice((0, 3))))


def _ids_otherwise(form: Form, rng: random.Random) -> Changed:
    form = replace(form, ids=tuple(rng.sample(range(-9, 99), form.n)), ids_form=rng.choice(list(ID_FORMS)))
    return form, replace(form, ids_form=rng.choice([name for name in ID_FORMS if name != form.ids_form]))


def _differs(change: Callable[..., Changed] | None, *forms: str, **more: Any) -> Kind:
    return Kind(differs=True, change=change, forms=forms or FORMS, **more)


def _same(change: Callable[..., Changed], *forms: str, **more: Any) -> Kind:
    return Kind(differs=False, change=change, forms=forms or FORMS, **more)


_UNKEYED = ("rows", "padded", "whole")  # where a key stands for the rows, other rows are a fault of the user's
_DISK = ("stored",)

KINDS: dict[str, Kind] = {
    # Leaves, wherever they lie.
    "leaf: any bit": _differs(_flip, *_UNKEYED, share=32),
    "leaf: dtype, same bytes": _differs(_view_otherwise),
    "leaf: dtype, same numbers": _differs(_convert, *_UNKEYED),
    "leaf: shape": _differs(_reshape),
    "leaf: rows paired otherwise": _differs(_exchange_rows, "rows", "padded"),
    "leaf: array or tensor": _differs(_pass_as((Whole, np.ndarray)), "rows", "whole"),
    "leaf: number, array or tensor": _differs(_number_as_array, "rows", "whole"),
    # Values.
    "text: changed": _differs(_change_text(_another_text), *_UNKEYED),
    "text: joined or split otherwise": _differs(_change_text(_split_text), *_UNKEYED),
    # Lists with one plain value per sample.
    "value: another type": _differs(_change_value(of_another_type), "rows", "padded"),
    "value: another value": _differs(_change_value(of_another_value), "rows", "padded"),
    # Plain values, alone or beside tensors.
    "plain: another type": _differs(_change_plain(of_another_type)),
    "plain: another value": _differs(_change_plain(of_another_value)),
    # Containers.
    "container: its kind": _differs(_change_kind),
    "container: name of a key": _differs(_rename),
    "container: order of keys": _differs(_reorder),
    "container: one around it": _differs(_wrap),
    "container: one value more": _differs(_add_plain),
    "container: an attribute": _differs(_change_note, share=4),
    "container: empty": _differs(_empty, "rows", "whole"),
    "container: places exchanged": _differs(_exchange_places, *_UNKEYED),
    # Arguments and options.
    "argument: its name": _differs(_rename_argument),
    "argument: left out": _differs(_leave_out),
    "argument: order of surplus ones": _differs(_reorder_surplus),
    "option: along which dimension": _differs(_along_another, "rows", where=("fresh", "fresh", "stored")),
    "option: batched or unbatched": _differs(_shared_or_not, "rows", where=("fresh", "fresh", "stored")),
    "state: another type": _differs(_change_salt(of_another_type)),
    "state: another value": _differs(_change_salt(of_another_value)),
    # Padded batches.
    "padded: one position more": _differs(_lengthen, "padded"),
    "padded: a hole": _differs(_change_mask(_inner_position, (0, 1)), "padded"),
    "padded: mask at an end": _differs(_change_mask(lambda rng, n: rng.choice((0, n - 1)), (2, 3)), "padded"),
    # Keys of the user's own.
    "keys: another one": _differs(_another_id, "keys"),
    "keys: another type": _differs(_id_of_another_type, "keys"),
    "keys: none": _differs(_without_ids, "keys"),
    # The same by the rules.
    "same: again, result written into": _same(_nothing),
    "same: strides": _same(_lie_otherwise),
    "same: memory format": _same(_channels_last, "rows", "whole"),
    "same: position or keyword": _same(_call_otherwise),
    "same: default or argument": _same(_say_default),
    "same: a part of the batch": _same(_compose(_subset), *_BATCHES),
    "same: batch in another order": _same(_compose(_shuffled), *_BATCHES),
    "same: rows repeated": _same(_compose(_repeated), *_BATCHES),
    "same: with new rows": _differs(_with_new_rows, *_BATCHES, share=32),
    "same: padded otherwise": _same(_frame_otherwise, "padded"),
    "same: padded on another side": _same(_frame_on_a_side, "padded"),
    "same: keys in another form": _same(_ids_otherwise, "keys"),
    "same: from the disk": _same(_nothing, where=_DISK, share=6),
    "same: from the disk, composed otherwise": _same(_compose(_repeated), *_BATCHES, where=_DISK, share=6),
    # In another process.
    "elsewhere: another process": _same(_nothing, where=("process",), share=3),
    "elsewhere: composed otherwise": _same(_compose(_shuffled), *_BATCHES, where=("process",), share=3),
    "elsewhere: forked": _same(_nothing, where=("fork",), share=1),
    "elsewhere: inherited by a fork": _same(_nothing, where=("inherited",), share=1),
    "elsewhere: a difference": _differs(None, where=("process",), share=3),
}  # fmt: skip

#: Differences that a second process is given.
_PORTABLE = tuple(
    name for name, kind in KINDS.items() if kind.differs and not name.startswith(("elsewhere", "option", "same"))
)
