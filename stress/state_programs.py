"""Programs that hold a value somewhere, as data: text, what is called, and what its calls came to.

A ``Program`` pickles, so another interpreter can run it. ``Running`` runs it with a cache or without.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stress.programs import commit_and_close
from stress.state_values import VALUES
from torchcache import Cache, CachedDataset, CacheStats, UncacheableError, cache_of, torchcache


@dataclass(frozen=True, slots=True)
class Place:
    """Where a program holds its value.

    Attributes:
        text: What the program consists of besides the value; ``VALUE`` is the value, and ``target`` what is cached.
        replace: Statements that put ``VALUE`` in the place of the value that the program holds; none if only another
            program can.
        kind: What is cached: "function", "object", "class", "call" (a function whose call is one sample) or "dataset".
        is_result: Whether the value is what the program returns, not what it reads.
    """

    text: str
    replace: str = ""
    kind: str = "function"
    is_result: bool = False


_NET = """\
class Net(nn.Module):
    def __init__(self, held=None):
        super().__init__()
        self.held = held

    def forward(self, x):
        return x * read(self.{held})


target = Net({given})
"""

_DATA = """\
class Data(torch.utils.data.Dataset):
    def __init__(self, held=None):
        self.held = held

    def __len__(self):
        return 30

    def __getitem__(self, i):
        return {item}


target = Data({given})
"""

PLACES = {
    "closure": Place(
        "def bind(held):\n    def compute(x):\n        return x * read(held)\n\n    return compute\n\n\n"
        "target = bind(VALUE)\n",
        "target.__closure__[target.__code__.co_freevars.index('held')].cell_contents = VALUE",
    ),
    "global": Place("def compute(x):\n    return x * read(VALUE)\n\n\ntarget = compute\n", "VALUE = VALUE"),
    "attribute": Place(
        _NET.format(held="held", given="") + "target.held = VALUE\n", "target.held = VALUE", kind="object"
    ),
    "inner attribute": Place(
        _NET.format(held="config.held", given="") + "target.config = types.SimpleNamespace(held=VALUE)\n",
        "target.config.held = VALUE",
        kind="object",
    ),
    "construction": Place(_NET.format(held="held", given="VALUE"), kind="class"),
    "argument": Place(
        "def compute(held):\n    return torch.tensor([read(held)], dtype=torch.float64)\n\n\ntarget = compute\n",
        "VALUE = VALUE",
        kind="call",
    ),
    "dataset": Place(
        _DATA.format(item="torch.full((2,), read(self.held), dtype=torch.float64)", given="VALUE"),
        "target.held = VALUE",
        kind="dataset",
    ),
    "result of a call": Place(
        "def compute(number):\n    return make(number)\n\n\ntarget = compute\n",
        "VALUE = VALUE",
        kind="call",
        is_result=True,
    ),
    "result of a dataset": Place(
        _DATA.format(item="make(i)", given=""), "VALUE = VALUE", kind="dataset", is_result=True
    ),
}

_HEAD = "import types\n\nimport torch\nfrom torch import nn\n"


@dataclass(frozen=True, slots=True)
class Program:
    """One program and some calls of it.

    Attributes:
        value: The kind of value, by name.
        place: Where it is, by name.
        number: What the value is made for.
        n_calls: How often the program makes its call, which is always the same.
    """

    value: str
    place: str
    number: int
    n_calls: int = 2

    @property
    def text(self) -> str:
        """The program's source text."""
        made = "" if PLACES[self.place].is_result else f"\nVALUE = make({self.number})\n"
        return f"{_HEAD}{VALUES[self.value].text}{made}\n\n{PLACES[self.place].text}"

    def start(self, directory: Path | None) -> Running:
        """Run the program."""
        return Running(self, directory)


@dataclass(frozen=True, slots=True)
class Call:
    """What one call came to.

    Attributes:
        result: What it returned, in words; the same for equal results.
        hits: How many of its samples were found.
        reasons: Why it went around the cache, or was not kept.
        is_refused: Whether the cache said that it cannot keep what the program returned, or take what it is given.
        faults: What went wrong in the cache.
    """

    result: str
    hits: int = 0
    reasons: tuple[str, ...] = ()
    is_refused: bool = False
    faults: tuple[str, ...] = ()


class Running:
    """A program that runs in this process.

    Args:
        program: The program; its calls are not made yet.
        directory: Of a persistent cache; None for one in memory.
        is_cached: False runs it as it is written.
    """

    def __init__(self, program: Program, directory: Path | None = None, *, is_cached: bool = True) -> None:
        self._place = PLACES[program.place]
        self._may_refuse = self._place.is_result or (VALUES[program.value].has_code and self._place.kind == "call")
        self._is_cached = is_cached
        # Not among the globals of the program, where code that counts all of these would come upon it.
        self._called: Any = None
        module = types.ModuleType("program")
        sys.modules["program"] = module  # a class of its own can be imported, as in any program
        self._names = vars(module)
        self._results: list[object] = []
        if self._place.is_result:  # to change one; code that counts the globals of its module would count them
            self._names["RESULTS"] = self._results
        options: dict[str, Any] = {"batch_dim": None} if self._place.kind == "call" else {}
        if self._place.kind != "dataset":
            options["check_rows"] = False  # each computed call is counted
        if directory is not None:
            options |= {"persistent": True, "persistent_cache_dir": directory, "flush_timeout_seconds": 60.0}
        if self._place.kind == "class" and is_cached:
            text, marker, rest = program.text.rpartition("\n\ntarget = ")
            self.edit(text)
            torchcache(**options)(self._names["Net"])
            self.edit(marker + rest)
        else:
            self.edit(program.text)
        self._called = self._cached(self._names["target"], options) if is_cached else self._names["target"]

    def _cached(self, target: Any, options: dict[str, Any]) -> Any:  # noqa: ANN401 - what a program calls
        if self._place.kind == "class":
            return target
        return CachedDataset(target, **options) if self._place.kind == "dataset" else torchcache(**options)(target)

    def edit(self, statements: str) -> None:
        """Change the program while it runs."""
        with _without_warnings():
            exec(_compiled(statements), self._names)
        if isinstance(self._called, CachedDataset):  # whose state is found out once
            self._called.refresh()

    def call(self, program: Program) -> list[Call]:
        """Make the calls of a program."""
        with _without_warnings():
            return [self._call(program) for _ in range(program.n_calls)]

    def close(self) -> None:
        """Commit what is to be stored, and let go of it.

        Raises:
            TimeoutError: If that takes too long.
        """
        commit_and_close(self._cache)

    @property
    def _cache(self) -> Cache:
        return cache_of(self._called)

    def _call(self, program: Program) -> Call:
        before = self._cache.stats() if self._is_cached else CacheStats()
        called: Callable[[Any], Any] = self._called
        if self._place.kind == "dataset":
            called = called.__getitem__  # type: ignore[attr-defined]
        try:
            result = called(self._argument(program))
        except UncacheableError:
            if not self._may_refuse:
                raise
            return Call("", is_refused=True)
        self._results.append(result)
        shown = self._show(result)
        if not self._is_cached:
            return Call(shown)
        after = self._cache.stats()
        reasons = (*_new(after.bypasses, before.bypasses), *_new(after.dropped_rows, before.dropped_rows))
        return Call(shown, after.hits - before.hits, reasons, faults=_new(after.faults, before.faults))

    def _argument(self, program: Program) -> object:
        if self._place.is_result:
            return program.number
        if self._place.kind == "call":
            return self._names["VALUE"]
        return 1 if self._place.kind == "dataset" else torch.ones(2, 3, dtype=torch.float64)

    def _show(self, result: Any) -> str:  # noqa: ANN401 - whatever a program returns
        """Return type and value of a result, with what its class adds to them."""
        if not self._place.is_result:
            return repr(result.tolist())
        kind = type(result)
        attributes = getattr(result, "__dict__", None) or {}
        added = {name: item for name, item in attributes.items() if isinstance(item, (int, str))}
        dtype = str(getattr(result, "dtype", ""))
        return f"{kind.__qualname__} {self._names['read'](result)} {dtype} {sorted(added.items())}"


def _new(after: Mapping[str, int], before: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(reason for reason, n in after.items() if n > before.get(reason, 0))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out what is said of some of the kinds, by NumPy and by the cache."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the matrix subclass is not the recommended way")
        warnings.filterwarnings("ignore", "argument 'held' of Net is an object of type")
        yield


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> types.CodeType:
    return compile(text, "<program>", "exec", dont_inherit=True)


def replaced(program: Program) -> str | None:
    """Return statements that put another value, of this program's number, where a running one has its own."""
    place = PLACES[program.place]
    if not place.replace:
        return None
    if place.is_result:
        return ""
    return f"VALUE = make({program.number})\n{place.replace}"


def changed(program: Program) -> str | None:
    """Return statements that change the value of a running program in place into that of this one."""
    value, place = VALUES[program.value], PLACES[program.place]
    if not value.change:
        return None
    if place.is_result:
        return f"for result in RESULTS:\n    change(result, {program.number})"
    return f"change(VALUE, {program.number})"
