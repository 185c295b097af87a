"""What was found out once about a target whose state is too large to be compared at every call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch

from torchcache.keys.digest import digest_named, digest_parts
from torchcache.keys.fast.mode import ambient_reason, current_mode, setting_parts
from torchcache.keys.identity import Look, named_parts, shown, shown_opaque, with_kinds
from torchcache.keys.key_parts import Part
from torchcache.keys.moves import Move
from torchcache.keys.objects import Findings
from torchcache.keys.ranks import has_other_ranks, rank_and_size
from torchcache.keys.time_limit import TakesTooLongError
from torchcache.options import CacheOptions
from torchcache.process import ForkLock
from torchcache.report.reasons import Reason

logger: logging.Logger = logging.getLogger(__name__)

#: Stands for what takes too long to be found out.
_GIVEN_UP = Findings(())


class FixedIdentity:
    """What was found out once about a target, and the mode.

    For state that is too large to be compared at every call, such as a dataset's. Found out at first use, and again
    after ``refresh``. Safe from any thread; ``find`` runs under a lock.

    Args:
        name: What to call the target in the log.
        find: Finds it out; not asked where a ``persistent_module_hash`` stands for it all.
        options: Those in force.
    """

    def __init__(self, name: str, find: Callable[[], Findings], options: CacheOptions) -> None:
        self._name = name
        self._find = find
        self._options = options
        self._lock = ForkLock(on_broken=self._start_afresh)
        # Guarded by _lock:
        self._findings: Findings | None = None
        self._module_hash = ""
        self._last: tuple[object, Look] | None = None  # mode and what else may differ, and what was made of it

    def module_hash(self) -> str:
        """Return the name of all that was found out, and of the options that shape the values."""
        with self._lock.raw:
            self._found()
            return self._module_hash

    def look(self) -> Look:
        """Return what was found out, in the present mode."""
        with self._lock.raw:
            findings = self._found()
            if findings is _GIVEN_UP:
                return Look(self._module_hash, b"", is_private=False, reason=Reason.TAKES_TOO_LONG)
            talks = findings.talks
            rank = rank_and_size() if talks is not None and talks.asks_rank else ()
            collectives = sorted(talks.collectives) if talks is not None and has_other_ranks() else []
            seen = current_mode(), rank, ambient_reason(), collectives
            if self._last is not None and self._last[0] == seen:
                return self._last[1]
            fingerprint = digest_parts([b"fixed", self._module_hash.encode(), repr(seen[:2]).encode()])
            reason, evidence = seen[2], ""
            if collectives:
                reason, evidence = Reason.COLLECTIVES, shown(collectives)
            elif reason is None and findings.opaque:
                reason, evidence = Reason.OPAQUE_STATE, shown_opaque(findings.opaque)
            elif reason is None and findings.unseen:
                reason, evidence = Reason.OPAQUE_CODE, shown(findings.unseen)
            elif reason is None and findings.entropy:
                reason, evidence = Reason.RANDOM_NUMBERS, shown(findings.entropy)
            look = Look(self._module_hash, fingerprint, False, reason, evidence, findings.classes)
            self._last = seen, look
            return look

    def apart(self) -> FixedIdentity:
        """Return itself: being asked leaves no trace in what was found out."""
        return self

    def has_moved(self, since: Look) -> bool:  # noqa: ARG002 - as of Identity
        """Deny it: what was found out is not followed."""
        return False

    def look_past_flags(self, since: Look) -> Look | None:  # noqa: ARG002 - as of Identity
        """Deny that any flags are followed."""
        return None

    def settle(self, look: Look) -> bool:  # noqa: ARG002 - as of Identity
        """Deny that anything is made late."""
        return False

    def moves(self) -> list[Move]:
        """Return nothing: what was found out is not followed."""
        return []

    def refresh(self) -> None:
        """Find everything out afresh next time."""
        with self._lock.raw:
            self._start_afresh()

    def parameters(self) -> list[torch.Tensor]:
        """Return no parameters: they are not followed."""
        return []

    def requires_grad(self) -> bool:
        """Deny it: there are no parameters to train."""
        return False

    def whole_bytes(self) -> int:
        """Return none: weights are not followed."""
        return 0

    def note_hashed(self, n_bytes: int) -> None:
        """Do nothing: there is nothing to look at again."""

    def generators(self) -> list[object]:
        """Return the random number generators that were found."""
        return [] if self._findings is None else [*self._findings.generators]

    def sets_generators(self) -> bool:
        """Return False: what is one sample is computed once."""
        return False

    def marks(self) -> object:
        """Return the same at all times."""
        return None

    def classes(self) -> tuple[type, ...]:
        """Return the user's own classes that the code refers to."""
        return () if self._findings is None else self._findings.classes

    def key_parts(self) -> tuple[list[Part], list[Part]]:
        """Return the parts of what was found out, and of the mode."""
        with self._lock.raw:
            parts = [*self._found().parts, *named_parts(self._options)]
        return with_kinds(parts), setting_parts(current_mode())

    def describe(self) -> Iterator[tuple[str, bytes]]:
        """Yield each part of module hash and fingerprint with its digest."""
        with self._lock.raw:
            parts = list(self._found().parts)
            for name, value in named_parts(self._options):
                parts.append((name, digest_parts([value])))
        yield from parts
        yield "mode", digest_parts([repr(current_mode()).encode()])

    # -- everything below runs under the lock ---------------------------------------------------------------------

    def _start_afresh(self) -> None:
        self._findings = self._last = None

    def _found(self) -> Findings:
        if self._findings is None:
            named = self._options.persistent_module_hash
            try:
                findings = Findings(()) if named else self._find()
            except TakesTooLongError:
                findings = _GIVEN_UP
            parts = [*findings.parts, *named_parts(self._options)]
            self._module_hash = named or digest_named(parts).hex()
            self._findings = findings
            logger.info("module hash of %s: %s", self._name, self._module_hash)
        return self._findings
