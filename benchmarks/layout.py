"""How rows lie on disk: records under random keys against segments with an index.

Both sides pack, check and copy out the same records, so that what differs is where LMDB keeps them. Bytes
on disk are those of data.mdb after all commits, divided by the payload.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import lmdb
import msgpack
import numpy as np
from xxhash import xxh3_128_digest

from benchmarks._tables import write_table
from benchmarks.workload import BenchmarkError
from torchcache.layout import Layout, Leaf, Rows
from torchcache.storage.contract import StoreSettings
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.environment import shared_environment
from torchcache.storage.lmdb import LmdbStore
from torchcache.storage.record import pack_rows, unpack_many
from torchcache.storage.table import Namespace, read_namespace

NAMESPACE = bytes(range(16))
PREFIX = bytes(4)
BATCH = 256
ROUNDS = 9
READS = 10_000

#: No slower than plain records by more than a quarter.
LEAST_SINGLE_RATIO = 0.8

#: Bytes of a row and how many of them are written.
SIZES = {100: 100_000, 1000: 60_000, 1500: 40_000, 3000: 30_000, 600_000: 300}

#: What issue and design ask for: payload bytes times this on disk at most.
TARGETS = {100: 2.5, 1000: 1.2, 1500: 1.2, 3000: 1.15, 600_000: 1.15}

TABLE = "layout.md"


class PlainRecords:
    """The layout that was not chosen: one LMDB entry a record, behind the same gate and namespace table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        directory = CacheDirectory(path.parent)
        self._environment = shared_environment(directory, path.name, StoreSettings(max_persistent_cache_size=1 << 36))
        with directory.turn(1.0):
            self._environment.ensure(lambda _: True)

    def put(self, rows: Rows) -> None:
        """Commit one batch."""
        records = pack_rows(NAMESPACE, rows, None)
        keys = [PREFIX + digest for digest in rows.digests]
        with self._environment.writing() as txn, txn.cursor() as cursor:
            txn.put(b"n" + NAMESPACE, msgpack.packb(astuple(Namespace(0, 0, 0, 0, 0.0, 0.0))))
            cursor.putmulti(sorted(zip(keys, records, strict=True)))

    def get(self, digests: Sequence[bytes]) -> int:
        """Copy out one batch; return how many rows were found."""
        with self._environment.reading() as txn:
            read_namespace(txn, NAMESPACE)
            found, _, _ = unpack_many(NAMESPACE, digests, [txn.get(PREFIX + digest) for digest in digests])
        return sum(len(item.positions) for item in found)

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()


class Segments:
    """Ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._store = LmdbStore(
            CacheDirectory(path.parent), path.name, StoreSettings(max_persistent_cache_size=1 << 36)
        )

    def put(self, rows: Rows) -> None:
        """Commit one batch."""
        self._store.put_many([self._store.pack(NAMESPACE, rows)])

    def get(self, digests: Sequence[bytes]) -> int:
        """Copy out one batch; return how many rows were found."""
        return sum(len(item.positions) for item in self._store.get_many(NAMESPACE, digests).found)

    def close(self) -> None:
        """Nothing to close: the process keeps the environment."""


def fill(side: PlainRecords | Segments, size: int, digests: Sequence[bytes]) -> float:
    """Write rows of ``size`` bytes; return how many a second."""
    data = np.random.default_rng(0).integers(0, 256, (min(len(digests), 1024), size), dtype=np.uint8)
    layout = Layout((Leaf("uint8", "uint8", (size,)),))
    step = max(1, min(1024, (8 << 20) // size))
    started = time.perf_counter()
    for i in range(0, len(digests), step):
        part = digests[i : i + step]
        side.put(Rows(part, layout, data[: len(part)]))
    return len(digests) / (time.perf_counter() - started)


def read(side: PlainRecords | Segments, digests: Sequence[bytes], width: int) -> float:
    """Read rows, ``width`` at a time; return how many a second."""
    started = time.perf_counter()
    found = sum(side.get(digests[i : i + width]) for i in range(0, len(digests), width))
    rate = len(digests) / (time.perf_counter() - started)
    if found != len(digests):
        raise BenchmarkError(f"{type(side).__name__} lost rows: {found} of {len(digests)}")
    return rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    parser.add_argument("--work-dir", default="build/bench", help="where the environments are made")
    parser.add_argument("--write", action="store_true", help=f"write the table to docs/tables/{TABLE} too")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; return 1 if a target was missed."""
    root = Path(arguments.work_dir) / "layout"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True, mode=0o700)
    print(f"{platform.platform()}, cores {os.cpu_count()}, python {platform.python_version()}, lmdb {lmdb.__version__}")
    print("row bytes  layout     bytes/payload   writes/s  single reads/s  batch reads/s")
    missed = []
    lines: list[str] = []
    ratios = {}
    for size, n in SIZES.items():
        digests = [xxh3_128_digest(i.to_bytes(8, "little")) for i in range(n)]
        chosen = [digests[i] for i in np.random.default_rng(1).integers(0, n, READS if size < 100_000 else READS // 20)]
        sides = {"records": PlainRecords(root / f"plain-{size}"), "segments": Segments(root / f"segments-{size}")}
        writes = {name: fill(side, size, digests) for name, side in sides.items()}
        single: dict[str, list[float]] = {name: [] for name in sides}
        batch: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(ROUNDS):  # in turns, so that a change of the machine's speed meets both
            for name, side in sides.items():
                single[name].append(read(side, chosen, 1))
            for name, side in sides.items():
                batch[name].append(read(side, chosen, BATCH))
        for name, side in sides.items():
            used = side.path.joinpath("data.mdb").stat().st_size / (n * size)
            rates = writes[name], statistics.median(single[name]), statistics.median(batch[name])
            print(f"{size:>9}  {name:9}  {used:>12.2f}x  {rates[0]:>9.0f}  {rates[1]:>14.0f}  {rates[2]:>13.0f}")
            lines.append(f"| {size:,} | {name} | {used:.2f}x | {' | '.join(f'{rate:,.0f}' for rate in rates)} |")
            if name == "segments" and used > TARGETS[size]:
                missed.append(f"{size} B: {used:.2f}x on disk, target {TARGETS[size]}x")
            side.close()
        pairs = [ours / plain for ours, plain in zip(single["segments"], single["records"], strict=True)]
        ratios[size] = statistics.median(pairs)
        print(f"{size:>9}  single reads of segments against records: {ratios[size]:.2f}")
        if ratios[size] < LEAST_SINGLE_RATIO:
            missed.append(f"{size} B: single reads at {ratios[size]:.2f} of plain records")
        shutil.rmtree(root)
        root.mkdir(mode=0o700)
    for line in missed:
        print("MISSED", line)
    if arguments.write:
        write_table(TABLE, markdown(lines, ratios))
    return 1 if missed else 0


def markdown(lines: Sequence[str], ratios: Mapping[int, float]) -> str:
    """Return the table that docs/storage.md includes."""
    kernel = ".".join(platform.release().split(".")[:2])
    system = f"{platform.system()} {kernel}, Python {platform.python_version()}, lmdb {lmdb.__version__}"
    shown = ", ".join(f"{ratio:.2f} ({size:,} B)" for size, ratio in ratios.items())
    return "\n".join(
        [
            f"Measured on {os.cpu_count()} cores, {system}, {ROUNDS} rounds in turns; reads are medians.",
            "",
            "| row bytes | layout | bytes on disk per payload byte | writes/s | single reads/s | batch reads/s |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            f"Single reads from segments against those of plain records, paired by round: {shown}.",
        ]
    )
