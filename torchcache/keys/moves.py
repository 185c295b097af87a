"""What moved between two looks at a state: which attributes and weights, and from what to what.

This module does not import torch.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from torchcache.keys.digest import digest_bytes

#: At most this many moves are kept of two looks, and named in a line.
MOST_KEPT = 16
MOST_NAMED = 3

_DIGITS = 8
_MOST_SHOWN = 24  # characters of a value


@dataclass(frozen=True, slots=True)
class Move:
    """One attribute, weight or setting that differs between two looks.

    Attributes:
        path: Where it is, as ``ignore`` names it.
        kind: "attribute", "training flag", "weight" or "setting".
        before: Its value or a short digest of it then; "" if it is not known.
        after: The same, now.
    """

    path: str
    kind: str
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        """Return its path, with what it was and what it is."""
        name = f"{self.kind} {self.path}" if self.kind in ("weight", "setting") else self.path
        return f"{name} ({self.before} -> {self.after})" if self.before or self.after else name


def show_moves(moves: Sequence[Move], most: int = MOST_NAMED) -> str:
    """Return the first few moves as one text, and how many more there are."""
    if not moves:
        return "weights or attributes"
    shown = ", ".join(map(str, moves[:most]))
    more = len(moves) - most
    return f"{shown} and {more} more" if more > 0 else shown


def moves_of(
    before: Iterable[tuple[str, bytes]],
    after: Iterable[tuple[str, bytes]],
    inner_before: Mapping[str, bytes],
    inner_after: Mapping[str, bytes],
) -> list[Move]:
    """Return which named parts of two looks differ.

    Args:
        before: The parts of the earlier look.
        after: The parts of the later one.
        inner_before: What lies inside the earlier parts, by its path.
        inner_after: The same of the later ones.
    """
    then, now = _by_name(before), _by_name(after)
    names = (name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name))
    moves: list[Move] = []
    for name in islice(names, MOST_KEPT):
        path = path_of(name)
        deeper = _differing_inside(path, inner_before, inner_after)
        if deeper:
            moves += [_move(inner, inner_before.get(inner), inner_after.get(inner)) for inner in deeper]
        else:
            moves.append(_move(path, _joined(then.get(name)), _joined(now.get(name))))
    return moves[:MOST_KEPT]


def path_of(name: str) -> str:
    """Return how a user would call a part of the state."""
    for prefix in ("name ", "_parameters ", "_buffers "):
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def top_of(path: str) -> str:
    """Return the name of the attribute or variable that a path inside it begins with."""
    return _INSIDE.split(path, maxsplit=1)[0]


#: What comes behind the name of an attribute in the path of what lies inside it.
_INSIDE = re.compile(r"[.\[]")


def shown_value(encoded: bytes | None) -> str:
    """Return a plain value as text, from its bytes in the key; of any other the first digits of a digest."""
    if encoded is None:
        return "absent"
    kind, _, rest = encoded.partition(b" ")
    if kind == b"int":
        try:
            return str(int(rest, 16))
        except ValueError:  # too long to be shown, or no number at all
            return _digits(encoded)
    if encoded.startswith(b"float") and len(encoded) == len(b"float") + 8:
        return repr(struct.unpack("<d", encoded[5:])[0])
    if kind == b"str":
        return _shortened(repr(rest.decode("utf-8", "replace")))
    if kind in _SPELLED:
        return _shortened(rest.decode("utf-8", "replace"))
    if kind == b"path":
        return _shortened(rest.partition(b" ")[2].decode("utf-8", "replace"))
    return _digits(encoded)


#: Kinds of values whose bytes in the key spell them out.
_SPELLED = frozenset({b"bool", b"NoneType", b"ellipsis", b"dtype", b"device", b"layout", b"memory_format"})


def _move(path: str, before: bytes | None, after: bytes | None) -> Move:
    is_flag = path == "training" or path.endswith(".training")
    return Move(path, "training flag" if is_flag else "attribute", shown_value(before), shown_value(after))


def _differing_inside(path: str, before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Return the innermost paths below one that differ."""
    fronts = f"{path}.", f"{path}["
    below = [inner for inner in dict.fromkeys([*before, *after]) if inner.startswith(fronts)]
    differing = [inner for inner in below if before.get(inner) != after.get(inner)]
    return [
        inner
        for inner in differing
        if not any(other is not inner and other.startswith((f"{inner}.", f"{inner}[")) for other in differing)
    ]


def _by_name(parts: Iterable[tuple[str, bytes]]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for name, value in parts:
        found.setdefault(name, []).append(value)
    return found


def _joined(values: Sequence[bytes] | None) -> bytes | None:
    if values is None:
        return None
    return values[0] if len(values) == 1 else b"".join(values)


def _digits(encoded: bytes) -> str:
    return digest_bytes(encoded).hex()[:_DIGITS]


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
