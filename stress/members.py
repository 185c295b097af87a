"""The processes of a scenario: forked by the program, ended by their own ids."""

from __future__ import annotations

import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stress.values import ViolationError
from stress.verdict import Run

#: A killed process is gone by then, unless the kernel keeps it.
_DEATH_SECONDS = 30.0


def say_into(path: Path) -> None:
    """Let whatever this process and the libraries in it print from now on be appended to a file."""
    with path.open("ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)


class Members:
    """Children of this program; ``close`` kills those that still run.

    Args:
        run: Where a member that fails tells why.
        most_seconds: A member ends itself then at the latest, whatever becomes of the program.
    """

    def __init__(self, run: Run[Any], most_seconds: float) -> None:
        self._run = run
        self._most_seconds = most_seconds
        self._running: set[int] = set()
        self._struck: dict[int, float] = {}  # when

    def close(self) -> None:
        """Kill whoever still runs."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        for pid in self._running:
            os.waitpid(pid, 0)

    def start(self, work: Callable[..., object], *args: Any) -> int:
        """Run ``work(*args)`` in a child; returns its process id."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # NumPy has threads of its own; they do no harm here
            pid = os.fork()
        if pid:
            self._running.add(pid)
            return pid
        status = 9
        try:
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
                signal.signal(name, signal.SIG_DFL)
            signal.alarm(int(self._most_seconds) + 1)
            work(*args)
            status = 0
        except BaseException as error:
            self._run.note(error)
        finally:
            os._exit(status)

    def kill(self, pid: int, look: Callable[[], None] = lambda: None) -> None:
        """Kill a member, whatever it is doing; ``look`` is called every 10 ms until it is gone.

        Raises:
            ViolationError: If it had ended already.
        """
        self.strike(pid)
        self._check_death(pid, self._wait(pid, _DEATH_SECONDS, look))

    def strike(self, pid: int) -> None:
        """Kill a member and do not wait until it is gone: on a full machine that takes its time."""
        os.kill(pid, signal.SIGKILL)
        self._struck[pid] = time.monotonic()

    def is_gone(self, pid: int) -> bool:
        """Tell whether a member that was struck is gone; once it is, it must not be asked again.

        Raises:
            ViolationError: If it had ended already, or does not go.
        """
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            self._running.remove(pid)
            self._check_death(pid, os.waitstatus_to_exitcode(status))
        elif time.monotonic() - self._struck[pid] > _DEATH_SECONDS:
            raise ViolationError("hang", f"member {pid} was killed and is still there after {_DEATH_SECONDS} s")
        return bool(gone)

    def _check_death(self, pid: int, status: int) -> None:
        del self._struck[pid]
        if status != -signal.SIGKILL:
            raise ViolationError("ended", f"a member ended with status {status} before it was killed")

    def join(self, pid: int, timeout_seconds: float, look: Callable[[], None] = lambda: None) -> None:
        """Wait for a member that comes to its end; ``look`` is called every 10 ms.

        Raises:
            ViolationError: If it does not end in time, or not well.
        """
        status = self._wait(pid, timeout_seconds, look)
        if status:
            raise ViolationError("ended", f"a member ended with status {status}")

    def _wait(self, pid: int, timeout_seconds: float, look: Callable[[], None]) -> int:
        deadline = time.monotonic() + timeout_seconds
        descriptor = os.pidfd_open(pid)
        try:
            while not select.select([descriptor], [], [], 0.01)[0]:
                look()
                if time.monotonic() > deadline:
                    raise ViolationError("hang", f"member {pid} did not end within {timeout_seconds} s")
        finally:
            os.close(descriptor)
        self._running.remove(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
