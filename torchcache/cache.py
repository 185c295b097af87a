"""The cached call, and the one place that decides what a failure costs."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from threading import local
from types import FunctionType
from typing import Any, TypeVar, cast

import numpy as np
import torch

from torchcache import process
from torchcache.errors import (
    CacheMissError,
    ConfigError,
    CorruptRecordError,
    StoreError,
    TorchcacheError,
    UncacheableError,
)
from torchcache.explanation import Explanation, SampleExplanation
from torchcache.flights import Flight, Flights
from torchcache.identity import FixedIdentity, Function, Identity, Look, Target
from torchcache.keys.code import unwrap
from torchcache.keys.digest import combine, digest_parts
from torchcache.keys.ranks import collectives_done, is_in_a_job
from torchcache.layout import Found, Rows
from torchcache.log import warn_once
from torchcache.memory import MemoryTier
from torchcache.options import CacheOptions
from torchcache.outputs import detached, unsupported_leaf
from torchcache.own_keys import WatchedKeys, current_keys, keys_in_force
from torchcache.padding import PaddedResults, follow_length
from torchcache.reasons import remedy_for
from torchcache.recheck import Verdicts, Witness, largest_row, row_distance, tolerance
from torchcache.samples import Batch, CallSignature, PaddedBatch
from torchcache.stats import CacheStats, Counters
from torchcache.storage.access import GROUP, PRIVATE
from torchcache.storage.contract import Verdict, Written
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.lmdb import LmdbStore, StoreSettings
from torchcache.storage.temporary import temporary_directory
from torchcache.storage.writer import (
    DEFAULT_FLUSH_SECONDS,
    DEFAULT_QUEUE_BYTES,
    WORKER_FLUSH_SECONDS,
    WORKER_QUEUE_BYTES,
    writer,
)
from torchcache.structure import KnownClasses, Tree

R = TypeVar("R")

#: What else is to be said of detached outputs of parameters that require grad, in a job of several ranks.
_REDUCER_WAITS = (
    ". Under DistributedDataParallel, one of the two is needed: it waits for the gradients of all parameters that "
    "required grad when it was made, and the second iteration fails with 'Expected to have finished reduction in the "
    "prior iteration'"
)

#: So many samples that are not cached are named in an error, and so many parts of a key of one kind: a large model has
#: hundreds of weights.
_MOST_SAMPLES_NAMED = 5
_MOST_PARTS_NAMED = 16

#: So many forms of plain values beside tensors are watched for batch sizes, and of results for what follows a length.
_MOST_FORMS = 1024

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


@dataclass(slots=True)
class _Call:
    """One cached call under way; ``source`` is where rows are looked up on disk, ``sink`` where they are written."""

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: Batch
    source: LmdbStore | None
    sink: LmdbStore | None
    namespace: bytes
    digests: list[bytes] = field(default_factory=list)
    keys: Sequence[bytes] | None = None  # of the user's own
    landings: int = 0  # of other threads' flights, before the tiers were asked

    def rows_at(self, positions: Sequence[int]) -> list[bytes]:
        """Return the digests of the samples at ``positions``."""
        return self.digests if len(positions) == self.batch.n else [self.digests[p] for p in positions]


@dataclass(frozen=True, slots=True)
class _Answer:
    """The result of the whole call, computed as if there were no cache."""

    result: object


@dataclass(frozen=True, slots=True)
class _Computed:
    """Rows that were forwarded.

    Attributes:
        found: Their values, at the positions of the batch.
        shared: What may be kept and given to others.
        whole: What the caller gets if these are all rows of the call, as they came; None otherwise.
    """

    found: list[Found]
    shared: list[Rows]
    whole: _Answer | None


_NOTHING = _Computed([], [], None)


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
        self._counters = Counters()
        self._signatures: dict[Function, CallSignature] = {}
        self._identity: Identity | FixedIdentity = identity or Identity(target, lambda: self.options)
        self._verdicts = Verdicts()
        self._flights = Flights()
        self._known = KnownClasses()
        self._sizes_of_plain: dict[bytes, set[int]] = {}  # batch sizes that gave equal plain values
        self._watched_keys = WatchedKeys()
        self._followed: dict[bytes, Sequence[Sequence[int]]] = {}  # what of padded results is as long as the mask
        self._chance = random.Random(os.urandom(16))  # noqa: S311 - chooses samples; the global one is the user's
        self._devices: tuple[torch.device, ...] = ()  # where the last computed result had its leaves
        self._last_namespace: tuple[Look | None, bytes, bytes] = (None, b"", b"")
        self._opening = process.ForkLock()  # guards what is made at first use
        self._memory: MemoryTier | None = None
        self._stores: dict[tuple[str, bool], LmdbStore | None] = {}
        self._last_fault = ""  # for who asks why a call missed

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
        store = self._open(self._look())
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
                rows are not the batch's.
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
        except UncacheableError:
            if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
                return self._bypass("export_or_trace", function, args, kwargs)
            raise
        reason = batch.bypass_reason()
        if reason:
            return self._bypass(reason, function, args, kwargs, rows=batch.n)
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
        keys = current_keys(batch.n) if batch.is_divisible else None
        store, options = self._open(look), self.options
        call = _Call(
            function, args, kwargs, batch, store if options.looks_up else None, store if options.writes else None,
            namespace, keys=keys, landings=self._flights.landings,
        )  # fmt: skip
        try:
            call.digests = batch.digests(signature) if call.keys is None else combine(signature, [[*call.keys]])
            if call.keys is not None and not self._keys_agree(call):
                return self._go_around("sample_key_of_other_inputs", call)
            found, missing = self._look_up(call) if options.looks_up else ([], [*range(batch.n)])
            # The store may have brought the verdict of another process.
            if self._verdicts.of(call.namespace) is Verdict.DEPENDENT:
                return self._go_around("rows_depend_on_batch", call)
            if not batch.results.do_stack(found):
                return self._go_around("rows_do_not_stack", call)
            if missing and options.mode == "require":
                raise self._miss(function, args, kwargs, missing=missing)
            doubted = self._choose(found) if options.verify_hits and options.mode != "require" else []
            if not missing and not doubted:
                return self._assemble(found, batch)
        except MemoryError:
            return self._go_around("out_of_memory", call)
        except CorruptRecordError as error:
            self.on_fault(error, 0)
            return self._go_around("result_cannot_be_rebuilt", call)
        if self._identity.settle(look):
            return self._call(function, args, kwargs)
        return self._compute(call, found, missing, doubted)

    def _keys_agree(self, call: _Call) -> bool:
        """Tell whether keys of the user's own stand for the inputs that they stood for before."""
        watched = self._watched_keys.choose(call.digests)
        return all(self._watched_keys.agree(call.digests[p], call.batch.digest(p)) for p in watched)

    def _look(self) -> Look:
        """Name the present state, and say why a call in it is not cached, if so."""
        try:
            look = self._identity.look()
        except TorchcacheError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign __repr__ or __eq__ raises
            self.on_fault(error, 0)
            return Look("", b"", is_private=True, reason="unreadable_state")
        return look

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
            namespace = digest_parts([look.namespace, form, b"checked" if self.options.check_rows else b"unchecked"])
            self._last_namespace = look, form, namespace
        return namespace

    def _look_up(self, call: _Call) -> tuple[list[Found], list[int]]:
        """Ask memory, the write queue and the disk in turn; what the disk gives goes to memory too."""
        digests = call.digests
        found, missing = self._fetch("memory", call, range(len(digests)))
        for tier in ("queue", "store"):
            if not missing or call.source is None:
                break
            # Equal rows are fetched once; the others of their kind are filled in from it.
            unique = sorted({digests[p]: p for p in reversed(missing)}.values()) if len(missing) > 1 else missing
            more, absent = self._fetch(tier, call, unique)
            if not more:
                continue
            for item in more:
                self._remember(call.namespace, Rows([digests[p] for p in item.positions], item.layout, item.data))
            if len(unique) == len(missing):
                found, missing = found + more, absent
            else:
                spread, missing = _spread(more, digests, missing)
                found = found + spread
                filled_in = sum(len(item.positions) for item in spread) - sum(len(item.positions) for item in more)
                self._counters.add(duplicates=filled_in)
        return found, missing

    def _fetch(self, tier: str, call: _Call, positions: Sequence[int]) -> tuple[list[Found], list[int]]:
        """Ask one tier for the samples at ``positions``; faults become misses."""
        wanted = call.rows_at(positions)
        found: list[Found] = []
        missing: Sequence[int] = range(len(wanted))
        try:
            if tier == "memory":
                if self._memory is not None:
                    found, missing = self._memory.get_many(call.namespace, wanted)
            elif tier == "queue":
                found, missing = writer.get_many(_needed(call.source), call.namespace, wanted)
            else:
                found, missing = self._fetch_from_store(call, wanted)
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self.on_fault(error, 0)
            return [], list(positions)
        is_known = call.batch.results.is_known
        unknown = [item for item in found if not is_known(item.layout, self._known)]
        if unknown:
            found = [item for item in found if is_known(item.layout, self._known)]
            missing = sorted([*missing, *(p for item in unknown for p in item.positions)])
        if found:
            self._counters.add(**{f"{tier}_hits": len(wanted) - len(missing)})
        if len(positions) == call.batch.n:
            return found, list(missing)
        return (
            [Found([positions[p] for p in item.positions], item.layout, item.data) for item in found],
            [positions[p] for p in missing],
        )

    def _fetch_from_store(self, call: _Call, digests: Sequence[bytes]) -> tuple[list[Found], list[int]]:
        namespace, sink = call.namespace, call.sink
        lookup = _needed(call.source).get_many(namespace, digests)
        if lookup.corrupt:
            self._note_fault("corrupt_record", "records fail their check", amount=lookup.corrupt)
        if lookup.verdict is not Verdict.UNKNOWN and self._verdicts.of(namespace) is Verdict.UNKNOWN:
            self._verdicts.note(namespace, lookup.verdict)
        if lookup.found and sink is not None and sink.needs_touch(namespace):
            self._touch(sink, namespace)
        return lookup.found, lookup.missing

    def _choose(self, found: Sequence[Found]) -> list[int]:
        """Choose the hits that are computed again for ``verify_hits``."""
        share = self.options.verify_hits
        return sorted(p for item in found for p in item.positions if self._chance.random() < share)

    # -- computing ------------------------------------------------------------------------------------------------

    def _compute(self, call: _Call, found: list[Found], missing: list[int], doubted: list[int]) -> object:
        """Forward the rows that no tier has, equal ones once, and keep what comes back."""
        first: dict[bytes, int] = {}
        for position in missing:
            first.setdefault(call.digests[position], position)
        wanted = list(first.values())
        self._counters.add(duplicates=len(missing) - len(wanted))
        computed: list[Found] = []
        can_wait = len(_calling.active) == 1
        for joins in (can_wait, False):
            flight = Flight(call.namespace)
            shared: list[Rows] = []
            try:
                joined = self._flights.claim(flight, call.rows_at(wanted), joins=joins)
                own = [p for i, p in enumerate(wanted) if i not in joined]
                if self._flights.landings != call.landings and self.options.looks_up:
                    landed, own = self._fetch("memory", call, own)
                    computed += landed
                outcome = self._forward_rows(call, own, doubted, found) if own or doubted else _NOTHING
                if isinstance(outcome, _Answer):
                    return outcome.result
                if outcome.whole is not None:
                    shared = outcome.shared
                    return outcome.whole.result
                computed, doubted, shared = computed + outcome.found, [], outcome.shared
            finally:
                self._flights.land(flight, shared)
            landed, wanted = self._wait({wanted[i]: other for i, other in joined.items()}, call)
            computed += landed
            if not wanted:
                break
        # What was computed again stands for what was found.
        again = {p for item in computed for p in item.positions}
        found = [part for item in found if (part := _without(item, again)) is not None]
        if len(missing) > len(first):
            computed = _spread(computed, call.digests, sorted({*missing, *again}))[0]
        if not call.batch.results.do_stack([*found, *computed]):
            return self._go_around("rows_do_not_stack", call)
        try:
            return self._assemble([*found, *computed], call.batch)
        except CorruptRecordError as error:
            self.on_fault(error, 0)
            return self._go_around("result_cannot_be_rebuilt", call)

    def _wait(self, joined: Mapping[int, Flight], call: _Call) -> tuple[list[Found], list[int]]:
        """Take rows from the flights that compute them; also return the positions of those that did not come."""
        by_flight: dict[int, tuple[Flight, list[int]]] = {}
        for position, flight in joined.items():
            by_flight.setdefault(id(flight), (flight, []))[1].append(position)
        landed: list[Found] = []
        missing: list[int] = []
        for flight, positions in by_flight.values():
            for rows in flight.wait():
                places = {digest: i for i, digest in enumerate(rows.digests)}
                here = [p for p in positions if call.digests[p] in places]
                positions = [p for p in positions if call.digests[p] not in places]  # noqa: PLW2901 - what is left
                if here:
                    landed.append(Found(here, rows.layout, rows.data[[places[call.digests[p]] for p in here]]))
            missing += positions
        self._counters.add(shared_rows=len(joined) - len(missing))
        return landed, missing

    def _forward_rows(
        self, call: _Call, own: list[int], doubted: list[int], found: Sequence[Found]
    ) -> _Computed | _Answer:
        """Forward rows, with some that are cached beside them, and keep what may be kept.

        Args:
            call: The call.
            own: Positions of the rows that no tier has.
            doubted: Positions of rows that are cached and to be compared.
            found: The values that are cached.
        """
        n = len(own)
        random_before, talks_before = _random_state(), collectives_done()
        # Code that the walk does not see may talk to other ranks, and they forward all rows of a call. So does the
        # first computed call of a namespace in a job, until one shows that it is computed alone.
        is_trial = bool(talks_before) and not self._verdicts.is_alone(call.namespace)
        witness = self._find_witness(call, found) if own and self.options.check_rows and not is_trial else None
        doubted = [] if is_trial else doubted
        positions = [*range(call.batch.n)] if is_trial else [*own, *doubted]
        if witness is not None and witness.row is None:
            positions += witness.cached.positions
        is_as_given = witness is None and (is_trial or len(positions) == call.batch.n == n)
        args, kwargs, results = call.args, call.kwargs, call.batch.results
        failure: Exception | None = None
        output: object = None
        try:
            if not is_as_given:
                args, kwargs, results = call.batch.select(positions, None if witness is None else witness.row)
            keys = call.keys
            if keys is not None and not is_as_given:
                keys = [keys[p] for p in positions]
                if witness is not None and witness.row is not None:
                    keys.append(witness.key or b"")
            with torch.no_grad(), keys_in_force(keys):
                output = call.function(*args, **kwargs)
        except Exception as error:
            if is_as_given:
                raise
            failure = error
        if failure is not None:
            return self._without_extras(call, own, doubted, found, failure)
        effect = None
        if _random_state() != random_before:
            effect = "random_numbers"
        elif collectives_done() != talks_before:
            effect = "collectives"  # by code that the walk does not see, such as a library's
        self._verdicts.note_effect(call.namespace, effect)
        tree = results.flatten(output)
        kind = unsupported_leaf(tree)
        if kind is not None:
            return self._give_back(kind, call, output if is_as_given else None)
        if isinstance(results, PaddedResults):
            following = effect or self._follow_length(call, positions, tree, results)
            if isinstance(following, str):
                return _Answer(self._go_around(following, call))
            results = following
        try:
            total = call.batch.n if is_trial else n + len(doubted) + (witness is not None)
            parts, overflowed = results.take_apart(tree, total, self.options.cache_dtype, self._known)
        except (MemoryError, torch.OutOfMemoryError):
            return self._give_back("out_of_memory", call, output if is_as_given else None)
        except UncacheableError as error:
            if is_as_given:
                raise
            return self._without_extras(call, own, doubted, found, error)
        self._devices = results.devices(tree)
        if effect:
            self._note_bypass(effect, 0)
        elif is_trial:
            self._verdicts.note_alone(call.namespace)
        is_settled = effect is None and not self._identity.has_moved()
        leaves = [leaf for leaf in tree.leaves if isinstance(leaf, torch.Tensor)]
        tensors = [*call.batch.tensors, *self._identity.parameters(), *leaves]
        if witness is not None and is_settled and not self._agrees(call, witness, total - 1, parts, tensors):
            return _Answer(self._go_around("rows_depend_on_batch", call))
        self._counters.add(misses=n)
        self._note_overflow(overflowed)
        found_again: list[Found] = []
        if is_settled and doubted:
            found_again = self._verify(call, {p: n + i for i, p in enumerate(doubted)}, found, parts, tensors)
        computed = _at_positions(_rows_at(parts, own if is_trial and n < total else range(n)), own)
        rows = [Rows([call.digests[p] for p in item.positions], item.layout, item.data) for item in computed]
        reason = effect or self._reason_to_drop(call, rows, total, is_settled=is_settled)
        if reason:
            self._counters.add_to("dropped_rows", reason, n)
            if not self.options.looks_up:
                self._forget(call, [call.digests[p] for p in own])
        else:
            for item in rows:
                if self.options.looks_up:
                    self._keep(call, item)
                else:
                    self._replace(call, item)
        if own and is_settled:
            # Also where a plain value may be the batch size: one row more settles that.
            self._leave_witness(call, computed[0])
        is_whole = is_as_given and results.returns_as_given
        whole = _Answer(results.rounded(tree, self.options.cache_dtype)) if is_whole else None
        if not reason and whole is None:
            # What is kept is the queue's and other threads' as well; the caller gets bytes of its own.
            computed = [Found(item.positions, item.layout, item.data.copy()) for item in computed]
        return _Computed([*computed, *found_again], [] if reason else rows, whole)

    def _follow_length(
        self, call: _Call, positions: Sequence[int], tree: Tree, results: PaddedResults
    ) -> PaddedResults | str:
        """Find out which dimensions of a padded batch's result follow its length, or why the call cannot be cached.

        The first time, the shortest of its rows is computed once more with another padding, to see what changes.
        """
        form = call.namespace + digest_parts([str(([leaf.dim() for leaf in tree.leaves], tree.paths)).encode()])
        followed = self._followed.get(form)
        if followed is not None:
            return results.following(followed)
        assert isinstance(call.batch, PaddedBatch)
        row = min(range(len(positions)), key=results.spans.length)
        found = self._compute_with_other_padding(call, positions[row], results.spans.width)
        if found is None:
            return "other_length_failed"
        other, other_results = found
        followed = follow_length(tree, results.spans.width, other, other_results.spans.width)
        if followed is None:
            self._condemn(call)
            return "rows_depend_on_batch"
        results, other_results = results.following(followed), other_results.following(followed)
        if self.options.check_rows and other_results.spans.length(0) == results.spans.length(row):
            parts, _ = results.take_apart(tree, len(results.spans.starts), self.options.cache_dtype, self._known)
            (again,), _ = other_results.take_apart(other, 1, self.options.cache_dtype, self._known)
            tensors = [*call.batch.tensors, *self._identity.parameters(), *tree.leaves]
            apart = self._distance(call, again, row, parts)
            if apart is not None and apart > tolerance(tensors, self.options.cache_dtype):
                self._condemn(call)
                return "rows_depend_on_batch"
        self._followed[form] = followed
        if len(self._followed) > _MOST_FORMS:
            self._followed.pop(next(iter(self._followed)))
        return results

    def _compute_with_other_padding(self, call: _Call, position: int, width: int) -> tuple[Tree, PaddedResults] | None:
        """Compute a row by itself: as long as it is, or where that is ``width``, with one position more or less."""
        assert isinstance(call.batch, PaddedBatch)
        length = call.batch.spans.length(position)
        failure: Exception | None = None
        for other_width in (length,) if length < width else (width + 1, width - 1):
            try:
                args, kwargs, results = call.batch.alone(position, other_width)
                with torch.no_grad(), keys_in_force(None if call.keys is None else [call.keys[position]]):
                    tree = results.flatten(call.function(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - whatever a foreign forward raises for another length
                failure = error
                continue
            return tree, results
        self._note_fault("other_length_failed", f"a row could not be computed with another padding ({failure!r})")
        return None

    def _give_back(self, reason: str, call: _Call, output: object) -> _Answer:
        """Answer with ``output``, the whole call's result that cannot be cached; None: compute it."""
        if output is None:
            return _Answer(self._go_around(reason, call))
        self._note_bypass(reason, call.batch.n)
        return _Answer(output)

    def _without_extras(
        self, call: _Call, own: list[int], doubted: list[int], found: Sequence[Found], failure: Exception
    ) -> _Computed | _Answer:
        """Go on after another composition of the call's rows failed."""
        if doubted:  # an audit costs nobody a result
            self._note_fault("verify_hits", f"hits could not be computed again ({failure!r})")
            return self._forward_rows(call, own, [], found) if own else _NOTHING
        return self._answer_whole(call, failure)

    def _answer_whole(self, call: _Call, failure: Exception) -> _Answer:
        """Compute the call as the caller made it, after another composition of its rows failed.

        If that succeeds, the module may be one that cannot be given any rows together, as caching by samples
        needs. It may also have been a passing fault, so nothing is concluded where rows were found to be their
        own before.
        """
        result = call.function(*call.args, **call.kwargs)
        if _is_out_of_memory(failure):
            self._verdicts.note(call.namespace, None)  # one row more did not fit: not to be tried again
            return self._give_back("out_of_memory", call, result)
        if call.batch.n == 1:
            self._verdicts.note_single(call.namespace)
            return self._give_back("one_sample_at_a_time", call, result)
        if self._verdicts.of(call.namespace) is Verdict.INDEPENDENT:
            self._note_fault("other_batch_failed", f"a call failed with some of its rows, not with all ({failure!r})")
            return self._give_back("other_batch_failed", call, result)
        self._condemn(call)
        return self._give_back("rows_depend_on_batch", call, result)

    def _reason_to_drop(self, call: _Call, rows: list[Rows], n_forwarded: int, *, is_settled: bool) -> str | None:
        """Say why computed rows must not be kept, or None."""
        if not is_settled:
            return "state_moved"
        layout = rows[0].layout if rows else None
        numbers = call.batch.results.plain_numbers(layout, self._known) if layout and layout.structure else ()
        if layout and numbers:
            # A plain number that equals the batch size may be the batch size: then it holds for no other batch.
            key = call.namespace + digest_parts([layout.structure])
            sizes = self._sizes_of_plain.setdefault(key, set())
            sizes.add(n_forwarded)
            if len(self._sizes_of_plain) > _MOST_FORMS:
                self._sizes_of_plain.pop(next(iter(self._sizes_of_plain)))
            if n_forwarded in numbers and len(sizes) < 2:
                return "plain_value_may_be_batch_size"
        return None

    # -- rows that are cached and computed all the same -------------------------------------------------------------

    def _find_witness(self, call: _Call, found: Sequence[Found]) -> Witness | None:
        """Return a cached row with which this batch can be checked, if it is still to be checked."""
        if not call.batch.is_divisible or self._verdicts.of(call.namespace) is not Verdict.UNKNOWN:
            return None
        if call.batch.n == 1 and self._verdicts.is_single(call.namespace):
            return None
        witness = self._verdicts.witness(call.namespace)
        has_key = witness is not None and witness.key is not None
        if witness is not None and witness.marks == self._identity.marks() and (has_key or call.keys is None):
            return witness
        if found and not self.options.persistent_module_hash:
            item = found[0]
            return Witness(None, Found(item.positions[:1], item.layout, item.data[:1]))
        return None

    def _leave_witness(self, call: _Call, rows: Found) -> None:
        if not self.options.check_rows or not call.batch.is_divisible:
            return
        if self._verdicts.of(call.namespace) is not Verdict.UNKNOWN:
            return
        witness, marks = self._verdicts.witness(call.namespace), self._identity.marks()
        if witness is None or witness.marks != marks:
            row = largest_row(rows.data, rows.layout, call.batch.results, self._known)
            position = rows.positions[row]
            cached = Found([position], rows.layout, rows.data[row : row + 1].copy())
            key = None if call.keys is None else call.keys[position]
            self._verdicts.leave(call.namespace, Witness(call.batch.row(position), cached, marks, key))

    def _agrees(
        self, call: _Call, witness: Witness, row: int, parts: Sequence[Found], tensors: Sequence[torch.Tensor]
    ) -> bool:
        """Compare the witness with what was computed at ``row``, and remember the verdict."""
        allowed = tolerance(tensors, self.options.cache_dtype)
        apart = self._distance(call, witness.cached, row, parts)
        if apart is not None and apart > allowed:
            self._condemn(call)
            return False
        if apart is None:
            self._verdicts.note_vacuous(call.namespace)  # another batch may tell
        else:
            self._judge(call, Verdict.INDEPENDENT)
        return True

    def _condemn(self, call: _Call) -> None:
        """Note that the rows of a namespace depend on their batch, and forget them all."""
        if self._memory is not None:
            self._memory.delete_namespace(call.namespace)
        if call.sink is not None:
            writer.forget(call.sink, call.namespace)
        self._judge(call, Verdict.DEPENDENT)

    def _judge(self, call: _Call, verdict: Verdict) -> None:
        self._verdicts.note(call.namespace, verdict)
        if call.sink is not None:
            self._do(call.sink, partial(call.sink.judge, call.namespace, verdict))

    def _distance(self, call: _Call, cached: Found, row: int, parts: Sequence[Found]) -> float | None:
        """Return how far a cached value and what was computed at ``row`` are apart."""
        part = next(item for item in parts if row in item.positions)
        i = list(part.positions).index(row)
        computed = Found([row], part.layout, part.data[i : i + 1])
        return row_distance(cached, computed, part.data, call.batch.results, self._known)

    def _verify(
        self,
        call: _Call,
        again: Mapping[int, int],
        found: Sequence[Found],
        parts: Sequence[Found],
        tensors: Sequence[torch.Tensor],
    ) -> list[Found]:
        """Compare hits with what they were computed again; what differs is said, counted, replaced, and returned.

        Args:
            call: The call.
            again: For each position that was computed again, at which row of ``parts``.
            found: The values that are cached.
            parts: What was computed.
            tensors: What took part.
        """
        differ: list[Found] = []
        allowed = tolerance(tensors, self.options.cache_dtype)
        cached = {
            p: Found([p], item.layout, item.data[i : i + 1]) for item in found for i, p in enumerate(item.positions)
        }
        self._counters.add(verified_rows=len(again))
        for position, row in again.items():
            apart = self._distance(call, cached[position], row, parts)
            if apart is None or apart <= allowed:
                continue
            digest = call.digests[position]
            self._counters.add(mismatched_rows=1)
            self._say(
                "verify_hits",
                f"the cached value of sample {position} ({digest.hex()}) is {apart:.2g} of its norm away from what "
                f"was computed again, more than {allowed:g}; it is replaced"
                + ("" if self.options.writes else ", in memory only since mode='read'")
                + ". Look at explain() for what the key misses",
            )
            (item,) = _at_positions(_rows_at(parts, [row]), [position])
            self._replace(call, Rows([digest], item.layout, item.data.copy()))
            differ.append(item)
        return differ

    def _assemble(self, found: Sequence[Found], batch: Batch) -> object:
        n_leaves = len(found[0].layout.leaves)
        devices = self._devices
        if len(devices) != n_leaves:
            devices = (self._guess_device(batch),) * n_leaves
        return batch.results.assemble(found, batch.n, devices, self._known)

    def _guess_device(self, batch: Batch) -> torch.device:
        parameters = self._identity.parameters()
        return parameters[0].device if parameters else batch.first_device

    # -- keeping ------------------------------------------------------------------------------------------------

    def _replace(self, call: _Call, rows: Rows) -> None:
        """Keep rows in place of what is cached for their samples."""
        if self._memory is not None:
            self._memory.delete_many(call.namespace, rows.digests)
        if not self._keep(call, rows, replaces=True):
            self._forget_on_disk(call, rows.digests)

    def _forget(self, call: _Call, digests: Sequence[bytes]) -> None:
        """Forget what is cached for samples that came out otherwise now and cannot be kept."""
        if self._memory is not None:
            self._memory.delete_many(call.namespace, digests)
        self._forget_on_disk(call, digests)

    def _forget_on_disk(self, call: _Call, digests: Sequence[bytes]) -> None:
        if call.sink is not None:
            writer.forget(call.sink, call.namespace, digests)
            self._do(call.sink, partial(call.sink.delete_many, call.namespace, digests))

    def _keep(self, call: _Call, rows: Rows, *, replaces: bool = False) -> bool:
        """Keep rows in memory and hand them to the writer; return whether it took them."""
        self._remember(call.namespace, rows)
        return call.sink is not None and self._store(call.sink, call.namespace, rows, replaces=replaces)

    def _store(self, sink: LmdbStore, namespace: bytes, rows: Rows, *, replaces: bool) -> bool:
        """Hand rows to the writer; return whether it took them."""
        queue_bytes, flush_seconds = self.options.queue_bytes, self._flush_seconds()
        if queue_bytes is None:
            queue_bytes = WORKER_QUEUE_BYTES if process.is_child() else DEFAULT_QUEUE_BYTES
        try:
            accepted = writer.put(
                sink,
                self,
                namespace,
                rows,
                queue_bytes=queue_bytes,
                timeout_seconds=self.options.queue_timeout_seconds,
                flush_seconds=flush_seconds,
                replaces=replaces,
            )
        except Exception as error:  # noqa: BLE001 - no fault of a tier leaves a cached call
            self.on_fault(error, len(rows.digests))
            return False
        if not accepted:
            self._counters.add_to("dropped_rows", "queue_full", len(rows.digests))
            self._say(
                "queue_full", "the write queue stayed full for queue_timeout_seconds; rows are not stored on disk"
            )
        return accepted

    def _touch(self, store: LmdbStore, namespace: bytes) -> None:
        """Note on disk that a namespace is in use."""
        self._do(store, partial(store.touch, namespace))

    def _do(self, store: LmdbStore, task: Callable[[Callable[[], bool]], object]) -> None:
        writer.do(store, self, task, flush_seconds=self._flush_seconds())

    def _flush_seconds(self) -> float:
        configured = self.options.flush_timeout_seconds
        if configured is not None:
            return configured
        return WORKER_FLUSH_SECONDS if process.is_child() else DEFAULT_FLUSH_SECONDS

    def _remember(self, namespace: bytes, rows: Rows) -> None:
        if self._memory is None and self.options.memory_cache_device is None and self._devices:
            self._memory = MemoryTier(self.options.max_memory_cache_size, self._devices[0])
        if self._memory is None:
            return
        try:
            self._memory.put_many(namespace, rows)
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
            self._note_fault("memory", f"the memory tier cannot grow ({error})")

    # -- what a user may do ---------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Return the counters of this process so far, as an immutable snapshot."""
        values: dict[str, Any] = dict(self._counters.values())
        if self._memory is not None:
            values["memory_rows"], values["memory_bytes"] = self._memory.usage()
        for store in self._open_stores():
            rows, nbytes = writer.queued(store)
            values["queued_rows"] = values.get("queued_rows", 0) + rows
            values["queued_bytes"] = values.get("queued_bytes", 0) + nbytes
            values["store_bytes"] = store.used_bytes()
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
        digests = [] if batch.bypass_reason() else batch.digests(signature)
        if keys is not None:
            digests = combine(signature, [[*keys]])
        places = ["nowhere"] * len(digests)
        if reason is None and digests:
            places = self._places(look, namespace, digests)
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

    def _places(self, look: Look, namespace: bytes, digests: Sequence[bytes]) -> list[str]:
        """Say of each sample which tier has it."""
        store = self._open(look)
        places = ["nowhere"] * len(digests)
        if store is not None:
            try:
                missing = set(store.get_many(namespace, digests).missing)
            except StoreError as error:
                self.on_fault(error, 0)
                missing = set(range(len(digests)))
            places = ["nowhere" if i in missing else "store" for i in range(len(digests))]
            queued = writer.has_many(store, namespace, digests)
            places = ["queue" if here else place for here, place in zip(queued, places, strict=True)]
        if self._memory is not None:
            kept = self._memory.has_many(namespace, digests)
            places = ["memory" if here else place for here, place in zip(kept, places, strict=True)]
        return places

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Wait until every row accepted so far is committed to disk, or dropped and counted.

        Args:
            timeout_seconds: How long at most; ``flush_timeout_seconds`` if None.

        Returns:
            Whether that was reached in time.
        """
        timeout_seconds = self._flush_seconds() if timeout_seconds is None else timeout_seconds
        are_flushed = [writer.flush(timeout_seconds, store) for store in self._open_stores()]
        return all(are_flushed)

    def clear(self) -> None:
        """Forget every value of this module hash: in memory, and on disk for all processes.

        What another process has in memory stays there. In ``mode="read"`` and ``"require"`` the disk is left as it
        is, which the log says.
        """
        self.flush()
        self._verdicts.clear()
        if self._memory is not None:
            self._memory.clear()
        if not self.options.writes:
            if self._open_stores():
                self._say(
                    "clear", f"clear() empties memory only, since mode={self.options.mode!r} writes nothing to disk"
                )
            return
        for store in self._open_stores():
            try:
                store.delete_all()
            except Exception as error:  # noqa: BLE001 - a fault of the machine is a counter and a line
                self.on_fault(error, 0)

    def refresh(self) -> None:
        """Look at all weights and state afresh at the next call.

        Needed only after a sparse write that torch does not count, such as one element through ``.data``
        or NumPy; everything else is noticed.
        """
        self._identity.refresh()
        self._verdicts.clear()

    def close(self) -> None:
        """Flush, and give up memory and disk handle; the next cached call opens both again."""
        self.flush()
        if self._memory is not None:
            self._memory.clear()
        for store in self._open_stores():
            store.close()
        self._memory, self._stores = None, {}

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

    def _open(self, look: Look) -> LmdbStore | None:
        """Return the store for what was looked at, made at its first use; also see to the memory tier."""
        place = look.module_hash, look.is_private
        if place in self._stores:
            return self._stores[place]
        with self._opening.raw:
            if place not in self._stores:
                for cls in self._identity.classes():
                    self._known.learn(cls)
                options = self.options
                if self._memory is None and options.max_memory_cache_size and options.memory_cache_device is not None:
                    self._memory = MemoryTier(options.max_memory_cache_size, options.memory_cache_device)
                self._stores[place] = self._make_store(look)
            return self._stores[place]

    def _make_store(self, look: Look) -> LmdbStore | None:
        options = self.options
        if not options.persistent or not options.max_persistent_cache_size or not look.module_hash:
            return None
        is_temporary = look.is_private or options.persistent_cache_dir is None
        if options.mode == "off" or (is_temporary and not options.writes):
            return None
        settings = StoreSettings(
            budget_bytes=options.max_persistent_cache_size,
            eviction=options.eviction,
            zstd_level=options.zstd_compression_level if options.zstd_compression else None,
            lock_timeout_seconds=options.lock_timeout_seconds,
            min_free_bytes=options.min_free_disk,
        )
        try:
            if look.is_private or options.persistent_cache_dir is None:
                directory = CacheDirectory(temporary_directory(), before_turn=temporary_directory)
            else:
                access = GROUP if options.shared else PRIVATE
                directory = CacheDirectory(
                    options.persistent_cache_dir, access if options.writes else access.read_only()
                )
            store = LmdbStore(directory, look.module_hash, settings)
            if options.writes:
                store.announce()
        except Exception as error:  # noqa: BLE001 - a fault of the machine: the run goes on in memory
            self.on_fault(error, 0)
            return None
        return store

    def _open_stores(self) -> list[LmdbStore]:
        return [store for store in list(self._stores.values()) if store is not None]

    # -- going around -----------------------------------------------------------------------------------------------

    def _grad_reason(self) -> str | None:
        if not torch.is_grad_enabled() or not self._identity.requires_grad():
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
            "meant, call requires_grad_(False) on the module; if not, set when_grad='bypass'"
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
        self._note_bypass(reason, rows, evidence)
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
            because = self._because(reason, evidence)
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
        store = self._open(look)
        if look.is_private:
            place = "something has no stable name, so no other process can fill it unless persistent_module_hash is set"
        elif store is None:
            place = "there is no directory to look in"
        else:
            place = f"they were looked for in {store.path}" + ("" if store.is_present() else ", where nothing is yet")
        return place + (f" (last fault: {self._last_fault})" if self._last_fault else "")

    def _go_around(self, reason: str, call: _Call) -> object:
        return self._bypass(reason, call.function, call.args, call.kwargs, rows=call.batch.n)

    def _note_bypass(self, reason: str, rows: int, evidence: str = "") -> None:
        self._counters.add_to("bypasses", reason)
        self._counters.add(bypassed_rows=rows)
        self._say(f"bypass {reason}", f"the cache is bypassed: {self._because(reason, evidence)}")

    def _because(self, reason: str, evidence: str) -> str:
        remedy = self._target.remedies.get(reason) or remedy_for(reason)
        return f"{remedy} ({reason}: {evidence})" if evidence else f"{remedy} ({reason})"

    def _note_fault(self, kind: str, message: str, amount: int = 1) -> None:
        self._counters.add_to("faults", kind, amount)
        self._last_fault = message
        warn_once(("fault", kind), "%s: %s; it goes on without (fault %r, said once)", self._target.name, message, kind)

    def _note_overflow(self, amount: int) -> None:
        if amount:
            self._counters.add(overflowed_values=amount)
            self._say("overflow", f"cache_dtype={self.options.cache_dtype} made finite values infinite")

    def _say(self, kind: str, message: str) -> None:
        """Say something once per target and kind."""
        warn_once((self._target.name, kind), "%s: %s", self._target.name, message)


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


def _rows_at(parts: Sequence[Found], rows: Sequence[int]) -> list[Found]:
    """Return what was computed at some rows, in their order and numbered anew."""
    if len(parts) == 1:  # all rows, in order
        (part,) = parts
        data = part.data[rows.start : rows.stop] if isinstance(rows, range) else part.data[list(rows)]
        return [Found(range(len(rows)), part.layout, data)] if rows else []
    number = {row: i for i, row in enumerate(rows)}
    picked = [(part, [i for i, row in enumerate(part.positions) if row in number]) for part in parts]
    return [
        Found([number[part.positions[i]] for i in here], part.layout, part.data[here]) for part, here in picked if here
    ]


def _at_positions(found: Sequence[Found], positions: Sequence[int]) -> list[Found]:
    """Return values whose positions are numbers of ``positions`` at those."""
    return [Found([positions[i] for i in item.positions], item.layout, item.data) for item in found]


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; on the CPU and in libraries, torch says so with a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("alloc" in text or "out of memory" in text)


def _without(item: Found, positions: set[int]) -> Found | None:
    """Return what was found without some positions; None if nothing is left."""
    kept = [i for i, position in enumerate(item.positions) if position not in positions]
    if len(kept) == len(item.positions):
        return item
    return Found([item.positions[i] for i in kept], item.layout, item.data[kept]) if kept else None


def _needed(store: LmdbStore | None) -> LmdbStore:
    assert store is not None
    return store


def _is_exporting() -> bool:
    return (
        torch._C._get_tracing_state() is not None  # noqa: SLF001 - what torch.jit.is_tracing asks, typed
        or torch.compiler.is_exporting()
        or ("torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export())
    )


def _random_state() -> tuple[object, ...]:
    """Return something that differs if random numbers were drawn from a global generator meanwhile."""
    states: list[object] = [torch.default_generator.get_state().numpy().tobytes(), random.getstate()]
    kind, keys, position, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what is asked about
    states += [kind, bytes(np.asarray(keys)), position, *rest]
    if torch.cuda.is_initialized():
        states += [g.get_state().numpy().tobytes() for g in torch.cuda.default_generators]
    return tuple(states)
