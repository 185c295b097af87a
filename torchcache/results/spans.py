"""Where the rows of a padded batch are: each from its first real position to its last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the rows of a batch lie in its ``width`` positions, each from a start to before an end."""

    starts: Sequence[int]
    ends: Sequence[int]
    width: int

    @property
    def are_empty_somewhere(self) -> bool:
        """Whether a row has no real position at all."""
        return any(end <= start for start, end in zip(self.starts, self.ends, strict=True))

    @property
    def are_at_the_right(self) -> bool:
        """Whether there is padding in front of a row."""
        return any(self.starts)

    @property
    def are_filled_from_the_left(self) -> bool:
        """Whether all rows begin at the first position, and one of them ends at the last."""
        return not any(self.starts) and max(self.ends, default=0) == self.width

    def length(self, position: int) -> int:
        """Return the length of a row."""
        return self.ends[position] - self.starts[position]

    def window(self, positions: Sequence[int]) -> tuple[int, int]:
        """Return the positions from the first start to the last end of some rows."""
        low = min([self.starts[p] for p in positions])
        high = max([self.ends[p] for p in positions])
        return low, high

    def select(self, positions: Sequence[int], extra: int | None = None) -> Spans:
        """Return where some rows lie once they are alone, with one of ``extra`` positions at their end."""
        low, high = self.window(positions)
        width = max(high - low, extra or 0)
        first = low
        if self.are_at_the_right:
            first -= width - (high - low)
        starts = [self.starts[p] - first for p in positions]
        ends = [self.ends[p] - first for p in positions]

        if extra is not None:
            start = width - extra if self.are_at_the_right else 0
            starts.append(start)
            ends.append(start + extra)
        return Spans(starts, ends, width)

    def alone(self, position: int, length: int, width: int) -> Spans:
        """Return where a row lies by itself in ``width`` positions if it is cut to ``length``."""
        length = min(self.length(position), length)
        start = width - length if self.are_at_the_right else 0
        return Spans([start], [start + length], width)
