"""All checks of one cache, in order."""

from __future__ import annotations

from torchcache.checks.audit import Audit
from torchcache.checks.changed_inputs import ChangedInputs
from torchcache.checks.distances import Distances
from torchcache.checks.moved_state import MovedState, Namer
from torchcache.checks.padding import Padding
from torchcache.checks.plain_numbers import PlainNumbers
from torchcache.checks.plan import Check, Output, Plan, Returned
from torchcache.checks.side_effects import SideEffects
from torchcache.checks.verdicts import Verdicts
from torchcache.checks.witness import WitnessCheck
from torchcache.keys.contract import FollowsState
from torchcache.keys.identity import Target
from torchcache.options import CacheOptions
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason
from torchcache.results.classes import KnownClasses
from torchcache.storage.contract import Verdict


class Checks:
    """What must hold before computed rows are kept.

    Args:
        target: What is cached.
        options: The options in force.
        identity: The state that shapes results.
        name: Names a batch in a state, as the call does.
        known: What classes the values may have.
        verdicts: What is known of namespaces.
        notices: Counts and logs what happens.

    Attributes:
        witness: Whether rows depend on their batch.
        audit: Hits that are computed again.
        padding: How rows lie in the results of padded batches.
    """

    def __init__(
        self,
        target: Target,
        options: CacheOptions,
        identity: FollowsState,
        name: Namer,
        known: KnownClasses,
        verdicts: Verdicts,
        notices: Notices,
    ) -> None:
        distances = Distances(options.cache_dtype, identity, known)
        self._changed_inputs = ChangedInputs()
        self._side_effects = SideEffects(options.cache_dtype, identity, known, notices)
        self.witness: WitnessCheck = WitnessCheck(options, identity, known, distances, verdicts, self._side_effects)
        self.audit: Audit = Audit(options, distances, notices)
        self.padding: Padding = Padding(target, options, known, distances, verdicts, notices)
        # Rows are compared only once it is known that nothing but the call shaped them. The plan shrinks in this order
        # too: where the whole call is forwarded, there is nothing to audit.
        self._in_order: tuple[Check, ...] = (
            self._changed_inputs,
            self._side_effects,
            MovedState(identity, name, verdicts, notices),
            self.witness,
            self.audit,
            PlainNumbers(known),
        )

    def reason_against(self, namespace: bytes, verdict: Verdict | None) -> Reason | None:
        """Say what earlier calls of a namespace showed that speaks against caching it, or None.

        Args:
            namespace: Of a call that is not looked up yet.
            verdict: What is known of its rows.
        """
        if verdict is Verdict.DEPENDENT:
            return Reason.ROWS_DEPEND_ON_BATCH
        # Most caches have noted nothing of the kind, and then a hit does not pay for the question.
        reason = self._changed_inputs.reason_against(namespace) if self._changed_inputs.noted else None
        if reason is None and self._side_effects.noted:
            reason = self._side_effects.reason_against(namespace)
        return reason

    def before(self, plan: Plan) -> Plan:
        """Return the plan with what the checks want to have computed."""
        for check in self._in_order:
            plan = check.before(plan)
        return plan

    def returned(self, plan: Plan, returned: Returned) -> Returned:
        """Look at what was returned, before it is taken apart.

        Raises:
            GoAround: If it cannot be cached.
        """
        for check in self._in_order:
            returned = check.returned(plan, returned)
        return returned

    def after(self, plan: Plan, output: Output) -> Output:
        """Look at the rows, and say what was found.

        Raises:
            GoAround: If they cannot be cached.
        """
        for check in self._in_order:
            output = check.after(plan, output)
        return output

    def forget(self) -> None:
        """Forget what calls have shown so far."""
        for check in self._in_order:
            check.forget()
