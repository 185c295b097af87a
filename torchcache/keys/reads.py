"""What a code object looks up by name; the walk follows it. This module does not import torch."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from dataclasses import dataclass

from torchcache.keys.instructions import LOADS_ATTRIBUTE, LOADS_GLOBAL, SAYS_NOTHING
from torchcache.keys.per_code import PerCode

#: With these, code reads an attribute that a text names.
_ASKS_BY_TEXT = frozenset({"getattr", "hasattr"})


@dataclass(frozen=True, slots=True)
class Reads:
    """What a code object, with those inside it, looks up by name.

    Attributes:
        names: Globals and builtins.
        attributes: Attributes of anything, and texts that may name one for ``getattr``.
        chains: Globals, each with the attributes that are read of it, of that, and so on.
        ends: Those of them that go on no further, and globals that are used as they are.
        imports: Level, module and names of each import.
    """

    names: tuple[str, ...]
    attributes: tuple[str, ...]
    chains: tuple[tuple[str, ...], ...]
    ends: tuple[tuple[str, ...], ...]
    imports: tuple[tuple[int, str, tuple[str, ...]], ...]


@PerCode
def reads_of(code: types.CodeType) -> Reads:
    """Return what a code object and those inside it look up."""
    scan = _Scan()
    for inner in all_codes(code):
        scan.add(inner)
    return scan.result()


class _Scan:
    """Goes through the instructions of code objects, and collects what they look up."""

    def __init__(self) -> None:
        self._names = set[str]()
        self._attributes = set[str]()
        self._chains = set[tuple[str, ...]]()
        self._ends = set[tuple[str, ...]]()
        self._imports: dict[tuple[int, str, tuple[str, ...]], None] = {}  # in their order

    def add(self, code: types.CodeType) -> None:
        """Add what one code object looks up."""
        if not _ASKS_BY_TEXT.isdisjoint(code.co_names):
            self._attributes.update(text for text in code.co_consts if isinstance(text, str) and text.isidentifier())

        chain: tuple[str, ...] = ()  # how the object on top of the stack was come by
        level: object = 0  # the arguments of the two instructions before, which are those of an import
        wanted: object = None
        for instruction in dis.get_instructions(code):
            opname, argument = instruction.opname, instruction.argval
            if opname in SAYS_NOTHING:
                continue
            if opname in LOADS_GLOBAL:
                self._names.add(argument)
                self._ends.add(chain)
                chain = (argument,)
            elif opname in LOADS_ATTRIBUTE:
                self._attributes.add(argument)
                if chain:
                    chain = (*chain, argument)
                    self._chains.add(chain)
            else:
                self._ends.add(chain)
                chain = ()
                if opname == "LOAD_SUPER_ATTR":
                    self._attributes.add(argument)
                elif opname == "IMPORT_NAME":
                    self._add_import(level, argument, wanted)
            level, wanted = wanted, argument

    def _add_import(self, level: object, module: str, wanted: object) -> None:
        dots = level if isinstance(level, int) else 0
        names = wanted if isinstance(wanted, tuple) else ()
        self._imports[dots, module, names] = None

    def result(self) -> Reads:
        """Return all of it, in an order that is always the same."""
        self._ends.discard(())
        return Reads(
            tuple(sorted(self._names)),
            tuple(sorted(self._attributes)),
            tuple(sorted(self._chains)),
            tuple(sorted(self._ends)),
            tuple(self._imports),
        )


def all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those inside it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from all_codes(value)
