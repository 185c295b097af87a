"""What workers of multiprocessing and of torch's DataLoader accepted is on disk when they have ended."""

from __future__ import annotations

import json

import pytest

from tests.processes.programs import store_hits
from tests.storage.children import run
from tests.storage.known_values import open_store

START_METHODS = ["fork", "spawn", "forkserver"]

WORKERS = """
import multiprocessing, sys
from pathlib import Path
from tests.processes.programs import enqueue, write_in_a_worker
from tests.storage.known_values import open_store
from torchcache.storage.writer import writer

if __name__ == "__main__":
    root, method, ending = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    store = open_store(root)
    for number in range(1000, 1020):
        assert enqueue(store, [number], nbytes=20_000)
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=write_in_a_worker, args=(root, first, 40, ending)) for first in (0, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    print([worker.exitcode for worker in workers])
"""


@pytest.mark.parametrize(("ending", "status"), [("normal", 0), ("exception", 1), ("sys.exit", 3)])
@pytest.mark.parametrize("method", START_METHODS)
def test_what_workers_accepted_is_committed_when_they_end(root, method, ending, status):
    said = run(WORKERS, root, method, ending)
    assert f"[{status}, {status}]" in said
    everything = [*range(80), *range(1000, 1020)]
    assert store_hits(open_store(root), everything) == set(everything)


POOL = """
import multiprocessing, sys
from pathlib import Path
from tests.processes.programs import write_in_a_worker

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
        pool.starmap(write_in_a_worker, [(Path(sys.argv[1]), 10 * i, 10, "normal") for i in range(8)])
        pool.close()
        pool.join()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_a_pool_accepted_is_committed_when_it_is_closed(root, method):
    run(POOL, root, method)
    assert store_hits(open_store(root), range(80)) == set(range(80))


LOADER = """
import json, sys
from torch.utils.data import DataLoader
from tests.processes.cached import Encoded

if __name__ == "__main__":
    method, ending = sys.argv[1], sys.argv[2]
    loader = DataLoader(
        Encoded(64, fails_at=50 if ending == "exception" else None),
        batch_size=4, num_workers=2, multiprocessing_context=method, persistent_workers=ending == "persistent",
    )
    misses = rows = 0
    directories = set()
    iterator = iter(loader)
    try:
        for y, computed, where in iterator:
            rows += len(y)
            misses = max(misses, int(computed.max()))
            directories |= set(where)
            if ending == "break" and rows == 40:
                break
    except RuntimeError as error:
        assert "on purpose" in str(error), error
    del iterator
    print(json.dumps({"rows": rows, "misses": misses, "directories": sorted(directories)}))
"""


def load(method: str, ending: str = "normal", **environment: str) -> dict:
    return json.loads(run(LOADER, method, ending, timeout_seconds=60, **environment).splitlines()[0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_second_run_with_loader_workers_computes_nothing(root, method):
    first = load(method, TEST_CACHE_DIR=str(root))
    assert (first["rows"], first["misses"]) == (64, 32)
    second = load(method, TEST_CACHE_DIR=str(root))
    assert (second["rows"], second["misses"]) == (64, 0)


def test_persistent_loader_workers_lose_nothing_either(root):
    assert load("fork", "persistent", TEST_CACHE_DIR=str(root))["misses"] == 32
    assert load("fork", TEST_CACHE_DIR=str(root))["misses"] == 0


@pytest.mark.parametrize("ending", ["exception", "break"])
def test_what_loader_workers_computed_before_an_early_end_is_not_computed_again(root, ending):
    before = load("fork", ending, TEST_CACHE_DIR=str(root))
    assert before["rows"] < 64
    after = load("fork", TEST_CACHE_DIR=str(root))
    assert after["rows"] == 64
    assert after["misses"] <= (64 - before["rows"]) // 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_share_one_temporary_directory_that_is_gone_at_the_end(method, temporary):
    """Workers that start before the parent used its cache would each have one of their own."""
    program = LOADER.replace("    misses = rows = 0", "    loader.dataset[0]\n    misses = rows = 0")
    said = json.loads(run(program, method, "normal", timeout_seconds=60).splitlines()[0])
    (directory,) = said["directories"]
    assert directory.startswith(str(temporary))
    assert list(temporary.iterdir()) == []
