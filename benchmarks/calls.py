"""What a hit of one sample of a dataset costs, beside what anybody would reach for first.

The dataset decodes nothing: it makes an image of uint8 and a label. Ours is asked sample by sample and, as a DataLoader
does, for a batch at a time, from memory and from LMDB (then the memory tier is off); a function with ``batch_dim=None``
makes the same. joblib.Memory, diskcache-community and dataset-rt take part if they are installed. Every side is filled,
has each sample checked once, and answers all calls again and again, in turns. What is counted is the CPU time of all
threads of the process. Misses are those of a cache in memory, without what the sample itself takes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.hits import spread
from benchmarks.workload import BenchmarkError
from torchcache import CachedDataset, cache_of, torchcache
from torchcache.cache import Cache

#: The sides of an image, by the size of a sample.
SIDES = {"1 kB": 16, "3 kB": 32, "30 kB": 96}

#: What a sample may cost in a worker, in microseconds of CPU time at the median, by its size and how it is asked for.
TARGETS = {
    ("3 kB", "dataset, memory"): 25.0,
    ("3 kB", "dataset, LMDB"): 35.0,
    ("1 kB", "dataset, LMDB, batches"): 6.0,
    ("30 kB", "dataset, LMDB, batches"): 15.0,
}
MOST_OF_A_MISS = 100.0

#: What the others are compared with.
BASE = "dataset, LMDB, batches"

N_CALLS = 512
BATCH = 64
ROUNDS_AT_LEAST = 5

Sample = tuple[Tensor, int]

#: Gives the samples at some indices.
Side = Callable[[list[int]], Any]


def image_and_label(side: int, index: int) -> Sample:
    """Return a small image, and its label."""
    return torch.full((3, side, side), index % 251, dtype=torch.uint8), index


class Samples(Dataset[Sample]):
    """Images of one size, with labels."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __len__(self) -> int:
        return N_CALLS

    def __getitem__(self, index: int) -> Sample:
        return image_and_label(self.side, index)

    def as_array(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Return a sample as those have it that know no tensors."""
        return np.full((3, self.side, self.side), index % 251, dtype=np.uint8), index


@dataclass(slots=True)
class Sides:
    """What is compared: our sides and the others by their names, and our caches."""

    all: dict[str, Side] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)

    def add(self, name: str, one: Callable[[int], Any]) -> None:
        """Add a side that is asked for one sample at a time."""
        self.all[name] = lambda indices: [one(index) for index in indices]

    def add_batches(self, name: str, many: Side) -> None:
        """Add a side that is asked for a batch at a time."""
        self.all[name] = lambda indices: [item for batch in batches_of(indices) for item in many(batch)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m benchmarks calls``."""
    parser.add_argument("--rounds", type=int, default=21, help=f"timed rounds of {N_CALLS} samples of each side")
    parser.add_argument("--work-dir", type=Path, default=Path("build"), help="where the caches lie meanwhile")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return 1 if a median of ours misses its target, else 0.

    Raises:
        BenchmarkError: If a result was wrong, or a call was no hit.
    """
    if args.rounds < ROUNDS_AT_LEAST:
        raise BenchmarkError(f"--rounds must be {ROUNDS_AT_LEAST} at least")
    torch.set_num_threads(1)  # as in a worker
    args.work_dir.mkdir(parents=True, exist_ok=True)

    machine = f"{platform.platform()}, cores {os.cpu_count()}, threads 1"
    print(f"{machine}, python {platform.python_version()}, torch {torch.__version__}")
    print(f"microseconds of CPU time per sample; {args.rounds} rounds of {N_CALLS} samples, in turns")
    missed = False
    for size, side in SIDES.items():
        with tempfile.TemporaryDirectory(prefix="calls-", dir=args.work_dir) as root, contextlib.ExitStack() as stack:
            times = measured(Samples(side), Path(root).resolve(), stack, args.rounds)
        missed |= report(size, times)
    return 1 if missed else 0


def measured(samples: Samples, root: Path, stack: contextlib.ExitStack, rounds: int) -> dict[str, list[float]]:
    """Return the microseconds of each round of each side, and those of misses.

    Raises:
        BenchmarkError: If a result was wrong, or a call was no hit.
    """
    sides = Sides()
    sides.add("no cache", samples.__getitem__)
    add_ours(sides, samples, root)
    add_others(sides, samples, root, stack)
    for cache in sides.caches:
        stack.callback(cache.close)
    for name, side in sides.all.items():
        check(name, side, samples)

    before = [cache.stats().misses for cache in sides.caches]
    times = time_in_turns(sides.all, rounds)
    if [cache.stats().misses for cache in sides.caches] != before:
        raise BenchmarkError("some calls were no hits")
    times["a miss, memory"] = [cost_of_misses(samples) for _ in range(rounds)]
    return times


def report(size: str, times: dict[str, list[float]]) -> bool:
    """Print a table; return whether a target was missed."""
    print(f"\n{size + ' a sample':40}{'min':>8}{'median':>8}{'max':>8}{'of ours in batches':>20}")
    base = spread(times[BASE])[1]
    for side, values in times.items():
        ratio = f"{spread(values)[1] / base:.1f}x"
        print(f"{side:40}" + "".join(f"{value:8.1f}" for value in spread(values)) + f"{ratio:>20}")

    targets = {side: target for (of_size, side), target in TARGETS.items() if of_size == size}
    missed = False
    for side, target in {**targets, "a miss, memory": MOST_OF_A_MISS}.items():
        median = spread(times[side])[1]
        missed |= median > target
        print(f"{side}: {median:.1f} us (target {target:g} us){' MISSED' if median > target else ''}")
    return missed


def add_ours(sides: Sides, samples: Samples, root: Path) -> None:
    """Add our sides, filled."""
    for tier in ("memory", "LMDB"):
        options: dict[str, Any] = {}
        if tier == "LMDB":
            options = {"persistent": True, "persistent_cache_dir": root / "ours", "max_memory_cache_size": 0}
        function = torchcache(batch_dim=None, **options)(image_and_label)
        dataset = CachedDataset(samples, **options)
        for index in range(N_CALLS):
            function(samples.side, index)
            dataset[index]
        for cached in (function, dataset):
            cache_of(cached).flush()
            sides.caches.append(cache_of(cached))
        sides.add(f"function, {tier}", lambda index, function=function: function(samples.side, index))
        sides.add(f"dataset, {tier}", dataset.__getitem__)
        sides.add_batches(f"dataset, {tier}, batches", dataset.__getitems__)


def add_others(sides: Sides, samples: Samples, root: Path, stack: contextlib.ExitStack) -> None:
    """Add the others that are installed, filled."""
    joblib, diskcache, runtime = installed("joblib"), installed("diskcache-community"), installed("dataset-rt")
    if joblib is not None:
        cached = joblib.Memory(root / "joblib", verbose=0).cache(image_and_label)
        sides.add(f"joblib.Memory {version('joblib')}", lambda index: cached(samples.side, index))
        for index in range(N_CALLS):
            cached(samples.side, index)

    if diskcache is not None:
        cache = diskcache.Cache(str(root / "diskcache"), size_limit=10**10)
        stack.callback(cache.close)
        for index in range(N_CALLS):
            cache.set(index, samples.as_array(index))
        sides.add(f"diskcache-community {version('diskcache-community')}", lambda index: as_tensor(cache.get(index)))

    if runtime is not None:
        written = write_with_runtime(runtime, samples, root / "runtime")
        sides.all[f"dataset-rt {version('dataset-rt')}, drawn"] = lambda _: drawn_from(written)


def write_with_runtime(runtime: Any, samples: Samples, root: Path) -> Any:  # noqa: ANN401 - of a rival
    """Return a dataset of dataset-rt with all samples."""

    class Source:
        name = "samples"

        def __iter__(self) -> Iterator[Any]:
            for index in range(N_CALLS):
                data = pickle.dumps(samples.as_array(index), protocol=5)
                yield runtime.CacheInput(data=data, metadata={"label": index})

    writer = runtime.WriterConfig(show_progress=False)
    reader = runtime.ReaderConfig(seed=1, shuffle=True)
    made = runtime.DatasetRuntime(num_workers=1)
    return made.from_cache_sources(Source(), root, writer_config=writer, reader_config=reader).dataset


def drawn_from(written: Any) -> list[Sample]:  # noqa: ANN401 - of a rival
    """Return as many samples as there are from a rival that draws them itself, some of them twice."""
    return [as_tensor(pickle.loads(sample.data)) for sample in written]


def as_tensor(sample: tuple[NDArray[np.uint8], int]) -> Sample:
    """Return a sample of a rival as a dataset has it."""
    image, label = sample
    return torch.from_numpy(image), label


def installed(distribution: str) -> Any:  # noqa: ANN401 - a module, or None
    """Return a rival's module; None, and a line, if it is not there."""
    try:
        return importlib.import_module(distribution.replace("-", "_"))
    except ImportError:
        print(f"{distribution} is not installed; pip install {distribution} to have it in the table")
        return None


def batches_of(indices: list[int]) -> Iterator[list[int]]:
    """Yield indices in batches."""
    for start in range(0, len(indices), BATCH):
        yield indices[start : start + BATCH]


def check(name: str, side: Side, samples: Samples) -> None:
    """Check each sample of a side.

    Raises:
        BenchmarkError: If one is wrong.
    """
    indices = shuffled(0)
    got = side(indices)
    labels = [label for _, label in got]
    if len(got) != N_CALLS or (labels != indices and not name.endswith("drawn")):
        raise BenchmarkError(f"{name} returned other samples than those it was asked for")
    for image, label in got:
        expected, _ = samples[label]
        if not torch.equal(image, expected):
            raise BenchmarkError(f"{name} returned another sample at {label}")


def time_in_turns(sides: dict[str, Side], n_rounds: int) -> dict[str, list[float]]:
    """Return the mean microseconds of a sample in each round, after a round that warms up."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(n_rounds + 1):
        indices = shuffled(number)
        for name, side in sides.items():
            started = time.process_time()
            side(indices)
            times[name].append((time.process_time() - started) / N_CALLS * 1e6)
    return {name: values[1:] for name, values in times.items()}


def cost_of_misses(samples: Samples) -> float:
    """Return the mean microseconds that a miss takes beside what the sample itself takes."""
    dataset = CachedDataset(samples)
    dataset[0]
    started = time.process_time()
    for index in range(1, N_CALLS):
        samples[index]
    between = time.process_time()
    for index in range(1, N_CALLS):
        dataset[index]
    ended = time.process_time()
    return ((ended - between) - (between - started)) / (N_CALLS - 1) * 1e6


def shuffled(seed: int) -> list[int]:
    """Return all indices in an order that the seed decides."""
    order: list[int] = np.random.default_rng(seed).permutation(N_CALLS).tolist()
    return order
