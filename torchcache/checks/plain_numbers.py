"""Plain numbers in a result, which may be the size of the batch."""

from __future__ import annotations

from dataclasses import replace

from torchcache.checks.plan import Check, Output, Plan
from torchcache.keys.digest import digest_parts
from torchcache.kinds import Drop
from torchcache.results.classes import KnownClasses

#: At most this many forms of plain values beside tensors are watched.
_MOST_FORMS = 1024


class PlainNumbers(Check):
    """Notices a plain number that equals the size of the batch: it may be that, and hold for no other batch.

    Args:
        known: What classes the values may have.
    """

    def __init__(self, known: KnownClasses) -> None:
        self._known = known
        self._sizes: dict[bytes, set[int]] = {}  # batch sizes that gave equal plain values

    def after(self, plan: Plan, output: Output) -> Output:
        if output.drop is not None or not output.computed:
            return output
        layout = output.computed[0].layout
        numbers = plan.call.batch.results.plain_numbers(layout, self._known) if layout.structure else ()
        if not numbers:
            return output

        key = plan.call.namespace + digest_parts([layout.structure])
        sizes = self._sizes.setdefault(key, set())
        sizes.add(plan.total)
        if len(self._sizes) > _MOST_FORMS:
            self._sizes.pop(next(iter(self._sizes)))
        if plan.total in numbers and len(sizes) < 2:
            return replace(output, drop=Drop.PLAIN_VALUE_MAY_BE_BATCH_SIZE)
        return output
