"""What code changes itself, and whether it uses what it changed. This module does not import torch."""

from __future__ import annotations

import dis
import math
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torchcache.keys.instructions import (
    JUMPS,
    LOADS_ATTRIBUTE,
    LOADS_CELL,
    LOADS_GLOBAL,
    OperandStack,
    ends_here,
    variables_of,
)
from torchcache.keys.per_code import PerCode
from torchcache.keys.places import DEFAULT, defaults_of
from torchcache.keys.reads import all_codes

#: An attribute by the class whose method names it (None: of an object of any class), or a name.
_Key = tuple[Any, str]
_NAMES = "names"
_SELF = ""
#: Stands for the class whose method some code is, which code alone does not tell.
_OWNER = "owner"
_MADE_FROM = "made from"

#: Where an object on the stack came from: a ``_Key``, (class, ``_SELF``) for the object itself, (``_MADE_FROM``, key)
#: for what an operator made of it, or nothing known.
_Origin = tuple[Any, Any]
_UNKNOWN: _Origin = (None, None)

#: Methods that change the list, dict, set or deque they are called on.
_MUTATORS = frozenset({
    "append", "appendleft", "extend", "extendleft", "insert", "add", "update", "pop", "popleft", "popitem",
    "remove", "discard", "clear", "setdefault", "sort", "reverse", "subtract", "put", "write",
    "difference_update", "intersection_update", "symmetric_difference_update", "__setitem__",
})  # fmt: skip

#: Of these methods the result is used: they read what they change.
_READING_MUTATORS = frozenset({"pop", "popleft", "popitem", "setdefault"})

_OPERATORS = ("BINARY_", "INPLACE_")


@dataclass(slots=True)
class Writes:
    """What code changes itself, and whether it uses what it changed.

    Attributes are told apart by the class whose method changes them; a name is that of a global or closure
    variable. A read that is part of an update is not counted: ``self.calls += 1`` leaves no reads, so a value that is
    only counted, or only noted for others to see, shapes no result.
    """

    _assigned: set[_Key] = field(default_factory=set)
    _changed: set[_Key] = field(default_factory=set)
    _counted: set[_Key] = field(default_factory=set)  # assigned what is made of themselves
    _reads: Counter[_Key] = field(default_factory=Counter)

    def leave_out_attribute(self, cls: type, name: str, *, is_container: bool) -> bool:
        """Tell whether an attribute of an object of ``cls`` is written by walked code and not used by any.

        Args:
            cls: The object's class.
            name: The attribute.
            is_container: Whether it is a built-in container, which a method or an item assignment changes.
        """
        keys = [(None, name), *((base, name) for base in cls.__mro__)]
        if any(self._reads[key] > 0 for key in keys):
            return False
        return any(key in self._assigned or (is_container and key in self._changed) for key in keys)

    def leave_out_name(self, name: str, *, is_container: bool) -> bool:
        """Tell whether a global or closure variable is written by walked code and not used by any."""
        key = _NAMES, name
        return self._reads[key] <= 0 and (key in self._assigned or (is_container and key in self._changed))

    def only_counts(self, name: str, *, is_container: bool) -> bool:
        """Tell whether a global is a counter or a log of walked code that no walked code uses."""
        key = _NAMES, name
        return self._reads[key] <= 0 and (key in self._counted or (is_container and key in self._changed))

    def reads_of(self, cls: type, name: str) -> bool:
        """Tell whether methods of a class read an attribute of the object that they are called on."""
        return self._reads[cls, name] > 0

    def reads_of_any(self, name: str) -> bool:
        """Tell whether an attribute is read of an object of which the class is not known."""
        return self._reads[None, name] > 0

    @property
    def assigned_attributes(self) -> set[str]:
        """Attributes of any class that are assigned."""
        return {name for owner, name in self._assigned if owner is not _NAMES}

    @property
    def assigned_names(self) -> set[str]:
        """Globals and closure variables that are assigned."""
        return {name for owner, name in self._assigned if owner is _NAMES}

    @property
    def changed_attributes(self) -> set[str]:
        """Attributes of any class that are changed in place."""
        return {name for owner, name in self._changed if owner is not _NAMES}

    @property
    def changed_names(self) -> set[str]:
        """Globals and closure variables that are changed in place."""
        return {name for owner, name in self._changed if owner is _NAMES}

    def note(self, function: types.FunctionType, owner: type | None = None) -> None:
        """Note what a function changes and reads.

        Args:
            function: The function.
            owner: The class that it is a method of.
        """
        defaults = tuple([key for key, _ in defaults_of(function)])
        found = _written_by(function.__code__, defaults, owner is not None)
        self._assigned.update(_owned(found.assigned, owner))
        self._changed.update(_owned(found.changed, owner))
        self._counted.update(_owned(found.counted, owner))
        for key, count in zip(_owned(found.reads, owner), found.reads.values(), strict=True):
            self._reads[key] += count


@dataclass(slots=True)
class _Notes:
    """What one code object changes and reads, as in ``Writes``."""

    assigned: set[_Key] = field(default_factory=set)
    changed: set[_Key] = field(default_factory=set)
    counted: set[_Key] = field(default_factory=set)
    reads: Counter[_Key] = field(default_factory=Counter)

    def note_read(self, key: _Key) -> None:
        self.reads[key] += 1

    def note_assignment(self, key: _Key, value: _Origin) -> None:
        """Note that what lies at ``key`` is assigned what came from ``value``."""
        self.assigned.add(key)
        if value == (_MADE_FROM, key):
            self.counted.add(key)
            self.reads[key] -= 1

    def note_change(self, key: _Key, *, reads: bool) -> None:
        """Note a change in place, and whether it hands out what is there."""
        self.changed.add(key)
        if not reads:
            self.reads[key] -= 1


@PerCode
def _written_by(code: types.CodeType, defaults: tuple[str, ...], has_owner: bool) -> _Notes:  # noqa: FBT001 - PerCode
    """Return what code changes and reads, with ``_OWNER`` for the class that it is a method of.

    Args:
        code: The code.
        defaults: The keys of the defaults of its function.
        has_owner: Whether it is a method.
    """
    origins: dict[str, _Origin] = {key.removesuffix(DEFAULT): (_NAMES, key) for key in defaults}
    if code.co_argcount and has_owner:
        origins[code.co_varnames[0]] = (_OWNER, _SELF)

    notes = _Notes()
    for inner in all_codes(code):
        # A variable of an inner function is another one unless it is shared.
        shared = {name: origin for name, origin in origins.items() if inner is code or name in inner.co_freevars}
        _Scan(inner, shared, notes).run()
    return notes


def _owned(keys: Iterable[_Key], owner: type | None) -> list[_Key]:
    """Return keys with a class in place of ``_OWNER``."""
    return [(owner, name) if first is _OWNER else (first, name) for first, name in keys]


class _Scan:
    """One pass over one code object, following where the objects on the stack came from.

    In doubt a value counts as read, which costs a miss.
    """

    def __init__(self, code: types.CodeType, origins: Mapping[str, _Origin], notes: _Notes) -> None:
        self._code = code
        self._origins = origins
        self._notes = notes
        self._stack = OperandStack(_UNKNOWN)
        self._fresh: dict[_Key, float] = {}  # what was assigned before it is read, up to which offset
        self._offset = 0
        self._instructions = list(dis.get_instructions(code))
        self._skips = [(i.offset, i.argval) for i in self._instructions if i.opcode in JUMPS and i.argval > i.offset]

    def run(self) -> None:
        """Go through all instructions."""
        for instruction in self._instructions:
            opname = instruction.opname
            self._offset = instruction.offset
            self._note(opname, instruction.argval)

            effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
            step = self._STEPS.get(opname)
            if step is None:
                self._stack.do(instruction, effect)
            else:
                step(self, instruction, effect)
            if ends_here(opname):
                self._stack.clear()

    # -- what an instruction assigns or changes ---------------------------------------------------------------

    def _note(self, opname: str, argument: Any) -> None:  # noqa: ANN401 - whatever an instruction names
        stack = self._stack
        if opname in ("STORE_ATTR", "DELETE_ATTR"):
            self._assign((_class_of_self(stack.peek(1)), argument), stack.peek(2))
        elif opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            self._assign((_NAMES, argument), stack.peek(1))
        elif opname in ("STORE_DEREF", "DELETE_DEREF"):
            if argument in self._code.co_freevars:
                self._assign((_NAMES, argument), stack.peek(1))
        elif opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            self._change(stack.peek(2))
        elif opname == "STORE_SLICE":
            self._change(stack.peek(3))

    def _assign(self, key: _Key, value: _Origin) -> None:
        self._notes.note_assignment(key, value)
        if value == (_MADE_FROM, key):
            self._fresh.pop(key, None)
            return
        # An assignment that a jump may pass by says nothing of what comes after the jump's target.
        self._fresh[key] = min((t for s, t in self._skips if s < self._offset < t), default=math.inf)

    def _change(self, origin: _Origin, *, reads: bool = False) -> None:
        if _is_key(origin):
            self._notes.note_change(origin, reads=reads)

    # -- what it does to the stack, and reads -----------------------------------------------------------------

    def _load_attribute(self, instruction: dis.Instruction, effect: int) -> None:
        owner, name = self._stack.pop(), instruction.argval
        if name in _MUTATORS:
            self._change(owner, reads=name in _READING_MUTATORS)
        key = _class_of_self(owner), name
        self._read(key)
        self._stack.push(*[key] * (1 + effect))

    def _load_global(self, instruction: dis.Instruction, effect: int) -> None:
        key = _NAMES, instruction.argval
        self._read(key)
        self._stack.push(*[_UNKNOWN] * (effect - 1), key)

    def _load_cell(self, instruction: dis.Instruction, effect: int) -> None:
        key = _NAMES, instruction.argval
        known = self._origins.get(instruction.argval)
        self._read(key)
        self._stack.push(*[_UNKNOWN] * (effect - 1), known or key)

    def _operate(self, instruction: dis.Instruction, effect: int) -> None:
        """Follow an operator of two operands."""
        if effect != -1:
            self._stack.do(instruction, effect)
            return
        right, left = self._stack.pop(), self._stack.pop()
        self._stack.push(_made_from(left, right))

    def _load_variables(self, instruction: dis.Instruction, _effect: int) -> None:
        for name in variables_of(instruction):
            self._stack.push(self._load(name))

    def _store_and_load(self, instruction: dis.Instruction, _effect: int) -> None:
        self._stack.pop()
        self._stack.push(self._load(instruction.argval[1]))

    def _load(self, name: str) -> _Origin:
        origin = self._origins.get(name, _UNKNOWN)
        if _is_key(origin):  # a default that is kept between calls
            self._read(origin)
        return origin

    def _read(self, key: _Key) -> None:
        if self._offset >= self._fresh.get(key, -1):
            self._notes.note_read(key)

    #: Instructions that do more than to move values.
    _OPNAMES: ClassVar[Mapping[_Step, Iterable[str]]] = {
        _load_attribute: LOADS_ATTRIBUTE,
        _load_global: LOADS_GLOBAL,
        _load_cell: LOADS_CELL,
        _load_variables: [opname for opname in dis.opmap if opname.startswith("LOAD_FAST")],
        _store_and_load: ("STORE_FAST_LOAD_FAST",),
        _operate: [opname for opname in dis.opmap if opname.startswith(_OPERATORS) and "SUBSCR" not in opname],
    }
    _STEPS: ClassVar[Mapping[str, _Step]] = {opname: step for step, opnames in _OPNAMES.items() for opname in opnames}


#: Does to the stack what an instruction does, given by how much it grows.
_Step = Callable[[_Scan, dis.Instruction, int], None]


def _class_of_self(origin: _Origin) -> object:
    """Return the class whose method has an object as ``self``; None of any other object."""
    return origin[0] if origin is not _UNKNOWN and origin[1] == _SELF else None


def _is_key(origin: _Origin) -> bool:
    return origin is not _UNKNOWN and origin[0] is not _MADE_FROM and origin[1] != _SELF


def _made_from(*operands: _Origin) -> _Origin:
    """Return the origin of what an operator makes of its operands."""
    for operand in operands:
        if _is_key(operand):
            return _MADE_FROM, operand
        if operand[0] is _MADE_FROM:
            return operand
    return _UNKNOWN
