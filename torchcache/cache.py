"""The cached call: what it goes through, and what a user may ask of its cache."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import local
from types import FunctionType
from typing import Any, TypeVar, cast

import torch

from torchcache.computing import Computer
from torchcache.errors import (
    CacheMissError,
    ConfigError,
    CorruptRecordError,
    TorchcacheError,
    UncacheableError,
)
from torchcache.explanation import Explanation, SampleExplanation
from torchcache.identity import FixedIdentity, Function, Identity, Look, Target
from torchcache.keys.code import unwrap
from torchcache.keys.digest import digest_parts
from torchcache.keys.ranks import is_in_a_job
from torchcache.layout import Found
from torchcache.notices import Notices
from torchcache.options import CacheOptions
from torchcache.outputs import detached
from torchcache.own_keys import WatchedKeys, current_keys
from torchcache.recheck import Verdicts
from torchcache.samples import CallSignature
from torchcache.stats import CacheStats
from torchcache.storage.contract import Verdict
from torchcache.storage.writer import (
    writer,
)
from torchcache.tiers import CachedCall, Tiers

R = TypeVar("R")

#: What else is to be said of detached outputs of parameters that require grad, in a job of several ranks.
_REDUCER_WAITS = (
    ". Under DistributedDataParallel, one of the two is needed: it waits for the gradients of all parameters that "
    "required grad when it was made, and the second iteration fails with 'Expected to have finished reduction in the "
    "prior iteration'"
)

#: How many bytes of weights are compared in a millisecond; a comparison that takes longer is mentioned in the log.
_BYTES_PER_MILLISECOND = 10_000_000

#: So many samples that are not cached are named in an error, and so many parts of a key of one kind: a large model has
#: hundreds of weights.
_MOST_SAMPLES_NAMED = 5
_MOST_PARTS_NAMED = 16

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


def flush_all(timeout_seconds: float | None = None) -> bool:
    """Wait until every row that any cache of this process accepted so far is committed, or dropped and counted.

    Other processes see a row as soon as it is committed. DDP ranks that call this and then wait for each other
    at a barrier compute nothing that another one of them has computed before.

    Args:
        timeout_seconds: How long at most; the longest ``flush_timeout_seconds`` of the caches if None.

    Returns:
        Whether that was reached in time.
    """
    return writer.flush(writer.flush_seconds if timeout_seconds is None else timeout_seconds)


def call_uncompiled(cache: Cache, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """Make a cached call a graph break for torch.compile: nothing inside it is traced.

    ``torch.compiler.disable`` is asked here, not when decorating: it takes a second to import.
    """
    return torch.compiler.disable(cache.call_eagerly)(function, args, kwargs)


call_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined] # noqa: SLF001 - what disable() sets


class Cache:
    """The cache of one module instance, one function, or one method of an object, in this process.

    Get it with ``torchcache.cache_of(target)`` or as ``target.cache_instance``. All methods are safe from
    any thread. A fault of disk, lock or stored bytes never leaves a cached call: it becomes a miss, a
    counter in ``stats().faults`` and one line in the log per kind.
    """

    def __init__(
        self, target: Target, options: Callable[[], CacheOptions], identity: Identity | FixedIdentity | None = None
    ) -> None:
        self._target = target
        self._make_options = options  # asked at first use: a module's attributes count
        self._notices = Notices(target.name, target.remedies)
        self._signatures: dict[Function, CallSignature] = {}
        self._identity: Identity | FixedIdentity = identity or Identity(target, lambda: self.options)
        self._verdicts = Verdicts()
        self._tiers = Tiers(lambda: self.options, self._notices, self._verdicts, self._identity.classes)
        self._computer = Computer(lambda: self.options, self._identity, self._tiers, self._verdicts, self._notices)
        self._watched_keys = WatchedKeys()
        self._last_namespace: tuple[Look | None, bytes, bytes] = (None, b"", b"")

    def __repr__(self) -> str:
        return f"<torchcache.Cache of {self._target.name}>"

    @property
    def module_hash(self) -> str:
        """The name of what is computed: code, construction arguments, options that shape the values."""
        return self._identity.module_hash()

    def identify(self) -> None:
        """Find out the module hash now: of ``Net().cache_instance`` the module is gone a moment later."""
        with contextlib.suppress(Exception):  # what cannot be read is said by the call
            self._identity.module_hash()

    @cached_property
    def options(self) -> CacheOptions:
        """The options in force."""
        return self._make_options()

    @property
    def cache_dir(self) -> Path | None:
        """The subdirectory that holds the LMDB environment; None without a disk tier."""
        store = self._tiers.open(self._look())
        return None if store is None else store.path

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
                rows are not the batch's, and no call was cached before. Later ones go around the cache.
            CacheMissError: If ``mode="require"`` and something would have to be computed.
            Exception: Whatever ``function`` raises.
        """
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
                # Strict export traces this; it takes no graph break, and could trace no counter.
                return function(*args, **kwargs)
            return cast("R", call_uncompiled(self, function, args, kwargs))
        return cast("R", self.call_eagerly(function, args, kwargs))

    def call_eagerly(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """Do what ``call`` says, never to be traced by torch.compile."""
        key = id(self)
        active = _calling.__dict__.setdefault("active", set())
        if key in active or is_disabled() or self.options.mode == "off":
            return function(*args, **kwargs)
        active.add(key)
        try:
            return self._call(function, args, kwargs)
        finally:
            active.discard(key)

    def _call(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        if _is_exporting():
            return self._bypass("export_or_trace", function, args, kwargs)
        try:
            batch = self._signature_of(function).split(args, kwargs)
        except UncacheableError as error:
            if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
                return self._bypass("export_or_trace", function, args, kwargs)
            return self.refuse(error, function, args, kwargs)
        except RecursionError:
            return self._bypass("opaque_state", function, args, kwargs, evidence="an argument lies too deep")
        reason = batch.bypass_reason()
        if reason:
            return self._bypass(reason, function, args, kwargs, rows=batch.n, evidence=batch.evidence)
        look = self._look()
        reason = look.reason or self._grad_reason()
        if reason:
            return self._bypass(reason, function, args, kwargs, rows=batch.n, evidence=look.evidence)
        if not batch.n:
            if self.options.mode == "require":
                raise self._miss(function, args, kwargs, reason="empty_batch")
            with torch.no_grad():
                return detached(function(*args, **kwargs))
        signature = batch.signature()
        namespace = self._namespace_of(look, batch.form(signature))
        reason = self._verdict_against(namespace)
        if reason:
            return self._bypass(reason, function, args, kwargs, rows=batch.n)
        try:
            keys = current_keys(batch.n) if batch.is_divisible else None
        except UncacheableError as error:
            return self.refuse(error, function, args, kwargs, rows=batch.n)
        store, options = self._tiers.open(look), self.options
        call = CachedCall(
            function, args, kwargs, batch, store if options.looks_up else None, store if options.writes else None,
            namespace, keys=keys, landings=self._computer.flights.landings,
        )  # fmt: skip
        try:
            call.digests = batch.digests(signature, call.keys)
            if call.keys is None:
                self._identity.note_hashed(batch.host_bytes)
            found: list[Found] = []
            missing = [*range(batch.n)]
            call.is_unchecked = batch.n > 1 and self._is_unchecked(call) and not self._computer.are_copies(call)
            if options.looks_up and (not call.is_unchecked or options.mode == "require"):
                found, missing = self._tiers.look_up(call)
            if call.keys is not None:
                opened = self._watched_keys.open(batch, call.digests, found)
                if opened is None:
                    return self._go_around("sample_key_of_other_inputs", call)
                found = opened
            # The store may have brought the verdict of another process.
            if self._verdicts.of(call.namespace) is Verdict.DEPENDENT:
                return self._go_around("rows_depend_on_batch", call)
            if not batch.results.do_stack(found):
                return self._go_around("rows_do_not_stack", call)
            if missing and options.mode == "require":
                raise self._miss(function, args, kwargs, missing=missing)
            if call.is_unchecked and options.mode == "require":
                raise self._miss(function, args, kwargs, reason="rows_not_checked")
            doubted = self._computer.choose(found) if options.verify_hits and options.mode != "require" else []
            if not missing and not doubted:
                return self._computer.assemble(found, call)
        except (MemoryError, torch.OutOfMemoryError):
            return self._go_around("out_of_memory", call)
        except CorruptRecordError as error:
            self._notices.error(error, 0)
            return self._go_around("result_cannot_be_rebuilt", call)
        if self._identity.settle(look):
            return self._call(function, args, kwargs)
        can_wait = len(_calling.active) == 1 and not call.is_unchecked
        return self._computer.compute(call, found, missing, doubted, can_wait=can_wait)

    def _look(self) -> Look:
        """Name the present state, and say why a call in it is not cached, if so."""
        try:
            look = self._identity.look()
        except TorchcacheError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign __repr__ or __eq__ raises
            self._notices.error(error, 0)
            return Look("", b"", is_private=True, reason="unreadable_state")
        return look

    def _is_unchecked(self, call: CachedCall) -> bool:
        """Tell whether it is not known yet if rows depend on their batch, here or to the store."""
        if self._computer.knows_rows(call):
            return False
        self._tiers.learn_verdict(call)
        return not self._computer.knows_rows(call)

    def _verdict_against(self, namespace: bytes) -> str | None:
        """Say what earlier calls of a namespace showed that speaks against caching it, or None."""
        if self._verdicts.of(namespace) is Verdict.DEPENDENT:
            return "rows_depend_on_batch"
        return self._verdicts.effect(namespace)

    def _namespace_of(self, look: Look, form: bytes) -> bytes:
        """Name the state and the form of a call.

        Unchecked rows are kept apart, so that check_rows=False starts afresh where rows were found to depend.
        """
        last_look, last_form, namespace = self._last_namespace
        if look is not last_look or form != last_form:
            namespace = digest_parts(
                [look.namespace, form, b"checked twice" if self.options.check_rows else b"unchecked"]
            )
            self._last_namespace = look, form, namespace
        return namespace

    # -- what a user may do ---------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Return the counters of this process so far, as an immutable snapshot."""
        values: dict[str, Any] = {**self._notices.counters.values(), **self._tiers.usage()}
        return CacheStats(**values)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Say what the key of a call is made of and where each sample would be found; prints it as well.

        Nothing is computed, and nothing that is counted or remembered changes. Two explanations show with
        ``differences`` which part makes two calls miss each other.

        Args:
            *args: Positional arguments of the call.
            **kwargs: Keyword arguments of the call.

        Raises:
            UncacheableError: As the call would.
            ConfigError: If the module or object is gone.
        """
        function = self._target.function
        instance = None if self._target.instance is None else self._target.instance()
        if instance is None and self._target.instance is not None:
            raise ConfigError(f"the instance behind {self!r} is gone; keep a reference to it")
        if self._target.is_method and isinstance(function, FunctionType):
            function = function.__get__(instance)
        explanation = self._explain(function, args, kwargs)
        print(explanation)  # noqa: T201 - that is what was asked for
        return explanation

    def _explain(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Explanation:
        batch = self._signature_of(function).split(args, kwargs)
        identity = self._identity.apart()
        look = identity.look()
        is_off = is_disabled() or self.options.mode == "off"
        reason = "disabled" if is_off else batch.bypass_reason() or look.reason or self._grad_reason()
        parts = [*identity.describe(), *((name, digest_parts([value])) for name, value in batch.shared_parts())]
        signature = batch.signature()
        namespace = self._namespace_of(look, batch.form(signature))
        reason = reason or self._verdict_against(namespace)
        keys = current_keys(batch.n) if batch.is_divisible else None
        digests = [] if batch.bypass_reason() else batch.digests(signature, keys)
        places = ["nowhere"] * len(digests)
        if reason is None and digests:
            places = self._tiers.places(look, namespace, digests)
        return Explanation(
            target=self._target.name,
            module_hash=look.module_hash,
            namespace=namespace.hex(),
            bypass_reason=reason,
            parts={name: digest.hex() for name, digest in parts},
            samples=tuple(
                SampleExplanation(digest=digest.hex(), found_in=place)
                for digest, place in zip(digests, places, strict=True)
            ),
        )

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until every row accepted so far is committed to disk, or dropped and counted.

        Args:
            timeout_seconds: How long at most; ``flush_timeout_seconds`` if None.

        Returns:
            Whether that was reached in time.
        """
        return self._tiers.flush(timeout_seconds)

    def clear(self) -> None:
        """Forget every value of this module hash: in memory, and on disk for all processes.

        What another process has in memory stays there. In ``mode="read"`` and ``"require"`` the disk is left as it
        is, which the log says.
        """
        self.flush()
        self._verdicts.clear()
        self._tiers.clear_memory()
        if self.options.writes:
            self._tiers.clear_disk()
        elif self._tiers.open_stores():
            self._notices.say(
                "clear", f"clear() empties memory only, since mode={self.options.mode!r} writes nothing to disk"
            )

    def refresh(self) -> None:
        """Look at all weights and state afresh at the next call.

        Needed only after a write that torch does not count, such as one element through ``.data`` or NumPy, to a tensor
        that does not require grad, and after such a write to one on an accelerator; everything else is noticed at once.
        """
        self._identity.refresh()
        self._verdicts.clear()

    def close(self) -> None:
        """Flush, and give up memory and disk handle; the next cached call opens both again."""
        self.flush()
        self._tiers.close()

    # -- setting up -------------------------------------------------------------------------------------------------

    def _signature_of(self, function: Function) -> CallSignature:
        plain: Any = unwrap(getattr(function, "__func__", function))
        signature = self._signatures.get(plain)
        if signature is None:
            # The base's forward, called past the decorated one, gives other results for the same input.
            is_target = plain is unwrap(self._target.function)
            label = self._target.method if is_target else getattr(plain, "__qualname__", "")
            is_method = hasattr(function, "__self__")
            signature = CallSignature.of_options(plain, self.options, is_method=is_method, label=label)
            self._signatures[plain] = signature
        return signature

    # -- going around -----------------------------------------------------------------------------------------------

    def refuse(
        self,
        error: UncacheableError,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        rows: int = 0,
    ) -> object:
        """Raise ``error`` while the target is being set up; later, compute a call that cannot be cached.

        A run must not end hours after it began for what the cache cannot do and the target can.
        """
        if not self._notices.has_served():
            raise error
        return self._bypass("unsupported_call", function, args, kwargs, rows=rows, evidence=str(error))

    def _grad_reason(self) -> str | None:
        n_bytes = self._identity.whole_bytes()
        cost = _cost_of(n_bytes) if n_bytes > _BYTES_PER_MILLISECOND else ""
        if not torch.is_grad_enabled() or not self._identity.requires_grad():
            if cost:
                self._notices.say(
                    "cost",
                    f"weights that require grad or were made in inference mode are compared at each call: {cost}; if "
                    "that is too slow, call requires_grad_(False) on the module and make it outside of inference mode",
                )
            return None
        when = self.options.when_grad
        if when == "bypass":
            return "parameters_require_grad"
        if when == "raise":
            raise UncacheableError(
                f"parameters of {self._target.name} require grad and when_grad='raise': call "
                "requires_grad_(False) on them, or call it under torch.no_grad()"
            )
        self._notices.say(
            "detach",
            "parameters require grad, but cached outputs are detached, so they will not be trained; if that is "
            "meant, call requires_grad_(False) on the module"
            + (f", which also spares the comparison of {cost} at each call" if cost else "")
            + "; if not, set when_grad='bypass'"
            + (_REDUCER_WAITS if is_in_a_job() else ""),
        )
        return None

    def _bypass(
        self,
        reason: str,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        rows: int = 0,
        evidence: str = "",
    ) -> object:
        if self.options.mode == "require":
            raise self._miss(function, args, kwargs, reason=reason, evidence=evidence)
        self._notices.bypass(reason, rows, evidence)
        return function(*args, **kwargs)

    def _miss(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        reason: str = "",
        evidence: str = "",
        missing: Sequence[int] = (),
    ) -> CacheMissError:
        """Make the error of a call that would have to be computed in ``mode="require"``."""
        explanation: Explanation | None = None
        with contextlib.suppress(Exception):  # what cannot be explained is an error all the same
            explanation = self._explain(function, args, kwargs)
        samples = () if explanation is None else explanation.samples
        name = self._target.name
        if reason:
            because = self._notices.because(reason, evidence)
            text = f"{name} would have to be computed, and mode='require' computes nothing: {because}"
        else:
            shown = [f"{p} ({samples[p].digest[:8]})" if samples else str(p) for p in missing[:_MOST_SAMPLES_NAMED]]
            positions = ", ".join(shown + ["..."] * (len(missing) > len(shown)))
            text = (
                f"{len(missing)} samples of a call of {name} are not cached, and mode='require' computes nothing "
                f"(positions {positions}); {self._where_it_looked()}. Run it with mode='on' there first; if that was "
                "done, compare the key below, or all of it in the error's explanation, with explain() there"
            )
        if samples and any(samples[p].found_in != "nowhere" for p in missing):
            text += (
                ". Some of them are cached as a class that this program does not know: refer to it in the code of "
                "what is cached"
            )
        if explanation is not None:
            explanation = replace(explanation, bypass_reason=reason or None)
            text += f"\n{_condensed(explanation)}"
        return CacheMissError(text, explanation=explanation, missing=tuple(missing))

    def _where_it_looked(self) -> str:
        look = self._look()
        store = self._tiers.open(look)
        if look.is_private:
            place = "something has no stable name, so no other process can fill it unless persistent_module_hash is set"
        elif store is None:
            place = "there is no directory to look in"
        else:
            place = f"they were looked for in {store.path}" + ("" if store.is_present() else ", where nothing is yet")
        return place + (f" (last fault: {self._notices.last_fault})" if self._notices.last_fault else "")

    def _go_around(self, reason: str, call: CachedCall) -> object:
        return self._bypass(reason, call.function, call.args, call.kwargs, rows=call.batch.n)


def _condensed(explanation: Explanation) -> Explanation:
    """Return an explanation without samples, with one digest for all parts of a kind of which there are many."""
    kinds: dict[str, list[str]] = {}
    for name in explanation.parts:
        kinds.setdefault(name.partition(" ")[0], []).append(name)
    parts: dict[str, str] = {}
    for kind, names in kinds.items():
        digests = [explanation.parts[name] for name in names]
        if len(names) <= _MOST_PARTS_NAMED:
            parts.update(zip(names, digests, strict=True))
        else:
            together = digest_parts(text.encode() for pair in zip(names, digests, strict=True) for text in pair)
            parts[f"{kind}, all {len(names)}"] = together.hex()
    return replace(explanation, parts=parts, samples=())


def _cost_of(n_bytes: int) -> str:
    """Say how much is compared, and for how long."""
    return f"{n_bytes / 1e6:.0f} MB, some {n_bytes / _BYTES_PER_MILLISECOND:.0f} ms"


def _is_exporting() -> bool:
    return (
        torch._C._get_tracing_state() is not None  # noqa: SLF001 - what torch.jit.is_tracing asks, typed
        or torch.compiler.is_exporting()
        or ("torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export())
    )
