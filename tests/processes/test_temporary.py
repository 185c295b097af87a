"""The private temporary cache directory of a program that names none."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.storage.children import finish, read_line, run, start

USE = """
import sys
from pathlib import Path
from tests.processes.programs import enqueue, store_hits, write_in_a_worker
from tests.storage.known_values import open_store
from torchcache.storage.temporary import temporary_directory
from torchcache.storage.writer import writer

path = temporary_directory()
store = open_store(path)
assert enqueue(store, range(50))
print(path, flush=True)
"""

WAIT = USE + "sys.stdin.read()\n"


WORKER = """
import multiprocessing, sys
from tests.processes.programs import use_temporary

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=use_temporary)
    worker.start()
    worker.join(20)
    print(worker.exitcode, flush=True)
    sys.stdin.read()
"""


def make_old(path: Path, seconds: float = 7200.0) -> None:
    past = time.time() - seconds
    for entry in (path, *path.iterdir()):
        os.utime(entry, (past, past))


def test_it_is_private_and_gone_at_the_end(temporary):
    program = start(WAIT)
    path = Path(read_line(program))
    assert path.parent == temporary
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_uid == os.geteuid()
    finish(program)
    assert not path.exists()


def test_it_is_gone_after_an_exception_and_after_an_interrupt(temporary):
    run(USE + "raise RuntimeError\n", status=1)
    assert list(temporary.iterdir()) == []
    program = start(WAIT)
    assert Path(read_line(program)).exists()
    program.send_signal(signal.SIGINT)
    finish(program, status=-signal.SIGINT)
    assert list(temporary.iterdir()) == []


def test_two_programs_have_two(temporary):
    programs = [start(WAIT) for _ in range(2)]
    one, other = (read_line(program) for program in programs)
    assert one != other
    finish(programs[0])
    assert Path(other).exists()
    finish(programs[1])


def test_the_one_of_a_killed_program_is_taken_away_by_a_later_one_and_that_of_a_living_one_is_not(temporary):
    killed, living = start(WAIT), start(WAIT)
    left, kept = Path(read_line(killed)), Path(read_line(living))
    killed.kill()
    killed.communicate()
    assert left.exists()
    make_old(kept)
    run(USE)
    assert not left.exists()
    assert kept.exists()
    finish(living)


def test_one_that_only_workers_used_is_kept_for_an_hour(temporary):
    """Its program may live, and start workers again; it does not lock what it does not use."""
    program = start(WORKER)
    assert read_line(program) == "0"
    (kept,) = temporary.iterdir()
    run(USE)
    assert kept.exists()
    program.kill()
    program.communicate()
    make_old(kept)
    run(USE)
    assert not kept.exists()


def test_one_that_is_just_being_made_is_left_alone(temporary):
    """Its maker has not come to lock it yet."""
    being_made = temporary / f"torchcache-tmp-{'0' * 32}"
    being_made.mkdir(mode=0o700)
    run(USE)
    assert being_made.exists()
    make_old(being_made)
    run(USE)
    assert not being_made.exists()


def test_what_only_looks_like_one_is_left_alone(temporary, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("kept")
    link = temporary / f"torchcache-tmp-{'0' * 32}"
    link.symlink_to(victim)
    shared = temporary / f"torchcache-tmp-{'1' * 32}"
    shared.mkdir()
    shared.chmod(0o777)
    make_old(shared)
    make_old(victim)
    run(USE)
    assert (victim / "precious").read_text() == "kept"
    assert shared.exists()
    link.unlink()
    shared.rmdir()


def test_forked_and_spawned_children_share_it_and_never_remove_it():
    said = run(
        USE
        + """
import multiprocessing, os
from tests.processes.programs import write_in_a_worker

def child():
    assert temporary_directory() == path

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        worker = multiprocessing.get_context(method).Process(target=look, args=(path,)) if method != "fork" else (
            multiprocessing.get_context("fork").Process(target=child))
        worker.start()
        worker.join(20)
        assert worker.exitcode == 0, (method, worker.exitcode)
        assert path.is_dir(), method
    pid = os.fork()
    if pid == 0:
        child()
        sys.exit(0)  # an orderly end: exit handlers run
    assert os.waitpid(pid, 0)[1] == 0
    assert path.is_dir()
    assert writer.flush(10)
    assert store_hits(store, range(50)) == set(range(50))
    print("all of them shared it")
""".replace(
            "import multiprocessing, os",
            "import multiprocessing, os\nfrom tests.processes.programs import look_at_temporary as look",
        )
    )
    assert "all of them shared it" in said


def test_another_program_started_by_this_one_has_its_own(temporary):
    """Only what multiprocessing starts belongs to a program."""
    said = run(
        USE
        + f"""
import subprocess
other = subprocess.run([sys.executable, "-c", {USE!r}], capture_output=True, text=True, check=True).stdout.strip()
assert other and other != str(path), other
assert path.is_dir()
print("it has")
"""
    )
    assert "it has" in said


def test_nothing_is_left_when_a_cache_with_a_directory_was_used_first(tmp_path):
    """Exit handlers run backwards: the directory must not be removed before the writer is done with it."""
    run(
        """
import sys
from pathlib import Path
from tests.processes.programs import enqueue
from tests.storage.known_values import open_store
from torchcache.storage.temporary import temporary_directory

named = open_store(Path(sys.argv[1]))
assert enqueue(named, [1])
store = open_store(temporary_directory())
for number in range(200):
    assert enqueue(store, [number], nbytes=50_000)
""",
        tmp_path / "named",
    )


def test_nothing_is_left_when_a_thread_still_calls_at_the_end(temporary):
    """A daemon thread goes on while the program ends."""
    run(
        USE
        + """
import itertools, threading
def go_on():
    for number in itertools.count(1000):
        enqueue(store, [number], nbytes=50_000, timeout_seconds=0.01)
threading.Thread(target=go_on, daemon=True).start()
"""
    )
