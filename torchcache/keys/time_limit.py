"""How long it may take to look at the code, or at the state, of what is cached. This module does not import torch."""

from __future__ import annotations

import time

#: A walk, or an encoding, that computes longer is given up: it would be done again after each change.
MOST_SECONDS = 30.0


class TakesTooLongError(Exception):
    """A look at code or state was given up."""


class TimeLimit:
    """Ends what computes for too long in this thread; time that others have does not count."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MOST_SECONDS

    def check(self) -> None:
        """Raise TakesTooLongError if the time is over."""
        if time.thread_time() >= self._end:
            raise TakesTooLongError
