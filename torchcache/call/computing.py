"""Rows that no tier has: planned, forwarded once, checked, kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from torchcache.call.assembly import Assembly
from torchcache.call.forwarding import Forwarding
from torchcache.call.relatives import Relatives
from torchcache.call.settled import Settled
from torchcache.checks.checks import Checks
from torchcache.checks.few_rows import is_out_of_memory
from torchcache.checks.plan import Output, Plan
from torchcache.checks.verdicts import Condemned, Verdicts
from torchcache.errors import UncacheableError
from torchcache.inputs.cached_call import CachedCall
from torchcache.kinds import Fault
from torchcache.layout import Found, Rows
from torchcache.options import CacheOptions
from torchcache.report.go_around import NOTHING, GoAround
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason
from torchcache.results.seals import sealed
from torchcache.storage.contract import Verdict
from torchcache.tiers.tiers import Tiers


@dataclass(frozen=True, slots=True)
class Computed:
    """Rows that were forwarded.

    Attributes:
        found: Their values, at the positions of the batch.
        shared: What may be kept and given to others.
        whole: What the caller gets if these are all rows of the call, as they came; NOTHING otherwise.
    """

    found: list[Found]
    shared: list[Rows]
    whole: object


NO_ROWS = Computed([], [], NOTHING)


class Computer:
    """Computes what the tiers of one cache do not have, and some of what they have to see that it is right.

    Args:
        options: The options in force.
        tiers: Where rows are kept.
        checks: What must hold before a row is kept.
        assembly: Learns where results lie.
        verdicts: What is known of namespaces.
        settled: Is told in which state a call leaves the modules.
        relatives: Is told of the keys that rows are kept under.
        notices: Counts and logs what happens.
    """

    def __init__(
        self,
        options: CacheOptions,
        tiers: Tiers,
        checks: Checks,
        assembly: Assembly,
        verdicts: Verdicts,
        settled: Settled,
        relatives: Relatives,
        notices: Notices,
    ) -> None:
        self._options = options
        self._tiers = tiers
        self._settled = settled
        self._relatives = relatives
        self._verdicts = verdicts
        self._notices = notices
        self._checks = checks
        self._assembly = assembly
        self._forwarding = Forwarding(options.cache_dtype, tiers.known, checks.padding, assembly, notices)

    def compute(self, call: CachedCall, own: list[int], doubted: list[int], cached: Sequence[Found]) -> Computed:
        """Forward rows, with some that are cached beside them, and keep what may be kept.

        Args:
            call: The call.
            own: Positions of the rows that no tier has.
            doubted: Positions of rows that are cached and to be compared.
            cached: The values that are cached.

        Raises:
            GoAround: If the call cannot be cached.
        """
        plan = self._checks.before(Plan(call, own, doubted, cached))
        inputs = self._inputs_of(plan)
        try:
            output = self._checked(plan)
        except Condemned as around:
            self._tiers.forget_namespace(call)
            if around.verdict is not None:
                self._tiers.judge(call, around.verdict)
            raise
        if output is not None:
            return self._keep(plan, output, inputs)
        return self.compute(call, own, [], cached) if own else NO_ROWS

    def _inputs_of(self, plan: Plan) -> dict[int, bytes]:
        """Return digests of what keys of the user's stand for, by position, before the call can change it."""
        if plan.call.keys is None:
            return {}
        positions = [*plan.own, *plan.doubted]
        return dict(zip(positions, plan.call.batch.inputs(positions), strict=True))

    # -- run ----------------------------------------------------------------------------------------------------------

    def _checked(self, plan: Plan) -> Output | None:
        """Run a plan and let each check look at what came of it; return None if it failed because of an audit."""
        output = self._forward(plan)
        if isinstance(output, Exception):
            if not plan.doubted:
                self._compute_whole(plan.call, output)
            # An audit costs nobody a result.
            self._notices.fault(Fault.VERIFY_HITS, f"hits could not be computed again ({output!r})")
            return None
        return self._checks.after(plan, output)

    def _forward(self, plan: Plan) -> Output | Exception:
        """Run a plan; return what it failed with if its rows were not put together by the caller."""
        try:
            returned = self._forwarding.run(plan)
        except Exception as error:
            if plan.is_as_given:
                raise
            return error
        returned = self._checks.returned(plan, returned)
        try:
            return self._forwarding.take_apart(plan, returned)
        except UncacheableError as error:
            if plan.is_as_given:
                raise
            return error

    def _compute_whole(self, call: CachedCall, failure: Exception) -> NoReturn:
        """Compute the call as the caller made it, after another composition of its rows failed.

        If that succeeds, the module may be one that cannot be given any rows together, as caching by samples
        needs. It may also have been a passing fault, so nothing is concluded where rows were found to be their
        own before; nor where the whole result cannot be kept either.
        """
        result = call.function(*call.args, **call.kwargs)
        if isinstance(failure, UncacheableError):
            self._forwarding.check_whole(call, result)
        if is_out_of_memory(failure):
            self._verdicts.note(call.namespace, None)  # one row more did not fit: not to be tried again
            raise GoAround(Reason.OUT_OF_MEMORY, result=result)
        if self._verdicts.of(call.namespace) is Verdict.INDEPENDENT:
            self._verdicts.note(call.namespace, Verdict.INDEPENDENT)  # the witness is not to be tried again
            self._notices.fault(
                Fault.OTHER_BATCH_FAILED, f"a call failed with some of its rows, not with all ({failure!r})"
            )
            raise GoAround(Reason.OTHER_BATCH_FAILED, result=result)
        raise self._verdicts.condemned(call.namespace, result)

    # -- keep ---------------------------------------------------------------------------------------------------------

    def _keep(self, plan: Plan, output: Output, inputs: Mapping[int, bytes]) -> Computed:
        """Hand rows to the tiers, if nothing speaks against it, and see to what others are to know."""
        call, computed = plan.call, [*output.computed]
        if call.namespace != call.own_namespace:
            self._settled.note(call)
            self._assembly.note_devices(call, output.results.devices(output.tree))
        if output.verdict is not None:
            self._tiers.judge(call, output.verdict)
        self._count(plan, output)
        for item in output.replaced:
            copied = Found(item.positions, item.layout, item.data.copy())
            self._tiers.replace(call, _rows_to_keep(call, copied, inputs))

        shared = [_rows_to_keep(call, item, inputs) for item in computed]
        if output.drop is None:
            keep = self._tiers.keep if self._options.looks_up else self._tiers.replace
            for rows in shared:
                keep(call, rows)
            self._relatives.note(call)
        else:
            shared = []
            if not self._options.looks_up:
                self._tiers.forget(call, [call.digests[p] for p in plan.own])
        self._checks.witness.leave(plan, output)

        whole: object = NOTHING
        if plan.is_as_given and output.results.returns_as_given:
            whole = output.results.rounded(output.tree, self._options.cache_dtype)
        elif output.drop is None:
            # What is kept is the queue's and other threads' as well; the caller gets bytes of its own.
            computed = [Found(item.positions, item.layout, item.data.copy()) for item in computed]
        return Computed([*computed, *output.replaced], shared, whole)

    def _count(self, plan: Plan, output: Output) -> None:
        """Count computed rows, and those that are not kept."""
        n = len(plan.own)
        self._notices.counters.add(misses=n)
        if output.drop is not None:
            self._notices.drop(output.drop, n)
        if output.overflowed:
            self._notices.counters.add(overflowed_values=output.overflowed)
            self._notices.say("overflow", f"cache_dtype={self._options.cache_dtype} made finite values infinite")


def _rows_to_keep(call: CachedCall, computed: Found, inputs: Mapping[int, bytes]) -> Rows:
    """Return computed rows as they are kept: where keys of the user's stand for the inputs, with a digest of these."""
    rows = Rows([call.digests[p] for p in computed.positions], computed.layout, computed.data)
    return rows if call.keys is None else sealed(rows, [inputs[p] for p in computed.positions])
