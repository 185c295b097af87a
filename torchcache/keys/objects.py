"""An object whose state and code are found out once, such as a data set."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torchcache.keys.changes import is_container
from torchcache.keys.code import Writes, walk_code
from torchcache.keys.collectives import Talks
from torchcache.keys.digest import digest_parts
from torchcache.keys.state import StateTracker
from torchcache.keys.values import encode_whole

#: State names code, whose walk says which attributes count; after so many rounds that stands still.
_MOST_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class ObjectState:
    """The state of an object by value: large, and the same in a copy that another process unpickled.

    Attributes:
        digest: Of all that counts.
        code: The functions and classes that it holds.
        unnamed: Where it holds something without a stable name, and of what type.
    """

    digest: bytes
    code: tuple[object, ...] = ()
    unnamed: tuple[tuple[str, str], ...] = ()

    def can_travel(self) -> bool:
        """Tell whether all of the code is found by its name in another process too."""
        return all(map(_is_found_by_name, self.code))


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found out of a target.

    Attributes:
        parts: Name and digest of each thing that makes its results what they are.
        unnamed: Where it holds something without a stable name, and of what type.
        classes: The user's own classes that the code refers to.
        talks: What the code has to do with other ranks.
    """

    parts: tuple[tuple[str, bytes], ...]
    unnamed: tuple[tuple[str, str], ...] = ()
    classes: tuple[type, ...] = ()
    talks: Talks | None = None


def look_at_state(held: Mapping[str, object], target: type | Callable[..., object]) -> ObjectState:
    """Look at all that makes the state of an object.

    Args:
        held: The object, and what else is used with it, by what to call them.
        target: The class or function whose code runs: what it writes and does not read shapes nothing.
    """
    writes = walk_code(target).writes
    rounds = 0
    while True:
        rounds += 1
        look = _Look(writes)
        parts: list[bytes] = []
        for name, value in held.items():
            encoded = encode_whole(value, name, look.note_code, look.note_unnamed, look.leaves_out)
            parts += [name.encode(), encoded]
        code = tuple(look.code.values())
        writes = walk_code(target, code).writes
        if look.would_agree(writes) or rounds == _MOST_ROUNDS:
            return ObjectState(digest_parts(parts), code, tuple(look.unnamed))


def find_out(state: ObjectState, target: type | Callable[..., object]) -> Findings:
    """Add to the state of an object the code that runs, and the globals that the code refers to.

    Args:
        state: What ``look_at_state`` returned, perhaps in another process.
        target: The class or function whose code runs.
    """
    tracker = StateTracker(None)
    roots = list(state.code)
    walk = walk_code(target, roots)
    for _ in range(_MOST_ROUNDS):
        found = {id(code): code for code in (*state.code, *tracker.code(walk))}
        if len(found) == len(roots):
            break
        roots = list(found.values())
        walk = walk_code(target, roots)
    tracker.follow(walk, roots, b"", walk.talks)
    tracker.fingerprint()
    values = [(name, digest) for name, digest in tracker.describe() if name != "mode"]
    unnamed = [*state.unnamed, *tracker.unnamed, *((name, "Tensor") for name, digest in values if digest == _OPAQUE)]
    code = [(f"code {name}", digest) for name, digest in walk.parts]
    return Findings(
        parts=(*code, ("code", walk.fingerprint), ("state", state.digest), *values),
        unnamed=tuple(unnamed),
        classes=walk.classes,
        talks=walk.talks,
    )


#: What a tracker says of a tensor without plain bytes.
_OPAQUE = digest_parts([b"opaque"])


class _Look:
    """What one encoding came upon, and which attributes it left out."""

    def __init__(self, writes: Writes) -> None:
        self._writes = writes
        self._asked: dict[tuple[type, str, bool], bool] = {}
        self._is_derived: dict[tuple[type, str], bool] = {}
        self.code: dict[int, object] = {}
        self.unnamed: list[tuple[str, str]] = []

    def note_code(self, code: object) -> None:
        if isinstance(code, type) or inspect.isfunction(code):
            self.code.setdefault(id(code), code)

    def note_unnamed(self, path: str, type_name: str) -> None:
        self.unnamed.append((path, type_name))

    def leaves_out(self, cls: type, key: str, value: object) -> bool:
        """Tell whether an attribute is ours, is made of others, or is written by the code that runs and not read."""
        if (cls, key) not in self._is_derived:  # asking the class costs more than the rest
            is_ours = key.startswith(("torchcache_", "_torchcache_")) or key == "cache_instance"
            static = inspect.getattr_static(cls, key, None)
            self._is_derived[cls, key] = is_ours or isinstance(static, functools.cached_property)
        if self._is_derived[cls, key] or (key == "forward" and hasattr(value, "__torchcache_original__")):
            return True
        asked = cls, key, is_container(value)
        if asked not in self._asked:
            self._asked[asked] = self._writes.leave_out_attribute(cls, key, is_container=asked[2])
        return self._asked[asked]

    def would_agree(self, writes: Writes) -> bool:
        """Tell whether the same attributes are left out by another walk."""
        return all(
            writes.leave_out_attribute(cls, key, is_container=may_change) == is_left_out
            for (cls, key, may_change), is_left_out in self._asked.items()
        )


def _is_found_by_name(code: object) -> bool:
    """Tell whether a pickle of a function or class is its name."""
    found: object = sys.modules.get(getattr(code, "__module__", None) or "")
    for name in getattr(code, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is code
