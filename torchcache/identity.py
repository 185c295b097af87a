"""What identifies the results of one target: its module hash, and the namespace of its present state."""

from __future__ import annotations

import difflib
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchcache.errors import ConfigError
from torchcache.keys.code import CodeWalk, walk_code
from torchcache.keys.collectives import Talks
from torchcache.keys.digest import digest_parts
from torchcache.keys.mode import ambient_reason, current_mode
from torchcache.keys.objects import Findings
from torchcache.keys.ranks import has_other_ranks, is_in_a_job, rank_and_size
from torchcache.keys.state import StateTracker
from torchcache.keys.time_limit import TakesTooLongError
from torchcache.log import warn_once
from torchcache.options import CacheOptions
from torchcache.process import ForkLock
from torchcache.storage.record import FORMAT_VERSION

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

#: So much of what is evidence for a reason is said.
_MOST_SHOWN = 3

#: The walk names what else it has to look at, which may name more; after so many rounds it is complete enough.
_MOST_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Target:
    """What is cached, as the doors describe it.

    Attributes:
        name: What to call it in the log.
        code: The class or function whose code runs.
        function: The user's own function, not bound.
        instance: The module or object whose state counts, weakly; None for a function.
        arguments: Digest of the construction arguments; None if they have no stable name.
        is_method: Whether the first parameter of ``function`` is the instance.
        method: Its name if it is a method, which tells those of one instance apart under a name of the user's own;
            empty for a function, and for the forward of a module.
        remedies: What to say of a reason to go around the cache, where the usual is not what to do here.
    """

    name: str
    code: type | Function
    function: Function
    instance: weakref.ref[Any] | None = None
    arguments: bytes | None = b""
    is_method: bool = False
    method: str = ""
    remedies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a target found.

    Attributes:
        module_hash: The name of what is computed.
        namespace: 16 bytes that name the present state too.
        is_private: Whether something has no stable name, so that only this process can use the results.
        reason: Why a call cannot be cached in this state, or None.
        evidence: What was found that is the reason, where that helps.
    """

    module_hash: str
    namespace: bytes
    is_private: bool
    reason: str | None
    evidence: str = ""


class Identity:
    """The code, construction arguments, options, weights, plain state and mode of one target.

    Found out at first use, when all names are defined, and followed from then on: each look compares with the
    last one and hashes only what moved. Code that is redefined while the program runs makes another module
    hash. Safe from any thread; user code may run in a ``__repr__`` or ``__reduce__`` only.
    """

    def __init__(self, target: Target, options: Callable[[], CacheOptions]) -> None:
        self._target = target
        self._options = options
        self._lock = ForkLock(on_broken=self._start_afresh)
        # Guarded by _lock:
        self._tracker = self._track()
        self._walk: CodeWalk | None = None
        self._module_hash: str | None = None
        self._last: tuple[bytes, Look] | None = None  # the fingerprint last seen, and what was made of it
        self._has_said_rank = False
        self._talks: Talks | None = None  # None: the code was not asked what it has to do with other ranks
        self._own_name = os.urandom(16)  # what stands for what has no stable name
        self._has_checked_ignored = False
        self._given_up: Look | None = None  # what stands for looks that take too long

    def module_hash(self) -> str:
        """Return the name of code, construction arguments and the options that shape the values."""
        with self._lock.raw:
            if self._given_up is not None:
                return self._given_up.module_hash
            try:
                return self._module_hash or self._identify()
            except TakesTooLongError:
                return self._give_up().module_hash

    def look(self) -> Look:
        """Look at the present state."""
        with self._lock.raw:
            if self._given_up is not None:
                return self._given_up
            try:
                module_hash = self._module_hash or self._identify()
                if self._talks is None and is_in_a_job():
                    self._identify()
                tracker = self._tracker
                fingerprint = tracker.fingerprint()
                if tracker.code_has_moved:
                    module_hash = self._identify()
                    fingerprint = tracker.fingerprint()
            except TakesTooLongError:
                return self._give_up()
            reason, last = tracker.bypass_reason, self._last
            if last is not None and last[0] is fingerprint and last[1].reason == reason:
                return last[1]  # what is to be said was said
            has_hooks = tracker.has_inner_hooks
            self._check_ignored()
            look = Look(module_hash, fingerprint, self._is_private(), reason, self._evidence(reason))
            self._last = fingerprint, look
        if self._talks is not None and self._talks.asks_rank and is_in_a_job():
            self._say_rank()
        if has_hooks:
            self._say("hooks", "hooks on inner modules run when a sample is computed, and do not run on hits")
        return look

    def apart(self) -> Identity:
        """Return the same as another object, which may be asked without this one remembering it."""
        twin = Identity(self._target, self._options)
        twin._own_name = self._own_name
        twin._given_up = self._given_up
        return twin

    def has_moved(self) -> bool:
        """Tell whether code or state differ from what the last look saw."""
        with self._lock.raw:
            try:
                return self._tracker.moved() or self._tracker.code_has_moved
            except TakesTooLongError:
                self._give_up()
                return True

    def settle(self, look: Look) -> bool:  # noqa: ARG002 - for what is made late
        """Make what computes, if it is not there; tell whether the state is another then than a look said."""
        return False

    def refresh(self) -> None:
        """Look at everything afresh next time."""
        with self._lock.raw:
            self._given_up = None
            self._tracker.refresh()

    def parameters(self) -> list[torch.Tensor]:
        """Return the parameters last seen, in the order of the module tree."""
        return self._tracker.parameters

    def requires_grad(self) -> bool:
        """Tell whether a parameter last seen required grad."""
        return self._tracker.requires_grad

    def whole_bytes(self) -> int:
        """Return how many bytes of weights are compared at each call, all of them."""
        return self._tracker.whole_bytes

    def note_hashed(self, n_bytes: int) -> None:
        """Note that a call hashed so many bytes of its inputs: the next one looks at the more weights."""
        self._tracker.note_hashed(n_bytes)

    def generators(self) -> list[object]:
        """Return the random number generators that the state last seen leads to."""
        return self._tracker.generators

    def marks(self) -> object:
        """Return something that differs once a weight was changed in a way that torch counts."""
        with self._lock.raw:
            return self._tracker.marks()

    def classes(self) -> tuple[type, ...]:
        """Return the user's own classes that the code refers to."""
        return () if self._walk is None else self._walk.classes

    def describe(self) -> Iterator[tuple[str, bytes]]:
        """Yield each part of module hash and namespace with its digest."""
        with self._lock.raw:
            if self._given_up is not None:
                return
            if self._module_hash is None:
                self._identify()
            walk = self._walk
            parts = [] if walk is None else [(f"code {name}", value) for name, value in walk.parts]
            parts += [(name, digest_parts([value])) for name, value in self._named_parts()]
            parts += self._tracker.describe()
        yield from parts

    # -- everything below runs under the lock ---------------------------------------------------------------------

    def _evidence(self, reason: str | None) -> str:
        """Return what was found that is the reason to go around the cache, where that helps."""
        if reason == "collectives":
            return _shown(self._tracker.crossings)
        if reason == "random_numbers":
            return _shown(self._tracker.entropy)
        if reason == "opaque_code":
            return _shown(self._tracker.unseen)
        return _shown_opaque(self._tracker.opaque) if reason == "opaque_state" else ""

    def _check_ignored(self) -> None:
        """Raise ConfigError, the first time, if there is nothing where something is to be ignored."""
        if self._has_checked_ignored or self._options().persistent_module_hash:
            return
        for name, there in self._tracker.unknown_names.items():
            raise ConfigError(unknown_name(name, there, self._target.name), argument="ignore")
        self._has_checked_ignored = True

    def _give_up(self) -> Look:
        """Look no more: each further look would take as long."""
        name = digest_parts([b"given up", self._own_name])
        self._given_up = Look(name.hex(), name, is_private=True, reason="takes_too_long")
        return self._given_up

    def _start_afresh(self) -> None:
        self._given_up = None
        self._tracker = self._track()
        self._module_hash = self._last = None

    def _track(self) -> StateTracker:
        return StateTracker(self._target.instance, is_inside=bool(self._target.method))

    def _is_private(self) -> bool:
        return self._target.arguments is None and not self._options().persistent_module_hash

    def _named_parts(self) -> list[tuple[str, bytes]]:
        """Return what enters the module hash beside the code."""
        arguments = self._own_name if self._target.arguments is None else self._target.arguments
        return _named_parts(self._options(), ("construction arguments", arguments))

    def _identify(self) -> str:
        """Walk the code, and tell the tracker what to look at."""
        self._tracker.ignored = frozenset(self._options().ignore)
        named = self._options().persistent_module_hash
        roots: list[object] = []
        if named:
            self._walk, module_hash = None, named
            # A name of the user's own says what is computed, not that every rank computes it, and by itself.
            self._talks = self._walk_code()[0].talks if is_in_a_job() else None
        else:
            self._walk, roots = self._walk_code()
            self._talks = self._walk.talks
            parts = [part for name, value in self._named_parts() for part in (name.encode(), value)]
            module_hash = digest_parts([self._walk.fingerprint, *parts]).hex()
        salt = digest_parts([b"namespace", module_hash.encode()])
        self._tracker.follow(self._walk, roots, salt, self._talks or Talks())
        if module_hash != self._module_hash:
            logger.info("module hash of %s: %s", self._target.name, module_hash)
        if named and self._module_hash is None:
            logger.info(
                "%s is cached under your own name %s: changes of code, arguments and weights do not "
                "invalidate it", self._target.name, named,
            )  # fmt: skip
        self._module_hash = module_hash
        return module_hash

    def _walk_code(self) -> tuple[CodeWalk, list[object]]:
        """Walk from the target and from the code that its state holds, until neither leads to more."""
        roots = self._tracker.code(CodeWalk())
        walk = walk_code(self._target.code, roots)
        for _ in range(_MOST_ROUNDS):
            found = self._tracker.code(walk)
            if found == roots:
                break
            roots = found
            walk = walk_code(self._target.code, roots)
        return walk, roots

    # -- saying -----------------------------------------------------------------------------------------------------

    def _say_rank(self) -> None:
        if not self._has_said_rank:
            self._has_said_rank = True
            logger.info(
                "the code of %s asks for its rank or how many there are, so each rank keeps results of its own",
                self._target.name,
            )

    def _say(self, kind: str, message: str) -> None:
        warn_once((self._target.name, kind), "%s: %s", self._target.name, message)


def _shown(found: Iterable[str]) -> str:
    return ", ".join([*dict.fromkeys(found)][:_MOST_SHOWN])


def _shown_opaque(opaque: Iterable[tuple[str, str]]) -> str:
    return _shown(f"{path} is a {type_name}" for path, type_name in opaque)


def unknown_name(name: str, there: Sequence[str], target: str) -> str:
    """Say that there is nothing to ignore at a name."""
    nearest = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "name attributes, globals or closure variables"
    return f"ignore names {name!r}, which {target} does not hold; {hint}"


def _named_parts(options: CacheOptions, *more: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    """Return what enters the module hash beside code and state; a name of the user's own stands for all of it."""
    named = options.persistent_module_hash
    if named:
        return [("persistent_module_hash", named.encode())]
    shaping = [(f"option {name}", value.encode()) for name, value in options.key_parts()]
    return [("record format", str(FORMAT_VERSION).encode()), *more, *shaping]


#: Stands for what takes too long to be found out.
_GIVEN_UP = Findings(())


class FixedIdentity:
    """What was found out once about a target, and the mode.

    For state that is too large to be compared at every call, such as a dataset's. Found out at first use, and again
    after ``refresh``. Safe from any thread; ``find`` runs under a lock.

    Args:
        name: What to call the target in the log.
        find: Finds it out; not asked where a ``persistent_module_hash`` stands for it all.
        options: Returns the options in force.
    """

    def __init__(
        self,
        name: str,
        find: Callable[[], Findings],
        options: Callable[[], CacheOptions],
    ) -> None:
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
                return Look(self._module_hash, b"", is_private=False, reason="takes_too_long")
            talks = findings.talks
            rank = rank_and_size() if talks is not None and talks.asks_rank else ()
            collectives = sorted(talks.collectives) if talks is not None and has_other_ranks() else []
            seen = current_mode(), rank, ambient_reason(), collectives
            if self._last is not None and self._last[0] == seen:
                return self._last[1]
            namespace = digest_parts([b"fixed", self._module_hash.encode(), repr(seen[:2]).encode()])
            reason, evidence = seen[2], ""
            if collectives:
                reason, evidence = "collectives", _shown(collectives)
            elif reason is None and findings.opaque:
                reason, evidence = "opaque_state", _shown_opaque(findings.opaque)
            elif reason is None and findings.unseen:
                reason, evidence = "opaque_code", _shown(findings.unseen)
            elif reason is None and findings.entropy:
                reason, evidence = "random_numbers", _shown(findings.entropy)
            look = Look(self._module_hash, namespace, is_private=False, reason=reason, evidence=evidence)
            self._last = seen, look
            return look

    def apart(self) -> FixedIdentity:
        """Return itself: being asked leaves no trace in what was found out."""
        return self

    def has_moved(self) -> bool:
        """Deny it: what was found out is not followed."""
        return False

    def settle(self, look: Look) -> bool:  # noqa: ARG002 - as of Identity
        """Deny that anything is made late."""
        return False

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

    def marks(self) -> object:
        """Return the same at all times."""
        return None

    def classes(self) -> tuple[type, ...]:
        """Return the user's own classes that the code refers to."""
        return () if self._findings is None else self._findings.classes

    def describe(self) -> Iterator[tuple[str, bytes]]:
        """Yield each part of module hash and namespace with its digest."""
        with self._lock.raw:
            parts = [
                *self._found().parts,
                *((name, digest_parts([value])) for name, value in _named_parts(self._options())),
            ]
        yield from parts
        yield "mode", digest_parts([repr(current_mode()).encode()])

    # -- everything below runs under the lock ---------------------------------------------------------------------

    def _start_afresh(self) -> None:
        self._findings = self._last = None

    def _found(self) -> Findings:
        if self._findings is None:
            named = self._options().persistent_module_hash
            try:
                findings = Findings(()) if named else self._find()
            except TakesTooLongError:
                findings = _GIVEN_UP
            parts = [
                part
                for name, value in (*findings.parts, *_named_parts(self._options()))
                for part in (name.encode(), value)
            ]
            self._module_hash = named or digest_parts(parts).hex()
            self._findings = findings
            logger.info("module hash of %s: %s", self._name, self._module_hash)
        return self._findings
