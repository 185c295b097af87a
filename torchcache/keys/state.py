"""Weights, plain state and mode to a fingerprint, and noticing that they changed.

A ``StateTracker`` is asked at every call. It compares what it saw last (identities, pointers, versions,
sizes, numbers by type and value, small containers by value, 2 x 64 bytes of every tensor in host memory,
all bytes of those that require grad, and a share of the others in turn) and hashes again only what moved.
Now and then it hashes all weights although nothing seems to have moved, for writes on a device that bypass
torch's version counters.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchcache.keys.code import walk_code
from torchcache.keys.collectives import Talks
from torchcache.keys.collector import Parts
from torchcache.keys.digest import digest_parts
from torchcache.keys.fast.mode import ambient_reason, current_mode, differing_settings, setting_parts
from torchcache.keys.key_parts import Part
from torchcache.keys.moves import MOST_KEPT, Move, moves_of, path_of, shown_value, top_of
from torchcache.keys.ranks import has_other_ranks, rank_and_size
from torchcache.keys.snapshot import Snapshot
from torchcache.keys.tensor_digest import encode_tensor
from torchcache.keys.training_flags import are_read
from torchcache.keys.walked import CodeWalk
from torchcache.keys.weights import Contents
from torchcache.report.reasons import Reason

#: A changed fingerprint this many calls in a row means state that changes at every call.
_RESTLESS_CALLS = 3

#: How many states are remembered as known: switching between them (train and eval) is not restless.
_RECENT_FINGERPRINTS = 64

#: A state that other ranks take part in is looked at again only after this many calls: sharded weights change at every
#: call, and nothing is cached.
_CROSSING_CALLS = 100

#: All weights are hashed again after this many calls, but for at most 1 % of the time.
_AUDIT_CALLS = 1000
_AUDIT_SHARE = 0.01

#: Each walk can reveal more code to walk. Stop after this many rounds.
MOST_ROUNDS = 4


class StateTracker:
    """The state that shapes what one module, a method of one object, or one function returns.

    Not thread-safe: its owner calls it under a lock.

    Args:
        instance: The module or object whose state counts, weakly: it must not live for its cache; None for a
            function.
        is_inside: Whether calls of the module itself, with its hooks, may come from inside what is cached, as
            they may from a method.

    Attributes:
        ignored: What does not count: attributes, globals and closure variables by their path.
    """

    def __init__(self, instance: weakref.ref[Any] | None, *, is_inside: bool = False) -> None:
        self._instance = instance
        self._is_inside = is_inside
        self.ignored: frozenset[str] = frozenset()
        self._walk: CodeWalk | None = None
        self._roots: list[object] = []
        self._salt = b""
        self._asks_rank = False
        self._reaches_ranks = False
        self._collectives: list[str] = []
        self._snapshot: Snapshot | None = None
        self._crosses = False  # whether other ranks take part in a call
        self._hidden_reason: Reason | None = None  # what of state or code cannot be seen
        self._weights = b""
        self._digests: list[bytes | None] = []  # of the weights that were hashed
        self._hashed_marks: object = None  # of the weights that were hashed
        self._contents: Contents | None = None  # None: nothing was hashed that the state could have moved from
        self._hashed_bytes = 0  # of inputs, since the last look
        self._has_opaque_weights = False
        self._fingerprint = b""
        self._moved_to: Snapshot | None = None  # the look that showed that the state had moved
        self._moves: list[Move] = []
        self._mode: tuple[object, ...] = ()
        self._ambient_reason: Reason | None = None
        self._recent: OrderedDict[bytes, None] = OrderedDict()
        self._restless = 0
        self._force = False
        self._crossing_calls = 0
        self._calls_since_hash = 0
        self._hashed_at = 0.0
        self._look_seconds = 0.0

    # -- the code that counts ----------------------------------------------------------------------------------------

    def walk(self, target: type | Callable[..., object], held: Sequence[object] = ()) -> tuple[CodeWalk, list[object]]:
        """Walk from a target and from the code that the state holds, until neither leads to more.

        Args:
            target: The class or function whose code runs.
            held: Code that is held elsewhere, to start from as well.

        Returns:
            The last walk, and the code of the state that it started from.
        """
        roots = [*held, *self._take(CodeWalk()).code]
        walk = walk_code(target, roots)
        for _ in range(MOST_ROUNDS):
            by_id = {id(code): code for code in (*held, *self._take(walk).code)}
            found = list(by_id.values())
            if found == roots:
                break
            roots = found
            walk = walk_code(target, roots)
        return walk, roots

    def follow(self, walk: CodeWalk | None, roots: list[object], salt: bytes, talks: Talks) -> None:
        """Look at the state with the eyes of another code walk from now on.

        Args:
            walk: What the code walk found; ``None`` leaves out weights, plain state and globals, so that
                only training flags and mode count (for ``persistent_module_hash``).
            roots: The code of the state that the walk started from.
            salt: The front of every fingerprint: the module hash.
            talks: What the code has to do with other ranks, also where ``walk`` is left out.
        """
        self._walk = walk
        self._roots = roots
        self._salt = salt
        self._asks_rank = talks.asks_rank
        self._reaches_ranks = talks.reaches
        self._collectives = sorted(talks.collectives)
        self._see(None)

    @property
    def code_has_moved(self) -> bool:
        """Whether the state last seen holds other functions or classes than the walk was told of."""
        if self._walk is None or self._snapshot is None:
            return False
        return self._snapshot.code != self._roots or self._walk.has_changed()

    # -- what was seen last --------------------------------------------------------------------------------------------

    @property
    def bypass_reason(self) -> Reason | None:
        """Why a call cannot be cached in the state last seen, or None."""
        if self._ambient_reason:
            return self._ambient_reason
        # Before what a rank's own state says: all ranks must come to the same.
        if self._crosses and has_other_ranks():
            return Reason.COLLECTIVES
        if self._hidden_reason is not None:
            return self._hidden_reason
        found = self._snapshot.found.reason if self._snapshot else None
        if not self._fingerprint:  # what a batch norm in training mode changes, it changes for that reason
            return found or Reason.STATE_CHANGES_AT_EVERY_CALL
        return Reason.OPAQUE_WEIGHTS if self._has_opaque_weights else found

    @property
    def crossings(self) -> list[str]:
        """What a call in the state last seen does together with other ranks, if there are any."""
        return self._collectives + (self._snapshot.found.crossings if self._snapshot else [])

    @property
    def entropy(self) -> tuple[str, ...]:
        """What the code may draw random numbers from that no seed decides."""
        return () if self._walk is None else self._walk.draws.sources

    @property
    def unseen(self) -> list[str]:
        """Operators that the code may call and of which it is not known what runs."""
        return [] if self._walk is None else self._walk.unseen

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters last seen, in the order of the module tree."""
        return self._snapshot.parameters if self._snapshot else []

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter last seen required grad."""
        return self._snapshot is not None and self._snapshot.requires_grad

    @property
    def whole_bytes(self) -> int:
        """How many bytes of weights are compared at each call, all of them."""
        return 0 if self._contents is None else self._contents.whole_bytes

    @property
    def opaque(self) -> list[tuple[str, str]]:
        """Where the state last seen holds something that cannot be seen, and of what type."""
        return self._snapshot.found.opaque if self._snapshot else []

    @property
    def generators(self) -> list[object]:
        """The random number generators that the state last seen leads to."""
        return self._snapshot.found.generators if self._snapshot else []

    @property
    def sets_generators(self) -> bool:
        """Whether the code may put a random number generator back as it was."""
        return self._walk is not None and self._walk.sets_generators

    @property
    def unknown_names(self) -> dict[str, list[str]]:
        """Names that were to be ignored and are not in the state last seen, each with those that are there."""
        if self._snapshot is None:
            return {}
        there = sorted(self._snapshot.found.paths)
        return dict.fromkeys(sorted(self.ignored - self._snapshot.found.ignored), there)

    @property
    def has_inner_hooks(self) -> bool:
        """Whether inner modules have forward hooks, which do not run on hits."""
        return self._snapshot is not None and self._snapshot.found.has_inner_hooks

    def marks(self) -> object:
        """Return something that differs, under ``==``, once a weight was changed in a way that torch counts.

        Or in a way that the last look at the state noticed.
        """
        if self._snapshot is None:
            return None
        return self._snapshot.moved_marks(), self._weights

    # -- at each call ----------------------------------------------------------------------------------------------

    def note_hashed(self, n_bytes: int) -> None:
        """Note that a call hashed so many bytes of its inputs: the next one looks at the more weights."""
        self._hashed_bytes = n_bytes

    def refresh(self) -> None:
        """Hash everything at the next call, whatever the comparison says."""
        self._force = True

    def fingerprint(self) -> bytes:
        """Return the 16 bytes that name the present state; ``bypass_reason`` is then up to date.

        Empty while the state changes at every call: it is hashed again once it stood still for a call.
        """
        if self._crosses and self._snapshot is not None and self._crossing_calls and has_other_ranks():
            self._crossing_calls -= 1
            return self._fingerprint
        self._crossing_calls = _CROSSING_CALLS

        self._calls_since_hash += 1
        self._ambient_reason = ambient_reason()
        if self._calls_since_hash >= _AUDIT_CALLS and self._may_audit():
            self._force = True
        if self._force or self.moved():
            return self._look_again()
        if not self._fingerprint:
            self._hash_weights()
            return self._combine()
        self._restless = 0
        return self._fingerprint

    def moved(self) -> bool:
        """Tell whether the state differs from the one that ``fingerprint`` last looked at.

        What looks different is looked at again in full: an attribute that does not count may have come
        or gone, or an equal value may have taken another's place.
        """
        self._moved_to = None
        if self._snapshot is None:
            return True
        mode = self._current_mode()
        if mode != self._mode:
            self._moves = [Move(name, "setting") for name in differing_settings(self._mode, mode)]
            return True
        if self._snapshot.looks_moved():
            now = self._take(self._walk)
            if not self._stands_still(now):
                self._moved_to = now
                return True
        if self._contents is None:
            return False
        hashed_bytes = self._hashed_bytes
        self._hashed_bytes = 0
        if not self._contents.have_moved(hashed_bytes):
            return False
        self._moves = []  # which of them, the next look finds out
        return True

    def _stands_still(self, now: Snapshot, *, follows: bool = True) -> bool:
        """Tell whether another look saw what the last one saw.

        Hooks such as those of the old ``weight_norm`` and ``prune`` make a tensor anew at each call: it has not moved
        if it holds the same bytes.

        Args:
            now: The other look.
            follows: Whether to compare with it from now on, if it did.
        """
        before, contents = self._snapshot, self._contents
        assert before is not None
        others: Contents | None = None
        replaced = [] if now.is_same(before) else now.replaced_since(before)
        if replaced is None:
            return False
        if replaced:
            if contents is None or self._has_opaque_weights:
                return False
            tensors = [now.tensors[number] for number in replaced]
            others = Contents(tensors)
            digests = list(map(encode_tensor, tensors, others.leaves_of_values(tensors)))
            if digests != [self._digests[number] for number in replaced]:
                return False
        if not follows:
            return True
        self._see(now)
        if contents is not None and others is not None:
            contents.take(replaced, others, now.tensors)
            self._hashed_marks = now.seen_weights()
        if contents is not None:
            contents.follow(now.tensors)
        return True

    def key_parts(self) -> list[Part]:
        """Return the parts of the state last seen, each with its bytes or a digest."""
        if self._snapshot is None:
            return []
        found = self._snapshot.found
        parts = setting_parts(self._mode)
        for (path, _), digest in zip(found.named_tensors, self._digests, strict=False):
            parts.append((f"weights:{path}", digest or b""))
        tops: set[str] = set()
        for name, value in found.parts:
            if name.startswith("name "):
                parts.append((f"name:{path_of(name)}", value))
            elif not name.startswith(("_parameters ", "_buffers ")):  # the weights say it
                parts.append((f"state:{name}", value))
            tops.add(path_of(name))
        # What lies inside the attributes of submodules is not told apart.
        for path, value in found.inner.items():
            if top_of(path) in tops:
                parts.append((f"inside:{path}", value))
        return parts

    @property
    def moves(self) -> list[Move]:
        """What moved when the state moved last; nothing if it never did, or it is not known what it was."""
        before, now = self._snapshot, self._moved_to
        if before is not None and now is not None:  # since the last look
            return self._moves_between(before, now, self._mode, [])
        return self._moves

    def _moves_between(
        self, before: Snapshot, now: Snapshot, mode: tuple[object, ...], digests: Sequence[bytes | None]
    ) -> list[Move]:
        """Return what differs between two looks.

        Args:
            before: The earlier look.
            now: The later one.
            mode: In force at the earlier one.
            digests: Of the weights at the earlier one, as far as those of the later one are known.
        """
        moves = [Move(name, "setting") for name in differing_settings(mode, self._current_mode())]
        moves += moves_of(before.found.parts, now.found.parts, before.found.inner, now.found.inner)
        paths = now.weight_paths()
        if paths != before.weight_paths():
            return moves  # other parameters: the parts say so
        for number in now.written_since(before):
            if not digests:
                moves.append(Move(paths[number], "weight"))
            elif digests[number] != self._digests[number]:
                then, after = shown_value(digests[number]), shown_value(self._digests[number])
                moves.append(Move(paths[number], "weight", then, after))
        return moves[:MOST_KEPT]

    def describe(self) -> Parts:
        """Return the parts of the fingerprint by name, each with its digest, from a new look at everything."""
        found = self._take(self._walk).found
        parts: Parts = [("mode", repr(self._current_mode()).encode())]
        for name, tensor in found.named_tensors:
            parts.append((f"weights {name}", encode_tensor(tensor) or b"opaque"))
        for name, value in found.parts:
            parts.append((f"state {name}", value))
        return [(name, digest_parts([value])) for name, value in parts]

    @property
    def weights(self) -> bytes:
        """The digest of the weights that were hashed last."""
        return self._weights

    @property
    def is_in_training(self) -> bool:
        """Whether a module last seen is in training mode."""
        return self._snapshot is not None and any(self._snapshot.found.flags.values())

    def only_unread_flags_moved(self) -> bool:
        """Tell whether all that moved since the last look are training flags, of modules whose flag no code reads."""
        before = self._snapshot
        if before is None or self._current_mode() != self._mode:
            return False
        flags = before.found.flags
        now = self._take(self._walk, flags)
        moved = [number for number, flag in now.found.flags.items() if flags.get(number) != flag]
        # The same in all, had they not been set.
        if not moved or now.found.flags.keys() != flags.keys() or not self._stands_still(now, follows=False):
            return False
        classes = now.found.classes
        return not are_read([classes[number] for number in moved], classes.values(), self._walk)

    def _take(self, walk: CodeWalk | None, flags: Mapping[int, bool] | None = None) -> Snapshot:
        root = None if self._instance is None else self._instance()
        return Snapshot(root, walk, is_inside=self._is_inside, ignored=self.ignored, flags=flags)

    def _see(self, snapshot: Snapshot | None) -> None:
        """Compare with another look from now on, and note what of it is asked at each call."""
        self._snapshot = snapshot
        self._crosses = bool(self.crossings)
        if self.opaque:
            self._hidden_reason = Reason.OPAQUE_STATE
        elif self.unseen:
            self._hidden_reason = Reason.OPAQUE_CODE
        elif self.entropy:
            self._hidden_reason = Reason.RANDOM_NUMBERS
        else:
            self._hidden_reason = None

    def _current_mode(self) -> tuple[object, ...]:
        """Return the mode, and the rank for code that asks for it: its results are each rank's own.

        Code that reaches torch.distributed at all may do in a job what it does not do alone.
        """
        rank = rank_and_size() if self._asks_rank else ()
        has_others = self._reaches_ranks and has_other_ranks()
        if not rank and not has_others:
            return current_mode()
        return (*current_mode(), rank, has_others)

    def _look_again(self) -> bytes:
        """Take a snapshot, and hash the weights if they may have moved too."""
        started = time.monotonic()
        before, mode, digests = self._snapshot, self._mode, self._digests
        fingerprint = self._fingerprint
        snapshot = self._take(self._walk)
        self._mode = self._current_mode()
        self._moved_to = None
        self._see(snapshot)
        if self._restless >= _RESTLESS_CALLS and not self._force:
            self._contents = None
            self._fingerprint = b""
            self._note_moves(before, mode, [])
            return b""

        contents = self._contents if snapshot.seen_weights() == self._hashed_marks else None
        if contents is not None:
            contents.follow(snapshot.tensors)
        if self._force or contents is None or contents.have_moved():
            self._hash_weights()
        self._force = False
        self._look_seconds = time.monotonic() - started
        if self._combine() != fingerprint:
            self._note_moves(before, mode, digests)
        return self._fingerprint

    def _note_moves(self, before: Snapshot | None, mode: tuple[object, ...], digests: Sequence[bytes | None]) -> None:
        """Note what moved since an earlier look."""
        if before is not None and self._snapshot is not None:
            are_comparable = len(digests) == len(self._digests) == len(self._snapshot.tensors)
            self._moves = self._moves_between(before, self._snapshot, mode, digests if are_comparable else [])

    def _combine(self) -> bytes:
        """Make the fingerprint; one not seen lately counts towards a state that never stands still."""
        assert self._snapshot is not None
        parts = [self._salt, repr(self._mode).encode(), self._snapshot.plain, self._weights]
        self._fingerprint = digest_parts(parts)
        is_known = self._fingerprint in self._recent or not self._recent
        self._restless = 0 if is_known else self._restless + 1
        self._recent[self._fingerprint] = None
        self._recent.move_to_end(self._fingerprint)
        if len(self._recent) > _RECENT_FINGERPRINTS:
            self._recent.popitem(last=False)
        return self._fingerprint

    def _hash_weights(self) -> None:
        assert self._snapshot is not None
        tensors = self._snapshot.tensors
        self._contents = Contents(tensors)
        self._digests = list(map(encode_tensor, tensors, self._contents.leaves_of_values(tensors)))
        self._has_opaque_weights = None in self._digests
        self._weights = digest_parts(digest or b"" for digest in self._digests)
        self._hashed_marks = self._snapshot.seen_weights()
        self._hashed_at = time.monotonic()
        self._calls_since_hash = 0

    def _may_audit(self) -> bool:
        """Tell whether hashing all weights again now would stay within its share of the time."""
        return time.monotonic() - self._hashed_at > self._look_seconds / _AUDIT_SHARE
