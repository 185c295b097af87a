"""What a process has accepted and not committed, where the processes that it descends from can see it.

torch and multiprocessing end daemonic workers by a signal when the program ends, at which nothing runs in a worker any
more. So the end of the program waits until its workers have committed what they accepted, and ``flush_all`` does.

Each process keeps its backlog in a file without a name (a memfd). Whoever looks finds its descendants, and the files
that they have open, under ``/proc``. So nothing has to be handed to a worker, by whatever start method and library it
came to be, nobody has to answer, and nothing is left of a process that was killed.

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torchcache import exits, starters

logger: logging.Logger = logging.getLogger(__name__)

#: How long the end of a process waits for what was accepted, unless an option says so; torch gives a worker five
#: seconds to end.
DEFAULT_FLUSH_SECONDS, WORKER_FLUSH_SECONDS = 10.0, 4.0

#: How often whoever waits looks at the backlogs: at first, and at last.
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.001, 0.02

#: How often the children of a process are listed: a list that is made while one of them ends may lack others.
_LISTINGS = 2

_NAME = "torchcache-backlog"
_CLOSE_ON_EXEC = 1  # MFD_CLOEXEC
_NUMBERS = struct.Struct("5q")


@dataclass(slots=True)
class Wait:
    """How long callers may be made to wait for what they wrote: the longest that any of them said."""

    longest_seconds: float = 0.0  # of those that said so
    is_default: bool = False  # whether one of them left it to us

    def add(self, seconds: float | None) -> None:
        """Count one more; None leaves it to us."""
        if seconds is None:
            self.is_default = True
        else:
            self.longest_seconds = max(self.longest_seconds, seconds)

    def seconds(self) -> float:
        """Return how long it is in this process."""
        return max(self.longest_seconds, default_flush_seconds()) if self.is_default else self.longest_seconds


def default_flush_seconds() -> float:
    """Return how long a wait for the writer is in this process, if no option says so."""
    return WORKER_FLUSH_SECONDS if starters.is_child() else DEFAULT_FLUSH_SECONDS


class Backlog:
    """The backlog of this process. Who changes it holds a lock of their own.

    Attributes:
        wait: How long the end of the program may wait for it.
    """

    def __init__(self) -> None:
        self.wait: Wait = Wait()
        self._accepted = self._settled = self._rows = 0
        self._memory: mmap.mmap | None = None  # of the file, which it keeps open
        self._is_broken = False

    def accept(self, rows: int) -> None:
        """Count one job that was accepted, and its rows."""
        self._accepted += 1
        self._rows += rows
        self._show()

    def settle(self, jobs: int, rows: int) -> None:
        """Count jobs that are committed or given up, in the order in which they were accepted."""
        self._settled += jobs
        self._rows -= rows
        self._show()

    def renew(self) -> None:
        """Start without a backlog in a forked child; the parent's file is closed here and nothing else."""
        self.__init__()  # type: ignore[misc] # every attribute is replaced on purpose

    def _show(self) -> None:
        """Write the numbers where others can read them."""
        if self._memory is None:
            if self._is_broken:
                return
            try:
                self._memory = _make_memory()
            except (OSError, AttributeError) as error:
                self._is_broken = True
                logger.warning(
                    "what this process has not committed when its program ends is lost if it is a worker, since the "
                    "program cannot see it: %s",
                    error,
                )
                return
        asked = int(self.wait.longest_seconds * 1e6)
        _NUMBERS.pack_into(self._memory, 0, self._accepted, self._settled, self._rows, asked, self.wait.is_default)


def _make_memory() -> mmap.mmap:
    descriptor = _make_file(f"{_NAME}-{os.getpid()}")
    try:
        os.pwrite(descriptor, bytes(_NUMBERS.size), 0)  # now: a page that finds no memory later ends the process
        return mmap.mmap(descriptor, _NUMBERS.size)
    finally:
        os.close(descriptor)


def _make_file(name: str) -> int:
    """Make a file in memory that nobody inherits past an exec; return its descriptor.

    Raises:
        OSError: If the system refuses.
        AttributeError: If it has none such.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    # Python was built for an older C library than it runs with, as that of conda is.
    descriptor: int = ctypes.CDLL(None, use_errno=True).memfd_create(name.encode(), _CLOSE_ON_EXEC)
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor


@dataclass(slots=True)
class Debt:
    """What a descendant had accepted and not committed when it was looked at.

    Attributes:
        path: Of its backlog.
        target: How many jobs it has settled when that is committed.
        rows: How many rows it has not committed now.
        wait: How long the end of the program may wait for it.
    """

    path: str
    target: int
    rows: int
    wait: Wait

    def is_open(self) -> bool:
        """Look again: is the process there, and has it still to commit some of that?"""
        numbers = _read(self.path)
        if numbers is None:
            return False
        _, settled, self.rows, _, _ = numbers
        return settled < self.target


def debts_of_descendants() -> list[Debt]:
    """Return what the processes that descend from this one have accepted and not committed.

    Costs one system call without children, and else 0.2 to 0.4 ms for each process that has some tens of open files.
    """
    debts = []
    for process_id in _descendants():
        path = _backlog_of(process_id)
        numbers = None if path is None else _read(path)
        if path is None or numbers is None:
            continue
        accepted, settled, rows, asked, is_default = numbers
        if settled < accepted:
            debts.append(Debt(path, accepted, rows, Wait(asked / 1e6, bool(is_default))))
    return debts


def await_debts(debts: list[Debt], timeout_seconds: float) -> list[Debt]:
    """Wait until debts are settled, or their processes have ended; return those that are not after ``timeout_seconds``.

    A process that commits nothing, since it was stopped or the disk is stuck, costs the time and nothing else.
    """
    deadline = time.monotonic() + timeout_seconds
    pause = _FIRST_LOOK_SECONDS
    while True:
        debts = [debt for debt in debts if debt.is_open()]
        left = deadline - time.monotonic()
        if not debts or left <= 0:
            return debts
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LAST_LOOK_SECONDS)


def _await_descendants(spent_seconds: float) -> None:
    """Let the end of this process wait for its workers, which it may end by a signal next. Says what may be lost."""
    debts = debts_of_descendants()
    if not debts:
        return
    timeout_seconds = max(debt.wait.seconds() for debt in debts)
    late = await_debts(debts, timeout_seconds - spent_seconds)
    rows = sum(debt.rows for debt in late)
    if rows:
        logger.warning(
            "%d rows of worker processes were not committed within flush_timeout_seconds=%g at the end of the program; "
            "those of workers that end with it are lost, and will be computed again",
            rows, timeout_seconds,
        )  # fmt: skip


# -- what /proc shows ---------------------------------------------------------------------------------------------


def _descendants() -> list[int]:
    """Return the ids of the processes that this one started, that those started, and so on."""
    if not _has_children():
        return []
    found: dict[int, None] = {}
    waiting = [os.getpid()]
    while waiting:
        process_id = waiting.pop()
        for _ in range(_LISTINGS):
            for child in _children(process_id):
                if child not in found:
                    found[child] = None
                    waiting.append(child)
    return list(found)


def _has_children() -> bool:
    """Tell whether this process has children, and leave those alone that have ended."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _children(process_id: int) -> Iterator[int]:
    """Yield the ids of the children of each thread of a process, as far as they can be seen."""
    tasks = f"/proc/{process_id}/task"
    with contextlib.suppress(OSError):  # it has ended
        for thread_id in os.listdir(tasks):
            with contextlib.suppress(OSError):  # the thread has ended
                descriptor = os.open(f"{tasks}/{thread_id}/children", os.O_RDONLY)
                with open(descriptor, "rb") as file:
                    yield from map(int, file.read().split())


def _backlog_of(process_id: int) -> str | None:
    """Return the path of a process's backlog; None if it has none, or is not ours to look at."""
    own = f"/memfd:{_NAME}-{process_id} "  # and not one that it inherited; the system adds "(deleted)"
    folder = f"/proc/{process_id}/fd"
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(folder):
            path = f"{folder}/{descriptor}"
            with contextlib.suppress(OSError):
                if os.readlink(path).startswith(own):
                    return path
    return None


def _read(path: str) -> tuple[int, ...] | None:
    """Return the numbers of a backlog; None if its process has ended."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        data = os.pread(descriptor, _NUMBERS.size, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return _NUMBERS.unpack(data) if len(data) == _NUMBERS.size else None


exits.at_each_exit(_await_descendants)
