"""NumPy arrays as results of a batch come back as arrays, row by row, on a hit as on a miss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchcache import UncacheableError, cache_of, torchcache
from torchcache.results.classes import KnownClasses
from torchcache.results.tree import KINDS_OF_BATCHES, decode, flatten

N = 6
x = torch.arange(1.0, 1 + N * 3).reshape(N, 3)


def stats_of(target):
    return cache_of(target).stats()


def same(a, b):
    """Tell whether two results are the same by type, dtype, shape, bytes, and whether they can be written."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        is_alike = (a.dtype, a.shape, a.flags.writeable) == (b.dtype, b.shape, b.flags.writeable)
        return is_alike and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Pair):
        return same(vars(a), vars(b))
    return a == b


@dataclass
class Pair:
    first: object
    second: object


def read_only(array):
    array.flags.writeable = False
    return array


NUMBERS = [
    "?",
    "i1",
    "i2",
    "i4",
    "i8",
    "u1",
    "u2",
    "u4",
    "u8",
    "f2",
    "f4",
    "f8",
    "c8",
    "c16",
    "M8[ns]",
    "M8[D]",
    "m8[s]",
]

FORMS = {
    "a lone array": lambda x: x.numpy() * 2,
    "a vector": lambda x: x.numpy()[:, 0] * 2,
    "beside a tensor": lambda x: (x * 2, x.numpy() + 1),
    "in a dict": lambda x: {"a": x.numpy() * 2, "b": [x.numpy() + 1, 3, "c"]},
    "in a dataclass": lambda x: Pair(x.numpy() * 2, (x.numpy(), None)),
    "read-only": lambda x: read_only(x.numpy() * 2),
    "broadcast": lambda x: np.broadcast_to(x.numpy()[:, :1] * 2, (len(x), 4)),
    "reversed columns": lambda x: (x.numpy() * 2)[:, ::-1],
    "Fortran order": lambda x: np.asfortranarray(x.numpy() * 2),
    "every other column": lambda x: np.repeat(x.numpy(), 4, 1)[:, ::2],
    "a field of records": lambda x: np.array([(1, v) for v in x[:, 0].tolist()], [("a", "i1"), ("b", "f8")])["b"],
    "no columns": lambda x: np.zeros((len(x), 0), np.float32),
    "four dimensions": lambda x: np.tile(x.numpy()[:, :, None, None], (1, 1, 2, 2)),
    **{f"dtype {name}": lambda x, name=name: (x.numpy() * 2).astype("i8").astype(name) for name in NUMBERS},
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_come_back_as_arrays(form, cache_dir):
    make = FORMS[form]
    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    calls = []

    def forward(x):
        calls.append(len(x))
        return make(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = torchcache(**options)(forward)
        for rows in (x, x, x[[3, 1]], torch.cat([x[:2], x[2:4] * 7]), x[:1]):
            assert same(cached(rows), make(rows))
        assert not stats_of(cached).bypasses
        assert stats_of(cached).misses == N + 2
        cache_of(cached).flush()
        cache_of(cached).close()

        del calls[:]
        again = torchcache(**options)(forward)
        if "dataclass" in form:
            again(x[:1] * 100)  # teaches the class
            del calls[:]
        assert same(again(x.flip(0)), make(x.flip(0)))
        assert not calls
        cache_of(again).close()


def test_what_the_caller_writes_into_an_array_stays_its_own():
    cached = torchcache()(lambda x: x.numpy() * 2)
    for _ in range(3):
        out = cached(x)
        assert np.array_equal(out, x.numpy() * 2)
        out[:] = -1


def test_arrays_are_rounded_through_cache_dtype():
    cached = torchcache(cache_dtype=torch.half)(lambda x: {"a": x.numpy() / 7, "b": x.numpy().astype("i8")})
    first, second = cached(x), cached(x)
    assert same(first, second)
    assert first["a"].dtype == np.float32
    assert np.array_equal(first["a"], (x.numpy() / 7).astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_arrays_have_their_batch_where_tensors_have_it(batch_dim):
    cached = torchcache(batch_dim=batch_dim)(lambda x: x.numpy() * 2)
    rows = x if batch_dim == 0 else x.T.contiguous()
    for part in (rows, rows, rows.narrow(batch_dim, 2, 3)):
        assert np.array_equal(cached(part), part.numpy() * 2)
    assert stats_of(cached).hits == N + 3


def test_arrays_of_padded_batches_are_cut_and_padded():
    def forward(ids, mask):
        return (ids[:, :, None] * mask[:, :, None]).numpy()

    cached = torchcache(padded={"ids": "mask"})(forward)
    ids = torch.tensor([[5.0, 6, 7, 1, 1], [8, 9, 0, 0, 0]])
    mask = (ids != 0).float()
    for _ in range(2):
        assert np.array_equal(cached(ids, mask), forward(ids, mask))
    short = cached(ids[1:, :2], mask[1:, :2])
    assert np.array_equal(short, forward(ids[1:, :2], mask[1:, :2]))
    assert stats_of(cached).misses == 2


REFUSED = {
    "objects": lambda x: np.array([{}] * len(x), object),
    "texts": lambda x: np.array(["a"] * len(x)),
    "records": lambda x: np.zeros(len(x), [("a", "i4")]),
    "another byte order": lambda x: x.numpy().astype(">f4"),
    "long double": lambda x: x.numpy().astype(np.longdouble),
    "a class of one's own": lambda x: x.numpy().view(type("Own", (np.ndarray,), {})),
    "a masked array": lambda x: np.ma.masked_array(x.numpy()),
    "an array without the batch": lambda x: x.numpy().sum(0),
    "a scalar": lambda x: x.numpy().sum(),
    "no dimension": lambda x: np.array(1.0),
    "named dtype": lambda x: x.numpy().astype(np.dtype("f4", metadata={"a": 1})),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_arrays_are_refused_at_first_and_returned_later(kind):
    make = REFUSED[kind]

    def forward(x):
        return make(x) if x[0, 0] < 0 else x * 2

    with pytest.raises(UncacheableError, match="the cached call returned"):
        torchcache()(forward)(-x)
    cached = torchcache()(forward)
    cached(x)
    for _ in range(2):
        assert type(cached(-x)).__name__ == type(make(-x)).__name__
    assert set(stats_of(cached).bypasses) == {"unsupported_result"}


def test_arrays_as_arguments_still_say_what_to_pass():
    cached = torchcache()(lambda x: x * 2)
    with pytest.raises(UncacheableError, match=r"pass torch.from_numpy\(x\)"):
        cached(x.numpy())
    with pytest.raises(UncacheableError, match=r"pass torch.from_numpy\(np.stack\(x\)\)"):
        cached([x.numpy()])


def test_an_encoder_that_returns_arrays_by_default_is_cached():
    class Encoder(nn.Module):
        def encode(self, texts, convert_to_numpy=True):
            numbers = torch.tensor([[float(len(t)), float(t.count("a"))] for t in texts])
            return numbers.numpy() if convert_to_numpy else numbers

    encoder = Encoder()
    embed = torchcache()(encoder.encode)
    texts = ["a cat", "two dogs", "a hat"]
    for part in (texts, texts[::-1], [*texts, "a mouse"]):
        assert same(embed(part), encoder.encode(part))
        assert torch.equal(embed(part, convert_to_numpy=False), encoder.encode(part, convert_to_numpy=False))
    assert stats_of(embed).misses == 8


# -- bytes that nobody wrote ---

STRUCTURES = [
    [13, "<f4", True],
    [13, "<f4"],
    [13, "<f4", 1],
    [13, "|O", True],
    [13, ">f4", True],
    [13, "<f8", True],
    [13, "f4", True],
    [13, "<f4,<f4", True],
    [13, "", True],
    [13, 4, True],
    [13, "<M8[ns]", True],
    [13, "<M8[nonsense]", True],
    [13, "|V999999999", True],
    [0, [13, "<f4", True]],
    [2, [13, "<f4", True], 1],
    [13, "<f4", True, []],
]


@pytest.mark.parametrize("packed", STRUCTURES, ids=str)
def test_bytes_that_describe_no_array_of_the_leaf_are_no_tree(packed):
    import msgpack

    structure = msgpack.packb(packed)
    known = KnownClasses()
    leaf = torch.empty((1, 2), dtype=torch.float32)
    node = known.decode(structure, lambda n: [leaf] * n)
    assert (node is not None) == (str(packed) in ("[13, '<f4', True]", "[0, [13, '<f4', True]]"))


@given(st.lists(st.sampled_from(["<f4", "<i8", "|b1", "<M8[s]"]), min_size=1, max_size=4), st.booleans())
def test_a_tree_with_arrays_is_read_as_it_was_written(dtypes, is_writable):
    arrays = [np.zeros((2, 3), dtype) for dtype in dtypes]
    for array in arrays:
        array.flags.writeable = is_writable
    tree = flatten(
        {"a": arrays, "b": (1, torch.ones(2))}, lambda v: isinstance(v, torch.Tensor), kinds=KINDS_OF_BATCHES
    )
    leaves = [torch.zeros(2, 3, dtype=torch.float32)] * len(arrays) + [torch.ones(2)]
    numbers = {"<f4": torch.float32, "<i8": torch.int64, "|b1": torch.bool, "<M8[s]": torch.int64}
    leaves[:-1] = [torch.zeros(2, 3, dtype=numbers[dtype]) for dtype in dtypes]
    node = decode(tree.encode(), lambda _: None, lambda n: leaves[:n])
    built = node.build(iter(leaves))
    assert same(built["a"], arrays)
