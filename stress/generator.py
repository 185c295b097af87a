"""Writes programs: modules and functions of varied structure, with what a case needs in them.

The parts of a text that a case may change are slots, named by what they are: ``global.G0``, ``const.h1``,
``construct.c0``. Numbers are kept between 1/2 and 3, and sums are taken modulo something, so that nothing
overflows, whatever was generated.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stress.literals import COMPOSITE, NUMBERS, OPERATORS, PLAIN, STATEFUL, choose
from stress.programs import Side, value_of

#: What a call's tensors may be of; bits are random, so floating ones have every kind of number.
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
_ROW_SHAPES: tuple[tuple[int, ...], ...] = ((3,), (1,), (7,), (2, 3), (2, 1, 4), (3, 2, 2), (33,), (1, 1, 5, 2))
#: More than one leaf of the digest: 16 KiB, and a little.
_LONG_ROW_SHAPES: tuple[tuple[int, ...], ...] = ((2049,), (3, 32, 87), (4100,))
_MOST_ROWS = 5

_HEAD = """\
import enum
import functools
import zlib
from copy import deepcopy
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

RAN = []  # what the code changes itself does not count
"""

_TYPES = """\
class Point(NamedTuple):
    x: object
    y: object


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Shade(enum.Enum):
    RED = 1


@dataclass
class Config:
    size: object
    name: str


class Holder:
    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"{type(self).__name__}({self.held!r})"


class Other(Holder):
    pass
"""

#: Short, because all of it is walked for each program.
_TOOLS = """\
def fold(t, salt):
    rows = t.flatten(1) if t.dim() > 1 else t[:, None]
    flat = rows.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
    data = flat.view(len(t), rows.shape[1] * t.itemsize).long()
    total = (data * (torch.arange(1, data.shape[1] + 1) * salt % 8191)).sum(1) % 65521
    return torch.stack([total >> 8, total & 255, total % 97, total % 31], 1).to(torch.get_default_dtype()) / 64


def number(v):
    text = "".join(sorted(type(v).__name__ + repr(v)))  # sorted, because a set has no order
    return 0.5 + zlib.crc32(text.encode("utf-8", "backslashreplace")) % 61 / 32
"""

#: One function each, as it may be written; ``{call}`` is a function written before it.
_HELPERS = {
    "plain": """\
def {name}(y):
    @doc.{name}@
    return y @op.{name}@ @const.{name}@
""",
    "calls": """\
def {name}(y):
    @doc.{name}@
    z = @call.{name}@(y)
    return z @op.{name}@ @const.{name}@
""",
    "inner": """\
def {name}(y):
    @doc.{name}@
    f = lambda z, k=@const.{name}@: z @op.{name}@ k
    return f(y)
""",
    "comprehension": """\
def {name}(y):
    @doc.{name}@
    return sum([y @op.{name}@ k for k in (1.0, @const.{name}@)])
""",
    "choice": """\
def {name}(y):
    @doc.{name}@
    if "green" in {{"red", "blue", "green", repr(@const.{name}@)}}:
        return y @op.{name}@ @const.{name}@
    return y
""",
    "guarded": """\
def {name}(y):
    @doc.{name}@
    try:
        return y @op.{name}@ @const.{name}@
    except TypeError:
        return y
    finally:
        y = None
""",
    "default": """\
def {name}(y, k=@const.{name}@, *, more=(1, 2)):
    @doc.{name}@
    return y @op.{name}@ k * len(more)
""",
    "wrapped": """\
def {name}_wrapper(function):
    @functools.wraps(function)
    def wrapped(y):
        return function(y) @op.{name}@ @const.{name}@
    return wrapped


@{name}_wrapper
def {name}(y):
    @doc.{name}@
    return y
""",
}

#: Layers of four numbers in, four out; each may have an option that can also be set on the module.
LAYERS = {
    "linear": "nn.Linear(4, 4)",
    "unbiased": "nn.Linear(4, 4, bias=False)",
    "norm": "nn.LayerNorm(4, eps=@layer.{name}.eps@)",
    "group": "nn.GroupNorm(2, 4, eps=@layer.{name}.eps@)",
    "batch": "nn.BatchNorm1d(4, eps=@layer.{name}.eps@).eval()",
    "leaky": "nn.LeakyReLU(negative_slope=@layer.{name}.negative_slope@)",
    "sequence": "nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))",
    "large": "nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4))",
    "residual": "Residual(nn.Linear(4, 4), @layer.{name}.scale@)",
    "dropout": "nn.Dropout(0.5).eval()",
}

_RESIDUAL = """\
class Residual(nn.Module):
    def __init__(self, inner, scale):
        super().__init__()
        self.inner = inner
        self.scale = scale

    def forward(self, y):
        return y + self.inner(y) * number(self.scale)
"""


@dataclass(slots=True)
class Draft:
    """A program that is being written.

    Attributes:
        needs: What it must have, whatever else it gets.
    """

    rng: random.Random
    needs: frozenset[str]
    blocks: dict[str, str] = field(default_factory=dict)
    slots: dict[str, str] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)

    def has(self, need: str, chance: float) -> bool:
        """Tell whether to write it: if it is needed, and now and then."""
        return need in self.needs or self.rng.random() < chance


def write(rng: random.Random, needs: Iterable[str] = ()) -> Side:
    """Write a program and a call of it.

    Args:
        rng: All that is random.
        needs: "module", "instance" or "function" for the door; "globals", "tensor_global", "module_global",
            "mutable_global", "bases", "class_attribute", "construct", "attributes", "mutable_attribute", "layers",
            "options", "buffers", "sequence", "two_weights", "closure", "tensor_closure", "function_closure",
            "callee", "image", "pair", "split", "wide", "optional", "plain", "two_plain", "rows".
    """
    draft = Draft(rng, frozenset(needs))
    door = _choose_door(draft)
    draft.blocks |= {"head": _HEAD, "types": _TYPES, "tools": _TOOLS}
    _write_globals(draft)
    helpers = _write_helpers(draft)
    parameters, args, kwargs = _make_call(draft)
    make = _write_function(draft) if door == "function" else _write_class(draft, door)
    draft.steps += [f"y = {name}(y)" for name in helpers]
    _write_forward(draft, parameters, door)
    return Side(
        door=door, blocks=draft.blocks, slots=draft.slots, make=make, names=parameters.all, args=args, kwargs=kwargs,
        options={"check_rows": False},  # what is computed is counted; the suite of rows has the check
    )  # fmt: skip


def _choose_door(draft: Draft) -> str:
    doors = draft.needs & {"class", "instance", "function"}
    if doors:
        return min(doors)
    is_module = draft.needs & {
        "module", "bases", "class_attribute", "construct", "attributes", "mutable_attribute", "layers", "options",
        "buffers", "sequence", "two_weights",
    }  # fmt: skip
    of_functions = draft.needs & {"closure", "tensor_closure", "function_closure", "module_global"}
    if of_functions:
        return "function"
    return draft.rng.choice(("class", "class", "instance") if is_module else ("class", "instance", "function"))


# -- what lies around ---------------------------------------------------------------------------------------------


def _write_globals(draft: Draft) -> None:
    rng = draft.rng
    n = rng.randint(1, 3) if draft.has("globals", 0.5) else 0
    for i in range(n):
        _write_global(draft, f"G{i}", choose(rng, STATEFUL))
        draft.steps.append(f"y = y * number(G{i})")
    if draft.has("mutable_global", 0.15):
        _write_global(draft, "MUTABLE", rng.choice(("[1, 'a']", "{'a': 1}", "{'x', 'y'}", "np.array([1.0, 2.0])")))
        draft.steps.append("y = y + number(MUTABLE)")
    if draft.has("tensor_global", 0.15):
        numbers = [rng.randint(-8, 8) / 8 for _ in range(16)]
        draft.blocks["TABLE"] = f"TABLE = torch.tensor({numbers}).view(4, 4)\n"
        draft.steps.append("y = y @ TABLE.to(y.dtype)")
    if draft.has("module_global", 0.1):
        draft.blocks["LAYER"] = f"torch.manual_seed({rng.randrange(100)})\nLAYER = nn.Linear(4, 4)\n"
        draft.steps.append("y = LAYER(y.to(LAYER.weight.dtype)).to(y.dtype)")


def _write_global(draft: Draft, name: str, literal: str) -> None:
    draft.slots[f"global.{name}"] = literal
    draft.blocks[name] = f"{name} = @global.{name}@\n"


def _write_helpers(draft: Draft) -> list[str]:
    """Write the functions that are called; each may call those before it."""
    rng = draft.rng
    kinds = [rng.choice([kind for kind in _HELPERS if kind != "calls"]) for _ in range(rng.randint(1, 2))]
    if draft.has("callee", 0.3):
        kinds = [*(rng.choice(("plain", "inner", "guarded")) for _ in range(2)), "calls"]
    names = [f"h{i}" for i in range(len(kinds))]
    for name, kind in zip(names, kinds, strict=True):
        draft.blocks[name] = _HELPERS[kind].format(name=name)
        draft.slots |= {
            f"doc.{name}": "", f"op.{name}": rng.choice(OPERATORS), f"const.{name}": rng.choice(NUMBERS),
        }  # fmt: skip
        if kind == "calls":
            draft.slots[f"call.{name}"] = "h0"
    return names


# -- the call -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The parameters of what is called: tensors, tensors that may be left out, plain values."""

    tensors: tuple[str, ...]
    optional: tuple[str, ...]
    plain: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.tensors, *self.optional, *self.plain)


def _make_call(draft: Draft) -> tuple[_Parameters, tuple[Any, ...], dict[str, Any]]:
    rng = draft.rng
    data = np.random.default_rng(rng.getrandbits(32))
    n = rng.randint(2 if "rows" in draft.needs else 1, _MOST_ROWS)
    forms = [_choose_form(draft) for _ in range(rng.randint(1, 3))]
    if "pair" in draft.needs:
        forms = [forms[0], forms[0], *forms[2:]]
    if "split" in draft.needs:
        forms = [(forms[0][0], (rng.randint(2, 5),)), (forms[0][0], (rng.randint(2, 5),)), *forms[2:]]
    if "wide" in draft.needs:
        forms[0] = (forms[0][0], rng.choice(((3,), (7,), (2, 3))))
    if "image" in draft.needs:
        forms[0] = (forms[0][0], (3, 4, 2))
    tensors = {f"t{i}": random_tensor(data, dtype, (n, *shape)) for i, (dtype, shape) in enumerate(forms)}
    if len(tensors) == 3 and rng.random() < 0.3:
        tensors["t2"] = random_tensor(data, forms[2][0], rng.choice(((n,), (n, 0))))
    optional = ("a", "b") if draft.has("optional", 0.3) else ()
    if optional and draft.has("optional", 0.5):
        tensors["a"] = random_tensor(data, *_with_rows(_choose_form(draft), n))
    plain = tuple(f"s{i}" for i in range(2 if "two_plain" in draft.needs else rng.randint(0, 2)))
    if "plain" in draft.needs and not plain:
        plain = ("s0",)
    given: dict[str, Any] = {}
    for name in plain:
        draft.slots[f"default.{name}"] = choose(rng, PLAIN)
        if draft.needs & {"plain", "two_plain"} or rng.random() < 0.6:
            draft.slots[f"given.{name}"] = choose(rng, PLAIN)
            given[name] = value_of(draft.slots[f"given.{name}"])
    names = [name for name in tensors if name not in optional]
    n_positional = rng.randint(0, len(names))
    args = tuple(tensors[name] for name in names[:n_positional])
    kwargs = {name: tensors[name] for name in tensors if name not in names[:n_positional]} | given
    return _Parameters(tuple(names), optional, plain), args, kwargs


def _choose_form(draft: Draft) -> tuple[torch.dtype, tuple[int, ...]]:
    rng = draft.rng
    shapes = _LONG_ROW_SHAPES if rng.random() < 0.05 else _ROW_SHAPES
    return rng.choice(DTYPES), rng.choice(shapes)


def _with_rows(form: tuple[torch.dtype, tuple[int, ...]], n: int) -> tuple[torch.dtype, tuple[int, ...]]:
    return form[0], (n, *form[1])


def random_tensor(data: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of random bits."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = data.integers(0, 2 if dtype is torch.bool else 256, nbytes, dtype=np.uint8)
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


# -- the module or the function -------------------------------------------------------------------------------------


def _write_class(draft: Draft, door: str) -> str:
    rng = draft.rng
    bases = _write_bases(draft)
    draft.slots["class.K"] = choose(rng, COMPOSITE)
    draft.steps.append("y = y * number(self.K)")
    body = [f"class Net({', '.join(bases)}):", "    @doc.Net@", "    K = @class.K@", ""]
    draft.slots["doc.Net"] = ""
    constructor, assigned, make = _write_constructor(draft, door)
    layers = _write_layers(draft)
    draft.slots["seed"] = str(rng.randrange(1000))
    body += [f"    def __init__(self{constructor}):", "        super().__init__()", "        torch.manual_seed(@seed@)"]
    body += [f"        {line}" for line in [*assigned, *layers]]
    if draft.has("buffers", 0.3):
        body.append("        self.register_buffer('offset', torch.rand(4))")
        draft.steps.append("y = y + self.offset.to(y.dtype)")
    for i in range(rng.randint(1, 2) if draft.needs & {"attributes"} else rng.randint(0, 2)):
        draft.slots[f"attr.p{i}"] = choose(rng, STATEFUL)
        body.append(f"        self.p{i} = @attr.p{i}@")
        draft.steps.append(f"y = y + number(self.p{i})")
    if draft.has("mutable_attribute", 0.15):
        draft.slots["attr.mutable"] = rng.choice(("[1, 'a']", "{'a': 1}", "{'x', 'y'}", "Holder([1])"))
        body.append("        self.mutable = @attr.mutable@")
        draft.steps.append("y = y * number(self.mutable)")
    if "layers" in draft.needs or layers:
        draft.blocks.setdefault("residual", _RESIDUAL)
    draft.blocks["Net"] = "\n".join([*body, "", ""])
    return make


def _write_bases(draft: Draft) -> list[str]:
    rng = draft.rng
    if not draft.has("bases", 0.35):
        return ["nn.Module"]
    is_mixin = rng.random() < 0.5
    for i, base in enumerate(("B0", "B1")):
        above = ("object" if i == 0 else "nn.Module") if is_mixin else ("nn.Module" if i == 0 else "B0")
        inherited = "" if is_mixin or i == 0 else "y = super().tilt(y)\n        "
        draft.blocks[base] = (
            f"class {base}({above}):\n    @doc.{base}@\n    K{i} = @class.K{i}@\n\n"
            f"    def tilt{i if is_mixin else ''}(self, y):\n"
            f"        {inherited}return y @op.{base}@ @const.{base}@\n\n"
        )
        draft.slots |= {
            f"doc.{base}": "", f"class.K{i}": choose(rng, COMPOSITE), f"op.{base}": rng.choice(OPERATORS),
            f"const.{base}": rng.choice(NUMBERS),
        }  # fmt: skip
        draft.steps.append(f"y = y * number(self.K{i})")
    draft.steps += ["y = self.tilt0(y)", "y = self.tilt1(y)"] if is_mixin else ["y = self.tilt(y)"]
    return ["B0", "B1"] if is_mixin else ["B1"]


def _write_constructor(draft: Draft, door: str) -> tuple[str, list[str], str]:
    """Return the parameters of ``__init__``, what it does with them, and the expression that makes a module."""
    if not draft.has("construct", 0.3):
        return "", [], "Net()"
    rng = draft.rng
    for name in ("c0", "c1", "c2", "default1", "default2"):
        draft.slots[f"construct.{name}"] = choose(rng, COMPOSITE)
    draft.steps += ["y = y - number(self.c0)", "y = y * number(self.c1)"]
    parameters = ", c0, c1=@construct.default1@, *, c2=@construct.default2@"
    assigned = ["self.c0 = c0", "self.c1 = c1"]
    if door == "instance" or rng.random() < 0.5:  # of a class, an argument counts that leaves no trace
        assigned.append("self.c2 = c2")
    return parameters, assigned, "Net(@construct.c0@, @construct.c1@, c2=@construct.c2@)"


def _write_layers(draft: Draft) -> list[str]:
    rng = draft.rng
    kinds = [rng.choice(list(LAYERS)) for _ in range(rng.randint(0, 2))]
    if draft.needs & {"layers"} and not kinds:
        kinds = [rng.choice(list(LAYERS))]
    if "options" in draft.needs:
        kinds.append(rng.choice([kind for kind, text in LAYERS.items() if "@" in text]))
    if "sequence" in draft.needs:
        kinds.append("sequence")
    kinds = ["linear", *kinds]  # so that a module always has weights
    lines = []
    for i, kind in enumerate(kinds):
        name = f"l{i}"
        lines.append(f"self.{name} = @layer.{name}@")
        draft.slots[f"layer.{name}.eps"] = rng.choice(("1e-5", "1e-3", "0.1"))
        draft.slots[f"layer.{name}.negative_slope"] = rng.choice(("0.01", "0.5", "1"))
        draft.slots[f"layer.{name}.scale"] = choose(rng, COMPOSITE)
        draft.slots[f"layer.{name}"] = LAYERS[kind].format(name=name)
        draft.steps.append(f"y = self.{name}(y)")
    if "two_weights" in draft.needs:
        lines.append("self.last = nn.Linear(4, 4)")
        draft.steps.append("y = self.last(y)")
    return lines


def _write_function(draft: Draft) -> str:
    rng = draft.rng
    if not draft.has("closure", 0.3) and not draft.needs & {"tensor_closure", "function_closure"}:
        return "compute"
    draft.slots["closure.c0"] = choose(rng, STATEFUL)
    draft.steps.append("y = y * number(c0)")
    draft.slots["closure.c1"] = "(lambda y: y @op.held@ @const.held@)".replace("@op.held@", rng.choice(OPERATORS))
    draft.slots["closure.c1"] = draft.slots["closure.c1"].replace("@const.held@", rng.choice(NUMBERS))
    draft.steps.append("y = c1(y)")
    draft.slots["closure.c2"] = f"torch.tensor({[rng.randint(-8, 8) / 8 for _ in range(4)]})"
    draft.steps.append("y = y + c2.to(y.dtype)")
    return "make(@closure.c0@, @closure.c1@, @closure.c2@)"


def _write_forward(draft: Draft, parameters: _Parameters, door: str) -> None:
    """Write the function that is cached: every part is used, in any order."""
    rng = draft.rng
    steps = [*draft.steps, "y = y * number(1)"]
    steps += [f"y = y + fold({name}, {3 + 2 * i}).to(y.dtype)" for i, name in enumerate(parameters.tensors[1:])]
    for name in parameters.optional:
        steps.append(f"y = y if {name} is None else y - fold({name}, {11 + len(name)}).to(y.dtype) * {ord(name)}")
    steps += [f"y = y * number({name}) + {i}" for i, name in enumerate(parameters.plain)]
    rng.shuffle(steps)
    at = rng.randint(0, len(steps))
    steps.insert(at, "y = y @op.forward@ @const.forward@")
    draft.slots |= {"op.forward": rng.choice(OPERATORS), "const.forward": rng.choice(NUMBERS), "doc.forward": ""}
    signature = [*parameters.tensors, *(f"{name}=None" for name in parameters.optional)]
    signature += [f"{name}=@default.{name}@" for name in parameters.plain]
    ran = ", ".join(f"{name}={name}" for name in parameters.all)
    start = f"y = fold({parameters.tensors[0]}, 1)"
    if door != "function":
        start += ".to(self.l0.weight.dtype)"
    ends = ("y", "(y, y.sum(1))", "{'y': y, 'n': y.argmax(1)}", "[y, y[:, :1].half()]")
    lines = ["@doc.forward@", f"RAN.append(dict({ran}))", start, *steps, f"return {rng.choice(ends)}"]
    if door != "function":
        text = _indented(f"def forward(self, {', '.join(signature)}):", lines, 1)
        draft.blocks["Net"] += text
    elif "closure.c0" in draft.slots:
        inner = _indented(f"def compute({', '.join(signature)}):", lines, 1)
        draft.blocks["compute"] = f"def make(c0, c1, c2):\n{inner}\n    return compute\n"
    else:
        draft.blocks["compute"] = _indented(f"def compute({', '.join(signature)}):", lines, 0)


def _indented(head: str, lines: list[str], depth: int) -> str:
    margin = "    " * depth
    return "\n".join([f"{margin}{head}", *(f"{margin}    {line}" for line in lines), ""])
