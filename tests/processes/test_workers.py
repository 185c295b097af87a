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
import json, multiprocessing, sys, warnings
from pathlib import Path
from torch.utils.data import DataLoader
from tests.processes.cached import Encoded

warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")
N = 48


def load(dataset, method, ending, epochs=1):
    loader = DataLoader(
        dataset, batch_size=4, num_workers=1 if method == "spawn" else 2, multiprocessing_context=method,
        pin_memory=ending == "pinned",
        persistent_workers=ending == "persistent",
    )
    where = set()
    for _ in range(epochs):
        iterator = iter(loader)
        if ending == "unread":
            break
        try:
            for number, (y, directories) in enumerate(iterator):
                assert y.shape == (4, 1000)
                where |= set(directories)
                if ending == "break" and number == 3:
                    break
        except RuntimeError as error:
            assert "on purpose" in str(error), error
        del iterator
    return sorted(where)


if __name__ == "__main__":
    place, method, endings = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    multiprocessing.set_forkserver_preload(["tests.processes.cached"])
    said = {}
    for ending in endings:
        cache_dir = None if ending == "temporary" else place / ending
        first, second = place / f"{ending} first", place / f"{ending} second"
        dataset = Encoded(N, cache_dir, first, fails_at=30 if ending == "exception" else None)
        if ending == "used before":
            for i in range(8):
                dataset[i]
        where = load(dataset, method, ending, epochs=2 if ending == "persistent" else 1)
        dataset.notes, dataset.fails_at = second, None
        where += load(dataset, method, "normal")
        computed = [[int(i) for i in notes.read_text().split()] if notes.exists() else [] for notes in (first, second)]
        said[ending] = {"first": computed[0], "second": computed[1], "where": sorted(set(where))}
    print(json.dumps(said))
"""

ORDERLY = ["normal", "persistent", "pinned", "used before"]
EARLY = ["break", "exception", "unread"]
TEMPORARY = ["temporary"]


@pytest.mark.parametrize(
    ("method", "endings"),
    [
        ("fork", [*ORDERLY, *EARLY, *TEMPORARY]),
        ("forkserver", ["normal", "break", *TEMPORARY]),
        ("spawn", TEMPORARY),  # each worker imports torch anew
    ],
)
def test_what_loader_workers_computed_is_not_computed_again(root, temporary, method, endings):
    """Each pair of rounds has its own directory; a worker notes what it computed."""
    root.mkdir(mode=0o700)
    said = json.loads(run(LOADER, root, method, *endings, timeout_seconds=100).splitlines()[0])
    assert list(said) == endings
    for ending, rounds in said.items():
        first, second = rounds["first"], rounds["second"]
        assert len(set(first)) == len(first), f"{ending}: the first round computed rows twice"
        assert set(first).isdisjoint(second), f"{ending}: what the first round computed was lost"
        assert {*first, *second} == set(range(48)), ending
        assert len(first) == 48 or ending in EARLY, ending
        assert len(rounds["where"]) == 1, f"{ending}: processes cached in different places"
        assert rounds["where"][0].startswith(str(temporary if ending in TEMPORARY else root / ending)), ending
