"""Runs the cases of ``wrong-hits`` for one cache, one after the other.

``python -m benchmarks.wrong_hits.child SIDE RUN WORK_DIR [CASE ...]`` prints a line of JSON before and after
each case. RUN is ``here`` (all that happens in one process), ``first`` or ``second`` (of two runs), or ``writer``
(the process that writes beside the first run, and is killed). The benchmark of our own side and its
test run the cases in their own process, by ``see``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.wrong_hits.rows import Row, numbers
from benchmarks.wrong_hits.sides import SIDES, Watch, edit

PROGRAM = ("cases", "between", "settings", "running")
CASE_TIMEOUT_SECONDS = 60
MEETING_TIMEOUT_SECONDS = 60


def write_program(work_dir: Path) -> None:
    """Copy the user's program into ``work_dir``, where it is edited."""
    package = work_dir / "src" / "program"
    package.mkdir(parents=True)
    (work_dir / "caches").mkdir()
    (package / "__init__.py").touch()
    for name in PROGRAM:
        shutil.copyfile(Path(__file__).with_name(f"{name}.py"), package / f"{name}.py")


def edit_program(work_dir: Path) -> None:
    """Save the second run's text."""
    for name in PROGRAM:
        edit(work_dir / "src" / "program" / f"{name}.py")


@contextlib.contextmanager
def program(work_dir: Path, name: str) -> Iterator[ModuleType]:
    """Import the user's program afresh, so that no case sees what another did to it."""
    source = str(work_dir / "src")
    _forget_program()
    sys.path.insert(0, source)
    try:
        importlib.invalidate_caches()
        yield importlib.import_module(f"program.{name}")
    finally:
        sys.path.remove(source)
        _forget_program()


def see(row: Row, side_name: str, work_dir: Path, *, file: str = "cases", expect: bool = True) -> str:
    """Run one case with a cache and, if ``expect``, without one, and say what was seen.

    Args:
        row: The case.
        side_name: The cache.
        work_dir: Where the program and the caches lie.
        file: The part of the program that the case is in.
        expect: False if the run only fills the cache.

    Returns:
        A cell of the table.
    """
    lacks = SIDES[side_name].lacks
    for need in row.needs:
        if need in lacks:
            return f"n/a ({lacks[need]})"
    cache_dir = work_dir / "caches" / row.name
    expected = _run(row, "none", work_dir, file)[0] if expect else None
    marker = cache_dir.with_suffix(".marker")
    try:
        seen, is_computed = _run(row, side_name, work_dir, file)
    except Exception as error:
        return "WRONG (code ran)" if marker.exists() else f"raises {type(error).__name__}"
    if marker.exists():
        return "WRONG (code ran)"
    if not expect:
        return "filled"
    if not is_same(seen, expected):
        return "WRONG"
    return f"right ({'computed' if is_computed else 'hit'})"


def _run(row: Row, side_name: str, work_dir: Path, file: str) -> tuple[Any, bool]:
    with program(work_dir, file) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a cache warns of is not what is asked here
        watch = Watch(work_dir / "src")
        side = SIDES[side_name](watch, work_dir / "caches" / row.name, module)
        try:
            result = getattr(module, row.name)(side)
            return result, watch.is_computed
        finally:
            side.close()


def _forget_program() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "program"]:
        del sys.modules[name]


def is_same(a: Any, b: Any) -> bool:  # noqa: ANN401 - whatever a case returns
    """Tell whether two results have the same structure, types and bits.

    Classes are compared by name: those of the user's program are made anew for each run.
    """
    if type(a).__name__ != type(b).__name__:
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if dataclasses.is_dataclass(a):
        return all(is_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().contiguous()
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


# -- damage -----------------------------------------------------------------------------------------------------


def damage(row: Row, side_name: str, work_dir: Path) -> None:
    """Do to the files of a case what its row says.

    Raises:
        RuntimeError: If no stored value was found to be damaged.
    """
    cache_dir = work_dir / "caches" / row.name
    files = [path for path in cache_dir.rglob("*") if path.is_file() and path.stat().st_size]
    if row.damage == "poison":
        with program(work_dir, "between") as module:
            side = SIDES[side_name](Watch(work_dir), cache_dir, module)
            n = side.poison(cache_dir.with_suffix(".marker"))
            side.close()
        if not n:
            raise RuntimeError("no stored value was found")
    elif row.damage == "flip":
        value = (numbers() * 2).numpy().tobytes()[:16]
        if not sum(_flip(path, value) for path in files):
            raise RuntimeError("no stored value was found")
    else:
        for path in files:
            os.truncate(path, path.stat().st_size // 2 if row.damage == "truncate" else 0)


def _flip(path: Path, value: bytes) -> int:
    data = bytearray(path.read_bytes())
    place, n = data.find(value), 0
    while place >= 0:
        data[place + 1] ^= 1
        place, n = data.find(value, place), n + 1
    if n:
        with path.open("r+b") as file:  # the same file, as a bad disk leaves it
            file.write(data)
    return n


# -- the process ------------------------------------------------------------------------------------------------


def meet(work_dir: Path, name: str, other: str) -> None:
    """Wait until the other process is as far."""
    (work_dir / f"{name}.meets").touch()
    deadline = time.monotonic() + MEETING_TIMEOUT_SECONDS
    while not (work_dir / f"{other}.meets").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{other} did not come")
        time.sleep(0.005)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(CASE_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(side_name: str, run: str, folder: str, *names: str) -> None:
    """Run the cases."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # some rivals print
    torch.set_num_threads(1)
    work_dir = Path(folder)
    SIDES[side_name].load()
    file = "cases" if run == "here" else "between"
    rows: list[Row] = importlib.import_module(f"benchmarks.wrong_hits.{file}").ROWS.all
    for row in rows:
        if names and row.name not in names:
            continue
        if (run == "writer" and not row.writer) or (run == "first" and row.writer == "is killed"):
            continue
        print(json.dumps({"case": row.name}), file=replies)
        if row.writer == "meets" and run != "second":
            meet(work_dir, run, "writer" if run == "first" else "first")
        if run == "second" and row.damage:
            try:
                damage(row, side_name, work_dir)
            except Exception as error:
                print(json.dumps({"case": row.name, "cell": f"not damaged: {error}"}), file=replies)
                continue
        is_filling = run in ("first", "writer") and row.writer != "meets"
        with _time_limit():
            cell = see(row, side_name, work_dir, file=file, expect=not is_filling)
        print(json.dumps({"case": row.name, "cell": cell}), file=replies)


if __name__ == "__main__":
    main(*sys.argv[1:])
