"""Which code talks to other ranks, and which asks for its own rank. This module does not import torch.

Every rank has to take part in a collective. One that finds its rows in the cache would not come to the call,
and the others would wait for it until they time out.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator, Mapping

from torchcache.keys.changes import parts_of
from torchcache.keys.places import MISSING, ClosureOf, defaults_of, reference
from torchcache.keys.reads import Reads, all_codes, reads_of

_DISTRIBUTED = "torch.distributed"
_HOMES = (_DISTRIBUTED, "torch._C._distributed")

#: Collectives by names that mean nothing else, of torch.distributed, its functional forms and process groups; read
#: as an attribute of anything they count.
_UNMISTAKABLE = frozenset({
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_into_tensor_coalesced",
    "all_gather_object", "all_gather_single", "all_gather_single_autograd", "all_gather_single_coalesced",
    "all_gather_tensor", "all_gather_tensor_autograd", "all_reduce", "all_reduce_coalesced", "all_to_all",
    "all_to_all_single", "all_to_all_single_autograd", "allgather", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced", "alltoall", "alltoall_base",
    "batch_isend_irecv", "broadcast_object_list", "distribute_module", "distribute_tensor", "gather_object", "irecv",
    "isend", "monitored_barrier", "recv_object_list", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_single_autograd", "reduce_scatter_single_coalesced", "reduce_scatter_tensor",
    "reduce_scatter_tensor_autograd", "reduce_scatter_tensor_coalesced", "scatter_object_list", "send_object_list",
    "_all_gather_base", "_allgather_base", "_reduce_scatter_base",
})  # fmt: skip

#: Methods of DTensor, and a function, that users give these names to as well: they count in code that reaches
#: torch.distributed. A DTensor that comes from elsewhere is an argument or lies in the state, where it is seen.
_OF_DTENSOR = frozenset({"full_tensor", "permute_tensor", "redistribute"})

#: Tensors and sockets have methods of these names: they count in code that has an object of torch.distributed.
_AMBIGUOUS = frozenset({"barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send"})

_COLLECTIVES = _UNMISTAKABLE | _OF_DTENSOR | _AMBIGUOUS

#: What answers differently on each rank, without asking the others.
_RANKS = frozenset({
    "get_coordinate", "get_global_rank", "get_group_rank", "get_local_rank", "get_node_local_rank",
    "get_process_group_ranks", "get_rank", "get_world_size",
})  # fmt: skip
_RANKS_OF_GROUPS = frozenset({"rank", "size"})

#: Functions that answer with a truth value or a text: they hand out nothing that a collective can be called on.
_PLAIN_QUESTIONS = frozenset({
    "get_backend", "get_debug_level", "get_pg_count", "is_available", "is_backend_available", "is_gloo_available",
    "is_initialized", "is_mpi_available", "is_nccl_available", "is_torchelastic_launched", "is_ucc_available",
    "is_xccl_available",
})  # fmt: skip

#: Classes whose objects have collectives as methods, and those that hand such objects out.
_GROUPS = frozenset({"Backend", "DeviceMesh", "GroupMember", "ProcessGroup", "group"})

#: Attributes of torch.ops with collectives as operators.
_OPERATORS = frozenset({"_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d", "c10d_functional"})

#: Classes whose forward, or whose hooks around it, run collectives, in training mode or not.
_SPANNING = frozenset({"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel", "ReplicateModule"})
#: Those of them that do it in hooks around the forward, outside of what is cached, if it is the cached module itself.
_BY_HOOKS = frozenset({"FSDPModule", "ReplicateModule"})


class Talks:
    """What the code that runs has to do with other ranks.

    The code counts by what its names stand for: globals, closure variables, defaults, class attributes, attributes
    of modules, and what lies in a container at one of them. Where an object of torch.distributed, or the module
    itself, goes where it is not followed, names that may be a collective's count, in doubt.

    Args:
        held: Class attributes of torch.distributed, by the names they are read by.
    """

    def __init__(self, held: Mapping[str, object] | None = None) -> None:
        self._held = held or {}
        self._certain: set[str] = set()
        self._bare: set[str] = set()  # attributes of anything that have the name of a collective
        self._asks_rank = False
        self._asks_group = False  # for what a group calls its rank and size
        self._has_objects = False
        self.reaches: bool = False  # anything of torch.distributed

    @property
    def collectives(self) -> set[str]:
        """Names of the collectives that may be called."""
        counted = _UNMISTAKABLE | _OF_DTENSOR if self.reaches else _UNMISTAKABLE
        counted = _COLLECTIVES if self._has_objects else counted
        return self._certain | (self._bare & counted)

    @property
    def asks_rank(self) -> bool:
        """Whether it is asked which rank this is, or how many there are."""
        return self._asks_rank or (self._asks_group and self._has_objects)

    def note(self, function: types.FunctionType) -> None:
        """Note what a function's own code can do."""
        reads = reads_of(function.__code__)
        bare = _COLLECTIVES.intersection(reads.attributes)
        asks_group = not _RANKS_OF_GROUPS.isdisjoint(reads.attributes)
        self._bare |= bare
        self._asks_group |= asks_group
        self._asks_rank |= not (_RANKS.isdisjoint(reads.names) and _RANKS.isdisjoint(reads.attributes))
        if not _OPERATORS.isdisjoint(reads.attributes):
            self.reaches = self._has_objects = True

        is_whole = False
        for value, is_end in self._values(function, reads):
            is_whole |= is_end and is_module_of_torch(value)
            self.note_value(value, is_end=is_end)
        self._note_imports(reads)

        is_local = any(map(is_module_of_torch, _closure(function))) or _imports_module(reads)
        if is_local:  # followed no further than to this function
            self.reaches = True
            self._certain |= bare
            self._asks_rank |= asks_group
        if "getattr" in reads.names and (is_whole or is_local):
            self._note_getattr(function, in_doubt=is_whole)

    def note_value(self, value: object, *, is_end: bool = True) -> None:
        """Note what lies at a name, or in the state.

        Args:
            value: It.
            is_end: Whether the value itself is used, where it is a module, and not an attribute of it that is known.
        """
        for item in parts_of(value):
            if isinstance(item, types.ModuleType):
                if is_module_of_torch(item):
                    self.reaches = True
                    self._has_objects |= is_end
            elif isinstance(item, (types.FunctionType, types.BuiltinFunctionType)):
                if str(item.__module__).startswith(_HOMES):
                    self._note_named(item.__name__)
            else:
                self._note_class(item if isinstance(item, type) else type(item))

    def _note_class(self, cls: type) -> None:
        """Note a class of which the code has an object, or that it uses itself."""
        if _is_of_torch(cls):
            self.reaches = True
            self._has_objects |= any(base.__name__ in _GROUPS for base in cls.__mro__)

    def _note_named(self, name: str) -> None:
        """Note the name of a function of torch.distributed."""
        self.reaches = True
        if name in _COLLECTIVES:
            self._certain.add(name)
        elif name in _RANKS:
            self._asks_rank = True
        elif name not in _PLAIN_QUESTIONS:
            self._has_objects = True

    def _note_imports(self, reads: Reads) -> None:
        """Note what code imports from a module when it runs; what is not loaded yet by its name."""
        for level, module, wanted in reads.imports:
            loaded = None if level else sys.modules.get(module)
            for name in wanted:
                if isinstance(loaded, types.ModuleType) and name in vars(loaded):
                    value = vars(loaded)[name]
                    self.note_value(value, is_end=not is_module_of_torch(value))
                elif module.startswith(_DISTRIBUTED):
                    self._note_named(name)

    def _note_getattr(self, function: types.FunctionType, *, in_doubt: bool) -> None:
        """Note what ``getattr`` may look up in torch.distributed: one of the texts in the code, or anything."""
        texts = {text for code in all_codes(function.__code__) for text in code.co_consts if type(text) is str}
        known = texts.intersection(dir(sys.modules.get(_DISTRIBUTED)))
        for name in known:
            self._note_named(name)
        if in_doubt and not known:
            self._certain.add("getattr")

    def _values(self, function: types.FunctionType, reads: Reads) -> Iterator[tuple[object, bool]]:
        """Yield what the names in a function stand for, and whether that itself is used."""
        for root, *keys in reads.ends:
            value = function.__globals__.get(root)
            while keys and isinstance(value, types.ModuleType) and keys[0] in vars(value):
                value = vars(value)[keys.pop(0)]
            yield value, True
        for value in _closure(function):
            yield value, not is_module_of_torch(value)
        for _, value in defaults_of(function):
            yield value, True
        for key in reads.attributes:
            if key in self._held:
                yield self._held[key], True


def held_by(classes: Iterable[type]) -> dict[str, object]:
    """Return the class attributes that are something of torch.distributed, by their names."""
    return {
        name: value
        for cls in classes
        for name, value in vars(cls).items()
        if any(is_module_of_torch(item) or _is_of_torch(item) for item in parts_of(value))
    }


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


def is_module_of_torch(value: object) -> bool:
    """Tell whether a value is torch.distributed or a module in it."""
    return isinstance(value, types.ModuleType) and value.__name__.startswith(_HOMES)


def _is_of_torch(value: object) -> bool:
    """Tell whether a value is a class or a function of torch.distributed, or an object of such a class."""
    named = value if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) else type(value)
    return str(named.__module__).startswith(_HOMES)


def _imports_module(reads: Reads) -> bool:
    """Tell whether code imports torch.distributed, or a module in it, when it runs, under whatever name."""
    names = {f"{module}.{name}" for _, module, wanted in reads.imports for name in wanted}
    modules = {module for _, module, wanted in reads.imports if not wanted}
    if "torch" in modules and "distributed" in reads.attributes:
        return True
    return any(name.startswith(_DISTRIBUTED) for name in modules | (names & sys.modules.keys()))


def _closure(function: types.FunctionType) -> Iterator[object]:
    place = ClosureOf(reference(function, weak=False))
    for key in function.__code__.co_freevars:
        value = place.get(key, MISSING)
        if value is not MISSING:
            yield value
