"""The way of one call: split, key, look up, compute, assemble.

This is the only place that decides what a call costs that cannot be cached: whatever is found out below of such a call
comes here as a ``GoAround``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from threading import local
from typing import Any, NoReturn

import torch

from torchcache.call.assembly import Assembly
from torchcache.call.computing import Computer
from torchcache.call.disabled import is_disabled
from torchcache.call.explaining import Explainer
from torchcache.call.items import Items
from torchcache.call.joining import Joining
from torchcache.call.key import Keys
from torchcache.call.misses import Misses
from torchcache.call.parts import Parts
from torchcache.call.relatives import Relatives
from torchcache.call.repeats import Repeats
from torchcache.call.settled import Settled
from torchcache.call.state import State
from torchcache.checks.checks import Checks
from torchcache.checks.verdicts import Verdicts
from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.inputs.batch import Batch
from torchcache.inputs.cached_call import CachedCall
from torchcache.inputs.sample_keys import WatchedKeys, keys_of
from torchcache.keys.contract import AnyIdentity
from torchcache.keys.identity import Function, Target
from torchcache.layout import Found
from torchcache.options import CacheOptions
from torchcache.report.go_around import NOTHING, GoAround
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason
from torchcache.results.rows import detached
from torchcache.storage.contract import Verdict
from torchcache.tiers.tiers import Tiers

_calling = local()  # .active: ids of the callers whose call is under way in this thread


class Caller:
    """Answers the calls of one target.

    Args:
        target: What is cached.
        options: The options in force.
        identity: The state that shapes results.
        tiers: Where rows are kept.
        verdicts: What is known of namespaces.
        notices: Counts and logs what happens.
    """

    def __init__(
        self,
        target: Target,
        options: CacheOptions,
        identity: AnyIdentity,
        tiers: Tiers,
        verdicts: Verdicts,
        notices: Notices,
    ) -> None:
        self._is_off = options.mode == "off"
        self._must_hit = options.mode == "require"
        self._looks_up = options.looks_up
        self._writes = options.writes
        self._is_audited = bool(options.verify_hits) and not self._must_hit
        self._identity = identity
        self._tiers = tiers
        self._verdicts = verdicts
        self._notices = notices
        self._watched_keys = WatchedKeys()
        self.keys: Keys = Keys(target, options)
        self.state: State = State(target.name, identity, options, notices)
        self._assembly = Assembly(identity, tiers)
        self._settled = Settled(tiers, options)
        self._repeats = Repeats(options, identity, notices)
        self._relatives = Relatives(target.name, options, identity, tiers, notices)
        self._checks = Checks(target, options, identity, self.keys.namespace_of, tiers.known, verdicts, notices)
        computer = Computer(
            options, tiers, self._checks, self._assembly, verdicts, self._settled, self._relatives, notices
        )
        self.joining: Joining = Joining(options, computer, tiers, notices)
        self._parts = Parts(target.name, options, self.keys, self.joining, self._checks.witness, notices)
        self.explainer: Explainer = Explainer(
            target.name, self.keys, self.state, identity, tiers, self._checks, verdicts, self._settled
        )
        flights = self.joining.flights
        self._items = Items(options, self.keys, self.state, tiers, self._checks, verdicts, flights)
        self._misses = Misses(target.name, self.explainer, self.state, tiers, self._relatives, notices)

    def call(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the function returns
        """Return what ``function(*args, **kwargs)`` returns, from the cache where it can.

        A call inside one of the same target, such as ``super().forward``, is computed: the outer one is cached.
        """
        active = _calling.__dict__.setdefault("active", set())
        if id(self) in active or is_disabled() or self._is_off:
            return function(*args, **kwargs)
        active.add(id(self))
        try:
            return self._call(function, args, kwargs)
        finally:
            active.discard(id(self))

    def recall(self, function: Function, calls: Sequence[tuple[object, ...]]) -> list[object]:
        """Return what the tiers have of many calls, each of which is one sample with plain arguments by position.

        Returns:
            The result of each; a ``CachedCall`` for ``compute`` where there is none; NOTHING where ``call`` has to be
            asked.
        """
        is_plain = self._looks_up and not self._is_off and not self._is_audited
        if not is_plain or _is_exporting() or id(self) in _calling.__dict__.get("active", ()):
            return [NOTHING] * len(calls)
        return self._items.find(function, calls)

    def compute(self, call: CachedCall) -> object:
        """Compute and keep what ``recall`` did not find; ask ``call`` if things are not as they were then."""
        active = _calling.__dict__.setdefault("active", set())
        if id(self) in active or is_disabled():
            return call.function(*call.args)
        active.add(id(self))
        try:
            return self._compute(call)
        finally:
            active.discard(id(self))

    def refuse(
        self, error: UncacheableError, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int
    ) -> object:
        """Raise ``error`` while the target is being set up; later, compute a call of so many rows around the cache."""
        self._raise_while_set_up(error)
        return self._go_around((Reason.UNSUPPORTED_CALL, str(error), NOTHING), rows, function, args, kwargs)

    def forget_findings(self) -> None:
        """Forget what computed calls have shown so far."""
        self._checks.forget()
        self._settled.forget()

    def _call(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        batch: Batch | None = None
        try:
            batch = self._split(function, args, kwargs)
            reason = batch.bypass_reason()
            if reason:
                raise GoAround(reason, batch.evidence)  # noqa: TRY301 - so that the rows of the batch count
            return self._answer(batch, function, args, kwargs)
        except GoAround as around:
            # The exception itself must not live on: its traceback holds the batch, and what is copied of it.
            way = around.reason, around.evidence, around.result
        rows = 0 if batch is None else batch.n
        return self._go_around(way, rows, function, args, kwargs)

    def _compute(self, call: CachedCall) -> object:
        try:
            if self.state.look_for_call() is not call.look or self._items.reason_against(call):
                return self._call(call.function, call.args, {})
            rows, whole = self.joining.complete(call, [], [0], [], can_wait=len(_calling.active) == 1)
            return self._put_together(call, rows) if whole is NOTHING else whole
        except GoAround as around:  # which must not live on, as above
            way = around.reason, around.evidence, around.result
        return self._go_around(way, 1, call.function, call.args, {})

    def _go_around(
        self,
        way: tuple[Reason, str, object],
        rows: int,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> object:
        """Answer a call without the cache, by the reason, the evidence and the result of a ``GoAround``."""
        reason, evidence, result = way
        if self._must_hit:
            raise self._misses.error(function, args, kwargs, reason=reason, evidence=evidence)
        self._notices.bypass(reason, rows, evidence)
        if result is not NOTHING:
            return result
        return function(*args, **kwargs)

    def _answer(self, batch: Batch, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """Answer a call from the cache, and compute what is missing.

        Raises:
            GoAround: If the call cannot be cached.
            CacheMissError: If ``mode="require"`` and something would have to be computed.
        """
        look = self.state.look_for_call()
        if not batch.n:
            if self._must_hit:
                raise self._misses.error(function, args, kwargs, reason=Reason.EMPTY_BATCH)
            with torch.no_grad():
                return detached(function(*args, **kwargs))

        signature = batch.signature()
        own_namespace = self.keys.namespace(batch.form(signature), look)
        namespace = own_namespace
        if look.is_in_training:
            known = self._settled.known.get(own_namespace)
            namespace = known or self._settled.find(own_namespace, self._tiers.open(look))
        verdict = self._verdicts.of(namespace)
        reason = self._checks.reason_against(namespace, verdict)
        if reason:
            raise GoAround(reason)
        landings = self.joining.flights.landings
        call = CachedCall(function, args, kwargs, batch, look, namespace, own_namespace, landings=landings)
        try:
            found, missing = self._look_up(call, signature, verdict)
            doubted: list[int] = []
            if self._is_audited:
                doubted = self._checks.audit.choose(found)
            if not missing and not doubted:
                return self._assembly.assemble(found, call)
        except (MemoryError, torch.OutOfMemoryError):
            raise GoAround(Reason.OUT_OF_MEMORY) from None
        except CorruptRecordError as error:
            self._notices.error(error, 0)
            raise GoAround(Reason.RESULT_CANNOT_BE_REBUILT) from None

        if self._identity.settle(look):
            return self._call(function, args, kwargs)
        # A call inside another cached call must not wait for rows: its thread may have claimed some itself.
        can_wait = len(_calling.active) == 1
        rows, whole = self._parts.complete(call, found, missing, doubted, can_wait=can_wait)
        if not self._repeats.is_done:
            self._repeats.note(call, missing)
        if whole is not NOTHING:
            return whole
        return self._put_together(call, rows)

    def _put_together(self, call: CachedCall, rows: list[Found]) -> object:
        """Make the result of a call of which some rows were computed.

        Raises:
            GoAround: If they do not go into one result.
        """
        if not call.batch.results.do_stack(rows):
            raise GoAround(Reason.ROWS_DO_NOT_STACK)
        try:
            return self._assembly.assemble(rows, call)
        except CorruptRecordError as error:
            self._notices.error(error, 0)
            raise GoAround(Reason.RESULT_CANNOT_BE_REBUILT) from None

    # -- split ------------------------------------------------------------------------------------------------------

    def _split(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
        """Return a call as samples.

        Raises:
            GoAround: If that cannot be.
            UncacheableError: As well, while the target is being set up.
        """
        if _is_exporting():
            raise GoAround(Reason.EXPORT_OR_TRACE)
        try:
            return self.keys.split(function, args, kwargs)
        except UncacheableError as error:
            if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
                raise GoAround(Reason.EXPORT_OR_TRACE) from None
            self._refuse(error)
        except RecursionError:
            raise GoAround(Reason.OPAQUE_STATE, "an argument lies too deep") from None

    def _refuse(self, error: UncacheableError) -> NoReturn:
        """Raise ``error`` while the target is being set up; later, go around the cache."""
        self._raise_while_set_up(error)
        raise GoAround(Reason.UNSUPPORTED_CALL, str(error)) from None

    def _raise_while_set_up(self, error: UncacheableError) -> None:
        """Raise ``error`` unless calls were served before.

        A run must not end hours after it began for what the cache cannot do and the target can.
        """
        if not self._notices.has_served():
            raise error

    # -- look up ----------------------------------------------------------------------------------------------------

    def _look_up(self, call: CachedCall, signature: bytes, verdict: Verdict | None) -> tuple[list[Found], list[int]]:
        """Name the samples of a call and ask the tiers for them.

        Args:
            call: The call; it learns its digests and where it is stored.
            signature: The digest of what all its samples have in common.
            verdict: What was known of its namespace.

        Returns:
            The values that the tiers have, and the positions of the others.

        Raises:
            GoAround: If what the tiers have must not answer the call.
            CacheMissError: If ``mode="require"`` and that is not enough.
        """
        batch = call.batch
        try:
            call.keys = keys_of(batch)
        except UncacheableError as error:
            self._refuse(error)
        if call.keys is None:
            hashed_bytes = batch.host_bytes
            call.digests = batch.digests(signature, None)
            self._identity.note_hashed(hashed_bytes)
        else:
            call.digests = batch.digests(signature, call.keys)

        store = self._tiers.open(call.look)
        if self._looks_up:
            call.source = store
        if self._writes:
            call.sink = store
        if verdict is Verdict.UNKNOWN and batch.n > 1:
            call.is_unchecked = self._is_unchecked(call)

        found: list[Found] = []
        missing = [*range(batch.n)]
        if self._looks_up and (self._must_hit or not call.is_unchecked):
            lookup = self._tiers.look_up(call)
            found, missing = lookup.found, lookup.missing
            if lookup.verdict is not Verdict.UNKNOWN:
                self._verdicts.learn(call.namespace, lookup.verdict)

        if call.keys is not None:
            found = self._open(call, found)
        # Where nothing was known, the store may have brought the verdict of another process.
        if verdict is Verdict.UNKNOWN and self._verdicts.of(call.namespace) is Verdict.DEPENDENT:
            raise GoAround(Reason.ROWS_DEPEND_ON_BATCH)
        if not batch.results.do_stack(found):
            raise GoAround(Reason.ROWS_DO_NOT_STACK)
        if self._must_hit:
            self._check_required(call, missing)
        if not found and not self._relatives.is_done:
            self._relatives.look(call)
        return found, missing

    def _is_unchecked(self, call: CachedCall) -> bool:
        """Tell whether it must still be found out, here and by others, if rows of a call depend on their batch."""
        witness = self._checks.witness
        if witness.knows_rows(call):
            return False
        verdict = self._tiers.find_verdict(call)
        if verdict is Verdict.UNDECIDED and self._must_hit:
            return False  # who filled the cache could not know more, and here nothing is computed
        self._verdicts.learn(call.namespace, verdict)
        return not witness.knows_rows(call) and not witness.are_copies(call)

    def _open(self, call: CachedCall, found: list[Found]) -> list[Found]:
        """Return rows that were found by keys of the user's own without their seals."""
        opened = self._watched_keys.open(call.batch, call.digests, found)
        if opened is None:
            raise GoAround(Reason.SAMPLE_KEY_OF_OTHER_INPUTS)
        return opened

    def _check_required(self, call: CachedCall, missing: list[int]) -> None:
        """Raise CacheMissError if something of a call would have to be computed."""
        if missing:
            raise self._misses.error(call.function, call.args, call.kwargs, missing=missing, call=call)
        if call.is_unchecked:
            raise self._misses.error(call.function, call.args, call.kwargs, reason=Reason.ROWS_NOT_CHECKED)


def _is_exporting() -> bool:
    return (
        torch._C._get_tracing_state() is not None  # noqa: SLF001 - what torch.jit.is_tracing asks, typed
        or torch.compiler.is_exporting()
        or ("torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export())
    )
