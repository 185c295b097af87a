"""What a hit costs, side by side with torchcache 0.6.0 in the same run.

Each side fills its cache with one pass over the rows, has every row checked once, then answers all
of them again and again, in turns: ours, rival, ours, rival. From memory the persistent tier is off;
from disk the memory tier is (the files are warm in the page cache, on both sides). The table begins
with what frames the two: the model without a cache, which costs next to nothing here on purpose,
and the floor, which no cache is spared: hash the batch once, copy the values once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.workload import CASES, MEMORY_LIMIT_BYTES, BenchmarkError, Case, Model, Passes
from torchcache import cache_of, torchcache

RIVAL = "0.6.0"
TARGETS = {
    ("small", "memory"): 5.0,
    ("image", "memory"): 8.0,
    ("tokens", "memory"): 2.0,
    ("small", "disk"): 20.0,
    ("image", "disk"): 10.0,
    ("tokens", "disk"): 2.0,
}
SETTINGS = ("memory", "disk")
PASSES_AT_LEAST = 5
LEAF_BYTES = 16 * 1024
INSTALL_TIMEOUT_SECONDS = 300
REPLY_TIMEOUT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the rows per second of each pass, and the wrong rows if counted."""

    case: str
    setting: str
    side: str
    rates: list[float]
    n_wrong: int | None = None

    @property
    def median(self) -> float:
        """The median of the rows per second."""
        return statistics.median(self.rates)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many times as fast as the rival we are in one case and setting."""

    case: str
    setting: str
    target: float
    ratio_of_medians: float
    ratios_of_pairs: list[float]
    n_wrong_ours: int
    n_wrong_rival: int

    @property
    def is_met(self) -> bool:
        """Whether the target is reached and no row of ours is wrong."""
        return self.ratio_of_medians >= self.target and self.n_wrong_ours == 0

    def __str__(self) -> str:
        """Say it on one line."""
        low, middle, high = spread(self.ratios_of_pairs)
        return (
            f"{self.case} {self.setting}: {self.ratio_of_medians:.1f}x (target {self.target:g}x)"
            f"{'' if self.is_met else ' MISSED'}; pairs {low:.1f}x, {middle:.1f}x, {high:.1f}x;"
            f" wrong rows: ours {self.n_wrong_ours}, rival {self.n_wrong_rival}"
        )


class Ours:
    """Our side, in this process."""

    def __init__(self, case: Case, setting: str, passes: Passes, cache_dir: Path) -> None:
        if setting == "memory":
            decorate = torchcache(max_memory_cache_size=MEMORY_LIMIT_BYTES)
        else:
            decorate = torchcache(persistent=True, persistent_cache_dir=cache_dir, max_memory_cache_size=0)

        @decorate
        class OurModel(Model):
            """The model, as we cache it."""

        self._case = case
        self._setting = setting
        self._passes = passes
        self._model = OurModel(case.value_shape)
        self._cache = cache_of(self._model)
        for _ in passes.fill(self._model):
            self._cache.flush()  # a queue that is full drops rows, which is not what is measured

    def count_wrong(self) -> int:
        """Return how many rows differ from what the model returns."""
        return self._passes.count_wrong(self._model)

    def seconds(self) -> float:
        """Return the time of one pass of hits.

        Raises:
            BenchmarkError: If a row was not a hit, or not from the tier that the setting is about.
        """
        hits_before = self._hits()
        seconds = self._passes.seconds(lambda _, batch: self._model(batch))
        n_hits = self._hits() - hits_before
        if n_hits != self._case.n_rows:
            raise BenchmarkError(
                f"only {n_hits} of {self._case.n_rows} rows were hits from {self._setting}: {self._cache.stats()}"
            )
        return seconds

    def close(self) -> None:
        """Give the files back."""
        self._cache.close()

    def _hits(self) -> int:
        stats = self._cache.stats()
        return stats.memory_hits if self._setting == "memory" else stats.store_hits


class Rival:
    """torchcache 0.6.0, in a process of its own that obeys one command at a time.

    Raises:
        BenchmarkError: If the process ends or does not answer in time.
    """

    def __init__(self, case: Case, setting: str, cache_dir: Path, folder: Path, threads: int) -> None:
        # The module search begins in the process's own folder, where its torchcache hides ours.
        path = [str(folder), str(Path(__file__).parents[1])]
        env = {key: value for key, value in os.environ.items() if not key.startswith("TORCHCACHE_")}
        env |= {"PYTHONPATH": os.pathsep.join(path), "TORCHCACHE_LOG_LEVEL": "ERROR"}
        arguments = [str(folder), case.name, setting, str(cache_dir), str(threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._rival", *arguments],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._receive()

    def count_wrong(self) -> int:
        """Return how many rows differ from what the model returns."""
        return int(self._ask("check"))

    def seconds(self) -> float:
        """Return the time of one pass of hits."""
        return float(self._ask("time"))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, command: str) -> str:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no reply either
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> str:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], REPLY_TIMEOUT_SECONDS)
        reply = self._process.stdout.readline() if readable else ""
        if not reply:
            what = "ended early" if readable else f"was silent for {REPLY_TIMEOUT_SECONDS} s"
            self.close()
            raise BenchmarkError(f"the rival's process {what}; see its messages above")
        return reply


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m benchmarks hits``."""
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--passes", type=int, default=9, help="timed passes of each side")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each side")
    parser.add_argument("--work-dir", type=Path, default=Path("build"), help="rival and caches")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return 1 if a target is missed or a row of ours is wrong, else 0.

    Raises:
        BenchmarkError: If the rival cannot be installed or run, or a pass was not all hits.
    """
    if args.passes < PASSES_AT_LEAST:
        raise BenchmarkError(f"--passes must be {PASSES_AT_LEAST} at least")
    torch.set_num_threads(args.threads)
    folder = install_rival(args.work_dir)
    table: list[Row] = []
    verdicts: list[Verdict] = []
    for case in (CASES[name] for name in args.cases):
        print(f"measuring {case.name} ...", file=sys.stderr)
        passes = Passes(case)
        table += frame(case, passes, args.passes)
        for setting in args.settings:
            ours, rival = duel(case, setting, passes, folder, args)
            table += [ours, rival]
            verdicts.append(verdict(ours, rival))
    report(table, verdicts, args)
    return 0 if all(each.is_met for each in verdicts) else 1


def install_rival(work_dir: Path) -> Path:
    """Return the folder that the rival is installed in, at first use by pip.

    Raises:
        BenchmarkError: If pip fails.
    """
    folder = work_dir.resolve() / "rival"
    if folder.exists():
        return folder
    unfinished = folder.with_name("rival-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = ["--no-deps", "--target", str(unfinished), f"torchcache=={RIVAL}", "zstd"]
    print(f"installing torchcache {RIVAL} in {folder}", file=sys.stderr)
    try:
        subprocess.run([*pip, *wanted], check=True, timeout=INSTALL_TIMEOUT_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        raise BenchmarkError(
            f"pip could not install the rival ({error}); the network may be away, or pip. "
            f"By hand: pip install --no-deps --target {folder} torchcache=={RIVAL} zstd"
        ) from error
    return unfinished.rename(folder)


def frame(case: Case, passes: Passes, n_passes: int) -> list[Row]:
    """Time what frames the caches: the model alone, and the work that no cache is spared."""
    model = Model(case.value_shape)
    values = np.empty((case.n_rows, *case.value_shape), np.float32)
    for index, batch in passes.batches():
        values[index.numpy()] = model(batch).numpy()

    def floor(index: Tensor, batch: Tensor) -> NDArray[np.float32]:
        data = batch.numpy().data.cast("B")
        row_bytes = len(data) // len(batch)
        for row in range(0, len(data), row_bytes):
            for leaf in range(row, row + row_bytes, LEAF_BYTES):
                xxhash.xxh3_128_digest(data[leaf : min(leaf + LEAF_BYTES, row + row_bytes)])
        gathered: NDArray[np.float32] = values[index.numpy()]
        return gathered

    def times(call: Callable[[Tensor, Tensor], object]) -> list[float]:
        passes.seconds(call)  # the first pass warms up
        return [case.n_rows / passes.seconds(call) for _ in range(n_passes)]

    return [
        Row(case.name, "-", "no cache", times(lambda _, batch: model(batch))),
        Row(case.name, "-", "floor", times(floor)),
    ]


def duel(
    case: Case,
    setting: str,
    passes: Passes,
    folder: Path,
    args: argparse.Namespace,
) -> tuple[Row, Row]:
    """Fill both caches, check both, then time both in turns."""
    with tempfile.TemporaryDirectory(prefix="hits-", dir=args.work_dir) as root:
        cache_dir = Path(root).resolve()
        rival = Rival(case, setting, cache_dir / "rival", folder, args.threads)
        with contextlib.closing(rival):
            ours = Ours(case, setting, passes, cache_dir / "ours")
            n_wrong_ours, n_wrong_rival = ours.count_wrong(), rival.count_wrong()
            pairs = [(ours.seconds(), rival.seconds()) for _ in range(args.passes)]
        ours.close()
    rates_ours, rates_rival = ([case.n_rows / s for s in side] for side in zip(*pairs, strict=True))
    return (
        Row(case.name, setting, "ours", rates_ours, n_wrong_ours),
        Row(case.name, setting, f"rival {RIVAL}", rates_rival, n_wrong_rival),
    )


def verdict(ours: Row, rival: Row) -> Verdict:
    """Compare the two sides of a duel."""
    assert ours.n_wrong is not None
    assert rival.n_wrong is not None
    return Verdict(
        case=ours.case,
        setting=ours.setting,
        target=TARGETS[ours.case, ours.setting],
        ratio_of_medians=ours.median / rival.median,
        ratios_of_pairs=[a / b for a, b in zip(ours.rates, rival.rates, strict=True)],
        n_wrong_ours=ours.n_wrong,
        n_wrong_rival=rival.n_wrong,
    )


def report(table: list[Row], verdicts: list[Verdict], args: argparse.Namespace) -> None:
    """Print the table and the verdicts, and write them to a file if asked to."""
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": args.threads,
        "passes": args.passes,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("rows per second of hits, inputs float32:")
    print(f"{'case':8}{'setting':9}{'side':12}{'min':>10}{'median':>10}{'max':>10}{'wrong':>7}")
    for row in table:
        rates = "".join(f"{rate:10.0f}" for rate in spread(row.rates))
        wrong = "-" if row.n_wrong is None else row.n_wrong
        print(f"{row.case:8}{row.setting:9}{row.side:12}{rates}{wrong:>7}")
    print(*verdicts, sep="\n")
    if args.json is not None:
        figures = {
            "machine": machine,
            "table": [asdict(row) for row in table],
            "verdicts": [asdict(each) | {"is_met": each.is_met} for each in verdicts],
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def spread(numbers: list[float]) -> tuple[float, float, float]:
    """Return the smallest, the median and the largest."""
    return min(numbers), statistics.median(numbers), max(numbers)
