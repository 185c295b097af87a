"""Weights, plain state and mode to a namespace, and noticing that they changed.

A ``StateTracker`` is asked at every call. It compares what it saw last (identities, pointers, versions,
sizes, numbers by type and value, small containers by value, 2 x 64 bytes of every tensor in host memory)
and hashes again only what moved. Now and then it hashes all weights although nothing seems to have
moved, for sparse writes that bypass torch's version counters.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import marshal
import threading
import time
import types
import weakref
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from functools import lru_cache
from operator import attrgetter, getitem, itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from torchcache.keys.code import MISSING, CodeWalk, Name, StandIn, unwrap
from torchcache.keys.collectives import (
    Talks,
    is_distributed_tensor,
    is_module_of_torch,
    is_note_of_torch,
    is_spanning,
    plain_class,
)
from torchcache.keys.dict_versions import Reader, versions_of
from torchcache.keys.digest import digest_parts
from torchcache.keys.mode import ambient_reason, autocast_in_force, current_mode
from torchcache.keys.places import AttributesOf
from torchcache.keys.ranks import has_other_ranks, rank_and_size
from torchcache.keys.tensor_digest import is_freed
from torchcache.keys.values import (
    GENERATORS,
    attributes_of,
    encode_compiler,
    encode_content,
    encode_plain,
    encode_state,
    slots_of,
    type_name,
)

#: Attributes of ``nn.Module`` that are bookkeeping, not state of their own.
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, type(None))

#: Hooks that change what an inner module returns.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

_HELD_BY_MODULES = ("_parameters", "_buffers", "_modules")

#: A changed namespace this many calls in a row means state that changes at every call.
_RESTLESS_CALLS = 3

#: So many states are remembered as known: switching between them (train and eval) is not restless.
_RECENT_FINGERPRINTS = 64

#: A state that other ranks take part in is looked at again after so many calls only: sharded weights change at every
#: call, and nothing is cached.
_CROSSING_CALLS = 100

#: All weights are hashed again after this many calls, but for at most 1 % of the time.
_AUDIT_CALLS = 1000
_AUDIT_SHARE = 0.01

_PROBE_BYTES = 64

_NUMBERS = (int, float, complex, bool)
_COMPARABLE = (str, bytes, type(None), nn.Module, torch.Tensor)
_CONTAINERS = (list, dict, set, deque, bytearray, np.ndarray)
#: Objects without attributes that change all the same.
_ENCODED_EACH_TIME = (*GENERATORS, threading.Event, ContextVar, array, itertools.count, itertools.cycle)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, StandIn)

#: Objects inside objects are watched so deep.
_WATCH_DEPTH = 32

#: Containers of up to so many items, inner ones included, are compared by value at each call; those of plain
#: values cost little and may be larger. Larger ones are compared item by item without looking inside, and the
#: largest by their length, until something else moves or all is looked at again.
_MANY_ITEMS = 64
_MANY_PLAIN_ITEMS = 4096
_MOST_ITEMS = 131_072

#: Arrays of up to so many bytes are hashed at each call (30 us a MiB); of larger ones every so many elements count.
_MANY_BYTES = 1 << 20
_SAMPLED_ELEMENTS = 4096

#: So many objects that lie in large containers are watched.
_MOST_WATCHED = 10_000

#: Reasons for which there are no weights to look at.
_WITHOUT_WEIGHTS = ("uninitialized_parameters", "meta_tensor", "opaque_weights")

#: One name and digest of each thing the state is made of, in order.
Parts = list[tuple[str, bytes]]


class StateTracker:
    """The state that shapes what one module, a method of one object, or one function returns.

    Not thread-safe: its owner calls it under a lock.

    Args:
        instance: The module or object whose state counts, weakly: it must not live for its cache; None for a
            function.
        is_inside: Whether calls of the module itself, with its hooks, may come from inside what is cached, as
            they may from a method.
    """

    def __init__(self, instance: weakref.ref[Any] | None, *, is_inside: bool = False) -> None:
        self._instance = instance
        self._is_inside = is_inside
        self._walk: CodeWalk | None = None
        self._roots: list[object] = []
        self._salt = b""
        self._talks = Talks()
        self._collectives: list[str] = []
        self._snapshot: _Snapshot | None = None
        self._weights = b""
        self._hashed_marks: object = None  # of the weights that were hashed
        self._has_opaque_weights = False
        self._fingerprint = b""
        self._mode: tuple[object, ...] = ()
        self._ambient_reason: str | None = None
        self._recent: OrderedDict[bytes, None] = OrderedDict()
        self._restless = 0
        self._force = False
        self._crossing_calls = 0
        self._calls_since_hash = 0
        self._hashed_at = 0.0
        self._look_seconds = 0.0

    def follow(self, walk: CodeWalk | None, roots: list[object], salt: bytes, talks: Talks) -> None:
        """Look at the state with the eyes of another code walk from now on.

        Args:
            walk: What the code walk found; ``None`` leaves out weights, plain state and globals, so that
                only training flags and mode count (for ``persistent_module_hash``).
            roots: The code of the state that the walk started from.
            salt: The front of every fingerprint: the module hash.
            talks: What the code has to do with other ranks, also where ``walk`` is left out.
        """
        self._walk, self._roots, self._salt = walk, roots, salt
        self._talks, self._collectives = talks, sorted(talks.collectives)
        self._snapshot = None

    def code(self, walk: CodeWalk | None = None) -> list[object]:
        """Return the functions and classes that the state holds, and the names of ``walk``."""
        return self._take(walk or CodeWalk()).code

    @property
    def code_has_moved(self) -> bool:
        """Whether the state last seen holds other functions or classes than the walk was told of."""
        snapshot = self._snapshot
        return (
            self._walk is not None
            and snapshot is not None
            and (snapshot.code != self._roots or self._walk.has_changed())
        )

    @property
    def bypass_reason(self) -> str | None:
        """Why a call cannot be cached in the state last seen, or None."""
        if self._ambient_reason:
            return self._ambient_reason
        # Before what a rank's own state says: all ranks must come to the same.
        if self.crossings and has_other_ranks():
            return "collectives"
        if not self._fingerprint:
            return "state_changes_at_every_call"
        if self._has_opaque_weights:
            return "opaque_weights"
        return self._snapshot.bypass_reason if self._snapshot else None

    @property
    def crossings(self) -> list[str]:
        """What a call in the state last seen does together with other ranks, if there are any."""
        return self._collectives + (self._snapshot.crossings if self._snapshot else [])

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters last seen, in the order of the module tree."""
        return self._snapshot.parameters if self._snapshot else []

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter last seen required grad."""
        return self._snapshot is not None and self._snapshot.requires_grad

    @property
    def unnamed(self) -> list[tuple[str, str]]:
        """Where the state last seen holds something without a stable name, and of what type."""
        return self._snapshot.unnamed if self._snapshot else []

    @property
    def has_inner_hooks(self) -> bool:
        """Whether inner modules have forward hooks, which do not run on hits."""
        return self._snapshot is not None and self._snapshot.has_inner_hooks

    def marks(self) -> object:
        """Return something that differs, under ``==``, once a weight was changed in a way that torch counts."""
        return self._snapshot.read_marks() if self._snapshot else None

    def refresh(self) -> None:
        """Hash everything at the next call, whatever the comparison says."""
        self._force = True

    def fingerprint(self) -> bytes:
        """Return the 16 bytes that name the present state; ``bypass_reason`` is then up to date.

        Empty while the state changes at every call: it is hashed again once it stood still for a call.
        """
        if self._snapshot is not None and self.crossings and self._crossing_calls and has_other_ranks():
            self._crossing_calls -= 1
            return self._fingerprint
        self._crossing_calls = _CROSSING_CALLS
        self._calls_since_hash += 1
        self._ambient_reason = ambient_reason()
        self._force = self._force or self._audit_due()
        if self._force or self.moved():
            return self._look_again()
        if not self._fingerprint:
            self._hash_weights()
            return self._combine()
        self._restless = 0
        return self._fingerprint

    def moved(self) -> bool:
        """Tell whether the state differs from the one that ``fingerprint`` last looked at.

        What looks different is looked at again in full: an attribute that does not count may have come
        or gone, or an equal value may have taken another's place.
        """
        if self._snapshot is None or self._current_mode() != self._mode:
            return True
        if not self._snapshot.looks_moved():
            return False
        now = self._take(self._walk)
        if not now.is_same(self._snapshot):
            return True
        self._snapshot = now
        return False

    def describe(self) -> Parts:
        """Return the parts of the fingerprint by name, each with its digest, from a new look at everything."""
        snapshot = self._take(self._walk)
        parts: Parts = [("mode", repr(self._current_mode()).encode())]
        parts += [(f"weights {name}", encode_content(t) or b"opaque") for name, t in snapshot.named_tensors]
        parts += [(f"state {name}", value) for name, value in snapshot.parts]
        return [(name, digest_parts([value])) for name, value in parts]

    def _take(self, walk: CodeWalk | None) -> _Snapshot:
        return _Snapshot(None if self._instance is None else self._instance(), walk, is_inside=self._is_inside)

    def _current_mode(self) -> tuple[object, ...]:
        """Return the mode, and the rank for code that asks for it: its results are each rank's own.

        Code that reaches torch.distributed at all may do in a job what it does not do alone.
        """
        rank = rank_and_size() if self._talks.asks_rank else ()
        has_others = self._talks.reaches and has_other_ranks()
        return (*current_mode(), rank, has_others) if rank or has_others else current_mode()

    def _look_again(self) -> bytes:
        started = time.monotonic()
        self._snapshot, self._mode = self._take(self._walk), self._current_mode()
        if self._restless >= _RESTLESS_CALLS and not self._force:
            self._fingerprint = b""
            return b""
        if self._force or self._snapshot.seen_weights() != self._hashed_marks:
            self._hash_weights()
        self._force = False
        self._look_seconds = time.monotonic() - started
        return self._combine()

    def _combine(self) -> bytes:
        """Make the fingerprint; one not seen lately counts towards a state that never stands still."""
        assert self._snapshot is not None
        self._fingerprint = digest_parts([self._salt, repr(self._mode).encode(), self._snapshot.plain, self._weights])
        known = self._fingerprint in self._recent or not self._recent
        self._restless = 0 if known else self._restless + 1
        self._recent[self._fingerprint] = None
        self._recent.move_to_end(self._fingerprint)
        if len(self._recent) > _RECENT_FINGERPRINTS:
            self._recent.popitem(last=False)
        return self._fingerprint

    def _hash_weights(self) -> None:
        assert self._snapshot is not None
        digests = [encode_content(tensor) for tensor in self._snapshot.tensors]
        self._has_opaque_weights = None in digests
        self._weights = digest_parts(digest or b"" for digest in digests)
        self._hashed_marks = self._snapshot.seen_weights()
        self._hashed_at = time.monotonic()
        self._calls_since_hash = 0

    def _audit_due(self) -> bool:
        if self._calls_since_hash < _AUDIT_CALLS:
            return False
        return time.monotonic() - self._hashed_at > self._look_seconds / _AUDIT_SHARE


class _Places:
    """Where the counted values lie that a change would be assigned to: dictionaries, slots, variables.

    Dictionaries of the same keys are read by one ``itemgetter`` each, which costs a tenth of a microsecond.
    Numbers are compared as marshalled bytes, because equal ones of another type (1 and True), and 0.0 and -0.0,
    compare equal; texts, modules and tensors by ``==``, which asks for identity first; anything else by identity
    alone: equal dictionaries may have another order, and a class may call anything equal. What was seen is
    held, so an identity cannot be another object's by now.

    Where the interpreter numbers the changes of dictionaries, all of that is asked only once one was changed.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[Mapping[str, Any], tuple[str, ...]]] = []
        self._sized: list[Sized] = []
        self._without_hooks: list[Sized] = []
        self._hooks_ever = 0
        self._ordered: list[Mapping[str, Any]] = []
        self._slotted: list[object] = []
        self._named: list[Name] = []
        self._numbers: list[tuple[itemgetter[Any], list[Mapping[str, Any]]]] = []
        self._comparable: list[tuple[itemgetter[Any], list[Mapping[str, Any]]]] = []
        self._owners: list[Mapping[str, Any]] = []  # of the values that are compared by identity,
        self._owned: list[str] = []  # under these keys
        self._held: list[object] = []
        self._seen: tuple[object, ...] = ()
        self._seen_names: list[int] = []
        self._plain: list[dict[str, Any]] = []  # kept alive for their versions
        self._read_versions: Reader | None = None
        self._versions = b""

    def watch(self, values: Mapping[str, Any], keys: Iterable[str], *, may_grow: bool = True) -> None:
        """Watch some keys of a dictionary, and its length if it may grow."""
        self._keys.append((values, tuple(keys)))
        if may_grow:
            self._sized.append(values)

    def watch_order(self, values: Mapping[str, Any]) -> None:
        """Watch the order of a dictionary that code may go through."""
        self._ordered.append(values)

    def watch_for_hooks(self, hooks: Sized) -> None:
        """Watch a dictionary of hooks that has none."""
        self._without_hooks.append(hooks)

    def watch_slots(self, value: object) -> None:
        self._slotted.append(value)

    def watch_names(self, names: Iterable[Name]) -> None:
        self._named += names

    def settle(self) -> None:
        """Remember what is there now; nothing is watched afterwards that was not before."""
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Mapping[str, Any]]] = {}
        for values, keys in self._keys:
            numbers = tuple(key for key in keys if type(values[key]) in _NUMBERS)
            comparable = tuple(key for key in keys if isinstance(values[key], _COMPARABLE))
            groups.setdefault((numbers, comparable), []).append(values)
            for key in keys:
                if key not in numbers and key not in comparable:
                    self._owners.append(values)
                    self._owned.append(key)
        for (numbers, comparable), members in groups.items():
            if numbers:
                self._numbers.append((itemgetter(*numbers), members))
            if comparable:
                self._comparable.append((itemgetter(*comparable), members))
        watched = [values for values, _ in self._keys]
        self._plain = [values for values in watched if isinstance(values, dict) and type(values) is dict]
        if len(self._plain) == len(watched):
            self._read_versions = versions_of(self._plain)
        self._keys.clear()
        self._hooks_ever = RemovableHandle.next_id
        # Before the values: what changes in between is then looked at again.
        self._versions = self._read_versions() if self._read_versions else b""
        self._held = self._by_identity()
        self._seen = self._read()
        self._seen_names = self._names_by_identity()

    def have_moved(self) -> bool:
        """Tell whether anything differs from what was there; raises KeyError where something is gone."""
        if self._have_got_hooks():
            return True
        if self._read_versions is None:
            return self._read() != self._seen
        versions = self._read_versions()
        if versions == self._versions and self._names_by_identity() == self._seen_names:
            return False
        if self._read() != self._seen:
            return True
        self._versions = versions  # something changed that does not count
        return False

    def _names_by_identity(self) -> list[int]:
        """Return the identities of what lies in variables and slots, which have no versions."""
        ids = [id(name.read()) for name in self._named]
        for slotted in self._slotted:
            ids += map(id, (attributes_of(slotted) or {}).values())
        return ids

    def _have_got_hooks(self) -> bool:
        """Tell whether hooks came; torch numbers them all, so mostly nobody has to be asked."""
        if RemovableHandle.next_id == self._hooks_ever:
            return False
        if any(map(len, self._without_hooks)):
            return True
        self._hooks_ever = RemovableHandle.next_id
        return False

    def _read(self) -> tuple[object, ...]:
        return (
            list(map(len, self._sized)),
            list(map(list, self._ordered)),
            [list(map(getter, members)) for getter, members in self._comparable],
            _dump([list(map(getter, members)) for getter, members in self._numbers]),
            list(map(id, self._by_identity())),
        )

    def _by_identity(self) -> list[object]:
        values: list[object] = list(map(getitem, self._owners, self._owned))
        values += [name.read() for name in self._named]
        for slotted in self._slotted:
            values += (attributes_of(slotted) or {}).values()
        return values


class _Snapshot:
    """What one look at the state saw, in a form that the next call compares quickly."""

    def __init__(self, root: object, walk: CodeWalk | None, *, is_inside: bool) -> None:
        self._places = _Places()
        self._walk = walk
        self._owner = root if not isinstance(root, nn.Module) else None  # what is looked at, if it is no module
        self._named = [] if walk is None else [
            name for name in walk.names
            if not walk.writes.leave_out_name(name.key, is_container=_is_container(name.read()))
            and (name.is_own or _is_constant_of_library(name.key, name.read()))
        ]  # fmt: skip
        self._modules: list[nn.Module] = []
        self._tensors: list[torch.Tensor] = []
        self.named_tensors: list[tuple[str, torch.Tensor]] = []
        self._known: dict[int, int] = {}  # id of a module or tensor -> its number
        self._containers: list[tuple[object, Callable[[Any], object]]] = []
        self._code: dict[int, object] = {}
        self.unnamed: list[tuple[str, str]] = []
        self.has_inner_hooks = False
        self.crossings: list[str] = []  # what of the state other ranks take part in
        self.parts: Parts = self._collect(root, is_inside=is_inside)
        self._owner = None  # it must not live for its snapshot
        self.code = list(self._code.values())
        self.parameters: list[torch.Tensor] = [t for t in self._tensors if isinstance(t, nn.Parameter)]
        self.requires_grad = any(map(_REQUIRES_GRAD, self.parameters))
        self.bypass_reason = _bypass_reason(self._modules, self._tensors)
        self.tensors = [] if walk is None or self.bypass_reason in _WITHOUT_WEIGHTS else self._tensors
        self.plain = digest_parts(part for name, value in self.parts for part in (name.encode(), value))
        self._modules = [m for m in self._modules if m is not root]  # the root must not live for its snapshot
        self._classes = list(map(type, self._modules))
        self._places.watch_names(self._named)
        self._places.settle()
        self._contained = self._encode_containers()
        self._marks = _Marks(self.tensors)
        self._seen_marks, self._seen_forms = self._marks.read(), self._marks.forms()
        self._probes = [probe for tensor in self.tensors for probe in _probes(tensor)]
        self._seen_probes = b"".join(self._probes)

    def is_same(self, other: _Snapshot) -> bool:
        """Tell whether two looks saw the same state."""
        return self.plain == other.plain and self.seen_weights() == other.seen_weights()

    def seen_weights(self) -> tuple[object, ...]:
        """Return what was seen of the weights short of hashing them."""
        return self._seen_marks, self._seen_forms[:-1], self._seen_probes

    def read_marks(self) -> object:
        """Return what torch says of all tensors now, whether they count or not."""
        marks = _Marks(self._tensors)
        return marks.read(), marks.forms()

    def looks_moved(self) -> bool:
        """Compare with the present; costs tens of microseconds for a ViT-B."""
        try:
            return (
                self._places.have_moved()
                or list(map(type, self._modules)) != self._classes
                or self._marks.read() != self._seen_marks
                or not self._marks.have_form(self._seen_forms)
                or b"".join(self._probes) != self._seen_probes
                or (bool(self._containers) and self._encode_containers() != self._contained)
            )
        except Exception:  # noqa: BLE001 - a foreign __eq__ may raise anything (a tensor's does); then look again
            return True

    # -- collecting ---------------------------------------------------------------------------------------

    def _collect(self, root: object, *, is_inside: bool) -> Parts:
        """Fill modules, tensors and places; return the encoded plain state, part by part."""
        if isinstance(root, nn.Module):
            parts = self._collect_tree(root, "", inner=is_inside)
        else:
            parts = [] if root is None else self._collect_object(root)
        parts += [(f"name {name.label}", self._encode(name.read(), name.label)) for name in self._named]
        return parts

    def _collect_tree(self, root: nn.Module, prefix: str, *, inner: bool) -> Parts:
        parts: Parts = []
        for path, module in root.named_modules(prefix=prefix, remove_duplicate=False):
            if id(module) in self._known:
                parts.append((path or "module", f"again {self._known[id(module)]}".encode()))
                continue
            self._known[id(module)] = len(self._modules)
            self._modules.append(module)
            is_inner = inner or module is not root
            cls = plain_class(type(module))
            self._note_code(cls)
            self._note_crossings(path, module, is_inner=is_inner)
            parts.append((path or "module", type_name(cls)))
            if _is_compiled(module):
                parts.append((path or "module", self._collect_compiled(module)))
                continue
            if not isinstance(module, torch.jit.ScriptModule):  # a reason to bypass: it has no plain attributes
                parts += self._collect_module(path, module, is_inner=is_inner)
        return parts

    def _collect_object(self, root: object) -> Parts:
        """Collect the object that a method belongs to, and that is no module: its attributes are its state."""
        cls = type(root)
        self._known[id(root)] = -1  # what of it counts is watched here
        self._note_code(cls)
        attributes = attributes_of(root) or {}
        if self._walk is None:
            modules = [(key, value) for key, value in sorted(attributes.items()) if isinstance(value, nn.Module)]
            return [part for key, module in modules for part in self._collect_tree(module, key, inner=True)]
        counted = [key for key, value in sorted(attributes.items()) if not self._is_left_out(root, key, value)]
        plain = getattr(root, "__dict__", None)
        if isinstance(plain, dict):
            self._places.watch(plain, [key for key in counted if key in plain])
        held = AttributesOf(weakref.ref(root))
        slots = [key for key in slots_of(cls) if key in counted or key not in attributes]
        self._places.watch_names(Name(key, held, key) for key in slots)
        return [("object", type_name(cls)), *((key, self._encode(attributes[key], key)) for key in counted)]

    def _collect_module(self, path: str, module: nn.Module, *, is_inner: bool) -> Parts:
        attributes = vars(module)
        prefix = f"{path}." if path else ""
        if self._walk is None:
            self._places.watch(attributes, ("training",))
            self._tensors += [t for t in attributes["_parameters"].values() if t is not None]
            return [(f"{prefix}training", str(module.training).encode())]
        parts: Parts = []
        left_out = [key for key, value in attributes.items() if self._is_left_out(module, key, value)]
        for key, value in sorted(attributes.items()):
            if key not in _MODULE_INTERNALS and key not in left_out:
                parts.append((f"{prefix}{key}", self._encode(value, f"{prefix}{key}")))
        is_torchs = _is_torchs_own_layer(module)
        counted = [key for key in attributes if key not in (*left_out, *_MODULE_INTERNALS)]
        self._places.watch(attributes, counted)
        for kind in ("_parameters", "_buffers"):
            for key, tensor in attributes[kind].items():
                named = f"{prefix}{key}"
                parts.append((f"{kind} {named}", b"" if tensor is None else self._refer(tensor, named)))
        for kind in _HELD_BY_MODULES:
            # Torch's own layers look for nothing that their constructor did not make.
            if attributes[kind] or not is_torchs:
                self._places.watch(attributes[kind], attributes[kind], may_grow=not is_torchs)
        if not is_torchs and len(attributes["_modules"]) > 1:
            self._places.watch_order(attributes["_modules"])
        if is_inner:
            hooks = [attributes[kind] for kind in _HOOKS]
            self.has_inner_hooks = self.has_inner_hooks or any(hooks)
            for hook in hooks:
                self._places.watch(hook, hook) if hook else self._places.watch_for_hooks(hook)
            for kind, registered in zip(_HOOKS, hooks, strict=True):
                for key, hook in registered.items():
                    takes_kwargs = bool(attributes[f"{kind}_with_kwargs"].get(key))
                    parts.append((f"{path} hook", self._encode((hook, takes_kwargs), f"{path} hook")))
        return parts

    def _note_crossings(self, path: str, module: nn.Module, *, is_inner: bool) -> None:
        if is_spanning(type(module), is_root=not is_inner):
            self.crossings.append(f"{type(module).__qualname__} {path}".rstrip())
        held = {**vars(module).get("_parameters", {}), **vars(module).get("_buffers", {})}
        for key, tensor in held.items():
            if type(tensor) not in _PLAIN_TENSORS and is_distributed_tensor(type(tensor)):
                self.crossings.append(f"DTensor {path}.{key}" if path else f"DTensor {key}")

    def _collect_compiled(self, module: nn.Module) -> bytes:
        """Encode what torch.compile made of a module: the module in it has all the state.

        Its other attributes hold addresses, and some are made anew by the first call.
        """
        attributes = vars(module)
        self._places.watch(attributes, ("dynamo_ctx",))
        self._places.watch(attributes["_modules"], attributes["_modules"])
        return encode_compiler(getattr(attributes["dynamo_ctx"], "callback", None))

    def _is_left_out(self, owner: object, key: str, value: object) -> bool:
        cls = type(owner)
        return (
            key.startswith(("torchcache_", "_torchcache_"))
            or key == "cache_instance"
            or is_note_of_torch(key)
            or (
                self._walk is not None
                and self._walk.writes.leave_out_attribute(cls, key, is_container=_is_container(value))
            )
            or (key == "forward" and hasattr(value, "__torchcache_original__"))
            or (isinstance(value, StandIn) and _is_method_of(value, owner, key))
        )

    def _encode(self, value: object, path: str) -> bytes:
        if value is MISSING:
            return b"missing"
        try:
            self._watch(value, path, depth=0)
            return self._encode_watched(value, path)
        except RecursionError:
            self._note_unnamed(path, type(value).__qualname__)
            return type_name(type(value))

    def _encode_watched(self, value: object, path: str) -> bytes:
        def refer(inner: nn.Module | torch.Tensor) -> bytes:
            return self._refer(inner, path)

        return encode_state(value, path, refer, self._note_code, self._note_unnamed, owner=self._owner)

    def _note_code(self, code: object) -> None:
        if isinstance(code, (types.FunctionType, type)) or is_module_of_torch(code):
            self._code.setdefault(id(code), code)

    def _note_unnamed(self, path: str, type_name: str) -> None:
        self.unnamed.append((path, type_name))

    def _watch(self, value: object, path: str, *, depth: int) -> None:
        """See to it that a change inside ``value`` is noticed at the next call."""
        value = unwrap(value) if isinstance(value, StandIn) else value
        if isinstance(value, types.MethodType):
            value = value.__self__
        if isinstance(value, (nn.Module, torch.Tensor, type, *_CODE)) or depth > _WATCH_DEPTH:
            return
        if isinstance(value, functools.partial):
            self._watch((value.func, value.args, value.keywords), path, depth=depth)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                self._watch(item, f"{path}[{i}]", depth=depth + 1)
        elif encode_plain(value) is not None or id(value) in self._known:
            return
        elif isinstance(value, _ENCODED_EACH_TIME):
            self._known[id(value)] = -1
            self._containers.append((value, lambda generator: encode_state(generator, path, _identity)))
        elif isinstance(value, _CONTAINERS):
            self._known[id(value)] = -1
            way = _way_to_compare(value, path)
            self._containers.append((value, way))
            if way is _items:
                for item in _items(value):
                    if len(self._known) < _MOST_WATCHED:
                        self._watch(item, path, depth=depth + 1)
        elif (attributes := attributes_of(value)) is not None:
            self._known[id(value)] = -1
            if isinstance(plain := getattr(value, "__dict__", None), dict):
                self._places.watch(plain, plain)
            if len(attributes) != len(plain or ()):
                self._places.watch_slots(value)
            for name, item in attributes.items():
                self._watch(item, f"{path}.{name}", depth=depth + 1)

    def _refer(self, value: nn.Module | torch.Tensor, path: str) -> bytes:
        """Name a module or tensor by its number; one that is not yet known is from now on."""
        if id(value) in self._known:
            kind = "module" if isinstance(value, nn.Module) else "tensor"
            return f"{kind} {self._known[id(value)]}".encode()
        if isinstance(value, torch.Tensor) and (notes := _notes_on(value)):
            # What somebody hung on a tensor, such as the scale of a weight in float8.
            self._places.watch(vars(value), notes)
            return digest_parts([self._refer_plainly(value, path), self._encode(notes, f"{path}.__dict__")])
        return self._refer_plainly(value, path)

    def _refer_plainly(self, value: nn.Module | torch.Tensor, path: str) -> bytes:
        """Name a module or tensor that is not known yet, without its attributes."""
        if isinstance(value, nn.Module):
            return digest_parts(
                p for name, part in self._collect_tree(value, path, inner=True) for p in (name.encode(), part)
            )
        inner = _inner_tensors(value)
        if inner is not None:  # a wrapper around other tensors, which have the bytes
            self._known[id(value)] = -1
            if is_distributed_tensor(type(value)):
                self.crossings.append(f"DTensor {path}")
            parts = [type_name(type(value)), *(self._refer(t, f"{path}.{name}") for name, t in inner)]
            return digest_parts(parts)
        self._known[id(value)] = len(self._tensors)
        self._tensors.append(value)
        self.named_tensors.append((path, value))
        kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
        return f"{kind} {self._known[id(value)]}".encode()

    # -- comparing -------------------------------------------------------------------------------------

    def _encode_containers(self) -> list[object]:
        return [way(value) for value, way in self._containers]


class _Marks:
    """What torch says of tensors without their bytes: where they lie, what form they have, how often written.

    A write through ``.data`` counts no version, but the tensor it puts in place may lie elsewhere or, if it is a
    part or a view of the old one, have another form. Built for speed: one call of C a tensor and question, and
    for the form one for all, where torch's own guards of compiled code can be asked.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._counted = [t for t in tensors if not t.is_inference()]  # the others count no versions
        self._matrices = [t for t in tensors if t.dim() > 1]
        self._guards: dict[tuple[object, ...], Any] = {}

    def read(self) -> tuple[list[object], ...]:
        """Return where the tensors lie and how often they were written."""
        return list(map(_POINTER, self._tensors)), list(map(_VERSION, self._counted))

    def forms(self) -> tuple[list[object], ...]:
        """Return sizes, strides, dtypes, and who requires grad."""
        return (
            list(map(_BYTES, self._tensors)),
            list(map(_STRIDES, self._matrices)),
            list(map(_DTYPE, self._tensors)),
            list(map(_REQUIRES_GRAD, self._tensors)),
        )

    def have_form(self, seen: tuple[list[object], ...]) -> bool:
        """Tell whether ``forms`` would still return what was ``seen``."""
        if not self._tensors:
            return True
        # What a guard sees depends on these: the tensors' dispatch keys are masked by them.
        surroundings = torch.is_inference_mode_enabled(), autocast_in_force()
        guard = self._guards.get(surroundings)
        if guard is not None and guard.check(*self._tensors):
            return True
        if self.forms() != seen:
            return False
        if len(self._guards) < _MOST_GUARDS:
            self._guards[surroundings] = _make_guard(self._tensors)
        return True


#: Guards are kept for so many surroundings (inference mode, autocast).
_MOST_GUARDS = 8

_POINTER = torch.Tensor.data_ptr
_VERSION = attrgetter("_version")
_BYTES = attrgetter("nbytes")
_STRIDES = torch.Tensor.stride
_DTYPE = attrgetter("dtype")
_REQUIRES_GRAD = attrgetter("requires_grad")


def _make_guard(tensors: Sequence[torch.Tensor]) -> Any:  # noqa: ANN401 - a class of torch without a public name
    """Return torch's check that tensors keep their form; None where this torch has none that does."""
    return _guard_of(tensors) if _guards_work() else None


def _guard_of(tensors: Sequence[torch.Tensor]) -> Any:  # noqa: ANN401 - as above
    guards: Any = torch._C._dynamo.guards  # noqa: SLF001 - what it promises is tried below
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


@lru_cache(maxsize=1)
def _guards_work() -> bool:
    """Try the guards of this torch once: they are no public interface."""
    tensor = torch.zeros(4, 4, device="cpu", dtype=torch.float32)
    forms = (tensor.t(), tensor[:2], tensor.view(torch.int32), tensor.view(2, 8))
    try:
        guard = _guard_of([tensor])
        return bool(guard.check(tensor)) and not any(map(guard.check, forms))
    except Exception:  # noqa: BLE001 - whatever a later torch makes of it: the tensors are asked one by one
        return False


#: Containers that a method or an item assignment changes in place, and nothing else.
_BUILT_IN_CONTAINERS = (list, dict, set, deque, bytearray, OrderedDict, defaultdict, Counter)


def _is_constant_of_library(key: str, value: object) -> bool:
    """Tell whether a global of an installed distribution counts beside its version: numbers that users may set.

    Its texts and what it hides may be the process's own, such as the name of a session.
    """
    return type(value) in _NUMBERS and not key.startswith("_")


def _is_method_of(value: StandIn, owner: object, key: str) -> bool:
    """Tell whether what lies at a key of an object is the method that its class has there, cached."""
    bound = value.stands_for()
    return (
        isinstance(bound, types.MethodType)
        and bound.__self__ is owner
        and unwrap(getattr(type(owner), key, None)) is bound.__func__
    )


def _is_container(value: object) -> bool:
    return type(value) in _BUILT_IN_CONTAINERS


def _notes_on(tensor: torch.Tensor) -> dict[str, object]:
    """Return the attributes that somebody hung on a tensor; not those of torch's compiler, which shape no result."""
    notes: dict[str, object] = getattr(tensor, "__dict__", None) or {}
    return {key: note for key, note in notes.items() if not key.startswith("_dynamo_")}


def _is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is what ``torch.compile(module)`` returns, without importing the compiler."""
    return type(module).__name__ == "OptimizedModule" and type(module).__module__ == "torch._dynamo.eval_frame"


def _is_torchs_own_layer(module: nn.Module) -> bool:
    """Tell whether a module's forward is torch's and uses just what its constructor made."""
    name = type(module).__module__
    return name.startswith("torch.nn.modules.") and name != "torch.nn.modules.container"


def _way_to_compare(value: object, path: str) -> Callable[[Any], object]:
    """Return what turns a container into something that differs when it has changed, quickly where possible."""
    if isinstance(value, bytearray) or (isinstance(value, np.ndarray) and not value.dtype.hasobject):
        return _sampled
    items = _count_items(value, _MANY_PLAIN_ITEMS)
    if items <= _MANY_PLAIN_ITEMS and _is_plain(value):
        return _dump
    if items <= _MANY_ITEMS:
        return lambda value: encode_state(value, path, _identity)
    return _items if isinstance(value, (list, dict, set, deque)) and len(value) <= _MOST_ITEMS else _length


def _is_plain(value: object) -> bool:
    """Tell whether a container holds nothing but what marshal writes by value; of an array it writes no dtype."""
    waiting: list[Any] = [value]
    seen = set[int]()
    while waiting:
        item = waiting.pop()
        kind = type(item)
        if kind in _MARSHALLED:
            continue
        if kind not in (list, tuple, set, frozenset, dict) or id(item) in seen:
            return False
        seen.add(id(item))
        waiting += [*item, *item.values()] if kind is dict else item
    return True


_MARSHALLED = (int, float, complex, bool, str, bytes, type(None))


def _sampled(value: np.ndarray[Any, Any] | bytearray) -> bytes:
    """Return the digest of an array's values, or of a part that dense changes cannot miss."""
    array = np.frombuffer(value, np.uint8) if isinstance(value, bytearray) else value
    if array.nbytes > _MANY_BYTES:
        array = array.reshape(-1)[:: max(1, array.size // _SAMPLED_ELEMENTS)]
    return digest_parts([str((array.dtype, array.shape)).encode(), array.tobytes()])


def _items(value: Any) -> list[object]:  # noqa: ANN401 - any container
    """Return what lies in a container; the same objects compare equal at once."""
    return [*value.keys(), *value.values()] if isinstance(value, dict) else [*value]


def _length(value: object) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _dump(value: object) -> bytes:
    """Return plain values as bytes, types and all; raises ValueError for anything else."""
    return marshal.dumps(value, 2)  # type: ignore[arg-type] # that is what the ValueError says


def _count_items(value: object, most: int) -> int:
    """Count the items of a container, of those in it and of objects, up to where it no longer matters."""
    total, waiting, seen = 0, [value], set[int]()
    while waiting and total <= most:
        item = waiting.pop()
        total += 1
        if isinstance(item, (np.ndarray, bytearray, bytes, str)):
            total += (item.nbytes if isinstance(item, np.ndarray) else len(item)) // 64
            continue
        if isinstance(item, (nn.Module, torch.Tensor, type, *_CODE)) or id(item) in seen:
            continue
        if isinstance(item, (list, dict, set, tuple, deque)):
            inner: Any = item.values() if isinstance(item, dict) else item
        else:
            inner = (attributes_of(item) or {}).values()
        if inner:
            seen.add(id(item))
            total += len(inner)
            if total <= most:
                waiting += inner
    return total


def _identity(value: nn.Module | torch.Tensor) -> bytes:
    return str(id(value)).encode()


def _probes(tensor: torch.Tensor) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """Yield the first and last bytes of a tensor in host memory, as live views.

    They are read only while the tensor's pointer is unchanged, so they cannot outlive its memory.
    """
    if tensor.device.type != "cpu" or type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.numel():
        return
    if is_freed(tensor):
        return
    pointer = tensor.data_ptr()
    if not pointer:
        return
    size = tensor.numel() * tensor.element_size()
    if not (tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)):
        size = tensor.element_size()
    first = min(size, _PROBE_BYTES)
    yield (ctypes.c_char * first).from_address(pointer)
    if size > first:
        last = min(size - first, _PROBE_BYTES)
        yield (ctypes.c_char * last).from_address(pointer + size - last)


def _inner_tensors(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]] | None:
    """Return the tensors that a wrapper subclass (quantized weights, DTensor) is made of; None if it is none."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return None
    names, _ = tensor.__tensor_flatten__()
    inner = ((name, getattr(tensor, name)) for name in names)
    return [(name, value) for name, value in inner if isinstance(value, torch.Tensor)]


def _bypass_reason(modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor]) -> str | None:
    """Say why results of these modules are not a function of each sample alone, or None."""
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            return "scripted_module"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of all batch norms
            if module.training or module.running_mean is None:
                return "batch_norm_in_training_mode" if module.training else "batch_norm_without_running_statistics"
        elif module.training and _is_random(module):
            return "dropout_in_training_mode"
    for tensor in tensors:
        if is_lazy(tensor):
            return "uninitialized_parameters"
        if tensor.is_meta:
            return "meta_tensor"
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return "opaque_weights"
    return None


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the base of all dropouts
        return module.p > 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return float(module.dropout) > 0
    return isinstance(module, nn.RReLU)
