"""The calls that code makes, and what its instructions say of callee and arguments.

Instructions say where a value comes from (a name, a variable, an attribute of one of these), not what it is; that is
for who knows the function to find out. This module does not import torch.
"""

from __future__ import annotations

import ast
import dis
import inspect
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

from torchcache.keys.bytecode import LOADS_ATTRIBUTE, LOADS_CELL, OperandStack, all_codes, ends_here, variables_of


@dataclass(frozen=True, slots=True)
class Operand:
    """Where a value comes from.

    Attributes:
        kind: "global" for a global or builtin, "variable" for any other, "module" for what an import returns,
            "result" for what a call returns, "constant", "start" for a text of which the front is known, or "unknown".
        root: The global, the variable, the module (with dots in front if it is relative), the call's number, the
            front of a text, or the constant as it is written, if it is None, an int or a text.
        keys: The attributes that are read of it, of that, and so on; of a constant, the names in it.
    """

    kind: str
    root: str = ""
    keys: tuple[str, ...] = ()


#: What a value may be: which one it is depends on how the code ran.
Operands = tuple[Operand, ...]

NONE: Operands = (Operand("constant", "None"),)
UNKNOWN: Operands = (Operand("unknown"),)

#: More possibilities for one value are taken for an unknown one.
_MOST_POSSIBILITIES = 16


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


@lru_cache(maxsize=16384)
def uses_of(code: types.CodeType) -> Uses:
    """Return what a code object and those inside it use."""
    seen = _Seen()
    for inner in all_codes(code):
        if inner is not code:
            for name in parameters_of(inner):
                seen.assigned[name] = _either(seen.assigned.get(name, ()), UNKNOWN)
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
    n_rest = [bool(code.co_flags & flag) for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS)].count(True)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + n_rest]


_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


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
            self._land(is_reached=is_reached)
            if instruction.opcode in _JUMPS and instruction.argval > instruction.offset:
                self._jump(instruction)
            self._do(instruction)
            is_reached = not ends_here(instruction.opname)
        # Whoever takes an attribute of it, or keeps it for later, has taken it out.
        self._seen.used.update(chain.from_iterable(self._unused.values()))

    def _land(self, *, is_reached: bool) -> None:
        """Go on with the stack of the jumps that lead here too, or with theirs alone."""
        here = self._stack.items() if is_reached else None
        waiting = self._waiting.pop(self._offset, None)
        if not is_reached:
            self._stack.clear()
        if waiting is not None:
            self._stack.clear()
            self._stack.push(*_merged(here, waiting))

    def _jump(self, instruction: dis.Instruction) -> None:
        """Keep the stack as it is where a jump leads."""
        effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=True)
        stack = self._stack.items()
        stack = stack[:effect] if effect < 0 else stack + [_UNKNOWN] * effect
        self._waiting[instruction.argval] = _merged(self._waiting.get(instruction.argval), stack)

    def _do(self, instruction: dis.Instruction) -> None:
        opname, argument, arg, stack = instruction.opname, instruction.argval, instruction.arg or 0, self._stack
        effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if opname == "LOAD_GLOBAL":
            # Beside what it calls, code puts NULL: below it until Python 3.12, above it from 3.13 on.
            beside = [_NULL] * (effect - 1)
            stack.push(*beside if _HAS_NULL_BELOW else ())
            self._push_read((Operand("global", argument),))
            stack.push(*() if _HAS_NULL_BELOW else beside)
        elif opname in ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            stack.pop(1 - effect)
            self._push_read((Operand("global", argument),))
        elif opname in LOADS_CELL:
            stack.pop(1 - effect)
            self._push_read((Operand("variable", argument),))
        elif opname.startswith("LOAD_FAST"):
            for name in variables_of(instruction):
                self._push_read((Operand("variable", name),))
            if opname == "LOAD_FAST_AND_CLEAR":  # a comprehension keeps it for later
                self._unused.pop(self._n_reads, None)
        elif opname in LOADS_ATTRIBUTE:
            self._push_read(_attribute(self._pop_unused().operands, argument))
            stack.push(*[_OWNER] * effect)
        elif opname == "LOAD_SUPER_ATTR":
            stack.pop(3)
            self._push_read(_attribute(UNKNOWN, argument))
            stack.push(*[_OWNER] * (2 + effect))
        elif opname == "LOAD_CONST":
            self._push(_constant(argument))
        elif opname == "IMPORT_NAME":
            wanted, level = stack.pop(), stack.pop()
            self._push((Operand("module", _imported(argument, level.operands, wanted.operands)),))
        elif opname == "IMPORT_FROM":
            self._push_read(_attribute(stack.peek(1).operands, argument))
        elif opname == "PUSH_NULL":
            stack.push(_NULL)
        elif opname in ("STORE_ATTR", "DELETE_ATTR"):
            self._pop_unused()
            stack.pop(-1 - effect)
        elif opname in ("COMPARE_OP", "CONTAINS_OP", "IS_OP"):
            self._pop_unused()
            self._pop_unused()
            stack.push(_UNKNOWN)
        elif opname == "STORE_GLOBAL":
            value = stack.pop()
            if any(operand.kind == "module" for operand in value.operands):
                self._unused.pop(value.number, None)
        elif (opname == "COPY" and arg == 1) or opname == "DUP_TOP":
            value = stack.peek(1)
            self._push_again(value) if value.number in self._unused else stack.push(value)
        elif opname == "BINARY_SUBSCR":
            key, owner = stack.pop(), self._pop_unused()
            self._seen.items.append((owner.operands, key.operands))
            stack.push(_UNKNOWN)
        elif opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            stack.pop()
            self._pop_unused()
            stack.pop(-2 - effect)
        elif opname == "BUILD_STRING":
            first = [stack.pop() for _ in range(arg)][-1:]
            self._push(_start_of(first[0].operands if first else UNKNOWN))
        elif opname in ("BINARY_ADD", "BINARY_OP") and arg == 0:  # of all operators this is +
            stack.pop()
            self._push(_start_of(stack.pop().operands))
        elif opname in ("STORE_FAST", "STORE_DEREF", "STORE_FAST_STORE_FAST"):
            for name in variables_of(instruction):
                self._assign(name, stack.pop())
        elif opname == "STORE_FAST_LOAD_FAST":
            self._assign(argument[0], stack.pop())
            self._push_read((Operand("variable", argument[1]),))
        elif opname == "KW_NAMES":
            self._keywords = _names_in(self._code.co_consts[arg])  # dis does not resolve it in Python 3.11
        elif opname in _CALLS:
            self._call(opname, arg)
        elif opname != "PRECALL":  # the call itself takes what there is
            stack.do(instruction, effect)

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
        self._seen.assigned[name] = _either(self._seen.assigned.get(name, ()), value.operands)

    def _call(self, opname: str, arg: int) -> None:
        """Note a call, and put its result in place of callee and arguments."""
        stack = self._stack
        positional: list[Operands] = []
        keywords: list[tuple[str, Operands]] = []
        has_more, owner = opname == "CALL_FUNCTION_EX", _UNKNOWN
        if has_more:
            stack.pop(1 + (arg & 1))
        else:
            if opname in ("CALL_KW", "CALL_FUNCTION_KW"):
                self._keywords = stack.pop().operands[0].keys
            given = [stack.pop() for _ in range(arg)][::-1]
            n_positional = arg - len(self._keywords)
            positional = [value.operands for value in given[:n_positional]]
            keywords = [*zip(self._keywords, (value.operands for value in given[n_positional:]), strict=False)]
            self._keywords = ()
            owner = given[0] if n_positional > 1 else _UNKNOWN
        callee, before = self._pop_callee(is_alone=_IS_OLD and opname != "CALL_METHOD")
        self._unused.pop(callee.number, None)
        if callee.operands[0] in _READS_ATTRIBUTE and not before and len(positional) > 1:
            self._read_attribute(owner, positional[1])
        positional[:0] = before
        self._note(callee.offset, Call(callee.operands, tuple(positional), tuple(keywords), has_more))

    def _read_attribute(self, owner: _Value, names: Operands) -> None:
        """Note a call that reads an attribute whose name is written there, as the attribute itself does."""
        texts = [text_of(name) for name in names]
        if None not in texts:
            self._unused.pop(owner.number, None)
            for text in filter(None, texts):
                found = _attribute(owner.operands, text)
                self._seen.read.update(found)
                self._seen.used.update(found)

    def _note(self, offset: int, call: Call) -> None:
        """Note a call. What follows a branch inside of it may be there twice: two calls of one callee are one."""
        form = len(call.positional), tuple(name for name, _ in call.keywords), call.has_more
        number = self._numbers.setdefault((offset, form), len(self._seen.calls))
        if number == len(self._seen.calls) or offset < 0:
            number = len(self._seen.calls)
            self._seen.calls.append(call)
        else:
            self._seen.calls[number] = _united(self._seen.calls[number], call)
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
        return lower, [] if upper in (_NULL, _OWNER) else [upper.operands]


#: Python 3.10 calls what is no method without anything beside it.
_IS_OLD = sys.version_info < (3, 11)
_HAS_NULL_BELOW = sys.version_info < (3, 13)

_READS_ATTRIBUTE = frozenset({Operand("global", "getattr"), Operand("global", "hasattr")})

_CALLS = frozenset({"CALL", "CALL_KW", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX", "CALL_METHOD"})


def _attribute(owners: Operands, key: str) -> Operands:
    return tuple(Operand(owner.kind, owner.root, (*owner.keys, key)) for owner in owners)


def _constant(value: object) -> Operands:
    is_told = value is None or type(value) in (int, str)
    return (Operand("constant", repr(value) if is_told else "", _names_in(value)),)


def text_of(operand: Operand) -> str | None:
    """Return the text that an operand is, or None."""
    is_text = operand.kind == "constant" and operand.root[:1] in ("'", '"')
    return str(ast.literal_eval(operand.root)) if is_text else None


def _start_of(operands: Operands) -> Operands:
    """Return what is known of a text that starts with a value."""
    texts = [operand.root if operand.kind == "start" else text_of(operand) for operand in operands]
    return tuple(Operand("start", text) if text else UNKNOWN[0] for text in texts)


def _imported(module: str, level: Operands, wanted: Operands) -> str:
    """Name the module that an import returns: the outermost one where nothing is wanted from it."""
    if wanted == NONE:
        return module.partition(".")[0]
    dots = level[0].root
    return "." * (int(dots) if dots.isdecimal() else 0) + module


def _names_in(value: object) -> tuple[str, ...]:
    """Return the names in a constant, which may be those of a call's keywords."""
    return value if isinstance(value, tuple) and all(type(item) is str for item in value) else ()


def _merged(one: list[_Value] | None, other: list[_Value]) -> list[_Value]:
    """Return the stack where two ways through the code meet; the uppermost values lie side by side."""
    if one is None:
        return other
    depth = min(len(one), len(other))
    return [
        a if a == b else _Value(_either(a.operands, b.operands))
        for a, b in zip(one[len(one) - depth :], other[len(other) - depth :], strict=True)
    ]


def _united(one: Call, other: Call) -> Call:
    """Return what stands for two calls of one form."""
    return Call(
        _either(one.callee, other.callee),
        tuple(_either(*pair) for pair in zip(one.positional, other.positional, strict=True)),
        tuple((name, _either(a, b)) for (name, a), (_, b) in zip(one.keywords, other.keywords, strict=True)),
        one.has_more,
    )


def _either(*possible: Iterable[Operand]) -> Operands:
    together = tuple(dict.fromkeys(chain(*possible)))
    return together if len(together) <= _MOST_POSSIBILITIES else UNKNOWN
