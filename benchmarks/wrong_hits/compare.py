"""Every way in which a cached result could be wrong, and what this cache and its rivals do.

Each row is a small program, run once without a cache and then with each cache in a process of its own;
what it returns is compared bit by bit. A cell says what was seen in this run:

- ``right``: what the program returns without a cache; ``hit`` if the last call looked it up, ``computed``
  if it ran the user's code;
- ``WRONG``: something else;
- ``raises NAME``: an exception where the program without a cache has none; ``dies``: the process ended;
- ``n/a``: the cache has no notion of it, and a word that says why.

Exits 1 if a row of ours is not right, other than those that only the user can know about.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib.metadata
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks._tables import write_table
from benchmarks.hits import INSTALL_TIMEOUT_SECONDS, install_rival
from benchmarks.workload import BenchmarkError
from benchmarks.wrong_hits import between, cases
from benchmarks.wrong_hits.child import edit_program, write_program
from benchmarks.wrong_hits.sides import SIDES

ROWS_HERE = tuple(cases.ROWS.all)
ROWS_BETWEEN_RUNS = tuple(between.ROWS.all)
ROWS = ROWS_HERE + ROWS_BETWEEN_RUNS

OURS = "ours"
CACHES = tuple(name for name in SIDES if name != "none")
#: What pip installs for each rival; torch and NumPy are those of this environment.
REQUIREMENTS = {
    "torch-module-cache": "torch-module-cache==0.1.4",
    "joblib.Memory": "joblib==1.6.0",
    "diskcache.memoize": "diskcache==5.6.3",
    "MONAI PersistentDataset": "monai==1.6.1",
}
SILENCE_TIMEOUT_SECONDS = 120
KILLED_AFTER_SECONDS = 0.5
RIGHT = "right"
TABLE = "wrong-hits.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m benchmarks wrong-hits``."""
    parser.add_argument("--sides", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--write", action="store_true", help=f"write the table of all caches to docs/tables/{TABLE}")
    parser.add_argument("--work-dir", type=Path, default=Path("build"), help="rivals and caches")


def run(args: argparse.Namespace) -> int:
    """Run every row with every cache, print the table, and return 1 if a row of ours is not right, else 0.

    Raises:
        BenchmarkError: If a rival cannot be installed, or a table of some caches only would be written.
    """
    if args.write and set(args.sides) != set(CACHES):
        raise BenchmarkError("--write writes the table of all caches; drop --sides")
    folders = {side: install(side, args.work_dir) for side in args.sides}
    table = {}
    for side in args.sides:
        print(f"running {side} ...", file=sys.stderr)
        table[side] = see_all(side, folders[side], args.work_dir)
    print(plain(table, folders))
    if args.write:
        write_table(TABLE, markdown(table, versions(folders)))
    ours = table.get(OURS, {})
    wrong = [row for row in ROWS if not ours.get(row.name, RIGHT).startswith(RIGHT)]
    for row in wrong:
        print(f"ours is not right: {row.title}: {ours[row.name]}", file=sys.stderr)
    return 1 if wrong else 0


# -- rivals -----------------------------------------------------------------------------------------------------


def install(side: str, work_dir: Path) -> Path | None:
    """Return the folder that a rival is installed in, at first use by pip; None for our own side.

    Raises:
        BenchmarkError: If pip fails.
    """
    if side == OURS:
        return None
    if side not in REQUIREMENTS:
        return install_rival(work_dir)
    folder = work_dir.resolve() / "rivals" / SIDES[side].package
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    print(f"installing {REQUIREMENTS[side]} in {folder}", file=sys.stderr)
    try:
        subprocess.run(
            [*pip, "--target", str(unfinished), REQUIREMENTS[side]], check=True, timeout=INSTALL_TIMEOUT_SECONDS
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise BenchmarkError(f"pip could not install {REQUIREMENTS[side]} ({error})") from error
    return unfinished.rename(folder)


def version(side: str, folder: Path | None) -> str:
    """Return the version of a cache."""
    if folder is None:
        return importlib.metadata.version(SIDES[side].package)
    found = importlib.metadata.distributions(name=SIDES[side].package, path=[str(folder)])
    return next(iter(found)).version


# -- runs -------------------------------------------------------------------------------------------------------


def see_all(side: str, folder: Path | None, work_dir: Path) -> dict[str, str]:
    """Return what was seen of one cache, by the name of the row."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wrong-hits-", dir=work_dir, ignore_cleanup_errors=True) as root:
        path = Path(root).resolve()
        write_program(path)
        return run_cases(side, "here", folder, path, [row.name for row in ROWS_HERE]) | see_between_runs(
            side, folder, path
        )


def see_between_runs(side: str, folder: Path | None, work_dir: Path) -> dict[str, str]:
    """Run the program twice, and return what the second run saw, by the name of the row.

    Args:
        side: The cache.
        folder: Where it is installed.
        work_dir: Where the program lies.
    """
    names = [row.name for row in ROWS_BETWEEN_RUNS]
    with contextlib.closing(Child(side, "writer", folder, work_dir, [])) as writer:
        first = run_cases(side, "first", folder, work_dir, [n for n in names if n != "killed_writer"])
        beside = {"killed_writer": "was not reached"}
        for reply in writer.replies():
            if "cell" in reply:
                beside[reply["case"]] = reply["cell"]
            elif reply["case"] == "killed_writer":
                time.sleep(KILLED_AFTER_SECONDS)
                del beside["killed_writer"]
                break
    edit_program(work_dir)
    second = run_cases(side, "second", folder, work_dir, names)
    # A fault that the first run saw counts: of two processes that meet, or of a call that raised.
    for seen in (beside, first):
        for name, cell in seen.items():
            if cell != "filled" and not cell.startswith((RIGHT, "n/a")):
                second[name] = cell
    return second


def run_cases(side: str, run: str, folder: Path | None, work_dir: Path, names: Sequence[str]) -> dict[str, str]:
    """Run cases in a child process, and the rest in another one if it dies of one."""
    cells: dict[str, str] = {}
    left = list(names)
    while left:
        with contextlib.closing(Child(side, run, folder, work_dir, left)) as child:
            case = ""
            for reply in child.replies():
                case = reply["case"]
                if "cell" in reply:
                    cells[case] = reply["cell"]
            if len(cells) < len(names):
                if not case:
                    raise BenchmarkError(f"the process of {side} did not begin; see its messages above")
                cells.setdefault(case, child.end())
        left = [name for name in left if name not in cells]
    return cells


class Child:
    """A process that runs cases."""

    def __init__(self, side: str, run: str, folder: Path | None, work_dir: Path, names: Sequence[str]) -> None:
        # The module search begins in the process's own folder: 0.6.0 has our package's name.
        path = [*([str(folder)] if folder else []), str(Path(__file__).parents[2])]
        env = {key: value for key, value in os.environ.items() if not key.startswith("TORCHCACHE_")}
        env |= {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONDONTWRITEBYTECODE": "1",  # an edit within a second may leave the old .pyc valid
            "TORCHCACHE_LOG_LEVEL": "CRITICAL",
            "TMPDIR": str(work_dir),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.wrong_hits.child", side, run, str(work_dir), *names],
            cwd=folder or path[-1],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()

    def replies(self) -> Iterator[dict[str, str]]:
        """Yield what it says, until it ends or is silent for too long."""
        lines: queue.Queue[str] = queue.Queue()
        assert self._process.stdout is not None
        stdout = self._process.stdout

        def read() -> None:
            with contextlib.suppress(ValueError):  # closed
                for line in stdout:
                    lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=SILENCE_TIMEOUT_SECONDS)
            except queue.Empty:
                return
            if not line:
                return
            yield json.loads(line)

    def end(self) -> str:
        """Say how it ended before its cases did."""
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "hangs"
        return f"dies ({signal.Signals(-status).name})" if status < 0 else f"dies (exit {status})"


# -- the table --------------------------------------------------------------------------------------------------


def versions(folders: dict[str, Path | None]) -> str:
    """Name what ran, and when."""
    named = [f"{SIDES[side].package} {version(side, folder)}" for side, folder in folders.items()]
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    return ", ".join([*named, f"torch {torch.__version__}", f"Python {platform.python_version()}", str(today)])


def plain(table: dict[str, dict[str, str]], folders: dict[str, Path | None]) -> str:
    """Return the table for a terminal."""
    width = max(len(row.title) for row in ROWS) + 4
    columns = {side: max(len(side), *map(len, cells.values())) + 2 for side, cells in table.items()}
    lines = [versions(folders), " " * width + "".join(f"{side:{columns[side]}}" for side in table)]
    group = ""
    for row in ROWS:
        if row.group != group:
            group = row.group
            lines.append(group)
        lines.append(
            f"  {row.title:{width - 2}}"
            + "".join(f"{cells[row.name]:{columns[side]}}" for side, cells in table.items())
        )
    return "\n".join([*lines, *(f"{side}: {count(cells)}" for side, cells in table.items())])


def markdown(table: dict[str, dict[str, str]], seen_with: str) -> str:
    """Return the table that docs/keys.md includes.

    Args:
        table: What was seen of each cache, by the name of the row.
        seen_with: The versions, and the day.
    """
    lines = [f"| | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    group = ""
    for row in ROWS:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** |" + " |" * len(table))
        cells = (_emphasised(seen[row.name]) for seen in table.values())
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    totals = [f"- {side}: {count(cells)}" for side, cells in table.items()]
    return "\n".join([f"Seen with {seen_with}.", "", *lines, "", *totals])


def _emphasised(cell: str) -> str:
    return cell.replace("WRONG", "**WRONG**")


def count(cells: dict[str, str]) -> str:
    """Count the cells by what they begin with."""
    kinds: dict[str, int] = {}
    for cell in cells.values():
        kind = cell.partition(" ")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items(), key=lambda item: -item[1]))
