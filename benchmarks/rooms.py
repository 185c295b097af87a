"""What a hit walks through: the Python functions that are called, and the rooms of the library that they lie in.

A room is a folder of the library, or a module beside them. One warm hit in memory is profiled: each call of a Python
function that is no comprehension counts, the library's own and those of torch, NumPy and the standard library. The
rooms are listed in the order in which they are entered; a room is returned to where it is entered again. What is called
seldom and stays in its room can be followed by a reader, and costs little.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

import torchcache as package
from benchmarks._tables import write_table
from benchmarks.workload import BenchmarkError
from torchcache import cache_of, torchcache

MOST_CALLS = 110
MOST_RETURNS = 20
ROWS = 32
FOLDER = Path(package.__file__).parent

#: Included by docs/development/architecture.md.
TABLE = "rooms.md"

#: The frames that comprehensions have before Python 3.12.
COMPREHENSIONS = frozenset({"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"})


@torchcache(max_memory_cache_size=1e8)
class Encoder(torch.nn.Module):
    """A model whose results are small."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode a batch."""
        encoded: torch.Tensor = self.linear(x)
        return encoded


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a Python function: its room and module, empty outside of the library, and its name."""

    room: str
    module: str
    function: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m benchmarks rooms``."""
    parser.add_argument("--rows", type=int, default=ROWS, help="samples in the batch")
    parser.add_argument("--calls", action="store_true", help="list every call, too")
    parser.add_argument("--write", action="store_true", help=f"write the table to docs/tables/{TABLE} too")


def run(args: argparse.Namespace) -> int:
    """Profile a hit, print, and return 1 if it walks further than it should, else 0.

    Raises:
        BenchmarkError: If what was profiled is no hit.
    """
    calls = profiled_hit(args.rows)
    own = [call for call in calls if call.room]
    entered = rooms_in_order(own)
    n_returns = len(entered) - len(set(entered))
    if args.calls:
        for call in calls:
            print(f"{call.module or '-':32}{call.function}")
        print()
    print_table(own, entered)
    print(f"rooms in order: {' > '.join(entered)}\n")
    print(f"calls of the library's functions: {len(own)} (at most {MOST_CALLS}); with others' {len(calls)}")
    print(f"returns to a room: {n_returns} (at most {MOST_RETURNS})")
    if args.write:
        write_table(TABLE, markdown(own, entered, args.rows))
    return 0 if len(own) <= MOST_CALLS and n_returns <= MOST_RETURNS else 1


def profiled_hit(n_rows: int) -> list[Call]:
    """Return what a warm hit in memory calls.

    Raises:
        BenchmarkError: If it is no hit.
    """
    model = Encoder().eval().requires_grad_(False)
    batch = torch.randn(n_rows, 64)
    for _ in range(4):  # computed, checked with another row, and warm
        model(batch)
    stats = cache_of(model).stats
    before = stats()

    calls: list[Call] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name not in COMPREHENSIONS:
            calls.append(call_of(frame))

    sys.setprofile(note)
    try:
        model(batch)
    finally:
        sys.setprofile(None)
    after = stats()
    if (after.memory_hits - before.memory_hits, after.misses - before.misses) != (n_rows, 0):
        raise BenchmarkError(f"the call is no hit in memory: {after}")
    return calls


def call_of(frame: FrameType) -> Call:
    """Return the call that a frame belongs to."""
    code = frame.f_code
    function = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on
    path = Path(code.co_filename)
    if not path.is_relative_to(FOLDER):
        return Call("", "", function)
    module = path.relative_to(FOLDER)
    return Call(module.parts[0].removesuffix(".py"), str(module), function)


def rooms_in_order(calls: list[Call]) -> list[str]:
    """Return the rooms of calls as they are entered."""
    entered: list[str] = []
    for call in calls:
        if not entered or entered[-1] != call.room:
            entered.append(call.room)
    return entered


def print_table(calls: list[Call], entered: list[str]) -> None:
    """Print for each room how many functions of it are called, of how many modules, and how often it is entered."""
    print(f"{'room':12}{'calls':>8}{'modules':>9}{'entered':>9}")
    for room, n_calls, n_modules, n_entered in by_room(calls, entered):
        print(f"{room:12}{n_calls:8}{n_modules:9}{n_entered:9}")
    print()


def by_room(calls: Sequence[Call], entered: Sequence[str]) -> list[tuple[str, int, int, int]]:
    """Return each room, how many functions of it are called, of how many modules, and how often it is entered."""
    n_calls = Counter(call.room for call in calls)
    n_entered = Counter(entered)
    modules = {room: {call.module for call in calls if call.room == room} for room in n_calls}
    return [(room, n, len(modules[room]), n_entered[room]) for room, n in n_calls.most_common()]


def markdown(calls: Sequence[Call], entered: Sequence[str], n_rows: int) -> str:
    """Return the table that docs/development/architecture.md includes."""
    rows = [f"| `{room}` | {n} | {modules} | {times} |" for room, n, modules, times in by_room(calls, entered)]
    n_returns = len(entered) - len(set(entered))
    summary = (
        f"A hit of {n_rows} rows in memory calls {len(calls)} functions of the library (at most {MOST_CALLS}) and "
        f"returns to a room {n_returns} times (at most {MOST_RETURNS}). This is what "
        f"`python -m benchmarks rooms --write` counted with Python {platform.python_version()}:"
    )
    return "\n".join(
        [
            summary,
            "",
            "| Room | Functions called | Modules | Times entered |",
            "|---|---|---|---|",
            *rows,
        ]
    )
