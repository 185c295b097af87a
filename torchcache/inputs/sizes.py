"""How many samples a call has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torchcache.errors import UncacheableError
from torchcache.inputs.leaves import Leaf, Tensors, Values


def batch_size(leaves: Sequence[Leaf], tuples: Iterable[str]) -> int:
    """Return the number of samples, which all tensors and lists of a call agree on.

    Args:
        leaves: The tensors and lists that hold the samples, in the order of the call.
        tuples: The names of plain arguments that are tuples, one of which may be what should be a list.

    Raises:
        UncacheableError: If there are none, if they differ, or if it is not clear what is the batch.
    """
    if not leaves:
        raise _nothing_has_samples(tuples)

    sizes: dict[str, int] = {}
    is_flat = True
    for leaf in leaves:
        sizes[leaf.name] = leaf.n_samples()
        if not isinstance(leaf, Tensors) or leaf.tensor.dim() > 1:
            is_flat = False

    if is_flat:
        raise _one_dimension_only(leaves[0])
    if len(set(sizes.values())) > 1:
        raise _different_sizes(leaves, sizes)
    return sizes[leaves[0].name]


def _nothing_has_samples(tuples: Iterable[str]) -> UncacheableError:
    shown = " and ".join(f"list({name})" for name in tuples)
    problem = (
        "the call has no tensor argument; a cached call needs at least one tensor of shape (batch, ...) with two "
        "dimensions or more, or a list with one plain value per sample, such as str"
    )
    if shown:
        problem += f": pass {shown} if each sample has its own"
    return UncacheableError(problem)


def _one_dimension_only(leaf: Leaf) -> UncacheableError:
    assert isinstance(leaf, Tensors)
    name = leaf.name
    return UncacheableError(
        f"argument {name!r} has shape {tuple(leaf.tensor.shape)}, one dimension only, so it is "
        f"not clear which is the batch; pass {name}.unsqueeze(0) for one sample of features or "
        f"{name}.unsqueeze(1) for a batch of numbers",
        argument=name,
    )


def _different_sizes(leaves: Sequence[Leaf], sizes: dict[str, int]) -> UncacheableError:
    """Name the first argument and the first that differs from it, and what to do about one of them."""
    first = next(iter(sizes))
    other = next(name for name, size in sizes.items() if size != sizes[first])
    lists = [leaf.name for leaf in leaves if isinstance(leaf, Values) and leaf.name in (other, first)]
    if lists:
        name = lists[-1]
        remedy = (
            f"a list has one value per sample: if all samples share {name!r}, pass tuple({name}) or name it in "
            "unbatched"
        )
    else:
        name = other
        remedy = (
            f"dimension {_batch_dim_of(leaves)} of every tensor must be the batch: expand shared tensors to it, or "
            "name them in unbatched"
        )
    differing = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    return UncacheableError(
        f"arguments {first!r} and {other!r} differ in their batch dimension ({differing}); {remedy}", argument=name
    )


def _batch_dim_of(leaves: Sequence[Leaf]) -> int:
    return next((leaf.batch_dim for leaf in leaves if isinstance(leaf, Tensors)), 0)
