"""What one code object says: its fingerprint, what it reads by name, and what it changes.

Instructions are hashed one by one with their operands resolved, so that docstrings, line numbers, file
and module names do not count. What the code looks up while it runs is only named here; ``code.py``
follows it.

This module does not import torch.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from torchcache.keys.digest import digest_parts
from torchcache.keys.places import DEFAULT, defaults_of

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

_LOADS_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LOADS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_LOADS_CELL = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
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
        attributes: Attributes of anything.
        chains: Globals, each with the attributes that are read of it, of that, and so on.
        imports: Level, module and names of each import.
    """

    names: tuple[str, ...]
    attributes: tuple[str, ...]
    chains: tuple[tuple[str, ...], ...]
    imports: tuple[tuple[int, str, tuple[str, ...]], ...]


@lru_cache(maxsize=16384)
def reads_of(code: types.CodeType) -> Reads:
    """Return what a code object and those inside it look up."""
    names, attributes, chains = set[str](), set[str](), set[tuple[str, ...]]()
    imports: dict[tuple[int, str, tuple[str, ...]], None] = {}
    for inner in all_codes(code):
        chain: tuple[str, ...] = ()  # how the object on top of the stack was come by
        recent: list[object] = [0, None]
        for instruction in dis.get_instructions(inner):
            if instruction.opname in _SAYS_NOTHING:
                continue
            argument = instruction.argval
            if instruction.opname in _LOADS_GLOBAL:
                names.add(argument)
            elif instruction.opname in _LOADS_ATTRIBUTE or instruction.opname == "LOAD_SUPER_ATTR":
                attributes.add(argument)
            elif instruction.opname == "IMPORT_NAME":
                level, wanted = recent
                found = (level if isinstance(level, int) else 0, argument, wanted if isinstance(wanted, tuple) else ())
                imports[found] = None
            if instruction.opname in _LOADS_GLOBAL:
                chain = (argument,)
            elif instruction.opname in _LOADS_ATTRIBUTE and chain:
                chain = (*chain, argument)
                chains.add(chain)
            else:
                chain = ()
            recent = [recent[1], argument]
    return Reads(tuple(sorted(names)), tuple(sorted(attributes)), tuple(sorted(chains)), tuple(imports))


def all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those inside it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from all_codes(value)


@dataclass(slots=True)
class Writes:
    """What a piece of code changes: by assignment (exact), and in place (by the form of the statement)."""

    assigned_attributes: set[str] = field(default_factory=set)
    assigned_names: set[str] = field(default_factory=set)
    changed_attributes: set[str] = field(default_factory=set)
    changed_names: set[str] = field(default_factory=set)
    _updated: set[_Origin] = field(default_factory=set)  # assigned from what they were before
    _reads: Counter[_Origin] = field(default_factory=Counter)  # but for those that the assignment itself makes

    def carries(self, kind: str, name: str) -> bool:
        """Tell whether code makes a new value of an "attribute" or "name" from the old one, and uses it elsewhere.

        A counter that is only counted shapes no result; one that is also read may.
        """
        return (kind, name) in self._updated and self._reads[kind, name] > 0

    def note_read(self, origin: _Origin) -> None:
        """Note that what lies at ``origin`` is loaded."""
        self._reads[origin] += 1

    def note_assignment(self, target: _Origin, value: _Origin) -> None:
        """Note that ``target`` is assigned what came from ``value``."""
        if value == (_MADE_FROM + target[0], target[1]):
            self._updated.add(target)
            self._reads[target] -= 1

    def note_change(self, origin: _Origin) -> None:
        """Note that the object that came from ``origin`` is changed in place."""
        kind, name = origin
        if kind == "attribute":
            self.changed_attributes.add(name)
        elif kind == "name":
            self.changed_names.add(name)

    def note(self, function: types.FunctionType) -> None:
        """Note what a function changes, by assignment or in place."""
        code = function.__code__
        origins: dict[str, _Origin] = {key.removesuffix(DEFAULT): ("name", key) for key, _ in defaults_of(function)}
        if code.co_argcount and "." in function.__qualname__:
            origins[code.co_varnames[0]] = ("self", "")
        for inner in all_codes(code):
            # A variable of an inner function is another one unless it is shared.
            shared = {n: o for n, o in origins.items() if inner is code or n in inner.co_freevars or o[0] == "self"}
            _note_writes_in(inner, shared, self)


#: "self", "attribute" of self, "name" of a global or cell, the latter two with "made from " before them for what an
#: operator made of one, or "" for anything else.
_Origin = tuple[str, str]
_UNKNOWN: _Origin = ("", "")
_MADE_FROM = "made from "


def _made_from(*operands: _Origin) -> _Origin:
    """Return the origin of what an operator makes of its operands."""
    for kind, name in operands:
        if kind in ("attribute", "name"):
            return _MADE_FROM + kind, name
        if kind.startswith(_MADE_FROM):
            return kind, name
    return _UNKNOWN


def _note_writes_in(code: types.CodeType, origins: Mapping[str, _Origin], writes: Writes) -> None:
    """Note what one code object changes, following where the objects on the stack came from.

    An object whose origin is not known is not noted: in doubt a value counts, which costs a miss.

    Args:
        code: The code object.
        origins: Where the objects come from that certain parameters hold at the start.
        writes: Where to note it.
    """
    stack: list[_Origin] = []

    def pop(count: int) -> _Origin:
        last = _UNKNOWN
        for _ in range(count):
            last = stack.pop() if stack else _UNKNOWN
        return last

    def peek(depth: int) -> _Origin:
        return stack[-depth] if len(stack) >= depth else _UNKNOWN

    for instruction in dis.get_instructions(code):
        opname, argument, arg = instruction.opname, instruction.argval, instruction.arg
        effect = dis.stack_effect(instruction.opcode, arg, jump=False)
        if opname in ("STORE_ATTR", "DELETE_ATTR"):
            if peek(1)[0] == "self":
                writes.assigned_attributes.add(argument)
                writes.note_assignment(("attribute", argument), peek(2))
            else:
                writes.note_change(peek(1))
        elif opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
            opname in ("STORE_DEREF", "DELETE_DEREF") and argument in code.co_freevars
        ):
            writes.assigned_names.add(argument)
            writes.note_assignment(("name", argument), peek(1))
        elif opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            writes.note_change(peek(2))
        elif opname == "STORE_SLICE":
            writes.note_change(peek(3))

        if opname == "COPY":
            stack.append(peek(arg or 1))
        elif opname == "SWAP" and arg and len(stack) >= arg:
            stack[-1], stack[-arg] = stack[-arg], stack[-1]
        elif opname == "DUP_TOP":
            stack.append(peek(1))
        elif opname == "DUP_TOP_TWO":
            stack += [peek(2), peek(1)]
        elif opname == "ROT_TWO" and len(stack) >= 2:
            stack[-2:] = [stack[-1], stack[-2]]
        elif opname == "ROT_THREE" and len(stack) >= 3:
            stack[-3:] = [stack[-1], stack[-3], stack[-2]]
        elif opname in _LOADS_ATTRIBUTE:
            owner = pop(1)
            if argument in _MUTATORS:
                writes.note_change(owner)
            origin = ("attribute", argument) if owner[0] == "self" else _UNKNOWN
            writes.note_read(origin)
            stack += [origin] * (1 + effect)
        elif opname in _LOADS_GLOBAL or opname in _LOADS_CELL:
            stack += [_UNKNOWN] * (effect - 1)
            known = origins.get(argument) if opname in _LOADS_CELL else None
            writes.note_read(("name", argument))
            stack.append(known or ("name", argument))
        elif opname.startswith(("BINARY_", "INPLACE_")) and effect == -1 and "SUBSCR" not in opname:
            right, left = pop(1), pop(1)
            stack.append(_made_from(left, right))
        elif opname.startswith("LOAD_FAST"):  # from 3.13 on, one instruction may load two variables
            loaded = argument if isinstance(argument, tuple) else (argument,)
            stack += [origins.get(name, _UNKNOWN) for name in loaded]
        elif opname == "STORE_FAST_LOAD_FAST":
            pop(1)
            stack.append(origins.get(argument[1], _UNKNOWN))
        elif opname.startswith(_PUSHES_NOTHING):
            if effect > 0:
                stack += [_UNKNOWN] * effect
            else:
                pop(-effect)
        elif effect > 0:
            stack += [_UNKNOWN] * effect
        else:
            pop(1 - effect)
            stack.append(_UNKNOWN)
        if opname.startswith(("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")):
            stack.clear()


_PUSHES_NOTHING = (
    "STORE_", "DELETE_", "POP_", "RETURN_", "RAISE_", "RERAISE", "JUMP_", "RESUME", "NOP", "PRECALL", "KW_NAMES",
    "PUSH_", "COPY_FREE_VARS", "MAKE_CELL", "EXTENDED_ARG", "SWAP", "ROT_", "CACHE", "LIST_APPEND", "SET_ADD",
    "MAP_ADD", "LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE", "DICT_MERGE", "END_", "GEN_START",
)  # fmt: skip
