"""What the members of a scenario tell each other, in shared memory: it outlives whoever is killed."""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence

import numpy as np

from stress.values import Batch

#: Batches a line can have; who comes so far starts again at the first.
MOST_BATCHES = 1 << 20

_COUNTS = ("reads", "expected", "hits")


class Ledger:
    """Which batches were acknowledged, and what was counted.

    A cell has one process that changes it, or is only ever set to one, so nothing here is locked.

    Args:
        lines: How many lines of batches there are.
        members: How many processes, or threads, count at a time.
        also: What they count besides ``reads``, ``expected`` and ``hits``.
    """

    def __init__(self, lines: int, members: int, also: Sequence[str] = ()) -> None:
        self._names = (*_COUNTS, *also)
        words = 1 + lines + members * (1 + len(self._names))
        memory = mmap.mmap(-1, 8 * words + lines * MOST_BATCHES)  # pages that nobody touches cost nothing
        numbers = np.frombuffer(memory, np.int64, words)
        self._is_over = numbers[:1]
        self._next = numbers[1 : 1 + lines]
        self._longest_ns = numbers[1 + lines : 1 + lines + members]
        self._counts = numbers[1 + lines + members :].reshape(members, len(self._names))
        self._acknowledged = np.frombuffer(memory, np.uint8, offset=8 * words).reshape(lines, MOST_BATCHES)

    @property
    def n_lines(self) -> int:
        """How many lines there are."""
        return len(self._next)

    def end(self) -> None:
        """Ask every member to come to its end."""
        self._is_over[0] = 1

    def is_over(self) -> bool:
        """Tell whether it was asked."""
        return bool(self._is_over[0])

    def next_batch(self, line: int) -> Batch:
        """Return the batch that ``line`` comes to next: after a kill, the one that was under way."""
        return Batch(line, int(self._next[line]))

    def go_on(self, line: int) -> None:
        """Come to the batch after; by the line's own writer only."""
        self._next[line] = (self._next[line] + 1) % MOST_BATCHES

    def acknowledge(self, batch: Batch) -> None:
        """Note that ``put_many`` returned and said that all of it is stored."""
        self._acknowledged[batch.line, batch.number] = 1

    def is_acknowledged(self, batch: Batch) -> bool:
        """Tell whether that was noted."""
        return bool(self._acknowledged[batch.line, batch.number])

    def acknowledged(self, line: int, start: int = 0) -> list[Batch]:
        """Return the batches of ``line`` from number ``start`` on that were acknowledged."""
        stop = int(self._next[line]) + 1
        return [Batch(line, start + int(i)) for i in np.flatnonzero(self._acknowledged[line, start:stop].copy())]

    def any_batch(self, rng: random.Random) -> Batch:
        """Return a batch that was acknowledged, often a late one, or any that may come to be written."""
        line = rng.randrange(self.n_lines)
        choice = rng.random()
        latest = int(self._next[line])
        # A copy: NumPy raises if others change what it counts.
        numbers = np.flatnonzero(self._acknowledged[line, : latest + 1].copy())
        if choice < 0.2 or not len(numbers):
            return Batch(line, rng.randrange(latest + 2) % MOST_BATCHES)
        return Batch(line, int(rng.choice(numbers[-64:] if choice < 0.6 else numbers)))

    def count(self, member: int, **more: int) -> None:
        """Add to the counts of a member."""
        for name, number in more.items():
            self._counts[member, self._names.index(name)] += number

    def time(self, member: int, seconds: float) -> None:
        """Note how long something took that every member times."""
        self._longest_ns[member] = max(int(self._longest_ns[member]), round(seconds * 1e9))

    def longest_seconds(self) -> float:
        """Return the longest time that any member noted."""
        return float(self._longest_ns.max()) / 1e9

    def counts(self, member: int | None = None) -> dict[str, int]:
        """Return what one member counted; without one, the sums over all, and how many batches were acknowledged."""
        if member is not None:
            return dict(zip(self._names, self._counts[member].tolist(), strict=True))
        sums: Sequence[int] = self._counts.sum(axis=0).tolist()
        return {**dict(zip(self._names, sums, strict=True)), "acknowledged": int(self._acknowledged.sum())}
