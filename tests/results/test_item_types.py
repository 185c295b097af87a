"""What an item of a dataset may be made of: each kind comes back by type, value and order, or is named."""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import decimal
import enum
import fractions
import pathlib
import re
import sys
import types
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque

import msgpack
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch.utils.data import Dataset

from tests.storage.children import run
from torchcache import CachedDataset
from torchcache.errors import CorruptRecordError
from torchcache.layout import Layout
from torchcache.results.classes import KnownClasses
from torchcache.results.whole_calls import CallResults

CPU = torch.device("cpu")


def stored(value):
    """Return the row of a value."""
    results = CallResults()
    (found,), _ = results.take_apart(results.flatten(value), 1, None, KnownClasses())
    return found


def read(found):
    """Return what a process that computed nothing makes of a row."""
    results, known = CallResults(), KnownClasses()
    assert results.is_known(found.layout, known)
    return results.assemble([found], 1, [CPU] * len(found.layout.leaves), known)


def round_trip(value):
    return read(stored(value))


def shown(value):
    """Return a text of a value that does not depend on the order in which sets are gone through."""
    if isinstance(value, (tuple, frozenset)):
        items = map(shown, value)
        return f"{type(value)} {list(items) if isinstance(value, tuple) else sorted(items)}"
    return f"{type(value)} {value!r}"


def assert_same(a, b):
    """Compare by type, value and order, and by what ``==`` does not see."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert_same(vars(a), vars(b))
        a, b = (x.as_subclass(torch.Tensor) for x in (a, b))
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.numpy().tobytes() == b.numpy().tobytes()
    elif isinstance(a, np.ndarray) and a.dtype == object:
        assert a.shape == b.shape
        assert_same(a.tolist(), b.tolist())
    elif isinstance(a, (np.ndarray, np.generic)):
        assert (repr(a.dtype), a.shape, a.tobytes()) == (repr(b.dtype), b.shape, b.tobytes())
    elif isinstance(a, dict):
        assert_same(list(a), list(b))
        assert_same(list(a.values()), list(b.values()))
        assert getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
    elif isinstance(a, (list, tuple, deque)):
        assert len(a) == len(b)
        assert getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, (set, frozenset)):
        assert len(a) == len(b)
        assert sorted(map(shown, a)) == sorted(map(shown, b))
    elif isinstance(a, (range, slice)):
        assert_same([a.start, a.stop, a.step], [b.start, b.stop, b.step])
    elif isinstance(a, uuid.UUID):
        assert (a.bytes, a.is_safe) == (b.bytes, b.is_safe)
    elif isinstance(a, (dt.datetime, dt.time)):
        assert (repr(a), a.fold) == (repr(b), b.fold)
        assert type(a.tzinfo) is type(b.tzinfo)
    else:
        assert repr(a) == repr(b)  # a NaN is one, 1.5 is not 1.50


def as_objects(items):
    array = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):
        array[i] = item
    return array


# -- generated ------------------------------------------------------------------------------------------------------

ZONES = st.one_of(
    st.none(),
    st.just(dt.timezone.utc),
    st.builds(dt.timezone, st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23))),
    st.builds(dt.timezone, st.just(dt.timedelta(hours=2)), st.text(max_size=3)),
    st.sampled_from(["UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires"]).map(zoneinfo.ZoneInfo),
)
DECIMALS = st.one_of(
    st.decimals(),
    st.sampled_from(["-0", "0E+3", "sNaN12", "-NaN7", "Infinity", "1.50", "1E-9999"]).map(decimal.Decimal),
)
HASHABLE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(allow_nan=False),
    st.text("ab/.\\", max_size=6).map(pathlib.PurePosixPath), st.text("ab\\:", max_size=6).map(pathlib.PureWindowsPath),
    st.text("ab/", max_size=6).map(pathlib.Path), st.dates(), st.times(), st.timedeltas(),
    st.datetimes(timezones=ZONES, allow_imaginary=True), st.datetimes().map(lambda moment: moment.replace(fold=1)),
    st.uuids(), st.just(uuid.UUID(int=3, is_safe=uuid.SafeUUID.safe)), st.fractions(),
    DECIMALS.filter(lambda number: not number.is_snan()), st.integers().map(np.float64), st.just(np.datetime64("NaT")),
    st.integers(-9, 9).map(np.int8), st.builds(range, st.integers(), st.integers(), st.integers(1)),
)  # fmt: skip
FROZEN = st.recursive(
    HASHABLE, lambda inner: st.one_of(st.frozensets(inner, max_size=3), st.tuples(inner, inner)), max_leaves=6
)
FACTORIES = st.sampled_from([int, float, str, list, dict, set, tuple, frozenset, bool, bytes, Counter, OrderedDict])
VALUES = st.one_of(
    FROZEN, DECIMALS, st.sets(FROZEN, max_size=4), st.binary().map(bytearray),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none() | st.integers()),
    st_numpy.arrays(st_numpy.array_dtypes(), st_numpy.array_shapes(max_dims=2, max_side=3)),
)  # fmt: skip
KEYS = FROZEN.filter(lambda key: key == key)  # noqa: PLR0124 - a NaN as a key is found by no lookup
ITEMS = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.text(), st.integers(), max_size=3).map(Counter),
        st.builds(defaultdict, FACTORIES, st.dictionaries(KEYS, inner, max_size=3)),
        st.builds(deque, st.lists(inner, max_size=3), st.just(3)),
        st.lists(inner, max_size=3).map(as_objects),
    ),
    max_leaves=8,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(ITEMS)
def test_any_item_comes_back_by_type_value_and_order(value):
    assert_same(round_trip(value), value)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES, VALUES)
def test_items_that_differ_in_values_only_share_a_layout_where_they_are_as_long(one, other):
    kinds = {type(one), type(other)} | {type(None), tuple}
    if kinds & {np.ndarray} or None in (one, other) or isinstance(one, tuple) or isinstance(other, tuple):
        return
    first, second = stored([one, 1]).layout, stored([other, 1]).layout
    assert first.structure == second.structure


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.builds(lambda tag, rest: [tag, *rest], st.integers(-1, 30), st.lists(inner, max_size=11)),
    max_leaves=12,
))  # fmt: skip
def test_entries_that_nobody_wrote_are_corrupt_or_values(entry):
    """Whatever lies in a record, nothing but our own error leaves the reading of it."""
    found = stored(["text"])
    packed = msgpack.packb([entry], use_bin_type=True, unicode_errors="surrogatepass")
    leaf = type(found.layout.leaves[-1])("uint8", "uint8", (len(packed),))
    row = np.frombuffer(packed, np.uint8).reshape(1, -1).copy()
    made = type(found)([0], Layout((leaf,), found.layout.structure), row)
    with contextlib.suppress(CorruptRecordError):
        read(made)


def entries_of(found):
    """Return the entries in the last leaf of a row."""
    n = found.layout.leaves[-1].nbytes
    return msgpack.unpackb(found.data[0, -n:].tobytes())


UTC = dt.timezone.utc


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (np.zeros(2, [("a", "<i4"), ("b", "u1", (3,))]),
         [6, [["a", "b"], [["<i4", []], ["|u1", [3]]], [0, 4], 7, False, None], [2], True]),
        (np.zeros(1, [("a", "<i2")])[0], [7, [["a"], [["<i2", []]], [0], 2, False, None], b"\0\0"]),
        (pathlib.PurePosixPath("a/b"), [8, "PurePosixPath", "a/b"]),
        (dt.date(2020, 1, 2), [9, 2020, 1, 2]),
        (dt.datetime(2020, 1, 2, 3, 4, 5, 6, UTC, fold=1), [10, 2020, 1, 2, 3, 4, 5, 6, 1, [13, 0, 0, 0]]),
        (dt.time(1, 2, 3, 4), [11, 1, 2, 3, 4, 0, None]),
        (dt.timedelta(-1, 2, 3), [12, -1, 2, 3]),
        (dt.timezone(dt.timedelta(hours=1), "X"), [13, 0, 3600, 0, "X"]),
        (zoneinfo.ZoneInfo("UTC"), [14, "UTC"]),
        (decimal.Decimal("1.50"), [15, "1.50"]),
        (uuid.UUID(int=1), [16, b"\0" * 15 + b"\1", None]),
        (fractions.Fraction(1, 3), [17, 1, 3]),
        (range(1, 2**70), [18, 1, [4, b"\x40" + b"\0" * 8], 1]),
        (slice(1, None), [19, 1, None, None]),
        ({1.5}, [20, 1.5]),
        (frozenset({(1, b"x")}), [21, [22, 1, b"x"]]),
        (bytearray(b"x"), [23, b"x"]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_the_form_in_bytes_is_the_documented_one(value, entry):
    """Another form would make what was written before unreadable: a new one needs a new number."""
    assert entries_of(stored([value])) == [entry]


@pytest.mark.parametrize(
    ("value", "structure"),
    [
        (Counter({"a": 1}), [14, "a", []]),
        (defaultdict(list, {1: 2}), [15, "list", 1, []]),
        (np.array([[None, "x"]], dtype=object), [16, [1, 2], None, []]),
        ({dt.date(2020, 1, 2): 1}, [2, [18, [9, 2020, 1, 2]], []]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_form_of_a_tree_in_bytes_is_the_documented_one(value, structure):
    assert msgpack.unpackb(stored(value).layout.structure) == structure


# -- kinds that are told apart closely --------------------------------------------------------------------------------


class Label(enum.Enum):
    CAT = 1


class Framed(torch.Tensor):
    """As torchvision's tv_tensors are: a tensor and attributes."""


class Counted(Framed):
    """As monai's MetaTensor is: operations keep the attributes."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        made = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(made, cls):
            vars(made).update(next((vars(arg) for arg in args if isinstance(arg, cls)), {}))
        return made


def framed(kind=Framed, **attributes):
    tensor = torch.arange(6.0).reshape(2, 3).as_subclass(kind)
    vars(tensor).update(attributes)
    return tensor


STRUCTURED = np.dtype([("a", "<i4"), ("b", ">f8", (2,)), ("c", [("x", "S3"), ("y", "<M8[D]")])])
ALIGNED = np.dtype([("a", "i1"), ("b", "f8")], align=True)
TITLED = np.dtype([(("title", "a"), "i4"), ("b", "u1")])
OUT_OF_ORDER = np.dtype({"names": ["q", "p"], "formats": ["u1", "<i4"], "offsets": [8, 0], "itemsize": 16})


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(3, STRUCTURED), np.ones((2, 2), ALIGNED), np.ones(2, OUT_OF_ORDER), np.zeros((), STRUCTURED),
        np.zeros(2, STRUCTURED)[1], np.zeros(1, TITLED), framed(), framed(Counted, meta={"affine": torch.eye(2)}),
        [framed(label=Label.CAT, size=(3, 4), path=pathlib.Path("a")), 1], {"boxes": framed(Counted, history=[{1, 2}])},
        np.array([[{"a": torch.ones(2)}, None], ["x", framed()]], dtype=object), np.array(None, dtype=object),
        np.empty((0, 3), dtype=object), {(1, pathlib.Path("a")): 1, frozenset({dt.date(2020, 1, 1)}): torch.ones(1)},
        {np.int64(3): 1, np.str_("k"): 2}, Counter(), Counter(a=-1, b=0, c=2.5), defaultdict(list, {"b": [1], "a": []}),
        deque([1, 2]), slice(None, 1.5, "x"), range(-(10**30), 10**31, 10**29), {1, "1", 1.5, b"1"}, set(), frozenset(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_kind_comes_back_through_a_dataset(tmp_path, value, where):
    class Items(Dataset):
        asked = 0

        def __len__(self):
            return 1

        def __getitem__(self, i):
            Items.asked += 1
            return ITEM[0], torch.zeros(1)

    options = {}
    if where == "disk":
        options = {"persistent": True, "persistent_cache_dir": tmp_path, "max_memory_cache_size": 0}
    ITEM[0] = value
    cached = CachedDataset(Items(), persistent_module_hash=f"items-{where}", **options)
    first = cached[0]
    cached.cache_instance.flush()
    second = cached[0]
    assert Items.asked == 1
    assert cached.cache_instance.stats().hits == 1
    for got, _ in (first, second):
        assert_same(got, value)
    cached.cache_instance.close()


#: What the dataset of a test returns; held by a global so that it is no part of the dataset's state.
ITEM = [None]


def test_what_is_mutable_is_made_anew_each_time():
    item = [{1}, bytearray(b"x"), Counter("a"), defaultdict(list), framed(notes=[1]), as_objects([[1]])]
    found = stored(item)
    one, other = read(found), read(found)
    one[0].add(2)
    one[1].extend(b"y")
    one[2]["b"] += 1
    one[3]["c"].append(1)
    one[4].add_(1)
    one[4].notes.append(2)
    one[5][0].append(2)
    assert_same(other, item)


class Odd(set):
    pass


class Text(str):
    __slots__ = ()


class Slotted(torch.Tensor):
    __slots__ = ("hidden",)


class Dispatching(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError


class OddZone(dt.tzinfo):
    def utcoffset(self, moment):
        return dt.timedelta(0)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Odd(), r"Odd at output\[0\]\['x'\].*return set\(x\)"),
        (Text("a"), r"Text at output\[0\]\['x'\].*return str\(x\)"),
        (pd.Timestamp(0), r"Timestamp at output\[0\]\['x'\].*return x.to_pydatetime\(\)"),
        (pd.Series([1]), r"Series at output\[0\]\['x'\].*return x.to_dict\(\)"),
        (collections.UserDict(a=1), r"UserDict at output\[0\]\['x'\].*return dict\(x\)"),
        (np.rec.array([(1, 2)]), r"recarray at output\[0\]\['x'\].*return np.asarray\(x\)"),
        (iter([]), r"list_iterator at output\[0\]\['x'\].*return list\(x\)"),
        (defaultdict(lambda: 3), r"defaultdict at output\[0\]\['x'\].*lambda.*return dict"),
        (defaultdict(Odd), r"defaultdict at output\[0\]\['x'\].*Odd.*return dict"),
        ({Label.CAT}, r"Label inside of what is at output\[0\]\['x'\].*return a list"),
        ({object()}, r"builtins.object inside of what is at output\[0\]\['x'\]"),
        (dt.datetime(2020, 1, 1, tzinfo=OddZone()), r"datetime at output\[0\]\['x'\].*OddZone.*isoformat"),
        (zoneinfo.ZoneInfo.no_cache("UTC"), r"time zone.*output\[0\]\['x'\].*zoneinfo.ZoneInfo"),
        (np.ma.masked_array([1, 2], [0, 1]), r"MaskedArray at output\[0\]\['x'\].*return x.data and x.mask"),
        (np.zeros(2, dtype=[("a", object)]), r"structured array.*output\[0\]\['x'\].*one array per field"),
        (np.zeros(2, np.dtype([("a", np.dtype("i4", metadata={"m": 1}))])), r"structured array.*output\[0\]\['x'\]"),
        (torch.zeros(2).as_subclass(Slotted), r"Slotted at output\[0\]\['x'\].*as_subclass|as_subclass.*Slotted"),
        (torch.zeros(2).as_subclass(Dispatching), r"as_subclass.*Dispatching at output\[0\]\['x'\]"),
        (framed(owner=object()), r"builtins.object at output\[0\]\['x'\].owner"),
        ({object(): 1}, r"dict with a key that is a builtins.object at output\[0\]\['x'\]"),
        (as_objects([object()]), r"builtins.object at output\[0\]\['x'\].flat\[0\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_kept_is_named_with_its_place_and_a_cure(value, named, caplog):
    class Items(Dataset):
        def __getitem__(self, i):
            return ({"x": ITEM[0]},)

    ITEM[0] = value
    cached = CachedDataset(Items(), persistent_module_hash="odd")
    for _ in range(2):
        (got,) = cached[0]
        assert got["x"] is value
    assert cached.cache_instance.stats().hits == 0
    (line,) = caplog.messages[-1:]
    assert re.search(named, line), line


def test_a_class_of_tensors_is_found_among_those_that_are_loaded_and_none_is_imported():
    known = KnownClasses()
    assert known.find(f"{__name__}.Framed") in (Framed, None)
    assert known.find("collections.Counter") is None
    assert known.find("torchcache.errors.StoreError") is None
    assert "this" not in sys.modules
    assert known.find("this.that") is None
    assert "this" not in sys.modules
    lazy = types.ModuleType("lazy_module_of_a_test")
    lazy.__getattr__ = lambda name: pytest.fail("the module was asked")
    sys.modules[lazy.__name__] = lazy
    try:
        assert known.find("lazy_module_of_a_test.Image") is None
    finally:
        del sys.modules[lazy.__name__]


def test_a_frozenset_as_a_key_is_known_in_whichever_order_it_is_gone_through():
    for n in range(2, 30):
        item = {frozenset({None, f"text {n}", fractions.Fraction(n, 7), n}): n}
        assert_same(round_trip(item), item)


def test_two_loaded_classes_of_one_name_are_not_known():
    module = types.ModuleType("module_that_is_run_again")
    sys.modules[module.__name__] = module
    try:
        known = KnownClasses()
        module.Label = enum.Enum("Label", "CAT DOG", module=module.__name__)
        layout = stored([module.Label.DOG]).layout
        assert CallResults().is_known(layout, known)
        module.Label = enum.Enum("Label", "CAT DOG", module=module.__name__)
        known.learn_from(CallResults().flatten([module.Label.DOG]))
        assert not CallResults().is_known(layout, known)
    finally:
        del sys.modules[module.__name__]


def test_a_time_zone_that_this_machine_does_not_list_leads_to_no_file(monkeypatch):
    found = stored([zoneinfo.ZoneInfo("UTC")])
    data = found.data.copy()
    data[0, -3:] = np.frombuffer(b"../", np.uint8)
    monkeypatch.setattr(zoneinfo, "ZoneInfo", lambda key: pytest.fail("it was looked for"))
    with pytest.raises(CorruptRecordError):
        read(type(found)([0], found.layout, data))


def test_an_old_record_of_a_deque_is_read():
    """Torch registers deques and defaultdicts without a factory, and that is how they are kept."""
    item = [deque([1], 2), defaultdict(None, {"a": 1})]
    _, *packed = msgpack.unpackb(stored(item).layout.structure)
    assert [(tag, name) for tag, name, *_ in packed] == [(6, "collections.deque"), (6, "collections.defaultdict")]
    assert_same(round_trip(item), item)


# -- real classes -----------------------------------------------------------------------------------------------------


#: Where tox.ini puts torchvision: its wheel is built for a torch with CUDA and cannot be imported beside one for the
#: CPU, so that it must not lie where transformers would find it in every other test.
TORCHVISION = pathlib.Path(sys.prefix) / "torchvision"

#: To import it fails only because it describes two operators which are not there; nothing here calls them.
WITH_TORCHVISION = """
import sys
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.append(sys.argv[1])

from torchvision import tv_tensors
from torchvision.transforms import v2
from tests.results.test_item_types import assert_same, round_trip

boxes = tv_tensors.BoundingBoxes(torch.ones(2, 4), format="XYXY", canvas_size=(3, 5))
item = {
    "image": tv_tensors.Image(torch.rand(3, 4, 4)),
    "boxes": boxes,
    "masks": tv_tensors.Mask(torch.zeros(2, 4, 4, dtype=torch.bool)),
    "video": tv_tensors.Video(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)),
}
back = round_trip(item)
assert_same(back, item)
assert back["boxes"].format is tv_tensors.BoundingBoxFormat.XYXY

flipped = v2.functional.horizontal_flip(back["boxes"])
assert torch.equal(flipped, v2.functional.horizontal_flip(boxes))
assert type(flipped) is tv_tensors.BoundingBoxes
print("all came back")
"""


@pytest.mark.slow
@pytest.mark.skipif(not TORCHVISION.is_dir(), reason=f"torchvision is not in {TORCHVISION}, where tox.ini puts it")
def test_the_tensors_of_torchvision_come_back_with_their_class_and_attributes():
    assert run(WITH_TORCHVISION, TORCHVISION, timeout_seconds=120.0) == "all came back\n"


@pytest.mark.slow
def test_a_tensor_of_monai_comes_back_with_its_class_and_attributes():
    pytest.importorskip("monai", reason="needs monai (pip install 'torchcache[dev]')")
    from monai.data import MetaTensor
    from monai.transforms import Flip

    image = MetaTensor(
        torch.rand(1, 3, 3), affine=2 * torch.eye(4), meta={"filename_or_obj": "x.nii", "dim": np.arange(3)}
    )
    flipped = Flip(0)(image)
    back = round_trip({"image": image, "flipped": flipped})
    for got, was in ((back["image"], image), (back["flipped"], flipped)):
        assert type(got) is MetaTensor
        assert torch.equal(got.affine, was.affine)
        assert list(got.meta) == list(was.meta)
        assert got.applied_operations == was.applied_operations
        assert torch.equal(got.as_tensor(), was.as_tensor())
    assert torch.equal(Flip(0)(back["image"]).as_tensor(), flipped.as_tensor())
