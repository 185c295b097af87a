"""Run something in another process and get to know how it ended; every wait has a bound."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class ChildFailedError(AssertionError):
    """A child raised, was killed by a signal, or did not end in time."""


def fork() -> int:
    """Fork; torch's own threads make Python 3.12 warn, which is not ours to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def child_ids() -> set[str]:
    """Return the ids of this process's children, dead ones that nobody waited for included."""
    found: set[str] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        # A thread that has ended since it was listed; another one of the process has its children.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update(path.read_text().split())
    return found


@contextlib.contextmanager
def no_child_is_left() -> Iterator[None]:
    """Check that no child of this process is started and not waited for meanwhile."""
    before = child_ids()
    yield
    assert child_ids() <= before, "a child process was left behind"


def in_child(function: Callable[..., Any], *args: Any, timeout_seconds: float = 30.0) -> Any:
    """Run ``function(*args)`` in a forked child and return its result."""
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            try:
                answer = (True, function(*args))
                status = 0
            except BaseException:  # noqa: BLE001 - told to the parent
                answer = (False, traceback.format_exc())
            with os.fdopen(writer, "wb") as stream:
                stream.write(pickle.dumps(answer))
        finally:
            os._exit(status)
    os.close(writer)
    try:
        answer = read_all(reader, timeout_seconds)
    finally:
        os.close(reader)
        ended = wait_for(pid, 5.0)
    if ended is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise ChildFailedError(f"the child did not end within {timeout_seconds} s")
    if ended < 0:
        raise ChildFailedError(f"the child was ended by {signal.Signals(-ended).name}")
    is_good, result = pickle.loads(answer) if answer else (False, "it said nothing")
    if not is_good:
        raise ChildFailedError(f"the child failed:\n{result}")
    return result


def read_all(descriptor: int, timeout_seconds: float) -> bytes:
    """Read until the other end is closed or the time is over."""
    deadline = time.monotonic() + timeout_seconds
    parts = []
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def wait_for(pid: int, timeout_seconds: float) -> int | None:
    """Return the exit status of a child (negative: the signal that ended it), None if it still runs."""
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], timeout_seconds)[0]:
            return None
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(descriptor)


def start(program: str, *args: object, **environment: str) -> subprocess.Popen[str]:
    """Start a Python program given as text; it finds the package and the tests."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHCACHE_", "COVERAGE_"))}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **environment}
    # What is started by a shell in the background ignores Ctrl-C, and hands that on.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + program
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str], timeout_seconds: float = 30.0, *, status: int = 0) -> str:
    """Wait for a program and return what it printed; it must end with ``status``."""
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise ChildFailedError(f"no end within {timeout_seconds} s\n{output}\n{errors}") from None
    if process.returncode != status:
        raise ChildFailedError(f"it ended with {process.returncode}\n{output}\n{errors}")
    return output + errors


def run(program: str, *args: object, timeout_seconds: float = 30.0, status: int = 0, **environment: str) -> str:
    """Run a Python program given as text and return what it printed."""
    return finish(start(program, *args, **environment), timeout_seconds, status=status)


def read_line(process: subprocess.Popen[str], timeout_seconds: float = 20.0) -> str:
    """Wait for the program's next line; it prints at most one before we answer."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], timeout_seconds)[0]:
        raise ChildFailedError(f"no line within {timeout_seconds} s")
    return process.stdout.readline().strip()


@contextlib.contextmanager
def stopped(program: str, *args: object) -> Iterator[int]:
    """Keep a program stopped (SIGSTOP) from its first line on; yields its process id."""
    process = start(program, *args)
    try:
        line = read_line(process)
        assert line == "ready", line + (process.stderr.read() if process.stderr else "")
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        yield process.pid
    finally:
        process.kill()
        process.communicate()
