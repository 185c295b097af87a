"""The rival's process: torchcache 0.6.0, which has our package's name and so cannot live in ours.

``python -m benchmarks._rival FOLDER CASE SETTING CACHE_DIR THREADS``, run by ``benchmarks.hits`` in
FOLDER, where the rival is installed. It fills its cache, says ``ready``, then obeys one command a
line, ``check`` or ``time``, and answers each with a number on a line, until its input ends.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import torchcache
from benchmarks.workload import CASES, MEMORY_LIMIT_BYTES, Case, Model, Passes

VERSION = "0.6.0"


def cached_model(case: Case, setting: str, cache_dir: str) -> torch.nn.Module:
    """Return the model behind the rival's cache."""
    options: dict[str, dict[str, Any]] = {
        "memory": {"max_memory_cache_size": MEMORY_LIMIT_BYTES},
        "disk": {
            "persistent": True,
            "persistent_cache_dir": cache_dir,
            "max_memory_cache_size": 0,
        },
    }

    @torchcache.torchcache(**options[setting])
    class RivalModel(Model):
        """The model, as the rival caches it."""

    model: torch.nn.Module = RivalModel(case.value_shape)
    return model


def main(folder: str, case_name: str, setting: str, cache_dir: str, threads: str) -> None:
    """Fill the cache, then obey."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the rival logs to stdout

    if version("torchcache") != VERSION or not Path(torchcache.__file__).is_relative_to(folder):
        sys.exit(f"expected torchcache {VERSION} in {folder}, found {torchcache.__file__}")
    torch.set_num_threads(int(threads))
    passes = Passes(CASES[case_name])
    model = cached_model(CASES[case_name], setting, cache_dir)
    for _ in passes.fill(model):
        pass
    print("ready", file=replies)

    for command in sys.stdin:
        if command.strip() == "check":
            print(passes.count_wrong(model), file=replies)
        else:
            print(passes.seconds(lambda _, batch: model(batch)), file=replies)


if __name__ == "__main__":
    main(*sys.argv[1:])
