"""Data sets whose samples are cached by index, in one process."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import logging
import os
import pickle
import queue
import random
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import torchcache
from torchcache import (
    CachedDataset,
    CachedIterableDataset,
    ConfigError,
    SampleError,
    UncacheableError,
    Warmed,
    cache_of,
    disabled,
)

ASKED: list[object] = []


@pytest.fixture(autouse=True)
def nothing_was_asked():
    ASKED.clear()


class Squares(Dataset):
    """Sample ``i`` is the square of ``i``, in several forms."""

    def __init__(self, n=10, scale=1):
        self.n = n
        self.scale = scale

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        ASKED.append(i)
        if not 0 <= i < self.n:
            raise IndexError(f"no sample {i}")
        return {"x": torch.full((2, 3), float(i * i * self.scale)), "y": np.arange(i), "name": f"sample {i}"}


class Other(Squares):
    """The same state, and other code."""

    def __getitem__(self, i):
        return -i


def hash_of(dataset, **options):
    return cache_of(CachedDataset(dataset, **options)).module_hash


def test_a_sample_is_computed_once():
    cached = CachedDataset(Squares())
    for _ in range(2):
        sample = cached[3]
        assert sample["x"].tolist() == [[9.0] * 3] * 2
        assert sample["y"].tolist() == [0, 1, 2]
        assert sample["name"] == "sample 3"
    assert ASKED == [3]
    assert cached.cache_instance.stats().memory_hits == 1
    assert cache_of(cached) is cached.cache_instance


def test_what_is_returned_belongs_to_the_caller():
    cached = CachedDataset(Squares())
    for _ in range(3):
        sample = cached[2]
        assert sample["x"].tolist() == [[4.0] * 3] * 2
        sample["x"] += 1
        sample["y"] += 1
        sample["name"] = ""


def test_an_image_comes_back_as_one():
    cached = CachedDataset([Image.new("RGB", (4, 2), (1, 2, 3))])
    for _ in range(2):
        assert cached[0].getpixel((0, 0)) == (1, 2, 3)
    assert cached.cache_instance.stats().hits == 1


def test_it_has_the_length_and_the_exceptions_of_its_dataset():
    cached = CachedDataset(Squares(4))
    assert len(cached) == 4
    with pytest.raises(IndexError, match="no sample 4"):
        cached[4]
    with pytest.raises(IndexError, match="no sample -1"):
        cached[-1]
    assert len(list(cached)) == 4  # by IndexError
    assert CachedDataset([5, 6, 7])[-1] == 7
    with pytest.raises(KeyError):
        CachedDataset({"a": 1})["b"]


@pytest.mark.parametrize("index", [np.int64(3), torch.tensor(3)])
def test_an_index_of_numpy_or_torch_is_an_int(index):
    cached = CachedDataset(Squares())
    assert cached[index]["name"] == cached[3]["name"] == "sample 3"
    assert [type(i) for i in ASKED] == [int]


@pytest.mark.parametrize("index", [slice(0, 2), [1, 2], 1.0, None])
def test_an_index_of_several_samples_is_refused(index):
    with pytest.raises(UncacheableError, match="one sample at a time") as refused:
        CachedDataset(Squares())[index]
    assert refused.value.argument == "index"


def test_str_keys_and_ints_are_told_apart():
    cached = CachedDataset({"1": "text", 1: "number", b"1": "bytes"})
    for _ in range(2):
        assert [cached["1"], cached[1], cached[b"1"]] == ["text", "number", "bytes"]
    assert cached.cache_instance.stats().misses == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_it_takes_the_place_of_its_dataset(workers):
    cached = CachedDataset(Squares())
    combined = ConcatDataset([Subset(cached, [1, 2]), CachedDataset(Squares(3, scale=10))])
    loader = DataLoader(combined, batch_size=2, num_workers=workers, collate_fn=list)
    for _ in range(2):
        assert [sample["x"][0, 0].item() for batch in loader for sample in batch] == [1, 4, 0, 10, 40]


def test_threads_may_index_at_once():
    cached = CachedDataset(Squares(50))
    wrong = []

    def read():
        wrong.extend(i for i in range(50) if cached[i]["name"] != f"sample {i}")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(ASKED) == list(range(50))


# -- before and after the cache -------------------------------------------------------------------------------------


def test_augment_runs_at_every_access_and_deterministic_once():
    done = []

    def double(sample):
        done.append(sample)
        return sample * 2

    cached = CachedDataset([1, 2, 3], deterministic=double, augment=lambda sample: (sample, random.random()))
    first, second = cached[1], cached[1]
    assert first[0] == second[0] == 4
    assert first[1] != second[1]
    assert done == [2]


@pytest.mark.parametrize("draw", [lambda: torch.rand(1).item(), np.random.rand, random.random])
def test_a_random_sample_is_not_stored_and_said_once(caplog, draw):
    class Noisy(Dataset):
        def __getitem__(self, i):
            return i + draw()

    cached = CachedDataset(Noisy())
    assert len({cached[0] for _ in range(6)}) == 6
    stats = cached.cache_instance.stats()
    assert stats.bypasses == {"random_numbers": 6}
    assert stats.memory_rows == 0
    assert sum("augment=" in record.getMessage() for record in caplog.records) == 1


def test_a_sample_that_would_not_come_back_as_it_is_is_not_kept_and_named(caplog):
    cached = CachedDataset([{"a": [1, np.ma.masked_array([1.0, 2.0], [0, 1])]}])
    for _ in range(2):
        sample = cached[0]["a"][1]
        assert type(sample) is np.ma.MaskedArray
        assert sample.mask.tolist() == [False, True]
    assert cached.cache_instance.stats().bypasses == {"unsupported_result": 2}
    (line,) = caplog.messages
    assert "MaskedArray" in line
    assert "output['a'][1]" in line


def test_the_dataset_s_own_error_of_that_class_passes():
    class Refuses(Dataset):
        def __getitem__(self, i):
            raise UncacheableError("mine", argument="x")

    with pytest.raises(UncacheableError, match=r"^mine$"):
        CachedDataset(Refuses())[0]


def test_an_item_s_version_counts():
    versions = {1: 0.5}
    cached = CachedDataset(Squares(), item_version=versions.get)
    cached[1], cached[1], cached[2], cached[2]
    assert ASKED == [1, 2]
    versions[1] = 1.5
    cached[1]
    assert ASKED == [1, 2, 1]
    with pytest.raises(UncacheableError, match="item_version") as refused:
        CachedDataset(Squares(), item_version=lambda i: [i])[0]
    assert refused.value.argument == "item_version"


def test_disabled_leaves_both_transforms():
    cached = CachedDataset([1, 2], deterministic=str, augment=lambda text: text + "!", enabled=False)
    assert cached[0] == "1!"
    assert not hasattr(cached, "cache_instance")
    with pytest.raises(ConfigError, match="CachedDataset has no cache"):
        cache_of(cached)
    other = CachedDataset(Squares(), augment=lambda sample: sample["name"])
    with disabled():
        assert other.warm(progress=False) == Warmed()
        assert [other[1], other[1]] == ["sample 1", "sample 1"]
    assert ASKED == [1, 1]


# -- the fingerprint ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Held:
    value: object

    def __getitem__(self, i):
        return i


class Flip:
    def __init__(self, axis=0):
        self.axis = axis

    def __call__(self, x):
        return np.flip(x, self.axis)


class Resize(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.size = size
        self.register_buffer("kernel", torch.ones(3))

    def forward(self, x):
        return x[: self.size]


def filled(module):
    module.kernel.fill_(7)
    return module


def appended(array):
    return np.append(array, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Squares(), Other()),
        (Squares(), Squares(scale=2)),
        (Held(["a.jpg", "b.jpg"]), Held(["b.jpg", "a.jpg"])),
        (Held(("a", 1)), Held(["a", 1])),
        (Held([1]), Held([True])),
        (Held(np.zeros(100_000)), Held(appended(np.zeros(99_999)))),
        (Held(np.array(["a", "b"])), Held(np.array(["a", "c"]))),
        (Held(np.zeros((2, 3))[:, ::2]), Held(np.ones((2, 3))[:, ::2])),
        (Held(torch.zeros(3)), Held(torch.ones(3))),
        (Held(Flip(0)), Held(Flip(1))),
        (Held(Resize()), Held(Resize(4))),
        (Held(Resize()), Held(filled(Resize()))),
        (Held(nn.Sequential(Resize())), Held(nn.Sequential(Resize(), Resize()))),
        (Held(lambda x: x + 1), Held(lambda x: x + 2)),
        (Held(functools.partial(max, 1)), Held(functools.partial(max, 2))),
        (Subset(Squares(), [0]), Subset(Squares(), [1])),
        (Subset(Squares(), [0]), Subset(Squares(scale=2), [0])),
        (ConcatDataset([Squares()]), ConcatDataset([Squares(), Squares()])),
        (TensorDataset(torch.zeros(3)), TensorDataset(torch.ones(3))),
        (CachedDataset(Squares()), CachedDataset(Squares(scale=2))),
        (CachedDataset(Squares()), CachedDataset(Squares(), deterministic=str)),
    ],
)
def test_datasets_that_differ_share_nothing(one, other):
    assert hash_of(one) != hash_of(other)
    for dataset in (one, other):
        assert hash_of(copy.deepcopy(dataset)) == hash_of(dataset), "its copy is the same"


def test_what_is_done_before_the_cache_counts():
    hashes = {hash_of([1], **options) for options in (
        {}, {"deterministic": str}, {"deterministic": Flip()}, {"deterministic": Flip(1)},
        {"deterministic": lambda x: x}, {"deterministic": lambda x: -x}, {"version": "2"},
    )}  # fmt: skip
    assert len(hashes) == 7
    assert hash_of([1], augment=str) == hash_of([1]), "what is done after it does not"


FACTOR = 2


class Multiplied(Dataset):
    def __getitem__(self, i):
        return i * FACTOR


def test_a_global_that_the_code_uses_counts(monkeypatch):
    before = hash_of(Multiplied())
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert hash_of(Multiplied()) != before


def test_use_of_the_dataset_leaves_its_fingerprint():
    class Used(Dataset):
        def __init__(self):
            self.calls = 0

        def __getitem__(self, i):
            self.calls += 1
            return 2 * i

    dataset = Used()
    before = hash_of(dataset)
    dataset[1]
    assert hash_of(Subset(dataset, [0])) == hash_of(Subset(Used(), [0]))
    assert hash_of(dataset) == before


class Drawing(Dataset):
    """Has a generator of its own, which is a number."""

    def __init__(self):
        self.seed = 1

    def __getitem__(self, i):
        self.seed = (self.seed * 5 + 3) % 17
        return self.seed + i


class DrawingInPlace(Drawing):
    def __init__(self):
        self.state = [1]

    def __getitem__(self, i):
        self.state[0] = (self.state[0] * 5 + 3) % 17
        return self.state[0] + i


class Remembering(Dataset):
    """Changes what it reads, and no sample depends on it."""

    def __init__(self):
        self.calls = 0
        self.last = None

    def __getitem__(self, i):
        self.calls = self.calls + 1
        if self.last != i:
            self.last, self.value = i, i * 2
        return self.value


@pytest.mark.parametrize("make", [Drawing, DrawingInPlace])
@pytest.mark.parametrize("hold", [lambda dataset: dataset, lambda dataset: Subset(dataset, range(9))])
def test_samples_that_depend_on_state_that_they_change_are_not_cached(make, hold, caplog):
    cached, plain = CachedDataset(hold(make())), hold(make())
    assert [cached[0] for _ in range(9)] == [plain[0] for _ in range(9)]
    assert cached.cache_instance.stats().bypasses["random_numbers"] == 9
    assert caplog.text.count("state of the dataset was changed") == 1


def test_state_that_a_sample_changes_and_does_not_depend_on_is_tried_a_few_times():
    dataset = Remembering()
    cached = CachedDataset(dataset)
    for _ in range(2):
        assert [cached[i] for i in range(40)] == [2 * i for i in range(40)]
    stats = cached.cache_instance.stats()
    assert (stats.memory_hits, stats.misses, dict(stats.bypasses)) == (40, 40, {})
    assert dataset.calls <= 40 + 2 * 8
    assert dataset.last == 39  # as if nothing had been tried


class Scaled(Dataset):
    @functools.cached_property
    def scale(self):
        return 1.0

    def __getitem__(self, i):
        return i * self.scale


def test_what_a_cached_property_holds_counts():
    """Whether it was computed or assigned cannot be told."""
    dataset = Scaled()
    cached = CachedDataset(dataset)
    assert cached[1] == 1.0
    dataset.scale = 8.0
    cached.refresh()
    assert cached[1] == 8.0

    others = [Scaled(), Scaled()]
    others[0].scale, others[1].scale = 2.0, 3.0
    assert len({hash_of(other) for other in [*others, Scaled()]}) == 3


class Times(nn.Module):
    def forward(self, x):
        return x * 2


class Plus(nn.Module):
    def forward(self, x):
        return x + 1


class Chained(Dataset):
    def __init__(self, modules):
        self.modules = modules

    def __getitem__(self, i):
        x = torch.tensor(float(i))
        for module in self.modules.values() if hasattr(self.modules, "values") else self.modules.children():
            x = module(x)
        return x


@pytest.mark.parametrize(
    "hold",
    [nn.ModuleDict, lambda held: nn.Sequential(OrderedDict(held)), lambda held: held],
    ids=["ModuleDict", "Sequential", "dict"],
)
def test_the_order_of_modules_counts(hold):
    one = Chained(hold({"a": Times(), "b": Plus()}))
    other = Chained(hold({"b": Plus(), "a": Times()}))
    assert one[1] != other[1]
    assert hash_of(one) != hash_of(other)
    assert hash_of(one) == hash_of(Chained(hold({"a": Times(), "b": Plus()})))


@pytest.mark.parametrize("hold", [nn.ParameterDict, dict], ids=["ParameterDict", "dict"])
def test_the_order_of_parameters_counts(hold):
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    one, other = hold(OrderedDict(a=a, b=b)), hold(OrderedDict(b=b, a=a))
    assert hash_of(Chained(one)) != hash_of(Chained(other))


def test_a_mapping_is_not_asked_for_its_samples():
    class Files(Mapping):
        def __init__(self, names):
            self.names = names

        def __getitem__(self, name):
            ASKED.append(name)
            return self.names[name]

        def __iter__(self):
            return iter(self.names)

        def __len__(self):
            return len(self.names)

    cached = CachedDataset(Files({"a": 1, "b": 2}))
    assert cached["a"] == cached["a"] == 1
    assert ASKED == ["a"]
    assert hash_of(Files({"a": 1})) != hash_of(Files({"a": 2}))


def test_it_is_found_out_once_until_refresh():
    dataset = Squares()
    cached = CachedDataset(dataset)
    before = cached.cache_instance.module_hash
    cached[2]
    dataset.scale = 3
    assert cached[2]["x"][0, 0] == 4, "it is not followed"
    for refresh, expected in ((cached.refresh, 12), (cached.cache_instance.refresh, 20)):
        refresh()
        assert cached[2]["x"][0, 0] == expected
        assert cached.cache_instance.module_hash != before
        dataset.scale = 5


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_finds_it_out_afresh(copied):
    cached = CachedDataset(Squares())
    assert cached[2]["x"][0, 0] == 4
    twin = copied(cached)
    twin.dataset.scale = 3
    assert twin[2]["x"][0, 0] == 12
    assert twin.cache_instance.module_hash != cached.cache_instance.module_hash


def test_a_large_list_of_samples_has_a_name(caplog):
    samples = [Held([i]) for i in range(60_000)]
    one = hash_of(samples)
    samples[59_000].value = [0]
    assert hash_of(samples) != one
    assert not caplog.records


class Unnamed:
    """Stands for a file of h5py or a connection: what it holds is elsewhere, and pickle refuses it."""

    __slots__ = ("handle",)

    def __init__(self):
        self.handle = (i for i in ())


@pytest.mark.parametrize("held", [Unnamed(), torch.eye(2).to_sparse(), (i for i in ()), [queue.SimpleQueue()]])
def test_a_dataset_that_cannot_be_seen_into_is_not_cached_and_says_so(tmp_path, caplog, held):
    cached = CachedDataset(Held(held), persistent=True, persistent_cache_dir=tmp_path / "cache")
    assert [cached[1], cached[1]] == [1, 1]
    assert cached.cache_instance.stats().bypasses == {"opaque_state": 2}
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    for part in ("dataset.value", "register_value", "ignore=", "persistent_module_hash"):
        assert part in said
    assert not (tmp_path / "cache").exists()


def test_what_is_ignored_in_a_dataset_does_not_count(tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path, "ignore": ("value.handle",)}
    first = CachedDataset(Held(Unnamed()), **options)
    assert first[1] == 1
    first.cache_instance.close()
    again = CachedDataset(Held(Unnamed()), **options)
    assert again[1] == 1
    assert again.cache_instance.stats().store_hits == 1
    again.cache_instance.close()
    with pytest.raises(ConfigError, match=r"ignore names 'value.hande'.*did you mean 'value.handle'"):
        CachedDataset(Held(Unnamed()), ignore=("value.hande",))[1]


def test_a_name_of_the_user_s_own_stands_for_it_all(caplog, tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path, "persistent_module_hash": "mine"}
    cached = CachedDataset(Held(Unnamed()), **options)
    assert cached[1] == 1
    cached.cache_instance.close()
    again = CachedDataset(Held(Unnamed()), **options)
    assert again[1] == 1
    assert again.cache_instance.stats().store_hits == 1
    assert again.cache_instance.module_hash == "mine"
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


def test_what_a_getstate_leaves_out_does_not_count(caplog):
    class Reader(Dataset):
        def __init__(self, path):
            self.path = path
            self.file = io.BytesIO(b"content")

        def __getstate__(self):
            return {"path": self.path}

        def __getitem__(self, i):
            return self.file.getvalue()[i]

    assert hash_of(Reader("a")) == hash_of(Reader("a")) != hash_of(Reader("b"))
    assert not caplog.records


def test_two_datasets_of_one_class_are_cleared_apart(tmp_path):
    one, other = (CachedDataset(Squares(n), persistent=True, persistent_cache_dir=tmp_path) for n in (3, 4))
    one[1], other[1]
    one.cache_instance.clear()
    other[1]
    assert ASKED == [1, 1]


def test_explain_says_what_a_sample_s_key_is_made_of(capsys):
    cached = CachedDataset(Squares())
    cached[2]
    one, two = cached.cache_instance.explain(1), cached.cache_instance.explain(2)
    assert [two.samples[0].found_in, one.samples[0].found_in] == ["memory", "nowhere"]
    assert ASKED == [2]
    assert {"state", "mode", "code class Squares", "argument index"} <= one.parts.keys()


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"batch_dim": 0},
        {"unbatched": ("x",)},
        {"padded": True},
        {"check_rows": False},
        {"when_grad": "raise"},
        {"memory_cache_device": None},
    ],
)
def test_an_option_without_a_meaning_is_refused(options):
    (name,) = options
    for door in (CachedDataset, functools.partial(CachedIterableDataset, deterministic=str)):
        with pytest.raises(ConfigError, match=f"{name} has no meaning for a dataset") as refused:
            door([1], **options)
        assert refused.value.argument == name


def test_other_options_are_checked_as_through_other_doors():
    with pytest.raises(ConfigError, match="persistent"):
        CachedDataset([1], persistant=True)
    with pytest.raises(ConfigError, match="zstd_compression=True has no effect"):
        CachedDataset([1], zstd_compression=True)
    with pytest.raises(ConfigError, match="augment=3") as refused:
        CachedDataset([1], augment=3)
    assert refused.value.argument == "augment"


def test_a_dataset_goes_to_the_right_door():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ConfigError, match="CachedIterableDataset"):
        CachedDataset(Stream())
    with pytest.raises(ConfigError, match="give a map-style dataset to CachedDataset"):
        CachedIterableDataset(Squares, deterministic=str)
    with pytest.raises(ConfigError, match="a dataset to CachedDataset"):
        torchcache.torchcache()(Squares())


# -- iterables ------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        yield from self.pairs


def test_an_iterable_s_samples_are_cached_by_id():
    done = []

    def decode(raw):
        done.append(raw)
        return torch.tensor(raw)

    pairs = [("a", 1), ("b", 2), (1, 3), (b"a", 4), ("none", 0)]
    cached = CachedIterableDataset(Stream(pairs), deterministic=decode, augment=lambda x: x.item() + 0.5)
    for order in (pairs, pairs[::-1]):
        cached.dataset.pairs = order
        assert list(cached) == [value + 0.5 for _, value in order]
    assert done == [1, 2, 3, 4, 0]
    assert next(iter(DataLoader(cached, batch_size=2, collate_fn=list))) == [0.5, 4.5]


@pytest.mark.parametrize("pair", [1, (1,), (1, 2, 3), (None, 1), (1.5, 1), [1, 2]])
def test_an_iterable_without_ids_is_refused(pair):
    with pytest.raises(UncacheableError, match=r"let it yield \(id, sample\)") as refused:
        list(CachedIterableDataset(Stream([pair]), deterministic=str))
    assert refused.value.argument == "dataset"


# -- filling --------------------------------------------------------------------------------------------------------


def test_warm_fills_and_counts(tmp_path):
    cached = CachedDataset(Squares(20), persistent=True, persistent_cache_dir=tmp_path)
    cached[3], cached[4]
    state = torch.get_rng_state()
    assert cached.warm(progress=False, batch_size=7) == Warmed(found=2, computed=18)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(ASKED) == list(range(20))
    again = CachedDataset(Squares(20), persistent=True, persistent_cache_dir=tmp_path)
    assert again.warm(progress=False) == Warmed(found=20)
    assert again.warm(progress=False, indices=[1, 5]) == Warmed(found=2)


def test_warm_counts_what_cannot_be_stored():
    cached = CachedDataset([1, 2, 3, 4, 5], deterministic=lambda x: x + (torch.rand(1).item() if x > 2 else 0))
    assert cached.warm(progress=False) == Warmed(computed=2, not_stored=3)


def test_an_error_while_warming_names_the_item_and_the_rest_is_kept(tmp_path):
    class Broken(Squares):
        def __getitem__(self, i):
            if i == 5:
                raise ValueError("not a JPEG")
            return super().__getitem__(i)

    cached = CachedDataset(Broken(), persistent=True, persistent_cache_dir=tmp_path)
    with pytest.raises(SampleError, match=r"index 5 of .*Broken raised ValueError\('not a JPEG'\)") as failed:
        cached.warm(progress=False, batch_size=4)
    assert failed.value.index == 5
    assert cached.warm(progress=False, indices=[0, 1, 2, 3, 4]) == Warmed(found=5)


def test_warming_goes_on_after_an_interruption(tmp_path):
    class Interrupted(Squares):
        def __getitem__(self, i):
            if i == 5 and 5 not in ASKED:
                ASKED.append(5)
                raise KeyboardInterrupt
            return super().__getitem__(i)

    cached = CachedDataset(Interrupted(), persistent=True, persistent_cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cached.warm(progress=False, batch_size=3)
    assert cached.warm(progress=False) == Warmed(found=5, computed=5)


def test_workers_need_a_disk_to_warm():
    with pytest.raises(ConfigError, match="num_workers=2 needs persistent=True") as refused:
        CachedDataset([1]).warm(num_workers=2)
    assert refused.value.argument == "num_workers"
    with pytest.raises(ConfigError, match="enabled=False"):
        CachedDataset([1], enabled=False).warm()


def test_without_tqdm_there_is_a_line_in_place_of_a_bar(monkeypatch, caplog, capsys):
    CachedDataset([1]).warm()
    assert "1/1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert CachedDataset([1]).warm() == Warmed(computed=1)
    assert "torchcache[progress]" in caplog.text


def test_the_example_decodes_each_image_once_and_flips_it_anew(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "examples/decode_images.py", "--folder", str(tmp_path / "images"), "--digits", "30"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2:" in done.stdout
    assert "184 images, 0 decoded" in done.stdout, done.stdout
