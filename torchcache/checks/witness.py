"""Whether rows depend on their batch: some are computed although they are known, and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torchcache.checks.distances import Distances
from torchcache.checks.few_rows import FewRows, SmallBatches
from torchcache.checks.plan import Check, Output, Plan, Witness
from torchcache.checks.side_effects import SideEffects
from torchcache.checks.verdicts import Verdicts
from torchcache.inputs.cached_call import CachedCall
from torchcache.inputs.padded import PaddedBatch
from torchcache.keys.contract import FollowsState
from torchcache.kinds import Drop
from torchcache.layout import Found
from torchcache.options import CacheOptions
from torchcache.results.classes import KnownClasses
from torchcache.storage.contract import Verdict


class WitnessCheck(Check):
    """Finds out whether rows depend on their batch.

    A few rows of the first computed batch of a namespace are computed once more by themselves. The batch also leaves
    one row as a witness, which the second one carries at its end: a row that depends on those before it, or on all,
    comes back changed.

    Args:
        options: The options in force.
        identity: The state that shapes results.
        known: What classes the values may have.
        distances: Compares rows.
        verdicts: What is known of namespaces.
        side_effects: Is told of rows that come back different in the same batch.
    """

    def __init__(
        self,
        options: CacheOptions,
        identity: FollowsState,
        known: KnownClasses,
        distances: Distances,
        verdicts: Verdicts,
        side_effects: SideEffects,
    ) -> None:
        self._check_rows = options.check_rows
        self._is_named = bool(options.persistent_module_hash)
        self._identity = identity
        self._known = known
        self._distances = distances
        self._verdicts = verdicts
        self._side_effects = side_effects
        self._small_batches = SmallBatches(options.cache_dtype, identity, known, distances)

    def knows_rows(self, call: CachedCall) -> bool:
        """Tell whether it was found out if rows of a call depend on their batch, or is not to be."""
        if not self._check_rows or not call.batch.is_divisible:
            return True
        return self._verdicts.of(call.namespace) is not Verdict.UNKNOWN

    def are_copies(self, call: CachedCall) -> bool:
        """Tell whether a call has one sample, however often, and that does not matter."""
        return len(set(call.digests)) == 1 and self._verdicts.is_repeated(call.namespace)

    def before(self, plan: Plan) -> Plan:
        wants_witness = plan.own and self._check_rows and not plan.is_trial
        return replace(
            plan,
            # Until rows are known to be their own, equal ones may come out different.
            is_whole=plan.is_whole or plan.call.is_unchecked,
            is_known=self.knows_rows(plan.call),
            witness=self._find_witness(plan.call) if wants_witness else None,
        )

    def after(self, plan: Plan, output: Output) -> Output:
        if output.is_settled and plan.own and (plan.witness is not None or not plan.is_known):
            output = self._compare(plan, output)
        # Rows of nothing but zeros are kept, although none is looked up before it is known what they are.
        if output.drop is not None or plan.total == 1 or output.verdict is Verdict.UNDECIDED:
            return output
        if not self.knows_rows(plan.call) and not self.are_copies(plan.call):
            return replace(output, drop=Drop.ROWS_NOT_CHECKED)
        return output

    def forget(self) -> None:
        self._verdicts.clear()

    def leave(self, plan: Plan, output: Output) -> None:
        """Leave a row of a first computed batch to be computed with the next one."""
        position = output.next_witness
        if position is None:
            return
        call = plan.call
        item = next(item for item in output.computed if position in item.positions)
        i = list(item.positions).index(position)
        # Each row of a padded batch has a length of its own, and one length can be added to a batch.
        n = 1 if isinstance(call.batch, PaddedBatch) else FewRows.witnesses(plan.total)
        witness = Witness(
            rows=call.batch.rows([position] * n),
            n=n,
            digest=call.digests[position],
            cached=Found([position], item.layout, item.data[i : i + 1].copy()),
            marks=self._identity.marks(),
            key=None if call.keys is None else call.keys[position],
        )
        self._verdicts.leave(call.namespace, witness)

    def _find_witness(self, call: CachedCall) -> Witness | None:
        """Return the row with which this batch can be checked, if it is still to be checked."""
        # What is computed alone is served to batches of one, so there is nothing to find out.
        if not call.batch.is_divisible or call.batch.n == 1:
            return None
        witness = self._verdicts.witness(call.namespace)
        if witness is None or witness.marks != self._identity.marks():
            return None
        has_others = any(digest != witness.digest for digest in call.digests)
        return witness if has_others and (witness.key is not None or call.keys is None) else None

    def _compare(self, plan: Plan, output: Output) -> Output:
        """Compare the witness and a few rows with what they were.

        Raises:
            Condemned: If one of them depends on its batch.
        """
        call = plan.call
        apart: list[float | None] = []
        if plan.witness is not None:
            cached, rows = plan.witness.cached, range(len(plan.positions), plan.total)
            apart += [self._distances.of(call, cached, row, output.parts) for row in rows]

        few: FewRows | None = None
        if not plan.is_known and plan.total > 1:
            few = FewRows.of_batch(output.computed, call.batch, output.results, self._known)
        if not plan.is_known and plan.witness is None:
            # Also where a plain value may be the batch size: one row more settles that.
            position = output.computed[0].positions[0] if few is None else few.witness
            output = replace(output, next_witness=position)

        allowed = self._distances.allowed(call, output.tree)
        difference = ""
        if few is not None:
            compared = self._small_batches.compare(call, few, plan.total, output, allowed)
            distance, difference = compared.distance, compared.difference
            if distance is not None and math.isnan(distance):
                output = replace(output, drop=self._note_chance(call), next_witness=None)
            elif not few.are_copies or (distance or 0.0) > allowed:
                apart.append(distance)
                if compared.is_vacuous:
                    output = replace(output, verdict=Verdict.UNDECIDED)
            elif plan.witness is None:
                self._verdicts.note_repeated(call.namespace)
                output = replace(output, verdict=Verdict.REPEATED)
        return self._judge(call, output, apart, allowed, difference)

    def _note_chance(self, call: CachedCall) -> Drop | None:
        """Note that the same rows came back different in the same batch; return why they are not kept.

        A name of the user's own vouches that it does not matter.
        """
        if self._is_named:
            self._verdicts.note(call.namespace, None)
            return None
        return self._side_effects.note_chance(call.namespace)

    def _judge(
        self, call: CachedCall, output: Output, apart: Sequence[float | None], allowed: float, difference: str
    ) -> Output:
        """Remember what comparisons say of a namespace.

        Args:
            call: The call.
            output: What came of it.
            apart: How far each comparison found two values of a row apart; None where it proves nothing.
            allowed: How far they may be.
            difference: In what their form differs, if that is known.

        Raises:
            Condemned: If one is further apart.
        """
        said = [distance for distance in apart if distance is not None]
        if said and max(said) > allowed:
            raise self._verdicts.condemned(call.namespace, output.whole, difference)
        if said:
            is_news = self._verdicts.of(call.namespace) is not Verdict.INDEPENDENT
            self._verdicts.note(call.namespace, Verdict.INDEPENDENT)
            return replace(output, verdict=Verdict.INDEPENDENT) if is_news else output
        if apart:
            self._verdicts.note_vacuous(call.namespace)  # another batch may tell
        return output
