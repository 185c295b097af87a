"""What a walk over code found, and what it notes on its way.

This module does not import torch.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torchcache.keys.changes import Watch, is_container
from torchcache.keys.collectives import Talks
from torchcache.keys.digest import digest_named, digest_parts
from torchcache.keys.home import Home
from torchcache.keys.names_read import NamesRead
from torchcache.keys.origins import UNCOUNTED, version_of
from torchcache.keys.places import Name
from torchcache.keys.put_in import NamespaceWatch
from torchcache.keys.randomness import Draws
from torchcache.keys.time_limit import TimeLimit
from torchcache.keys.writes import Writes
from torchcache.process import ForkLock


@dataclass  # without slots, which could hold no weak reference up to Python 3.10
class CodeWalk:
    """What a walk found. Those who follow the same code share one, from any thread; nobody changes it.

    Attributes:
        fingerprint: Digest of all code reached.
        names: Globals, closure cells, defaults and class attributes with values that are more than code.
        writes: What the code that runs changes itself: that is no part of the key.
        parts: What was walked, in this order, such as "function helper", with a digest of its own code. A second
            one of a label is "function helper (2)".
        classes: The classes of the user's own that were visited.
        talks: What the code that runs has to do with other ranks.
        reads_generators: Whether the code that runs may read the state of a random number generator.
        sets_generators: Whether it may put one back as it was.
        reads_of_weights: Which of "requires_grad" and "grad" it may read.
        draws: What it may draw random numbers from that no seed decides.
        names_read: Which attributes it may read, of any object.
        unseen: Operators that it may call and of which it is not known what runs.
    """

    fingerprint: bytes = b""
    names: list[Name] = field(default_factory=list)
    writes: Writes = field(default_factory=Writes)
    parts: list[tuple[str, bytes]] = field(default_factory=list)
    classes: tuple[type, ...] = ()
    talks: Talks = field(default_factory=Talks)
    reads_generators: bool = False
    sets_generators: bool = False
    reads_of_weights: set[str] = field(default_factory=set)
    draws: Draws = field(default_factory=Draws)
    names_read: NamesRead = field(default_factory=NamesRead)
    unseen: list[str] = field(default_factory=list)
    _watch: Watch = field(default_factory=Watch, repr=False, compare=False)
    _lock: ForkLock = field(default_factory=ForkLock, repr=False, compare=False)  # guards what was seen
    _namespaces: NamespaceWatch = field(default_factory=NamespaceWatch, repr=False, compare=False)

    def watch_namespaces(self, watch: NamespaceWatch) -> None:
        """Note what notices changes in namespaces of libraries."""
        self._namespaces = watch

    def has_changed(self) -> bool:
        """Tell whether walking again could give another result.

        That is so if code came, went or was replaced at a name that the walk looked at; data that took the
        place of other data is not asked about. In doubt it says yes, and then to everybody who asks, as long as the
        code is not what it was. Costs some ten microseconds.
        """
        with self._lock.raw:
            return self._watch.has_changed() or self._namespaces.has_changed()


class Trail:
    """What one walk notes on its way, in an order that only the code decides.

    Args:
        home: Whose code the walk enters.

    Attributes:
        found: What the walk found so far.
        watch: The places it looked at.
        limit: How long it may take.
    """

    def __init__(self, home: Home) -> None:
        self.found: CodeWalk = CodeWalk()
        self.watch: Watch = self.found._watch  # noqa: SLF001 - a walk is made here
        self.limit: TimeLimit = TimeLimit("the code")
        self._home = home
        self._numbers: dict[int, int] = {}  # of what was seen, by id
        self._kept: list[object] = []  # ids stay unique while the objects live
        self._known_names: set[tuple[int, str]] = set()
        self._function_names: list[Name] = []

        self.say(f"python {sys.version_info[0]}.{sys.version_info[1]}")
        if home.origin is not None and home.is_library:
            self.say(f"home {home.origin}", version_of(home.origin))

    def say(self, label: str, *words: str | bytes) -> None:
        """Note a part: its label, and the words that tell it from another one under this label."""
        parts = (word.encode() if isinstance(word, str) else word for word in words)
        self.found.parts.append((label, digest_parts(parts)))

    def stop_at(self, origin: str | None, label: str, name: str) -> None:
        """Note something that the walk does not enter; that of a distribution counts by its version."""
        if self._home.is_own(origin):
            self.say(f"module {label}")
        elif origin is None or origin in UNCOUNTED:
            self.say(f"foreign {label}", name)
        else:
            self.say(f"foreign {label}", name, origin, version_of(origin))

    def again(self, kind: str, value: object, label: str) -> bool:
        """Tell whether something was seen before, and note which it was; note it as seen if not.

        Raises:
            TakesTooLongError: If the walk takes too long.
        """
        self.limit.check()
        number = self._numbers.get(id(value))
        if number is None:
            self._numbers[id(value)] = len(self._numbers)
            self._kept.append(value)
            return False
        self.say(f"{kind} {label} again", str(number))
        return True

    def has_seen(self, value: object) -> bool:
        return id(value) in self._numbers

    def add_name(self, name: Name) -> None:
        """Add a name whose value counts, once."""
        known = id(name.place), name.key
        if known not in self._known_names:
            self._known_names.add(known)
            self.found.names.append(name)

    def add_function_name(self, name: Name) -> None:
        """Add an attribute of a function, whose value counts if code uses it."""
        self._function_names.append(name)

    def result(self, aside: Iterable[types.FunctionType]) -> CodeWalk:
        """Return what the walk found, complete.

        Args:
            aside: The functions of modules that count whole, of which it is not known whether they run.
        """
        found = self.found
        self._leave_out_names(aside)
        found.fingerprint = digest_named(found.parts)
        found.parts = _told_apart(found.parts)
        self.watch.seal()
        return found

    def _leave_out_names(self, aside: Iterable[types.FunctionType]) -> None:
        """Leave out the names of values that code only writes."""
        # Counters and logs of code that may not even run.
        writes_aside = Writes()
        for function in aside:
            writes_aside.note(function)
            self.found.names_read.note(function)
        names = [name for name in self.found.names if not (name.counts_always and _only_counts(writes_aside, name))]

        # Notes that a function keeps on another one and does not use.
        writes = self.found.writes
        names += [
            name
            for name in self._function_names
            if not writes.leave_out_attribute(types.FunctionType, name.key, is_container=False)
        ]
        self.found.names = names


def _only_counts(writes: Writes, name: Name) -> bool:
    return writes.only_counts(name.key, is_container=is_container(name.read()))


def _told_apart(parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Give a number to each further part of one label."""
    counts = Counter[str]()
    numbered = []
    for label, digest in parts:
        counts[label] += 1
        numbered.append((label if counts[label] == 1 else f"{label} ({counts[label]})", digest))
    return numbered
