"""What a user may ask of the cache of one target."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

import torch

from torchcache.call.call import Caller
from torchcache.call.disabled import is_disabled
from torchcache.checks.verdicts import Verdicts
from torchcache.errors import ConfigError, UncacheableError
from torchcache.explanation import Explanation
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.contract import AnyIdentity
from torchcache.keys.identity import Function, Identity, Target
from torchcache.options import CacheOptions
from torchcache.process import ForkLock
from torchcache.report.go_around import NOTHING
from torchcache.report.notices import Notices
from torchcache.report.stats import CacheStats
from torchcache.storage.backlogs import await_debts, debts_of_descendants
from torchcache.storage.writer import writer
from torchcache.tiers.tiers import Tiers

R = TypeVar("R")


def flush_all(timeout_seconds: float | None = None) -> bool:
    """Wait until every row that any cache accepted so far is committed, or dropped and counted.

    These are the caches of this process and of those that it started: workers of a DataLoader or of a pool, and
    theirs. Other processes see a row as soon as it is committed. DDP ranks that call this and then wait for each other
    at a barrier compute nothing that another one of them has computed before.

    Args:
        timeout_seconds: How long at most; the longest ``flush_timeout_seconds`` of the caches if None.

    Returns:
        Whether that was reached in time; True also if a worker ended before, whatever it had not committed.
    """
    debts = debts_of_descendants()
    if timeout_seconds is None:
        timeout_seconds = max([writer.flush_seconds(), *(debt.wait.seconds() for debt in debts)])
    deadline = time.monotonic() + timeout_seconds
    is_flushed = writer.flush(timeout_seconds)
    return not await_debts(debts, deadline - time.monotonic()) and is_flushed


def call_uncompiled(cache: Cache, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """Make a cached call a graph break for torch.compile: nothing inside it is traced.

    ``torch.compiler.disable`` is asked here, not when decorating: it takes a second to import.
    """
    return torch.compiler.disable(cache.call_eagerly)(function, args, kwargs)


call_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined] # noqa: SLF001 - what disable() sets


@dataclass(frozen=True, slots=True)
class _Core:
    """What a cache is made of once its options are final."""

    options: CacheOptions
    tiers: Tiers
    identity: AnyIdentity
    caller: Caller


class Cache:
    """The cache of one module instance, one function, or one method of an object, in this process.

    Get it with ``torchcache.cache_of(target)`` or as ``target.cache_instance``. All methods are safe from
    any thread. A fault of disk, lock or stored bytes never leaves a cached call: it becomes a miss, a
    counter in ``stats().faults`` and one line in the log per kind.

    Args:
        target: What is cached.
        options: Those known so far; ``_final_options`` may still merge others.
    """

    def __init__(self, target: Target, options: CacheOptions) -> None:
        self._target = target
        self._options = options
        self._notices = Notices(target.name, target.remedies)
        self._making = ForkLock()
        self._made: _Core | None = None  # made at first use, when the options are final; guarded by _making

    def __repr__(self) -> str:
        return f"<torchcache.Cache of {self._target.name}>"

    def __getstate__(self) -> tuple[Target, CacheOptions]:
        """Return what a pickle keeps: not what was cached, which a process has for itself or shares on disk.

        Raises:
            TypeError: If only the target has what the cache is made of.
        """
        if type(self) is not Cache:
            raise TypeError(
                f"{self!r} cannot be pickled; send what it is the cache of, and ask that for cache_instance"
            )
        return self._target, self._options

    def __setstate__(self, state: tuple[Target, CacheOptions]) -> None:
        target, options = state
        self.__init__(target.as_copy(), options)  # type: ignore[misc] # a new cache

    @property
    def module_hash(self) -> str:
        """The name of what is computed: code, construction arguments, options that shape the values."""
        return self._core.identity.module_hash()

    def identify(self) -> None:
        """Find out the module hash now: of ``Net().cache_instance`` the module is gone a moment later."""
        with contextlib.suppress(Exception):  # what cannot be read is said by the call
            self._core.identity.module_hash()

    @property
    def options(self) -> CacheOptions:
        """The options in force."""
        return self._core.options

    @property
    def cache_dir(self) -> Path | None:
        """The subdirectory that holds the LMDB environment; None without a disk tier."""
        core = self._core
        store = core.tiers.open(core.caller.state.look())
        return None if store is None else store.path

    def _instance(self) -> object:
        """Return the module or object that is cached, or whose method is; None for a function.

        Raises:
            ConfigError: If it is gone.
        """
        reference = self._target.instance
        if reference is None:
            return None
        instance = reference()
        if instance is None:
            raise ConfigError(f"the instance behind {self!r} is gone; keep a reference to it")
        return instance

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
        core = self._made
        if core is None:
            return cast("R", self.call_eagerly(function, args, kwargs))
        answer: R = core.caller.call(function, args, kwargs)
        return answer

    def recall(self, function: Function, calls: Sequence[tuple[object, ...]]) -> list[object]:
        """Return what the tiers have of many calls, each of which is one sample with plain arguments by position.

        Returns:
            The result of each; a ``CachedCall``, which ``compute`` takes, if it is not there; NOTHING where ``call``
            has to be asked.
        """
        if torch.compiler.is_compiling() or is_disabled():
            return [NOTHING] * len(calls)
        return self._core.caller.recall(function, calls)

    def compute(self, missing: CachedCall) -> object:
        """Return the result of a call that ``recall`` did not find, and keep it."""
        return self._core.caller.compute(missing)

    def call_eagerly(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """Do what ``call`` says, never to be traced by torch.compile, and also where nothing was called before."""
        if is_disabled():  # which is no use of the cache: its options may still change
            return function(*args, **kwargs)
        return self._core.caller.call(function, args, kwargs)

    # -- what is made at first use --------------------------------------------------------------------------------

    @property
    def _core(self) -> _Core:
        """What the cache is made of; from the first time it is asked for, the options are final."""
        if self._made is not None:
            return self._made
        options = self._final_options()  # may run code of the user's, so not under the lock
        with self._making.raw:
            if self._made is None:
                self._made = self._make_core(options)
            return self._made

    def _make_core(self, options: CacheOptions) -> _Core:
        tiers = Tiers(options, self._notices)
        identity = self._make_identity(options, tiers)
        caller = Caller(self._target, options, identity, tiers, Verdicts(), self._notices)
        return _Core(options, tiers, identity, caller)

    def _final_options(self) -> CacheOptions:
        """Return the options in force."""
        return self._options

    def _make_identity(self, options: CacheOptions, tiers: Tiers) -> AnyIdentity:  # noqa: ARG002 - lazy modules note in the tiers what they built
        """Return what names the results."""
        return Identity(self._target, options)

    # -- what a user may do ---------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Return the counters of this process so far, as an immutable snapshot."""
        values: dict[str, Any] = dict(self._notices.counters.values())
        core = self._made
        if core is not None:
            values.update(core.tiers.usage())
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
        instance = self._instance()
        if self._target.is_method and isinstance(function, FunctionType):
            function = function.__get__(instance)
        is_off = is_disabled() or self.options.mode == "off"
        explanation = self._core.caller.explainer.explain(function, args, kwargs, is_off=is_off)
        print(explanation)  # noqa: T201 - that is what was asked for
        return explanation

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until every row accepted so far is committed to disk, or dropped and counted.

        Args:
            timeout_seconds: How long at most; ``flush_timeout_seconds`` if None.

        Returns:
            Whether that was reached in time.
        """
        core = self._made
        return core is None or core.tiers.flush(timeout_seconds)

    def clear(self) -> None:
        """Forget every value of this module hash: in memory, and on disk for all processes.

        What another process has in memory stays there. In ``mode="read"`` and ``"require"`` the disk is left as it
        is, which the log says.
        """
        core = self._core
        core.tiers.flush(None)
        core.caller.forget_findings()
        core.tiers.clear_memory()
        if core.options.writes:
            core.tiers.clear_disk()
        elif core.tiers.open_stores():
            self._notices.say(
                "clear", f"clear() empties memory only, since mode={core.options.mode!r} writes nothing to disk"
            )

    def refresh(self) -> None:
        """Look at all weights and state afresh at the next call.

        Needed only after a write that torch does not count, such as one element through ``.data`` or NumPy, to a tensor
        that does not require grad, and after such a write to one on an accelerator; everything else is noticed at once.
        """
        core = self._made
        if core is not None:  # else nothing was looked at, and no call could have shown anything
            core.identity.refresh()
            core.caller.forget_findings()

    def close(self) -> None:
        """Flush, and give up memory and disk handle; the next cached call opens both again."""
        core = self._made
        if core is not None:
            core.tiers.flush(None)
            core.tiers.close()

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
        return self._core.caller.refuse(error, function, args, kwargs, rows)
