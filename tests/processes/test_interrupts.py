"""Ctrl-C at any moment leaves nothing taken: the next call, flush and fork go on as if it had not been."""

from __future__ import annotations

from tests.storage.children import run

PROGRAM = """
import os, random, signal, sys, time, torch, torchcache

torch.set_num_threads(1)

@torchcache.torchcache(persistent=True, persistent_cache_dir=sys.argv[1], max_memory_cache_size=int(sys.argv[2]))
def double(x):
    return x * 2

rng = random.Random(0)
x = torch.arange(64.0).reshape(32, 2)
double(x)
interrupts, armed = 0, False

def on_interrupt(*_):
    #Interrupt what is tested, once, and not the test.
    global interrupts, armed
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0001, 0.003))
    if armed:
        interrupts, armed = interrupts + 1, False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, on_interrupt)  # a timer, which strikes anywhere

def use(number):
    rows = torch.tensor([[float(number), 1.0]]) if number % 3 else x[number % 32 : number % 32 + 4]
    assert torch.equal(double(rows), rows * 2)
    if number % 50 == 0:
        torchcache.flush_all(0.01)
    if number % 100 == 0:
        fork()

def fork():
    global armed
    pid = os.fork()
    if pid == 0:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        os._exit(0 if torch.equal(double(x), x * 2) else 1)
    assert os.waitpid(pid, 0)[1] == 0, "the child was wrong"

signal.setitimer(signal.ITIMER_REAL, 0.001)
number, end = 0, time.monotonic() + 3
while time.monotonic() < end:
    try:
        while time.monotonic() < end:
            armed = True
            number += 1
            use(number)
        armed = False
    except KeyboardInterrupt:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
before = time.monotonic()
assert torch.equal(double(x + 1000), (x + 1000) * 2)
assert torchcache.flush_all(5)
fork()
assert torch.equal(double(x + 1000), (x + 1000) * 2)
assert time.monotonic() - before < 4, "something was left taken"
assert interrupts > 100, interrupts
assert not double.cache_instance.stats().faults, double.cache_instance.stats()
print("went on")
"""


def test_a_program_that_is_interrupted_a_thousand_times_goes_on(root):
    assert "went on" in run(PROGRAM, root, 1000, timeout_seconds=40)
