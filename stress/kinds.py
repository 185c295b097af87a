"""Every way in which a second call may differ from a first one, or be the same by the rules: one table.

A change takes the first side and returns the second. What it returns decides how it can be shown: a side that adds
edits, another call or another mode can go on with the program that runs; one with another text or another
expression that makes the target needs a program of its own, unless ``live`` says which statements do the same to
one that runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stress.generator import DTYPES, LAYERS, random_tensor, write
from stress.literals import (
    COMPOSITE,
    NUMBERS,
    OPERATORS,
    PLAIN,
    STATEFUL,
    Families,
    of_another_type,
    of_another_value,
)
from stress.programs import Side, bytes_of, identify, is_ambiguous, value_of


@dataclass(frozen=True, slots=True)
class Case:
    """Two calls, and what the rules say of them.

    Attributes:
        kind: Its name.
        how: "live": one program makes both calls. "fresh": two programs with caches of their own, in memory.
            "stored": two programs of one process that share a directory. Else where the second one runs, with the
            same directory: "process", "fork", "forkserver", "spawn"; or "inherited": in a child forked from the
            process that made the first call, with the same object.
        live: Statements that turn the first program, while it runs, into the second.
        is_same_program: Whether samples share results if they are the same; otherwise none does.
        ritual: What happens between the two calls: "copied".
    """

    kind: str
    how: str
    first: Side
    second: Side
    live: tuple[str, ...]
    is_same_program: bool
    ritual: str = ""

    @property
    def differs(self) -> bool:
        """Whether at least one sample of the second call must not share a key with the first call."""
        return KINDS[self.kind].differs

    def shown(self) -> str:
        """Return both programs for a reader."""
        return "\n\n".join([self.first.shown(), "live:", *self.live, "second:", self.second.shown()])


@dataclass(frozen=True, slots=True)
class Change:
    """What a change made of the first side.

    Attributes:
        second: The other side.
        first: In place of the one that was written, if it had to be prepared.
        live: Statements that do the same to a program that runs; None if there are none.
        ritual: As in ``Case``.
    """

    second: Side
    first: Side | None = None
    live: tuple[str, ...] | None = ()
    ritual: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to differ or to be the same.

    Attributes:
        differs: Whether at least one sample of the second call must not share a key with the first call.
        needs: What the program must have; see ``generator.write``.
        change: Makes the second side; None for that of any other difference.
        is_program: Whether what changes concerns every sample, because the program is another one.
        where: How it may run, besides live where that can be.
        share: How often it is dealt, beside the others.
    """

    differs: bool
    change: Callable[[Side, random.Random], Change] | None
    needs: tuple[str, ...] = ()
    is_program: bool = False
    where: tuple[str, ...] = ("fresh",)
    share: int = 8


def deal(name: str, rng: random.Random) -> Case:
    """Generate a case of a kind."""
    for _ in range(_MOST_TRIES):
        case = _deal(name, rng)
        if any(map(_goes_around, (case.first, case.second))):
            continue
        second, first = identify(case.second.arguments()), set(identify(case.first.arguments()))
        are_new = [not case.is_same_program or sample not in first for sample in second]
        if any(are_new) == KINDS[name].differs:
            return case
    raise AssertionError(f"{name!r} does not come about in {_MOST_TRIES} tries")


def _goes_around(side: Side) -> bool:
    n = len(identify(side.arguments()))
    return any(is_ambiguous(value, n) for value in (*side.args, *side.kwargs.values()))


def _deal(name: str, rng: random.Random) -> Case:
    kind = KINDS[name]
    if kind.change is None:
        kind = replace(KINDS[rng.choice(_PORTABLE)], where=kind.where)
    assert kind.change is not None
    written = write(rng, kind.needs)
    made = kind.change(written, rng)
    first, second = made.first or written, made.second
    how = rng.choice(kind.where)
    if how == "fresh":
        if made.live is not None and (not kind.differs or rng.random() < _LIVE_SHARE):
            how = "live"  # in memory, only one and the same cache can hit
        elif rng.random() < _STORED_SHARE:
            how = "stored"
    live = (*(made.live or ()), *second.edits[len(first.edits) :])
    return Case(name, how, first, second, live, not kind.is_program or not kind.differs, made.ritual)


#: A random change may change nothing, such as two equal elements exchanged.
_MOST_TRIES = 100
_LIVE_SHARE = 0.7
_STORED_SHARE = 0.05


# -- changes of the call: tensors -----------------------------------------------------------------------------------


def _tensors_of(side: Side) -> dict[str | int, torch.Tensor]:
    """Return the tensors of a call by their place."""
    places: dict[str | int, Any] = {**dict(enumerate(side.args)), **side.kwargs}
    return {place: value for place, value in places.items() if isinstance(value, torch.Tensor)}


def _with(side: Side, values: Mapping[str | int, object]) -> Side:
    """Return a side whose call has other values at some places."""
    args = tuple(values.get(place, value) for place, value in enumerate(side.args))
    kwargs = {name: values.get(name, value) for name, value in side.kwargs.items()}
    return replace(side, args=args, kwargs=kwargs)


def _all_rows(side: Side, select: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return Change(_with(side, {place: select(tensor) for place, tensor in _tensors_of(side).items()}))


def _place_of(side: Side, name: str) -> str | int:
    return name if name in side.kwargs else int(name.removeprefix("t"))


def _raw(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a copy of the bytes of a tensor, one row a sample."""
    return np.frombuffer(bytearray(b"".join(bytes_of(tensor))), np.uint8).reshape(len(tensor), -1)


def _from_raw(raw: np.ndarray[Any, Any], like: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    flat = torch.from_numpy(np.ascontiguousarray(raw)).view(-1).view(like.dtype)
    return flat.reshape(shape or (len(raw), *like.shape[1:]))


def _flipped(tensor: torch.Tensor, row: int, byte: int, bit: int) -> torch.Tensor:
    raw = _raw(tensor)
    raw[row, byte] ^= 1 << bit
    return _from_raw(raw, tensor)


def _flip(side: Side, rng: random.Random, choose_byte: Callable[[int], int]) -> Change:
    tensors = {place: tensor for place, tensor in _tensors_of(side).items() if tensor.numel()}
    place = rng.choice(list(tensors))
    tensor = tensors[place]
    width = tensor[0].numel() * tensor.itemsize
    bit = 0 if tensor.dtype is torch.bool else rng.randrange(8)
    return Change(_with(side, {place: _flipped(tensor, rng.randrange(len(tensor)), choose_byte(width), bit)}))


def _flip_any_bit(side: Side, rng: random.Random) -> Change:
    return _flip(side, rng, rng.randrange)


def _flip_last_byte(side: Side, rng: random.Random) -> Change:
    return _flip(side, rng, lambda width: width - 1)


def _exchange_elements(side: Side, rng: random.Random) -> Change:
    place = _place_of(side, "t0")
    tensor = _tensors_of(side)[place]
    raw = _raw(tensor)
    elements = raw.reshape(len(tensor), -1, tensor.itemsize)
    row = rng.randrange(len(tensor))
    i, j = rng.sample(range(elements.shape[1]), 2)
    elements[row, [i, j]] = elements[row, [j, i]]
    return Change(_with(side, {place: _from_raw(raw, tensor)}))


def _pair_otherwise(side: Side, rng: random.Random) -> Change:
    """Let the rows of two tensors come together in another way."""
    del rng
    place = _place_of(side, "t1")
    return Change(_with(side, {place: _selected(_tensors_of(side)[place], lambda raw: np.roll(raw, 1, 0))}))


def _selected(tensor: torch.Tensor, select: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> torch.Tensor:
    """Return rows chosen as bytes: not every dtype can be indexed."""
    return _from_raw(select(_raw(tensor)), tensor)


def _exchange_tensors(side: Side, rng: random.Random) -> Change:
    del rng
    one, other = _place_of(side, "t0"), _place_of(side, "t1")
    tensors = _tensors_of(side)
    return Change(_with(side, {one: tensors[other], other: tensors[one]}))


def _move_bytes(side: Side, rng: random.Random) -> Change:
    """Let the same bytes be split between two tensors at another place."""
    one, other = _place_of(side, "t0"), _place_of(side, "t1")
    tensors = _tensors_of(side)
    first, second = tensors[one], tensors[other]
    both = np.concatenate([_raw(first), _raw(second)], 1)
    width = both.shape[1] // first.itemsize
    at = rng.choice([i for i in range(1, width) if i != first.shape[1]])
    n, cut = len(first), at * first.itemsize
    moved = {one: _from_raw(both[:, :cut], first, (n, at)), other: _from_raw(both[:, cut:], first, (n, width - at))}
    return Change(_with(side, moved))


def _view_as_another_dtype(side: Side, rng: random.Random) -> Change:
    """Let the same bytes be of another dtype of the same size."""
    tensors = {place: tensor for place, tensor in _tensors_of(side).items() if tensor.numel()}
    place = rng.choice(list(tensors))
    old = tensors[place].dtype
    dtypes = [d for d in DTYPES if d.itemsize == old.itemsize and d not in (old, torch.bool)]
    return Change(_with(side, {place: tensors[place].view(rng.choice(dtypes))})) if dtypes else _convert(side, rng)


def _convert(side: Side, rng: random.Random) -> Change:
    """Let the same numbers be of another dtype."""
    place = _place_of(side, "t0")
    tensor = _tensors_of(side)[place]
    small = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(rng.randrange(1000)))
    one, other = rng.sample(DTYPES, 2)
    first = _with(side, {place: small.to(one)})
    return Change(_with(first, {place: small.to(other)}), first=first)


def _reshape(side: Side, rng: random.Random) -> Change:
    tensors = {place: tensor for place, tensor in _tensors_of(side).items() if tensor.dim() > 1 and tensor.numel()}
    place = rng.choice(list(tensors))
    n, *shape = tensors[place].shape
    width = tensors[place][0].numel()
    shapes = [(width,), (width, 1), (1, width), tuple(reversed(shape)), (*shape, 1), (1, *shape)]
    shapes += [(i, width // i) for i in range(2, min(width, 40)) if width % i == 0]
    shape_of_rows = rng.choice([other for other in shapes if other != tuple(shape)])
    return Change(_with(side, {place: tensors[place].reshape(n, *shape_of_rows)}))


def _rename_tensor(side: Side, rng: random.Random) -> Change:
    """Give a tensor as ``b`` that was given as ``a``."""
    kwargs = {name: value for name, value in side.kwargs.items() if name not in ("a", "b")}
    n = len(next(iter(_tensors_of(side).values())))
    tensor = random_tensor(np.random.default_rng(rng.getrandbits(32)), rng.choice(DTYPES), (n, 3))
    first = replace(side, kwargs=kwargs | {"a": tensor})
    return Change(replace(side, kwargs=kwargs | {"b": tensor}), first=first)


def _leave_out_tensor(side: Side, rng: random.Random) -> Change:
    first = _rename_tensor(side, rng).first or side
    kwargs = {name: value for name, value in first.kwargs.items() if name != "a"}
    return Change(replace(side, kwargs=kwargs), first=first)


# -- changes of the call: plain values --------------------------------------------------------------------------------


def _given(side: Side, rng: random.Random, other: Callable[[random.Random, str, Families], str]) -> Change:
    name = rng.choice([slot.removeprefix("given.") for slot in side.slots if slot.startswith("given.")])
    return Change(_with(side, {name: value_of(other(rng, side.slots[f"given.{name}"], PLAIN))}))


def _give_another_type(side: Side, rng: random.Random) -> Change:
    return _given(side, rng, of_another_type)


def _give_another_value(side: Side, rng: random.Random) -> Change:
    return _given(side, rng, of_another_value)


def _exchange_plain(side: Side, rng: random.Random) -> Change:
    """Exchange two plain arguments, or give as the second what was given as the first."""
    one = side.kwargs["s0"]
    literal = side.slots["given.s0"]
    other = value_of(rng.choice((of_another_type, of_another_value))(rng, literal, PLAIN))
    first = replace(side, kwargs={**side.kwargs, "s0": one, "s1": other})
    return Change(replace(side, kwargs={**side.kwargs, "s0": other, "s1": one}), first=first)


def _rename_plain(side: Side, rng: random.Random) -> Change:
    """Give as ``s1`` what was given as ``s0``; the defaults are other values."""
    kwargs = {name: value for name, value in side.kwargs.items() if name not in ("s0", "s1")}
    defaults = {f"default.s{i}": of_another_value(rng, side.slots["given.s0"], PLAIN) for i in range(2)}
    side = replace(side, slots={**side.slots, **defaults})
    given = value_of(side.slots["given.s0"])
    return Change(replace(side, kwargs=kwargs | {"s1": given}), first=replace(side, kwargs=kwargs | {"s0": given}))


# -- changes of the program -------------------------------------------------------------------------------------------


def _fill(side: Side, values: Mapping[str, str]) -> Side:
    return replace(side, slots={**side.slots, **values})


def _slots(side: Side, prefix: str) -> list[str]:
    return [name for name in side.slots if name.startswith(prefix)]


def _refill(
    side: Side, rng: random.Random, prefix: str, families: Families,
    other: Callable[[random.Random, str, Families], str] | None = None,
) -> Change:  # fmt: skip
    """Put another literal into one of the slots with a prefix."""
    slot = rng.choice([name for name in _slots(side, prefix) if name not in ("attr.mutable", "global.MUTABLE")])
    other = other or rng.choice((of_another_type, of_another_value))
    second = _fill(side, {slot: other(rng, side.slots[slot], families)})
    return Change(second, live=_live_statements(side, second, slot, rng))


def _live_statements(first: Side, second: Side, slot: str, rng: random.Random) -> tuple[str, ...] | None:
    """Return what turns the one program into the other while it runs; None if only writing it anew does."""
    kind, name = slot.split(".")[:2]
    literal = second.slots[slot]
    if kind == "global":
        return (f"{name} = {literal}",)
    if kind == "attr":
        return (f"target.{name} = {literal}",)
    if kind == "class":
        owner = {"K": "Net", "K0": "B0", "K1": "B1"}[name]
        return (f"{owner}.{name} = {literal}",)
    if kind == "layer" and slot.count(".") == 2:
        return (f"target.{name}.{slot.split('.')[2]} = {literal}",)
    if kind == "closure":
        cell = f"target.__closure__[target.__code__.co_freevars.index({name!r})]"
        return (f"{cell}.cell_contents = {literal}",)
    if kind in ("const", "op", "call") and name in first.blocks:
        if name.startswith("h"):
            text = second.block(name)
            is_plain = f"def {name}_wrapper" not in text and "k=" not in text.partition("\n")[0]
            if is_plain and rng.random() < 0.5:
                renamed = text.replace(f"def {name}(", f"def {name}_new(")
                return (renamed, f"{name}.__code__ = {name}_new.__code__")
            return (text,)
        if name in ("B0", "B1") and "super()" not in second.block(name):
            method = next(m for m in ("tilt0", "tilt1", "tilt") if f"def {m}(" in second.block(name))
            return (second.block(name).replace(f"class {name}", f"class {name}New"),
                    f"{name}.{method} = {name}New.{method}")  # fmt: skip
    return None


def _change_number(prefix: str) -> Callable[[Side, random.Random], Change]:
    return lambda side, rng: _refill(side, rng, prefix, (NUMBERS,), of_another_type)


def _change_operator(side: Side, rng: random.Random) -> Change:
    return _refill(side, rng, "op.", (OPERATORS,), of_another_type)


def _call_another_helper(side: Side, rng: random.Random) -> Change:
    """Call another function; it does the same thing only if it is written the same way, so it is made not to."""
    side = _fill(side, {"const.h0": "1.5", "const.h1": "2.5"})
    second = _fill(side, {"call.h2": "h1"})
    return Change(second, first=side, live=_live_statements(side, second, "call.h2", rng))


def _change_type(prefix: str, families: Families) -> Callable[[Side, random.Random], Change]:
    return lambda side, rng: _refill(side, rng, prefix, families, of_another_type)


def _change_value(prefix: str, families: Families) -> Callable[[Side, random.Random], Change]:
    return lambda side, rng: _refill(side, rng, prefix, families, of_another_value)


def _exchange_arguments(side: Side, rng: random.Random) -> Change:
    literals = side.slots["construct.c0"], of_another_type(rng, side.slots["construct.c0"], COMPOSITE)
    first = _fill(side, dict(zip(("construct.c0", "construct.c1"), literals, strict=True)))
    second = _fill(side, dict(zip(("construct.c1", "construct.c0"), literals, strict=True)))
    return Change(second, first=first, live=None)


def _edit(*statements: str) -> Callable[[Side, random.Random], Change]:
    return lambda side, rng: Change(replace(side, edits=(*side.edits, rng.choice(statements))))


def _in_place(name: str, slot: str) -> Callable[[Side, random.Random], Change]:
    """Change a container without putting another in its place."""

    def change(side: Side, rng: random.Random) -> Change:
        literal = side.slots[slot]
        statements = {"[": ("append(2)", "insert(0, 3)", "reverse()", "__setitem__(0, 1.0)"),
                      "{'a": ("update(b=1)", "update(a=2)", "update(a=True)", "clear()"),
                      "{'x": ("add('z')", "remove('x')"),
                      "np": ("__setitem__(0, 3)", "__imul__(-1)"),
                      "Ho": ("held.append(2)", "__setattr__('held', 1)", "__setattr__('more', 1)")}  # fmt: skip
        chosen = rng.choice(next(found for start, found in statements.items() if literal.startswith(start)))
        return Change(replace(side, edits=(*side.edits, f"{name}.{chosen}")))

    return change


def _flip_weight_bit(names: str, *, way: str = "detach()") -> Callable[[Side, random.Random], Change]:
    """Change one bit of one weight, wherever it lies: a write that torch counts, but for one through ``data``."""

    def change(side: Side, rng: random.Random) -> Change:
        at, bit, which = rng.randrange(1 << 16), rng.randrange(31), rng.randrange(1 << 8)
        lines = (
            f"_all = {names}\n"
            f"_flat = _all[{which} % len(_all)].{way}.view(-1).view(torch.int32)\n"
            f"_flat[{at} % len(_flat)] ^= 1 << {bit}"
        )
        return Change(replace(side, edits=(*side.edits, lines)))

    return change


_PARAMETERS = "[p for p in target.parameters()]"
_BUFFERS = "[b for b in target.buffers() if b.dtype is torch.float32]"

_REPLACED = (
    "target.l0.weight = nn.Parameter(target.l0.weight.detach() * 2)",
    "target.l0.weight.data = target.l0.weight.data + 1",
    "target.l0.weight.data.add_(1)",
    "target.l0.weight.detach().numpy()[:] += 1",
    "target.load_state_dict({name: value + 1 for name, value in target.state_dict().items()})",
    "target.l0.weight = nn.Parameter(target.l0.weight.detach().flip(0))",
    "target.l0.weight.data = target.l0.weight.data.t()",
    "target.l0.bias = None",
)


def _change_option(side: Side, rng: random.Random) -> Change:
    slots = [
        slot for slot in _slots(side, "layer.")
        if slot.count(".") == 2 and f"@{slot}@" in side.slots[slot.rpartition(".")[0]]
    ]  # fmt: skip
    slot = rng.choice(slots)
    families = COMPOSITE if slot.endswith("scale") else (("1e-5", "1e-3", "0.1", "0.01", "0.5", "1"),)
    second = _fill(side, {slot: of_another_type(rng, side.slots[slot], families)})
    return Change(second, live=_live_statements(side, second, slot, rng))


def _refill_with(side: Side, rng: random.Random, slot: str, *literals: str) -> Change:
    second = _fill(side, {slot: rng.choice(literals)})
    return Change(second, live=_live_statements(side, second, slot, rng))


def _another_layer(side: Side, rng: random.Random) -> Change:
    slot = rng.choice([slot for slot in _slots(side, "layer.") if slot.count(".") == 1 and slot != "layer.l0"])
    kinds = [text.format(name=slot.split(".")[1]) for text in LAYERS.values()]
    return Change(_fill(side, {slot: rng.choice([text for text in kinds if text != side.slots[slot]])}), live=None)


_HOOKS = (
    "target.l0.register_forward_hook(lambda module, args, out: out + 1)",
    "target.l0.register_forward_pre_hook(lambda module, args: (args[0] * 2,))",
    "target.l0.forward = lambda y: y - 3",
    "target.l0.__class__ = type('Linear', (nn.Linear,), {'forward': lambda self, y: y * 3})",
)


def _mode(before: str, after: str) -> Callable[[Side, random.Random], Change]:
    return lambda side, _rng: Change(replace(side, mode=after), first=replace(side, mode=before))


def _option(name: str, *values: object) -> Callable[[Side, random.Random], Change]:
    def change(side: Side, rng: random.Random) -> Change:
        one, other = rng.sample(values, 2)
        first = replace(side, options={**side.options, name: one})
        return Change(replace(side, options={**side.options, name: other}), first=first, live=None)

    return change


# -- what stays the same ----------------------------------------------------------------------------------------------


def _strided(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Return equal values that lie otherwise in memory."""
    raw = _raw(tensor).reshape(*tensor.shape, -1) if tensor.numel() else None
    if raw is None:
        return tensor
    way = rng.randrange(4)
    if way == 0 and tensor.dim() > 1:  # the last dimension first
        moved = np.ascontiguousarray(np.moveaxis(raw, -2, 0))
        return _bytes_as(moved, tensor).movedim(0, -1)
    if way == 1:  # every second element of a longer one
        wide = np.repeat(raw[..., None, :], 2, -2)
        wide[..., 1, :] ^= 1
        return _bytes_as(wide, tensor)[..., 0]
    if way == 2:  # a view that begins inside its memory
        return _bytes_as(np.concatenate([raw.reshape(-1, raw.shape[-1])[:1], raw.reshape(-1, raw.shape[-1])]), tensor)[
            1:
        ].view(tensor.shape)
    padded = np.repeat(raw, 2, 0)  # rows far apart
    padded[1::2] ^= 1
    return _bytes_as(padded, tensor)[::2]


def _bytes_as(raw: np.ndarray[Any, Any], like: torch.Tensor) -> torch.Tensor:
    """Return an array whose last dimension is the bytes of an element as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(raw)).view(-1).view(like.dtype).reshape(raw.shape[:-1])


def _change_strides(side: Side, rng: random.Random) -> Change:
    return _all_rows(side, lambda tensor: _strided(tensor, rng))


def _change_memory_format(side: Side, rng: random.Random) -> Change:
    del rng
    return _all_rows(side, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)


def _call_otherwise(side: Side, rng: random.Random) -> Change:
    """Give by position what was given by keyword, or the other way round, in any order, defaults too."""
    arguments = side.arguments()
    n = rng.choice([i for i in range(len(side.names) + 1) if i != len(side.args)])
    given = {*side.names[: len(side.args)], *side.kwargs}
    rest = [(name, arguments[name]) for name in side.names[n:] if name in given or rng.random() < 0.5]
    rng.shuffle(rest)
    return Change(replace(side, args=tuple(arguments[name] for name in side.names[:n]), kwargs=dict(rest)))


def _say_defaults(side: Side, rng: random.Random) -> Change:
    """Give a default as an argument that was left out."""
    del rng
    first = replace(side, kwargs={name: value for name, value in side.kwargs.items() if name != "s0"})
    kwargs = {**first.kwargs, "s0": value_of(side.slots["default.s0"])}
    return Change(replace(side, kwargs=kwargs), first=first)


def _compose(choose: Callable[[random.Random, int], list[int]]) -> Callable[[Side, random.Random], Change]:
    """Make a batch of the same samples otherwise."""

    def change(side: Side, rng: random.Random) -> Change:
        rows = choose(rng, len(next(iter(_tensors_of(side).values()))))
        return _all_rows(side, lambda tensor: _selected(tensor, lambda raw: raw[rows]))

    return change


def _with_new_rows(side: Side, rng: random.Random) -> Change:
    """Let rows that are cached come in a batch with others, in the middle of them."""
    data = np.random.default_rng(rng.getrandbits(32))
    before, after = rng.randint(0, 2), rng.randint(1, 2)

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        new = _raw(random_tensor(data, tensor.dtype, (before + after, *tensor.shape[1:])))
        return _selected(tensor, lambda raw: np.concatenate([new[:before], raw, new[before:]]))

    return _all_rows(side, widen)


def _nothing(side: Side, rng: random.Random) -> Change:
    del rng
    return Change(side)


def _ritual(name: str) -> Callable[[Side, random.Random], Change]:
    return lambda side, _rng: Change(side, ritual=name)


def _write_docs(side: Side, rng: random.Random) -> Change:
    """Change what is only there to be read."""
    docs = {slot: rng.choice(('"""Say it."""', '"""Say it\n\n    at length."""', "", "# a comment")) for slot in
            _slots(side, "doc.")}  # fmt: skip
    blocks = {"note": '"""A program."""\n# with a comment\n\n', **side.blocks}
    return Change(replace(_fill(side, docs), blocks=blocks), live=None)


def _construct_otherwise(side: Side, rng: random.Random) -> Change:
    forms = (
        "Net(c1=@construct.c1@, c2=@construct.c2@, c0=@construct.c0@)",
        "Net(@construct.c0@, c2=@construct.c2@, c1=@construct.c1@)",
        "Net(*(@construct.c0@, @construct.c1@), **{'c2': @construct.c2@})",
    )
    if rng.random() < 0.5:
        return Change(replace(side, make=rng.choice(forms)), live=None)
    first = _fill(side, {"construct.c2": side.slots["construct.default2"]})
    return Change(replace(first, make="Net(@construct.c0@, @construct.c1@)"), first=first, live=None)


_HARMLESS = (
    "for p in target.parameters(): p.requires_grad_(False)",
    "target.l0.weight.data = target.l0.weight.detach().clone()",
    "target.l0.weight.data = target.l0.weight.detach().t().contiguous().t()",
    "target.load_state_dict({k: v.clone() for k, v in target.state_dict().items()})",
    "target.l0.weight = nn.Parameter(target.l0.weight.detach().clone(), requires_grad=False)",
    "with torch.no_grad(): target.l0.weight.mul_(1)",
    "target.torchcache_queue_timeout_seconds = 7.0",
    "target.l0.weight.grad = torch.ones(4, 4)",
    "torch.manual_seed(5)",
    "RAN.append(1)",
    "target.register_forward_hook(lambda module, args, out: None)",
)

_THERE_AND_BACK = (
    "target.l0.eval(); target.l0.train()",
    "_k = target.K; target.K = 7; del target.K",
    "_w = target.l0.weight; target.l0.weight = None; target.l0.weight = _w",
    "_h = h0; h0 = len; h0 = _h",
    "target.extra = 1; del target.extra",
    "target.l0.register_forward_hook(lambda *a: None).remove()",
)


def _subset(rng: random.Random, n: int) -> list[int]:
    return sorted(rng.sample(range(n), rng.randint(1, n - 1)))


def _shuffled(rng: random.Random, n: int) -> list[int]:
    return rng.sample(range(n), n)


def _repeated(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(n) for _ in range(n + rng.randint(1, 4))]


def _differs(change: Callable[[Side, random.Random], Change] | None, *needs: str, **more: Any) -> Kind:
    return Kind(differs=True, change=change, needs=needs, **more)


def _program(change: Callable[[Side, random.Random], Change], *needs: str, **more: Any) -> Kind:
    return Kind(differs=True, change=change, needs=needs, is_program=True, **more)


def _same(change: Callable[[Side, random.Random], Change], *needs: str, **more: Any) -> Kind:
    return Kind(differs=False, change=change, needs=needs, **more)


_STORED: dict[str, Any] = {"where": ("stored",), "share": 2}

KINDS: dict[str, Kind] = {
    # One bit anywhere, dtype, shape, split, order, names.
    "data: any bit": _differs(_flip_any_bit),
    "data: a bit of the last byte": _differs(_flip_last_byte),
    "data: two elements exchanged": _differs(_exchange_elements, "wide"),
    "data: rows paired otherwise": _differs(_pair_otherwise, "pair", "rows"),
    "data: bytes split otherwise": _differs(_move_bytes, "split"),
    "data: tensors exchanged": _differs(_exchange_tensors, "pair"),
    "data: tensor of another name": _differs(_rename_tensor, "optional"),
    "data: tensor left out": _differs(_leave_out_tensor, "optional"),
    "dtype: same bytes": _differs(_view_as_another_dtype),
    "dtype: same numbers": _differs(_convert),
    "shape": _differs(_reshape),
    # Plain arguments.
    "plain: another type": _differs(_give_another_type, "plain"),
    "plain: another value": _differs(_give_another_value, "plain"),
    "plain: two exchanged": _differs(_exchange_plain, "two_plain"),
    "plain: another name": _differs(_rename_plain, "two_plain"),
    # Weights.
    "weights: a bit of a parameter": _program(_flip_weight_bit(_PARAMETERS), "module"),
    "weights: a bit, uncounted": _program(_flip_weight_bit(_PARAMETERS, way="data"), "module"),
    "weights: a bit of a buffer": _program(_flip_weight_bit(_BUFFERS), "buffers"),
    "weights: replaced": _program(_edit(*_REPLACED), "module"),
    "weights: exchanged": _program(
        _edit("target.l0.weight, target.last.weight = target.last.weight, target.l0.weight"), "two_weights"
    ),
    "weights: another dtype": _program(_edit("target.double()", "target.bfloat16()"), "module"),
    "weights: of a global tensor": _program(_flip_weight_bit("[TABLE]"), "tensor_global"),
    "weights: of a global module": _program(_flip_weight_bit("[*LAYER.parameters()]"), "module_global"),
    "weights: of a closure's tensor": _program(
        _flip_weight_bit("[target.__closure__[target.__code__.co_freevars.index('c2')].cell_contents]"), "closure"
    ),
    # Construction arguments.
    "construction: another type": _program(_change_type("construct.c", COMPOSITE), "construct"),
    "construction: another value": _program(_change_value("construct.c", COMPOSITE), "construct"),
    "construction: two exchanged": _program(_exchange_arguments, "construct"),
    # Plain state.
    "state: another type": _program(_change_type("attr.", STATEFUL), "attributes"),
    "state: another value": _program(_change_value("attr.", STATEFUL), "attributes"),
    "state: changed in place": _program(_in_place("target.mutable", "attr.mutable"), "mutable_attribute"),
    "state: of an inner module": _program(_change_option, "options"),
    "state: one more attribute": _program(_edit("target.extra = 1", "target.l0.extra = None"), "module"),
    "state: class attribute": _program(_change_value("class.", COMPOSITE), "module"),
    "state: class attribute's type": _program(_change_type("class.", COMPOSITE), "module"),
    "state: another layer": _program(_another_layer, "sequence"),
    "state: layers in another order": _program(
        _edit("_s = [m for m in target.children() if isinstance(m, nn.Sequential)][-1]; _s[1] = nn.Identity()",
              "_s = [m for m in target.children() if isinstance(m, nn.Sequential)][-1]; _s[0], _s[2] = _s[2], _s[0]"),
        "sequence",
    ),
    "state: hook or override": _program(_edit(*_HOOKS), "module"),
    # Code.
    "code: a constant": _program(_change_number("const.")),
    "code: a constant of a base class": _program(_change_number("const.B"), "bases"),
    "code: an operator": _program(_change_operator),
    "code: another function called": _program(_call_another_helper, "callee"),
    "code: a default": _program(_change_value("default.s", PLAIN), "plain"),
    "code: a method": _program(_edit("Net.number_of = lambda self: 1; Net.K = property(Net.number_of)"), "class"),
    # Globals and closures.
    "globals: another type": _program(_change_type("global.", STATEFUL), "globals"),
    "globals: another value": _program(_change_value("global.", STATEFUL), "globals"),
    "globals: changed in place": _program(_in_place("MUTABLE", "global.MUTABLE"), "mutable_global"),
    "globals: another function": _program(_edit("h0 = lambda y: y + 7", "number = lambda v: 2.5", "h0 = torch.neg")),
    "closure: another type": _program(_change_type("closure.c0", STATEFUL), "closure"),
    "closure: another value": _program(_change_value("closure.c0", STATEFUL), "closure"),
    "closure: another function": _program(
        lambda side, rng: _refill_with(side, rng, "closure.c1", "(lambda y: y - 9)", "torch.abs", "h0"), "closure"
    ),
    # Mode.
    "mode: training": _program(_edit("target.eval()", "target.l0.eval()"), "module"),
    "mode: autocast": _program(_mode("", "autocast")),
    "mode: autocast's dtype": _program(_mode("autocast", "autocast_half")),
    "mode: default dtype": _program(_mode("", "double")),
    "mode: precision": _program(_mode("", "precision")),
    "mode: precision, by backend": _program(_mode("", "backend_precision")),
    "mode: fast path": _program(_mode("", "fastpath")),
    "mode: deterministic": _program(_mode("deterministic", "")),
    # Options that shape what is kept.
    "option: version": _program(_option("version", None, "", "1", "2")),
    "option: cache_dtype": _program(_option("cache_dtype", None, torch.float16, torch.bfloat16)),
    # The same by the rules.
    "same: again, result written into": _same(_nothing),
    "same: strides": _same(_change_strides),
    "same: memory format": _same(_change_memory_format, "image"),
    "same: position or keyword": _same(_call_otherwise),
    "same: default or argument": _same(_say_defaults, "plain"),
    "same: a part of the batch": _same(_compose(_subset), "rows"),
    "same: batch in another order": _same(_compose(_shuffled), "rows"),
    "same: rows repeated": _same(_compose(_repeated)),
    "same: with new rows": Kind(differs=True, change=_with_new_rows),
    "same: another thread": _same(_mode("", "thread")),
    "same: grad mode": _same(lambda side, rng: _mode(*rng.sample(("", "no_grad", "inference"), 2))(side, rng)),
    "same: harmless edits": _same(_edit(*_HARMLESS), "module"),
    "same: there and back": _same(_edit(*_THERE_AND_BACK), "module"),
    "same: written again": _same(_nothing, **_STORED),
    "same: other docstrings and comments": _same(_write_docs, **_STORED),
    "same: construction by keyword": _same(_construct_otherwise, "construct", **_STORED),
    "same: deep copy": _same(_ritual("copied"), "module", **_STORED),
    # In another process.
    "elsewhere: another process": _same(_nothing, where=("process",), share=4),
    "elsewhere: composed otherwise": _same(_compose(_shuffled), "rows", where=("process",), share=2),
    "elsewhere: forked": _same(_nothing, where=("fork",), share=1),
    "elsewhere: inherited by a fork": _same(_nothing, where=("inherited",), share=1),
    "elsewhere: forkserver": _same(_nothing, where=("forkserver",), share=1),
    "elsewhere: spawned": _same(_nothing, where=("spawn",), share=1),
    "elsewhere: a difference": _differs(None, where=("process",), share=4),
}  # fmt: skip

#: Differences that a second process is given.
_PORTABLE = tuple(
    name for name, kind in KINDS.items()
    if kind.differs and not name.startswith(("elsewhere", "mode", "option", "same"))
)  # fmt: skip
