"""What workers accepted is committed before a program that ends ends them by a signal, and before its ``flush_all``.

In most of these tests a stranger holds the lock of the cache directory until the program waits: so nothing is
committed by then, and a program that does not wait loses everything.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes.programs import HOLD_FILE_LOCK, enqueue, store_hits, wait_until
from tests.storage.children import finish, fork, read_line, run, start, stopped, wait_for
from tests.storage.known_values import open_store
from torchcache.storage import backlogs
from torchcache.storage.writer import writer

START_METHODS = ["fork", "spawn", "forkserver"]

#: Each program imports torchcache, and some import torch in workers of their own too.
START_SECONDS = 60.0

#: Long enough to see that a program waits that would else have gone on at once.
WAITS_SECONDS = 0.5

N = 40

PROGRAM = """
import atexit, sys
from pathlib import Path
from tests.processes.programs import start_workers  # which imports torchcache, whose end comes before

if __name__ == "__main__":
    root, library, method, ending, flush_seconds = Path(sys.argv[1]), *sys.argv[2:]
    workers = start_workers(library, method, root, 40, ending, float(flush_seconds))
    print("accepted", flush=True)
"""

#: The program's own child does all that, and ends with its workers alive.
RANK = """
import multiprocessing, sys
from pathlib import Path
from tests.processes.programs import start_workers_in_a_worker

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    process = context.Process(target=start_workers_in_a_worker, args=(sys.argv[2], Path(sys.argv[1]), 40))
    process.start()
    process.join()
    assert process.exitcode == 0
"""

#: Each worker of celery's pool ends after one task, by ``os._exit``.
POOL = """
import sys
from pathlib import Path
import billiard
from tests.processes.programs import write_in_a_worker

if __name__ == "__main__":
    pool = billiard.Pool(2, maxtasksperchild=1)
    pool.starmap(write_in_a_worker, [(Path(sys.argv[1]), 10 * i, 10, "normal") for i in range(2)], chunksize=1)
    print("accepted", flush=True)
    pool.close()
    pool.join()
"""

FLUSHING = """
import sys
from pathlib import Path
from tests.processes.programs import start_workers
from torchcache import flush_all

if __name__ == "__main__":
    root, method, ending = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    workers = start_workers("multiprocessing", method, root, 40, ending)
    assert not flush_all(0.05)
    print("accepted", flush=True)
    assert flush_all()
    print("flushed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def launch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start programs as ``start`` does; those that a test leaves behind are killed, and then their workers end."""
    programs: list[subprocess.Popen[str]] = []

    def launch(program: str, *args: object) -> subprocess.Popen[str]:
        programs.append(start(program, *args))
        return programs[-1]

    yield launch
    for program in programs:
        if program.poll() is None:
            program.kill()
            program.communicate()


@contextlib.contextmanager
def locked(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock of a cache directory in another process, until that is finished."""
    root.mkdir(mode=0o700, exist_ok=True)
    holder = start(HOLD_FILE_LOCK, root)
    try:
        assert read_line(holder) == "ready"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def check_that_it_waits(program: subprocess.Popen[str]) -> None:
    """Fail if a program says another line, or ends, although it has to wait."""
    said, _, _ = select.select([program.stdout], [], [], WAITS_SECONDS)
    assert not said, "the program did not wait for its workers"
    assert program.poll() is None, "the program did not wait for its workers"


def end_while_locked(launch: Callable[..., subprocess.Popen[str]], root: Path, program: str, *args: object) -> str:
    """Let a program come to its end while a stranger holds the lock; return what it says once that is free."""
    with locked(root) as holder:
        started = launch(program, root, *args)
        assert read_line(started, START_SECONDS) == "accepted"
        check_that_it_waits(started)
        finish(holder)
        return finish(started)


@pytest.mark.parametrize("method", START_METHODS)
def test_a_program_that_ends_waits_for_what_its_workers_have_not_committed(launch, root, method):
    assert end_while_locked(launch, root, PROGRAM, "multiprocessing", method, "", 30) == ""
    assert store_hits(open_store(root), range(2 * N)) == set(range(2 * N))


def test_it_waits_for_workers_of_pathos_too(launch, root):
    """Their library is loaded last, so that its own exit handler comes first."""
    end_while_locked(launch, root, PROGRAM, "multiprocess", "fork", "", 30)
    assert store_hits(open_store(root), range(2 * N)) == set(range(2 * N))


@pytest.mark.parametrize("method", START_METHODS)
def test_a_worker_that_ends_waits_for_workers_of_its_own(launch, root, method):
    end_while_locked(launch, root, RANK, method)
    assert store_hits(open_store(root), range(2 * N)) == set(range(2 * N))


def test_a_worker_of_celery_s_pool_commits_what_it_accepted_before_it_ends(launch, root):
    end_while_locked(launch, root, POOL)
    assert store_hits(open_store(root), range(20)) == set(range(20))


def test_a_program_waits_for_what_its_workers_forked(launch, root):
    end_while_locked(launch, root, PROGRAM, "multiprocessing", "spawn", "forked", 30)
    assert store_hits(open_store(root), range(2 * N)) == set(range(2 * N))


def test_a_program_does_not_wait_for_workers_that_were_killed(launch, root):
    with locked(root):
        program = launch(PROGRAM, root, "multiprocessing", "fork", "killed", 30)
        assert read_line(program, START_SECONDS) == "accepted"
        finish(program, timeout_seconds=15)


def test_the_wait_is_bounded_and_what_is_lost_is_said(launch, root):
    root.mkdir(mode=0o700, exist_ok=True)
    with stopped(HOLD_FILE_LOCK, root):
        program = launch(PROGRAM, root, "multiprocessing", "fork", "", 0.6)
        assert read_line(program, START_SECONDS) == "accepted"
        before = time.monotonic()
        said = finish(program)
        assert time.monotonic() - before < 5
    assert "80 rows of worker processes were not committed within flush_timeout_seconds=0.6" in said
    assert store_hits(open_store(root), range(2 * N)) == set()


@pytest.mark.parametrize("method", START_METHODS)
def test_flush_all_covers_living_workers(launch, root, method):
    with locked(root) as holder:
        program = launch(FLUSHING, root, method, "")
        assert read_line(program, START_SECONDS) == "accepted"
        check_that_it_waits(program)
        finish(holder)
        assert read_line(program, START_SECONDS) == "flushed"
        assert store_hits(open_store(root), range(2 * N)) == set(range(2 * N))
        finish(program)


LOADER = """
import json, multiprocessing, sys
from pathlib import Path
from torch.utils.data import DataLoader
from tests.processes.datasets import Noted, as_they_are, take_notes
from torchcache import CachedDataset

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["tests.processes.datasets"])
    root, folder, method = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    cached = CachedDataset(Noted(40, folder), persistent=True, persistent_cache_dir=root, lock_timeout_seconds=60)
    loader = DataLoader(
        cached, batch_size=4, num_workers=2, multiprocessing_context=method, collate_fn=as_they_are,
        persistent_workers=True,
    )
    assert sorted(sample["i"] for batch in loader for sample in batch) == [*range(40)]
    print(json.dumps(take_notes(folder)), flush=True)
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_a_loader_that_is_alive_at_the_end_loses_nothing(launch, root, tmp_path, method):
    with locked(root) as holder:
        first = launch(LOADER, root, tmp_path, method)
        assert read_line(first, START_SECONDS) == str([*range(40)])
        check_that_it_waits(first)
        finish(holder)
        assert finish(first) == ""
    second = launch(LOADER, root, tmp_path, method)
    assert read_line(second, START_SECONDS) == "[]"
    finish(second)


def test_nothing_is_waited_for_once_it_is_committed(root):
    """The worker lives, and has nothing to commit any more."""
    run(PROGRAM, root, "multiprocessing", "fork", "", 30)
    assert backlogs.debts_of_descendants() == []


def test_a_fork_does_not_keep_rows_from_the_disk(root):
    """The fork ends the writer's thread, and no call comes that would start it again."""
    store = open_store(root, lock_timeout_seconds=30.0)
    with locked(root) as holder:
        assert enqueue(store, range(N))
        pid = fork()
        if pid == 0:
            os._exit(0)
        assert wait_for(pid, 10) == 0
        finish(holder)
        other = open_store(root)
        wait_until(lambda: store_hits(other, range(N)) == set(range(N)))
    assert writer.flush(10)


def test_a_forked_child_shows_a_backlog_of_its_own(root):
    """It inherits what its parent shows, which is not its own to settle."""
    store = open_store(root, lock_timeout_seconds=30.0)
    reader, sender = os.pipe()
    with locked(root) as holder:
        assert enqueue(store, range(N))
        pid = fork()
        if pid == 0:
            os.write(sender, b"forked")
            time.sleep(60)
        try:
            assert os.read(reader, 6) == b"forked"
            assert backlogs.debts_of_descendants() == []
        finally:
            os.kill(pid, signal.SIGKILL)
            assert wait_for(pid, 10) == -signal.SIGKILL
            os.close(reader)
            os.close(sender)
        finish(holder)
    assert writer.flush(10)
