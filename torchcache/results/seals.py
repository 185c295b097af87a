"""Rows that are found by a key of the user's own: each ends with a seal, the digest of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchcache.keys.digest import DIGEST_BYTES
from torchcache.layout import Found, Layout, Leaf, Rows
from torchcache.results.leaves import columns

_SEAL = Leaf("uint8", "uint8", (DIGEST_BYTES,))


def sealed(rows: Rows, inputs: Sequence[bytes]) -> Rows:
    """Return rows with the digests of the inputs that they were computed from as one leaf more."""
    seals = np.frombuffer(b"".join(inputs), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    layout = Layout((*rows.layout.leaves, _SEAL), rows.layout.structure)
    return Rows(rows.digests, layout, np.concatenate([rows.data, seals], axis=1))


def layout_without_seal(layout: Layout) -> Layout | None:
    """Return the layout of rows without their seals; None if they have none."""
    if len(layout.leaves) < 2 or layout.leaves[-1] != _SEAL:
        return None
    return Layout(layout.leaves[:-1], layout.structure)


def without_seals(found: Found) -> tuple[Found, list[bytes]]:
    """Take sealed rows and the digests of their inputs apart; the data of the rows is used for what is returned."""
    layout = layout_without_seal(found.layout)
    assert layout is not None  # the tiers pass no other rows
    data = found.data
    if not isinstance(data, np.ndarray):  # from a memory tier on an accelerator
        seals = [seal.tobytes() for seal in data[:, layout.nbytes :].cpu().numpy()]
        return Found(found.positions, layout, columns(data, 0, layout.nbytes)), seals

    seals = [seal.tobytes() for seal in data[:, layout.nbytes :]]
    # The rows close ranks in the memory they have: a second copy of large ones would cost its page faults.
    flat = data.data.cast("B")
    n = len(data)
    width = layout.nbytes
    sealed_width = found.layout.nbytes
    for i in range(1, n):
        flat[i * width : (i + 1) * width] = flat[i * sealed_width : i * sealed_width + width]
    rows = data.reshape(-1)[: n * width].reshape(n, width)
    return Found(found.positions, layout, rows), seals
