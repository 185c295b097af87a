"""Datasets that people have: a batch is one lookup, and the dataset behind the cache is reached through it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from torchcache import CachedDataset, CachedIterableDataset, CacheMissError, UncacheableError, disabled

ROOT = Path(__file__).parents[2]
ASKED: list[object] = []


@pytest.fixture(autouse=True)
def nothing_was_asked():
    ASKED.clear()


class Squares(Dataset):
    """Sample ``i`` is the square of ``i``, with texts of different lengths beside it."""

    classes = ("even", "odd")

    def __init__(self, n=10):
        self.n = n
        self.targets = [i % 2 for i in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        ASKED.append(i)
        if not 0 <= i < self.n:
            raise IndexError(f"no sample {i}")
        return {"x": torch.full((3, 2), float(i * i)), "i": i, "name": f"sample {'x' * i}", "label": self.targets[i]}

    @property
    def total(self):
        return sum(self.targets)

    @staticmethod
    def collate(batch):
        return [item["i"] for item in batch]

    def grow(self):
        self.n += 1


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def options_of(where, tmp_path):
    if where == "memory":
        return {}
    return {"persistent": True, "persistent_cache_dir": tmp_path, "max_memory_cache_size": 0}


# -- a batch is one lookup ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_batch_is_what_its_samples_are_one_by_one(tmp_path, where):
    cached = CachedDataset(Squares(), **options_of(where, tmp_path))
    plain = Squares()
    for indices in ([3, 1, 2], [1, 2, 3, 4, 4, 0], [9, 9], [], [np.int64(3), torch.tensor(5), 5], [*range(10)] * 3):
        batch = cached.__getitems__(indices)
        cached.cache_instance.flush()
        assert all(map(same, batch, [plain[int(i)] for i in indices]))
        assert all(map(same, batch, [cached[i] for i in indices]))
    assert cached.cache_instance.stats().misses == 10
    cached.cache_instance.close()


def test_a_data_loader_asks_once_for_a_batch(tmp_path):
    options = options_of("disk", tmp_path)
    first = CachedDataset(Squares(64), **options)
    for i in range(64):
        first[i]
    first.cache_instance.close()
    cached = CachedDataset(Squares(64), **options)
    len(cached)
    lookups = []
    store = cached.cache_instance._core.tiers.open(cached.cache_instance._core.caller.state.look())
    get_many = store.get_many
    store.get_many = lambda *args: lookups.append(args) or get_many(*args)
    ASKED.clear()
    batches = [batch["i"].tolist() for batch in DataLoader(cached, batch_size=16, shuffle=True)]
    assert sorted(i for batch in batches for i in batch) == [*range(64)]
    assert (len(lookups), ASKED) == (4, [])
    assert cached.cache_instance.stats().store_hits == 64
    cached.cache_instance.close()


def test_samples_of_a_batch_share_no_memory():
    cached = CachedDataset(Squares())
    cached.__getitems__([1, 2])
    one, two, again = cached.__getitems__([1, 2, 1])
    one["x"].fill_(7)
    again["x"].add_(1)
    assert two["x"].unique().tolist() == [4]
    assert again["x"].unique().tolist() == [2]
    assert one["x"].untyped_storage().nbytes() == one["x"].nbytes
    assert same(cached[1], Squares()[1])


def test_augment_runs_for_each_sample_of_a_batch_in_order():
    seen = []

    def augment(sample):
        seen.append(sample["i"])
        return sample["i"], torch.rand(1).item()

    cached = CachedDataset(Squares(), augment=augment)
    cached[3]
    del seen[:]
    torch.manual_seed(1)
    batch = cached.__getitems__([2, 3, 4])
    assert seen == [2, 3, 4]
    torch.manual_seed(1)
    assert batch == [cached[i] for i in (2, 3, 4)]


def test_what_the_computing_draws_and_what_augment_draws_follow_each_other_as_one_by_one():
    class Noisy(Squares):
        def __getitem__(self, i):
            return torch.rand(1).item() if i % 2 else float(i)

    def augment(sample):
        return sample, random.random()

    def drawn(ask):
        torch.manual_seed(0)
        random.seed(0)
        return ask(CachedDataset(Noisy(), augment=augment))

    indices = [0, 1, 2, 3]
    batch = drawn(lambda cached: cached.__getitems__(indices))
    assert batch == drawn(lambda cached: [cached[i] for i in indices])


def test_random_samples_in_a_batch_are_never_frozen():
    class Noisy(Squares):
        def __getitem__(self, i):
            return torch.rand(1).item() if i % 2 else float(i)

    cached = CachedDataset(Noisy())
    for _ in range(3):
        assert len({tuple(cached.__getitems__([0, 1, 2, 3])) for _ in range(4)}) == 4
    assert cached.cache_instance.stats().memory_rows == 2


def test_the_version_of_each_sample_of_a_batch_counts():
    versions = {}
    cached = CachedDataset(Squares(), item_version=versions.get)
    cached.__getitems__([1, 2, 3])
    versions[2] = 1.5
    cached.__getitems__([1, 2, 3])
    assert ASKED == [1, 2, 3, 2]
    versions[2] = True  # an int, and another value than 1
    versions[1] = 1
    cached.__getitems__([1, 2])
    assert ASKED == [1, 2, 3, 2, 1, 2]


def test_an_error_of_the_dataset_leaves_a_batch_as_it_is():
    cached = CachedDataset(Squares())
    cached.__getitems__([1, 2])
    with pytest.raises(IndexError, match="no sample 11"):
        cached.__getitems__([1, 3, 11, 4])
    assert ASKED == [1, 2, 3, 11]


def test_a_batch_of_what_is_no_index_is_refused_as_one_is():
    with pytest.raises(UncacheableError, match=r"index \(1, 2\)"):
        CachedDataset(Squares()).__getitems__([(1, 2), 0])


def test_a_batch_without_the_cache():
    cached = CachedDataset(Squares())
    with disabled():
        cached.__getitems__([1, 1])
    CachedDataset(Squares(), enabled=False).__getitems__([1])
    CachedDataset(Squares(), mode="off").__getitems__([1])
    assert ASKED == [1, 1, 1, 1]


def test_a_batch_where_everything_must_hit(tmp_path):
    options = options_of("disk", tmp_path)
    cached = CachedDataset(Squares(), **options)
    cached.__getitems__([1, 2])
    cached.cache_instance.close()
    required = CachedDataset(Squares(), mode="require", **options)
    assert [sample["i"] for sample in required.__getitems__([2, 1])] == [2, 1]
    with pytest.raises(CacheMissError):
        required.__getitems__([2, 3])
    required.cache_instance.close()


def test_hits_of_a_batch_are_audited():
    class Counting(Squares):
        def __getitem__(self, i):
            ASKED.append(i)
            return [len(ASKED)]

    cached = CachedDataset(Counting(), verify_hits=1.0)
    cached.__getitems__([1, 2])
    cached.__getitems__([1, 2])
    assert cached.cache_instance.stats().mismatched_rows == 2


def test_a_derived_class_with_its_own_getitem_is_asked_for_each_sample():
    class Doubled(CachedDataset):
        def __getitem__(self, index):
            return 2 * super().__getitem__(index)["x"]

    (batch,) = DataLoader(Doubled(Squares(4)), batch_size=4)
    assert batch[:, 0, 0].tolist() == [0, 2, 8, 18]


def test_a_damaged_sample_of_a_batch_is_computed_again(tmp_path):
    options = options_of("disk", tmp_path)
    cached = CachedDataset(Squares(), **options)
    cached.__getitems__([*range(10)])
    cached.cache_instance.close()
    (path,) = tmp_path.glob("*/data.mdb")
    data = path.read_bytes()
    assert b"sample xxxxxxxxx" in data
    path.write_bytes(data.replace(b"sample xxxxxxxxx", b"sample xxxxYxxxx"))

    again = CachedDataset(Squares(), **options)
    ASKED.clear()
    assert all(map(same, again.__getitems__([*range(10)]), [Squares()[i] for i in range(10)]))
    stats = again.cache_instance.stats()
    assert (stats.store_hits, stats.misses, stats.faults) == (9, 1, {"corrupt_record": 1})
    again.cache_instance.close()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_fetch_batches(tmp_path, start):
    cached = CachedDataset(TensorDataset(torch.arange(32.0)), persistent=True, persistent_cache_dir=tmp_path)
    for _ in range(2):
        loader = DataLoader(cached, batch_size=8, num_workers=2, multiprocessing_context=start)
        assert torch.cat([batch for (batch,) in loader]).tolist() == [*range(32)]
    cached.cache_instance.close()


# -- wrapped by torch, and around what torch wraps ---------------------------------------------------------------------


def test_it_goes_into_torchs_wrappers_and_takes_them():
    inner = CachedDataset(Squares(6))
    half, rest = random_split(inner, [2, 4], generator=torch.Generator().manual_seed(0))
    assert isinstance(half, Subset)
    both = ConcatDataset([half, rest])
    for _ in range(2):
        assert sorted(sample["i"] for sample in both) == [*range(6)]
        assert sorted(i for batch in DataLoader(rest, batch_size=3) for i in batch["i"].tolist()) == sorted(
            rest.indices
        )
    assert sorted(ASKED) == [*range(6)]
    assert half.dataset.classes == Squares.classes

    ASKED.clear()
    for outer in (Subset(Squares(6), [4, 2]), ConcatDataset([Squares(3), Squares(2)]), half):
        cached = CachedDataset(outer)
        for _ in range(2):
            assert [sample["i"] for sample in cached.__getitems__([1, 0])] == [outer[1]["i"], outer[0]["i"]]


def test_two_subsets_share_nothing():
    cached = [CachedDataset(Subset(Squares(), indices)) for indices in ([1, 2], [2, 1])]
    assert [c[0]["i"] for c in cached] == [1, 2]
    assert len({c.cache_instance.module_hash for c in cached}) == 2


# -- the dataset's attributes ------------------------------------------------------------------------------------------


def test_attributes_of_the_dataset_are_passed_on():
    dataset = Squares()
    cached = CachedDataset(dataset, augment=as_it_is)
    assert cached.classes is dataset.classes
    assert cached.targets is dataset.targets
    assert cached.total == 5
    assert cached.collate([{"i": 3}]) == [3]
    assert CachedDataset(CachedDataset(dataset)).targets is dataset.targets
    assert CachedIterableDataset([("a", 1)], deterministic=as_it_is).__class__ is CachedIterableDataset
    with pytest.raises(AttributeError, match="nothing"):
        cached.nothing  # noqa: B018 - that it raises is what is tested
    assert not hasattr(cached, "_private")


def as_it_is(sample):
    return sample


def test_a_method_that_may_change_the_dataset_is_named_with_what_to_do():
    cached = CachedDataset(Squares())
    with pytest.raises(AttributeError, match=r"call it as dataset.grow\(\) .* refresh\(\)"):
        cached.grow()
    assert not hasattr(cached, "grow")
    before = cached.cache_instance.module_hash
    cached.dataset.grow()
    cached.refresh()
    assert cached.cache_instance.module_hash != before


def test_an_attribute_of_the_dataset_is_not_set_on_the_cache():
    cached = CachedDataset(Squares())
    with pytest.raises(AttributeError, match=r"set it as dataset.targets .* refresh\(\)"):
        cached.targets = []
    cached.augment = as_it_is
    cached.note = 3
    assert (cached.note, cached.augment) == (3, as_it_is)

    class Own(CachedDataset):
        def __init__(self, dataset):
            super().__init__(dataset)
            self.targets = "own"

    assert Own(Squares()).targets == "own"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cached: pickle.loads(pickle.dumps(cached))])
def test_a_copy_passes_attributes_on(copied):
    again = copied(CachedDataset(Squares()))
    assert again.classes == Squares.classes
    assert again.__getitems__([3])[0]["i"] == 3


# -- pandas and Hugging Face -------------------------------------------------------------------------------------------


class Rows(Dataset):
    """Items of a DataFrame, as they lie in it."""

    def __init__(self, frame):
        self.frame = frame

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, i):
        ASKED.append(i)
        row = self.frame.iloc[i]
        return {
            "path": Path(row["path"]),
            "label": row["label"],
            "day": row["day"].to_pydatetime(),
            "raw": row.to_numpy()[:2],
        }


def test_a_dataset_of_a_data_frame(tmp_path):
    pandas = pytest.importorskip("pandas", reason="needs pandas (pip install 'torchcache[dev]')")
    days = pandas.to_datetime(["2024-01-01", "2024-02-03"])
    frame = pandas.DataFrame({"path": ["a.png", "b/c.png"], "label": [0, 1], "day": days})

    def batch_of(frame):
        cached = CachedDataset(Rows(frame), **options_of("disk", tmp_path))
        assert cached.frame is frame
        batch = cached.__getitems__([0, 1])
        cached.cache_instance.close()
        return batch

    right = [Rows(frame)[i] for i in range(2)]
    ASKED.clear()
    for _ in range(2):
        for got, was in zip(batch_of(frame.copy()), right, strict=True):
            assert list(map(type, got.values())) == list(map(type, was.values()))
            assert got.pop("raw").tolist() == was["raw"].tolist()
            assert got == {key: was[key] for key in got}
    assert ASKED == [0, 1]
    changed = frame.copy()
    changed.loc[0, "label"] = 7
    assert batch_of(changed)[0]["label"] == 7


HUGGING_FACE = """
import json, sys
import datasets
from torchcache import CachedDataset

folder, factor, form = sys.argv[1], int(sys.argv[2]), sys.argv[3]
datasets.disable_progress_bars()

def scaled(row):
    return {"c": row["a"] * FACTOR}

def doubled(batch):
    return {"a": [2 * a for a in batch["a"]]}

FACTOR = factor
plain = datasets.load_dataset("json", data_files=folder + "/rows.jsonl", split="train", cache_dir=folder + "/hf")
data = plain.map(scaled)
if form == "bar":
    from tqdm.auto import tqdm
    list(tqdm(range(3)))
elif form == "torch":
    data.set_format("torch")
elif form == "columns":
    data.set_format(columns=["c"])
elif form == "transform":
    data = plain.with_transform(doubled)
elif form == "selected":
    data = data.select([1, 0, 2])
cached = CachedDataset(data, persistent=True, persistent_cache_dir=folder + "/cache")
items = [str(item) for item in cached.__getitems__([0, 1, 2])]
assert items == [str(data[i]) for i in range(3)], items
cached.cache_instance.flush()
stats = cached.cache_instance.stats()
print(json.dumps([stats.misses, stats.hits, len(list(cached.cache_instance._core.identity.describe()))]))
"""


@pytest.mark.slow
def test_a_dataset_of_hugging_face_is_known_by_its_own_fingerprint_and_form(tmp_path):
    pytest.importorskip("datasets", reason="needs datasets (pip install 'torchcache[dev]')")
    rows = [json.dumps({"a": i, "b": f"x{i}"}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def run(factor, form):
        done = subprocess.run(
            [sys.executable, "-c", HUGGING_FACE, str(tmp_path), str(factor), form],
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        misses, hits, parts = json.loads(done.stdout.splitlines()[-1])
        assert parts < 50, "the library's own code is not walked"
        return misses, hits

    assert run(1, "plain") == (3, 0)
    assert run(1, "bar") == (0, 3), "neither the map before nor a bar leaves a trace"
    assert run(2, "plain") == (3, 0)
    for form in ("torch", "columns", "transform", "selected"):
        assert run(1, form) == (3, 0)
        assert run(1, form) == (0, 3)


def test_an_attribute_of_hugging_face_is_passed_on_and_a_change_in_place_is_not():
    datasets = pytest.importorskip("datasets", reason="needs datasets (pip install 'torchcache[dev]')")
    data = datasets.Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]})
    cached = CachedDataset(data)
    assert cached.column_names == ["a", "b"]
    assert cached[0] == {"a": 1, "b": "x"}
    with pytest.raises(AttributeError, match=r"call it as dataset.set_format\(\)"):
        cached.set_format("torch")
    data.set_format(columns=["a"])
    cached.refresh()
    assert cached[0] == {"a": 1}


def test_a_dataset_that_holds_one_of_hugging_face_goes_by_its_fingerprint():
    datasets = pytest.importorskip("datasets", reason="needs datasets (pip install 'torchcache[dev]')")

    class Around(Dataset):
        def __init__(self, data):
            self.data = data

        def __getitem__(self, i):
            return self.data[i]["a"]

    hashes = [
        CachedDataset(Around(datasets.Dataset.from_dict({"a": values}))).cache_instance.module_hash
        for values in ([1, 2], [1, 2], [1, 3])
    ]
    assert hashes[0] == hashes[1] != hashes[2]
