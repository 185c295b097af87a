"""A plan carried out: the function is called, and what it returns is taken apart."""

from __future__ import annotations

from typing import NoReturn

import torch

from torchcache.call.assembly import Assembly
from torchcache.checks.changed_inputs import InputWatch
from torchcache.checks.padding import Padding
from torchcache.checks.parts import rows_at
from torchcache.checks.plan import Output, Plan, Returned
from torchcache.errors import UncacheableError
from torchcache.inputs.cached_call import CachedCall
from torchcache.inputs.sample_keys import keys_in_force
from torchcache.layout import at_positions
from torchcache.report.go_around import NOTHING, GoAround
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason
from torchcache.results.classes import KnownClasses
from torchcache.results.nodes import TooLargeError
from torchcache.results.padded import PaddedResults
from torchcache.results.rows import unsupported_leaf


class Forwarding:
    """Carries out plans.

    Args:
        cache_dtype: What values are rounded to, if they are.
        known: Learns the classes of results.
        padding: Tells how rows lie in the results of padded batches.
        assembly: Learns where results have their tensors.
        notices: Knows whether a call was cached before.
    """

    def __init__(
        self,
        cache_dtype: torch.dtype | None,
        known: KnownClasses,
        padding: Padding,
        assembly: Assembly,
        notices: Notices,
    ) -> None:
        self._cache_dtype = cache_dtype
        self._known = known
        self._padding = padding
        self._assembly = assembly
        self._notices = notices

    def run(self, plan: Plan) -> Returned:
        """Call the function with the rows of a plan.

        Raises:
            Exception: Whatever it raises, and what putting its arguments together does.
        """
        call, keys = plan.call, plan.call.keys
        args, kwargs, results = call.args, call.kwargs, call.batch.results
        if not plan.is_as_given:
            witness, positions = plan.witness, plan.positions
            args, kwargs, results = call.batch.select(positions, None if witness is None else witness.rows)
            if keys is not None:
                keys = [keys[p] for p in positions]
                if witness is not None:
                    keys += [witness.key or b""] * witness.n
        watch = InputWatch(call.batch, args, kwargs)
        with torch.no_grad(), keys_in_force(keys):
            given = call.function(*args, **kwargs)
        whole = given if plan.is_as_given else NOTHING
        return Returned(given, results, whole, watch.changed())

    def take_apart(self, plan: Plan, returned: Returned) -> Output:
        """Copy what was returned into rows.

        Raises:
            GoAround: If it cannot be kept.
            UncacheableError: If it is not made of rows, and the target is being set up, or the rows were not put
                together by the caller.
        """
        call, results, whole = plan.call, returned.results, returned.whole
        tree = results.flatten(returned.given)
        unsupported = unsupported_leaf(tree)
        if unsupported is not None:
            reason, evidence = unsupported
            raise GoAround(reason, evidence, whole)
        try:
            if isinstance(results, PaddedResults):
                results = self._padding.results_of(plan, returned, tree, results)
            parts, overflowed = results.take_apart(tree, plan.total, self._cache_dtype, self._known)
        except GoAround:
            raise
        except (MemoryError, torch.OutOfMemoryError):
            raise GoAround(Reason.OUT_OF_MEMORY, result=whole) from None
        except UncacheableError as error:
            if plan.is_as_given or isinstance(error, TooLargeError):
                self._refuse(call, error, whole)
            raise
        except Exception as error:  # noqa: BLE001 - what others made, such as an image that cannot be decoded
            raise GoAround(Reason.UNSUPPORTED_RESULT, f"it cannot be copied: {error!r}", whole) from None
        self._assembly.note_devices(call, results.devices(tree))
        n = len(plan.own)
        rows = plan.own if plan.is_whole and n < call.batch.n else range(n)
        computed = at_positions(rows_at(parts, rows), plan.own)
        return Output(results, tree, whole, parts, computed, returned.effect, overflowed)

    def check_whole(self, call: CachedCall, result: object) -> None:
        """Look at the result of a call as its caller made it, of which other rows were no rows.

        Raises:
            GoAround: If it is not made of rows either.
            UncacheableError: As well, while the target is being set up.
        """
        results = call.batch.results
        try:
            results.check(results.flatten(result), call.batch.n)
        except UncacheableError as error:
            self._refuse(call, error, result)

    def _refuse(self, call: CachedCall, error: UncacheableError, result: object) -> NoReturn:
        """Raise ``error`` while the target is being set up; later, let the call return its result uncached.

        A call that is one sample may return anything, so that is no wrong use.
        """
        if isinstance(error, TooLargeError):
            raise GoAround(Reason.RESULT_TOO_LARGE, str(error), result) from None
        if call.batch.is_divisible and not self._notices.has_served():
            raise error
        raise GoAround(Reason.UNSUPPORTED_RESULT, str(error), result) from None
