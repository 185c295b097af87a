"""Everything that was accepted is on disk when a program has ended in an orderly way."""

from __future__ import annotations

import signal
import time

import pytest

from tests.processes.programs import HOLD_FILE_LOCK, store_hits
from tests.storage.children import finish, read_line, run, start, stopped
from tests.storage.known_values import open_store

PROGRAM = """
import sys, signal, threading
from pathlib import Path
from tests.processes.programs import enqueue
from tests.storage.known_values import open_store

root, ending = Path(sys.argv[1]), sys.argv[2]
options = {name: float(value) for name, value in (item.split("=") for item in sys.argv[3:])}
store = open_store(root, lock_timeout_seconds=options.get("lock", 2.0))
for number in range(60):
    assert enqueue(store, [number], nbytes=50_000, flush_seconds=options.get("flush", 10.0))
if ending == "handled":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("accepted", flush=True)
if ending == "exception":
    raise RuntimeError("on purpose")
if ending == "sys.exit":
    sys.exit(3)
if ending == "sys.exit in a thread":
    thread = threading.Thread(target=sys.exit, args=(3,))
    thread.start()
    thread.join()
if ending in ("signal", "handled"):
    sys.stdin.read()
if ending == "os._exit":
    import os
    os._exit(4)
"""

#: A notebook: a kernel in a process of its own, told what to do, and then asked to shut down.
NOTEBOOK = """
import sys
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(kernel_name="python3", startup_timeout=30)
try:
    client.execute_interactive(f"import sys; sys.argv = ['', {sys.argv[1]!r}, 'normal']", timeout=20)
    reply = client.execute_interactive(sys.argv[2], timeout=20)
    assert reply["content"]["status"] == "ok", reply
    client.stop_channels()
    manager.shutdown_kernel()
finally:
    if manager.is_alive():
        manager.shutdown_kernel(now=True)
"""

ALL = range(60)


@pytest.mark.parametrize(
    ("ending", "status"), [("normal", 0), ("exception", 1), ("sys.exit", 3), ("sys.exit in a thread", 0)]
)
def test_what_was_accepted_is_committed_at_the_end_of_a_program(root, ending, status):
    run(PROGRAM, root, ending, status=status)
    assert store_hits(open_store(root), ALL) == set(ALL)


def test_what_was_accepted_is_committed_after_an_interrupt(root):
    program = start(PROGRAM, root, "signal")
    assert read_line(program) == "accepted"
    program.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in finish(program, status=-signal.SIGINT)
    assert store_hits(open_store(root), ALL) == set(ALL)


def test_what_was_accepted_is_committed_when_a_notebook_s_kernel_is_shut_down(root, tmp_path):
    run(
        NOTEBOOK,
        root,
        PROGRAM,
        timeout_seconds=60,
        JUPYTER_RUNTIME_DIR=str(tmp_path / "jupyter"),
        IPYTHONDIR=str(tmp_path),
    )
    assert store_hits(open_store(root), ALL) == set(ALL)


def test_what_was_accepted_is_committed_after_a_sigterm_that_the_program_handles(root):
    program = start(PROGRAM, root, "handled")
    assert read_line(program) == "accepted"
    program.terminate()
    finish(program, status=5)
    assert store_hits(open_store(root), ALL) == set(ALL)


@pytest.mark.parametrize("ending", ["os._exit", "SIGTERM"])
def test_an_end_without_python_s_own_loses_at_most_what_was_not_committed(root, ending):
    """Whatever was committed by then is whole, nothing is locked, and the next run completes it."""
    if ending == "os._exit":
        run(PROGRAM, root, ending, status=4)
    else:
        program = start(PROGRAM, root, "signal")
        assert read_line(program) == "accepted"
        program.terminate()
        finish(program, status=-signal.SIGTERM)
    store = open_store(root)
    store_hits(store, ALL)
    run(PROGRAM, root, "normal")
    assert store_hits(store, ALL) == set(ALL)


def test_the_end_waits_for_a_lock_that_comes_free_in_time(root):
    root.mkdir(mode=0o700)
    holder = start(HOLD_FILE_LOCK, root)
    assert read_line(holder) == "ready"
    program = start(PROGRAM, root, "normal", "lock=8")
    assert read_line(program) == "accepted"
    finish(holder)
    finish(program)
    assert store_hits(open_store(root), ALL) == set(ALL)


def test_the_end_is_bounded_while_a_stopped_process_holds_the_lock_and_says_what_was_lost(root):
    root.mkdir(mode=0o700)
    with stopped(HOLD_FILE_LOCK, root):
        before = time.monotonic()
        said = run(PROGRAM, root, "normal", "lock=30", "flush=0.5")
        assert time.monotonic() - before < 4
    assert said.count("rows were not committed") == 1
    assert "60 rows were not committed within flush_timeout_seconds=0.5" in said
    assert store_hits(open_store(root), ALL) == set()


def test_the_end_is_bounded_by_the_lock_timeout_too(root):
    root.mkdir(mode=0o700)
    with stopped(HOLD_FILE_LOCK, root):
        before = time.monotonic()
        run(PROGRAM, root, "normal", "lock=0.2", "flush=2")
        assert time.monotonic() - before < 5


def test_an_end_that_was_cut_off_loses_only_what_was_not_committed(root):
    """SIGKILL at the worst moment: everything accepted, perhaps nothing committed."""
    program = start(PROGRAM, root, "signal")
    assert read_line(program) == "accepted"
    program.kill()
    program.communicate()
    store = open_store(root)
    store_hits(store, ALL)
    run(PROGRAM, root, "normal")
    assert store_hits(store, ALL) == set(ALL)


def test_rows_that_come_after_the_end_are_refused_at_once(root):
    """A user's own exit handler, registered before the first write, runs after ours."""
    said = run(
        """
import atexit, sys, time
from pathlib import Path
from tests.processes.programs import enqueue
from tests.storage.known_values import open_store

def late():
    before = time.monotonic()
    assert not enqueue(store, [2])
    assert time.monotonic() - before < 1
    print("the late row was refused", flush=True)

atexit.register(late)
store = open_store(Path(sys.argv[1]))
assert enqueue(store, [1])
""",
        root,
    )
    assert "the late row was refused" in said
    assert store_hits(open_store(root), [1, 2]) == {1}


MAIN_JOB = """
import sys, torch, torchcache, json
from torch import nn

@torchcache.torchcache(persistent=True, persistent_cache_dir=sys.argv[1])
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(10, 300)

    def forward(self, x):
        return self.linear(x)

encoder = Encoder().requires_grad_(False)
torch.manual_seed(1)
data = torch.randn(200, 10)
for i in range(0, 200, 20):
    y = encoder(data[i : i + 20])
    if sys.argv[2] == "stop" and i == 100:
        print("half", flush=True)
        sys.stdin.read()
plain = encoder.linear(data[180:])
assert torch.allclose(y, plain, atol=1e-5), (y - plain).abs().max()
stats = encoder.cache_instance.stats()
print(json.dumps({"misses": stats.misses, "store": stats.store_hits, "faults": dict(stats.faults)}))
"""


def test_a_second_run_of_a_program_computes_nothing(root):
    assert '{"misses": 200, "store": 0, "faults": {}}' in run(MAIN_JOB, root, "go")
    assert '{"misses": 0, "store": 200, "faults": {}}' in run(MAIN_JOB, root, "go")


def test_an_interrupted_run_is_gone_on_with_where_it_was(root):
    program = start(MAIN_JOB, root, "stop")
    assert read_line(program) == "half"
    program.send_signal(signal.SIGINT)
    finish(program, status=-signal.SIGINT)
    assert '{"misses": 80, "store": 120, "faults": {}}' in run(MAIN_JOB, root, "go")


def test_a_cached_call_is_fast_and_right_while_a_stopped_process_holds_the_lock(root):
    """The program checks its values itself. Ten calls that waited for the lock would take longer."""
    root.mkdir(mode=0o700)
    timed = MAIN_JOB.replace("for i in range", "import time\nbefore = time.monotonic()\nfor i in range").replace(
        "plain =", "assert time.monotonic() - before < 10\nplain ="
    )
    timed = timed.replace("persistent=True,", "persistent=True, lock_timeout_seconds=1.5, flush_timeout_seconds=1,")
    with stopped(HOLD_FILE_LOCK, root):
        assert '"misses": 200' in run(timed, root, "go")
