"""What a code object alone decides, found out once for each. This module does not import torch.

A walk looks at the same code for each instance of a class, and again for each explanation. The instructions of a
code object never change: what they say is kept, while what its names stand for is looked up anew by each walk.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")

#: So many answers are kept to each question; the oldest goes first.
MOST_KEPT = 16_384


class PerCode(Generic[Answer]):
    """Answers a question about a code object, and keeps the answer.

    Code objects are told apart by identity, not by ``==``: that takes two for one which differ in their file or in
    their qualified name, and hashes all their constants each time. A function whose ``__code__`` is replaced has
    another code object, and gets another answer.

    Safe from any thread, and in a child after a fork: there is no lock, and each step on the table is one call of C.
    Threads that ask at once may each find the answer, which is the same.

    Args:
        find: Finds the answer in the code object, and in hashable values given with it, and in nothing else. Nobody
            changes what it returns.
    """

    def __init__(self, find: Callable[..., Answer]) -> None:
        self._find = find
        # By the id of the code object, which is kept too, so that no other one gets its id.
        self._kept: OrderedDict[Hashable, tuple[types.CodeType, Answer]] = OrderedDict()

    def __call__(self, code: types.CodeType, *given: Hashable) -> Answer:
        """Return the answer for a code object, and the values given with it."""
        key = (id(code), *given)
        kept = self._kept.get(key)
        if kept is not None:
            return kept[1]

        answer = self._find(code, *given)
        self._kept[key] = code, answer
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return answer

    def __len__(self) -> int:
        """Return how many answers are kept."""
        return len(self._kept)
