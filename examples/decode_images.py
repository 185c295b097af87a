"""Decode images once, in the workers of a loader, and flip them anew in every epoch.

The images are scikit-learn's: tiles of its two photographs as JPEG files, and handwritten digits as PNG files, written
to the directory given. They are decoded and resized by the dataset, cached by ``CachedDataset``, and flipped at random
after the cache. The second epoch decodes nothing, and its flips are others; if not, the exit status is 1.

    python examples/decode_images.py --folder build/images
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchcache import CachedDataset

SEED = 20
SIDE = 64  # of a decoded image
TILE = 107  # of a photograph

Sample = tuple[Tensor, int]


class Images(Dataset[Sample]):
    """Image files, decoded and resized; the label of each is the first word of its name.

    A line in ``decoded/`` notes each decoding, in a file of its process.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.*"))
        self.labels = sorted({path.name.partition(" ")[0] for path in self.paths})
        self.notes = folder / "decoded"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        with (self.notes / str(os.getpid())).open("a") as file:
            file.write(f"{path.name}\n")
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), self.labels.index(path.name.partition(" ")[0])


def random_flip(sample: Sample) -> tuple[Tensor, int, bool]:
    """Flip half of the images, and say which."""
    image, label = sample
    is_flipped = torch.rand(1).item() < 0.5
    return (image.flip(2) if is_flipped else image), label, is_flipped


def write_images(folder: Path, n_digits: int) -> None:
    """Write the tiles and digits as files, those that are not there yet."""
    (folder / "decoded").mkdir(parents=True, exist_ok=True)
    tiles = [
        (f"{name.partition('.')[0]} {y:03} {x:03}.jpg", photograph[y : y + TILE, x : x + TILE])
        for name, photograph in zip(("china.jpg", "flower.jpg"), load_sample_images().images, strict=True)
        for y in range(0, photograph.shape[0] - TILE, TILE // 2)
        for x in range(0, photograph.shape[1] - TILE, TILE // 2)
    ]
    bunch = load_digits()
    digits = [
        (f"{label} {number:04}.png", (pixels * (255 / 16)).astype(np.uint8))
        for number, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True))
    ][:n_digits]
    for name, pixels in tiles + digits:
        if not (folder / name).exists():
            Image.fromarray(pixels).save(folder / name)


def count_decoded(folder: Path) -> int:
    """Return how often an image was decoded so far, by any process."""
    return sum(len(notes.read_text().splitlines()) for notes in (folder / "decoded").iterdir())


def main() -> int:
    """Run two epochs through workers, and tell what was decoded and flipped."""
    parser = argparse.ArgumentParser(description="Decode images once, in the workers of a loader.")
    parser.add_argument("--folder", type=Path, default=Path("build/images"), help="for the image files and the cache")
    parser.add_argument("--digits", type=int, default=600, help="so many digits beside the photographs' tiles")
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()

    folder = args.folder.resolve()
    write_images(folder, args.digits)
    torch.manual_seed(SEED)
    dataset = CachedDataset(Images(folder), augment=random_flip, persistent=True, persistent_cache_dir=folder / "cache")
    loader = DataLoader(dataset, batch_size=32, num_workers=args.workers)
    decoded: list[int] = []
    flips: list[Tensor] = []
    for epoch in (1, 2):
        before, started = count_decoded(folder), time.perf_counter()
        flips.append(torch.cat([is_flipped for _, _, is_flipped in loader]))
        decoded.append(count_decoded(folder) - before)
        print(
            f"epoch {epoch}: {time.perf_counter() - started:5.2f} s, {len(flips[-1])} images,",
            f"{decoded[-1]} decoded, {int(flips[-1].sum())} flipped",
        )
    n_changed = int((flips[0] != flips[1]).sum())
    print(f"{n_changed} images are flipped in one of the epochs only")
    is_good = decoded[1] == 0 and n_changed > len(dataset) // 4
    print("the second epoch decodes nothing, and flips vary" if is_good else "FAILED: see the counts above")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
