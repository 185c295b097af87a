"""The error of a call that would have to be computed in ``mode="require"``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchcache.call.explaining import Explainer
from torchcache.call.relatives import Relatives
from torchcache.call.state import State
from torchcache.errors import CacheMissError
from torchcache.explanation import Explanation
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.identity import Function
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason
from torchcache.tiers.tiers import Tiers

#: At most this many samples that are not cached are named in an error.
_MOST_SAMPLES_NAMED = 5


class Misses:
    """Makes the errors of one target.

    Args:
        name: What to call the target.
        explainer: Explains the call that missed.
        state: Says whether another process could have filled the cache.
        tiers: Where rows were looked for.
        relatives: Knows of results under other keys.
        notices: Knows reasons, and the last fault.
    """

    def __init__(
        self, name: str, explainer: Explainer, state: State, tiers: Tiers, relatives: Relatives, notices: Notices
    ) -> None:
        self._name = name
        self._explainer = explainer
        self._state = state
        self._tiers = tiers
        self._relatives = relatives
        self._notices = notices

    def error(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        reason: Reason | None = None,
        evidence: str = "",
        missing: Sequence[int] = (),
        call: CachedCall | None = None,
    ) -> CacheMissError:
        """Return the error of a call.

        Args:
            function: The user's own function, bound to its instance.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            reason: Why the call cannot be cached; None if samples are missing.
            evidence: What was found that is the reason.
            missing: Positions of the samples that no tier has.
            call: The call, if it was looked up.
        """
        explanation: Explanation | None = None
        with contextlib.suppress(Exception):  # what cannot be explained is an error all the same
            explanation = self._explainer.explain(function, args, kwargs)
        samples = () if explanation is None else explanation.samples
        if reason is not None:
            because = self._notices.because(reason, evidence)
            text = f"{self._name} would have to be computed, and mode='require' computes nothing: {because}"
        else:
            digests = [sample.digest for sample in samples]
            text = self._missing_text(missing, digests)
            other = ""
            if call is not None and call.source is not None:
                other = self._relatives.describe(call.source, call.batch, call.namespace)
            if other:
                text += f". Results are there under another key: {other}"
        if samples and any(samples[p].found_in != "nowhere" for p in missing):
            text += (
                ". Some of them are cached as a class that this program does not know: refer to it in the code of "
                "what is cached"
            )
        if explanation is not None:
            explanation = replace(explanation, bypass_reason=None if reason is None else str(reason))
            text += f"\n{replace(explanation, samples=())}"
        return CacheMissError(text, explanation=explanation, missing=tuple(missing))

    def _missing_text(self, missing: Sequence[int], digests: Sequence[str]) -> str:
        shown = [f"{p} ({digests[p][:8]})" if digests else str(p) for p in missing[:_MOST_SAMPLES_NAMED]]
        if len(missing) > len(shown):
            shown.append("...")
        return (
            f"{len(missing)} samples of a call of {self._name} are not cached, and mode='require' computes nothing "
            f"(positions {', '.join(shown)}); {self._where_it_looked()}. Run it with mode='on' there first; if that "
            "was done, compare the key below, or all of it in the error's explanation, with explain() there"
        )

    def _where_it_looked(self) -> str:
        look = self._state.look()
        store = self._tiers.open(look)
        if look.is_private:
            place = "something has no stable name, so no other process can fill it unless persistent_module_hash is set"
        elif store is None:
            place = "there is no directory to look in"
        else:
            place = f"they were looked for in {store.path}"
            if not store.is_present():
                place += ", where nothing is yet"
        if self._notices.last_fault:
            place += f" (last fault: {self._notices.last_fault})"
        return place
