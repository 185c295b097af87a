"""What is to be computed of a call, what came of it, and the steps of a check between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchcache.checks.draws import Draws
from torchcache.inputs.cached_call import CachedCall
from torchcache.kinds import Drop
from torchcache.layout import Found
from torchcache.report.go_around import NOTHING
from torchcache.report.reasons import Reason
from torchcache.results.batches import Results
from torchcache.results.tree import Tree
from torchcache.storage.contract import Verdict


@dataclass(frozen=True, slots=True)
class Witness:
    """A sample whose value is known, with which another batch can be checked.

    Attributes:
        rows: Its rows of the arguments, as ``Batch.rows`` returned them, as often as it is to be computed.
        n: How often that is.
        digest: Its own.
        cached: Its value.
        marks: Of the weights it was computed with.
        key: Of the user's own, if it had one.
    """

    rows: tuple[Any, ...]
    n: int
    digest: bytes
    cached: Found
    marks: object
    key: bytes | None


@dataclass(frozen=True, slots=True)
class Before:
    """What can happen beside a result, as it stood before the call was computed.

    Attributes:
        collectives: What this process has done together with other ranks.
        draws: The random number generators that the call may draw from.
    """

    collectives: tuple[int, ...]
    draws: Draws


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be computed of a call, and why.

    Attributes:
        call: The call.
        own: Positions of the rows that no tier has.
        doubted: Positions of rows that are cached and computed again, to be compared.
        cached: The values that the tiers have.
        before: What can happen beside the result, as it stood before.
        is_trial: The call is to show whether it is computed without the other ranks of the job.
        is_whole: All rows of the call are forwarded, also those that are cached, and equal ones.
        is_known: Rows of such calls are known not to depend on their batch, or are not checked.
        witness: A row of another batch that is computed at the end of this one, if there is one.
    """

    call: CachedCall
    own: list[int]
    doubted: list[int]
    cached: Sequence[Found]
    before: Before | None = None
    is_trial: bool = False
    is_whole: bool = False
    is_known: bool = False
    witness: Witness | None = None

    @property
    def positions(self) -> list[int]:
        """The positions of the rows that are forwarded, in order; the witness comes after them."""
        return [*range(self.call.batch.n)] if self.is_whole else [*self.own, *self.doubted]

    @property
    def total(self) -> int:
        """How many rows are forwarded, with the witness."""
        return len(self.positions) + (0 if self.witness is None else self.witness.n)

    @property
    def is_as_given(self) -> bool:
        """Whether the call is forwarded as its caller made it."""
        if self.witness is not None:
            return False
        return self.is_whole or (not self.doubted and len(self.own) == self.call.batch.n)


@dataclass(frozen=True, slots=True)
class Returned:
    """What a function returned for a plan.

    Attributes:
        given: What it returned.
        results: How rows lie in it.
        whole: The result of the call, if it was forwarded as its caller made it; NOTHING otherwise.
        changed: The name of an argument that was changed; "" if there is none.
        effect: What else happened, as a reason to go around the cache; None: nothing.
    """

    given: object
    results: Results
    whole: object = NOTHING
    changed: str = ""
    effect: Reason | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """The rows that came of a plan.

    Attributes:
        results: How rows lie in what the function returned.
        tree: What it returned, with the batch in front.
        whole: As of ``Returned``.
        parts: All rows, numbered as they were forwarded.
        computed: The plan's own rows, at their positions.
        effect: As of ``Returned``.
        overflowed: How many finite values ``cache_dtype`` made infinite.
        is_settled: Nothing happened beside the result, and the state is still the one that was looked at.
        drop: Why the rows must not be kept, or None.
        verdict: What was found out about the namespace and is not known yet to other caches, or None.
        next_witness: Position of the row that is to be computed with the next batch, or None.
        replaced: Cached rows that came out different, as they came out.
    """

    results: Results
    tree: Tree
    whole: object
    parts: Sequence[Found]
    computed: Sequence[Found]
    effect: Reason | None
    overflowed: int = 0
    is_settled: bool = False
    drop: Drop | None = None
    verdict: Verdict | None = None
    next_witness: int | None = None
    replaced: Sequence[Found] = ()


class Check:
    """Something that must hold before a computed row is kept.

    It has a state of its own, safe from any thread. Each step does nothing unless a check does something there.
    """

    def before(self, plan: Plan) -> Plan:
        """Return the plan with what the check wants to have computed."""
        return plan

    def returned(self, plan: Plan, returned: Returned) -> Returned:  # noqa: ARG002 - for those that need it
        """Look at what was returned, before it is taken apart.

        Raises:
            GoAround: If it cannot be cached.
        """
        return returned

    def after(self, plan: Plan, output: Output) -> Output:  # noqa: ARG002 - as above
        """Look at the rows, and say what was found.

        Raises:
            GoAround: If they cannot be cached.
        """
        return output

    def forget(self) -> None:
        """Forget what calls have shown so far."""
