"""What the instructions of code do to the stack, in each version of Python. This module does not import torch."""

from __future__ import annotations

import dis
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

LOADS_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
LOADS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
LOADS_CELL = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
SAYS_NOTHING = frozenset({"NOP", "EXTENDED_ARG", "CACHE"})  # NOP is what -OO leaves of a docstring

JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})

_ENDS = ("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")

#: Instructions of Python 3.10 that put the uppermost value below others, by how many are moved; 0 stands for the
#: number that the instruction names.
_ROTATIONS = {"ROT_TWO": 2, "ROT_THREE": 3, "ROT_FOUR": 4, "ROT_N": 0}

#: Instructions that put several values in place of the uppermost one.
_REPLACES_UPPERMOST = ("UNPACK_", "BEFORE_", "SETUP_WITH", "SETUP_ASYNC_WITH")

_PUSHES_NOTHING = (
    "STORE_", "DELETE_", "POP_", "RETURN_", "RAISE_", "RERAISE", "JUMP_", "RESUME", "NOP", "PRECALL", "KW_NAMES",
    "COPY_FREE_VARS", "MAKE_CELL", "EXTENDED_ARG", "CACHE", "LIST_APPEND", "SET_ADD", "MAP_ADD", "LIST_EXTEND",
    "SET_UPDATE", "DICT_UPDATE", "DICT_MERGE", "END_", "GEN_START",
)  # fmt: skip


class OperandStack(Generic[T]):
    """What is known of the values on the stack while the instructions of code are gone through in their order.

    Args:
        unknown: What stands for a value of which nothing is known; where too little is on the stack, it is given too.
    """

    def __init__(self, unknown: T) -> None:
        self._unknown = unknown
        self._items: list[T] = []

    def push(self, *items: T) -> None:
        self._items += items

    def pop(self, count: int = 1) -> T:
        """Take values off, and return the lowest of them."""
        last = self._unknown
        for _ in range(count):
            last = self._items.pop() if self._items else self._unknown
        return last

    def peek(self, depth: int) -> T:
        """Return the value at a depth, 1 for the uppermost."""
        return self._items[-depth] if len(self._items) >= depth else self._unknown

    def clear(self) -> None:
        self._items.clear()

    def items(self) -> list[T]:
        """Return a copy of what is on it, the lowest first."""
        return list(self._items)

    def do(self, instruction: dis.Instruction, effect: int) -> None:
        """Do what an instruction does that only moves values, or makes others of which nothing is known.

        Args:
            instruction: The instruction.
            effect: By how much the stack grows.
        """
        opname = instruction.opname
        move = _MOVES.get(opname)
        if move is not None:
            move(self, instruction.arg or 1)
        elif opname in _ROTATIONS:
            self._rotate(_ROTATIONS[opname] or instruction.arg or 1)
        elif opname.startswith(_REPLACES_UPPERMOST):
            self.pop()
            self._push_unknown(1 + effect)
        elif effect > 0:
            self._push_unknown(effect)
        elif opname.startswith(_PUSHES_NOTHING):
            self.pop(-effect)
        else:
            self.pop(1 - effect)
            self._push_unknown(1)

    def _push_unknown(self, count: int) -> None:
        self._items += [self._unknown] * count

    def copy(self, depth: int) -> None:
        """Push the value at a depth once more."""
        self._items.append(self.peek(depth))

    def swap(self, depth: int) -> None:
        """Exchange the uppermost value for the one at a depth."""
        items = self._items
        if len(items) >= depth:
            items[-1], items[-depth] = items[-depth], items[-1]

    def copy_two(self) -> None:
        """Push the two uppermost values once more."""
        self._items += [self.peek(2), self.peek(1)]

    def _rotate(self, depth: int) -> None:
        """Put the uppermost value at a depth."""
        items = self._items
        if len(items) >= depth:
            uppermost = items.pop()
            items.insert(len(items) - depth + 1, uppermost)


#: Instructions that move values, with the depth that they name.
_MOVES: dict[str, Callable[[OperandStack[Any], int], None]] = {
    "COPY": OperandStack.copy,
    "SWAP": OperandStack.swap,
    "DUP_TOP": lambda stack, _: stack.copy(1),
    "DUP_TOP_TWO": lambda stack, _: stack.copy_two(),
}


def variables_of(instruction: dis.Instruction) -> tuple[str, ...]:
    """Return the variables that an instruction names; from Python 3.13 on, one may load or store two."""
    argument = instruction.argval
    return argument if isinstance(argument, tuple) else (argument,)


def ends_here(opname: str) -> bool:
    """Tell whether what follows an instruction is not what runs next."""
    return opname.startswith(_ENDS) and opname != "RETURN_GENERATOR"
