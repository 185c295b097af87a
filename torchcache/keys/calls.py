"""The calls that code makes, and what its instructions say of callee and arguments.

Instructions say where a value comes from (a name, a variable, an attribute of one of these), not what it is; that is
for who knows the function to find out. This module does not import torch.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

from torchcache.keys.instructions import JUMPS, LOADS_ATTRIBUTE, LOADS_CELL, OperandStack, ends_here, variables_of
from torchcache.keys.operands import (
    UNKNOWN,
    Operand,
    Operands,
    attribute_of,
    constant_of,
    either,
    imported,
    names_in,
    start_of,
    text_of,
)
from torchcache.keys.per_code import PerCode
from torchcache.keys.reads import all_codes

#: Python 3.10 calls what is no method without anything beside it.
_IS_OLD = sys.version_info < (3, 11)
#: Beside what it calls, code puts NULL: below it until Python 3.12, above it from 3.13 on.
_HAS_NULL_BELOW = sys.version_info < (3, 13)

_READS_ATTRIBUTE = frozenset({Operand("global", "getattr"), Operand("global", "hasattr")})


@dataclass(frozen=True, slots=True)
class Call:
    """One place where something is called.

    Attributes:
        callee: What is called.
        positional: The arguments without a name.
        keywords: The arguments with a name.
        has_more: Whether it is called with ``*args`` or ``**kwargs``, whose items are not known.
    """

    callee: Operands
    positional: tuple[Operands, ...] = ()
    keywords: tuple[tuple[str, Operands], ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True)
class Uses:
    """What a code object, and those inside it, do with what they have names for.

    Attributes:
        calls: The calls; a result is known by the number of its call.
        read: What is read by a name.
        used: What of that is used as it is, and not only for an attribute that the code names. What is assigned to a
            variable is used where the variable is.
        items: What is read with square brackets, and with which keys.
        assigned: The values that each variable is assigned. Variables of one name count as one.
    """

    calls: tuple[Call, ...]
    read: frozenset[Operand]
    used: frozenset[Operand]
    items: tuple[tuple[Operands, Operands], ...]
    assigned: Mapping[str, Operands]


@PerCode
def uses_of(code: types.CodeType) -> Uses:
    """Return what a code object and those inside it use."""
    seen = _Seen()
    for inner in all_codes(code):
        if inner is not code:
            for name in parameters_of(inner):
                seen.assigned[name] = either(seen.assigned.get(name, ()), UNKNOWN)
        _Scan(inner, seen).run()
    return Uses(tuple(seen.calls), frozenset(seen.read), frozenset(seen.used), tuple(seen.items), seen.assigned)


@dataclass(slots=True)
class _Seen:
    """What was seen so far, as in ``Uses``."""

    calls: list[Call] = field(default_factory=list)
    read: set[Operand] = field(default_factory=set)
    used: set[Operand] = field(default_factory=set)
    items: list[tuple[Operands, Operands]] = field(default_factory=list)
    assigned: dict[str, Operands] = field(default_factory=dict)


def parameters_of(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of the parameters of a code object."""
    n_parameters = code.co_argcount + code.co_kwonlyargcount
    for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS):
        if code.co_flags & flag:
            n_parameters += 1
    return code.co_varnames[:n_parameters]


@dataclass(frozen=True, slots=True)
class _Value:
    """What lies on the stack, at which offset it was put there, and the number of the read if it was read by a name."""

    operands: Operands
    offset: int = -1
    number: int = -1


_UNKNOWN = _Value(UNKNOWN)
_NULL = _Value(UNKNOWN, -2)
_OWNER = _Value(UNKNOWN, -3)  # the object whose method lies below it


class _Scan:
    """One pass over one code object, which keeps the stack of each jump for where it leads.

    Args:
        code: The code object.
        seen: Where to add what it does.
    """

    def __init__(self, code: types.CodeType, seen: _Seen) -> None:
        self._code = code
        self._seen = seen
        self._unused: dict[int, Operands] = {}  # what was read by a name, by the number of the read
        self._n_reads = 0
        self._stack = OperandStack(_UNKNOWN)
        self._offset = 0
        self._waiting: dict[int, list[_Value]] = {}  # the stacks of jumps, by the offset that they lead to
        self._keywords: tuple[str, ...] = ()  # of the next call, in Python 3.11 and 3.12
        self._numbers: dict[tuple[int, object], int] = {}  # of the calls, by where their callee was put on the stack

    def run(self) -> None:
        """Go through all instructions."""
        is_reached = True
        for instruction in dis.get_instructions(self._code):
            self._offset = instruction.offset
            self._arrive(is_reached=is_reached)
            if instruction.opcode in JUMPS and instruction.argval > instruction.offset:
                self._jump(instruction)
            effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
            step = self._STEPS.get(instruction.opname)
            if step is None:
                self._stack.do(instruction, effect)
            else:
                step(self, instruction, effect)
            is_reached = not ends_here(instruction.opname)
        # Whoever takes an attribute of it, or keeps it for later, has taken it out.
        self._seen.used.update(chain.from_iterable(self._unused.values()))

    def _arrive(self, *, is_reached: bool) -> None:
        """Go on with the stack of the jumps that lead here too, or with theirs alone."""
        waiting = self._waiting.pop(self._offset, None)
        if waiting is not None:
            if is_reached:
                waiting = _merged(self._stack.items(), waiting)
            self._stack.clear()
            self._stack.push(*waiting)
        elif not is_reached:
            self._stack.clear()

    def _jump(self, instruction: dis.Instruction) -> None:
        """Keep the stack as it is where a jump leads."""
        effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=True)
        stack = self._stack.items()
        stack = stack[:effect] if effect < 0 else stack + [_UNKNOWN] * effect
        target = instruction.argval
        waiting = self._waiting.get(target)
        if waiting is not None:
            stack = _merged(waiting, stack)
        self._waiting[target] = stack

    # -- what is loaded ---------------------------------------------------------------------------------------

    def _load_global(self, instruction: dis.Instruction, effect: int) -> None:
        beside = [_NULL] * (effect - 1)
        if _HAS_NULL_BELOW:
            self._stack.push(*beside)
        self._push_read((Operand("global", instruction.argval),))
        if not _HAS_NULL_BELOW:
            self._stack.push(*beside)

    def _load_name(self, instruction: dis.Instruction, effect: int) -> None:
        self._stack.pop(1 - effect)
        self._push_read((Operand("global", instruction.argval),))

    def _load_cell(self, instruction: dis.Instruction, effect: int) -> None:
        self._stack.pop(1 - effect)
        self._push_read((Operand("variable", instruction.argval),))

    def _load_variables(self, instruction: dis.Instruction, _effect: int) -> None:
        for name in variables_of(instruction):
            self._push_read((Operand("variable", name),))

    def _load_and_clear(self, instruction: dis.Instruction, effect: int) -> None:
        """Load a variable as a comprehension does, which keeps it for later."""
        self._load_variables(instruction, effect)
        self._unused.pop(self._n_reads, None)

    def _load_attribute(self, instruction: dis.Instruction, effect: int) -> None:
        owner = self._pop_unused()
        self._push_read(attribute_of(owner.operands, instruction.argval))
        self._stack.push(*[_OWNER] * effect)

    def _load_super_attribute(self, instruction: dis.Instruction, effect: int) -> None:
        self._stack.pop(3)
        self._push_read(attribute_of(UNKNOWN, instruction.argval))
        self._stack.push(*[_OWNER] * (2 + effect))

    def _load_constant(self, instruction: dis.Instruction, _effect: int) -> None:
        self._push(constant_of(instruction.argval))

    def _import_module(self, instruction: dis.Instruction, _effect: int) -> None:
        wanted = self._stack.pop()
        level = self._stack.pop()
        self._push(imported(instruction.argval, level.operands, wanted.operands))

    def _import_from(self, instruction: dis.Instruction, _effect: int) -> None:
        self._push_read(attribute_of(self._stack.peek(1).operands, instruction.argval))

    def _push_null(self, _instruction: dis.Instruction, _effect: int) -> None:
        self._stack.push(_NULL)

    def _copy(self, instruction: dis.Instruction, effect: int) -> None:
        if instruction.opname == "COPY" and instruction.arg != 1:
            self._stack.do(instruction, effect)
            return
        value = self._stack.peek(1)
        if value.number in self._unused:
            self._push_again(value)
        else:
            self._stack.push(value)

    # -- what is stored, and what operators make --------------------------------------------------------------

    def _store_variables(self, instruction: dis.Instruction, _effect: int) -> None:
        for name in variables_of(instruction):
            self._assign(name, self._stack.pop())

    def _store_and_load(self, instruction: dis.Instruction, _effect: int) -> None:
        stored, loaded = instruction.argval
        self._assign(stored, self._stack.pop())
        self._push_read((Operand("variable", loaded),))

    def _store_global(self, _instruction: dis.Instruction, _effect: int) -> None:
        value = self._stack.pop()
        if any(operand.kind == "module" for operand in value.operands):
            self._unused.pop(value.number, None)

    def _change_attribute(self, _instruction: dis.Instruction, effect: int) -> None:
        self._pop_unused()
        self._stack.pop(-1 - effect)

    def _change_item(self, _instruction: dis.Instruction, effect: int) -> None:
        self._stack.pop()
        self._pop_unused()
        self._stack.pop(-2 - effect)

    def _load_item(self, _instruction: dis.Instruction, _effect: int) -> None:
        key = self._stack.pop()
        owner = self._pop_unused()
        self._seen.items.append((owner.operands, key.operands))
        self._stack.push(_UNKNOWN)

    def _compare(self, _instruction: dis.Instruction, _effect: int) -> None:
        self._pop_unused()
        self._pop_unused()
        self._stack.push(_UNKNOWN)

    def _operate(self, instruction: dis.Instruction, effect: int) -> None:
        """Follow an operator of two operands: of a text, + leaves the start as it is."""
        if instruction.arg:
            self._stack.do(instruction, effect)
            return
        self._stack.pop()
        self._push(start_of(self._stack.pop().operands))

    def _build_string(self, instruction: dis.Instruction, _effect: int) -> None:
        first = _UNKNOWN
        if instruction.arg:
            first = self._stack.pop(instruction.arg)
        self._push(start_of(first.operands))

    # -- calls ------------------------------------------------------------------------------------------------

    def _name_keywords(self, instruction: dis.Instruction, _effect: int) -> None:
        self._keywords = names_in(self._code.co_consts[instruction.arg or 0])  # dis does not resolve it in Python 3.11

    def _pass(self, _instruction: dis.Instruction, _effect: int) -> None:
        """Do nothing before a call, which takes what there is."""

    def _call_with_more(self, instruction: dis.Instruction, _effect: int) -> None:
        """Note a call with ``*args`` or ``**kwargs``."""
        self._stack.pop(1 + ((instruction.arg or 0) & 1))
        callee, before = self._pop_callee(is_alone=_IS_OLD)
        self._note_call(callee, Call(callee.operands, tuple(before), has_more=True))

    def _call(self, instruction: dis.Instruction, _effect: int) -> None:
        """Note a call, and put its result in place of callee and arguments."""
        if instruction.opname in ("CALL_KW", "CALL_FUNCTION_KW"):
            self._keywords = self._stack.pop().operands[0].keys
        names, self._keywords = self._keywords, ()
        n_given = instruction.arg or 0
        given = [self._stack.pop() for _ in range(n_given)]
        given.reverse()
        callee, before = self._pop_callee(is_alone=_IS_OLD and instruction.opname != "CALL_METHOD")

        n_positional = n_given - len(names)
        arguments = [value.operands for value in given]
        positional = arguments[:n_positional]
        if callee.operands[0] in _READS_ATTRIBUTE and not before and len(positional) > 1:
            self._read_attribute(given[0], positional[1])
        keywords = zip(names, arguments[n_positional:], strict=False)
        self._note_call(callee, Call(callee.operands, (*before, *positional), tuple(keywords)))

    def _push(self, operands: Operands) -> None:
        self._stack.push(_Value(operands, self._offset))

    def _push_read(self, operands: Operands) -> None:
        """Push what is read by a name."""
        self._seen.read.update(operands)
        self._push_again(_Value(operands, self._offset))

    def _push_again(self, value: _Value) -> None:
        """Push what is read by a name, as another read of it."""
        self._n_reads += 1
        self._unused[self._n_reads] = value.operands
        self._stack.push(_Value(value.operands, value.offset, self._n_reads))

    def _pop_unused(self) -> _Value:
        """Take off the stack what is not used as it is."""
        value = self._stack.pop()
        self._unused.pop(value.number, None)
        return value

    def _assign(self, name: str, value: _Value) -> None:
        self._unused.pop(value.number, None)
        self._seen.assigned[name] = either(self._seen.assigned.get(name, ()), value.operands)

    def _read_attribute(self, owner: _Value, names: Operands) -> None:
        """Note a call that reads an attribute whose name is written there, as the attribute itself does."""
        texts = [text_of(name) for name in names]
        if None in texts:
            return
        self._unused.pop(owner.number, None)
        for text in filter(None, texts):
            found = attribute_of(owner.operands, text)
            self._seen.read.update(found)
            self._seen.used.update(found)

    def _note_call(self, callee: _Value, call: Call) -> None:
        """Note a call, and push its result.

        What follows a branch inside of it may be there twice: two calls of one callee are one.
        """
        self._unused.pop(callee.number, None)
        calls = self._seen.calls
        form = len(call.positional), tuple([name for name, _ in call.keywords]), call.has_more
        number = self._numbers.setdefault((callee.offset, form), len(calls))
        if number == len(calls) or callee.offset < 0:
            number = len(calls)
            calls.append(call)
        else:
            calls[number] = _united(calls[number], call)
        self._push((Operand("result", str(number)),))

    def _pop_callee(self, *, is_alone: bool) -> tuple[_Value, list[Operands]]:
        """Take what is called off the stack; return it, and the first argument where that lay beside it.

        Args:
            is_alone: Whether nothing lies beside it.
        """
        upper = self._stack.pop()
        if is_alone:
            return upper, []
        lower = self._stack.pop()
        if lower == _NULL:
            return upper, []
        if upper in (_NULL, _OWNER):
            return lower, []
        return lower, [upper.operands]

    # -- which instruction does what ----------------------------------------------------------------------------

    #: Those of all versions of Python. What is missing only moves values, or makes others of which nothing is known.
    _OPNAMES: ClassVar[Mapping[_Step, Iterable[str]]] = {
        _load_global: ("LOAD_GLOBAL",),
        _load_name: ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"),
        _load_cell: LOADS_CELL,
        _load_variables: [opname for opname in dis.opmap if opname.startswith("LOAD_FAST")],
        _load_and_clear: ("LOAD_FAST_AND_CLEAR",),
        _load_attribute: LOADS_ATTRIBUTE,
        _load_super_attribute: ("LOAD_SUPER_ATTR",),
        _load_constant: ("LOAD_CONST",),
        _import_module: ("IMPORT_NAME",),
        _import_from: ("IMPORT_FROM",),
        _push_null: ("PUSH_NULL",),
        _copy: ("COPY", "DUP_TOP"),
        _store_variables: ("STORE_FAST", "STORE_DEREF", "STORE_FAST_STORE_FAST"),
        _store_and_load: ("STORE_FAST_LOAD_FAST",),
        _store_global: ("STORE_GLOBAL",),
        _change_attribute: ("STORE_ATTR", "DELETE_ATTR"),
        _change_item: ("STORE_SUBSCR", "DELETE_SUBSCR"),
        _load_item: ("BINARY_SUBSCR",),
        _compare: ("COMPARE_OP", "CONTAINS_OP", "IS_OP"),
        _operate: ("BINARY_ADD", "BINARY_OP"),  # of all operators, the one without a number is +
        _build_string: ("BUILD_STRING",),
        _name_keywords: ("KW_NAMES",),
        _pass: ("PRECALL",),
        _call: ("CALL", "CALL_KW", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_METHOD"),
        _call_with_more: ("CALL_FUNCTION_EX",),
    }
    #: By the names of the instructions; one that several kinds name is of the last.
    _STEPS: ClassVar[Mapping[str, _Step]] = {opname: step for step, opnames in _OPNAMES.items() for opname in opnames}


#: Does to the stack what an instruction does, given by how much it grows.
_Step = Callable[[_Scan, dis.Instruction, int], None]


def _merged(one: list[_Value], other: list[_Value]) -> list[_Value]:
    """Return the stack where two ways through the code meet; the uppermost values lie side by side."""
    depth = min(len(one), len(other))
    one = one[len(one) - depth :]
    other = other[len(other) - depth :]

    merged: list[_Value] = []
    for a, b in zip(one, other, strict=True):
        value = a
        if a != b:
            value = _Value(either(a.operands, b.operands))
        merged.append(value)
    return merged


def _united(one: Call, other: Call) -> Call:
    """Return what stands for two calls of one form."""
    positional: list[Operands] = []
    for a, b in zip(one.positional, other.positional, strict=True):
        positional.append(either(a, b))
    keywords: list[tuple[str, Operands]] = []
    for (name, a), (_, b) in zip(one.keywords, other.keywords, strict=True):
        keywords.append((name, either(a, b)))
    callee = either(one.callee, other.callee)
    return Call(callee, tuple(positional), tuple(keywords), one.has_more)
