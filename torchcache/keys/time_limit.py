"""How long it may take to look at the code, or at the state, of what is cached. This module does not import torch."""

from __future__ import annotations

import time

#: A walk, or an encoding, that computes longer is given up: it would be done again after each change.
MOST_SECONDS = 30.0


class TakesTooLongError(Exception):
    """A look at code or state was given up; its text says what took longest."""


class TimeLimit:
    """Ends what computes for too long in this thread; time that others have does not count.

    Args:
        what: What is looked at, until ``begin`` names a part of it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._since = time.thread_time()
        self._end = self._since + MOST_SECONDS
        self._longest = 0.0, what

    def begin(self, what: str) -> None:
        """Name what is looked at from now on."""
        now = time.thread_time()
        self._longest = max(self._longest, (now - self._since, self._what))
        self._what, self._since = what, now

    def check(self) -> None:
        """Raise TakesTooLongError if the time is over."""
        if time.thread_time() >= self._end:
            self.begin(self._what)
            seconds, what = self._longest
            raise TakesTooLongError(f"{what} takes {seconds:.0f} seconds and more")
