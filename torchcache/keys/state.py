"""Weights, plain state and mode to a namespace, and noticing that they changed.

A ``StateTracker`` is asked at every call. It compares what it saw last (identities, pointers, versions,
sizes, numbers by type and value, small containers by value, 2 x 64 bytes of every tensor in host memory,
all bytes of those that require grad, and a share of the others in turn) and hashes again only what moved.
Now and then it hashes all weights although nothing seems to have moved, for writes on a device that bypass
torch's version counters.
"""

from __future__ import annotations

import time
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchcache.keys.attributes import attributes_of, slots_of
from torchcache.keys.code import MISSING, CodeWalk, Name, StandIn, is_hook_of_ours, unwrap
from torchcache.keys.collectives import (
    Talks,
    is_distributed_tensor,
    is_module_of_torch,
    is_note_of_torch,
    is_spanning,
    plain_class,
)
from torchcache.keys.digest import digest_parts
from torchcache.keys.mode import ambient_reason, current_mode
from torchcache.keys.operators import operators_at
from torchcache.keys.origins import is_own_module
from torchcache.keys.places import DEFAULT, AttributesOf
from torchcache.keys.plain import type_name
from torchcache.keys.ranks import has_other_ranks, rank_and_size
from torchcache.keys.time_limit import TimeLimit
from torchcache.keys.values import Look, Observer, encode_compiler, encode_tensor, encode_value, inner_tensors
from torchcache.keys.watched import Watched
from torchcache.keys.weights import Contents, Marks, probes_of

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

_NUMBERS = (int, float, complex, bool)

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

    Attributes:
        ignored: What does not count: attributes, globals and closure variables by their path.
    """

    def __init__(self, instance: weakref.ref[Any] | None, *, is_inside: bool = False) -> None:
        self._instance = instance
        self._is_inside = is_inside
        self.ignored: frozenset[str] = frozenset()
        self._walk: CodeWalk | None = None
        self._roots: list[object] = []
        self._salt = b""
        self._talks = Talks()
        self._collectives: list[str] = []
        self._snapshot: _Snapshot | None = None
        self._weights = b""
        self._hashed_marks: object = None  # of the weights that were hashed
        self._contents: Contents | None = None  # None: nothing was hashed that the state could have moved from
        self._hashed_bytes = 0  # of inputs, since the last look
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
        if self.opaque:
            return "opaque_state"
        if self.unseen:
            return "opaque_code"
        if self.entropy:
            return "random_numbers"
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
    def entropy(self) -> tuple[str, ...]:
        """What the code may draw random numbers from that no seed decides."""
        return () if self._walk is None else self._walk.draws.sources

    @property
    def unseen(self) -> list[str]:
        """Operators that the code may call and of which it is not known what runs."""
        return [] if self._walk is None else self._walk.unseen

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters last seen, in the order of the module tree."""
        return self._snapshot.parameters if self._snapshot else []

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter last seen required grad."""
        return self._snapshot is not None and self._snapshot.requires_grad

    @property
    def whole_bytes(self) -> int:
        """How many bytes of weights are compared at each call, all of them."""
        return 0 if self._contents is None else self._contents.whole_bytes

    @property
    def opaque(self) -> list[tuple[str, str]]:
        """Where the state last seen holds something that cannot be seen, and of what type."""
        return self._snapshot.opaque if self._snapshot else []

    @property
    def generators(self) -> list[object]:
        """The random number generators that the state last seen leads to."""
        return self._snapshot.generators if self._snapshot else []

    @property
    def unknown_names(self) -> dict[str, list[str]]:
        """Names that were to be ignored and are not in the state last seen, each with those that are there."""
        if self._snapshot is None:
            return {}
        there = sorted(self._snapshot.paths)
        return dict.fromkeys(sorted(self.ignored - self._snapshot.ignored), there)

    @property
    def has_inner_hooks(self) -> bool:
        """Whether inner modules have forward hooks, which do not run on hits."""
        return self._snapshot is not None and self._snapshot.has_inner_hooks

    def marks(self) -> object:
        """Return something that differs, under ``==``, once a weight was changed in a way that torch counts.

        Or in a way that the last look at the state noticed.
        """
        return (self._snapshot.read_marks(), self._weights) if self._snapshot else None

    def note_hashed(self, n_bytes: int) -> None:
        """Note that a call hashed so many bytes of its inputs: the next one looks at the more weights."""
        self._hashed_bytes = n_bytes

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
        if self._snapshot.looks_moved():
            now = self._take(self._walk)
            if not now.is_same(self._snapshot):
                return True
            self._snapshot = now
            if self._contents is not None:
                self._contents.follow(now.tensors)
        if self._contents is None:
            return False
        hashed_bytes, self._hashed_bytes = self._hashed_bytes, 0
        return self._contents.have_moved(hashed_bytes)

    def describe(self) -> Parts:
        """Return the parts of the fingerprint by name, each with its digest, from a new look at everything."""
        snapshot = self._take(self._walk)
        parts: Parts = [("mode", repr(self._current_mode()).encode())]
        parts += [(f"weights {name}", encode_tensor(t) or b"opaque") for name, t in snapshot.named_tensors]
        parts += [(f"state {name}", value) for name, value in snapshot.parts]
        return [(name, digest_parts([value])) for name, value in parts]

    def _take(self, walk: CodeWalk | None) -> _Snapshot:
        root = None if self._instance is None else self._instance()
        return _Snapshot(root, walk, is_inside=self._is_inside, ignored=self.ignored)

    def _current_mode(self) -> tuple[object, ...]:
        """Return the mode, and the rank for code that asks for it: its results are each rank's own.

        Code that reaches torch.distributed at all may do in a job what it does not do alone.
        """
        rank = rank_and_size() if self._talks.asks_rank else ()
        has_others = self._talks.reaches and has_other_ranks()
        return (*current_mode(), rank, has_others) if rank or has_others else current_mode()

    def _look_again(self) -> bytes:
        started = time.monotonic()
        snapshot, self._mode = self._take(self._walk), self._current_mode()
        if self._restless >= _RESTLESS_CALLS and not self._force:
            self._snapshot, self._contents = snapshot, None
            self._fingerprint = b""
            return b""
        contents = self._contents if snapshot.seen_weights() == self._hashed_marks else None
        if contents is not None:
            contents.follow(snapshot.tensors)
        self._snapshot = snapshot
        if self._force or contents is None or contents.have_moved():
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
        tensors = self._snapshot.tensors
        self._contents = Contents(tensors)
        digests = list(map(encode_tensor, tensors, self._contents.leaves_of_values(tensors)))
        self._has_opaque_weights = None in digests
        self._weights = digest_parts(digest or b"" for digest in digests)
        self._hashed_marks = self._snapshot.seen_weights()
        self._hashed_at = time.monotonic()
        self._calls_since_hash = 0

    def _audit_due(self) -> bool:
        if self._calls_since_hash < _AUDIT_CALLS:
            return False
        return time.monotonic() - self._hashed_at > self._look_seconds / _AUDIT_SHARE


class _Snapshot(Observer):
    """What one look at the state saw, in a form that the next call compares quickly."""

    def __init__(self, root: object, walk: CodeWalk | None, *, is_inside: bool, ignored: frozenset[str]) -> None:
        self.limit = TimeLimit()
        self._watched = Watched()
        self._places = self._watched.places
        self._ignored = ignored
        self.ignored: set[str] = set()  # those that were come upon
        self.paths: set[str] = set()  # all that could be
        self._walk = walk
        self.counts_generators = walk is not None and walk.reads_generators
        self._owner = root if not isinstance(root, nn.Module) else None  # what is looked at, if it is no module
        self._named = [] if walk is None else [
            name for name in walk.names
            if not self._is_ignored(name.key.removesuffix(DEFAULT), name.label)  # first: it is there, whatever it is
            and (
                name.counts_always
                or not walk.writes.leave_out_name(name.key, is_container=_is_container(name.read()))
            )
            and (name.is_own or _is_constant_of_library(name.key, name.read()))
        ]  # fmt: skip
        self._modules: list[nn.Module] = []
        self._tensors: list[torch.Tensor] = []
        self.named_tensors: list[tuple[str, torch.Tensor]] = []
        self._known: dict[int, int] = {}  # id of a module or tensor -> its number
        self._code: dict[int, object] = {}
        self._generators: dict[int, object] = {}
        self.opaque: list[tuple[str, str]] = []
        self.has_inner_hooks = False
        self.crossings: list[str] = []  # what of the state other ranks take part in
        self.parts: Parts = self._collect(root, is_inside=is_inside)
        self._owner = None  # it must not live for its snapshot
        self.code = list(self._code.values())
        self.generators = list(self._generators.values())
        self.parameters: list[torch.Tensor] = [t for t in self._tensors if isinstance(t, nn.Parameter)]
        self.requires_grad = any(parameter.requires_grad for parameter in self.parameters)
        self.bypass_reason = _bypass_reason(self._modules, self._tensors)
        self.tensors = [] if walk is None or self.bypass_reason in _WITHOUT_WEIGHTS else self._tensors
        self.plain = digest_parts(part for name, value in self.parts for part in (name.encode(), value))
        self._modules = [m for m in self._modules if m is not root]  # the root must not live for its snapshot
        self._classes = list(map(type, self._modules))
        self._places.watch_names(self._named)
        self._watched.settle()
        self._marks = Marks(self.tensors)
        self._seen_marks, self._seen_forms = self._marks.read(), self._marks.forms()
        self._probes = [probe for tensor in self.tensors for probe in probes_of(tensor)]
        self._seen_probes = b"".join(self._probes)

    def is_same(self, other: _Snapshot) -> bool:
        """Tell whether two looks saw the same state."""
        return self.plain == other.plain and self.seen_weights() == other.seen_weights()

    def seen_weights(self) -> tuple[object, ...]:
        """Return what was seen of the weights short of hashing them."""
        return self._seen_marks, self._seen_forms[:-1], self._seen_probes

    def read_marks(self) -> object:
        """Return what torch says of all tensors now, whether they count or not."""
        marks = Marks(self._tensors)
        return marks.read(), marks.forms()

    def looks_moved(self) -> bool:
        """Compare with the present; costs tens of microseconds for a ViT-B."""
        try:
            return (
                self._watched.have_moved()
                or list(map(type, self._modules)) != self._classes
                or self._marks.read() != self._seen_marks
                or not self._marks.have_form(self._seen_forms)
                or b"".join(self._probes) != self._seen_probes
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
        parts += [(f"name {name.label}", self._encode_name(name)) for name in self._named]
        return parts

    def _encode_name(self, name: Name) -> bytes:
        n_opaque = len(self.opaque)
        part = self._encode(name.read(), name.key)
        if name.counts_always and len(self.opaque) > n_opaque:  # perhaps nobody reads it
            del self.opaque[n_opaque:]
            return b"not seen"
        return part

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
            self.note_code(cls)
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
        self.note_code(cls)
        attributes = attributes_of(root) or {}
        if self._walk is None:
            modules = [(key, value) for key, value in sorted(attributes.items()) if isinstance(value, nn.Module)]
            return [part for key, module in modules for part in self._collect_tree(module, key, inner=True)]
        counted = [key for key, value in sorted(attributes.items()) if not self._is_left_out(root, key, value, key)]
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
        left_out = [k for k, value in attributes.items() if self._is_left_out(module, k, value, f"{prefix}{k}")]
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

    def _is_left_out(self, owner: object, key: str, value: object, path: str) -> bool:
        cls = type(owner)
        return (
            self._is_ignored(path)
            or key.startswith(("torchcache_", "_torchcache_"))
            or key == "cache_instance"
            or is_note_of_torch(key)
            or (
                self._walk is not None
                and self._walk.writes.leave_out_attribute(cls, key, is_container=_is_container(value))
            )
            or is_hook_of_ours(key, value)
            or (isinstance(value, StandIn) and _is_method_of(value, owner, key))
        )

    def _is_ignored(self, *paths: str) -> bool:
        """Tell whether what lies at a path, or goes by several, is to be ignored."""
        if not self._ignored:
            return False
        self.paths.update(paths)
        found = self._ignored.intersection(paths)
        self.ignored |= found
        return bool(found)

    def _encode(self, value: object, path: str) -> bytes:
        if value is MISSING:
            return b"missing"
        return encode_value(value, path, self, owner=self._owner)

    # -- what an encoding tells --------------------------------------------------------------------------------

    def refer(self, value: nn.Module | torch.Tensor, path: str) -> bytes:
        return self._refer(value, path)

    def leaves_out(self, owner: object, name: str, value: object, path: str) -> bool:  # noqa: ARG002 - as of Observer
        return self._is_ignored(path)

    def note_code(self, code: object) -> None:
        is_module = isinstance(code, types.ModuleType) and (is_module_of_torch(code) or is_own_module(code.__name__))
        if isinstance(code, (types.FunctionType, type)) or is_module or operators_at(code) is not None:
            self._code.setdefault(id(code), code)

    def note_opaque(self, path: str, value: object) -> None:
        self.opaque.append((path, type(value).__qualname__))

    def note_generator(self, generator: object) -> None:
        self._generators.setdefault(id(generator), generator)

    def note_container(self, value: object) -> bool:
        return self._watched.add_container(value)

    def note_attributes(self, value: object, names: Sequence[str]) -> None:
        self._watched.add_attributes(value, names)

    def note_array(self, value: np.ndarray[Any, Any]) -> None:
        self._watched.add_array(value)

    def note_content(self, value: object, look: Look, quick_look: Look | None) -> None:
        self._watched.add_content(value, look, quick_look)

    # -- modules and tensors -----------------------------------------------------------------------------------

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
        inner = inner_tensors(value)
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
