"""Data sets for workers: importable by spawned ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


class Noted(Dataset):
    """Sample ``i`` is made of ``i``; what is computed is noted in a file, a line a sample."""

    def __init__(self, n: int, folder: Path, *, is_unseen: bool = False, fails_at: int | None = None) -> None:
        self.n = n
        self.folder = folder
        self.fails_at = fails_at
        self.large = torch.arange(1000)
        self.file = (i for i in ()) if is_unseen else None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == self.fails_at:
            raise ValueError("not a JPEG")
        note(self.folder, i)
        return {"x": torch.full((3, 8 + i), float(i)), "i": i, "name": f"sample {i}"}


class Shards(IterableDataset):
    """Yields ids with raw samples; each worker has a shard of its own."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for i in range(first, self.n, step):
            yield f"id {i}", i


class Decode:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, raw: int) -> torch.Tensor:
        note(self.folder, raw)
        return torch.full((2,), float(raw))


def note(folder: Path, i: int) -> None:
    with (folder / f"computed {os.getpid()}").open("a") as file:
        file.write(f"{i}\n")


def take_notes(folder: Path) -> list[int]:
    """Return what was computed since the last time, in order."""
    notes = list(folder.glob("computed *"))
    computed = sorted(int(line) for path in notes for line in path.read_text().split())
    for path in notes:
        path.unlink()
    return computed


def with_a_random_number(sample: dict[str, Any]) -> tuple[dict[str, Any], float]:
    return sample, torch.rand(1).item()


def as_they_are(batch: list[Any]) -> list[Any]:
    return batch
