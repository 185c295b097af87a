"""The scenarios by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stress import crowd, kill
from stress.verdict import Run


@dataclass(frozen=True, slots=True)
class Suite:
    """One scenario.

    Attributes:
        run: Runs it; what it counts and what is violated stays with the run.
        jobs: How many processes of a kind work at a time, unless the caller says.
        purpose: The first line of its docstring.
    """

    run: Callable[[Run], None]
    jobs: int
    purpose: str


SUITES = {
    "crowd": Suite(crowd.run, crowd.JOBS, (crowd.__doc__ or "").partition("\n")[0]),
    "kill": Suite(kill.run, kill.JOBS, (kill.__doc__ or "").partition("\n")[0]),
}
