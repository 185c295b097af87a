"""Whether the state is still the one that a call was looked up in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torchcache.checks.plan import Check, Output, Plan
from torchcache.checks.verdicts import Verdicts
from torchcache.inputs.batch import Batch
from torchcache.keys.contract import FollowsState
from torchcache.keys.identity import Look
from torchcache.keys.moves import Move, show_moves
from torchcache.kinds import Drop
from torchcache.report.notices import Notices
from torchcache.storage.contract import Verdict

#: After so many drops in a row it is logged what moved: once may be another thread.
_DROPS_UNTIL_SAID = 3

#: Returns the namespace of a batch in a state.
Namer = Callable[[Batch, Look], bytes]


class MovedState(Check):
    """Notices state that moved while rows were computed: they would be kept under the name of what it was.

    A call that begins with ``self.eval()`` is found again where it leaves the modules: its rows are kept under the
    state after it, if they would be the same in both.

    Args:
        identity: The state that shapes results.
        name: Names a batch in a state.
        verdicts: What is known of namespaces.
        notices: Counts and logs what moved.
    """

    def __init__(self, identity: FollowsState, name: Namer, verdicts: Verdicts, notices: Notices) -> None:
        self._identity = identity
        self._name = name
        self._verdicts = verdicts
        self._notices = notices
        self._drops = 0  # in a row; threads may count one too few

    def after(self, plan: Plan, output: Output) -> Output:
        """Look at the state.

        Raises:
            Condemned: If rows are known to depend on their batch in the state that the call leaves.
        """
        if output.drop is not None:
            return output
        call = plan.call
        if not self._identity.has_moved(call.look):
            call.namespace = call.own_namespace
            self._drops = 0
            return replace(output, is_settled=True)

        look = self._identity.look_past_flags(call.look)
        if look is None:
            self._note_drop()
            return replace(output, drop=Drop.STATE_MOVED)
        self._drops = 0
        call.look = look
        call.namespace = self._name(call.batch, look)
        if self._verdicts.of(call.namespace) is Verdict.DEPENDENT:
            raise self._verdicts.condemned(call.namespace, output.whole)
        return replace(output, is_settled=True)

    def _note_drop(self) -> None:
        """Count what moved, and log it where rows were dropped for it several times in a row."""
        moves = self._identity.moves()
        self._notices.moved([move.path for move in moves])
        self._drops += 1
        if self._drops >= _DROPS_UNTIL_SAID:
            self._notices.say(
                Drop.STATE_MOVED,
                f"{show_moves(moves)} changed while rows were computed, {self._drops} times in a row, so nothing is "
                f"kept ({Drop.STATE_MOVED}); {_remedy(moves)}",
            )


def _remedy(moves: Sequence[Move]) -> str:
    """Say what to do about what moved."""
    kinds = {move.kind for move in moves}
    if kinds == {"training flag"}:
        return "call eval() or train() before the call, not in it"
    if kinds == {"weight"}:
        return "do not write weights during a call, from another thread for example"
    attributes = [move.path for move in moves if move.kind == "attribute"]
    if attributes:
        return f"what of it shapes no result can be left out, as in ignore=({attributes[0]!r},)"
    return "do not change the model during a call"
