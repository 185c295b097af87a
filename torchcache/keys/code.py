"""The code that can run, as a fingerprint. This module does not import torch.

What is hashed are code objects (see ``canonical.py``), not source text: the text may have been edited since
it was compiled, cannot tell closures apart, and is missing in a REPL.

The walk starts at a class or a function and follows what its code refers to by name: globals, closure
cells, defaults, attributes of imported modules, imports inside functions. It goes on through code of the
user's own, also where a wrapper of somebody else's hides it, and stops at the standard library, torch, and
other installed distributions, which count by version and files. Where code makes a name when it runs, all that it may
mean counts (``modules.py``, ``operators.py``).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torchcache.keys.asked import parts_asked_for
from torchcache.keys.home import Home
from torchcache.keys.origins import classes_stand_still
from torchcache.keys.ours import unwrap
from torchcache.keys.places import ItemsOf, Name, SubclassesOf
from torchcache.keys.running import Running
from torchcache.keys.walk import Walk
from torchcache.keys.walked import CodeWalk


def walk_code(
    target: type | Callable[..., object], parts: Iterable[object] = (), *, entry: str = "forward"
) -> CodeWalk:
    """Walk the code that runs when ``target`` is called.

    Own modules that a function imports when it runs are imported.

    Args:
        target: A function, or a class.
        parts: Classes of the submodules of the module that is called, or that the function uses, and functions
            and other callables that its state holds. The walk keeps none of those callables alive.
        entry: The method of a class that runs; only code reachable from it counts as a writer of
            attributes (a setter that ``forward`` does not call does not hide an attribute).

    Raises:
        TakesTooLongError: If that takes too long.
    """
    target = unwrap(target)  # type: ignore[assignment] # of a function of ours, the user's
    roots = list(parts)
    key = entry, id(target), *map(id, roots)
    known = _walks.get(key)
    walk = None if known is None else known.walk_of([target, *roots])
    if walk is None or walk.has_changed():
        with classes_stand_still():
            walk = _walk(target, roots, entry)
        known = _Known.of(walk, [target, *roots])
        if known is not None:
            _walks[key] = known
            if len(_walks) > _MOST_KNOWN:
                _walks.popitem(last=False)
    return walk


@dataclass(frozen=True, slots=True)
class _Known:
    """A walk for as long as somebody follows it, and what it started from."""

    walk: weakref.ref[CodeWalk]
    roots: list[weakref.ref[Any]]

    @classmethod
    def of(cls, walk: CodeWalk, roots: list[Any]) -> _Known | None:
        """Note a walk; None if one of its roots cannot be held weakly."""
        try:
            return cls(weakref.ref(walk), list(map(weakref.ref, roots)))
        except TypeError:
            return None

    def walk_of(self, roots: list[object]) -> CodeWalk | None:
        """Return the walk if it started from these very objects."""
        is_same = all(known() is root for known, root in zip(self.roots, roots, strict=True))
        return self.walk() if is_same else None


#: By the ids of what they started from. An instance of a class that was walked for another one takes that walk.
_walks: OrderedDict[tuple[object, ...], _Known] = OrderedDict()
_MOST_KNOWN = 256


def _walk(target: type | Callable[..., object], parts: list[object], entry: str) -> CodeWalk:
    home = Home(target)
    walk = Walk(home)
    visited, found, limit = walk.visited, walk.trail.found, walk.trail.limit

    walk.visit(target, "target")
    entries = {entry}
    roots: dict[int, object] = {}
    if isinstance(target, type):
        roots[id(target)] = target
    else:
        entries |= visited.names()
    roots.update((id(part), part) for part in parts if part is not target)
    for part in roots.values():
        if isinstance(part, type):
            walk.visit_class(part)
        else:
            entries |= walk.visit_held(part)

    roots.update(_visit_subclasses(walk))
    # Code of libraries calls it, by names that the user's code need not say.
    for number, (name, part) in _visit_put_in(walk).items():
        entries.add(name)
        roots[number] = part

    running = Running(visited, home, limit)
    running.note_what_runs(entries, target, found)
    running.note_draws({id(target): target, **roots}.values(), found)
    # The state holds them, and the code that runs may use them.
    for part in roots.values():
        found.talks.note_value(part)
        found.draws.note_held(part)

    # Last, because what runs of modules that count whole is not known: it says nothing of what the code does.
    walk.visit_whole_modules()
    _visit_put_in(walk)
    for label, names in walk.namespaces.registered():
        walk.trail.say(f"registered with {label}", *names)
    if displaced := list(walk.namespaces.displaced()):
        walk.trail.say("libraries' code by another name", *displaced)
    walk.trail.found.watch_namespaces(walk.namespaces.watch())
    for label, words in parts_asked_for(visited.named_functions(), visited.classes):
        walk.trail.say(label, *words)
    return walk.result()


def _visit_subclasses(walk: Walk) -> dict[int, type]:
    """Visit the classes that code finds by ``__subclasses__()`` of the user's own classes; return them by their ids."""
    found: dict[int, type] = {}
    known: set[int] = set()
    # What they do may lead to more classes, and to the first code that asks.
    while "__subclasses__" in walk.visited.names_read():
        waiting = [cls for cls in walk.visited.classes if id(cls) not in known]
        if not waiting:
            break
        for cls in waiting:
            known.add(id(cls))
            place = SubclassesOf(cls)
            subclasses = place.get("", None)
            walk.trail.watch.add(Name(f"subclasses of {cls.__name__}", place, ""), subclasses)
            walk.trail.say(f"subclasses of {cls.__name__}", *(subclass.__qualname__ for subclass in subclasses))
            for subclass in subclasses:
                walk.visit_class(subclass)
                found[id(subclass)] = subclass
    return found


def _visit_put_in(walk: Walk) -> dict[int, tuple[str, object]]:
    """Visit what of the user's own stands in namespaces of libraries; return it by its id, with its name there."""
    found: dict[int, tuple[str, object]] = {}
    # Each round can reach more code, which reads more names.
    while put_in := walk.namespaces.found(walk.visited.names_read()):
        for one in put_in:
            label = f"{one.label}.{one.key}"
            walk.trail.say(f"put in {label}")
            if not walk.visit(one.value, one.key):
                walk.trail.add_name(Name(label, ItemsOf({one.key: one.value}), one.key))
            found[id(one.value)] = one.key, one.value
    return found
