"""The private temporary cache directory of a program that names none: its last user removes it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.processes.programs import store_hits
from tests.storage.children import ROOT, finish, read_line, run, start
from tests.storage.known_values import open_store

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


#: Two programs that set the same key, as the users of a manager do.
WITH_A_KEY = (
    """
import multiprocessing
multiprocessing.current_process().authkey = b"abracadabra"
"""
    + WAIT
)

#: The parent ends at once, the child when its standard input is closed.
DAEMON = """
import os, sys
from tests.processes.programs import enqueue
from tests.storage.known_values import open_store
from torchcache.storage.temporary import reserve, temporary_directory

reserve()
if sys.argv[1] == "used":
    assert enqueue(open_store(temporary_directory()), [1])
ready, tell = os.pipe()
if os.fork():
    print(os.read(ready, 4096).decode(), flush=True)
    sys.exit(0)
path = temporary_directory()
store = open_store(path)
assert enqueue(store, [2])
os.write(tell, str(path).encode())
sys.stdin.read()
for number in range(10, 20):
    assert enqueue(store, [number])
"""

#: Its worker waits for ever, as a data loader's persistent workers do.
LIVING_WORKER = """
import multiprocessing, sys
from tests.processes.programs import use_temporary
from torchcache.storage.temporary import reserve, temporary_directory

def work(pipe):
    use_temporary()
    pipe.send(temporary_directory())
    pipe.recv()

if __name__ == "__main__":
    reserve()
    if sys.argv[1] == "used":
        use_temporary()
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True).start()
    assert ours.recv().is_dir()
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


def test_programs_with_one_key_share_it_and_the_last_removes_it():
    """Whoever set the key knows it; so both count as one."""
    programs = [start(WITH_A_KEY) for _ in range(3)]
    path, *others = {Path(read_line(program)) for program in programs}
    assert not others
    for program in programs[:2]:
        finish(program)
        assert path.is_dir()
    finish(programs[2])
    assert not path.exists()


@pytest.mark.parametrize("parent", ["used", "unused"])
def test_a_child_forked_by_hand_keeps_it_when_its_parent_ends_and_removes_it(parent):
    program = start(DAEMON, parent)
    path = Path(read_line(program))
    assert program.wait(20) == 0
    assert list(path.glob("*/data.mdb")) != [], "the parent took it away from its child"
    assert "Traceback" not in finish(program)  # returns when the child has ended as well
    assert not path.exists()


@pytest.mark.parametrize("parent", ["used", "unused"])
def test_nothing_is_left_when_workers_live_at_the_end(parent):
    """They are ended by multiprocessing, after exit handlers ran."""
    run(LIVING_WORKER, parent)


def test_workers_do_not_remove_it_between_two_rounds():
    """Although nobody holds the lock: the program itself does not use it."""
    said = run(
        """
import multiprocessing
from pathlib import Path
from tests.processes.programs import use_temporary
from torchcache.storage.temporary import reserve
import tempfile

if __name__ == "__main__":
    reserve()
    made = []
    for method in ("fork", "spawn", "fork"):
        worker = multiprocessing.get_context(method).Process(target=use_temporary)
        worker.start()
        worker.join(20)
        assert worker.exitcode == 0, (method, worker.exitcode)
        (path,) = Path(tempfile.gettempdir()).glob("torchcache-tmp-*")
        made.append((path, path.stat().st_ino))
    assert len(set(made)) == 1, made
    print("it stayed")
"""
    )
    assert "it stayed" in said


def test_a_key_that_is_set_later_changes_nothing_for_this_process_and_its_forks(temporary):
    """Workers that are spawned know only the new key; what they used is removed too."""
    said = run(
        USE
        + """
import multiprocessing, tempfile
from tests.processes.programs import look_at_temporary, use_temporary

if __name__ == "__main__":
    multiprocessing.current_process().authkey = b"secret"
    assert temporary_directory() == path
    for method, target, args in (("fork", look_at_temporary, (path,)), ("spawn", use_temporary, ())):
        worker = multiprocessing.get_context(method).Process(target=target, args=args)
        worker.start()
        worker.join(20)
        assert worker.exitcode == 0, (method, worker.exitcode)
    assert len(list(Path(tempfile.gettempdir()).glob("torchcache-tmp-*"))) == 2
    print("one and another")
"""
    )
    assert "one and another" in said


def test_a_fork_server_that_decorated_has_another_key_than_its_children(tmp_path):
    (tmp_path / "early.py").write_text("from torchcache.storage.temporary import reserve\nreserve()\n")
    said = run(
        USE
        + """
import multiprocessing
from tests.processes.programs import look_at_temporary

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["early"])
    worker = multiprocessing.get_context("forkserver").Process(target=look_at_temporary, args=(path,))
    worker.start()
    worker.join(20)
    print(worker.exitcode, "is its exit code")
""",
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )
    assert "0 is its exit code" in said


def test_reserving_while_a_worker_is_still_prepared_loses_nothing(tmp_path, root):
    """A child of a fork server imports its target before it knows that it is one, and runs no exit handlers."""
    (tmp_path / "early.py").write_text(
        "from tests.processes.programs import write_in_a_worker\n"
        "from torchcache.storage.temporary import reserve\n"
        "class Work:\n"
        "    def __call__(self, *args): write_in_a_worker(*args)\n"
        "reserve()\n"
    )
    run(
        """
import multiprocessing, sys
from pathlib import Path
from early import Work

if __name__ == "__main__":
    worker = multiprocessing.get_context("forkserver").Process(target=Work(), args=(Path(sys.argv[1]), 0, 40, "normal"))
    worker.start()
    worker.join(20)
    assert worker.exitcode == 0
""",
        root,
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )
    assert store_hits(open_store(root), range(40)) == set(range(40))


def test_one_that_was_taken_away_is_made_again_privately(temporary):
    """As what cleans up /tmp does; the umask must not decide who can read the new one."""
    program = start(
        USE
        + """
import os, shutil
assert writer.flush(10)
os.umask(0)
shutil.rmtree(path)
assert temporary_directory() == path
print(path.stat().st_mode & 0o777 == 0o700, flush=True)
sys.stdin.readline()
os.unlink(path / ".in-use.lock")
assert temporary_directory() == path
print("again", flush=True)
sys.stdin.read()
"""
    )
    path = Path(read_line(program))
    assert read_line(program) == "True"
    for answer in ("again", None):
        make_old(path)
        run(USE)
        assert path.is_dir(), "a later program counts it as dead"
        if answer:
            program.stdin.write("\n")
            program.stdin.flush()
            assert read_line(program) == answer
    finish(program)
    assert not path.exists()


@pytest.mark.parametrize("what", ["a directory for all", "a link"])
def test_one_whose_name_was_taken_meanwhile_is_not_used_any_more(temporary, tmp_path, what):
    taken = tmp_path / "taken"
    taken.mkdir()
    taken.chmod(0o777)
    said = run(
        USE
        + """
import os, shutil
from torchcache.errors import StoreError
assert writer.flush(10)
shutil.rmtree(path)
os.rename(sys.argv[1], path) if sys.argv[2] != "a link" else os.symlink(sys.argv[1], path)
try:
    temporary_directory()
except StoreError as error:
    print(error.kind, "refused")
""",
        taken,
        what,
    )
    assert "directory refused" in said
    (left,) = temporary.iterdir()
    assert what == "a link" or list(left.iterdir()) == []
    assert not taken.exists() or list(taken.iterdir()) == []
    left.unlink() if left.is_symlink() else shutil.rmtree(left)


def test_a_machine_without_any_temporary_directory_costs_one_error_and_the_end_is_silent():
    said = run(
        """
import tempfile
tempfile._candidate_tempdir_list = lambda: []
from torchcache.errors import StoreError
from torchcache.storage.temporary import reserve, temporary_directory
reserve()
try:
    temporary_directory()
except StoreError as error:
    print("refused:", error)
"""
    )
    assert said.startswith("refused: ")
    assert "Traceback" not in said


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


def test_a_directory_that_was_swept_away_is_made_anew_and_goes_on(temporary):
    """Whoever cleans /tmp must cost a running program its rows at most, and nobody else may come to see them."""
    said = run(
        """
import shutil, torch, torchcache
from torchcache.storage.temporary import temporary_directory

@torchcache.torchcache(persistent=True, max_memory_cache_size=0)
def double(x):
    return x * 2

x = torch.arange(8.0).reshape(4, 2)
double(x)
assert torchcache.flush_all()
path = double.cache_instance.cache_dir.parent
shutil.rmtree(path)
for n in range(3):
    assert torch.equal(double(x + n), (x + n) * 2)
    assert torchcache.flush_all()
assert path == temporary_directory() and path.stat().st_mode & 0o777 == 0o700, oct(path.stat().st_mode)
assert (path / ".in-use.lock").exists()
misses = double.cache_instance.stats().misses
double(x + 2)
assert double.cache_instance.stats().misses == misses
print("went on")
"""
    )
    assert "went on" in said
