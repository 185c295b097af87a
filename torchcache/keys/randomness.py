"""Which code draws random numbers that no seed decides. This module does not import torch.

Who draws from a generator that is there before and after leaves a trace in it. The entropy of the operating system, and
a generator that is made anew without a seed, leave none: they are found in the code.
"""

from __future__ import annotations

import functools
import importlib
import random
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torchcache.keys.calls import Call, Uses, uses_of
from torchcache.keys.changes import parts_of
from torchcache.keys.operands import NONE, Operand, Operands
from torchcache.keys.origins import STANDARD, is_of_cython, module_of, origin_of_function
from torchcache.keys.places import MISSING
from torchcache.keys.scope import Scope

#: Functions that draw whenever they run, by the module and the name that they were defined with.
_DRAWING = {
    "posix.urandom": "os.urandom",
    "posix.getrandom": "os.getrandom",
    "nt.urandom": "os.urandom",
    "uuid.uuid1": "uuid.uuid1",
    "uuid.uuid4": "uuid.uuid4",
    "torch.random.seed": "torch.seed",
    "torch.cuda.random.seed": "torch.cuda.seed",
    "torch.cuda.random.seed_all": "torch.cuda.seed_all",
    "torch.mps.seed": "torch.mps.seed",
    "torch.xpu.random.seed": "torch.xpu.seed",
    "torch.xpu.random.seed_all": "torch.xpu.seed_all",
}

#: What numpy.random makes, or seeds, from entropy where it is given no seed.
_OF_NUMPY = frozenset({
    "default_rng", "seed", "RandomState", "SeedSequence", "MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64",
})  # fmt: skip
_NUMPY = "numpy.random"

#: Parameters that take a seed, or what stands for one; others, such as ``spawn_key``, decide nothing alone.
_SEEDS = frozenset({"a", "entropy", "key", "seed", "x"})

#: Methods that decide what a generator draws from then on.
_SEEDING = frozenset({"seed", "set_state", "setstate"})

#: What a seed's function is called on an object that the walk does not know, such as a local ``torch.Generator``.
_SEED_OF_ANY = "seed()"

#: Functions that do not call what they are given.
_NOT_CALLING = (isinstance, issubclass, getattr, hasattr, super, typing.cast)

#: Modules that lead to entropy. Code may be the first to import one when it runs; NumPy imports its own so as well.
_MODULES = frozenset({"numpy.random", "os", "random", "secrets", "uuid"})


class Draws:
    """What the code that runs may draw random numbers from, without a seed that decides them.

    The code counts by what its names stand for, as in ``collectives.py``. A generator counts if it is made without
    arguments, or with a seed that is None wherever it may come from; a value that is not known counts as a seed.

    Args:
        held: Attributes of classes and objects that lead to entropy, by the names they are read by.
        methods: Names of the methods of the user's own classes.
    """

    def __init__(self, held: Mapping[str, object] | None = None, methods: Iterable[str] = ()) -> None:
        self._held = held or {}
        self._methods = frozenset(methods)
        self._certain: set[str] = set()
        self._if_none: list[tuple[str, list[_Seed]]] = []  # drawn from if all of these are None

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of what may be drawn from, with the present values of what is given as seeds."""
        if not self._certain and not self._if_none:
            return ()  # asked at every call
        unseeded = {name for name, seeds in self._if_none if all(seed.is_none() for seed in seeds)}
        return tuple(sorted(self._certain | unseeded))

    def note(self, function: types.FunctionType) -> None:
        """Note what a function's own code can draw from."""
        uses = uses_of(function.__code__)
        scope = _Scope(function, self._held)
        for operand in uses.read:
            for value in scope.values((operand,)):
                self.note_value(value)
        seeded = _seeded_later(uses)
        for number, call in enumerate(uses.calls):
            callees = scope.values(call.callee)
            self._note_given(call, callees, scope)
            if number not in seeded:
                self._note_call(number, call, callees, scope)

    def note_value(self, value: object) -> None:
        """Note that the code uses a value: it may draw whenever it runs."""
        self._certain.update(filter(None, map(_drawing, parts_of(value))))

    def note_held(self, value: object) -> None:
        """Note that the state holds a value, or objects of a class."""
        self.note_value(value)
        classes = [item for item in parts_of(value) if isinstance(item, type)]
        if any(random.SystemRandom in cls.__mro__ for cls in classes):
            self._certain.add("random.SystemRandom")

    def _note_call(self, number: int, call: Call, callees: Sequence[object], scope: _Scope) -> None:
        """Note what a call makes or seeds without a seed."""
        is_unknown = all(callee is MISSING for callee in callees) and "seed" not in self._methods
        if is_unknown and any(operand.keys[-1:] == ("seed",) for operand in call.callee):
            self._note_made(_SEED_OF_ANY, number, call, scope)
        for callee in callees:
            called, given = _without_partials(callee)
            name = _making(called)
            if name is not None and all(value is None for value in given):
                self._note_made(name, number, call, scope)

    def _note_made(self, name: str, number: int, call: Call, scope: _Scope) -> None:
        """Note a generator that a call makes, if no seed is given, or one that may be None."""
        if call.has_more:
            return
        seeds = [*call.positional[:1], *(value for key, value in call.keywords if key in _SEEDS)]
        if name in _WITHOUT_SEED or not seeds:
            self._certain.add(name)
        elif all(map(_may_be_none, seeds)):
            # What a variable holds afterwards is not what was given, as in ``rng = default_rng(rng)``.
            result = Operand("result", str(number))
            self._if_none.append((name, [_Seed(seed, result, scope) for seed in seeds]))

    def _note_given(self, call: Call, callees: Sequence[object], scope: _Scope) -> None:
        """Note what makes generators and is handed on, to be called by somebody else, perhaps without a seed."""
        given = [*call.positional, *dict(call.keywords).values()]
        is_with_seed = len(given) > 1 and any(callee is functools.partial for callee in callees)
        if is_with_seed or any(callee is known for callee in callees for known in _NOT_CALLING):
            return
        for value in given:
            self._certain.update(filter(None, map(_making, scope.values(value))))


def _without_partials(callee: object) -> tuple[object, list[object]]:
    """Return what is called in the end, and the seeds that partials around it give."""
    given: list[object] = []
    while isinstance(callee, functools.partial):
        given += callee.args[:1]
        given += [value for key, value in callee.keywords.items() if key in _SEEDS]
        callee = callee.func
    return callee, given


class _Scope(Scope):
    """What the names in a function stand for now; attributes of what is not known are those of ``Draws``.

    Args:
        function: The function; it does not live for this.
        held: As of ``Draws``.
    """

    def __init__(self, function: types.FunctionType, held: Mapping[str, object]) -> None:
        super().__init__(function)
        self._held = held

    def attribute(self, value: object, key: str) -> object:
        if isinstance(value, types.ModuleType):
            return super().attribute(value, key)
        if key == "seed" and not isinstance(value, type) and _generator(type(value)) is not None:
            return getattr(value, key, MISSING)
        found = super().attribute(value, key)
        found = self._held.get(key, MISSING) if found is MISSING else found
        return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found

    def module(self, name: str) -> object:
        """Return a module, if it is loaded or leads to entropy."""
        return importlib.import_module(name) if name in _MODULES else super().module(name)


@dataclass(frozen=True, slots=True)
class _Seed:
    """What is given as a seed, and what the same call returns."""

    operands: Operands
    result: Operand
    scope: _Scope

    def is_none(self) -> bool:
        """Tell whether it is None, wherever it comes from, or is written as None for some case."""
        if NONE[0] in self.operands:
            return True
        values = self.scope.values(self.operands, self.result)
        return bool(values) and all(value is None for value in values)


def leads_to_entropy(value: object) -> bool:
    """Tell whether a value draws from entropy, or makes generators that do."""
    return any(_drawing(item) is not None or _making(item) is not None for item in parts_of(value))


def _drawing(value: object) -> str | None:
    """Name what draws from entropy whenever it is used; None for anything else."""
    is_bound = isinstance(value, (types.MethodType, types.BuiltinFunctionType))
    owner = type(value.__self__ if is_bound else value)  # type: ignore[attr-defined]
    if random.SystemRandom in owner.__mro__:
        return "random.SystemRandom"
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return None
    module, name = value.__module__, value.__qualname__
    if isinstance(value, types.FunctionType) and module in ("secrets", "uuid"):
        is_standard = origin_of_function(value) == STANDARD  # and not a module of the user's own
        module = module if is_standard else ""
    return f"secrets.{name}" if module == "secrets" else _DRAWING.get(f"{module}.{name}")


def _making(value: object) -> str | None:
    """Name what makes or seeds a generator, from entropy if it is given no seed; None for anything else."""
    if isinstance(value, type):
        return _making_class(value)
    if isinstance(value, (types.MethodType, types.BuiltinFunctionType)) and value.__name__ == "seed":
        name = _generator(type(value.__self__))
        if name is not None:
            return f"{name}.seed"
    if isinstance(value, types.BuiltinFunctionType) or is_of_cython(value):
        module, name = str(getattr(value, "__module__", "")), str(getattr(value, "__name__", ""))
        return f"{_NUMPY}.{name}" if module.startswith(_NUMPY) and name in _OF_NUMPY else None
    return None


def _making_class(cls: type) -> str | None:
    """Name a class of generators; None for any other class."""
    if random.SystemRandom in cls.__mro__:
        return "random.SystemRandom"
    if random.Random in cls.__mro__:
        return "random.Random"
    for base in cls.__mro__:
        if module_of(base).startswith(_NUMPY) and base.__name__ in _OF_NUMPY:
            return f"{_NUMPY}.{base.__name__}"
    return None


#: Made from entropy whatever it is given.
_WITHOUT_SEED = frozenset({"random.SystemRandom"})


def _generator(cls: type) -> str | None:
    """Name a class of generators that have a method ``seed``; None for any other class."""
    for base in cls.__mro__:
        name = f"{module_of(base)}.{base.__name__}"
        if name in _GENERATORS:
            return _GENERATORS[name]
    return None


#: By the module and the name that they were defined with.
_GENERATORS = {
    "random.Random": "random.Random",
    "numpy.random.mtrand.RandomState": "numpy.random.RandomState",
    "torch._C.Generator": "torch.Generator",
}


def _may_be_none(operands: Operands) -> bool:
    """Tell whether instructions leave open that a value is None."""
    return NONE[0] in operands or all(
        operand.kind not in ("result", "unknown") and (operand.kind != "constant" or operand.root == "None")
        for operand in operands
    )


def _seeded_later(uses: Uses) -> set[int]:
    """Return the numbers of the calls that make what is given a seed, or a state, right afterwards."""
    found = set[int]()
    for call in uses.calls:
        if not (call.positional or call.keywords):
            continue
        for operand in call.callee:
            if len(operand.keys) == 1 and operand.keys[0] in _SEEDING:
                owners = uses.assigned.get(operand.root, ()) if operand.kind == "variable" else (operand,)
                found.update(int(owner.root) for owner in owners if owner.kind == "result")
    return found
