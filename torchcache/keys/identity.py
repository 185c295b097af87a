"""What identifies the results of one target: its module hash, and the fingerprint of its present state."""

from __future__ import annotations

import difflib
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchcache.errors import ConfigError
from torchcache.keys.collectives import Talks, plain_class
from torchcache.keys.digest import digest_named, digest_parts
from torchcache.keys.key_parts import Part
from torchcache.keys.moves import Move, show_moves
from torchcache.keys.put_in import Namespaces
from torchcache.keys.ranks import is_in_a_job
from torchcache.keys.state import StateTracker
from torchcache.keys.time_limit import TakesTooLongError
from torchcache.keys.walked import CodeWalk
from torchcache.layout import FORMAT_VERSION
from torchcache.options import CacheOptions
from torchcache.process import ForkLock
from torchcache.report.log import warn_once
from torchcache.report.reasons import Reason

logger: logging.Logger = logging.getLogger(__name__)

Function = Callable[..., Any]

#: What the construction arguments are called among the parts of the module hash.
_ARGUMENTS = "construction arguments"

#: So much of what is evidence for a reason is said.
_MOST_SHOWN = 3


def _remember_torch() -> None:
    """Remember how torch comes, when this is imported: a program puts something there later."""
    namespaces = Namespaces()
    namespaces.add_class(torch.nn.Module)
    namespaces.remember()


_remember_torch()


def _random_name() -> bytes:
    return os.urandom(16)


@dataclass(frozen=True, slots=True)
class Target:
    """What is cached, as the doors describe it.

    Attributes:
        name: What to call it in the log.
        code: The class or function whose code runs.
        function: The user's own function, not bound.
        instance: The module or object whose state counts, weakly; None for a function.
        arguments: Digest of the construction arguments; None if they have no stable name.
        argument_parts: Name and digest of each of them, where these are known.
        is_method: Whether the first parameter of ``function`` is the instance.
        method: Its name if it is a method, which tells those of one instance apart under a name of the user's own;
            empty for a function, and for the forward of a module.
        remedies: What to say of a reason to go around the cache, where the usual is not what to do here.
        own_name: 16 bytes that stand for what has no stable name, in this process and in those forked from it.
    """

    name: str
    code: type | Function
    function: Function
    instance: weakref.ref[Any] | None = None
    arguments: bytes | None = b""
    is_method: bool = False
    method: str = ""
    remedies: Mapping[str, str] = field(default_factory=dict)
    own_name: bytes = field(default_factory=_random_name)
    argument_parts: tuple[tuple[str, bytes], ...] = ()

    def present_code(self) -> type | Function:
        """Return the code that runs now: a module may be of another class by now."""
        held = None if self.instance is None else self.instance()
        if held is None or not isinstance(self.code, type):
            return self.code
        return plain_class(type(held))

    def as_copy(self) -> Target:
        """Return it as what is cached of a copy: what has no stable name goes its own way from here on."""
        return replace(self, own_name=_random_name())


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a target found.

    Attributes:
        module_hash: The name of what is computed.
        fingerprint: 16 bytes that name the present state too.
        is_private: Whether something has no stable name, so that only this process can use the results.
        reason: Why a call cannot be cached in this state, or None.
        evidence: What was found that is the reason, where that helps.
        classes: The user's own classes that the code refers to.
        is_in_training: Whether a module is in training mode, so that the call may put it into another one.
    """

    module_hash: str
    fingerprint: bytes
    is_private: bool
    reason: Reason | None
    evidence: str = ""
    classes: tuple[type, ...] = ()
    is_in_training: bool = False


class Identity:
    """The code, construction arguments, options, weights, plain state and mode of one target.

    Found out at first use, when all names are defined, and followed from then on: each look compares with the
    last one and hashes only what moved. Code that is redefined while the program runs makes another module
    hash. Safe from any thread; user code may run in a ``__repr__`` or ``__reduce__`` only.

    Args:
        target: What is cached.
        options: Those in force.
        checks_ignored: Whether a name in ``ignore`` must be one of something that this target holds.
    """

    def __init__(self, target: Target, options: CacheOptions, *, checks_ignored: bool = True) -> None:
        self._target = target
        self._options = options
        self._checks_ignored = checks_ignored
        self._lock = ForkLock(on_broken=self._start_afresh)
        # Guarded by _lock:
        self._tracker = self._track()
        self._walk: CodeWalk | None = None
        self._module_hash: str | None = None
        self._last: tuple[bytes, Look] | None = None  # the fingerprint last seen, and what was made of it
        self._has_said_rank = False
        self._talks: Talks | None = None  # None: the code was not asked what it has to do with other ranks
        self._has_checked_ignored = not checks_ignored
        self._given_up: Look | None = None  # what stands for looks that take too long

    def module_hash(self) -> str:
        """Return the name of code, construction arguments and the options that shape the values."""
        with self._lock.raw:
            if self._given_up is not None:
                return self._given_up.module_hash
            try:
                return self._module_hash or self._identify()
            except TakesTooLongError as error:
                return self._give_up(error).module_hash

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
            except TakesTooLongError as error:
                return self._give_up(error)
            reason, last = tracker.bypass_reason, self._last
            if last is not None and last[0] is fingerprint and last[1].reason == reason:
                return last[1]  # what is to be said was said
            has_hooks = tracker.has_inner_hooks
            self._check_ignored()
            evidence = self._evidence(reason)
            look = Look(
                module_hash, fingerprint, self._is_private(), reason, evidence, self.classes(), tracker.is_in_training
            )
            self._last = fingerprint, look
        if self._talks is not None and self._talks.asks_rank and is_in_a_job():
            self._say_rank()
        if has_hooks:
            self._say("hooks", "hooks on inner modules run when a sample is computed, and do not run on hits")
        return look

    def apart(self) -> Identity:
        """Return the same as another object, which may be asked without this one remembering it."""
        twin = Identity(self._target, self._options, checks_ignored=self._checks_ignored)
        twin._given_up = self._given_up
        return twin

    def has_moved(self, since: Look) -> bool:
        """Tell whether code or state differ from what a look saw."""
        with self._lock.raw:
            if not self._is_last(since):  # another thread has seen another state meanwhile
                return True
            try:
                return self._tracker.moved() or self._tracker.code_has_moved
            except TakesTooLongError as error:
                self._give_up(error)
                return True

    def look_past_flags(self, since: Look) -> Look | None:
        """Look again, if nothing but training flags that no code reads moved since a look: results are the same.

        Returns:
            The state as it is now; None if anything else moved, or the state is one in which nothing is cached.
        """
        with self._lock.raw:
            tracker = self._tracker
            try:
                if not self._is_last(since) or not tracker.only_unread_flags_moved():
                    return None
            except TakesTooLongError:
                return None
            weights = tracker.weights
        look = self.look()
        with self._lock.raw:
            is_same = tracker is self._tracker and tracker.weights == weights and self._is_last(look)
        return look if is_same and look.reason is None and look.module_hash == since.module_hash else None

    def settle(self, look: Look) -> bool:  # noqa: ARG002 - for what is made late
        """Make what computes, if it is not there; tell whether the state is another then than a look said."""
        return False

    def moves(self) -> list[Move]:
        """Return what moved when the state moved last."""
        with self._lock.raw:
            return self._tracker.moves

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

    def sets_generators(self) -> bool:
        """Tell whether the code may put a random number generator back as it was."""
        return self._tracker.sets_generators

    def marks(self) -> object:
        """Return something that differs once a weight was changed in a way that torch counts."""
        with self._lock.raw:
            return self._tracker.marks()

    def classes(self) -> tuple[type, ...]:
        """Return the user's own classes that the code refers to."""
        return () if self._walk is None else self._walk.classes

    def key_parts(self) -> tuple[list[Part], list[Part]]:
        """Return the parts of the module hash and of the state last seen, without a new look at either."""
        with self._lock.raw:
            walk, target = self._walk, self._target
            code = [] if walk is None else [(f"code:{name}", value) for name, value in walk.parts]
            named = [part for part in self._named_parts() if part[0] != _ARGUMENTS or not target.argument_parts]
            arguments = [(f"argument of the constructor:{name}", value) for name, value in target.argument_parts]
            return [*code, *arguments, *with_kinds(named)], self._tracker.key_parts()

    def describe(self) -> Iterator[tuple[str, bytes]]:
        """Yield each part of module hash and fingerprint with its digest."""
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

    def _is_last(self, look: Look) -> bool:
        """Tell whether the state last seen is the one that a look saw."""
        return self._last is not None and self._last[1].fingerprint == look.fingerprint

    def _evidence(self, reason: Reason | None) -> str:
        """Return what was found that is the reason to go around the cache, where that helps."""
        if reason is Reason.COLLECTIVES:
            return shown(self._tracker.crossings)
        if reason is Reason.RANDOM_NUMBERS:
            return shown(self._tracker.entropy)
        if reason is Reason.OPAQUE_CODE:
            return shown(self._tracker.unseen)
        if reason is Reason.STATE_CHANGES_AT_EVERY_CALL:
            return show_moves(self._tracker.moves)
        return shown_opaque(self._tracker.opaque) if reason is Reason.OPAQUE_STATE else ""

    def _check_ignored(self) -> None:
        """Raise ConfigError, the first time, if there is nothing where something is to be ignored."""
        if self._has_checked_ignored or self._options.persistent_module_hash:
            return
        for name, there in self._tracker.unknown_names.items():
            raise ConfigError(unknown_name(name, there, self._target.name), argument="ignore")
        self._has_checked_ignored = True

    def _give_up(self, error: TakesTooLongError) -> Look:
        """Look no more: each further look would take as long."""
        name = digest_parts([b"given up", self._target.own_name])
        self._given_up = Look(name.hex(), name, is_private=True, reason=Reason.TAKES_TOO_LONG, evidence=str(error))
        return self._given_up

    def _start_afresh(self) -> None:
        self._given_up = None
        self._tracker = self._track()
        self._module_hash = self._last = None

    def _track(self) -> StateTracker:
        return StateTracker(self._target.instance, is_inside=bool(self._target.method))

    def _is_private(self) -> bool:
        return self._target.arguments is None and not self._options.persistent_module_hash

    def _named_parts(self) -> list[tuple[str, bytes]]:
        """Return what enters the module hash beside the code."""
        arguments = self._target.arguments
        if arguments is None:
            arguments = self._target.own_name
        return named_parts(self._options, (_ARGUMENTS, arguments))

    def _identify(self) -> str:
        """Walk the code, and tell the tracker what to look at."""
        self._tracker.ignored = frozenset(self._options.ignore)
        named = self._options.persistent_module_hash
        roots: list[object] = []
        if named:
            self._walk, module_hash = None, named
            # A name of the user's own says what is computed, not that every rank computes it, and by itself.
            self._talks = self._tracker.walk(self._target.present_code())[0].talks if is_in_a_job() else None
        else:
            self._walk, roots = self._tracker.walk(self._target.present_code())
            self._talks = self._walk.talks
            module_hash = digest_named(self._named_parts(), front=[self._walk.fingerprint]).hex()
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


def shown(found: Iterable[str]) -> str:
    """Return the first few findings as one text."""
    return ", ".join([*dict.fromkeys(found)][:_MOST_SHOWN])


def shown_opaque(opaque: Iterable[tuple[str, str]]) -> str:
    """Return the first few places where something lies that cannot be seen, each with its type."""
    return shown(f"{path} is a {type_name}" for path, type_name in opaque)


def unknown_name(name: str, there: Sequence[str], target: str) -> str:
    """Say that there is nothing to ignore at a name."""
    nearest = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "name attributes, globals or closure variables"
    return f"ignore names {name!r}, which {target} does not hold; {hint}"


def named_parts(options: CacheOptions, *more: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    """Return what enters the module hash beside code and state; a name of the user's own stands for all of it."""
    named = options.persistent_module_hash
    if named:
        return [("persistent_module_hash", named.encode())]
    shaping = [(f"option {name}", value.encode()) for name, value in options.key_parts()]
    return [("record format", str(FORMAT_VERSION).encode()), *more, *shaping]


def with_kinds(parts: Iterable[Part]) -> list[Part]:
    """Return parts with a colon behind the first word of their names, which is their kind."""
    return [(name.replace(" ", ":", 1), value) for name, value in parts]
