"""The rows of ``wrong-hits`` that need two runs of a program, whose cache is on disk.

Each function runs in the first program and again in the second. In between the text of this file is
edited: where a comment says ``next run:``, its line becomes what the comment says. What the second
program gets is compared with what its text computes without a cache.
"""

# ruff: noqa: ANN401 - functions of tensors, of arrays, of whatever a user has

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.wrong_hits.rows import WIDTH, Rows, numbers
from benchmarks.wrong_hits.sides import Side

from . import settings

ROWS = Rows()
row = ROWS.add

IS_SECOND_RUN = False  # next run: IS_SECOND_RUN = True
CONSTANT = 2  # next run: CONSTANT = 3
MANY = 65_536  # numbers in a row of the cases that write for a while
N_MEETING = 200


def encode(model: nn.Module, x: Any) -> Any:
    """Call a model; what caches functions gets the model as an argument."""
    return model(torch.as_tensor(x))


def twice(x: Any) -> Any:
    """Scale."""
    return x * 2


# -- code and weights -------------------------------------------------------------------------------------------


@row("Between two runs", "nothing changes, a function")
def nothing_function(side: Side) -> object:
    return side.function(twice)(numbers())


@row("Between two runs", "nothing changes, a module")
def nothing_module(side: Side) -> object:
    return side.module(Weighted, 2)(numbers())


@row("Between two runs", "the cached function edited")
def function_edited(side: Side) -> object:
    return side.function(_edited)(numbers())


@row("Between two runs", "`forward` edited")
def forward_edited(side: Side) -> object:
    return side.module(EditedForward)(numbers())


@row("Between two runs", "a helper function edited")
def helper_edited(side: Side) -> object:
    return side.function(_with_helper)(numbers())


@row("Between two runs", "a helper function of another module of one's own edited")
def other_module_edited(side: Side) -> object:
    return side.function(_with_other_module)(numbers())


@row("Between two runs", "a base class edited")
def base_edited(side: Side) -> object:
    return side.module(Derived)(numbers())


@row("Between two runs", "the class of an inner module edited")
def inner_edited(side: Side) -> object:
    return side.module(OuterOfEdited)(numbers())


@row("Between two runs", "a global constant edited")
def constant_edited(side: Side) -> object:
    return side.function(_with_constant)(numbers())


@row("Between two runs", "a decorator edited")
def decorator_edited(side: Side) -> object:
    return side.function(_with_decorator)(numbers())


@row("Between two runs", "other weights")
def other_weights(side: Side) -> object:
    torch.manual_seed(2 if IS_SECOND_RUN else 1)
    return side.module(Drawn)(numbers())


@row("Between two runs", "another construction argument")
def other_argument(side: Side) -> object:
    return side.module(Weighted, 3 if IS_SECOND_RUN else 2)(numbers())


@row("Between two runs", "`eval()` in the second")
def eval_in_second_run(side: Side) -> object:
    model = side.module(ByMode)
    if IS_SECOND_RUN:
        model.inner.eval()
    return model(numbers())


@row("Between two runs", "the first run's text edited while it ran, before its first call")
def edited_while_running(side: Side) -> object:
    from . import running  # noqa: PLC0415 - before the edit, each time

    side.edit(running)
    return side.function(running.work)(numbers())


@row("Between two runs", "an input file overwritten under its name")
def input_overwritten(side: Side) -> object:
    path = side.cache_dir.with_suffix(".npy")
    np.save(path, numbers(seed=1 if IS_SECOND_RUN else 0).numpy())
    return side.from_file(twice, path)


def _edited(x: Any) -> Any:
    return x * 2  # next run: return x * 3


def _helper(x: Any) -> Any:
    return x * 2  # next run: return x * 3


def _decorator(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapper(x: Any) -> Any:
        return function(x) + 1  # next run: return function(x) + 2

    return wrapper


def _with_helper(x: Any) -> Any:
    return _helper(x)


def _with_other_module(x: Any) -> Any:
    return settings.twice(x)


def _with_constant(x: Any) -> Any:
    return x * CONSTANT


@_decorator
def _with_decorator(x: Any) -> Any:
    return x * 2


class Weighted(nn.Module):
    """A frozen module."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.arange(1.0, WIDTH + 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.weight * self.scale


class EditedForward(nn.Module):
    """A module whose code changes."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * 2  # next run: return x * 3


class Base(nn.Module):
    """A base class whose code changes."""

    def scaled(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * 2  # next run: return x * 3


class Derived(Base):
    """A module whose base class changes."""

    def forward(self, x: Tensor) -> Tensor:
        """Pass it on."""
        return self.scaled(x)


class OuterOfEdited(nn.Module):
    """A module whose inner one's class changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = EditedForward()

    def forward(self, x: Tensor) -> Tensor:
        """Pass it on."""
        return self.inner(x)  # type: ignore[no-any-return]


class Drawn(nn.Module):
    """A module that is initialised at random, as one that is trained has other weights each time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(1, 100, (WIDTH,)).float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.weight


class ByMode(nn.Module):
    """A module that computes something else in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * (2 if self.training else 3)


# -- files ------------------------------------------------------------------------------------------------------


@row("Files and processes", "two processes write the same samples at once", writer="meets")
def two_writers(side: Side) -> object:
    work = side.function(twice)
    wrong = []
    for i in range(N_MEETING):
        x = torch.full((1, MANY), float(i))
        if not torch.equal(work(x, ids=[f"sample_{i}"]), x * 2):
            wrong.append(i)
    return wrong


@row("Files and processes", "a process killed while it writes", writer="is killed")
def killed_writer(side: Side) -> object:
    """Write until killed, and note how far it came; the second run asks for what was written last."""
    progress = side.cache_dir.with_suffix(".progress")
    work = side.function(twice)
    if not IS_SECOND_RUN:
        for i in range(100_000):
            progress.write_text(str(i), encoding="utf-8")
            work(torch.full((1, MANY), float(i)), ids=[f"sample_{i}"])
    last = 0
    with contextlib.suppress(OSError, ValueError):
        last = int(progress.read_text(encoding="utf-8"))
    wrong = []
    for i in range(last + 1, max(0, last - 50), -1):
        x = torch.full((1, MANY), float(i))
        if not torch.equal(work(x, ids=[f"sample_{i}"]), x * 2):
            wrong.append(i)
    return wrong


@row("Files and processes", "files cut to half their length", damage="truncate")
def truncated(side: Side) -> object:
    return side.function(twice)(numbers())


@row("Files and processes", "files of no length", damage="empty")
def emptied(side: Side) -> object:
    return side.function(twice)(numbers())


@row("Files and processes", "one bit of a stored value flipped", damage="flip")
def flipped(side: Side) -> object:
    return side.function(twice)(numbers())


@row("Files and processes", "values replaced by a pickle that runs code", damage="poison")
def poisoned(side: Side) -> object:
    return side.function(twice)(numbers())
