"""The rows of ``wrong-hits`` that need one process: small programs, as a user writes them.

Each returns what a program without a cache would find out the same: values of cached calls, mostly. It runs
with each cache in turn, in a fresh copy of this file, and what it returns is compared bit by bit with what
it returns when nothing is cached. Numbers are small integers in floats, so that no sum depends on its order.
"""

# ruff: noqa: ANN401 - functions of tensors, of arrays, of whatever a user has

from __future__ import annotations

import linecache
import os
import threading
import types
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.wrong_hits.rows import WIDTH, Rows, numbers
from benchmarks.wrong_hits.sides import Cached, Side

from . import settings

ROWS = Rows()
row = ROWS.add


def twice(x: Any) -> Any:
    return x * 2


def encode(model: nn.Module, x: Any) -> Any:
    """Call a model; what caches functions gets the model as an argument."""
    return model(torch.as_tensor(x))


def each_alone(cached: Cached, rows: Tensor) -> Tensor:
    """Call it with one row at a time."""
    return torch.cat([cached(one[None]) for one in rows])


def cell(source: str, number: int) -> None:
    """Run a cell of a notebook in this module, with its text where notebooks put it."""
    name = f"<cell {number}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), globals())


# -- nothing changes --------------------------------------------------------------------------------------------


@row("Nothing changes", "the same call again, a function")
def again_function(side: Side) -> object:
    work = side.function(twice)
    work(numbers())
    return work(numbers())


@row("Nothing changes", "the same call again, a module")
def again_module(side: Side) -> object:
    model = side.module(Scale)
    model(numbers())
    return model(numbers())


# -- inputs -----------------------------------------------------------------------------------------------------


def _nearby(side: Side, original: Tensor, others: Tensor) -> object:
    work = side.function(twice)
    work(original[None])
    return each_alone(work, others)


@row("Inputs", "0.001 in one element of an image (3 x 32 x 32)", "inputs")
def one_thousandth(side: Side) -> object:
    image = torch.rand(3 * 32 * 32, generator=torch.Generator().manual_seed(1))
    return _nearby(side, image, image + torch.eye(16, len(image)) * 0.001)


@row("Inputs", "one bit of one element", "inputs")
def one_bit(side: Side) -> object:
    image = torch.rand(3 * 32 * 32, generator=torch.Generator().manual_seed(1))
    others = (image.view(torch.int32) ^ torch.eye(16, len(image), dtype=torch.int32)).view(torch.float32)
    return _nearby(side, image, others)


@row("Inputs", "rows that are nearly equal (frames of a video)", "inputs")
def nearly_equal(side: Side) -> object:
    generator = torch.Generator().manual_seed(2)
    frame = torch.rand(64, generator=generator)
    return _nearby(side, frame, frame + torch.randn(32, 64, generator=generator) * 1e-3)


@row("Inputs", "8-bit images as floats, one level in one pixel", "inputs")
def one_level(side: Side) -> object:
    image = torch.randint(0, 255, (64,), generator=torch.Generator().manual_seed(3)) / 255
    return _nearby(side, image, image + torch.eye(64) / 255)


@row("Inputs", "1024 different small images (4 x 4)", "inputs")
def many_small(side: Side) -> object:
    images = torch.rand(1024, 16, generator=torch.Generator().manual_seed(4))
    work = side.function(twice)
    return torch.cat([work(batch) for batch in images.split(32)])


@row("Inputs", "one pixel of a large image (3 x 224 x 224) from 0 to 1", "inputs")
def one_pixel(side: Side) -> object:
    others = torch.zeros(4, 3 * 224 * 224)
    others[range(4), range(1001, 1005)] = 1
    return _nearby(side, torch.zeros(3 * 224 * 224), others)


@row("Inputs", "equal bytes of another dtype", "inputs")
def other_dtype(side: Side) -> object:
    work = side.function(twice)
    bits = torch.arange(1, 17, dtype=torch.int32).view(2, 8)
    work(bits.view(torch.float32))
    return work(bits)


@row("Inputs", "equal values of another dtype", "inputs")
def other_dtype_same_values(side: Side) -> object:
    work = side.function(twice)
    work(numbers().int())
    return work(numbers())


@row("Inputs", "equal bytes of another shape", "inputs")
def other_shape(side: Side) -> object:
    work = side.function(twice)
    work(numbers().view(4, 2, 4))
    return work(numbers().view(4, 4, 2))


@row("Inputs", "a slice of the same tensor, elsewhere", "inputs")
def other_slice(side: Side) -> object:
    work, x = side.function(twice), numbers(8)
    work(x[:4])
    return work(x[4:])


@row("Inputs", "0.0 and -0.0 (1 / x)", "inputs")
def negative_zero(side: Side) -> object:
    work = side.function(_inverse)
    work(torch.zeros(1, WIDTH))
    return work(-torch.zeros(1, WIDTH))


@row("Inputs", "the input's memory holds the next batch", "inputs")
def memory_used_again(side: Side) -> object:
    work, x = side.function(twice), numbers()
    work(x)
    x.copy_(numbers(seed=1))
    return work(x)


def _inverse(x: Any) -> Tensor:
    return 1 / torch.as_tensor(x)


# -- arguments --------------------------------------------------------------------------------------------------


@row("Arguments", "two tensors swapped", "inputs")
def tensors_swapped(side: Side) -> object:
    work, a, b = side.function(_subtract), numbers(), numbers(seed=1)
    work(a, b)
    return work(b, a)


@row("Arguments", "two tensors swapped by keyword", "inputs")
def keywords_swapped(side: Side) -> object:
    work, a, b = side.function(_subtract), numbers(), numbers(seed=1)
    work(a=a, b=b, ids=["a", "b", "c", "d"])
    return work(b=a, a=b, ids=["a", "b", "c", "d"])


@row("Arguments", "the same numbers split otherwise over two tensors", "inputs")
def split_otherwise(side: Side) -> object:
    work, x = side.function(_subtract_sums), numbers()
    work(x[:, :2], x[:, 2:])
    return work(x[:, :6], x[:, 6:])


@row("Arguments", "two numbers swapped", "inputs")
def numbers_swapped(side: Side) -> object:
    work = side.function(_affine)
    work(numbers(), 2, 3)
    return work(numbers(), 3, 2)


@row("Arguments", "two equal numbers, then two others", "inputs")
def equal_numbers(side: Side) -> object:
    work = side.function(_affine)
    work(numbers(), 2, 2)
    return work(numbers(), 3, 3)


@row("Arguments", "the same number under another keyword", "inputs")
def other_keyword(side: Side) -> object:
    work = side.function(_affine)
    work(numbers(), scale=3)
    return work(numbers(), shift=3)


@row("Arguments", "positional, keyword, default", "inputs")
def keyword_or_default(side: Side) -> object:
    work = side.function(_affine)
    return [work(numbers(), 2), work(numbers(), scale=2), work(numbers()), work(numbers(), 1, 0)]


@row("Arguments", '1, True, 1.0 and "1"', "inputs")
def one_of_four_types(side: Side) -> object:
    work = side.function(_by_type)
    return [work(numbers(), kind) for kind in (1, True, 1.0, "1")]


def _subtract(a: Any, b: Any) -> Any:
    return a - b


def _subtract_sums(a: Any, b: Any) -> Any:
    return a.sum(1, keepdims=True) - b.sum(1, keepdims=True)


def _affine(x: Any, scale: float = 1, shift: float = 0) -> Any:
    return x * scale + shift


def _by_type(x: Any, kind: object) -> Any:
    return x * {"int": 2, "bool": 3, "float": 4, "str": 5}[type(kind).__name__]


# -- weights ----------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A frozen module with a weight, a buffer and a plain attribute."""

    factor = 1

    def __init__(self, scale: float = 2) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.arange(1.0, WIDTH + 1), requires_grad=False)
        self.register_buffer("offset", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add."""
        return x * self.weight * self.scale * self.factor + self.offset


def _after(side: Side, change: Callable[[Any], object], cls: type[nn.Module] | None = None) -> object:
    """Call a module, change it, call it again."""
    model = side.module(cls or Scale)
    model(numbers())
    change(model.inner)
    return model(numbers())


@row("Weights", "`load_state_dict()`")
def state_dict_loaded(side: Side) -> object:
    return _after(side, lambda m: m.load_state_dict({"weight": torch.ones(WIDTH), "offset": torch.ones(WIDTH)}))


@row("Weights", "changed in place under `no_grad()`")
def weight_changed(side: Side) -> object:
    def change(m: Any) -> None:
        with torch.no_grad():
            m.weight.mul_(2)

    return _after(side, change)


@row("Weights", "changed through `.data`")
def weight_data_changed(side: Side) -> object:
    return _after(side, lambda m: m.weight.data.add_(1))


@row("Weights", "changed through a NumPy alias")
def weight_alias_changed(side: Side) -> object:
    return _after(side, lambda m: np.add(m.weight.numpy(), 1, out=m.weight.numpy()))


@row("Weights", "an optimizer's step")
def optimizer_step(side: Side) -> object:
    def change(m: Any) -> None:
        m.weight.requires_grad_(True)
        m.weight.grad = torch.ones(WIDTH)
        torch.optim.SGD(m.parameters(), lr=1).step()
        m.weight.requires_grad_(False)

    return _after(side, change)


@row("Weights", "a buffer changed in place")
def buffer_changed(side: Side) -> object:
    return _after(side, lambda m: m.offset.add_(1))


@row("Weights", "another `Parameter` assigned")
def parameter_assigned(side: Side) -> object:
    def change(m: Any) -> None:
        m.weight = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    return _after(side, change)


@row("Weights", "`m.double()`")
def weights_cast(side: Side) -> object:
    return _after(side, lambda m: m.double())


@row("Weights", "one element of a million through NumPy, then `refresh()`")
def hidden_write(side: Side) -> object:
    model = side.module(Table)
    model(numbers())
    model.inner.table.numpy()[123_456] = 5
    side.refresh(model)
    return model(numbers())


@row("Weights", "an inner module replaced")
def inner_replaced(side: Side) -> object:
    def change(m: Any) -> None:
        m.inner = nn.Softsign()

    return _after(side, change, Outer)


@row("Weights", "a tensor that a function finds in a global")
def global_tensor(side: Side) -> object:
    work = side.function(_with_gain)
    work(numbers())
    GAIN.add_(1)
    return work(numbers())


@row("Weights", "a module that a function finds in a global")
def global_module(side: Side) -> object:
    work = side.function(_with_encoder)
    work(numbers())
    ENCODER.weight.data.add_(1)
    return work(numbers())


class Table(nn.Module):
    """A module with a large buffer."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(1_000_000))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the table's sum, in a few pieces."""
        return x * self.table[123_000:124_000].sum()


class Outer(nn.Module):
    """A module with an inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Pass it on."""
        return self.inner(x - 50)  # type: ignore[no-any-return]


GAIN = torch.ones(WIDTH)
ENCODER = Scale()


def _with_gain(x: Any) -> Tensor:
    return torch.as_tensor(x) * GAIN


def _with_encoder(x: Any) -> Tensor:
    return ENCODER(torch.as_tensor(x))  # type: ignore[no-any-return]


# -- instances --------------------------------------------------------------------------------------------------


@row("Instances", "two instances of a class, with weights of their own")
def two_instances(side: Side) -> object:
    torch.manual_seed(5)
    first, second = side.module(Random), side.module(Random)
    return [first(numbers()), second(numbers())]


@row("Instances", "two instances with other construction arguments")
def other_arguments(side: Side) -> object:
    first, second = side.module(Scale, 2), side.module(Scale, 3)
    return [first(numbers()), second(numbers())]


@row("Instances", "argument objects whose `repr` is the same")
def equal_reprs(side: Side) -> object:
    first, second = side.module(Configured, Config(2)), side.module(Configured, Config(3))
    return [first(numbers()), second(numbers())]


@row("Instances", "a deep copy with other weights")
def deep_copy(side: Side) -> object:
    model = side.module(Scale)
    model(numbers())
    copied = model.copied()
    copied.inner.weight.data.add_(1)
    return [copied(numbers()), model(numbers())]


@row("Instances", "two classes of one name")
def two_classes(side: Side) -> object:
    first, second = side.module(_make_class(2)), side.module(_make_class(3))
    return [first(numbers()), second(numbers())]


class Random(nn.Module):
    """A module that is initialised at random."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(1, 100, (WIDTH,)).float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.weight


class Config:
    """An object that does not say what it holds."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __repr__(self) -> str:
        return "Config"


class Configured(nn.Module):
    """A module that keeps its configuration."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.config.scale


def _make_class(scale: float) -> type[nn.Module]:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale

    return Local


# -- attributes and modes ---------------------------------------------------------------------------------------


@row("Attributes and modes", "`m.scale = 3`")
def attribute_changed(side: Side) -> object:
    return _after(side, lambda m: setattr(m, "scale", 3))


@row("Attributes and modes", "a list in an attribute changed in place")
def list_changed(side: Side) -> object:
    return _after(side, lambda m: m.factors.append(3), Factors)


@row("Attributes and modes", "an attribute of the class changed")
def class_attribute_changed(side: Side) -> object:
    return _after(side, lambda _: setattr(Scale, "factor", 3))


@row("Attributes and modes", "`conv.stride` changed")
def stride_changed(side: Side) -> object:
    return _after(side, lambda m: setattr(m.conv, "stride", (2,)), Convolution)


@row("Attributes and modes", "`norm.eps` changed")
def eps_changed(side: Side) -> object:
    return _after(side, lambda m: setattr(m.norm, "eps", 1000.0), Norm)


@row("Attributes and modes", "`train()` and `eval()`")
def mode_changed(side: Side) -> object:
    return _after(side, lambda m: m.eval(), ByMode)


@row("Attributes and modes", "`eval()` of an inner module")
def inner_mode_changed(side: Side) -> object:
    return _after(side, lambda m: m.inner.eval(), OuterByMode)


@row("Attributes and modes", "autocast on and off")
def autocast(side: Side) -> object:
    model = side.module(Linear)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(numbers())
    return [inside, model(numbers())]


@row("Attributes and modes", "another default dtype")
def default_dtype(side: Side) -> object:
    work = side.function(_halved)
    work(numbers().int())
    torch.set_default_dtype(torch.float64)
    try:
        return work(numbers().int())
    finally:
        torch.set_default_dtype(torch.float32)


@row("Attributes and modes", "a hook on the module")
def hook_outside(side: Side) -> object:
    return _after(side, lambda m: m.register_forward_hook(hook))


@row("Attributes and modes", "a hook on an inner module")
def hook_inside(side: Side) -> object:
    return _after(side, lambda m: m.inner.register_forward_hook(hook), Outer)


@row("Attributes and modes", "a pre-hook that changes the input")
def pre_hook(side: Side) -> object:
    return _after(side, lambda m: m.register_forward_pre_hook(hook_before))


@row("Attributes and modes", "`forward` of an inner instance replaced")
def forward_replaced(side: Side) -> object:
    def change(m: Any) -> None:
        m.inner.forward = types.MethodType(_other_forward, m.inner)

    return _after(side, change, Outer)


class Factors(nn.Module):
    """A module with a list."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = [2]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by each."""
        for factor in self.factors:
            x = x * factor
        return x


class Convolution(nn.Module):
    """A convolution over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3).requires_grad_(False)
        nn.init.constant_(self.conv.weight, 2)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return self.conv(x[:, None])[:, 0]  # type: ignore[no-any-return]


class Norm(nn.Module):
    """A layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return self.norm(x)  # type: ignore[no-any-return]


class ByMode(nn.Module):
    """A module that computes something else in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * (2 if self.training else 3)


class OuterByMode(nn.Module):
    """A module whose inner one computes something else in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ByMode()

    def forward(self, x: Tensor) -> Tensor:
        """Pass it on."""
        return self.inner(x)  # type: ignore[no-any-return]


class Linear(nn.Module):
    """A linear layer of small integers, exact in bfloat16 too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2, bias=False).requires_grad_(False)
        nn.init.ones_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Sum."""
        return self.linear(x)  # type: ignore[no-any-return]


def _halved(x: Any) -> Tensor:
    return torch.as_tensor(x) / 2


def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    """Change what a module returns."""
    return output + 1


def hook_before(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Change what a module gets."""
    return (args[0] + 1,)


def _other_forward(_module: nn.Module, x: Tensor) -> Tensor:
    return x * 7


# -- code in a running program ----------------------------------------------------------------------------------


@row("Code, in one program", "a global constant redefined")
def constant_redefined(side: Side) -> object:
    work = side.function(_with_constant)
    work(numbers())
    cell("CONSTANT = 3\n", 1)
    return work(numbers())


@row("Code, in one program", "a constant of another module of one's own redefined")
def setting_redefined(side: Side) -> object:
    work = side.function(_with_setting)
    work(numbers())
    settings.FACTOR = 3
    return work(numbers())


@row("Code, in one program", "a global list changed in place")
def global_list_changed(side: Side) -> object:
    work = side.function(_with_list)
    work(numbers())
    FACTORS[0] = 3
    return work(numbers())


@row("Code, in one program", "a helper redefined (a cell run again)")
def helper_redefined(side: Side) -> object:
    work = side.function(_with_helper)
    work(numbers())
    cell("def helper(x):\n    return x * 3\n", 1)
    return work(numbers())


@row("Code, in one program", "a helper module's method redefined")
def method_redefined(side: Side) -> object:
    def change(_: Any) -> None:
        ByMode.forward = lambda _self, x: x * 7  # type: ignore[method-assign, assignment, misc]

    return _after(side, change, OuterByMode)


@row("Code, in one program", "the cached function redefined (its cell edited)")
def cached_redefined(side: Side) -> object:
    cell("def cell_work(x):\n    return x * 2\n", 1)
    side.function(globals()["cell_work"])(numbers())
    cell("def cell_work(x):\n    return x * 3\n", 1)
    return side.function(globals()["cell_work"])(numbers())


@row("Code, in one program", "a default argument that is a list, changed in place")
def default_changed(side: Side) -> object:
    work = side.function(_with_default)
    work(numbers())
    _with_default.__defaults__[0].append(3)  # type: ignore[index]
    return work(numbers())


@row("Code, in one program", "two closures with other values")
def two_closures(side: Side) -> object:
    first, second = side.function(_make_closure(2)), side.function(_make_closure(3))
    return [first(numbers()), second(numbers())]


@row("Code, in one program", "a closure's variable changed")
def closure_changed(side: Side) -> object:
    scale = 2

    def work(x: Any) -> Any:
        return x * scale

    cached = side.function(work)
    cached(numbers())
    scale = 3
    return cached(numbers())


@row("Code, in one program", "two lambdas")
def two_lambdas(side: Side) -> object:
    first, second = side.function(lambda x: x * 2), side.function(lambda x: x * 3)
    return [first(numbers()), second(numbers())]


CONSTANT = 2
FACTORS = [2]


def helper(x: Any) -> Any:
    """Scale."""
    return x * 2


def _with_constant(x: Any) -> Any:
    return x * CONSTANT


def _with_setting(x: Any) -> Any:
    return x * settings.FACTOR


def _with_list(x: Any) -> Any:
    return x * FACTORS[0]


def _with_helper(x: Any) -> Any:
    return helper(x)


def _with_default(x: Any, factors: list[int] = [2]) -> Any:  # noqa: B006 - the case is about this trap
    return x * sum(factors)


def _make_closure(scale: float) -> Callable[[Any], Any]:
    def work(x: Any) -> Any:
        return x * scale

    return work


# -- who owns the memory ----------------------------------------------------------------------------------------


@row("Memory", "the caller writes into the result")
def result_written(side: Side) -> object:
    work = side.function(twice)
    for _ in range(3):
        work(numbers()).zero_()
    return work(numbers())


@row("Memory", "the caller writes into the input, then asks for the old one", "inputs")
def input_written(side: Side) -> object:
    work, x = side.function(twice), numbers()
    work(x)
    x.zero_()
    return [work(x), work(numbers())]


@row("Memory", "the result is the input, and the caller writes into it")
def identity_written(side: Side) -> object:
    work, x = side.function(_identity), numbers()
    work(x)
    x.zero_()
    return work(numbers())


@row("Memory", "a result is kept while other batches are looked up", "inputs")
def result_kept(side: Side) -> object:
    work = side.function(twice)
    for seed in (0, 1):
        work(numbers(seed=seed))
    kept = work(numbers(seed=0))
    work(numbers(seed=1))
    return kept


def _identity(x: Any) -> Any:
    return x


# -- batches ----------------------------------------------------------------------------------------------------


@row("Batches", "another order, another size, equal rows")
def other_batches(side: Side) -> object:
    work, x = side.function(twice), numbers(8)
    order = [3, 1, 1, 7, 0]
    work(x[:4], ids=list("abcd"))
    return [work(x[order], ids=["abcdefgh"[i] for i in order]), work(x, ids=list("abcdefgh"))]


@row("Batches", "shorter rows after longer ones", "inputs")
def shorter_rows(side: Side) -> object:
    work, long, short = side.function(twice), numbers(), numbers(2, 4)
    work(long)
    work(short)
    return [work(short), work(long)]


@row("Batches", "an empty batch", "batches")
def empty_batch(side: Side) -> object:
    work = side.function(twice)
    work(numbers())
    return work(numbers()[:0])


@row("Batches", "a forward that draws random numbers: two calls differ")
def random_numbers(side: Side) -> object:
    work = side.function(_with_noise, is_random=True)
    return bool((work(numbers()) != work(numbers())).any())


@row("Batches", "a forward that draws from a `torch.Generator` of its own: two calls differ")
def own_generator(side: Side) -> object:
    work = side.function(_with_own_noise, is_random=True)
    return bool((work(numbers()) != work(numbers())).any())


@row("Batches", "a forward that draws from a NumPy generator of its own: two calls differ")
def numpy_generator(side: Side) -> object:
    work = side.function(_with_numpy_noise, is_random=True)
    return bool((work(numbers()) != work(numbers())).any())


@row("Batches", "dropout in training: two calls differ")
def dropout(side: Side) -> object:
    model = side.module(Dropout, is_random=True)
    return bool((model(numbers()) != model(numbers())).any())


def _third_batch(cached: Cached) -> object:
    """Call with two batches, then with rows of both: a cache has had two batches to see what goes on."""
    x = numbers(8)
    cached(x[:4], ids=list("abcd"))
    cached(x[4:], ids=list("efgh"))
    return cached(x[[0, 5, 2, 7]], ids=list("afch"))


@row("Batches", "rows minus their batch's mean, third batch", "batches")
def centred(side: Side) -> object:
    return _third_batch(side.function(_centre))


@row("Batches", "rows are time steps (cumsum over dimension 0), third batch", "batches")
def time_steps(side: Side) -> object:
    return _third_batch(side.function(_accumulate))


@row("Batches", "batch norm in training, third batch", "batches")
def batch_norm(side: Side) -> object:
    return _third_batch(side.module(BatchNorm))


@row("Batches", "batch norm's running statistics after two equal batches", "batches")
def running_statistics(side: Side) -> object:
    model = side.module(BatchNorm)
    model(numbers())
    model(numbers())
    return model.inner.norm.running_mean.clone()


@row("Batches", "two threads call at once", "inputs")
def two_threads(side: Side) -> object:
    work = side.function(twice)
    wrong: list[object] = []

    def calls(start: int) -> None:
        try:
            for seed in range(start, start + 100):
                x = numbers(seed=seed % 50)
                if not torch.equal(work(x), x * 2):
                    wrong.append(seed)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=calls, args=(start,)) for start in (0, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors := [each for each in wrong if isinstance(each, Exception)]:
        raise errors[0]
    return wrong


class Dropout(nn.Module):
    """Dropout, in training mode as constructed."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Drop."""
        return self.dropout(x)  # type: ignore[no-any-return]


class BatchNorm(nn.Module):
    """A batch norm, in training mode as constructed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return self.norm(x)  # type: ignore[no-any-return]


def _with_noise(x: Any) -> Tensor:
    return torch.as_tensor(x) + torch.rand(x.shape)


def _with_own_noise(x: Any) -> Tensor:
    return torch.as_tensor(x) + torch.rand(x.shape, generator=GENERATOR)


def _with_numpy_noise(x: Any) -> Tensor:
    return torch.as_tensor(x) + torch.from_numpy(NUMPY_GENERATOR.random(x.shape)).float()


GENERATOR = torch.Generator()
NUMPY_GENERATOR = np.random.default_rng(0)


def _centre(x: Any) -> Tensor:
    return torch.as_tensor(x) - torch.as_tensor(x).mean(0)


def _accumulate(x: Any) -> Tensor:
    return torch.as_tensor(x).cumsum(0)


# -- outputs ----------------------------------------------------------------------------------------------------


def _second(side: Side, function: Callable[..., Any], *, ids: Sequence[str] | None = None) -> object:
    work = side.function(function)
    work(numbers(), ids=ids)
    return work(numbers(), ids=ids)


def _second_structure(side: Side, function: Callable[..., Any]) -> object:
    # Who names samples names the batch here, since a structure cannot be split by those names.
    return _second(side, function, ids=["batch"])


@row("Results", "float64 from float32")
def float64_result(side: Side) -> object:
    return _second(side, _thirds)


@row("Results", "int64 beyond 2^24 from float32")
def int64_result(side: Side) -> object:
    return _second(side, _large_integers)


@row("Results", "bool from float32")
def bool_result(side: Side) -> object:
    return _second(side, _are_large)


@row("Results", "bfloat16 from float32")
def bfloat16_result(side: Side) -> object:
    return _second(side, _as_bfloat16)


@row("Results", "-0.0 and the payload of a NaN")
def odd_floats(side: Side) -> object:
    return _second(side, _odd_floats)


@row("Results", "a tuple, with a plain value")
def tuple_result(side: Side) -> object:
    return _second_structure(side, _as_tuple)


@row("Results", "a dict")
def dict_result(side: Side) -> object:
    return _second_structure(side, _as_dict)


@row("Results", "a `NamedTuple`")
def named_tuple_result(side: Side) -> object:
    return _second_structure(side, _as_named_tuple)


@row("Results", "`torch.max(x, 1)`")
def max_result(side: Side) -> object:
    return _second_structure(side, _as_max)


if find_spec("transformers"):

    @row("Results", "a `ModelOutput` of transformers")
    def model_output_result(side: Side) -> object:
        """See that keys and attributes are kept."""
        return _second_structure(side, _as_model_output)


class Pair(NamedTuple):
    """Two tensors."""

    low: Tensor
    high: Tensor


def _thirds(x: Any) -> Tensor:
    """Return thirds, which float32 cannot hold."""
    return torch.as_tensor(x).double() / 3


def _large_integers(x: Any) -> Tensor:
    return torch.as_tensor(x).long() + 2**40


def _are_large(x: Any) -> Tensor:
    return torch.as_tensor(x) > 50


def _as_bfloat16(x: Any) -> Tensor:
    return torch.as_tensor(x).bfloat16()


def _odd_floats(x: Any) -> Tensor:
    result = torch.as_tensor(x) * 2
    result[:, 0] = -0.0
    result.view(torch.int32)[:, 1] = 0x7FC12345
    return result


def _as_tuple(x: Any) -> object:
    return torch.as_tensor(x) * 2, "plain", torch.as_tensor(x) > 50


def _as_dict(x: Any) -> object:
    return {"low": torch.as_tensor(x) * 2, "high": torch.as_tensor(x).long()}


def _as_named_tuple(x: Any) -> object:
    return Pair(torch.as_tensor(x) * 2, torch.as_tensor(x).long())


def _as_max(x: Any) -> object:
    return torch.as_tensor(x).max(1)


def _as_model_output(x: Any) -> object:
    from transformers.modeling_outputs import BaseModelOutputWithPooling  # noqa: PLC0415

    return BaseModelOutputWithPooling(torch.as_tensor(x)[:, None] * 2, torch.as_tensor(x) * 3)


# -- gradients --------------------------------------------------------------------------------------------------


@row("Gradients", "an input that requires grad, second call", "grad")
def input_requires_grad(side: Side) -> object:
    work, x = side.function(twice), numbers().requires_grad_()
    for _ in range(2):
        x.grad = None
        work(x).sum().backward()
    return x.grad


@row("Gradients", "computed under `no_grad()`, then an input that requires grad", "grad")
def graph_after_no_grad(side: Side) -> object:
    work, x = side.function(twice), numbers().requires_grad_()
    with torch.no_grad():
        work(x)
    work(x).sum().backward()
    return x.grad


@row("Gradients", "parameters require grad: a first and a second call agree")
def graph_of_parameters(side: Side) -> object:
    model = side.module(Trained)
    return model(numbers()).requires_grad == model(numbers()).requires_grad


@row("Gradients", "computed in `inference_mode()`, used in training")
def inference_tensor(side: Side) -> object:
    work, weight = side.function(twice), torch.ones(WIDTH, requires_grad=True)
    with torch.inference_mode():
        work(numbers())
    (work(numbers()) * weight).sum().backward()
    return weight.grad


class Trained(nn.Module):
    """A module that is not frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.weight


# -- what lies outside of the module -------------------------------------------------------------------------------


@row("Outside of the module", "an environment variable that the code reads")
def environment_changed(side: Side) -> object:
    os.environ["WRONG_HITS_SCALE"] = "2"
    work = side.function(_with_environment)
    work(numbers())
    os.environ["WRONG_HITS_SCALE"] = "3"
    return work(numbers())


@row("Outside of the module", "`torch.set_flush_denormal(True)`")
def denormals_flushed(side: Side) -> object:
    work, tiny = side.function(_halved), torch.full((4, WIDTH), 1e-39)
    work(tiny)
    torch.set_flush_denormal(True)
    try:
        return work(tiny)
    finally:
        torch.set_flush_denormal(False)


@row("Outside of the module", "a forward that counts its calls in an attribute and returns the count")
def counted(side: Side) -> object:
    model = side.module(Counting)
    return [model(numbers()), model(numbers()), model(numbers())]


def _with_environment(x: Any) -> Any:
    return x * int(os.environ["WRONG_HITS_SCALE"])


class Counting(nn.Module):
    """A module whose result depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Add the number of calls."""
        self.n_calls += 1
        return x + self.n_calls
