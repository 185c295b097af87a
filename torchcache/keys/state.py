"""Weights, plain state and mode to a namespace, and noticing that they changed.

A ``StateTracker`` is asked at every call. It compares what it saw last (identities, pointers, versions,
numbers by type and value, small containers by value, 2 x 64 bytes of every tensor in host memory) and
hashes again only what moved. Now and then it hashes all weights although nothing seems to have
moved, for sparse writes that bypass torch's version counters.
"""

from __future__ import annotations

import ctypes
import marshal
import time
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from torchcache.keys.code import CodeWalk, Writes, is_own_module, walk_code
from torchcache.keys.digest import digest_parts
from torchcache.keys.values import encode_plain, encode_state, encode_tensor

#: Attributes of ``nn.Module`` that are bookkeeping, not state of their own.
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}

#: Hooks that change what an inner module returns.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

#: A changed namespace this many calls in a row means state that changes at every call.
_RESTLESS_CALLS = 3

#: So many states are remembered as known: switching between them (train and eval) is not restless.
_RECENT_FINGERPRINTS = 64

#: All weights are hashed again after this many calls, but for at most 1 % of the time.
_AUDIT_CALLS = 1000
_AUDIT_SHARE = 0.01

_PROBE_BYTES = 64

_NUMBERS = (int, float, complex, bool)
_CONTAINERS = (list, dict, set, deque, bytearray, np.ndarray)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)

#: Objects inside objects are watched so deep.
_WATCH_DEPTH = 4

#: Containers of more items than this, inner ones included, are compared by identity and length at each call,
#: and by value whenever something else moved. Those of plain values cost little and may be larger.
_MANY_ITEMS = 64
_MANY_PLAIN_ITEMS = 4096


class StateTracker:
    """The state that shapes what one module, or one function, returns.

    Not thread-safe: its owner calls it under a lock.

    Args:
        module: The module whose state counts, weakly: it must not live for its cache; None for a function.
        walk: What the code walk found; ``None`` leaves out weights, plain state and globals, so that only
            training flags and mode count (for ``persistent_module_hash``).
        salt: The front of every fingerprint: the module hash.
    """

    def __init__(self, module: weakref.ref[nn.Module] | None, walk: CodeWalk | None, salt: bytes) -> None:
        self._module = module
        self._walk = walk
        self._salt = salt
        self._snapshot: _Snapshot | None = None
        self._weights = b""
        self._fingerprint = b""
        self._mode: tuple[object, ...] = ()
        self._recent: OrderedDict[bytes, None] = OrderedDict()
        self._restless = 0
        self._force = False
        self._calls_since_hash = 0
        self._hashed_at = 0.0
        self._hash_seconds = 0.0

    @property
    def bypass_reason(self) -> str | None:
        """Why a call cannot be cached in the state last seen, or None."""
        if not self._fingerprint:
            return "state_changes_at_every_call"
        return self._snapshot.bypass_reason if self._snapshot else None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters last seen, in the order of the module tree."""
        return self._snapshot.parameters if self._snapshot else []

    def refresh(self) -> None:
        """Hash everything at the next call, whatever the comparison says."""
        self._force = True

    def fingerprint(self) -> bytes:
        """Return the 16 bytes that name the present state; ``bypass_reason`` is then up to date.

        Empty while the state changes at every call: it is hashed again once it stood still for a call.
        """
        self._calls_since_hash += 1
        if self._force or self.moved():
            return self._look_again()
        if not self._fingerprint or self._audit_due():
            self._hash_weights()
            return self._combine()
        self._restless = 0
        return self._fingerprint

    def moved(self) -> bool:
        """Tell whether the state differs from the one that ``fingerprint`` last looked at.

        What looks different is looked at again in full: an attribute that does not count may have come
        or gone, or an equal value may have taken another's place.
        """
        if self._snapshot is None or _mode() != self._mode:
            return True
        if not self._snapshot.looks_moved():
            return False
        now = _Snapshot(None if self._module is None else self._module(), self._walk)
        if not now.is_same(self._snapshot):
            return True
        self._snapshot = now
        return False

    def _look_again(self) -> bytes:
        before, now = self._snapshot, _Snapshot(None if self._module is None else self._module(), self._walk)
        self._snapshot, self._mode = now, _mode()
        if self._restless >= _RESTLESS_CALLS and not self._force:
            self._fingerprint = b""
            return b""
        if self._force or before is None or before.marks != now.marks or before.probed != now.probed:
            self._hash_weights()
        self._force = False
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
        started = time.monotonic()
        self._weights = digest_parts(encode_tensor(tensor) for tensor in self._snapshot.tensors)
        self._hashed_at = time.monotonic()
        self._hash_seconds = self._hashed_at - started
        self._calls_since_hash = 0

    def _audit_due(self) -> bool:
        if self._calls_since_hash < _AUDIT_CALLS:
            return False
        return time.monotonic() - self._hashed_at > self._hash_seconds / _AUDIT_SHARE


@dataclass(slots=True)
class _Places:
    """Where the counted attributes lie: whole dictionaries, and chosen keys of others."""

    whole: list[dict[str, Any]] = field(default_factory=list)
    chosen: list[tuple[Mapping[str, Any], tuple[str, ...]]] = field(default_factory=list)
    lengths: list[Mapping[Any, Any]] = field(default_factory=list)


class _Snapshot:
    """What one look at the state saw, in a form that the next call compares quickly."""

    def __init__(self, root: nn.Module | None, walk: CodeWalk | None) -> None:
        self._places = _Places()
        self._walk = walk
        self._numbers: itemgetter[Any] | None = None
        self._named = [] if walk is None else [
            name for name in walk.names
            if not _is_written(name.key, name.read(), walk.writes.assigned_names, walk.writes.changed_names)
            and (name.is_own or encode_plain(name.read()) is not None)
        ]  # fmt: skip
        self._modules: list[nn.Module] = []
        self._tensors: list[torch.Tensor] = []
        self._known: dict[int, int] = {}  # id of a module or tensor -> its number
        self._containers: list[tuple[object, Callable[[object], bytes]]] = []
        entries = self._collect(root)
        self.parameters: list[torch.Tensor] = [t for t in self._tensors if isinstance(t, nn.Parameter)]
        self.tensors = [] if walk is None else self._tensors
        self.bypass_reason = _bypass_reason(self._modules, self._tensors)
        self.plain = digest_parts(entries)
        self._modules.clear()  # the root must not live for its snapshot
        self._lengths = [len(d) for d in self._places.lengths]
        self._values = self._read()
        self._set_numbers()
        self._contained = self._encode_containers()
        self._plain_tensors = [t for t in self.tensors if not t.is_inference()]
        self._inference_tensors = [t for t in self.tensors if t.is_inference()]
        self.marks = self._mark()
        self._probes = [probe for tensor in self.tensors for probe in _probes(tensor)]
        self.probed = b"".join(self._probes)

    def is_same(self, other: _Snapshot) -> bool:
        """Tell whether two looks saw the same state."""
        return self.plain == other.plain and self.marks == other.marks and self.probed == other.probed

    def looks_moved(self) -> bool:
        """Compare with the present; costs tens of microseconds for a ViT-B."""
        try:
            return (
                [len(d) for d in self._places.lengths] != self._lengths
                or (values := self._read()) != self._values
                or (self._numbers is not None and _dump(self._numbers(values)) != self._number_bytes)
                or self._mark() != self.marks
                or b"".join(self._probes) != self.probed
                or (bool(self._containers) and self._encode_containers() != self._contained)
            )
        except Exception:  # noqa: BLE001 - a foreign __eq__ may raise anything (a tensor's does); then look again
            return True

    # -- collecting ---------------------------------------------------------------------------------------

    def _collect(self, root: nn.Module | None) -> list[bytes]:
        """Fill modules, tensors and places; return the encoded plain state, entry by entry."""
        entries = [] if root is None else self._collect_tree(root, "", inner=False)
        for name in self._named:
            entries += [name.label.encode(), self._encode(name.read(), name.label)]
        return entries

    def _collect_tree(self, root: nn.Module, prefix: str, *, inner: bool) -> list[bytes]:
        entries: list[bytes] = []
        for path, module in root.named_modules(prefix=prefix, remove_duplicate=False):
            if id(module) in self._known:
                entries += [path.encode(), f"again {self._known[id(module)]}".encode()]
                continue
            self._known[id(module)] = len(self._modules)
            self._modules.append(module)
            entries += [path.encode(), type(module).__qualname__.encode(), _class_code(type(module))]
            entries += self._collect_module(path, module, with_hooks=inner or module is not root)
        return entries

    def _collect_module(self, path: str, module: nn.Module, *, with_hooks: bool) -> list[bytes]:
        entries: list[bytes] = []
        attributes = vars(module)
        if self._walk is None:
            self._places.chosen.append((attributes, ("training",)))
            return [str(module.training).encode()]
        left_out = [key for key, value in attributes.items() if self._is_left_out(key, value)]
        for key, value in sorted(attributes.items()):
            if key in _MODULE_INTERNALS or key in left_out:
                continue
            entries += [key.encode(), self._encode(value, f"{path}.{key}")]
        if left_out:
            counted = tuple(key for key in attributes if key not in left_out)
            self._places.chosen.append((attributes, counted))
            self._places.lengths.append(attributes)
        else:
            self._places.whole.append(attributes)
        for kind in ("_parameters", "_buffers"):
            for key, tensor in attributes[kind].items():
                entries += [kind.encode(), key.encode(), b"" if tensor is None else self._refer(tensor)]
        self._places.whole += [attributes[k] for k in ("_parameters", "_buffers", "_modules") if attributes[k]]
        if with_hooks:
            hooks = [attributes[kind] for kind in _HOOKS]
            self._places.lengths += hooks
            self._places.whole += filter(None, hooks)
            entries += [self._encode(hook, f"{path} hook") for d in hooks for hook in d.values()]
        return entries

    def _is_left_out(self, key: str, value: object) -> bool:
        writes = self._walk.writes if self._walk is not None else Writes()
        return (
            key.startswith(("torchcache_", "_torchcache_"))
            or key == "cache_instance"
            or (
                self._walk is not None
                and _is_written(key, value, writes.assigned_attributes, writes.changed_attributes)
            )
            or (key == "forward" and hasattr(value, "__torchcache_original__"))
        )

    def _encode(self, value: object, path: str) -> bytes:
        self._watch(value, path, depth=0)
        return encode_state(value, path, self._refer)

    def _watch(self, value: object, path: str, *, depth: int) -> None:
        """See to it that a change inside ``value`` is noticed at the next call."""
        if isinstance(value, (nn.Module, torch.Tensor, type, *_CODE)) or depth > _WATCH_DEPTH:
            return
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._watch(item, f"{path}[{i}]", depth=depth + 1)
        elif isinstance(value, _CONTAINERS) or is_dataclass(value):
            if id(value) not in self._known:
                self._known[id(value)] = -1
                self._containers.append((value, _way_to_compare(value, path)))
        elif isinstance(attributes := getattr(value, "__dict__", None), dict) and id(value) not in self._known:
            self._known[id(value)] = -1
            self._places.whole.append(attributes)
            for name, item in attributes.items():
                self._watch(item, f"{path}.{name}", depth=depth + 1)

    def _refer(self, value: nn.Module | torch.Tensor) -> bytes:
        """Name a module or tensor by its number; one that is not yet known is from now on."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._known:
                self._known[id(value)] = len(self._tensors)
                self._tensors.append(value)
            kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
            return f"{kind} {self._known[id(value)]}".encode()
        if id(value) in self._known:
            return f"module {self._known[id(value)]}".encode()
        return digest_parts(self._collect_tree(value, "held", inner=True))

    # -- comparing -------------------------------------------------------------------------------------

    def _read(self) -> list[Any]:
        values = list(chain.from_iterable(map(dict.values, self._places.whole)))
        for attributes, keys in self._places.chosen:
            values.extend(map(attributes.get, keys))
        values.extend(name.read() for name in self._named)
        return values

    def _set_numbers(self) -> None:
        """Equal numbers of other types, and 0.0 and -0.0, compare equal; marshal tells them apart."""
        places = [i for i, value in enumerate(self._values) if type(value) in _NUMBERS]
        if places:
            places += places[:1]  # itemgetter of one place would not return a tuple
            self._numbers = itemgetter(*places)
            self._number_bytes = _dump(self._numbers(self._values))

    def _encode_containers(self) -> list[bytes]:
        return [way(value) for value, way in self._containers]

    def _mark(self) -> list[tuple[int, int]]:
        return [
            *[(t.data_ptr(), t._version) for t in self._plain_tensors],
            *[(t.data_ptr(), 0) for t in self._inference_tensors],
        ]


def _is_written(key: str, value: object, assigned: AbstractSet[str], changed: AbstractSet[str]) -> bool:
    """Tell whether the code that runs changes a variable itself, so that it is no part of the key.

    A change in place was recognised by its form only, so the value has to be one that has such a form.
    """
    if key in assigned:
        return True
    return key in changed and (
        isinstance(value, (list, dict, set, deque, bytearray))
        or (hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor, type, *_CODE)))
    )


def _class_code(cls: type) -> bytes:
    """Return the fingerprint of the code of a submodule's class, if it is the user's own."""
    code = _class_codes.get(cls)
    if code is None:
        code = _class_codes[cls] = walk_code(cls).fingerprint if is_own_module(cls.__module__) else b""
    return code


_class_codes: weakref.WeakKeyDictionary[type, bytes] = weakref.WeakKeyDictionary()


def _way_to_compare(value: object, path: str) -> Callable[[object], bytes]:
    """Return what turns a container into bytes that differ when it has changed, quickly where possible."""
    items = _count_items(value, _MANY_PLAIN_ITEMS)
    if items <= _MANY_PLAIN_ITEMS and isinstance(value, (list, dict, set)):
        try:
            _dump(value)
        except ValueError:
            pass
        else:
            return _dump
    if items <= _MANY_ITEMS:
        return lambda value: encode_state(value, path, _identity)
    return lambda value: str(len(value) if isinstance(value, Sized) else 0).encode()


def _dump(value: object) -> bytes:
    """Return plain values as bytes, types and all; raises ValueError for anything else."""
    return marshal.dumps(value, 2)  # type: ignore[arg-type] # that is what the ValueError says


def _count_items(value: object, most: int) -> int:
    """Count the items of a container and of those in it, up to where it no longer matters."""
    if isinstance(value, np.ndarray):
        return value.nbytes // 64
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name, None) for f in fields(value)]
    if not isinstance(value, (list, dict, set, tuple, deque)):
        return 1
    total = len(value)
    for item in value.values() if isinstance(value, dict) else value:
        if total > most:
            break
        total += _count_items(item, most)
    return total


def _identity(value: nn.Module | torch.Tensor) -> bytes:
    return str(id(value)).encode()


def _probes(tensor: torch.Tensor) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """Yield the first and last bytes of a tensor in host memory, as live views.

    They are read only while the tensor's pointer is unchanged, so they cannot outlive its memory.
    """
    if tensor.device.type != "cpu" or type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.numel():
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


def _mode() -> tuple[object, ...]:
    """Return the settings of the calling thread and process that change the bytes of a result."""
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
    return (
        autocast,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _bypass_reason(modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor]) -> str | None:
    """Say why results of these modules are not a function of each sample alone, or None."""
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of all batch norms
            if module.training or module.running_mean is None:
                return "batch_norm_in_training_mode" if module.training else "batch_norm_without_running_statistics"
        elif module.training and _is_random(module):
            return "dropout_in_training_mode"
    if any(t.is_meta for t in tensors):
        return "meta_tensor"
    return None


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the base of all dropouts
        return module.p > 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return float(module.dropout) > 0
    return isinstance(module, nn.RReLU)
