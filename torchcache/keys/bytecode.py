"""What one code object says: its fingerprint, what it reads by name, and what it changes.

Instructions are hashed one by one with their operands resolved, so that docstrings, line numbers, file
and module names do not count. What the code looks up while it runs is only named here; ``code.py``
follows it.

This module does not import torch.
"""

from __future__ import annotations

import dis
import inspect
import math
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Generic, TypeVar

from torchcache.keys.digest import digest_parts
from torchcache.keys.places import DEFAULT, defaults_of

T = TypeVar("T")

#: Flags of a code object that say how it runs (generator, coroutine, *args, ...); the rest, such as
#: "has a docstring", does not count.
_FLAG_MASK = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_ITERABLE_COROUTINE
)

#: What the body of a class inside a function says of itself: texts, line numbers, and from Python 3.13 on
#: names in an order that the hash seed decides.
_SELF_DESCRIPTIONS = frozenset({"__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__"})

#: Methods that change the list, dict, set or deque they are called on.
_MUTATORS = frozenset({
    "append", "appendleft", "extend", "extendleft", "insert", "add", "update", "pop", "popleft", "popitem",
    "remove", "discard", "clear", "setdefault", "sort", "reverse", "subtract", "put", "write",
    "difference_update", "intersection_update", "symmetric_difference_update", "__setitem__",
})  # fmt: skip

LOADS_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LOADS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
LOADS_CELL = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
_SAYS_NOTHING = frozenset({"NOP", "EXTENDED_ARG", "CACHE"})  # NOP is what -OO leaves of a docstring

_HAS_CONSTANT = frozenset(dis.hasconst)
_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


@lru_cache(maxsize=16384)
def fingerprint_code(code: types.CodeType) -> bytes:
    """Return the digest of one code object and of those inside it."""
    parts = [
        str((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAG_MASK)).encode(),
        " ".join(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]).encode(),
    ]
    kept, numbers = _canonical(code)
    for start, end, target, depth in _protected(code):
        # Ranges that hold nothing that counts protect nothing.
        if numbers[start] < numbers[end]:
            parts.append(f"protect {numbers[start]} {numbers[end]} {numbers[target]} {depth}".encode())
    for instruction in kept:
        parts.append(instruction.opname.encode())
        if instruction.opcode in _HAS_CONSTANT:
            # dis does not resolve the names of keyword arguments of Python 3.11.
            parts.append(constant(code.co_consts[instruction.arg or 0]))
        elif instruction.opcode in _JUMPS:
            parts.append(str(numbers[instruction.argval]).encode())
        elif isinstance(instruction.argval, str):
            parts.append(instruction.argval.encode())
        elif instruction.arg is not None:
            parts.append(str(instruction.arg).encode())
    return digest_parts(parts)


def _canonical(code: types.CodeType) -> tuple[list[dis.Instruction], dict[int, int]]:
    """Return the instructions that count, and for every offset the number of such instructions before it."""
    everything = list(dis.get_instructions(code))
    silent = {
        offset
        for before, store in pairwise(everything)
        if store.opname == "STORE_NAME" and store.argval in _SELF_DESCRIPTIONS and before.opname.startswith("LOAD_")
        for offset in (before.offset, store.offset)
    }
    kept: list[dis.Instruction] = []
    numbers: dict[int, int] = {}
    for instruction in everything:
        # Offsets of inline caches, which a range of protected code may end in, belong to what precedes them.
        numbers[instruction.offset] = len(kept)
        if instruction.opname not in _SAYS_NOTHING and instruction.offset not in silent:
            kept.append(instruction)
    number = len(kept)
    for offset in range(len(code.co_code), -1, -2):
        number = numbers.setdefault(offset, number)
    return kept, numbers


def _protected(code: types.CodeType) -> Iterator[tuple[int, int, int, int]]:
    """Yield start, end and handler of each protected range, with depth and flag (Python 3.11 and later)."""
    numbers = _varints(getattr(code, "co_exceptiontable", b""))
    for start, length, target, depth in zip(numbers, numbers, numbers, numbers, strict=True):
        yield 2 * start, 2 * (start + length), 2 * target, depth


def _varints(table: bytes) -> Iterator[int]:
    """Decode the numbers of an exception table: six bits a byte, the seventh says that more follow."""
    value = 0
    for byte in table:
        value = value << 6 | byte & 63
        if not byte & 64:
            yield value
            value = 0


def constant(value: object) -> bytes:
    """Return a stable name of a constant of code; of anything that cannot be one, of its type."""
    if isinstance(value, types.CodeType):
        return b"code" + fingerprint_code(value)
    if isinstance(value, tuple):
        return digest_parts([b"tuple", *map(constant, value)])
    if isinstance(value, frozenset):
        return digest_parts([b"frozenset", *sorted(map(constant, value))])
    if is_constant(value):
        return f"{type(value).__name__} {value!r}".encode()
    return type(value).__qualname__.encode()


def is_constant(value: object) -> bool:
    """Tell whether ``constant`` names all of a value: a plain one that nothing changes."""
    if type(value) in (tuple, frozenset):
        return all(map(is_constant, value))  # type: ignore[call-overload]
    return type(value) in _CONSTANTS


_CONSTANTS = frozenset({type(None), bool, int, float, complex, str, bytes, type(...)})


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


@lru_cache(maxsize=16384)
def reads_of(code: types.CodeType) -> Reads:
    """Return what a code object and those inside it look up."""
    names, attributes = set[str](), set[str]()
    chains, ends = set[tuple[str, ...]](), set[tuple[str, ...]]()
    imports: dict[tuple[int, str, tuple[str, ...]], None] = {}
    for inner in all_codes(code):
        if "getattr" in inner.co_names:
            attributes.update(text for text in inner.co_consts if isinstance(text, str) and text.isidentifier())
        chain: tuple[str, ...] = ()  # how the object on top of the stack was come by
        recent: list[object] = [0, None]
        for instruction in dis.get_instructions(inner):
            if instruction.opname in _SAYS_NOTHING:
                continue
            argument = instruction.argval
            if instruction.opname in _LOADS_GLOBAL:
                names.add(argument)
            elif instruction.opname in LOADS_ATTRIBUTE or instruction.opname == "LOAD_SUPER_ATTR":
                attributes.add(argument)
            elif instruction.opname == "IMPORT_NAME":
                level, wanted = recent
                found = (level if isinstance(level, int) else 0, argument, wanted if isinstance(wanted, tuple) else ())
                imports[found] = None
            if instruction.opname in LOADS_ATTRIBUTE and chain:
                chain = (*chain, argument)
                chains.add(chain)
            else:
                ends.add(chain)
                chain = (argument,) if instruction.opname in _LOADS_GLOBAL else ()
            recent = [recent[1], argument]
    ends.discard(())
    return Reads(
        tuple(sorted(names)), tuple(sorted(attributes)), tuple(sorted(chains)), tuple(sorted(ends)), tuple(imports)
    )


def all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those inside it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from all_codes(value)


@dataclass(slots=True)
class Writes:
    """What code changes itself, and whether it uses what it changed.

    Attributes are told apart by the class whose method changes them; a name is that of a global or closure
    variable. Reads are counted less those that a change itself makes: of ``self.calls += 1`` none is left, so a
    value that is only counted, or only noted for others to see, has no reads and shapes no result.
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
        code = function.__code__
        origins: dict[str, _Origin] = {key.removesuffix(DEFAULT): (_NAMES, key) for key, _ in defaults_of(function)}
        if code.co_argcount and owner is not None:
            origins[code.co_varnames[0]] = (owner, _SELF)
        for inner in all_codes(code):
            # A variable of an inner function is another one unless it is shared.
            shared = {n: o for n, o in origins.items() if inner is code or n in inner.co_freevars}
            _Scan(inner, shared, self).run()

    def note_read(self, key: _Key) -> None:
        self._reads[key] += 1

    def note_assignment(self, key: _Key, value: _Origin) -> None:
        """Note that what lies at ``key`` is assigned what came from ``value``."""
        self._assigned.add(key)
        if value == (_MADE_FROM, key):
            self._counted.add(key)
            self._reads[key] -= 1

    def note_change(self, key: _Key, *, reads: bool) -> None:
        """Note a change in place, and whether it hands out what is there."""
        self._changed.add(key)
        if not reads:
            self._reads[key] -= 1


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
        opname, items = instruction.opname, self._items
        if opname == "COPY":
            items.append(self.peek(instruction.arg or 1))
        elif opname == "SWAP":
            depth = instruction.arg or 1
            if len(items) >= depth:
                items[-1], items[-depth] = items[-depth], items[-1]
        elif opname == "DUP_TOP":
            items.append(self.peek(1))
        elif opname == "DUP_TOP_TWO":
            items += [self.peek(2), self.peek(1)]
        elif opname in _ROTATIONS:
            depth = _ROTATIONS[opname] or instruction.arg or 1
            if len(items) >= depth:
                uppermost = items.pop()
                items.insert(len(items) - depth + 1, uppermost)
        elif opname.startswith(_REPLACES_UPPERMOST):
            self.pop()
            self.push(*[self._unknown] * (1 + effect))
        elif effect > 0:
            self.push(*[self._unknown] * effect)
        elif opname.startswith(_PUSHES_NOTHING):
            self.pop(-effect)
        else:
            self.pop(1 - effect)
            self.push(self._unknown)


def variables_of(instruction: dis.Instruction) -> tuple[str, ...]:
    """Return the variables that an instruction names; from Python 3.13 on, one may load or store two."""
    argument = instruction.argval
    return argument if isinstance(argument, tuple) else (argument,)


def ends_here(opname: str) -> bool:
    """Tell whether what follows an instruction is not what runs next."""
    return opname.startswith(_ENDS) and opname != "RETURN_GENERATOR"


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

#: An attribute by the class whose method names it (None: of an object of any class), or a name.
_Key = tuple[Any, str]
_NAMES = "names"
_SELF = ""
_MADE_FROM = "made from"

#: Where an object on the stack came from: a ``_Key``, (class, ``_SELF``) for the object itself, (``_MADE_FROM``, key)
#: for what an operator made of it, or nothing known.
_Origin = tuple[Any, Any]
_UNKNOWN: _Origin = (None, None)

#: Of these methods the result is used: they read what they change.
_READING_MUTATORS = frozenset({"pop", "popleft", "popitem", "setdefault"})


def _is_key(origin: _Origin) -> bool:
    return origin is not _UNKNOWN and origin[0] is not _MADE_FROM and origin[1] != _SELF


class _Scan:
    """One pass over one code object, following where the objects on the stack came from.

    In doubt a value counts as read, which costs a miss.
    """

    def __init__(self, code: types.CodeType, origins: Mapping[str, _Origin], writes: Writes) -> None:
        self._code = code
        self._origins = origins
        self._writes = writes
        self._stack = OperandStack(_UNKNOWN)
        self._fresh: dict[_Key, float] = {}  # what was assigned before it is read, up to which offset
        self._offset = 0
        self._instructions = list(dis.get_instructions(code))
        self._skips = [(i.offset, i.argval) for i in self._instructions if i.opcode in _JUMPS and i.argval > i.offset]

    def run(self) -> None:
        """Go through all instructions."""
        for instruction in self._instructions:
            self._offset = instruction.offset
            self._note(instruction.opname, instruction.argval)
            self._move(instruction)

    def _read(self, key: _Key) -> None:
        if self._offset >= self._fresh.get(key, -1):
            self._writes.note_read(key)

    def _assign(self, key: _Key, value: _Origin) -> None:
        self._writes.note_assignment(key, value)
        if value == (_MADE_FROM, key):
            self._fresh.pop(key, None)
            return
        # An assignment that a jump may pass by says nothing of what comes after the jump's target.
        self._fresh[key] = min((t for s, t in self._skips if s < self._offset < t), default=math.inf)

    def _change(self, origin: _Origin, *, reads: bool = False) -> None:
        if _is_key(origin):
            self._writes.note_change(origin, reads=reads)

    def _note(self, opname: str, argument: Any) -> None:  # noqa: ANN401 - whatever an instruction names
        """Note what an instruction assigns or changes."""
        if opname in ("STORE_ATTR", "DELETE_ATTR"):
            owner = self._stack.peek(1)
            is_self = owner is not _UNKNOWN and owner[1] == _SELF
            self._assign((owner[0] if is_self else None, argument), self._stack.peek(2))
        elif opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
            opname in ("STORE_DEREF", "DELETE_DEREF") and argument in self._code.co_freevars
        ):
            self._assign((_NAMES, argument), self._stack.peek(1))
        elif opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            self._change(self._stack.peek(2))
        elif opname == "STORE_SLICE":
            self._change(self._stack.peek(3))

    def _move(self, instruction: dis.Instruction) -> None:
        """Do to the stack what an instruction does, and note what it reads."""
        opname, argument, stack = instruction.opname, instruction.argval, self._stack
        effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if opname in LOADS_ATTRIBUTE:
            owner = stack.pop()
            if argument in _MUTATORS:
                self._change(owner, reads=argument in _READING_MUTATORS)
            key = (owner[0] if owner is not _UNKNOWN and owner[1] == _SELF else None, argument)
            self._read(key)
            stack.push(*[key] * (1 + effect))
        elif opname in _LOADS_GLOBAL or opname in LOADS_CELL:
            stack.push(*[_UNKNOWN] * (effect - 1))
            known = self._origins.get(argument) if opname in LOADS_CELL else None
            self._read((_NAMES, argument))
            stack.push(known or (_NAMES, argument))
        elif opname.startswith(("BINARY_", "INPLACE_")) and effect == -1 and "SUBSCR" not in opname:
            right, left = stack.pop(), stack.pop()
            stack.push(_made_from(left, right))
        elif opname.startswith("LOAD_FAST"):
            stack.push(*map(self._load, variables_of(instruction)))
        elif opname == "STORE_FAST_LOAD_FAST":
            stack.pop()
            stack.push(self._load(argument[1]))
        else:
            stack.do(instruction, effect)
        if ends_here(opname):
            stack.clear()

    def _load(self, name: str) -> _Origin:
        origin = self._origins.get(name, _UNKNOWN)
        if _is_key(origin):  # a default that is kept between calls
            self._read(origin)
        return origin


def _made_from(*operands: _Origin) -> _Origin:
    """Return the origin of what an operator makes of its operands."""
    for operand in operands:
        if _is_key(operand):
            return _MADE_FROM, operand
        if operand[0] is _MADE_FROM:
            return operand
    return _UNKNOWN
