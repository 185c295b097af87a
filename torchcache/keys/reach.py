"""The functions that run from some code on, followed by name. This module does not import torch."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torchcache.keys.calls import uses_of
from torchcache.keys.places import ClosureOf, defaults_of
from torchcache.keys.reads import all_codes, reads_of

#: Methods that run when an object is made, and those that run when it is copied, stored, shown or thrown away.
_MAKING = ("__new__", "__init__", "__post_init__")
ASIDE = frozenset({
    *_MAKING, "__copy__", "__deepcopy__", "__del__", "__dir__", "__getnewargs__", "__getnewargs_ex__", "__getstate__",
    "__init_subclass__", "__reduce__", "__reduce_ex__", "__repr__", "__set_name__", "__setstate__", "__sizeof__",
    "__str__",
})  # fmt: skip
_ITERATING = frozenset({"__iter__", "__next__"})

#: With these, code looks up what a text names.
_LOOKS_UP = frozenset({"attrgetter", "getattr", "methodcaller"})


class Reach:
    """The functions that run from some code on, as far as names and values in code lead.

    A name that is read as an attribute leads to all functions of that name. Of a class that the code names, or of which
    the walk saw an object, all runs that Python calls by itself; what makes an object runs if the class is called.

    Args:
        functions: All functions by name, with the class that each is a method of.
        classes: All classes by name.
        live: The classes of which there are objects.
        opened: Yields the functions that lie in a value, and the classes of what else does.
        is_map: Whether samples are asked for by index, so that iterating over what has an index is not what runs.
    """

    def __init__(
        self,
        functions: Mapping[str, Sequence[tuple[type | None, types.FunctionType]]],
        classes: Mapping[str, Sequence[type]],
        live: Iterable[type],
        opened: Callable[[object], Iterable[types.FunctionType | type]],
        *,
        is_map: bool,
    ) -> None:
        self._functions = functions
        self._classes = classes
        self._own = {cls for found in classes.values() for cls in found}
        self._owners = {
            id(function): owner for found in functions.values() for owner, function in found if owner is not None
        }
        self._opened = opened
        self._is_map = is_map
        self._names: set[str] = set()  # that were followed
        self._live: set[type] = set()
        self._made: set[type] = set()
        self._known: set[int] = set()
        self._waiting: list[types.FunctionType] = []
        for cls in live:
            self._use(cls)

    def follow(self, value: object) -> None:
        """Follow a value that the code uses."""
        for found in self._opened(value):
            if isinstance(found, type):
                self._use(found)
            else:
                self._run(found)

    def run(self) -> Iterator[types.FunctionType]:
        """Yield each function once."""
        while self._waiting:
            function = self._waiting.pop()
            yield function
            self._follow_names(function)
            self._follow_values(function)
            self._follow_calls(function)

    def _run(self, function: types.FunctionType) -> None:
        if id(function) not in self._known:
            self._known.add(id(function))
            self._waiting.append(function)

    def _follow_names(self, function: types.FunctionType) -> None:
        reads = reads_of(function.__code__)
        names = {*reads.names, *reads.attributes, *(name for *_, wanted in reads.imports for name in wanted)}
        if not _LOOKS_UP.isdisjoint(names):
            names |= {text for code in all_codes(function.__code__) for text in code.co_consts if type(text) is str}
        for name in names - self._names:
            for _, found in self._functions.get(name, ()):
                self._run(found)
            for cls in self._classes.get(name, ()):
                self._use(cls)
        self._names |= names

    def _follow_values(self, function: types.FunctionType) -> None:
        """Follow globals, closure variables, defaults, and what a decorator put a function around."""
        closure = ClosureOf(weakref.ref(function))
        for key in reads_of(function.__code__).names:
            self.follow(function.__globals__.get(key))
        for key in function.__code__.co_freevars:
            if key != "__class__":
                self.follow(closure.get(key, None))
        for _, value in defaults_of(function):
            self.follow(value)

    def _follow_calls(self, function: types.FunctionType) -> None:
        """Follow what makes an object of each class that is called."""
        owner = self._owners.get(id(function))
        names_of_owner = _names_of_own_class(function, owner)
        for names in _names_called(function):
            for name in names:
                for cls in self._classes.get(name, ()):
                    self._make(cls)
            if owner is not None and not names_of_owner.isdisjoint(names):
                for cls in self._own:
                    if owner in cls.__mro__:
                        self._make(cls)

    def _use(self, cls: type) -> None:
        """Follow what Python calls by itself of an object of a class."""
        for base in cls.__mro__:
            if base not in self._own or base in self._live:
                continue
            self._live.add(base)
            self._use(type(base))
            skipped = ASIDE
            if self._is_map and defines(cls, "__getitem__"):
                skipped = ASIDE | _ITERATING
            for name in tuple(vars(base)):
                if name == "forward" or (name.startswith("__") and name not in skipped):
                    self._run_method(base, name)

    def _make(self, cls: type) -> None:
        """Follow what makes an object of a class."""
        if cls not in self._made:
            self._made.add(cls)
            self._use(cls)
            for base in cls.__mro__:
                for name in _MAKING:
                    self._run_method(base, name)

    def _run_method(self, cls: type, name: str) -> None:
        for owner, function in self._functions.get(name, ()):
            if owner is cls:
                self._run(function)


def _names_called(function: types.FunctionType) -> Iterator[set[str]]:
    """Yield what each call in a function may call, by the last name of it."""
    uses = uses_of(function.__code__)
    for call in uses.calls:
        for operand in call.callee:
            assigned = uses.assigned.get(operand.root, ()) if operand.kind == "variable" else ()
            yield {(found.root, *found.keys)[-1] for found in (operand, *assigned)}


def _names_of_own_class(function: types.FunctionType, owner: type | None) -> set[str]:
    """Return what a method calls the class of its object: ``__class__``, and ``cls`` in a method of the class."""
    names = {"__class__"}
    if owner is not None and isinstance(vars(owner).get(function.__name__), classmethod):
        names.update(function.__code__.co_varnames[:1])
    return names


def defines(cls: type, name: str) -> bool:
    """Tell whether a class or a base of it has an attribute, without asking its metaclass."""
    return any(name in vars(base) for base in cls.__mro__)
