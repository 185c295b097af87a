"""Other interpreters that run one side of a case: with another hash seed, forked, from a fork server, spawned.

Each stays alive for many cases, because to import torch takes seconds. A task goes over a pipe, an answer comes
back in bounded time, and an interpreter whose pipe ends comes to its end itself.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from stress.defects import DEFECTS
from stress.programs import Answer
from stress.values import ViolationError

_ANSWER_SECONDS = 90.0
_CHILD_SECONDS = 60.0
_END_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[1]

#: Of ``PYTHONHASHSEED``: the order of sets of strings is another one in each.
HASH_SEEDS = ("1", "4242")

#: A spawned child is used so often; then another one is spawned.
_TASKS_OF_A_SPAWNED = 10


class Started(Protocol):
    """What was started with a cache of its own."""

    def call(self, side: Any, /) -> Any:  # noqa: ANN401 - what it was started from, and what its suite compares
        """Make the call of a side."""
        ...

    def close(self) -> None:
        """Commit what is to be stored, and let go of it."""
        ...


class Startable(Protocol):
    """What an interpreter can run, and then call."""

    def start(self, directory: Path | None) -> Started:
        """Run it, with a persistent cache if there is a directory."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """What an interpreter is asked to do.

    Attributes:
        how: "process": itself; "fork", "forkserver", "spawn": in such a child; "inherited": call the first side
            itself and the second one in a child forked then, with the same object.
    """

    how: str
    directory: Path | None
    second: Startable
    first: Startable | None = None


def prepare(plant: str | None) -> None:
    """Make this process one that can run sides."""
    torch.set_num_threads(1)  # bits must not depend on how work is shared out, and a fork wants no threads
    logging.getLogger("torchcache").setLevel(logging.ERROR)
    if plant in DEFECTS:
        DEFECTS[plant]()


def answer(side: Startable, directory: Path | None) -> Answer:
    """Run a side in this process, as a whole program would."""
    running = side.start(directory)
    try:
        return running.call(side)
    finally:
        running.close()


class Interpreters:
    """The interpreters of one run; started when they are first needed, ended by ``close``."""

    def __init__(self, plant: str | None = None) -> None:
        self._plant = plant
        self._running: dict[str, tuple[subprocess.Popen[bytes], Connection]] = {}

    def close(self) -> None:
        """End all of them."""
        for process, connection in self._running.values():
            connection.close()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    def ask(self, task: Task, hash_seed: str) -> list[Answer]:
        """Run a task in the interpreter with a hash seed.

        Raises:
            ViolationError: If it fails, or gives no answer in time.
        """
        process, connection = self._running.get(hash_seed) or self._start(hash_seed)
        try:
            return _ask(connection, task, _ANSWER_SECONDS)
        except (EOFError, OSError, _SilenceError) as error:
            process.kill()
            process.wait()
            connection.close()
            del self._running[hash_seed]
            raise ViolationError("ended", f"an interpreter gave no answer: {error!r}") from error

    def _start(self, hash_seed: str) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = multiprocessing.Pipe()
        variables = {name: value for name, value in os.environ.items() if not name.startswith("TORCHCACHE_")}
        variables["PYTHONHASHSEED"] = hash_seed
        variables["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        program = f"from stress.interpreters import serve; serve({theirs.fileno()}, {self._plant!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", program], env=variables, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._running[hash_seed] = process, ours
        return process, ours


def serve(descriptor: int, plant: str | None) -> None:
    """Do task after task until the pipe ends; this is the whole life of an interpreter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    multiprocessing.set_forkserver_preload(["stress.interpreters"])
    children = _Children(plant)
    prepare(plant)
    _work(Connection(descriptor), None, children)
    children.close()


def _work(connection: Connection, plant: str | None, children: _Children | None = None) -> None:
    """Do task after task until the pipe ends."""
    if children is None:
        prepare(plant)
    while True:
        try:
            task: Task | None = _receive(connection)
        except (EOFError, OSError):
            return
        if task is None:
            return
        try:
            if task.how == "process" or children is None:
                result: Any = [answer(task.second, task.directory)]
            else:
                result = children.do(task)
        except BaseException as error:
            result = "".join(traceback.format_exception(error))
        _send(connection, result)


class _Children:
    """The children of an interpreter."""

    def __init__(self, plant: str | None) -> None:
        self._plant = plant
        self._spawned: tuple[BaseProcess, Connection] | None = None
        self._tasks = 0

    def close(self) -> None:
        if self._spawned is not None:
            _end(*self._spawned)
            self._spawned = None

    def do(self, task: Task) -> list[Answer]:
        if task.how == "inherited":
            return self._inherit(task)
        if task.how != "spawn":
            process, connection = self._start(task.how, _work, self._plant if task.how == "forkserver" else None)
            try:
                return _ask(connection, task)
            finally:
                _end(process, connection)
        if self._tasks % _TASKS_OF_A_SPAWNED == 0:
            self.close()
        self._tasks += 1
        self._spawned = self._spawned or self._start("spawn", _work, self._plant)
        return _ask(self._spawned[1], task)

    def _inherit(self, task: Task) -> list[Answer]:
        """Let a forked child call what its parent has called."""
        assert task.first is not None
        running = task.first.start(task.directory)
        first = running.call(task.first)
        process, connection = self._start("fork", _call, running)
        try:
            return [first, *_ask(connection, task)]
        finally:
            _end(process, connection)
            running.close()

    def _start(self, method: str, work: Any, argument: object) -> tuple[BaseProcess, Connection]:  # noqa: ANN401
        context: Any = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process: BaseProcess = context.Process(target=work, args=(theirs, argument), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the writer's thread is parked before a fork
            process.start()
        theirs.close()
        return process, ours


def _send(connection: Connection, value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)  # send() would share the memory of tensors, and pickle lacks some dtypes
    connection.send_bytes(buffer.getbuffer())


def _receive(connection: Connection) -> Any:  # noqa: ANN401 - a task, or what became of it
    return torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)


def _call(connection: Connection, running: Started) -> None:
    task: Task = _receive(connection)
    try:
        result: Any = [running.call(task.second)]
    except BaseException as error:
        result = "".join(traceback.format_exception(error))
    _send(connection, result)
    running.close()


class _SilenceError(Exception):
    """No answer came in time."""


def _ask(connection: Connection, task: Task, timeout_seconds: float = _CHILD_SECONDS) -> list[Answer]:
    _send(connection, task)
    if not connection.poll(timeout_seconds):
        raise _SilenceError(f"none within {timeout_seconds} s")
    result: list[Answer] | str = _receive(connection)
    if isinstance(result, str):
        raise ViolationError("raised", result)
    return result


def _end(process: BaseProcess, connection: Connection) -> None:
    with contextlib.suppress(OSError):
        _send(connection, None)  # a forked child holds this end too, so it would not see it close
    connection.close()
    process.join(_END_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
