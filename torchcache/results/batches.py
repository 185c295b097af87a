"""How the results of one call become rows: what the cached call asks, whichever form the results have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from torchcache.keys.tensor_kinds import unsupported_kind
from torchcache.layout import Bytes2D, Found, Layout, empty_rows
from torchcache.results import rows
from torchcache.results.classes import KnownClasses
from torchcache.results.leaves import CPU
from torchcache.results.tree import Tree


class Results:
    """Results with one row a sample along dimension ``batch_dim`` of every tensor.

    Attributes:
        returns_as_given: Whether the caller gets what the module returned where all rows were computed.
    """

    returns_as_given = True

    def __init__(self, batch_dim: int = 0) -> None:
        self._batch_dim = batch_dim

    def flatten(self, output: object) -> Tree:
        """Find the tensors of what a module returned, the batch in front; never raises for what it contains."""
        return _with_moved(rows.flatten(output), self._batch_dim, 0)

    def check(self, tree: Tree, n: int) -> None:
        """Raise unless the result of ``n`` samples is made of tensors with a row a sample and plain values.

        Raises:
            UncacheableError: If it is not.
        """
        rows.check_leaves(self._as_given(tree), n, self._batch_dim)
        tree.encode()

    def take_apart(
        self, tree: Tree, n: int, cache_dtype: torch.dtype | None, known: KnownClasses
    ) -> tuple[list[Found], int]:
        """Copy a result into rows of bytes that belong to the cache.

        Args:
            tree: What ``flatten`` gave for ``n`` samples; ``rows.unsupported_leaf`` has nothing against it.
            n: Number of samples.
            cache_dtype: Store floating values in it.
            known: Learns the classes of the result.

        Returns:
            The rows, an item a layout, each at the positions of its samples; and how many finite values the cast
            made infinite.

        Raises:
            UncacheableError: If the result is not made of tensors with a row a sample and plain values.
        """
        rows.check_leaves(self._as_given(tree), n, self._batch_dim)
        layout, data, overflowed = rows.take_apart(tree, n, cache_dtype, known)
        return [Found(range(n), layout, data)], overflowed

    def devices(self, tree: Tree) -> tuple[torch.device, ...]:
        """Return the device of each leaf of a layout, in the order in which ``assemble`` wants them."""
        return rows.devices_of(tree)

    def rounded(self, tree: Tree, cache_dtype: torch.dtype | None) -> object:
        """Return what a later hit will return: the result rounded through ``cache_dtype``, detached."""
        return rows.rounded(self._as_given(tree), cache_dtype)

    def do_stack(self, found: Sequence[Found]) -> bool:
        """Tell whether all rows go into one result."""
        for item in found[1:]:  # noqa: SIM110 - each hit comes here, and a generator costs it a call
            if not rows.are_alike(item.layout, found[0].layout):
                return False
        return True

    def assemble(self, found: Sequence[Found], n: int, devices: Sequence[torch.device], known: KnownClasses) -> object:
        """Make the result of ``n`` samples from their rows, which stack.

        Args:
            found: The rows; a lone item's data belongs to the result from now on.
            n: Number of samples.
            devices: Where each leaf goes.
            known: What classes the result may have.

        Raises:
            CorruptRecordError: If the result cannot be rebuilt after all.
        """
        layout = found[0].layout
        if len(found) == 1 and list(found[0].positions) == list(range(n)):
            data = found[0].data
        else:
            data = empty_rows(n, layout.nbytes)
            for item in found:
                data[item.positions] = rows.reform(item.layout, item.data, layout)

        result = rows.put_together(layout, data, devices, known)
        return self._put_back(result) if self._batch_dim else result

    def is_known(self, layout: Layout, known: KnownClasses) -> bool:
        """Tell whether this process can rebuild a layout that came from a store."""
        return rows.is_known(layout, known)

    def plain_numbers(self, layout: Layout, known: KnownClasses) -> frozenset[int]:
        """Return the ints among the plain values of a known layout: one may be the batch's size."""
        return rows.plain_numbers(layout, known)

    def leaves(self, layout: Layout, data: Bytes2D, known: KnownClasses) -> list[torch.Tensor]:
        """Return what rows consist of as tensors that can be compared, a row a sample.

        Raises:
            CorruptRecordError: If the result cannot be rebuilt.
        """
        devices = [CPU] * len(layout.leaves)
        result = rows.put_together(layout, data, devices, known)
        return list(rows.flatten(result).leaves)

    def _put_back(self, result: object) -> object:
        """Return a result with the batch where the module has it."""
        tree = self._as_given(rows.flatten(result))
        return tree.build([leaf.contiguous() for leaf in tree.leaves])

    def _as_given(self, tree: Tree) -> Tree:
        """Return a tree with the batch where the module has it."""
        return _with_moved(tree, 0, self._batch_dim)


def _with_moved(tree: Tree, source: int, target: int) -> Tree:
    """Return a tree with a dimension of its leaves moved."""
    if source == target:
        return tree
    return replace(tree, leaves=[_moved(leaf, source, target) for leaf in tree.leaves])


def _moved(leaf: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """Return a leaf with a dimension moved; one that has too few, or cannot be viewed, is refused elsewhere."""
    if leaf.dim() <= max(source, target) or unsupported_kind(leaf) is not None:
        return leaf
    return leaf.movedim(source, target)
