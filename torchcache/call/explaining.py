"""What the key of a call is made of, and where its rows would be found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchcache.call.key import Keys
from torchcache.call.settled import Settled
from torchcache.call.state import State
from torchcache.checks.checks import Checks
from torchcache.checks.verdicts import Verdicts
from torchcache.explanation import Explanation, SampleExplanation
from torchcache.inputs.sample_keys import keys_of
from torchcache.keys.contract import AnyIdentity
from torchcache.keys.digest import digest_parts
from torchcache.keys.identity import Function
from torchcache.tiers.tiers import Tiers


class Explainer:
    """Explains calls of one target; computes nothing.

    Args:
        name: What to call the target.
        keys: Names calls.
        state: Says whether gradients speak against a call.
        identity: The state that shapes results.
        tiers: Where rows are kept.
        checks: Know what speaks against caching a namespace.
        verdicts: What is known of namespaces.
        settled: Knows where to look for the rows of calls that set training flags.
    """

    def __init__(
        self,
        name: str,
        keys: Keys,
        state: State,
        identity: AnyIdentity,
        tiers: Tiers,
        checks: Checks,
        verdicts: Verdicts,
        settled: Settled,
    ) -> None:
        self._name = name
        self._keys = keys
        self._state = state
        self._identity = identity
        self._tiers = tiers
        self._checks = checks
        self._verdicts = verdicts
        self._settled = settled

    def explain(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_off: bool = False
    ) -> Explanation:
        """Explain one call.

        Args:
            function: The user's own function, bound to its instance.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            is_off: Whether caching is off here.

        Raises:
            UncacheableError: As the call would.
        """
        batch = self._keys.split(function, args, kwargs)
        identity = self._identity.apart()
        look = identity.look()
        if is_off:
            reason: str | None = "disabled"
        else:
            reason = batch.bypass_reason() or look.reason or self._state.reason_of_gradients()

        parts = {name: digest.hex() for name, digest in identity.describe()}
        for name, value in batch.shared_parts():
            parts[name] = digest_parts([value]).hex()

        signature = batch.signature()
        namespace = self._keys.namespace(batch.form(signature), look)
        if look.is_in_training:
            namespace = self._settled.find(namespace, self._tiers.open(look))
        reason = reason or self._checks.reason_against(namespace, self._verdicts.of(namespace))
        sample_keys = keys_of(batch)
        digests = [] if batch.bypass_reason() else batch.digests(signature, sample_keys)
        places = ["nowhere"] * len(digests)
        if reason is None and digests:
            places = self._tiers.places(look, namespace, digests)

        pairs = zip(digests, places, strict=True)
        return Explanation(
            target=self._name,
            module_hash=look.module_hash,
            namespace=namespace.hex(),
            bypass_reason=None if reason is None else str(reason),
            moved=tuple(map(str, self._identity.moves())),
            parts=parts,
            samples=tuple(SampleExplanation(digest=digest.hex(), found_in=place) for digest, place in pairs),
        )
