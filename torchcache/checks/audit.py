"""Hits that are computed again and compared, for ``verify_hits``."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace

from torchcache.checks.distances import Distances
from torchcache.checks.parts import rows_at
from torchcache.checks.plan import Check, Output, Plan
from torchcache.layout import Found, at_positions
from torchcache.options import CacheOptions
from torchcache.report.notices import Notices


class Audit(Check):
    """Computes a share of the hits again.

    Args:
        options: The options in force.
        distances: Compares rows.
        notices: Counts and logs what happens.
    """

    def __init__(self, options: CacheOptions, distances: Distances, notices: Notices) -> None:
        self._share = options.verify_hits
        self._writes = options.writes
        self._distances = distances
        self._notices = notices
        self._chance = random.Random(os.urandom(16))  # noqa: S311 - chooses samples; the global one is the user's

    def choose(self, found: Sequence[Found]) -> list[int]:
        """Choose the hits that are computed again."""
        positions = [p for item in found for p in item.positions]
        return sorted(p for p in positions if self._chance.random() < self._share)

    def before(self, plan: Plan) -> Plan:
        return replace(plan, doubted=[]) if plan.is_whole else plan

    def after(self, plan: Plan, output: Output) -> Output:
        if not output.is_settled or not plan.doubted:
            return output
        allowed = self._distances.allowed(plan.call, output.tree)
        cached: dict[int, Found] = {}
        for item in plan.cached:
            for i, position in enumerate(item.positions):
                cached[position] = Found([position], item.layout, item.data[i : i + 1])
        self._notices.counters.add(verified_rows=len(plan.doubted))

        # They were forwarded right behind the plan's own rows.
        replaced: list[Found] = []
        for row, position in enumerate(plan.doubted, start=len(plan.own)):
            apart = self._distances.of(plan.call, cached[position], row, output.parts, is_picked=False)
            if apart is None or apart <= allowed:
                continue
            self._say_mismatch(plan, position, apart, allowed)
            replaced += at_positions(rows_at(output.parts, [row]), [position])
        return replace(output, replaced=replaced)

    def _say_mismatch(self, plan: Plan, position: int, apart: float, allowed: float) -> None:
        digest = plan.call.digests[position].hex()
        where = "" if self._writes else ", in memory only since mode='read'"
        self._notices.counters.add(mismatched_rows=1)
        self._notices.say(
            "verify_hits",
            f"the cached value of sample {position} ({digest}) is {apart:.2g} of its norm away from what was computed "
            f"again, more than {allowed:g}; it is replaced{where}. Look at explain() for what the key misses",
        )
