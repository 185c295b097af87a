"""What forks, new processes and lookups from disk cost: the table of docs/sharing.md.

One cache with rows of 3 kB in a directory, nothing of it in memory. Forks are measured in a program without torchcache,
with and without an open environment, and in the middle of a commit. The first lookup after a fork opens the
environment again, in the parent and in the child.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import torchcache

ROW_FLOATS = 768  # 3 kB
BATCH_ROWS = 256
FIRST_LOOKUP = """
import sys, time
import torch
from benchmarks.processes import make_cached, rows
cached = make_cached(sys.argv[1])
x = rows(1)
start = time.perf_counter()
cached(x)
print(time.perf_counter() - start)
"""
PLAIN_FORK = """
import os, sys, time
import torch
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        os._exit(0)
    print(time.perf_counter() - start, flush=True)
    os.waitpid(pid, 0)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--rounds", type=int, default=30, help="how often each is measured")


def make_cached(path: str) -> torchcache.CachedFunction[..., torch.Tensor]:
    """Return the cached function that every process of the benchmark has; nothing of it stays in memory."""

    def half(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    return torchcache.torchcache(
        persistent=True, persistent_cache_dir=path, max_memory_cache_size=0, check_rows=False,
        persistent_module_hash="processes",
    )(half)  # fmt: skip


def rows(n: int, start: int = 0) -> torch.Tensor:
    """Return ``n`` inputs of 3 kB that no other ``start`` gives."""
    return torch.arange(start, start + n, dtype=torch.float32).unsqueeze(1).expand(n, ROW_FLOATS).contiguous()


def run(args: argparse.Namespace) -> int:
    """Measure and print the table; return the exit status."""
    rounds: int = args.rounds
    torch.set_num_threads(1)
    fresh = (rows(BATCH_ROWS, start) for start in range(1000, 1 << 24, BATCH_ROWS))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "cache"))
        cached = make_cached(path)

        def look_up() -> object:
            return cached(rows(1))

        times = {"a fork, of a program without torchcache": _times_of_programs(PLAIN_FORK, str(rounds))}
        times["a fork, nothing open"] = _times(_fork, rounds, _collect)
        cached(rows(BATCH_ROWS))
        torchcache.flush_all()
        times["a fork, an environment open"] = _times(_fork, rounds, lambda: _collect(look_up))
        times["a fork, in the middle of a commit"] = _times(
            _fork, rounds, lambda: _collect(lambda: cached(next(fresh)))
        )
        times["the first lookup in a new process"] = _times_of_programs(*[FIRST_LOOKUP, path] * 3)
        times["the first lookup after a fork, in the parent"] = _times(look_up, rounds, lambda: _collect(_fork))
        times["the first lookup after a fork, in the child"] = _times_in_children(look_up, rounds)
        times["a lookup of 1 row"] = _times(look_up, 10 * rounds)
        times[f"a lookup of {BATCH_ROWS} rows"] = _times(lambda: cached(rows(BATCH_ROWS)), rounds)
        times["flush_all() with nothing to do"] = _times(torchcache.flush_all, rounds)
        times[f"flush_all() after {BATCH_ROWS} rows"] = _times(
            torchcache.flush_all, rounds, lambda: cached(next(fresh))
        )
        torchcache.cache_of(cached).close()
    print("| | best, ms | median, ms |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {1000 * min(seconds):.3g} | {1000 * statistics.median(seconds):.3g} |")
    return 0


def _times(action: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> list[float]:
    """Return how many seconds an action took, each time after another one."""
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times


_children: list[int] = []


def _fork() -> None:
    """Fork a child that ends at once."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    _children.append(pid)


def _collect(also: Callable[[], object] = lambda: None) -> None:
    """Wait for the children that have been forked, and do something more, before the next one is."""
    while _children:
        os.waitpid(_children.pop(), 0)
    also()


def _times_in_children(look_up: Callable[[], object], rounds: int) -> list[float]:
    """Return how long the first lookup took in children, each forked with an environment open."""
    times = []
    for _ in range(rounds):
        look_up()
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writing, str(_times(look_up, 1)[0]).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            times.append(float(pipe.read()))
        os.waitpid(pid, 0)
    return times


def _times_of_programs(*programs_and_arguments: str) -> list[float]:
    """Return what programs print, each given with its argument."""
    printed = ""
    for text, argument in zip(programs_and_arguments[::2], programs_and_arguments[1::2], strict=True):
        command = [sys.executable, "-c", text, argument]
        printed += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(line) for line in printed.split()]
