"""A cached data set in workers: each sample is computed once, whatever the start method, and no sample is wrong."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

from tests.processes.datasets import Decode, Noted, Shards, take_notes
from tests.storage.children import run
from torchcache import CachedDataset, CachedIterableDataset, SampleError, Warmed

LOADER = """
import json, multiprocessing, sys, warnings
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from tests.processes import datasets
from tests.processes.datasets import Noted, as_they_are, take_notes, with_a_random_number
import torchcache.doors.samples
from torchcache import CachedDataset

N = 24


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["tests.processes.datasets"])
    folder, root, method, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    cached = CachedDataset(
        Noted(N, folder, is_unseen=kind == "unseen"), augment=with_a_random_number, persistent=True,
        persistent_cache_dir=None if kind == "temporary" else root,
    )
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")
    epochs, drawn = [], set()
    for fresh in (True, kind != "persistent", True):
        if fresh:
            loader = DataLoader(
                cached, batch_size=4, num_workers=1 if method == "spawn" else 2, multiprocessing_context=method,
                collate_fn=as_they_are, shuffle=True, pin_memory=kind == "pinned",
                persistent_workers=kind == "persistent",
            )
        seen = []
        for batch in loader:
            for sample, number in batch:
                i = sample["i"]
                assert sample["name"] == f"sample {i}" and sample["x"].shape == (3, 8 + i), sample
                assert bool((sample["x"] == i).all()), sample
                seen.append(i)
                drawn.add(number)
        assert sorted(seen) == [*range(N)]
        epochs.append(take_notes(folder))
        if len(epochs) == 2 and kind != "persistent":
            break
    assert len(drawn) > 1.5 * N, "what augment drew was cached"
    print(json.dumps(epochs))
"""


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("fork", "normal"), ("fork", "persistent"), ("fork", "pinned"), ("fork", "temporary"),
        ("spawn", "normal"), ("forkserver", "normal"),
    ],
)  # fmt: skip
def test_the_second_epoch_computes_nothing_in_fresh_workers(tmp_path, root, method, kind):
    said = run(LOADER, tmp_path, root, method, kind, timeout_seconds=100)
    epochs = json.loads(said.splitlines()[0])
    assert epochs[0] == list(range(24))
    assert epochs[-1] == []  # workers that live on may ask for what another one has not committed yet


def test_two_programs_share_what_they_computed(tmp_path, root):
    run(LOADER, tmp_path, root, "fork", "normal", timeout_seconds=60)
    first, second = json.loads(run(LOADER, tmp_path, root, "fork", "normal", timeout_seconds=60).splitlines()[0])
    assert first == second == []


def test_what_cannot_be_seen_is_computed_in_every_epoch(tmp_path, root):
    said = run(LOADER, tmp_path, root, "fork", "unseen", timeout_seconds=60)
    assert json.loads(said.splitlines()[0]) == [list(range(24))] * 2
    assert "opaque_state: dataset.file is a generator" in said


SPAWNED = """
import sys
from pathlib import Path
from torch.utils.data import DataLoader
from tests.processes.datasets import Noted, as_they_are
import torchcache.doors.samples
from torchcache import CachedDataset


def look(*arguments):
    raise AssertionError("a worker hashed the state again")


if __name__ == "__main__":
    cached = CachedDataset(Noted(4, Path(sys.argv[1])), persistent=True, persistent_cache_dir=sys.argv[2])
    cached.cache_instance
    loader = DataLoader(cached, num_workers=1, multiprocessing_context="spawn", collate_fn=as_they_are)
    assert [batch[0]["i"] for batch in loader] == [0, 1, 2, 3]
    assert not cached.cache_instance.stats().faults
    print(cached.cache_instance.explain(3).samples[0].found_in)
else:
    torchcache.doors.samples.look_at_state = look
"""


def test_a_spawned_worker_agrees_without_hashing_again(tmp_path, root):
    program = tmp_path / "spawned.py"
    program.write_text(SPAWNED)
    said = run(f"import runpy, sys; sys.argv[0] = {str(program)!r}; " + SCRIPT, tmp_path, root, timeout_seconds=60)
    assert said.splitlines()[-1] == "store", said


#: Runs a file as its interpreter would have, so that spawned workers find it.
SCRIPT = "import subprocess; sys.exit(subprocess.run([sys.executable, *sys.argv]).returncode)"


def test_an_edit_of_the_code_that_a_spawned_worker_imports_is_seen(tmp_path, root):
    """The parent found the fingerprint out before; the worker runs other code."""
    (tmp_path / "edited.py").write_text(EDITED)
    program = tmp_path / "editing.py"
    program.write_text(EDITING)
    said = run(f"import sys; sys.argv[0] = {str(program)!r}; " + SCRIPT, tmp_path, root, timeout_seconds=60)
    assert said.splitlines()[-2:] == ["[1]", "[0]"], said


EDITED = """
from torch.utils.data import Dataset

class Edited(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        return i
"""

EDITING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from torch.utils.data import DataLoader
from edited import Edited
from torchcache import CachedDataset

if __name__ == "__main__":
    cached = CachedDataset(Edited(), persistent=True, persistent_cache_dir=sys.argv[2])
    cached.cache_instance
    source = Path(sys.argv[1]) / "edited.py"
    source.write_text(source.read_text().replace("return i", "return i + 1"))
    loader = DataLoader(cached, num_workers=1, multiprocessing_context="spawn", collate_fn=list)
    print([sample for batch in loader for sample in batch])
    print([cached[0]])
"""


KILLED = """
import os, signal, sys
from pathlib import Path
from torch.utils.data import DataLoader
from tests.processes.datasets import Noted, as_they_are, take_notes
from torchcache import CachedDataset

folder, N = Path(sys.argv[1]), 40
cached = CachedDataset(Noted(N, folder), persistent=True, persistent_cache_dir=sys.argv[2])
loader = DataLoader(cached, batch_size=1, num_workers=2, collate_fn=as_they_are)
iterator = iter(loader)
for _ in range(20):
    next(iterator)
os.kill(iterator._workers[0].pid, signal.SIGKILL)
try:
    for _ in iterator:
        pass
except (RuntimeError, ConnectionError):
    del iterator
else:
    raise AssertionError("nobody said that a worker was killed")
before = take_notes(folder)
assert [batch[0]["name"] for batch in loader] == [f"sample {i}" for i in range(N)]
again = take_notes(folder)
assert {*before, *again} == {*range(N)}
assert len(again) < N - 5, again
assert [batch[0]["i"] for batch in loader] == [*range(N)]
assert take_notes(folder) == []
"""


def test_a_killed_worker_costs_only_what_it_had_not_committed(tmp_path, root):
    # torch may be interrupted by the news while it makes temporary files.
    run(KILLED, tmp_path, root, timeout_seconds=60, TMPDIR=str(tmp_path))


def test_workers_of_an_iterable_share_by_id(tmp_path, root):
    cached = CachedIterableDataset(
        Shards(20), deterministic=Decode(tmp_path), persistent=True, persistent_cache_dir=root
    )
    for workers, computed in ((2, list(range(20))), (1, []), (0, [])):
        seen = [x[0].item() for x in DataLoader(cached, batch_size=None, num_workers=workers)]
        assert sorted(seen) == list(range(20))
        assert take_notes(tmp_path) == computed
    cached.cache_instance.close()


def test_warm_leaves_all_on_disk(tmp_path, root):
    cached = CachedDataset(Noted(50, tmp_path), persistent=True, persistent_cache_dir=root)
    state = torch.get_rng_state()
    assert cached.warm(num_workers=2, progress=False, batch_size=8) == Warmed(computed=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert take_notes(tmp_path) == list(range(50))
    assert cached.warm(num_workers=2, progress=False) == Warmed(found=50)
    assert cached[7]["name"] == "sample 7"
    assert take_notes(tmp_path) == []
    assert cached.cache_instance.stats().store_hits == 1
    cached.cache_instance.close()


def test_an_error_in_a_worker_names_the_item_and_the_rest_is_kept(tmp_path, root):
    cached = CachedDataset(Noted(30, tmp_path, fails_at=17), persistent=True, persistent_cache_dir=root)
    with pytest.raises(SampleError, match=r"index 17 of Noted raised ValueError\('not a JPEG'\)") as failed:
        cached.warm(num_workers=2, progress=False, batch_size=4)
    assert failed.value.index == 17
    computed = take_notes(tmp_path)
    rest = cached.warm(num_workers=1, progress=False, indices=[i for i in range(30) if i != 17])
    assert rest == Warmed(found=len(computed), computed=29 - len(computed))
    assert not multiprocessing.active_children()
    cached.cache_instance.close()
