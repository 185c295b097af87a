"""The cached call, and the one place that decides what a failure costs."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import local
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from torchcache import process
from torchcache.errors import StoreError, TorchcacheError, UncacheableError
from torchcache.keys.code import CodeWalk, unwrap, walk_code
from torchcache.keys.digest import digest_parts
from torchcache.keys.state import StateTracker
from torchcache.layout import Found, Rows, empty_rows
from torchcache.log import warn_once
from torchcache.memory import MemoryTier
from torchcache.options import CacheOptions
from torchcache.samples import (
    Batch,
    CallSignature,
    is_known,
    put_together,
    rounded,
    take_apart,
    unsupported_kind,
)
from torchcache.stats import CacheStats, Counters
from torchcache.storage.contract import Written
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.lmdb import LmdbStore, StoreSettings
from torchcache.storage.record import FORMAT_VERSION
from torchcache.storage.temporary import temporary_directory
from torchcache.storage.writer import (
    DEFAULT_FLUSH_SECONDS,
    DEFAULT_QUEUE_BYTES,
    WORKER_FLUSH_SECONDS,
    WORKER_QUEUE_BYTES,
    writer,
)

logger = logging.getLogger(__name__)

Function = Callable[..., Any]
R = TypeVar("R")

#: Why a call goes around the cache: what the log says once.
_REMEDIES = {
    "input_requires_grad": "an input requires grad, and gradients do not flow through cached outputs; detach "
    "it or call the module under torch.no_grad()",
    "parameters_require_grad": "parameters require grad and when_grad='bypass'; call requires_grad_(False) on "
    "what is frozen",
    "batch_norm_in_training_mode": "a batch norm is in training mode, so a sample's result depends on its batch; "
    "call eval() on the cached module",
    "batch_norm_without_running_statistics": "a batch norm has no running statistics, so a sample's result depends "
    "on its batch; it cannot be cached sample by sample",
    "dropout_in_training_mode": "a dropout or its like is in training mode, so results are random; call eval() on "
    "the cached module",
    "random_numbers": "the call consumed random numbers, so its result is not a function of its input",
    "state_changes_at_every_call": "weights or plain attributes change at every call; it is cached again when they "
    "stand still",
    "rows_do_not_stack": "the rows of one batch have results of different shapes",
    "out_of_memory": "there is no memory for a copy of the batch",
    "unreadable_state": "an attribute of the module cannot be read; see the fault in the log",
    "export_or_trace": "the call is being exported, traced or scripted",
}  # fmt: skip
_OTHER_REMEDY = "a cached call takes and returns plain strided tensors; convert it before the call"

#: So many states are remembered as consuming random numbers; others are found out again.
_MOST_RANDOM = 4096

_disabled: ContextVar[bool] = ContextVar("torchcache_disabled", default=False)
_calling = local()  # .active: ids of the targets whose cached call is under way in this thread


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Run the body as if nothing were cached, in this thread (or asyncio task).

    Nothing is looked up, stored or detached. TORCHCACHE_DISABLED=1 does the same for a whole program.
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def is_disabled() -> bool:
    """Tell whether caching is off here: inside ``disabled()`` or by TORCHCACHE_DISABLED."""
    return _disabled.get() or os.environ.get("TORCHCACHE_DISABLED", "") not in ("", "0")


@dataclass(frozen=True, slots=True)
class Target:
    """What is cached, as the doors describe it.

    Attributes:
        name: What to call it in the log.
        code: The class or function whose code runs.
        function: The user's own function, not bound.
        module: The module whose state counts, weakly; None for a function.
        arguments: Digest of the construction arguments; None if they have no stable name.
    """

    name: str
    code: type | Function
    function: Function
    module: weakref.ref[nn.Module] | None = None
    arguments: bytes | None = b""


@dataclass(frozen=True, slots=True)
class _Identity:
    """What identifies the results of a target, once it is known."""

    module_hash: str
    salt: bytes
    walk: CodeWalk | None
    module: weakref.ref[nn.Module] | None
    tracker: StateTracker

    def renewed(self) -> _Identity:
        """Return the same with a tracker that has seen nothing yet."""
        return replace(self, tracker=StateTracker(self.module, self.walk, self.salt))


def call_uncompiled(cache: Cache, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """Make a cached call a graph break for torch.compile: nothing inside it is traced.

    ``torch.compiler.disable`` is asked here, not when decorating: it takes a second to import.
    """
    return torch.compiler.disable(cache.call_eagerly)(function, args, kwargs)


call_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined] # noqa: SLF001 - what disable() sets


class Cache:
    """The cache of one module instance or one function, in this process.

    Get it with ``torchcache.cache_of(target)`` or as ``target.cache_instance``. All methods are safe from
    any thread. A fault of disk, lock or stored bytes never leaves a cached call: it becomes a miss, a
    counter in ``stats().faults`` and one line in the log per kind.
    """

    def __init__(self, target: Target, options: Callable[[], CacheOptions]) -> None:
        self._target = target
        self._make_options = options  # asked at first use: a module's attributes count
        self._counters = Counters()
        self._signatures: dict[Function, CallSignature] = {}
        self._lock = process.ForkLock(on_broken=self._forget_state)  # guards _identity's tracker
        self._opening = process.ForkLock()  # guards what is made at first use
        self._identity: _Identity | None = None
        self._random_namespaces: set[bytes] = set()
        self._output_device: torch.device | None = None
        self._memory: MemoryTier | None = None
        self._store: LmdbStore | None = None
        self._is_open = False

    def __repr__(self) -> str:
        return f"<torchcache.Cache of {self._target.name}>"

    @property
    def module_hash(self) -> str:
        """The name of what is computed: code, construction arguments, options that shape the values."""
        return self._known().module_hash

    @cached_property
    def options(self) -> CacheOptions:
        """The options in force."""
        return self._make_options()

    @property
    def cache_dir(self) -> Path | None:
        """The subdirectory that holds the LMDB environment; None without a disk tier."""
        self._open()
        return None if self._store is None else self._store.path

    # -- the call -----------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., R], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> R:
        """Return what ``function(*args, **kwargs)`` returns, from the cache where it can.

        Args:
            function: The user's own function, bound to its instance.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            The function's result, detached. It belongs to the caller.

        Raises:
            UncacheableError: If the call has no batch, an argument that cannot be named, or a result whose
                rows are not the batch's.
            Exception: Whatever ``function`` raises.
        """
        if torch.compiler.is_compiling():
            return cast("R", call_uncompiled(self, function, args, kwargs))
        return cast("R", self.call_eagerly(function, args, kwargs))

    def call_eagerly(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """Do what ``call`` says, never to be traced by torch.compile."""
        key = id(self)
        active = _calling.__dict__.setdefault("active", set())
        if key in active or is_disabled():
            return function(*args, **kwargs)
        active.add(key)
        try:
            return self._call(function, args, kwargs)
        finally:
            active.discard(key)

    def _call(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        if _is_exporting():
            return self._bypass("export_or_trace", function, args, kwargs)
        batch = self._signature_of(function).split(args, kwargs)
        reason = batch.bypass_reason()
        if reason:
            return self._bypass(reason, function, args, kwargs, rows=batch.n)
        namespace, reason = self._namespace()
        if reason:
            return self._bypass(reason, function, args, kwargs, rows=batch.n)
        if not batch.n:
            with torch.no_grad():
                output = function(*args, **kwargs)
            return output.detach() if isinstance(output, torch.Tensor) else output
        self._open()
        try:
            digests = batch.digests()
            found, missing = self._look_up(namespace, digests)
            if len({item.layout for item in found}) > 1:
                return self._bypass("rows_do_not_stack", function, args, kwargs, rows=batch.n)
            if not missing:
                return self._assemble(found, batch)
        except MemoryError:
            return self._bypass("out_of_memory", function, args, kwargs, rows=batch.n)
        return self._compute(function, args, kwargs, batch, namespace, digests, found, missing)

    def _namespace(self) -> tuple[bytes, str | None]:
        """Name the present state, and say why a call in it is not cached, if so."""
        try:
            tracker = self._known().tracker
            with self._lock:
                namespace, reason = tracker.fingerprint(), tracker.bypass_reason
        except TorchcacheError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign __repr__ or __eq__ raises
            self.on_fault(error, 0)
            return b"", "unreadable_state"
        if namespace in self._random_namespaces:
            reason = "random_numbers"
        return namespace, reason or self._grad_reason(tracker)

    def _look_up(self, namespace: bytes, digests: Sequence[bytes]) -> tuple[list[Found], list[int]]:
        """Ask memory, the write queue and the disk in turn; what the disk gives goes to memory too."""
        found, missing = self._fetch("memory", namespace, digests, list(range(len(digests))))
        for tier in ("queue", "store"):
            if not missing or self._store is None:
                break
            # Equal rows are fetched once; the others of their kind are filled in from it.
            unique = list({digests[p]: p for p in reversed(missing)}.values())
            more, absent = self._fetch(tier, namespace, digests, sorted(unique))
            if not more:
                continue
            for item in more:
                self._remember(namespace, Rows([digests[p] for p in item.positions], item.layout, item.data))
            if len(unique) == len(missing):
                found, missing = found + more, absent
            else:
                spread, missing = _spread(more, digests, missing)
                found = found + spread
                filled_in = sum(len(item.positions) for item in spread) - sum(len(item.positions) for item in more)
                self._counters.add(duplicates=filled_in)
        return found, missing

    def _fetch(
        self, tier: str, namespace: bytes, digests: Sequence[bytes], positions: Sequence[int]
    ) -> tuple[list[Found], list[int]]:
        """Ask one tier for the samples at ``positions``; faults become misses."""
        wanted = digests if len(positions) == len(digests) else [digests[p] for p in positions]
        found: list[Found] = []
        missing: Sequence[int] = range(len(wanted))
        try:
            if tier == "memory":
                if self._memory is not None:
                    found, missing = self._memory.get_many(namespace, wanted)
            elif tier == "queue":
                found, missing = writer.get_many(self._need_store(), namespace, wanted)
            else:
                lookup = self._need_store().get_many(namespace, wanted)
                found, missing = lookup.found, lookup.missing
                if lookup.corrupt:
                    self._note_fault("corrupt_record", "records fail their check", amount=lookup.corrupt)
                if found and self._need_store().needs_touch(namespace):
                    writer.touch(self._need_store(), self, namespace)
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self.on_fault(error, 0)
            return [], list(positions)
        unknown = [item for item in found if not is_known(item.layout)]
        if unknown:
            found = [item for item in found if is_known(item.layout)]
            missing = sorted([*missing, *(p for item in unknown for p in item.positions)])
        self._counters.add(**{f"{tier}_hits": len(wanted) - len(missing)})
        if len(positions) == len(digests):
            return found, list(missing)
        return (
            [Found([positions[p] for p in item.positions], item.layout, item.data) for item in found],
            [positions[p] for p in missing],
        )

    def _compute(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        batch: Batch,
        namespace: bytes,
        digests: Sequence[bytes],
        found: list[Found],
        missing: list[int],
    ) -> object:
        """Forward the rows that no tier has, equal ones once, and keep what comes back."""
        first: dict[bytes, int] = {}
        for position in missing:
            first.setdefault(digests[position], position)
        unique = list(first.values())
        forwarded = (args, kwargs) if len(unique) == batch.n else batch.select(unique)
        random_before = _random_state()
        with torch.no_grad():
            output = function(*forwarded[0], **forwarded[1])
        if isinstance(output, torch.Tensor) and (kind := unsupported_kind(output)):
            return self._result_of_bypass(kind, output, forwarded, function, args, kwargs, batch)
        try:
            layout, data, overflowed = take_apart(output, len(unique), self.options.cache_dtype)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            return self._result_of_bypass("out_of_memory", output, forwarded, function, args, kwargs, batch)
        self._counters.add(misses=len(unique), duplicates=len(missing) - len(unique))
        self._note_overflow(overflowed)
        self._output_device = output.device
        if _random_state() != random_before:
            if len(self._random_namespaces) < _MOST_RANDOM:
                self._random_namespaces.add(namespace)
            self._note_bypass("random_numbers", 0)
        elif self._has_moved():
            self._counters.add_to("dropped_rows", "state_moved", len(unique))
        else:
            self._keep(namespace, Rows([digests[p] for p in unique], layout, data))
        if len(unique) == batch.n:
            return rounded(output, self.options.cache_dtype)
        if any(item.layout != layout for item in found):
            return self._bypass("rows_do_not_stack", function, args, kwargs, rows=batch.n)
        computed = Found(unique, layout, data)
        spread = [computed] if len(unique) == len(missing) else _spread([computed], digests, missing)[0]
        return self._assemble([*found, *spread], batch)

    def _assemble(self, found: Sequence[Found], batch: Batch) -> torch.Tensor:
        device = self._output_device or self._guess_device(batch)
        layout = found[0].layout
        if len(found) == 1 and list(found[0].positions) == list(range(batch.n)):
            data = found[0].data
        else:
            data = empty_rows(batch.n, layout.nbytes)
            for item in found:
                data[item.positions] = item.data if isinstance(item.data, np.ndarray) else item.data.cpu().numpy()
        return put_together(layout, data, device)

    def _guess_device(self, batch: Batch) -> torch.device:
        parameters = self._known().tracker.parameters
        return parameters[0].device if parameters else batch.first_device

    # -- keeping ------------------------------------------------------------------------------------------------

    def _keep(self, namespace: bytes, rows: Rows) -> None:
        self._remember(namespace, rows)
        if self._store is None:
            return
        queue_bytes, flush_seconds = self.options.queue_bytes, self._flush_seconds()
        if queue_bytes is None:
            queue_bytes = WORKER_QUEUE_BYTES if process.is_child() else DEFAULT_QUEUE_BYTES
        try:
            accepted = writer.put(
                self._store,
                self,
                namespace,
                rows,
                queue_bytes=queue_bytes,
                timeout_seconds=self.options.queue_timeout_seconds,
                flush_seconds=flush_seconds,
            )
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self.on_fault(error, len(rows.digests))
            return
        if not accepted:
            self._counters.add_to("dropped_rows", "queue_full", len(rows.digests))
            self._say(
                "queue_full", "the write queue stayed full for queue_timeout_seconds; rows are not stored on disk"
            )

    def _flush_seconds(self) -> float:
        configured = self.options.flush_timeout_seconds
        if configured is not None:
            return configured
        return WORKER_FLUSH_SECONDS if process.is_child() else DEFAULT_FLUSH_SECONDS

    def _remember(self, namespace: bytes, rows: Rows) -> None:
        if self._memory is None and self.options.memory_cache_device is None and self._output_device is not None:
            self._memory = MemoryTier(self.options.max_memory_cache_size, self._output_device)
        if self._memory is None:
            return
        try:
            self._memory.put_many(namespace, rows)
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
            self._note_fault("memory", f"the memory tier cannot grow ({error})")

    def _has_moved(self) -> bool:
        with self._lock:
            return self._known().tracker.moved()

    # -- what a user may do ---------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Return the counters of this process so far, as an immutable snapshot."""
        values: dict[str, Any] = dict(self._counters.values())
        if self._memory is not None:
            values["memory_rows"], values["memory_bytes"] = self._memory.usage()
        if self._store is not None:
            values["queued_rows"], values["queued_bytes"] = writer.queued(self._store)
            values["store_bytes"] = self._store.used_bytes()
        return CacheStats(**values)

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until every row accepted so far is committed to disk, or dropped and counted.

        Args:
            timeout_seconds: How long at most; ``flush_timeout_seconds`` if None.

        Returns:
            Whether that was reached in time.
        """
        if self._store is None:
            return True
        return writer.flush(self._flush_seconds() if timeout_seconds is None else timeout_seconds, self._store)

    def clear(self) -> None:
        """Forget every value of this module hash: in memory, and on disk for all processes.

        What another process has in memory stays there.
        """
        self.flush()
        if self._memory is not None:
            self._memory.clear()
        if self._store is not None:
            try:
                self._store.delete_all()
            except Exception as error:  # noqa: BLE001 - a fault of the machine is a counter and a line
                self.on_fault(error, 0)

    def refresh(self) -> None:
        """Look at all weights and state afresh at the next call.

        Needed only after a sparse write that torch does not count, such as one element through ``.data``
        or NumPy; everything else is noticed.
        """
        with self._lock:
            self._known().tracker.refresh()
            self._random_namespaces.clear()

    def close(self) -> None:
        """Flush, and give up memory and disk handle; the next cached call opens both again."""
        self.flush()
        if self._memory is not None:
            self._memory.clear()
        if self._store is not None:
            self._store.close()
        self._memory = self._store = None
        self._is_open = False

    # -- what the writer tells ------------------------------------------------------------------------------------

    def on_written(self, written: Written) -> None:
        """Count a commit; called by the writer."""
        self._counters.add(written_rows=written.rows, written_bytes=written.nbytes)
        for reason, amount in written.dropped.items():
            self._counters.add_to("dropped_rows", reason, amount)

    def on_fault(self, error: BaseException, rows: int) -> None:
        """Count a fault that became a miss, or rows that were not stored; called by the writer too."""
        kind = error.kind if isinstance(error, StoreError) else type(error).__name__
        if rows:
            self._counters.add_to("dropped_rows", kind, rows)
        self._note_fault(kind, str(error))

    # -- setting up -------------------------------------------------------------------------------------------------

    def _known(self) -> _Identity:
        """Return what identifies the results; found out at first use, when all names are defined."""
        identity = self._identity
        if identity is not None:
            return identity
        with self._opening:
            if self._identity is None:
                self._identity = self._identify()
            return self._identity

    def _identify(self) -> _Identity:
        options, target = self.options, self._target
        module = None if target.module is None else target.module()
        named = options.persistent_module_hash
        if named:
            walk, module_hash = None, named
        else:
            walk = walk_code(target.code, [] if module is None else [type(m) for m in module.modules()])
            arguments = os.urandom(16) if target.arguments is None else target.arguments
            parts = [f"torchcache record {FORMAT_VERSION}".encode(), walk.fingerprint, arguments]
            parts += [part.encode() for pair in options.key_parts() for part in pair]
            module_hash = digest_parts(parts).hex()
        logger.info("module hash of %s: %s", target.name, module_hash)
        if named:
            logger.info(
                "%s is cached under your own name %s: changes of code, arguments and weights do not "
                "invalidate it", target.name, named,
            )  # fmt: skip
        salt = digest_parts([b"namespace", module_hash.encode()])
        return _Identity(module_hash, salt, walk, target.module, StateTracker(target.module, walk, salt))

    def _signature_of(self, function: Function) -> CallSignature:
        plain: Any = unwrap(getattr(function, "__func__", function))
        signature = self._signatures.get(plain)
        if signature is None:
            # The base's forward, called past the decorated one, gives other results for the same input.
            label = "" if plain is unwrap(self._target.function) else getattr(plain, "__qualname__", "")
            signature = CallSignature(plain, is_method=hasattr(function, "__self__"), label=label)
            self._signatures[plain] = signature
        return signature

    def _open(self) -> None:
        if self._is_open:
            return
        module_hash = self.module_hash
        with self._opening:
            if not self._is_open:
                self._open_tiers(module_hash)
                self._is_open = True

    def _open_tiers(self, module_hash: str) -> None:
        options = self.options
        if self._memory is None and options.max_memory_cache_size > 0 and options.memory_cache_device is not None:
            self._memory = MemoryTier(options.max_memory_cache_size, options.memory_cache_device)
        if self._store is None and options.persistent and options.max_persistent_cache_size > 0:
            try:
                self._store = self._open_store(module_hash)
            except Exception as error:  # noqa: BLE001 - a fault of the machine: the run goes on in memory
                self.on_fault(error, 0)

    def _open_store(self, module_hash: str) -> LmdbStore:
        options = self.options
        path = options.persistent_cache_dir
        if path is None or (self._target.arguments is None and not options.persistent_module_hash):
            path = temporary_directory()
        settings = StoreSettings(
            budget_bytes=options.max_persistent_cache_size,
            eviction=options.eviction,
            zstd_level=options.zstd_compression_level if options.zstd_compression else None,
            lock_timeout_seconds=options.lock_timeout_seconds,
        )
        store = LmdbStore(CacheDirectory(path), module_hash, settings)
        store.announce()
        return store

    def _need_store(self) -> LmdbStore:
        assert self._store is not None
        return self._store

    def _forget_state(self) -> None:
        if self._identity is not None:
            self._identity = self._identity.renewed()

    # -- going around -----------------------------------------------------------------------------------------------

    def _grad_reason(self, tracker: StateTracker) -> str | None:
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in tracker.parameters):
            return None
        when = self.options.when_grad
        if when == "bypass":
            return "parameters_require_grad"
        if when == "raise":
            raise UncacheableError(
                f"parameters of {self._target.name} require grad and when_grad='raise': call "
                "requires_grad_(False) on them, or call it under torch.no_grad()"
            )
        self._say(
            "detach",
            "parameters require grad, but cached outputs are detached, so they will not be trained; if that is "
            "meant, call requires_grad_(False) on the module; if not, set when_grad='bypass'",
        )
        return None

    def _bypass(
        self, reason: str, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int = 0
    ) -> object:
        self._note_bypass(reason, rows)
        return function(*args, **kwargs)

    def _result_of_bypass(
        self,
        reason: str,
        output: object,
        forwarded: tuple[tuple[Any, ...], Mapping[str, Any]],
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        batch: Batch,
    ) -> object:
        """Return a result that cannot be cached; compute it again only if rows were left out."""
        if forwarded[0] is not args:
            return self._bypass(reason, function, args, kwargs, rows=batch.n)
        self._note_bypass(reason, batch.n)
        return output

    def _note_bypass(self, reason: str, rows: int) -> None:
        self._counters.add_to("bypasses", reason)
        self._counters.add(bypassed_rows=rows)
        self._say(f"bypass {reason}", f"the cache is bypassed: {_REMEDIES.get(reason, _OTHER_REMEDY)} ({reason})")

    def _note_fault(self, kind: str, message: str, amount: int = 1) -> None:
        self._counters.add_to("faults", kind, amount)
        warn_once(("fault", kind), "%s: %s; it goes on without (fault %r, said once)", self._target.name, message, kind)

    def _note_overflow(self, amount: int) -> None:
        if amount:
            self._counters.add(overflowed_values=amount)
            self._say("overflow", f"cache_dtype={self.options.cache_dtype} made finite values infinite")

    def _say(self, kind: str, message: str) -> None:
        """Say something once per target and kind."""
        warn_once((self._target.name, kind), "%s: %s", self._target.name, message)


def _spread(
    found: Sequence[Found], digests: Sequence[bytes], positions: Sequence[int]
) -> tuple[list[Found], list[int]]:
    """Give each of ``positions`` the row that was found for an equal sample; return what is still missing."""
    source = {digests[p]: (k, row) for k, item in enumerate(found) for row, p in enumerate(item.positions)}
    takers: list[tuple[list[int], list[int]]] = [([], []) for _ in found]
    missing: list[int] = []
    for position in positions:
        place = source.get(digests[position])
        if place is None:
            missing.append(position)
        else:
            takers[place[0]][0].append(position)
            takers[place[0]][1].append(place[1])
    spread = [
        Found(where, item.layout, item.data[rows]) for item, (where, rows) in zip(found, takers, strict=True) if where
    ]
    return spread, missing


def _is_exporting() -> bool:
    return (
        torch._C._get_tracing_state() is not None  # noqa: SLF001 - what torch.jit.is_tracing asks, typed
        or torch.compiler.is_exporting()
        or torch.onnx.is_in_onnx_export()
    )


def _random_state() -> tuple[object, ...]:
    """Return something that differs if random numbers were drawn from a global generator meanwhile."""
    states: list[object] = [torch.default_generator.get_state().numpy().tobytes(), random.getstate()]
    kind, keys, position, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what is asked about
    states += [kind, bytes(np.asarray(keys)), position, *rest]
    if torch.cuda.is_initialized():
        states += [g.get_state().numpy().tobytes() for g in torch.cuda.default_generators]
    return tuple(states)
