"""What the key of a call is made of: the answer to "why did it miss?"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_128_hexdigest

_SHOWN = 8  # hex digits of a digest

#: At most this many lines are a screenful; of more, so many parts of a kind are shown, samples, and what moved.
_MOST_LINES = 48
_MOST_OF_KIND = 8
_MOST_SAMPLES = 5
_MOST_MOVED = 3

#: How the names of parts begin that are mixed into the digest of each sample.
_SHARED_BY_SAMPLES = ("function", "argument ", "tensor ", "padded ", "values ")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleExplanation:
    """One sample of an explained call.

    Attributes:
        digest: Of its rows in all tensor arguments, in hex.
        found_in: Where its value would come from: "memory", "queue", "store", or "nowhere".
    """

    digest: str
    found_in: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What ``Cache.explain`` found out about a call; ``str`` of it is a table of a screenful, ``full()`` the whole one.

    Two calls share a result exactly if their ``namespace`` and the digests of their samples are equal.

    Attributes:
        target: What is cached.
        module_hash: The name of code, construction arguments and options.
        namespace: The name of the module hash with weights, plain state and mode, in hex.
        bypass_reason: Why the call would go around the cache, or None.
        moved: What moved when the state moved last: each path with what it was and what it is.
        parts: What all of this is made of: the name of each part and its digest in hex.
        samples: The samples of the call, in order.
    """

    target: str
    module_hash: str
    namespace: str
    bypass_reason: str | None = None
    moved: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(repr=False)
    samples: tuple[SampleExplanation, ...] = field(repr=False)

    def differences(self, other: Explanation) -> list[str]:
        """Say which parts and samples differ, one line each; nothing if both calls share every result.

        The digest of a sample depends on what all samples of its call have in common, so samples are compared
        only if that is the same.
        """
        names = dict.fromkeys([*self.parts, *other.parts])
        lines = [
            f"{name}: {_shown(self.parts.get(name))} / {_shown(other.parts.get(name))}"
            for name in names
            if self.parts.get(name) != other.parts.get(name)
        ]
        if any(line.startswith(_SHARED_BY_SAMPLES) for line in lines):
            return lines
        for i in range(max(len(self.samples), len(other.samples))):
            mine, others = (e.samples[i].digest if i < len(e.samples) else None for e in (self, other))
            if mine != others:
                lines.append(f"sample {i}: {_shown(mine)} / {_shown(others)}")
        return lines

    def __str__(self) -> str:
        """Show the call as a table of at most a screenful: each part with a short digest, then where samples are.

        Where there are many parts of a kind, such as weights, one digest stands for all of them, and only some samples
        are shown; ``full()`` shows the rest.
        """
        n_lines = len(self.parts) + len(self.samples)
        if n_lines <= _MOST_LINES:
            return self.full()
        lines = self._table(_condensed(self.parts), self.samples[:_MOST_SAMPLES])
        left = len(self.samples) - _MOST_SAMPLES
        if left > 0:
            places = Counter(sample.found_in for sample in self.samples)
            counted = ", ".join(f"{place} {count}" for place, count in sorted(places.items()))
            lines.append(f"  {left} more samples; of all of them: {counted}")
        return "\n".join([*lines, f"  .full() shows all {n_lines} lines"])

    def full(self) -> str:
        """Return the whole table."""
        return "\n".join(self._table(self.parts, self.samples))

    def _table(self, parts: Mapping[str, str], samples: Sequence[SampleExplanation]) -> list[str]:
        head = f"{self.target}: module hash {self.module_hash}, namespace {self.namespace}"
        if self.bypass_reason:
            head += f"\n  goes around the cache: {self.bypass_reason}"
        if self.moved:
            head += f"\n  moved last: {', '.join(self.moved[:_MOST_MOVED])}"
        width = max(map(len, [*parts, f"sample {len(samples)}"]))
        lines = [f"  {name:{width}}  {_shown(digest)}" for name, digest in parts.items()]
        lines += [
            f"  {f'sample {i}':{width}}  {_shown(sample.digest)}  {sample.found_in}" for i, sample in enumerate(samples)
        ]
        return [head, *lines]


def _condensed(parts: Mapping[str, str]) -> dict[str, str]:
    """Return parts with one digest for all of a kind of which there are many."""
    kinds: dict[str, list[str]] = {}
    for name in parts:
        kinds.setdefault(name.partition(" ")[0], []).append(name)

    condensed: dict[str, str] = {}
    for kind, names in kinds.items():
        if len(names) <= _MOST_OF_KIND:
            condensed.update((name, parts[name]) for name in names)
        else:
            together = "\n".join(f"{name} {parts[name]}" for name in names)
            condensed[f"{kind}, all {len(names)}"] = xxh3_128_hexdigest(together.encode())
    return condensed


def _shown(digest: str | None) -> str:
    return "absent" if digest is None else digest[:_SHOWN]
