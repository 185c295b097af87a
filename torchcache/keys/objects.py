"""An object whose state and code are found out once, such as a data set."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from torchcache.keys.changes import is_container
from torchcache.keys.code import walk_code
from torchcache.keys.collectives import Talks
from torchcache.keys.digest import digest_named, digest_parts
from torchcache.keys.observer import Observer
from torchcache.keys.operators import operators_at
from torchcache.keys.ours import is_hook_of_ours
from torchcache.keys.own_state import OwnState
from torchcache.keys.state import MOST_ROUNDS, StateTracker
from torchcache.keys.values import encode_value
from torchcache.keys.walked import CodeWalk
from torchcache.our_names import is_on_instances


class UnknownNamesError(Exception):
    """There is nothing to ignore at ``name``; ``there`` is where something is."""

    def __init__(self, name: str, there: Sequence[str]) -> None:
        super().__init__(name)
        self.name = name
        self.there = there


@dataclass(frozen=True, slots=True)
class ObjectState:
    """The state of an object by value: large, and the same in a copy that another process unpickled.

    Attributes:
        digest: Of all that counts.
        code: The functions and classes that it holds.
        opaque: Where it holds something that cannot be seen, and of what type.
        generators: The random number generators that it leads to, which another process has copies of.
    """

    digest: bytes
    code: tuple[object, ...] = ()
    opaque: tuple[tuple[str, str], ...] = ()
    generators: tuple[object, ...] = ()

    def can_travel(self) -> bool:
        """Tell whether all of it is found in another process too: its code is, by its name, generators are not."""
        return not self.generators and all(map(_is_found_by_name, self.code))


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found out of a target.

    Attributes:
        parts: Name and digest of each thing that makes its results what they are.
        opaque: Where it holds something that cannot be seen, and of what type.
        generators: The random number generators that it leads to, and the state that its code changes.
        classes: The user's own classes that the code refers to.
        talks: What the code has to do with other ranks.
        entropy: What the code may draw random numbers from that no seed decides.
        unseen: Operators that the code may call and of which it is not known what runs.
    """

    parts: tuple[tuple[str, bytes], ...]
    opaque: tuple[tuple[str, str], ...] = ()
    generators: tuple[object, ...] = ()
    classes: tuple[type, ...] = ()
    talks: Talks | None = None
    entropy: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


def look_at_state(
    held: Mapping[str, object], target: type | Callable[..., object], ignored: Sequence[str] = ()
) -> ObjectState:
    """Look at all that makes the state of an object.

    Args:
        held: The object, and what else is used with it, by what to call them.
        target: The class or function whose code runs: what it writes and does not read shapes nothing.
        ignored: What does not count: attributes by their path, from the object on.

    Raises:
        UnknownNamesError: If there is nothing at one of these paths.
    """
    seen = _Seen(held, walk_code(target), ignored)
    # The state holds code, whose walk says which attributes count, and so what is to be encoded.
    for _ in range(MOST_ROUNDS - 1):
        walk = walk_code(target, seen.code)
        if seen.would_agree(walk):
            break
        seen = _Seen(held, walk, ignored)
    seen.check_ignored()
    return ObjectState(seen.digest, seen.code, tuple(seen.opaque), seen.generators)


def find_out(
    state: ObjectState,
    target: type | Callable[..., object],
    computes: Callable[..., object] | None = None,
    held: Iterable[object] = (),
) -> Findings:
    """Add to the state of an object the code that runs, and the globals that the code refers to.

    Args:
        state: What ``look_at_state`` returned, perhaps in another process.
        target: The class or function whose code runs.
        computes: What of it computes a result, if not all of it does: random numbers that other code draws do not
            matter.
        held: The objects whose state it is: what code changes of it while it computes is compared.
    """
    tracker = StateTracker(None)
    walk, roots = tracker.walk(target, state.code)
    tracker.follow(walk, roots, b"", walk.talks)
    tracker.fingerprint()
    values = [(name, digest) for name, digest in tracker.describe() if name != "mode"]
    opaque = [*state.opaque, *tracker.opaque, *((name, "Tensor") for name, digest in values if digest == _OPAQUE)]
    code = [(f"code {name}", digest) for name, digest in walk.parts]
    changed = walk.writes.assigned_attributes | walk.writes.changed_attributes
    own = OwnState(
        held, lambda cls, name: name in changed and not walk.writes.leave_out_attribute(cls, name, is_container=True)
    )
    return Findings(
        parts=(*code, ("code", walk.fingerprint), ("state", state.digest), *values),
        opaque=tuple(opaque),
        generators=(*state.generators, *tracker.generators, own),
        classes=walk.classes,
        talks=walk.talks,
        entropy=(walk if computes is None else walk_code(computes)).draws.sources,
        unseen=tuple(walk.unseen),
    )


#: What a tracker says of a tensor without plain bytes.
_OPAQUE = digest_parts([b"opaque"])


class _Seen(Observer):
    """What one encoding of an object came upon, and which attributes it left out: all counts by value, however large.

    Args:
        held: The object, and what else is used with it, by what to call them.
        walk: What the code walk found.
        ignored: What does not count: attributes by their path, from the object on.

    Attributes:
        digest: Of all that counts.
        code: The functions, classes and modules that it holds.
        opaque: Where it holds something that cannot be seen, and of what type.
        generators: The random number generators that it leads to.
    """

    asks_for_state = True
    looks_again = False

    def __init__(self, held: Mapping[str, object], walk: CodeWalk, ignored: Sequence[str]) -> None:
        self.counts_generators = walk.reads_generators
        self.opaque: list[tuple[str, str]] = []
        self._writes = walk.writes
        self._asked: dict[tuple[type, str, bool], bool] = {}
        self._ignored = frozenset(ignored)
        self._come_upon: set[str] = set()
        self._paths: set[str] = set()
        self._code: dict[int, object] = {}
        self._generators: dict[int, object] = {}
        self.digest = digest_named([(name, encode_value(value, name, self)) for name, value in held.items()])
        self.code = tuple(self._code.values())
        self.generators = tuple(self._generators.values())

    def refer(self, value: torch.nn.Module | torch.Tensor, path: str) -> bytes | None:  # noqa: ARG002 - as of Observer
        return None

    def note_code(self, code: object) -> None:
        if isinstance(code, (type, types.ModuleType)) or inspect.isfunction(code) or operators_at(code) is not None:
            self._code.setdefault(id(code), code)

    def note_opaque(self, path: str, value: object) -> None:
        self.opaque.append((path, type(value).__qualname__))

    def note_generator(self, generator: object) -> None:
        self._generators.setdefault(id(generator), generator)

    def leaves_out(self, owner: object, name: str, value: object, path: str) -> bool:
        """Tell whether an attribute is ours, is to be ignored, or is written and not read."""
        cls = type(owner)
        if self._ignored and self._is_ignored(path):
            return True
        if is_on_instances(name) or is_hook_of_ours(name, value):
            return True
        asked = cls, name, is_container(value)
        if asked not in self._asked:
            self._asked[asked] = self._writes.leave_out_attribute(cls, name, is_container=asked[2])
        return self._asked[asked]

    def _is_ignored(self, path: str) -> bool:
        inner = path.partition(".")[2]  # without what the object itself is called
        self._paths.add(inner)
        if inner not in self._ignored:
            return False
        self._come_upon.add(inner)
        return True

    def check_ignored(self) -> None:
        """Raise UnknownNamesError if a name to be ignored was not come upon."""
        unknown = sorted(self._ignored - self._come_upon)
        if unknown:
            raise UnknownNamesError(unknown[0], sorted(self._paths))

    def would_agree(self, walk: CodeWalk) -> bool:
        """Tell whether the same attributes and generators count by another walk."""
        if walk.reads_generators != self.counts_generators:
            return False
        return all(
            walk.writes.leave_out_attribute(cls, key, is_container=may_change) == is_left_out
            for (cls, key, may_change), is_left_out in self._asked.items()
        )


def _is_found_by_name(code: object) -> bool:
    """Tell whether a pickle of a function or class is its name."""
    found: object = sys.modules.get(getattr(code, "__module__", None) or "")
    for name in getattr(code, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is code
