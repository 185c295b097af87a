"""What the key of a call is made of: the answer to "why did it miss?"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = 8  # hex digits of a digest

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
    """What ``Cache.explain`` found out about a call; ``str`` of it is a table.

    Two calls share a result exactly if their ``namespace`` and the digests of their samples are equal.

    Attributes:
        target: What is cached.
        module_hash: The name of code, construction arguments and options.
        namespace: The name of the module hash with weights, plain state and mode, in hex.
        bypass_reason: Why the call would go around the cache, or None.
        parts: What all of this is made of: the name of each part and its digest in hex.
        samples: The samples of the call, in order.
    """

    target: str
    module_hash: str
    namespace: str
    bypass_reason: str | None = None
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
        """Show the call as a table: each part with a short digest, then where each sample would be found."""
        head = f"{self.target}: module hash {self.module_hash}, namespace {self.namespace}"
        if self.bypass_reason:
            head += f"\n  goes around the cache: {self.bypass_reason}"
        width = max(map(len, [*self.parts, f"sample {len(self.samples)}"]))
        lines = [f"  {name:{width}}  {_shown(digest)}" for name, digest in self.parts.items()]
        lines += [
            f"  {f'sample {i}':{width}}  {_shown(sample.digest)}  {sample.found_in}"
            for i, sample in enumerate(self.samples)
        ]
        return "\n".join([head, *lines])


def _shown(digest: str | None) -> str:
    return "absent" if digest is None else digest[:_SHOWN]
