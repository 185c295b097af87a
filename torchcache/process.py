"""What a fork means.

LMDB's handles, our locks and the writer thread must not be in use at that moment, or the child
inherits them half-way. Before a fork the writer is parked, a gate in front of every LMDB transaction
lets nobody in and waits for those inside, the locks are taken (so that nobody is opening an environment), and the
environments are closed (each side opens its own at next use: an environment closed by the child would free
the parent's reader slots). All waits are bounded; what did not come to rest in time stays open, and the
child never touches it.

One thread forks at a time: from Python 3.12 on filelock makes ``os.fork()`` raise while another thread is
inside one, and it asks before any hook of ours could make the second wait. So an audit hook waits, which has to
be there before filelock's own.

This module does not import torch.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # what signal is made of, without its enums: a tenth of the time
import _thread
import contextlib
import logging  # noqa: F401 - registers its own fork hooks before ours, so that ours run first
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

#: How long a fork waits for transactions and for the writer to park before the child goes without them.
FORK_DRAIN_SECONDS = 5.0
#: How long it waits for one lock; none is ever held for longer than a copy or a hash.
FORK_LOCK_SECONDS = 2.0

#: How often who closes the gate looks whether anybody is still inside.
_LOOK_SECONDS = 0.02

#: So often at most handlers are set anew at the end of a fork because signals interrupt that.
_MOST_INTERRUPTIONS = 100


def generation() -> int:
    """Return how many forks lie between the program's first process and this one."""
    return _generation


def lets_threads_start() -> bool:
    """Tell whether a thread may be started at the end of a fork, in the parent.

    From Python 3.12 on ``os.fork()`` warns there of the threads that a process has; ours must not be the only one.
    """
    return sys.version_info < (3, 12) or _count_threads() > 1


def _count_threads() -> int:
    """Return how many threads this process has, also those that Python knows nothing of; 0 if nothing tells."""
    try:
        return len(list(os.scandir("/proc/self/task")))
    except OSError:
        return 0


class ForkLock:
    """A lock that survives a fork: taken before it, free in parent and child after it.

    Attributes:
        raw: What to say ``with`` to: a lock of C, which Ctrl-C never leaves taken. An ``__enter__`` in Python
            can be interrupted when the lock is already held.

    Args:
        on_broken: Called in the child if another thread of the parent held the lock at the fork, so that
            what it guards may be half-changed.
    """

    __slots__ = ("__weakref__", "_on_broken", "raw")

    def __init__(self, on_broken: Callable[[], None] | None = None) -> None:
        self.raw: threading.Lock = threading.Lock()
        self._on_broken = None if on_broken is None else _weak_callback(on_broken)
        _locks.add(self)

    def take_for_fork(self) -> bool:
        return self.raw.acquire(timeout=FORK_LOCK_SECONDS)

    def free_in_parent(self, *, taken: bool) -> None:
        if taken:
            self.raw.release()

    def free_in_child(self, *, taken: bool) -> None:
        self.raw = threading.Lock()
        callback = self._on_broken and self._on_broken()
        if not taken and callback:
            callback()


class Gate:
    """Counts the threads inside LMDB, so that a fork can wait until nobody is."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._inside: set[weakref.ref[Passage]] = set()  # guarded by _mutex
        self._closers: set[object] = set()  # guarded by _mutex; who keeps it closed

    def enter(self) -> Passage:
        """Go in for one transaction; user code must not run before the passage is left.

        Whoever closes the gate does so for ``FORK_DRAIN_SECONDS`` at most; a lookup outwaits it.
        """
        passage = Passage(self)
        with self._mutex:
            if self._closers:
                self._changed.wait_for(lambda: not self._closers, timeout=2 * FORK_DRAIN_SECONDS)
            self._inside.add(passage.reference)
        return passage

    def leave(self, passage: Passage) -> None:
        """End a passage; one that was inherited through a fork has ended already."""
        with self._mutex:
            self._inside.discard(passage.reference)
            if self._closers:
                self._changed.notify_all()

    def close(self, closer: object, timeout_seconds: float) -> bool:
        """Let nobody in until the same ``closer`` opens it; return whether everybody left in time."""
        deadline = time.monotonic() + timeout_seconds
        with self._mutex:
            self._closers.add(closer)
            while self._is_anybody_inside():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _LOOK_SECONDS))  # nobody tells of a passage that was given up
            return True

    def _is_anybody_inside(self) -> bool:
        self._inside = {reference for reference in self._inside if reference() is not None}
        return bool(self._inside)

    def open(self, closer: object) -> None:
        """Take back what ``closer`` closed, if it did."""
        with self._mutex:
            self._closers.discard(closer)
            self._changed.notify_all()

    @contextmanager
    def alone(self, timeout_seconds: float) -> Iterator[bool]:
        """Be the only one inside, to close an environment; yields whether everybody left in time."""
        closer = object()
        try:
            yield self.close(closer, timeout_seconds)
        finally:
            self.open(closer)

    def renew(self) -> None:
        """Start afresh in a forked child."""
        self.__init__()  # type: ignore[misc] # every attribute is replaced on purpose


class Passage:
    """That one thread is inside the gate; given up at the latest when nobody refers to it any more.

    So Ctrl-C at the wrong moment leaves nobody inside for ever.
    """

    __slots__ = ("__weakref__", "_gate", "reference")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.reference: weakref.ref[Passage] = weakref.ref(self)

    def leave(self) -> None:
        self._gate.leave(self)


class ForkListener(Protocol):
    """What must come to rest for a fork: the writer and the open environments."""

    def before_fork(self, deadline: float) -> bool:
        """Come to rest by ``deadline`` (of ``time.monotonic``); return whether that succeeded."""

    def at_rest(self) -> None:
        """Close what must not be inherited; everybody rests, nobody is inside the gate, all locks are taken."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Start afresh; never touch what is still open."""


gate: Gate = Gate()

_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()
_listeners: weakref.WeakSet[ForkListener] = weakref.WeakSet()
_fork_turn = threading.Lock()
_forkers: set[int] = set()  # threads that have the turn, or are waiting for it
_taken: dict[ForkLock, bool] = {}
_generation = 0


def listen_to_forks(listener: ForkListener) -> None:
    """Call ``listener`` around every fork, as long as it lives."""
    _listeners.add(listener)


def _weak_callback(callback: Callable[[], None]) -> Callable[[], Callable[[], None] | None]:
    """Hold a bound method weakly: a lock must not keep its owner alive."""
    return weakref.WeakMethod(callback) if hasattr(callback, "__self__") else lambda: callback


def _take_fork_turn() -> None:
    """Wait until no other thread is forking, for a time that a fork outwaits; then it is this thread's turn.

    Noted first: of a thread that is interrupted here, or whose fork another audit hook refuses, the next fork
    gives the turn back.
    """
    me = threading.get_ident()
    if me not in _forkers:
        _forkers.add(me)
        _fork_turn.acquire(timeout=2 * FORK_DRAIN_SECONDS)


def _give_fork_turn_back() -> None:
    me = threading.get_ident()
    if me in _forkers:
        _forkers.discard(me)
        with contextlib.suppress(RuntimeError):  # it was never taken
            _fork_turn.release()


#: Those that interrupt most come first: until they are held, what their handlers raise is lost in the hook.
_SIGNALS = sorted(
    map(int, signal.Signals),
    key=lambda number: number not in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM, signal.SIGCHLD),
)


class _HeldSignals:
    """Puts signals off whose handlers in Python could raise in the middle of a hook.

    Ctrl-C, an alarm, or what torch's data loader says there of a worker that died.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[int] = []

    def hold(self) -> None:
        """Put them off from now on, if this is the thread in which handlers run and can be set."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = _signal.getsignal(number)
            if callable(handler) and number not in self._handlers:
                self._handlers[number] = handler
                _signal.signal(number, self._note)

    def _note(self, came: int, _: object) -> None:
        self._came.append(came)

    def let_go(self, *, is_parent: bool) -> None:
        """Handle them as before; what came meanwhile comes now, to the process that was meant.

        Another thread that ends its fork lets nothing go: the main thread may be waiting for its turn.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for _ in range(_MOST_INTERRUPTIONS):
            if not self._handlers:
                break
            number, handler = next(iter(self._handlers.items()))
            try:
                _signal.signal(number, handler)
                self._handlers.pop(number, None)
            except BaseException:  # noqa: BLE001 - one that is back may raise already; it comes again, as all others
                self._came.append(number)
        came, self._came = self._came, []
        if is_parent:
            for number in dict.fromkeys(came):
                _thread.start_new_thread(_raise_soon, (number,))


def _raise_soon(number: int) -> None:
    """Let a signal come to the main thread when it has left the hook, where an exception would be lost."""
    time.sleep(0.001)
    _thread.interrupt_main(signal.Signals(number))


_held_signals = _HeldSignals()


def _before_fork() -> None:
    """Bring everything to rest; what does not come to rest stays open."""
    _held_signals.hold()
    _take_fork_turn()
    deadline = time.monotonic() + FORK_DRAIN_SECONDS
    rested = [listener.before_fork(deadline) for listener in list(_listeners)]
    drained = gate.close(_fork_turn, max(0.0, deadline - time.monotonic()))
    _taken.clear()
    for lock in list(_locks):
        _taken[lock] = lock.take_for_fork()
    if drained and all(rested):  # now nobody opens anything any more either
        for listener in list(_listeners):
            listener.at_rest()


def _after_fork_in_parent() -> None:
    for lock, taken in _taken.items():
        lock.free_in_parent(taken=taken)
    _taken.clear()
    gate.open(_fork_turn)
    for listener in list(_listeners):
        listener.after_fork_in_parent()
    _give_fork_turn_back()
    _held_signals.let_go(is_parent=True)


def _after_fork_in_child() -> None:
    global _fork_turn, _generation  # noqa: PLW0603 - fork hooks have no other place for what one tells the next
    _generation += 1
    for lock in list(_locks):
        lock.free_in_child(taken=_taken.get(lock, False))
    _taken.clear()
    gate.renew()
    _fork_turn = threading.Lock()
    _forkers.clear()
    for listener in list(_listeners):
        listener.after_fork_in_child()
    _held_signals.let_go(is_parent=False)


def _audit(
    event: str,
    _arguments: object,
    *,
    _events: frozenset[str] = frozenset({"os.fork", "os.forkpty"}),
    _take_turn: Callable[[], None] = _take_fork_turn,
) -> None:
    """See the module's docstring; defaults, since audit hooks outlive the module's own names."""
    if event in _events:
        _take_turn()


if hasattr(os, "register_at_fork"):
    if sys.version_info >= (3, 12):  # filelock's own hook exists from there on
        sys.addaudithook(_audit)
    import filelock  # noqa: F401 - its audit hook after ours, its fork hooks before

    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
