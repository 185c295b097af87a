"""The parts of a key by name, short enough to be kept beside the results, and which of them differ in another key.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torchcache.keys.digest import digest_named

#: A part of a key: its name, which begins with its kind, and its digest.
Part = tuple[str, bytes]

#: At most this many entries of each kind are kept; of more, those of one front are kept together.
_MOST_OF_KIND = {
    "code": 24, "argument of the constructor": 16, "weights": 12, "name": 24, "state": 32, "inside": 32, "call": 16,
}  # fmt: skip
_MOST_OF_OTHERS = 16

_DIGEST_BYTES = 4
_MOST_CHARACTERS = 80

#: Stands for the parts of a kind that no other entry has.
_REST = "*"


@dataclass(frozen=True, slots=True)
class Entry:
    """One part, or several whose names have one front, as they are kept.

    Attributes:
        kind: What kind of part.
        name: Its name without the kind, or the front of several names.
        digest: The front of its digest, or of one of all of them.
        is_group: Whether it stands for several.
    """

    kind: str
    name: str
    digest: bytes
    is_group: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two keys.

    Attributes:
        kind: What kind of part.
        name: Its name, or the front of the names of several.
        is_group: Whether it stands for several.
    """

    kind: str
    name: str
    is_group: bool = False


class KeyParts:
    """All parts of one key, to be compared with what was kept of others.

    Args:
        parts: The parts; what comes before the first colon of a name is its kind.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._by_kind: dict[str, list[Part]] = {}
        for full, digest in parts:
            kind, _, name = full.partition(":")
            self._by_kind.setdefault(kind, []).append((name[:_MOST_CHARACTERS], digest))
        self._groups: dict[tuple[str, int], dict[str, list[Part]]] = {}

    def shortened(self) -> list[Entry]:
        """Return the parts as they are kept."""
        entries: list[Entry] = []
        for kind in self._by_kind:
            entries += self._entries_of(kind, _MOST_OF_KIND.get(kind, _MOST_OF_OTHERS))
        return entries

    def differences(self, kept: Sequence[Entry]) -> list[Difference]:
        """Return which parts differ from those that were kept of another key."""
        by_kind: dict[str, list[Entry]] = {}
        for entry in kept:
            by_kind.setdefault(entry.kind, []).append(entry)
        found: list[Difference] = []
        for kind in dict.fromkeys([*by_kind, *self._by_kind]):
            found += self._differences_of(kind, by_kind.get(kind, []))
        # What lies inside an attribute says more than the attribute.
        inside = [difference.name for difference in found if difference.kind == "inside"]
        return [difference for difference in found if not _is_said_by(difference, inside)]

    def _differences_of(self, kind: str, kept: Sequence[Entry]) -> Iterator[Difference]:
        mine = self._by_kind.get(kind, [])
        taken: set[str] = set()
        for entry in kept:
            if entry.name == _REST:
                members = [part for part in mine if part[0] not in taken]
            else:
                members = self._groups_at(kind, _depth_of(entry.name)).get(entry.name, [])
                if not entry.is_group:
                    members = [part for part in members if part[0] == entry.name]
            taken.update(name for name, _ in members)
            if not members or _digest_of(members) != entry.digest:
                yield Difference(kind, entry.name, entry.is_group)
        for name in dict.fromkeys(name for name, _ in mine):
            if name not in taken:
                yield Difference(kind, name)

    def _entries_of(self, kind: str, most: int) -> list[Entry]:
        """Return at most so many entries for the parts of a kind."""
        depth = max(_depth_of(name) for name, _ in self._by_kind[kind])
        while depth > 1 and len(self._groups_at(kind, depth)) > most:
            depth -= 1
        groups = self._groups_at(kind, depth)
        fronts = list(groups)
        chosen = fronts if len(fronts) <= most else fronts[: most - 1]

        entries: list[Entry] = []
        for front in chosen:
            members = groups[front]
            is_group = any(name != front for name, _ in members)
            entries.append(Entry(kind, front, _digest_of(members), is_group))
        rest = [part for part in self._by_kind[kind] if _front(part[0], depth) not in chosen]
        if rest:
            entries.append(Entry(kind, _REST, _digest_of(rest), is_group=True))
        return entries

    def _groups_at(self, kind: str, depth: int) -> dict[str, list[Part]]:
        """Return the parts of a kind by the front of their names."""
        groups = self._groups.get((kind, depth))
        if groups is None:
            groups = self._groups[kind, depth] = {}
            for part in self._by_kind.get(kind, ()):
                groups.setdefault(_front(part[0], depth), []).append(part)
        return groups


def _is_said_by(difference: Difference, inside: Sequence[str]) -> bool:
    fronts = f"{difference.name}.", f"{difference.name}["
    return difference.kind in ("state", "name") and any(name.startswith(fronts) for name in inside)


def _depth_of(name: str) -> int:
    return name.count(".") + 1


def _front(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _digest_of(members: Sequence[Part]) -> bytes:
    return digest_named(members)[:_DIGEST_BYTES]
