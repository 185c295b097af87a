"""What the programs of these tests do: importable, so that spawned processes find it. No torch."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.storage.known_values import NAMESPACE, check, digests_of, open_store, rows_of
from torchcache.storage.contract import Written
from torchcache.storage.lmdb import LmdbStore
from torchcache.storage.writer import writer

#: Holds the lock of the cache directory until its standard input is closed.
HOLD_FILE_LOCK = """
import sys, filelock, os
lock = filelock.FileLock(os.path.join(sys.argv[1], ".torchcache.lock"))
lock.acquire()
print("ready", flush=True)
sys.stdin.read()
"""


class Observer:
    """Counts what the writer tells."""

    def __init__(self) -> None:
        self.written_rows = 0
        self.dropped: dict[str, int] = {}
        self.faults: list[tuple[str, int]] = []

    def on_written(self, written: Written) -> None:
        self.written_rows += written.rows
        for reason, rows in written.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def on_fault(self, error: Exception, rows: int) -> None:
        self.faults.append((getattr(error, "kind", type(error).__name__), rows))


def enqueue(
    store: LmdbStore,
    numbers: Iterable[int],
    *,
    nbytes: int = 2000,
    observer: Observer | None = None,
    queue_bytes: int = 64_000_000,
    timeout_seconds: float = 5.0,
    flush_seconds: float = 10.0,
) -> bool:
    """Hand the right values of ``numbers`` to the writer."""
    return writer.put(
        store,
        observer or Observer(),
        NAMESPACE,
        rows_of(digests_of(numbers), nbytes),
        queue_bytes=queue_bytes,
        timeout_seconds=timeout_seconds,
        flush_seconds=flush_seconds,
    )


def queue_hits(store: LmdbStore, numbers: Sequence[int]) -> set[int]:
    """Return which of ``numbers`` the writer's queue answers, checked."""
    digests = digests_of(numbers)
    found, missing = writer.get_many(store, NAMESPACE, digests)
    from torchcache.storage.contract import Lookup

    return {numbers[position] for position in check(Lookup(found, missing), digests)}


def store_hits(store: LmdbStore, numbers: Sequence[int]) -> set[int]:
    """Return which of ``numbers`` the store answers, checked."""
    digests = digests_of(numbers)
    return {numbers[position] for position in check(store.get_many(NAMESPACE, digests), digests)}


def wait_until(claim: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
    """Yield to other threads until a claim holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not claim():
        assert time.monotonic() < deadline, "it did not come to that in time"
        os.sched_yield()


def write_in_a_worker(root: Path, first: int, n: int, ending: str) -> None:
    """Accept ``n`` rows, in small calls, and end at once."""
    store = open_store(root, lock_timeout_seconds=60.0)
    for number in range(first, first + n):
        assert enqueue(store, [number], nbytes=20_000)
    if ending == "exception":
        raise RuntimeError("the worker fails on purpose")
    if ending == "sys.exit":
        sys.exit(3)


def accept_and_stay(
    root: Path, first: int, n: int, told: Connection, ending: str = "", flush_seconds: float = 10.0
) -> None:
    """Accept ``n`` rows in small calls, tell, and stay until there is nobody to be told any more.

    Args:
        root: The cache directory. The lock may be held: that is waited for longer than any test takes.
        first: The first number.
        n: How many.
        told: The other end has to be closed in all processes but the one that waits.
        ending: "killed" to be killed after telling; "forked" to do it in a child that was forked by hand.
        flush_seconds: Of the rows.
    """
    if ending == "forked" and os.fork():
        time.sleep(60)
    store = open_store(root, lock_timeout_seconds=60.0)
    for number in range(first, first + n):
        assert enqueue(store, [number], nbytes=20_000, flush_seconds=flush_seconds)
    told.send(None)
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    told.poll(60)


def start_workers(
    library: str, method: str, root: Path, n: int, ending: str = "", flush_seconds: float = 10.0
) -> list[Any]:
    """Start two daemonic workers that accept ``n`` rows each and stay; return them when they have told."""
    context = importlib.import_module(library).get_context(method)
    workers, ends = [], []
    for first in (0, n):
        mine, theirs = context.Pipe()
        arguments = root, first, n, theirs, ending, flush_seconds
        workers.append(context.Process(target=accept_and_stay, args=arguments, daemon=True))
        workers[-1].start()
        theirs.close()
        ends.append(mine)
    for end in ends:
        assert end.poll(30)
        end.recv()
    _ends_in_use.extend(ends)
    return workers


_ends_in_use: list[Connection] = []


def start_workers_in_a_worker(method: str, root: Path, n: int) -> None:
    """Start workers, say so, and end with them alive."""
    start_workers("multiprocessing", method, root, n)
    print("accepted", flush=True)


def use_temporary() -> None:
    """Accept a row in a worker's temporary directory."""
    from torchcache.storage.temporary import temporary_directory

    assert enqueue(open_store(temporary_directory()), [1])


def look_at_temporary(expected: Path) -> None:
    """Fail in a worker whose temporary directory is not its parent's."""
    from torchcache.storage.temporary import temporary_directory

    assert temporary_directory() == expected
