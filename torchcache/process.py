"""What a fork and an exit mean, all of it; nobody else asks for a process id.

Fork: LMDB's handles, our locks and the writer thread must not be in use at that moment, or the child
inherits them half-way. Before a fork the writer is parked, a gate in front of every LMDB transaction
is closed once nobody is inside, the environments are closed (each side opens its own at next use: an
environment closed by the child would free the parent's reader slots), and the locks are taken. All
waits are bounded; if something did not come to rest in time, the child never touches it.

Exit: callbacks run at a normal end of the program and of multiprocessing's children, where Python up
to 3.12 does not run ``atexit``.

This module does not import torch.
"""

from __future__ import annotations

import atexit
import functools
import logging  # noqa: F401 - registers its own fork hooks before ours, so that ours run first
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import util as multiprocessing_util
from types import TracebackType
from typing import Protocol

import filelock  # noqa: F401 - as logging

#: How long a fork waits for transactions and for the writer to park before the child goes without them.
FORK_DRAIN_SECONDS = 5.0
#: How long it waits for one lock; none is ever held for longer than a copy or a hash.
FORK_LOCK_SECONDS = 2.0

#: Finalizers of multiprocessing's children run from high to low; torch's own pools have lower ones.
_EXIT_PRIORITY = 100


def is_child() -> bool:
    """Tell whether this process was started by multiprocessing: a DataLoader worker, a spawned rank."""
    return multiprocessing.parent_process() is not None


def generation() -> int:
    """Return how many forks lie between the program's first process and this one."""
    return _generation


class ForkLock:
    """A lock that survives a fork: taken before it, free in parent and child after it.

    Args:
        on_broken: Called in the child if another thread of the parent held the lock at the fork, so that
            what it guards may be half-changed.
    """

    __slots__ = ("__weakref__", "_lock", "_on_broken")

    def __init__(self, on_broken: Callable[[], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._on_broken = None if on_broken is None else _weak_callback(on_broken)
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def acquire(self, timeout_seconds: float) -> bool:
        """Take the lock, waiting at most ``timeout_seconds``."""
        return self._lock.acquire(timeout=timeout_seconds)

    def release(self) -> None:
        self._lock.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def take_for_fork(self) -> bool:
        return self._lock.acquire(timeout=FORK_LOCK_SECONDS)

    def free_in_parent(self, *, taken: bool) -> None:
        if taken:
            self._lock.release()

    def free_in_child(self, *, taken: bool) -> None:
        self._lock = threading.Lock()
        callback = self._on_broken and self._on_broken()
        if not taken and callback:
            callback()


class Gate:
    """Counts the threads inside LMDB, so that a fork can wait until nobody is."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0  # guarded by _condition
        self._closers = 0  # guarded by _condition; who keeps it closed

    def enter(self) -> None:
        """Go in for one transaction; user code must not run before ``leave``.

        Whoever closes the gate does so for ``FORK_DRAIN_SECONDS`` at most; a lookup outwaits it.
        """
        with self._condition:
            self._condition.wait_for(lambda: not self._closers, timeout=2 * FORK_DRAIN_SECONDS)
            self._inside += 1

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            if self._closers:
                self._condition.notify_all()

    def close(self, timeout_seconds: float) -> bool:
        """Let nobody in until ``open``; return whether everybody left in time."""
        with self._condition:
            self._closers += 1
            return self._condition.wait_for(lambda: self._inside == 0, timeout=timeout_seconds)

    def open(self) -> None:
        with self._condition:
            self._closers -= 1
            self._condition.notify_all()

    @contextmanager
    def alone(self, timeout_seconds: float) -> Iterator[bool]:
        """Be the only one inside, to close an environment; yields whether everybody left in time."""
        try:
            yield self.close(timeout_seconds)
        finally:
            self.open()

    def renew(self) -> None:
        """Start afresh in a forked child."""
        self.__init__()  # type: ignore[misc] # every attribute is replaced on purpose


class ForkListener(Protocol):
    """What must come to rest for a fork: the writer and the open environments."""

    def before_fork(self, deadline: float) -> bool:
        """Come to rest by ``deadline`` (of ``time.monotonic``); return whether that succeeded."""

    def at_rest(self) -> None:
        """Close what must not be inherited; called when everybody rests and nobody is inside the gate."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self, *, is_clean: bool) -> None:
        """Start afresh; unless ``is_clean``, never touch what was inherited."""


gate = Gate()

_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()
_listeners: weakref.WeakSet[ForkListener] = weakref.WeakSet()
_one_fork = threading.RLock()
_taken: dict[ForkLock, bool] = {}
_is_clean = True
_generation = 0
_exit_callbacks: dict[Callable[[], None], bool] = {}
_exit_pid = 0


def listen_to_forks(listener: ForkListener) -> None:
    """Call ``listener`` around every fork, as long as it lives."""
    _listeners.add(listener)


def at_exit(callback: Callable[[], None], *, last: bool = False) -> None:
    """Call ``callback`` once when this process ends in an orderly way; bounded by the callback itself.

    A forked child does not inherit it: what the parent registered is the parent's to do.

    Args:
        callback: What to call.
        last: Call it after those that are not last, whoever registered first.
    """
    global _exit_pid  # noqa: PLW0603 - atexit is inherited through a fork, so who registered has to be known
    pid = os.getpid()
    if _exit_pid != pid:
        _exit_pid = pid
        _exit_callbacks.clear()
        run = functools.partial(_run_exit_callbacks, pid)
        atexit.register(run)
        if is_child():
            multiprocessing_util.Finalize(None, run, exitpriority=_EXIT_PRIORITY)
    _exit_callbacks[callback] = last


def _run_exit_callbacks(pid: int) -> None:
    if os.getpid() != pid or _exit_pid != pid:
        return
    for callback in sorted(_exit_callbacks, key=_exit_callbacks.__getitem__):
        if _exit_callbacks.pop(callback, None) is not None:
            callback()


def _weak_callback(callback: Callable[[], None]) -> Callable[[], Callable[[], None] | None]:
    """Hold a bound method weakly: a lock must not keep its owner alive."""
    return weakref.WeakMethod(callback) if hasattr(callback, "__self__") else lambda: callback


def _before_fork() -> None:
    global _is_clean  # noqa: PLW0603 - fork hooks have no other place for what one tells the next
    _one_fork.acquire(timeout=2 * FORK_DRAIN_SECONDS)
    deadline = time.monotonic() + FORK_DRAIN_SECONDS
    rested = [listener.before_fork(deadline) for listener in list(_listeners)]
    drained = gate.close(max(0.0, deadline - time.monotonic()))
    _is_clean = drained and all(rested)
    if _is_clean:
        for listener in list(_listeners):
            listener.at_rest()
    _taken.clear()
    for lock in list(_locks):
        _taken[lock] = lock.take_for_fork()


def _after_fork_in_parent() -> None:
    for lock, taken in _taken.items():
        lock.free_in_parent(taken=taken)
    _taken.clear()
    gate.open()
    for listener in list(_listeners):
        listener.after_fork_in_parent()
    _one_fork.release()


def _after_fork_in_child() -> None:
    global _one_fork, _generation  # noqa: PLW0603 - the parent's other threads may have held the lock
    _generation += 1
    for lock in list(_locks):
        lock.free_in_child(taken=_taken.get(lock, False))
    _taken.clear()
    gate.renew()
    _one_fork = threading.RLock()
    for listener in list(_listeners):
        listener.after_fork_in_child(is_clean=_is_clean)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
