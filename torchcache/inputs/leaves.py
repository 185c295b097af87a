"""What holds the samples of a call: tensors with a row per sample, and lists with a value per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchcache.errors import UncacheableError
from torchcache.keys.digest import digest_bytes, digest_rows
from torchcache.keys.plain import encode_plain
from torchcache.keys.tensors import flat_bytes


class Tensors:
    """A tensor: an argument, or one in a container. ``batch_dim`` is the dimension its samples lie along."""

    __slots__ = ("batch_dim", "name", "tensor")

    def __init__(self, name: str, tensor: torch.Tensor, batch_dim: int = 0) -> None:
        self.name: str = name
        self.tensor: torch.Tensor = tensor
        self.batch_dim: int = batch_dim

    def n_samples(self) -> int:
        """Return how many samples there are.

        Raises:
            UncacheableError: If the tensor has not the dimension that they lie along.
        """
        shape = self.tensor.shape
        if len(shape) > self.batch_dim:
            return shape[self.batch_dim]
        if not shape:
            raise UncacheableError(
                f"argument {self.name!r} is a 0-d tensor and has no batch dimension; pass a plain "
                f"number ({self.name}.item()), expand it to (batch,), or name it in unbatched if all samples share it",
                argument=self.name,
            )
        raise UncacheableError(
            f"argument {self.name!r} has shape {tuple(shape)} and so no dimension {self.batch_dim}, "
            "which is batch_dim; name it in unbatched if all samples share it",
            argument=self.name,
        )

    def describe(self) -> tuple[str, bytes]:
        """Return name and form of its rows."""
        shape = tuple(self.tensor.shape)
        row_shape = shape[: self.batch_dim] + shape[self.batch_dim + 1 :]
        return f"tensor {self.name}", f"{self.tensor.dtype} {row_shape}".encode()

    def digests(self, n: int) -> list[bytes]:
        """Return the digest of each of the ``n`` rows."""
        return digest_rows(flat_bytes(self.batch_first()), n)

    def digest(self, position: int) -> bytes:
        """Return the digest of one row."""
        return digest_bytes(flat_bytes(self.row(position)))

    def row(self, position: int) -> torch.Tensor:
        """Return a copy of one row."""
        return self.tensor.detach().narrow(self.batch_dim, position, 1).clone()

    def peaks(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the largest number of each of some rows, and the largest magnitude beside it."""
        rows = self._rows(positions, is_range=False).movedim(self.batch_dim, 0)
        numbers = rows.reshape(len(positions), -1).double().nan_to_num().cpu()
        return torch.stack([numbers.amax(1), numbers.abs().amax(1)], 1)

    def select(self, positions: Sequence[int], extra: torch.Tensor | None, *, is_range: bool) -> torch.Tensor:
        """Return copies of some rows: what is written into them must not reach the caller."""
        rows = self._rows(positions, is_range=is_range)
        if extra is not None:
            return torch.cat([rows, extra.to(rows.device)], self.batch_dim)
        return rows.clone() if is_range else rows

    def batch_first(self) -> torch.Tensor:
        """Return the tensor, or a view of it, with its samples along dimension 0."""
        return self.tensor.movedim(self.batch_dim, 0) if self.batch_dim else self.tensor

    def _rows(self, positions: Sequence[int], *, is_range: bool) -> torch.Tensor:
        """Return some rows, as a view where they are next to each other."""
        tensor = self.tensor.detach()
        if is_range:
            return tensor.narrow(self.batch_dim, positions[0], len(positions))
        index = torch.tensor(positions, dtype=torch.int64, device=tensor.device)
        return tensor.index_select(self.batch_dim, index)


class Values:
    """A list with one plain value for each sample, such as a str; or a tuple that is the only batch of its call."""

    __slots__ = ("name", "values")

    def __init__(self, name: str, values: list[Any] | tuple[Any, ...]) -> None:
        self.name: str = name
        self.values: list[Any] | tuple[Any, ...] = values

    def n_samples(self) -> int:
        """Return how many samples there are."""
        return len(self.values)

    def describe(self) -> tuple[str, bytes]:
        """Return name and form of its values."""
        return f"values {self.name}", type(self.values).__name__.encode()

    def digests(self, n: int) -> list[bytes]:  # noqa: ARG002 - as of Tensors
        """Return the digest of each value."""
        return [self.digest(position) for position in range(len(self.values))]

    def digest(self, position: int) -> bytes:
        """Return the digest of one value."""
        return digest_bytes(encode_plain(self.values[position]) or b"")

    def select(self, positions: Sequence[int], extra: Sequence[Any] | None, *, is_range: bool) -> Sequence[Any]:  # noqa: ARG002 - as of Tensors
        """Return some values."""
        rows = [self.values[position] for position in positions]
        if extra is not None:
            rows.extend(extra)
        return rows if isinstance(self.values, list) else tuple(rows)


Leaf = Tensors | Values
