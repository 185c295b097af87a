"""What happens while a call is computed, beside its result: random numbers are drawn, or other ranks talked to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from torchcache.checks.draws import Draws
from torchcache.checks.plan import Before, Check, Output, Plan, Returned
from torchcache.checks.verdicts import remember
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.contract import FollowsState
from torchcache.keys.ranks import collectives_done
from torchcache.kinds import Drop
from torchcache.layout import Found
from torchcache.process import ForkLock
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason
from torchcache.results.classes import KnownClasses

#: A namespace whose computed calls had an effect this many times in a row is not cached for so many calls.
_EFFECTS = 3
_CALLS_UNTIL_TRIED = 64

#: What rows count as that were computed beside an effect.
_DROPS = {Reason.RANDOM_NUMBERS: Drop.RANDOM_NUMBERS, Reason.COLLECTIVES: Drop.COLLECTIVES}


class SideEffects(Check):
    """Notices random numbers and collectives. Rows that were computed beside them are not kept.

    Args:
        cache_dtype: What values are rounded to, if they are.
        identity: The state that shapes results.
        known: What classes the values may have.
        notices: Counts and logs what happens.

    Attributes:
        noted: By namespace, how many computed calls in a row had an effect, and which the last one had.
    """

    def __init__(
        self,
        cache_dtype: torch.dtype | None,
        identity: FollowsState,
        known: KnownClasses,
        notices: Notices,
    ) -> None:
        self._cache_dtype = cache_dtype
        self._identity = identity
        self._known = known
        self._notices = notices
        self._lock = ForkLock()
        # Guarded by _lock:
        self.noted: OrderedDict[bytes, tuple[int, Reason]] = OrderedDict()
        self._alone: OrderedDict[bytes, None] = OrderedDict()  # namespaces that were computed without other ranks

    def before(self, plan: Plan) -> Plan:
        collectives = collectives_done()
        draws = Draws([*self._identity.generators(), *plan.call.batch.generators])
        # Code that the walk does not see may talk to other ranks, and they forward all rows of a call. So does the
        # first computed call of a namespace in a job, until one shows that it is computed alone.
        is_trial = bool(collectives) and not self._is_alone(plan.call.namespace)
        return replace(plan, before=Before(collectives, draws), is_trial=is_trial, is_whole=plan.is_whole or is_trial)

    def returned(self, plan: Plan, returned: Returned) -> Returned:
        assert plan.before is not None
        if plan.before.draws.are_there():
            return replace(returned, effect=Reason.RANDOM_NUMBERS)
        if collectives_done() != plan.before.collectives:  # by code that the walk does not see, such as a library's
            return replace(returned, effect=Reason.COLLECTIVES)
        return returned

    def after(self, plan: Plan, output: Output) -> Output:
        assert plan.before is not None
        namespace, effect = plan.call.namespace, output.effect
        draws = plan.before.draws
        if effect is Reason.RANDOM_NUMBERS and self._holds_whatever_is_drawn(plan.call, draws, output.parts):
            effect = None
        self._note(namespace, effect)
        if effect is not None:
            self._notices.bypass(effect, 0)
            return replace(output, effect=effect, drop=_DROPS[effect])
        if plan.is_trial:
            self._note_alone(namespace)
        return output if output.effect is None else replace(output, effect=None)

    def forget(self) -> None:
        with self._lock.raw:
            self.noted.clear()
            self._alone.clear()

    def reason_against(self, namespace: bytes) -> Reason | None:
        """Return the effect that calls are known to have, or None; now and then one is tried again."""
        with self._lock.raw:
            noted = self.noted.get(namespace)
            if noted is None or noted[0] < _EFFECTS:
                return None
            count, effect = noted
            if count >= _EFFECTS + _CALLS_UNTIL_TRIED:
                self.noted[namespace] = _EFFECTS - 1, effect
                return None
            self.noted[namespace] = count + 1, effect
            return effect

    def note_chance(self, namespace: bytes) -> Drop:
        """Note that the same rows came back different in the same batch; return why they are not kept."""
        self._note(namespace, Reason.RANDOM_NUMBERS)
        self._notices.bypass(Reason.RANDOM_NUMBERS, 0)
        return Drop.RANDOM_NUMBERS

    def _note(self, namespace: bytes, effect: Reason | None) -> None:
        """Remember whether something else happened during a computed call.

        It may have been another thread, so one such call says little and three in a row a lot.
        """
        with self._lock.raw:
            if effect is None:
                self.noted.pop(namespace, None)
                return
            self._alone.pop(namespace, None)
            before = self.noted.get(namespace)
            remember(self.noted, namespace, (1 if before is None else before[0] + 1, effect))

    def _note_alone(self, namespace: bytes) -> None:
        """Remember that a call was computed in a job of several ranks without anything that they do together."""
        with self._lock.raw:
            remember(self._alone, namespace, None)

    def _is_alone(self, namespace: bytes) -> bool:
        with self._lock.raw:
            return namespace in self._alone

    def _holds_whatever_is_drawn(self, call: CachedCall, draws: Draws, parts: Sequence[Found]) -> bool:
        """Tell whether a call that is one sample comes to the same result with the lowest and the highest draws.

        So it does where a library draws a number to decide on what is decided: a transform of probability 1.
        """
        if call.batch.is_divisible or not draws.can_be_tried():
            return False
        (first,) = parts
        try:
            for _ in draws.tries():
                with torch.no_grad():
                    tree = call.batch.results.flatten(call.function(*call.args, **call.kwargs))
                (again,), _ = call.batch.results.take_apart(tree, 1, self._cache_dtype, self._known)
                if again.layout != first.layout or not np.array_equal(again.data, first.data):
                    return False
        except Exception:  # noqa: BLE001 - whatever it raises at unlikely numbers: they matter
            return False
        draws.note_without_effect()
        return True
