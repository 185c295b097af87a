"""Which code talks to other ranks, and which asks for its own rank. This module does not import torch.

Every rank has to take part in a collective. One that finds its rows in the cache would not come to the call,
and the others would wait for it until they time out.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator

from torchcache.keys.bytecode import Reads, reads_of
from torchcache.keys.places import MISSING, ClosureOf, reference

_DISTRIBUTED = "torch.distributed"

#: Collectives by names that mean nothing else, of torch.distributed, its functional forms, process groups and
#: DTensor; read as an attribute of anything they count.
_UNMISTAKABLE = frozenset({
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_into_tensor_coalesced",
    "all_gather_object", "all_gather_single", "all_gather_single_autograd", "all_gather_single_coalesced",
    "all_gather_tensor", "all_gather_tensor_autograd", "all_reduce", "all_reduce_coalesced", "all_to_all",
    "all_to_all_single", "all_to_all_single_autograd", "allgather", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced", "alltoall", "alltoall_base",
    "batch_isend_irecv", "broadcast_object_list", "distribute_module", "distribute_tensor", "full_tensor",
    "gather_object", "irecv", "isend", "monitored_barrier", "permute_tensor", "recv_object_list", "redistribute",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_autograd", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor", "reduce_scatter_tensor_autograd", "reduce_scatter_tensor_coalesced",
    "scatter_object_list", "send_object_list", "_all_gather_base", "_allgather_base", "_reduce_scatter_base",
})  # fmt: skip

#: Tensors and sockets have methods of these names too: they count where they are torch.distributed's.
_COLLECTIVES = _UNMISTAKABLE | {"barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send"}

#: What answers differently on each rank, without asking the others.
_RANKS = frozenset({
    "get_coordinate", "get_global_rank", "get_group_rank", "get_local_rank", "get_node_local_rank",
    "get_process_group_ranks", "get_rank", "get_world_size",
})  # fmt: skip

#: Classes whose forward, or whose hooks around it, run collectives, in training mode or not.
_SPANNING = frozenset({"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel", "ReplicateModule"})
#: Those of them that do it in hooks around the forward, outside of what is cached, if it is the cached module itself.
_BY_HOOKS = frozenset({"FSDPModule", "ReplicateModule"})


def collectives_in(function: types.FunctionType) -> set[str]:
    """Return the names of the collectives that a function's own code can call."""
    reads = reads_of(function.__code__)
    found = _UNMISTAKABLE.intersection(reads.attributes)
    if any(_is_distributed(value) for value in _closure(function)) or any(
        _imports_distributed(module, wanted) for _, module, wanted in reads.imports
    ):
        found |= _COLLECTIVES.intersection(reads.attributes)  # in doubt: which object is asked is not known
    for _, module, wanted in reads.imports:
        if module.startswith(_DISTRIBUTED):
            found |= _COLLECTIVES.intersection(wanted)
    found |= {name for value in _values(function, reads) if (name := _collective(value)) is not None}
    return set(found)


def asks_rank(function: types.FunctionType) -> bool:
    """Tell whether a function's own code asks which rank it runs on, or how many there are."""
    reads = reads_of(function.__code__)
    wanted = {name for _, module, names in reads.imports if module.startswith(_DISTRIBUTED) for name in names}
    return not _RANKS.isdisjoint({*reads.names, *reads.attributes, *wanted})


def is_spanning(cls: type, *, is_root: bool) -> bool:
    """Tell whether modules of a class run collectives when they are called.

    Args:
        cls: The module's class.
        is_root: Whether it is the cached module itself, whose hooks run outside of the cached call.
    """
    names = _SPANNING - _BY_HOOKS if is_root else _SPANNING
    return any(base.__name__ in names and base.__module__.startswith("torch.") for base in cls.__mro__)


def is_distributed_tensor(cls: type) -> bool:
    """Tell whether a class of tensors is torch's DTensor, of which each rank holds a part."""
    return any(base.__name__ == "DTensor" and base.__module__.startswith(_DISTRIBUTED) for base in cls.__mro__)


def plain_class(cls: type) -> type:
    """Return the class that a module had before ``fully_shard`` or ``replicate`` put one of torch's in its place."""
    while cls.__module__.startswith(_DISTRIBUTED) and len(cls.__bases__) == 2:
        wrapper, wrapped = cls.__bases__
        if wrapper.__name__ not in _BY_HOOKS:
            break
        cls = wrapped
    return cls


def is_note_of_torch(key: str) -> bool:
    """Tell whether an attribute of a module is what torch.distributed notes on it, under names of each process."""
    return key.startswith("__composable_api_") or key in ("_fsdp_use_orig_params", "_is_fsdp_managed_module")


def _imports_distributed(module: str, wanted: tuple[str, ...]) -> bool:
    return (module.startswith(_DISTRIBUTED) and not wanted) or (module == "torch" and "distributed" in wanted)


def _values(function: types.FunctionType, reads: Reads) -> Iterator[object]:
    """Yield what the globals, closure variables and attributes of modules are that a function reads."""
    for name in reads.names:
        yield function.__globals__.get(name)
    yield from _closure(function)
    for root, *keys in reads.chains:
        value = function.__globals__.get(root)
        for key in keys:
            value = vars(value).get(key) if isinstance(value, types.ModuleType) else None
        yield value


def _closure(function: types.FunctionType) -> Iterator[object]:
    place = ClosureOf(reference(function, weak=False))
    for key in function.__code__.co_freevars:
        value = place.get(key, MISSING)
        if value is not MISSING:
            yield value


def _is_distributed(value: object) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__.startswith(_DISTRIBUTED)


def _collective(value: object) -> str | None:
    """Return the name of a collective of torch.distributed, or of one in a ``functools.partial``; else None."""
    value = value.func if isinstance(value, functools.partial) else value
    if not isinstance(value, types.FunctionType) or not str(value.__module__).startswith(_DISTRIBUTED):
        return None
    return value.__name__ if value.__name__ in _COLLECTIVES else None
