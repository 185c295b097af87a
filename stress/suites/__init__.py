"""The scenarios by name; a scenario is imported when it runs, because some load torch."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from pathlib import Path

from stress.verdict import Run, Tally


@dataclass(frozen=True, slots=True)
class Suite:
    """One scenario: a module beside this one with ``run(asked)`` and ``TALLY``, what it counts.

    Attributes:
        name: Of the module.
        jobs: How many processes of a kind work at a time, unless the caller says.
        plants: The defects that it can be given, to see that it finds them.
        takes: Which of the options "cases", "case" and "only" mean something to it.
    """

    name: str
    jobs: int
    plants: tuple[str, ...]
    takes: tuple[str, ...] = ()

    @property
    def purpose(self) -> str:
        """The first line of the module's docstring."""
        tree = ast.parse(Path(__file__).with_name(f"{self.name}.py").read_text(encoding="utf-8"))
        return (ast.get_docstring(tree) or "").partition("\n")[0]

    def tally(self) -> Tally:
        """Return a tally that is still empty."""
        tally: Tally = importlib.import_module(f"stress.suites.{self.name}").TALLY()
        return tally

    def run(self, asked: Run[Tally]) -> None:
        """Run it; what it counts and what is violated stays with ``asked``."""
        importlib.import_module(f"stress.suites.{self.name}").run(asked)


_STORE_PLANTS = ("wrong-value", "lost-record", "over-budget")
_FORM_PLANTS = ("wrong-value", "no-containers", "padding-counts", "no-unbatched", "first-dimension", "keys-alone")
_KEY_PLANTS = ("blind", "restless", "short-sighted", "wrong-value", "marks-only", "old-switches")
_VALUE_PLANTS = (
    "attributes-for-all", "trusting", "mask-blind", "first-share", "frozen-generators", "plain-results", "careless",
)  # fmt: skip
_CASES = ("cases", "case", "only")

SUITES = {
    suite.name: suite
    for suite in (
        Suite("crowd", jobs=16, plants=_STORE_PLANTS),
        Suite("kill", jobs=1, plants=_STORE_PLANTS),
        Suite("fork", jobs=2, plants=(*_STORE_PLANTS, "open-handle")),
        Suite("loader", jobs=2, plants=("lost-record", "wrong-value")),
        Suite("ranks", jobs=1, plants=("lost-record", "wrong-value")),
        Suite("keys", jobs=2, plants=_KEY_PLANTS, takes=_CASES),
        Suite("forms", jobs=2, plants=_FORM_PLANTS, takes=_CASES),
        Suite("state", jobs=2, plants=_VALUE_PLANTS, takes=_CASES),
        Suite("rows", jobs=1, plants=("short-sighted", "wrong-value", "witness-only"), takes=("cases",)),
    )
}
