"""Which attributes code may read, of whatever object: by name, by a text, or by a name that it makes.

This module does not import torch.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass, field

from torchcache.keys.calls import uses_of
from torchcache.keys.operands import Operand, text_of
from torchcache.keys.reads import reads_of

#: With these, code gets hold of all attributes of an object at once.
_WHOLE = frozenset({
    "vars", "__dict__", "__getstate__", "__reduce__", "__reduce_ex__", "__dir__", "dir", "dumps",
    "attrgetter", "getmembers", "getattr_static",
})  # fmt: skip

_GETATTR = frozenset({Operand("global", "getattr"), Operand("global", "hasattr")})


@dataclass(slots=True)
class NamesRead:
    """The attributes that some functions may read.

    Attributes:
        names: Those that they name.
        starts: What names start with that they make when they run; an empty text stands for any name.
    """

    names: set[str] = field(default_factory=set)
    starts: set[str] = field(default_factory=set)

    def note(self, function: types.FunctionType) -> None:
        """Note what a function reads."""
        reads = reads_of(function.__code__)
        self.names.update(reads.attributes)
        if not _WHOLE.isdisjoint(reads.names) or not _WHOLE.isdisjoint(reads.attributes):
            self.starts.add("")
        if "getattr" in reads.names or "hasattr" in reads.names:
            self.starts.update(_starts_asked_for(function.__code__))

    def may_read(self, names: Iterable[str]) -> bool:
        """Tell whether any of some attributes may be read."""
        starts = tuple(self.starts)
        return any(name in self.names or name.startswith(starts) for name in names)


def _starts_asked_for(code: types.CodeType) -> set[str]:
    """Return what the names start with that ``getattr`` is asked for; those that are whole are among the texts."""
    uses = uses_of(code)
    starts: set[str] = set()
    n_known = 0
    for call in uses.calls:
        if _GETATTR.isdisjoint(call.callee):
            continue
        n_known += 1
        if len(call.positional) < 2:
            starts.add("")
            continue
        for operand in call.positional[1]:
            if operand.kind == "start":
                starts.add(operand.root)
            elif text_of(operand) is None:
                starts.add("")
    # Handed on, it may be asked for anything.
    is_handed_on = not _GETATTR.isdisjoint(uses.used)
    return starts | {""} if is_handed_on or not n_known else starts
