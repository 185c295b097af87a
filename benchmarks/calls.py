"""What a hit of one call that is one sample costs, beside what anybody would reach for first.

The call decodes nothing: it makes a small image of uint8 and a label, as a dataset does. It is cached as a function
with ``batch_dim=None`` and as a dataset by ``CachedDataset``, from memory and from LMDB (then the memory tier is off),
and by joblib.Memory and diskcache.memoize, if they are installed. Every side is filled, has each result checked
once, and answers all calls again and again, in turns. The first side makes the result without a cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.hits import spread
from benchmarks.workload import BenchmarkError
from torchcache import CachedDataset, cache_of, torchcache
from torchcache.cache import Cache

#: What a hit of a dataset may cost in a worker, at the median.
TARGETS_MICROSECONDS = {"memory": 60.0, "LMDB": 80.0}

N_CALLS = 256
ROUNDS_AT_LEAST = 5

Sample = tuple[Tensor, int]
Call = Callable[[int], Sample]


def sample(index: int) -> Sample:
    """Return a small image, and its label."""
    return torch.full((3, 32, 32), index % 251, dtype=torch.uint8), index


class Samples(Dataset[Sample]):
    """The same samples as a dataset."""

    def __len__(self) -> int:
        return N_CALLS

    def __getitem__(self, index: int) -> Sample:
        return sample(index)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m benchmarks calls``."""
    parser.add_argument("--rounds", type=int, default=21, help=f"timed rounds of {N_CALLS} calls of each side")
    parser.add_argument("--work-dir", type=Path, default=Path("build"), help="where the caches lie meanwhile")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return 1 if the median of a dataset's hit misses its target, else 0.

    Raises:
        BenchmarkError: If a result was wrong, or a call was no hit.
    """
    if args.rounds < ROUNDS_AT_LEAST:
        raise BenchmarkError(f"--rounds must be {ROUNDS_AT_LEAST} at least")
    torch.set_num_threads(1)  # as in a worker
    args.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="calls-", dir=args.work_dir) as root, contextlib.ExitStack() as stack:
        sides, caches = our_sides(Path(root).resolve())
        for cache in caches:
            stack.callback(cache.close)
        times = time_in_turns({"no cache": sample, **sides, **rival_sides(Path(root), stack)}, args.rounds)
        for cache in caches:
            if cache.stats().misses != N_CALLS:
                raise BenchmarkError(f"some calls were no hits: {cache.stats()}")

    machine = f"{platform.platform()}, cores {os.cpu_count()}, threads 1"
    print(f"{machine}, python {platform.python_version()}, torch {torch.__version__}")
    print(f"microseconds a hit, 3 kB; {args.rounds} rounds of {N_CALLS} calls, in turns")
    print(f"{'side':34}{'min':>8}{'median':>8}{'max':>8}{'of the dataset from LMDB':>26}")
    base = spread(times["dataset, LMDB"])[1]
    for side, values in times.items():
        ratio = f"{spread(values)[1] / base:.1f}x"
        print(f"{side:34}" + "".join(f"{value:8.1f}" for value in spread(values)) + f"{ratio:>26}")
    missed = False
    for tier, target in TARGETS_MICROSECONDS.items():
        median = spread(times[f"dataset, {tier}"])[1]
        missed |= median > target
        print(f"dataset, {tier}: {median:.1f} us (target {target:g} us){' MISSED' if median > target else ''}")
    return 1 if missed else 0


def our_sides(root: Path) -> tuple[dict[str, Call], list[Cache]]:
    """Return the sides of ours, filled, and their caches."""
    sides: dict[str, Call] = {}
    caches: list[Cache] = []
    for tier in TARGETS_MICROSECONDS:
        options: dict[str, Any] = {}
        if tier == "LMDB":
            options = {"persistent": True, "persistent_cache_dir": root / "ours", "max_memory_cache_size": 0}
        function = torchcache(batch_dim=None, **options)(sample)
        dataset = CachedDataset(Samples(), **options)
        sides |= {f"function, {tier}": function, f"dataset, {tier}": dataset.__getitem__}
        caches += [cache_of(function), cache_of(dataset)]
    for call in sides.values():
        fill(call)
    for cache in caches:
        cache.flush()
    return sides, caches


def rival_sides(root: Path, stack: contextlib.ExitStack) -> dict[str, Call]:
    """Return the rivals that are installed, filled."""
    sides: dict[str, Call] = {}
    joblib, diskcache = installed("joblib"), installed("diskcache")
    if joblib is not None:
        memory = joblib.Memory(root / "joblib", verbose=0)
        sides[f"joblib.Memory {version('joblib')}"] = memory.cache(sample)
    if diskcache is not None:
        cache = diskcache.Cache(str(root / "diskcache"))
        sides[f"diskcache.memoize {version('diskcache')}"] = cache.memoize()(sample)
        stack.callback(cache.close)
    for call in sides.values():
        fill(call)
    return sides


def installed(name: str) -> Any:  # noqa: ANN401 - a module, or None
    """Return a rival's module; None, and a line, if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed; pip install {name} to have it in the table")
        return None


def fill(call: Call) -> None:
    """Make each call once, and check what the second one gives.

    Raises:
        BenchmarkError: If it is wrong.
    """
    for index in range(N_CALLS):
        call(index)
    for index in range(N_CALLS):
        image, label = call(index)
        expected, _ = sample(index)
        if label != index or not torch.equal(image, expected):
            raise BenchmarkError(f"a side returned another sample at {index}")


def time_in_turns(sides: dict[str, Call], n_rounds: int) -> dict[str, list[float]]:
    """Return the mean microseconds of a call in each round, after a round that warms up."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(n_rounds + 1):
        for side, call in sides.items():
            started = time.perf_counter()
            for index in range(N_CALLS):
                call(index)
            times[side].append((time.perf_counter() - started) / N_CALLS * 1e6)
    return {side: values[1:] for side, values in times.items()}
