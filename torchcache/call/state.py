"""The present state of what is cached, and whether a call in it can be cached."""

from __future__ import annotations

import torch

from torchcache.errors import TorchcacheError, UncacheableError
from torchcache.keys.contract import AnyIdentity
from torchcache.keys.identity import Look
from torchcache.keys.ranks import is_in_a_job
from torchcache.options import CacheOptions
from torchcache.report.go_around import GoAround
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason

#: What else is logged of detached outputs of parameters that require grad, in a job of several ranks.
_REDUCER_WAITS = (
    ". Under DistributedDataParallel, one of the two is needed: it waits for the gradients of all parameters that "
    "required grad when it was made, and the second iteration fails with 'Expected to have finished reduction in the "
    "prior iteration'"
)

#: How many bytes of weights are compared in a millisecond; a comparison that takes longer is mentioned in the log.
_BYTES_PER_MILLISECOND = 10_000_000


class State:
    """Looks at the state of one target.

    Args:
        name: What to call the target in an error.
        identity: The state that shapes results.
        options: The options in force.
        notices: Counts and logs what happens.
    """

    def __init__(self, name: str, identity: AnyIdentity, options: CacheOptions, notices: Notices) -> None:
        self._name = name
        self._identity = identity
        self._when_grad = options.when_grad
        self._notices = notices

    def look(self) -> Look:
        """Name the present state, and say why a call in it is not cached, if so."""
        try:
            return self._identity.look()
        except TorchcacheError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign __repr__ or __eq__ raises
            self._notices.error(error, 0)
        return Look("", b"", is_private=True, reason=Reason.UNREADABLE_STATE)

    def look_for_call(self) -> Look:
        """Name the present state, in which a call can be cached.

        Raises:
            GoAround: If it cannot.
            UncacheableError: If parameters require grad and ``when_grad="raise"``.
        """
        look = self.look()
        reason = look.reason
        # Most modules are frozen and small: then there is nothing to decide or to say.
        if reason is None and (self._identity.requires_grad() or self._identity.whole_bytes() > _BYTES_PER_MILLISECOND):
            reason = self.reason_of_gradients()
        if reason is Reason.STATE_CHANGES_AT_EVERY_CALL:
            self._notices.moved([move.path for move in self._identity.moves()])
        if reason:
            raise GoAround(reason, look.evidence)
        return look

    def reason_of_gradients(self) -> Reason | None:
        """Say why parameters that require grad speak against caching a call now, or None.

        Raises:
            UncacheableError: If some do and ``when_grad="raise"``.
        """
        n_bytes = self._identity.whole_bytes()
        cost = _cost_of(n_bytes) if n_bytes > _BYTES_PER_MILLISECOND else ""
        if not torch.is_grad_enabled() or not self._identity.requires_grad():
            if cost:
                self._say_cost(cost)
            return None
        if self._when_grad == "bypass":
            return Reason.PARAMETERS_REQUIRE_GRAD
        if self._when_grad == "raise":
            raise UncacheableError(
                f"parameters of {self._name} require grad and when_grad='raise': call "
                "requires_grad_(False) on them, or call it under torch.no_grad()"
            )
        self._say_detached(cost)
        return None

    def _say_cost(self, cost: str) -> None:
        self._notices.say(
            "cost",
            f"weights that require grad or were made in inference mode are compared at each call: {cost}; if "
            "that is too slow, call requires_grad_(False) on the module and make it outside of inference mode",
        )

    def _say_detached(self, cost: str) -> None:
        message = (
            "parameters require grad, but cached outputs are detached, so they will not be trained; if that is "
            "meant, call requires_grad_(False) on the module"
        )
        if cost:
            message += f", which also spares the comparison of {cost} at each call"
        message += "; if not, set when_grad='bypass'"
        if is_in_a_job():
            message += _REDUCER_WAITS
        self._notices.say("detach", message)


def _cost_of(n_bytes: int) -> str:
    """Say how much is compared, and for how long."""
    return f"{n_bytes / 1e6:.0f} MB, some {n_bytes / _BYTES_PER_MILLISECOND:.0f} ms"
