"""What the code that runs does: what it writes, whom it talks to, what it draws random numbers from.

This module does not import torch.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torchcache.keys.collectives import Talks, held_by
from torchcache.keys.home import Home
from torchcache.keys.randomness import Draws, leads_to_entropy
from torchcache.keys.reach import Reach, defines
from torchcache.keys.reads import reads_of
from torchcache.keys.time_limit import TimeLimit
from torchcache.keys.walked import CodeWalk

#: Methods that make an object and do not run when it is used.
_BUILDERS = frozenset(
    {"__init__", "__new__", "__post_init__", "__setstate__", "__getstate__", "__reduce__", "__repr__"}
)

#: Names with which code can make results of the state of a random number generator without drawing from it. Arrays and
#: containers have a method ``copy`` too; the module and the function of that name are globals.
_SETTERS_OF_GENERATORS = frozenset({"fork_rng", "set_rng_state", "set_rng_state_all", "set_state", "setstate"})
_READERS_OF_GENERATORS = frozenset({
    "getstate", "get_state", "clone_state", "graphsafe_get_state", "bit_generator", "_bit_generator", "seed_seq",
    "_seed_seq", "initial_seed", "jumped", "deepcopy", "dumps", "__getstate__", "__reduce__", "__reduce_ex__",
})  # fmt: skip
_COPY = "copy"

#: What code can read of a weight that its bytes do not say.
_OF_WEIGHTS = frozenset({"requires_grad", "grad"})


@dataclass(slots=True)
class Visited:
    """The code that a walk visited, by the names that lead to it.

    Attributes:
        functions: Functions by the names they were reached by.
        classes: Classes of the user's own, in the order of the walk.
        class_names: Classes by the names they were reached by.
        object_classes: The classes of the objects that were visited.
        entropy: Attributes that lead to entropy.
    """

    functions: dict[str, list[types.FunctionType]] = field(default_factory=dict)
    classes: list[type] = field(default_factory=list)
    class_names: dict[str, list[type]] = field(default_factory=dict)
    object_classes: list[type] = field(default_factory=list)
    entropy: dict[str, object] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Return the names that functions were reached by so far."""
        return set(self.functions)

    def named_functions(self) -> Iterator[tuple[str, types.FunctionType]]:
        """Yield the functions by the names they were reached by."""
        for name, functions in self.functions.items():
            for function in functions:
                yield name, function

    def names_read(self) -> set[str]:
        """Return the names that the functions read: globals, and attributes of anything."""
        names = set[str]()
        for _, function in self.named_functions():
            reads = reads_of(function.__code__)
            names.update(reads.names, reads.attributes)
        return names

    def add_function(self, name: str, function: types.FunctionType) -> None:
        self.functions.setdefault(name, []).append(function)

    def add_class_name(self, name: str, cls: type) -> None:
        self.class_names.setdefault(name, []).append(cls)

    def note_attribute(self, key: str, value: object) -> None:
        """Note an attribute if it leads to entropy."""
        if leads_to_entropy(value):
            self.entropy[key] = value


class Running:
    """The functions that may run, by name, and what those of them do that run.

    Args:
        visited: The code that the walk visited; all of it, but for modules that count whole.
        home: Whose code it entered.
        limit: How long it may take.
    """

    def __init__(self, visited: Visited, home: Home, limit: TimeLimit) -> None:
        self._visited = visited
        self._home = home
        self._limit = limit
        self._by_name: dict[str, list[tuple[type | None, types.FunctionType]]] = {}
        methods = self._add_methods()
        self._add_functions(methods)

    def _add_methods(self) -> set[int]:
        """Add the methods of all classes with their classes; return the ids of the functions."""
        methods = set[int]()
        for cls in self._visited.classes:
            for name, attribute in vars(cls).items():
                for function in self._home.functions_in(attribute):
                    self._by_name.setdefault(name, []).append((cls, function))
                    methods.add(id(function))
        return methods

    def _add_functions(self, methods: set[int]) -> None:
        """Add all functions that are no methods, by the name in the code and by that of the function."""
        for label, functions in self._visited.functions.items():
            for function in functions:
                if id(function) in methods:
                    continue
                for found in self._home.functions_in(function):
                    for name in {label, function.__name__}:
                        self._by_name.setdefault(name, []).append((None, found))

    def note_what_runs(self, entries: set[str], target: object, found: CodeWalk) -> None:
        """Note what the code that runs from ``entries`` on, followed by name through all classes, writes and reads.

        And whether it talks to other ranks, or asks for its own. What only builds an object is left aside, and
        methods that Python calls by itself are not.

        Args:
            entries: Names of the functions that are called from outside.
            target: What the walk started at. If it is a method, the names that classes give it are entries too.
            found: Where to note it.
        """
        found.talks = Talks(held_by(self._visited.classes))
        special = {name for name in self._by_name if name.startswith("__") and name not in _BUILDERS}
        entries = entries | self._names_of_method(target) | special
        waiting = sorted(entries - _BUILDERS)
        known = entries | _BUILDERS
        noted = set[tuple[type | None, int]]()
        while waiting:
            for owner, function in self._by_name.get(waiting.pop(), ()):
                if (owner, id(function)) in noted:
                    continue
                noted.add((owner, id(function)))
                self._limit.check()
                reached = _note_function(function, owner, found)
                waiting.extend(reached - known)
                known |= reached

    def _names_of_method(self, target: object) -> set[str]:
        """Return the names that classes give to the function in ``target``, if it is no class itself."""
        names = set[str]()
        if isinstance(target, type):
            return names
        targets = {id(function) for function in self._home.functions_in(target)}
        for name, functions in self._by_name.items():
            if any(owner is not None and id(function) in targets for owner, function in functions):
                names.add(name)
        return names

    def note_draws(self, roots: Iterable[object], found: CodeWalk) -> None:
        """Note what the code that runs may draw random numbers from.

        A false alarm turns a cache off, so this looks closer at what runs than ``note_what_runs``: of a class that is
        used, other methods may draw.

        Args:
            roots: The target, and the code in its state.
            found: Where to note it.
        """
        roots = list(roots)
        target = roots[0]
        classes = [root for root in roots if isinstance(root, type)]
        reach = Reach(
            self._by_name_and_table(),
            self._visited.class_names,
            [*self._visited.object_classes, *classes],
            self._home.code_in,
            is_map=isinstance(target, type) and defines(target, "__getitem__") and not defines(target, "forward"),
        )
        for root in roots:
            if not isinstance(root, type):
                reach.follow(root)

        found.draws = Draws(dict(self._visited.entropy), self._names_of_methods())
        for function in reach.run():
            self._limit.check()
            found.draws.note(function)

    def _names_of_methods(self) -> set[str]:
        names = set[str]()
        for name, functions in self._by_name.items():
            if any(owner is not None for owner, _ in functions):
                names.add(name)
        return names

    def _by_name_and_table(self) -> dict[str, Sequence[tuple[type | None, types.FunctionType]]]:
        """Return the functions by name; those in a table also by its name, which is what code says."""
        by_name: dict[str, Sequence[tuple[type | None, types.FunctionType]]] = dict(self._by_name)
        for label, functions in self._visited.functions.items():
            table, bracket, _ = label.partition("[")
            if bracket:
                unowned = [(None, function) for function in functions]
                by_name[table] = [*by_name.get(table, ()), *unowned]
        return by_name


def _note_function(function: types.FunctionType, owner: type | None, found: CodeWalk) -> set[str]:
    """Note what one function that runs does; return the names of what it reaches."""
    found.writes.note(function, owner)
    found.talks.note(function)
    found.names_read.note(function)
    reads = reads_of(function.__code__)
    reached = {*reads.attributes, *reads.names}
    if _COPY in reads.names or not _READERS_OF_GENERATORS.isdisjoint(reached):
        found.reads_generators = True
    if not _SETTERS_OF_GENERATORS.isdisjoint(reached):
        found.sets_generators = True
    found.reads_of_weights |= _OF_WEIGHTS & reached
    return reached
