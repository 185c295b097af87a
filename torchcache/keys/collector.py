"""All that makes the state of a module or object: found, encoded part by part, and watched."""

from __future__ import annotations

import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from torchcache.keys import frameworks
from torchcache.keys.attributes import attributes_of, slots_of
from torchcache.keys.capturing import INSTALLED, Captured, captured_in
from torchcache.keys.collectives import (
    is_distributed_tensor,
    is_module_of_torch,
    is_note_of_torch,
    is_spanning,
    plain_class,
)
from torchcache.keys.digest import digest_bytes, digest_named, digest_parts
from torchcache.keys.encoders.functions import encode_compiler
from torchcache.keys.layers import is_compiled, is_of_torch, reason_of
from torchcache.keys.observer import Observer, Read
from torchcache.keys.operators import operators_at
from torchcache.keys.origins import is_own_module
from torchcache.keys.ours import StandIn, is_hook_of_ours, unwrap
from torchcache.keys.places import DEFAULT, MISSING, AttributesOf, Name
from torchcache.keys.plain import type_name
from torchcache.keys.tensor_digest import inner_tensors
from torchcache.keys.tensor_kinds import PLAIN_TENSORS, notes_on
from torchcache.keys.time_limit import TimeLimit
from torchcache.keys.values import encode_name, encode_value
from torchcache.keys.walked import CodeWalk
from torchcache.keys.watched import Watched
from torchcache.our_names import is_on_instances
from torchcache.report.reasons import Reason

#: Attributes of ``nn.Module`` that are bookkeeping, not state of their own.
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}

#: Hooks that change what an inner module returns.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

_HELD_BY_MODULES = ("_parameters", "_buffers", "_modules")

#: Containers that a method or an item assignment changes in place, and nothing else.
_BUILT_IN_CONTAINERS = (list, dict, set, deque, bytearray, OrderedDict, defaultdict, Counter)

_NUMBERS = (int, float, complex, bool)

#: At most this many values inside attributes are noted, and so many bytes of each as they are.
_MOST_INNER = 512
_MOST_INNER_BYTES = 64

#: One name and the bytes of each thing the state is made of, in order.
Parts = list[tuple[str, bytes]]


class StateCollector(Observer):
    """What makes the state of one module, object or function.

    Args:
        walk: What the code walk found; None leaves out all but training flags.
        ignored: What does not count: attributes, globals and closure variables by their path.
        flags: Training flags to count in place of those that are set, by the number of the module.

    Attributes:
        flags: The training flags that count, by the number of the module.
        classes: The classes of these modules, by their number.
        inner: Bytes of what lies inside the first objects and dictionaries that were come upon, by its path.
        parts: The encoded plain state.
        modules: The modules that were come upon, without the root, which must not live for what was found of it.
        tensors: The tensors, in the order of their numbers.
        named_tensors: The same by their paths.
        names: The variables that count.
        opaque: Where something lies that cannot be seen, and of what type.
        crossings: What of the state other ranks take part in.
        has_inner_hooks: Whether inner modules have forward hooks.
        reason: Why results are no function of each sample alone, or None.
        ignored: The names to be ignored that were come upon.
        paths: All names that could be, if any are.
        watched: Notices changes of what was come upon.
    """

    def __init__(self, walk: CodeWalk | None, ignored: frozenset[str], flags: Mapping[int, bool] | None = None) -> None:
        self.limit: TimeLimit = TimeLimit("the state")
        self.counts_generators: bool = walk is not None and walk.reads_generators
        self.watched: Watched = Watched()
        self.flags: dict[int, bool] = {}
        self.classes: dict[int, type] = {}
        self.inner: dict[str, bytes] = {}
        self.parts: Parts = []
        self.modules: list[nn.Module] = []
        self.tensors: list[torch.Tensor] = []
        self.named_tensors: list[tuple[str, torch.Tensor]] = []
        self.names: list[Name] = []
        self.opaque: list[tuple[str, str]] = []
        self.crossings: list[str] = []
        self.has_inner_hooks: bool = False
        self.reason: Reason | None = None
        self.ignored: set[str] = set()
        self.paths: set[str] = set()
        self._holders = self.watched.holders
        self._walk = walk
        self._to_ignore = ignored
        self._flags_then = flags or {}
        self._owner: object = None  # what is looked at, if it is no module
        self._known: dict[int, int] = {}  # id of a module or tensor -> its number
        self._code: dict[int, object] = {}
        self._generators: dict[int, object] = {}
        self._captured = Captured()  # of the tree that is being collected

    @property
    def code(self) -> list[object]:
        """The functions and classes that were come upon."""
        return list(self._code.values())

    @property
    def generators(self) -> list[object]:
        """The random number generators that were come upon."""
        return list(self._generators.values())

    def collect(self, root: object, *, is_inside: bool) -> None:
        """Find everything, starting at a module or object, or at variables alone where it is None.

        Args:
            root: The module or object.
            is_inside: Whether calls of the module itself, with its hooks, may come from inside what is cached.
        """
        self.names = self._names_that_count()
        if isinstance(root, nn.Module):
            self.parts = self._collect_tree(root, "", inner=is_inside)
        elif root is not None:
            self._owner = root
            self.parts = self._collect_object(root)
        for name in self.names:
            encoded = encode_name(name, partial(self._encode, path=name.key), self.opaque)
            self.parts.append((f"name {name.label}", encoded))
        self._holders.watch_names(self.names)

        self.reason = reason_of(self.modules, self.tensors)
        # Neither must live for what was found of it.
        self._owner = None
        self.modules = [module for module in self.modules if module is not root]

    def _names_that_count(self) -> list[Name]:
        if self._walk is None:
            return []
        return list(filter(self._counts, self._walk.names))

    def _counts(self, name: Name) -> bool:
        assert self._walk is not None
        # First: it is there, whatever it is.
        if self._is_ignored(name.key.removesuffix(DEFAULT), name.label):
            return False
        if not name.counts_always:
            is_container = _is_container(name.read())
            if self._walk.writes.leave_out_name(name.key, is_container=is_container):
                return False
        return name.is_own or _is_constant_of_library(name.key, name.read())

    def _encode(self, value: object, path: str) -> bytes:
        if value is MISSING:
            return b"missing"
        self.limit.begin(path)
        return encode_value(value, path, self, owner=self._owner)

    # -- an object that is no module -------------------------------------------------------------------------------

    def _collect_object(self, root: object) -> Parts:
        """Collect the object that a method belongs to, and that is no module: its attributes are its state."""
        cls = type(root)
        self._known[id(root)] = -1  # what of it counts is watched here
        self.note_code(cls)
        attributes = dict(sorted((attributes_of(root) or {}).items()))
        if self._walk is None:
            return self._collect_modules_in(attributes)

        counted = [key for key, value in attributes.items() if not self._is_left_out(root, key, value, key)]
        self._watch_attributes(root, attributes, counted)
        parts: Parts = [("object", type_name(cls))]
        for key in counted:
            parts.append((key, self._encode(attributes[key], key)))
        return parts

    def _collect_modules_in(self, attributes: dict[str, object]) -> Parts:
        parts: Parts = []
        for key, value in attributes.items():
            if isinstance(value, nn.Module):
                parts += self._collect_tree(value, key, inner=True)
        return parts

    def _watch_attributes(self, root: object, attributes: dict[str, object], counted: list[str]) -> None:
        plain = getattr(root, "__dict__", None)
        if isinstance(plain, dict):
            self._holders.watch(plain, [key for key in counted if key in plain])
        # Slots that are not set too: they may be.
        slots = [key for key in slots_of(type(root)) if key in counted or key not in attributes]
        held = AttributesOf(weakref.ref(root))
        self._holders.watch_names(Name(key, held, key) for key in slots)

    # -- modules -----------------------------------------------------------------------------------------------------

    def _collect_tree(self, root: nn.Module, prefix: str, *, inner: bool) -> Parts:
        parts: Parts = []
        outer, self._captured = self._captured, captured_in(root)
        for path, module in root.named_modules(prefix=prefix, remove_duplicate=False):
            name = path or "module"
            if id(module) in self._known:
                parts.append((name, f"again {self._known[id(module)]}".encode()))
                continue
            self._known[id(module)] = len(self.modules)
            self.modules.append(module)
            is_inner = inner or module is not root
            cls = plain_class(type(module))
            self.note_code(cls)
            self._note_crossings(path, module, is_inner=is_inner)
            parts.append((name, type_name(cls)))
            if is_compiled(module):
                parts.append((name, self._collect_compiled(module)))
            elif not isinstance(module, torch.jit.ScriptModule):  # a reason to bypass: it has no plain attributes
                parts += self._collect_module(path, module, is_inner=is_inner)
        self._captured = outer
        return parts

    def _note_crossings(self, path: str, module: nn.Module, *, is_inner: bool) -> None:
        if is_spanning(type(module), is_root=not is_inner):
            self.crossings.append(f"{type(module).__qualname__} {path}".rstrip())
        attributes = vars(module)
        held = {**attributes.get("_parameters", {}), **attributes.get("_buffers", {})}
        prefix = f"{path}." if path else ""
        for key, tensor in held.items():
            kind = type(tensor)
            if tensor is not None and kind not in PLAIN_TENSORS and is_distributed_tensor(kind):
                self.crossings.append(f"DTensor {prefix}{key}")

    def _collect_compiled(self, module: nn.Module) -> bytes:
        """Encode what torch.compile made of a module: the module in it has all the state.

        Its other attributes hold addresses, and some are made anew by the first call.
        """
        attributes = vars(module)
        self._holders.watch(attributes, ("dynamo_ctx",))
        self._holders.watch(attributes["_modules"], attributes["_modules"])
        return encode_compiler(getattr(attributes["dynamo_ctx"], "callback", None))

    def _collect_module(self, path: str, module: nn.Module, *, is_inner: bool) -> Parts:
        attributes = vars(module)
        prefix = f"{path}." if path else ""
        if self._walk is None:
            self._holders.watch(attributes, ("training",))
            self.tensors += [t for t in attributes["_parameters"].values() if t is not None]
            return [(f"{prefix}training", str(self._flag_of(module)).encode())]

        parts = self._collect_attributes(prefix, module)
        for kind in ("_parameters", "_buffers"):
            for key, tensor in attributes[kind].items():
                named = f"{prefix}{key}"
                referred = b"" if tensor is None else self.refer(tensor, named)
                parts.append((f"{kind} {named}", referred))
        self._watch_held(module)
        if is_inner:
            parts += self._collect_hooks(path, module)
        return parts

    def _collect_attributes(self, prefix: str, module: nn.Module) -> Parts:
        """Collect the attributes of a module that are not parameters, buffers or modules."""
        attributes = vars(module)
        counted: list[str] = []
        for key, value in attributes.items():
            is_left_out = self._is_left_out(module, key, value, f"{prefix}{key}")
            if not is_left_out and key not in _MODULE_INTERNALS:
                counted.append(key)
        # What holds modules, tensors and hooks may be replaced; a mark that does not count stands for hooks.
        more = [key for key in (*_HELD_BY_MODULES, *_HOOKS, INSTALLED) if key in attributes and key not in counted]
        self._holders.watch(attributes, [*counted, *more])

        parts: Parts = []
        for key in sorted(counted):
            named = f"{prefix}{key}"
            value = attributes[key]
            if key == "training" and type(value) is bool:
                value = self._flag_of(module)
            parts.append((named, self._encode(value, named)))
        return parts

    def _flag_of(self, module: nn.Module) -> bool:
        """Return the training flag that counts of a module, and note it."""
        number = self._known[id(module)]
        self.flags[number] = module.training
        self.classes[number] = type(module)
        return self._flags_then.get(number, module.training)

    def _watch_held(self, module: nn.Module) -> None:
        """Watch which parameters, buffers and modules a module holds."""
        attributes = vars(module)
        # Torch's own layers look for nothing that their constructor did not make.
        is_torchs = is_of_torch(module)
        for kind in _HELD_BY_MODULES:
            if attributes[kind] or not is_torchs:
                self._holders.watch(attributes[kind], attributes[kind], may_grow=not is_torchs)
        if not is_torchs and len(attributes["_modules"]) > 1:
            self._holders.watch_order(attributes["_modules"])

    def _collect_hooks(self, path: str, module: nn.Module) -> Parts:
        """Collect the forward hooks of an inner module."""
        attributes = vars(module)
        left_out = self._captured.hooks.get(id(module), set())
        parts: Parts = []
        for kind in _HOOKS:
            hooks = attributes[kind]
            if hooks:
                self._holders.watch(hooks, hooks)
                self._holders.watch_order(hooks)
            else:
                self._holders.watch_for_hooks(hooks)
            for key, hook in hooks.items():
                if key in left_out:
                    continue
                self.has_inner_hooks = True
                takes_kwargs = bool(attributes[f"{kind}_with_kwargs"].get(key))
                named = f"{path} hook"
                parts.append((named, self._encode((hook, takes_kwargs), named)))
        return parts

    # -- what does not count -----------------------------------------------------------------------------------------

    def _is_left_out(self, owner: object, key: str, value: object, path: str) -> bool:
        return (
            self._is_ignored(path)
            or is_on_instances(key)
            or is_note_of_torch(key)
            or (key == INSTALLED and id(owner) in self._captured.models)
            or self._is_note_of_framework(type(owner), key)
            or self._is_written_only(type(owner), key, value)
            or is_hook_of_ours(key, value)
            or (isinstance(value, StandIn) and _is_method_of(value, owner, key))
        )

    def _is_note_of_framework(self, cls: type, key: str) -> bool:
        return self._walk is not None and frameworks.leaves_out(cls, key, self._walk.names_read)

    def _is_written_only(self, cls: type, key: str, value: object) -> bool:
        if self._walk is None:
            return False
        return self._walk.writes.leave_out_attribute(cls, key, is_container=_is_container(value))

    def _is_ignored(self, *paths: str) -> bool:
        """Tell whether what lies at a path, or goes by several, is to be ignored."""
        if not self._to_ignore:
            return False
        self.paths.update(paths)
        found = self._to_ignore.intersection(paths)
        self.ignored |= found
        return bool(found)

    # -- what an encoding tells --------------------------------------------------------------------------------------

    def refer(self, value: nn.Module | torch.Tensor, path: str) -> bytes:
        """Name a module or tensor by its number; one that is not yet known is from now on."""
        if id(value) in self._known:
            kind = "module" if isinstance(value, nn.Module) else "tensor"
            return f"{kind} {self._known[id(value)]}".encode()
        if isinstance(value, nn.Module):
            return digest_named(self._collect_tree(value, path, inner=True))
        notes = notes_on(value)
        if not notes:
            return self._refer_to_tensor(value, path)
        # What somebody hung on a tensor, such as the scale of a weight in float8.
        self._holders.watch(vars(value), notes)
        self.watched.add_object(value)
        referred = self._refer_to_tensor(value, path)
        return digest_parts([referred, self._encode(notes, f"{path}.__dict__")])

    def _refer_to_tensor(self, value: torch.Tensor, path: str) -> bytes:
        """Name a tensor that is not known yet, without its attributes."""
        inner = inner_tensors(value)
        if inner is not None:  # a wrapper around other tensors, which have the bytes
            return self._refer_to_wrapper(value, inner, path)
        number = len(self.tensors)
        self._known[id(value)] = number
        self.tensors.append(value)
        self.named_tensors.append((path, value))
        kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
        return self._with_what_is_read(value, f"{kind} {number}".encode(), path)

    def _with_what_is_read(self, value: torch.Tensor, referred: bytes, path: str) -> bytes:
        """Return how a tensor is referred to, with what code reads of it that its bytes do not say."""
        reads = set() if self._walk is None else self._walk.reads_of_weights
        parts = [referred]
        if "requires_grad" in reads and value.requires_grad:
            parts.append(b"requires grad")
        if "grad" in reads and value.is_leaf:
            # That there is another one is noticed by what it is: this look keeps the one that it saw.
            self.watched.add_content(value, lambda: str(id(value.grad)).encode(), None)
            if value.grad is not None:
                parts.append(self.refer(value.grad, f"{path}.grad"))
        return referred if len(parts) == 1 else digest_parts(parts)

    def _refer_to_wrapper(self, value: torch.Tensor, inner: list[tuple[str, torch.Tensor]], path: str) -> bytes:
        self._known[id(value)] = -1
        if is_distributed_tensor(type(value)):
            self.crossings.append(f"DTensor {path}")
        parts = [type_name(type(value))]
        parts += [self.refer(tensor, f"{path}.{name}") for name, tensor in inner]
        return digest_parts(parts)

    def leaves_out(self, owner: object, name: str, value: object, path: str) -> bool:  # noqa: ARG002 - as of Observer
        return self._is_ignored(path) or self._is_note_of_framework(type(owner), name)

    def note_code(self, code: object) -> None:
        is_followed = isinstance(code, (types.FunctionType, type)) or operators_at(code) is not None
        if isinstance(code, types.ModuleType) and not is_followed:
            is_followed = is_module_of_torch(code) or is_own_module(code.__name__)
        if is_followed:
            self._code.setdefault(id(code), code)

    def note_opaque(self, path: str, value: object) -> None:
        self.opaque.append((path, type(value).__qualname__))

    def note_generator(self, generator: object) -> None:
        self._generators.setdefault(id(generator), generator)

    def note_inner(self, path: str, encoded: bytes) -> None:
        if len(self.inner) < _MOST_INNER:
            self.inner[path] = encoded if len(encoded) <= _MOST_INNER_BYTES else digest_bytes(encoded)

    def note_container(self, value: object) -> bool:
        return self.watched.add_container(value)

    def note_attributes(self, value: object, names: Sequence[str]) -> None:
        self.watched.add_attributes(value, names)

    def note_array(self, value: np.ndarray[Any, Any]) -> None:
        self.watched.add_array(value)

    def note_content(self, value: object, read: Read, quick_read: Read | None) -> None:
        self.watched.add_content(value, read, quick_read)


def _is_constant_of_library(key: str, value: object) -> bool:
    """Tell whether a global of an installed distribution counts beside its version: numbers that users may set.

    Its strings and what it hides may be the process's own, such as the name of a session.
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
