"""Runs models of a library through two programs: ``python -m tests.clients.two_programs MODULE FOLDER first|second``.

``MODULE`` has a table ``MODELS`` of functions that make a model, by name. The first program computes a batch of four,
as the model alone does, and fills a cache; the second one has another hash seed and runs with ``mode="require"``, so it
fails where it would compute a row. Each prints what is wrong, a line per model.
"""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchcache import cache_of, torchcache

ROOT = Path(__file__).parents[2]
_N_ROWS = 4
_SHUFFLED = [2, 0, 3, 1]


@dataclass
class Model:
    """A model, what it is called with, and options of its cache."""

    module: torch.nn.Module
    inputs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def problems_in_two_programs(test_file: str, folder: Path, seconds: float = 400) -> dict[str, str]:
    """Run the models of a test file through both programs; return what is wrong by the name of the model."""
    found: dict[str, str] = {}
    for seed, program in enumerate(("first", "second")):
        output = run_program("tests.clients.two_programs", f"tests.clients.{Path(test_file).stem}", folder, program,
                             seed=seed, seconds=seconds)  # fmt: skip
        lines = [line.partition(": ") for line in output.splitlines() if line.startswith("model ")]
        assert lines, output
        found.update((name, f"{program}: {said}") for name, _, said in lines if said != "right")
    return found


def run_program(module: str, *arguments: object, seed: int = 0, seconds: float = 400) -> str:
    """Run a module in a process of its own, and return what it printed."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    more = {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, timeout=seconds,
        env={**os.environ, **more}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _tensors_in(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _are_same(value: object, expected: list[torch.Tensor]) -> bool:
    tensors = _tensors_in(value)
    if [t.dtype for t in tensors] != [t.dtype for t in expected]:
        return False
    return len(tensors) == len(expected) and all(map(torch.equal, tensors, expected))


def _shuffle(value: object) -> object:
    is_batch = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == _N_ROWS
    return value[_SHUFFLED] if is_batch else value


def _try(model: Model, folder: Path, *, is_first: bool) -> list[str]:
    """Return what is wrong with the results of a model in one program."""
    module = model.module.eval().requires_grad_(requires_grad=False)
    plain = copy.deepcopy(module)
    mode = "on" if is_first else "require"
    cached = torchcache(persistent=True, persistent_cache_dir=folder / "cache", mode=mode, **model.options)(module)
    wrong: list[str] = []
    kept = folder / "first.pt"
    with torch.no_grad():
        if is_first:
            folder.mkdir()
            expected = _tensors_in(plain(**model.inputs))
            torch.save(expected, kept)
            if not _are_same(cached(**model.inputs), expected):
                wrong.append("a miss returns something else than the model alone")
        expected = torch.load(kept)
        shuffled = {name: _shuffle(value) for name, value in model.inputs.items()}
        if not _are_same(cached(**shuffled), [tensor[_SHUFFLED] for tensor in expected]):
            wrong.append("a hit in another batch returns something else")
        if not _are_same(cached(**model.inputs), expected):
            wrong.append("a hit returns something else")
    stats = cache_of(cached).stats()
    cache_of(cached).close()
    if stats.misses != (_N_ROWS if is_first else 0):
        wrong.append(f"{stats.misses} rows were computed")
    if stats.bypasses:
        wrong.append(f"went around the cache: {dict(stats.bypasses)}")
    return wrong


def _main() -> None:
    name_of_module, folder, program = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models: Mapping[str, Callable[[], Model]] = importlib.import_module(name_of_module).MODELS
    for name, make in models.items():
        torch.manual_seed(0)
        try:
            wrong = _try(make(), Path(folder) / name, is_first=program == "first")
        except Exception as error:  # noqa: BLE001 - it is the verdict on this model
            wrong = [f"{type(error).__name__}: {error}"]
        print(f"model {name}: {'; '.join(wrong) or 'right'}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    _main()
