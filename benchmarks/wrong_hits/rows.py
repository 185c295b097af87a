"""What a row of ``wrong-hits`` is, and the numbers that all rows work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from benchmarks.wrong_hits.sides import Side

WIDTH = 8

Case = Callable[[Side], object]
Damage = Literal["", "truncate", "empty", "flip", "poison"]
#: "meets": a second process runs the case at the same time; "is killed": it alone runs it, and is killed.
Writer = Literal["", "meets", "is killed"]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to be wrong.

    Attributes:
        group: The part of the table.
        title: What happens, in the words of the table.
        name: The function that does it.
        needs: What a cache must have a notion of, by the names that ``Side.lacks`` uses.
        damage: What happens to the files on disk before the second run.
        writer: What a second process does during the first run.
    """

    group: str
    title: str
    name: str
    needs: Sequence[str] = ()
    damage: Damage = ""
    writer: Writer = ""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one file, in its order."""

    all: list[Row] = field(default_factory=list)

    def add(
        self,
        group: str,
        title: str,
        *needs: str,
        damage: Damage = "",
        writer: Writer = "",
    ) -> Callable[[Case], Case]:
        """Add the decorated function."""

        def decorate(case: Case) -> Case:
            self.all.append(Row(group, title, case.__name__, needs, damage, writer))
            return case

        return decorate


def numbers(n: int = 4, width: int = WIDTH, *, seed: int = 0) -> Tensor:
    """Return ``(n, width)`` small positive integers as floats; no two rows are equal."""
    x = torch.randint(1, 100, (n, width), generator=torch.Generator().manual_seed(seed)).float()
    x[:, 0] = torch.arange(n) + 100
    return x
