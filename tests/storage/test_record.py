"""The bytes of a record: golden, refused when anything about them is wrong, never believed too early."""

from __future__ import annotations

import math
import random
import resource
import struct
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_digest

from tests.storage.children import in_child
from tests.storage.known_values import NAMESPACE, digest_of, plain_layout, rows_of
from torchcache.errors import CorruptRecordError
from torchcache.layout import CHANNELS_LAST, CHANNELS_LAST_3D, DTYPE_SIZES, MAX_LEAVES, Layout, Leaf, Rows
from torchcache.storage.record import length_of, pack_rows, refusal_of, seed_of, unpack, unpack_many

GOLDEN = Path(__file__).parents[1] / "golden"

DIGEST = bytes(range(16))
FLOATS = Layout((Leaf("float32", "float32", (2, 3)),))
STRUCTURED = Layout((Leaf("float16", "float32", (4, 2, 2), CHANNELS_LAST), Leaf("bool", "bool", (5,))), b"a structure")
EMPTY = Layout((Leaf("complex128", "complex128", (3, 0)),))
TREE = Layout(
    (
        Leaf("bfloat16", "float32", (2, 3)),
        Leaf("int64", "int64", ()),
        Leaf("uint8", "uint8", (3, 2, 2, 1), CHANNELS_LAST_3D),
    ),
    msgpack.packb(["dict", ["hidden", "length", "mask"], 3]),
)
REPETITIVE = Layout((Leaf("int64", "int64", (40,)),))

#: name -> layout, zstd level; the bytes lie in tests/golden, in hex.
GOLDEN_RECORDS = {
    "raw_float32": (FLOATS, None),
    "raw_structured": (STRUCTURED, None),
    "raw_tree": (TREE, None),
    "raw_empty": (EMPTY, None),
    "zstd_int64": (REPETITIVE, 3),
}


def golden_rows(layout: Layout) -> Rows:
    data = np.resize(np.arange(8, dtype=np.uint8), (1, layout.nbytes)) if layout.nbytes else np.empty((1, 0), np.uint8)
    return Rows([DIGEST], layout, data)


def golden_bytes(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


@pytest.mark.parametrize("name", GOLDEN_RECORDS)
def test_a_record_of_format_1_is_read_as_it_was_written(name):
    layout, _ = GOLDEN_RECORDS[name]
    assert unpack(NAMESPACE, DIGEST, golden_bytes(name)) == (layout, golden_rows(layout).data.tobytes())
    assert length_of(golden_bytes(name)) == len(golden_bytes(name))


@pytest.mark.parametrize("name", [name for name in GOLDEN_RECORDS if name.startswith("raw")])
def test_a_raw_record_is_written_byte_for_byte_as_format_1_says(name):
    layout, zstd_level = GOLDEN_RECORDS[name]
    assert pack_rows(NAMESPACE, golden_rows(layout), zstd_level) == [golden_bytes(name)]


def test_a_compressed_record_has_the_golden_header_and_one_zstd_frame():
    """Another zstd may compress the same bytes otherwise, so only its frame may differ."""
    (record,) = pack_rows(NAMESPACE, golden_rows(REPETITIVE), 3)
    golden = golden_bytes("zstd_int64")
    at = golden.index(zstandard.FRAME_HEADER)
    assert record[12:31] == golden[12:31]
    assert record[36:at] == golden[36:at]
    assert zstandard.decompress(record[at:]) == golden_rows(REPETITIVE).data.tobytes()
    assert zstandard.frame_content_size(record[at:]) == REPETITIVE.nbytes


def test_the_golden_header_is_what_the_format_says():
    record = golden_bytes("raw_structured")
    version, checksum, digest, codec, size, structure, leaves = msgpack.unpackb(record[:-37])
    assert (version, digest, codec, size, structure) == (1, DIGEST, 0, 37, b"a structure")
    assert leaves == [[2, 0, 1, [4, 2, 2]], [9, 9, 0, [5]]]
    assert checksum == xxh3_64_digest(record[12:], int.from_bytes(NAMESPACE[:8], "little"))


@pytest.mark.parametrize("name", GOLDEN_RECORDS)
def test_every_flipped_bit_is_noticed(name):
    golden = golden_bytes(name)
    for bit in range(8 * len(golden)):
        record = bytearray(golden)
        record[bit // 8] ^= 1 << bit % 8
        assert_refused(bytes(record))


def test_every_flipped_bit_is_noticed_in_a_batch_of_sound_records():
    digests = [digest_of(i) for i in range(9)]
    records = pack_rows(NAMESPACE, rows_of(digests, 50), None)
    for bit in range(8 * len(records[4])):
        damaged = bytearray(records[4])
        damaged[bit // 8] ^= 1 << bit % 8
        batch = [*records[:4], bytes(damaged), *records[5:]]
        found, missing, corrupt = unpack_many(NAMESPACE, digests, [memoryview(r) for r in batch])
        assert (missing, corrupt) == ([4], 1)
        assert sorted(p for item in found for p in item.positions) == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("name", GOLDEN_RECORDS)
def test_a_record_cut_or_extended_anywhere_is_refused(name):
    golden = golden_bytes(name)
    for length in range(len(golden)):
        assert_refused(golden[:length])
        assert length_of(golden[:length]) is None
        assert_refused(golden[:length] + b"\0" + golden[length:])
    for extra in (b"\0", b"\xff", golden, bytes(5000)):
        assert_refused(golden + extra)


def test_a_record_of_another_sample_is_refused():
    record = golden_bytes("raw_float32")
    for other in (bytes(16), DIGEST[::-1], DIGEST[:8] + bytes(8)):
        assert_refused(record, digest=other)


def test_a_record_of_another_namespace_is_refused():
    for layout, zstd_level in GOLDEN_RECORDS.values():
        (record,) = pack_rows(b"another one.....", golden_rows(layout), zstd_level)
        assert_refused(record)


def test_records_that_changed_places_are_refused():
    digests = [digest_of(i) for i in range(6)]
    records = pack_rows(NAMESPACE, rows_of(digests), None)
    shifted = [memoryview(r) for r in (*records[1:], records[0])]
    assert unpack_many(NAMESPACE, digests, shifted) == ([], list(range(6)), 6)


def test_absent_records_are_missing_and_not_corrupt():
    digests = [digest_of(i) for i in range(3)]
    records = pack_rows(NAMESPACE, rows_of(digests), None)
    found, missing, corrupt = unpack_many(NAMESPACE, digests, [None, memoryview(records[1]), None])
    assert (missing, corrupt, [list(item.positions) for item in found]) == ([0, 2], 0, [[1]])


def test_unpack_says_what_is_wrong_with_an_error_of_its_own():
    with pytest.raises(CorruptRecordError):
        unpack(NAMESPACE, DIGEST, b"nothing of the sort")


# -- hostile records: whoever wrote them computed a valid checksum ------------------------------------------------


def forge(
    *,
    structure: object = None,
    leaves: object = None,
    payload: bytes = b"",
    codec: int = 0,
    size: int | None = None,
    described: bytes | None = None,
    version: int = 1,
    namespace: bytes = NAMESPACE,
    digest: bytes = DIGEST,
) -> bytes:
    """Make a record with a checksum that holds."""
    if described is None:
        described = msgpack.packb(structure, use_bin_type=True) + msgpack.packb(
            [[0, 0, 0, [1]]] if leaves is None else leaves
        )
    stated = len(payload) if size is None else size
    checked = b"\xc4\x10" + digest + struct.pack(">BBI", codec, 0xCE, stated) + described + payload
    return bytes([0x97, version, 0xC4, 8]) + xxh3_64_digest(checked, seed_of(namespace)) + checked


def zstd_frame(plain: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(plain)


def without_size(plain: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(plain)


def stating(content_bytes: int, window_log: int | None = None) -> bytes:
    """Return a frame header that states a size, and perhaps a window, before one empty last block."""
    single_segment = window_log is None
    descriptor = 0b11000000 | (0b00100000 if single_segment else 0)
    window = b"" if window_log is None else bytes([(window_log - 10) << 3])
    return zstandard.FRAME_HEADER + bytes([descriptor]) + window + content_bytes.to_bytes(8, "little") + b"\x01\0\0"


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


FOUR = b"1234"
BYTES_100 = [[4, 4, 0, [100]]]
PLAIN = bytes(100)

HOSTILE = {
    "a version that is not ours": forge(payload=FOUR, version=2),
    "an unknown dtype": forge(leaves=[[len(DTYPE_SIZES), 0, 0, [1]]], payload=FOUR),
    "an unknown output dtype": forge(leaves=[[0, 200, 0, [1]]], payload=FOUR),
    "a negative dtype": forge(leaves=[[-1, 0, 0, [1]]], payload=FOUR),
    "a dtype by name": forge(leaves=[["float32", 0, 0, [1]]], payload=FOUR),
    "a dtype that is a float": forge(leaves=[[0.0, 0, 0, [1]]], payload=FOUR),
    "a dtype that is a truth": forge(leaves=[[False, 0, 0, [1]]], payload=FOUR),
    "an unknown memory format": forge(leaves=[[0, 0, 3, [1]]], payload=FOUR),
    "a negative memory format": forge(leaves=[[0, 0, -1, [1]]], payload=FOUR),
    "a negative size": forge(leaves=[[0, 0, 0, [-1]]], payload=FOUR),
    "two negative sizes": forge(leaves=[[0, 0, 0, [-1, -1]]], payload=FOUR),
    "a size of 2^64 - 1": forge(leaves=[[0, 0, 0, [2**64 - 1]]], payload=FOUR),
    "sizes whose product is 4 in 64 bits": forge(leaves=[[4, 4, 0, [2**31, 2**31, 4, 2]]], payload=FOUR),
    "sizes whose product overflows": forge(leaves=[[0, 0, 0, [2**31] * 64]], payload=FOUR),
    "no bytes of an impossible shape": forge(leaves=[[0, 0, 0, [0] + [2**31] * 8]]),
    "a size that is a float": forge(leaves=[[0, 0, 0, [1.0]]], payload=FOUR),
    "a size that is a truth": forge(leaves=[[0, 0, 0, [True]]], payload=FOUR),
    "no shape": forge(leaves=[[0, 0, 0, None]], payload=FOUR),
    "a shape that is no list": forge(leaves=[[0, 0, 0, 4]], payload=FOUR),
    "65 dimensions": forge(leaves=[[0, 0, 0, [1] * 65]], payload=FOUR),
    "100,000 dimensions": forge(leaves=[[0, 0, 0, [1] * 100_000]], payload=FOUR),
    "channels last of two dimensions": forge(leaves=[[0, 0, 1, [1, 1]]], payload=FOUR),
    "no leaf": forge(leaves=[]),
    "too many leaves": forge(leaves=[[4, 4, 0, [1]]] * (MAX_LEAVES + 1), payload=bytes(MAX_LEAVES + 1)),
    "a million leaves": forge(leaves=[[4, 4, 0, [0]]] * 1_000_000),
    "a leaf of three": forge(leaves=[[0, 0, 0]], payload=FOUR),
    "a leaf of five": forge(leaves=[[0, 0, 0, [1], 0]], payload=FOUR),
    "leaves that are a map": forge(leaves={"a": 1}, payload=FOUR),
    "leaves that are text": forge(leaves="leaves", payload=FOUR),
    "no leaves at all": forge(leaves=0, payload=FOUR),
    "leaves nested": forge(leaves=[[[[0, 0, 0, [1]]]]], payload=FOUR),
    "shape nested": forge(leaves=[[0, 0, 0, [[1]]]], payload=FOUR),
    "arrays 1,000 deep": forge(described=b"\xc4\0" + nested(1000), payload=FOUR),
    "arrays 60,000 deep": forge(described=b"\xc4\0" + nested(60_000), payload=FOUR),
    "an array that says it has 2^32 - 1 items": forge(described=b"\xc4\0\xdd\xff\xff\xff\xff", payload=FOUR),
    "a bin that says it has 2^32 - 1 bytes": forge(described=b"\xc6\xff\xff\xff\xff", payload=FOUR),
    "text for a structure": forge(structure="structure", payload=FOUR),
    "text that is no UTF-8": forge(described=b"\xa4\xff\xff\xff\xff\x91\x94\0\0\0\x91\x01", payload=FOUR),
    "a truth for a structure": forge(structure=False, payload=FOUR),
    "a number for a structure": forge(structure=7, payload=FOUR),
    "an extension for a structure": forge(structure=msgpack.ExtType(7, b"code"), payload=FOUR),
    "a time for a structure": forge(structure=msgpack.Timestamp(0), payload=FOUR),
    "an extension for a leaf": forge(leaves=[msgpack.ExtType(1, b"x" * 16)], payload=FOUR),
    "a time for a size": forge(leaves=[[0, 0, 0, [msgpack.Timestamp(1)]]], payload=FOUR),
    "a header of 70 kB": forge(structure=bytes(70_000), payload=FOUR),
    "a byte msgpack never uses": forge(described=b"\xc1\xc1", payload=FOUR),
    "nothing described": forge(described=b"", payload=b""),
    "a header that ends early": forge(described=b"\xc4\0\x91\x94\0\0\0"),
    "codec 7": forge(payload=FOUR, codec=7),
    "codec 2": forge(payload=FOUR, codec=2),
    "codec 255": forge(payload=FOUR, codec=255),
    "a raw payload that is too short": forge(payload=b"123"),
    "a raw payload that is too long": forge(payload=b"12345"),
    "no payload": forge(payload=b""),
    "a stated size below the payload's": forge(payload=FOUR, size=3),
    "a stated size above the payload's": forge(payload=FOUR, size=2**32 - 1),
    "a value of 4 GiB": forge(leaves=[[4, 4, 0, [2**31]], [4, 4, 0, [2**31]]], payload=FOUR),
    "zstd that is none": forge(leaves=BYTES_100, payload=bytes(50), codec=1),
    "zstd of nothing": forge(leaves=BYTES_100, payload=b"", codec=1),
    "zstd cut": forge(leaves=BYTES_100, payload=zstd_frame(random.Random(0).randbytes(100))[:-9], codec=1),
    "zstd of one byte less": forge(leaves=BYTES_100, payload=zstd_frame(bytes(99)), codec=1),
    "zstd of one byte more": forge(leaves=BYTES_100, payload=zstd_frame(bytes(101)), codec=1),
    "zstd without a size": forge(leaves=BYTES_100, payload=without_size(PLAIN), codec=1),
    "zstd without a size, 200 MB": forge(leaves=BYTES_100, payload=without_size(bytes(200_000_000)), codec=1),
    "zstd of 200 MB in 6 kB": forge(leaves=BYTES_100, payload=zstd_frame(bytes(200_000_000)), codec=1),
    "zstd stating 1 TiB": forge(leaves=BYTES_100, payload=stating(2**40), codec=1),
    "zstd stating 2^64 - 3": forge(leaves=BYTES_100, payload=stating(2**64 - 3), codec=1),
    "zstd stating 100 and holding nothing": forge(leaves=BYTES_100, payload=stating(100), codec=1),
    "zstd with a window of 2 GiB": forge(leaves=BYTES_100, payload=stating(100, 31), codec=1),
    "zstd with a window of 2^41": forge(leaves=BYTES_100, payload=stating(100, 41), codec=1),
    "zstd with something behind it": forge(leaves=BYTES_100, payload=zstd_frame(PLAIN) + b"more", codec=1),
    "zstd twice": forge(leaves=BYTES_100, payload=zstd_frame(PLAIN[:50]) * 2, codec=1),
    "zstd behind a skippable frame": forge(
        leaves=BYTES_100, payload=b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstd_frame(PLAIN), codec=1
    ),
    "zstd of an empty value with rubbish": forge(leaves=[[4, 4, 0, [0]]], payload=b"rubbish", codec=1),
    "zstd of 2 GiB stated by both": forge(leaves=[[4, 4, 0, [2**31]]], payload=stating(2**31), codec=1),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_record_with_a_valid_checksum_is_corrupt_and_nothing_else(attack):
    assert_refused(HOSTILE[attack])
    length_of(HOSTILE[attack])


def test_the_forger_of_these_tests_can_make_a_sound_record():
    layout, payload = unpack(NAMESPACE, DIGEST, forge(payload=FOUR))
    assert (layout, payload) == (Layout((Leaf("float32", "float32", (1,)),)), FOUR)
    sound = forge(leaves=BYTES_100, payload=zstd_frame(PLAIN), codec=1)
    assert unpack(NAMESPACE, DIGEST, sound) == (plain_layout(100), PLAIN)


def test_hostile_records_in_bulk_take_no_memory():
    """A batch of tiny records that each claim 2 GiB, and all attacks at once, under 512 MiB more than now."""
    in_child(read_hostile_records_with_little_memory)


def read_hostile_records_with_little_memory():
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (512 << 20), resource.RLIM_INFINITY))
    for claim in (2**31, 2**28):
        batch = [
            forge(leaves=[[4, 4, 0, [claim]]], payload=stating(claim), codec=1, digest=digest_of(i)) for i in range(64)
        ]
        refused = unpack_many(NAMESPACE, [digest_of(i) for i in range(64)], [memoryview(r) for r in batch])
        assert refused == ([], list(range(64)), 64)
    everything = [*HOSTILE.values(), *(golden_bytes(name) for name in GOLDEN_RECORDS)]
    found, missing, corrupt = unpack_many(NAMESPACE, [DIGEST] * len(everything), [memoryview(r) for r in everything])
    assert (missing, corrupt) == (list(range(len(HOSTILE))), len(HOSTILE))
    assert sum(len(item.positions) for item in found) == len(GOLDEN_RECORDS)


def test_a_bomb_beside_sound_records_of_its_length_costs_only_itself():
    digests = [digest_of(i) for i in range(5)]
    frame = zstd_frame(PLAIN)
    records = [forge(leaves=BYTES_100, payload=frame, codec=1, digest=digest) for digest in digests]
    bomb = stating(2**40)
    bomb += bytes(len(frame) - len(bomb)) if len(frame) > len(bomb) else b""
    for at in range(5):
        batch = list(records)
        batch[at] = forge(leaves=BYTES_100, payload=bomb[: len(frame)], codec=1, digest=digests[at])
        found, missing, corrupt = unpack_many(NAMESPACE, digests, [memoryview(r) for r in batch])
        assert (missing, corrupt) == ([at], 1)
        assert [row.tobytes() for item in found for row in item.data] == [PLAIN] * 4


# -- at random ------------------------------------------------------------------------------------------------------

leaves = st.builds(
    Leaf,
    st.sampled_from(list(DTYPE_SIZES)),
    st.sampled_from(list(DTYPE_SIZES)),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
)
layouts = st.builds(
    Layout, st.lists(leaves, min_size=1, max_size=4).map(tuple), st.one_of(st.just(b""), st.binary(max_size=300))
)


@given(
    some=st.lists(st.tuples(layouts, st.integers(1, 5)), min_size=1, max_size=4),
    zstd_level=st.sampled_from([None, 1, 3]),
    order=st.randoms(use_true_random=False),
    is_random=st.booleans(),
)
@settings(max_examples=150)
def test_rows_of_any_layouts_come_back_in_any_order(some, zstd_level, order, is_random):
    digests, records, expected = [], [], {}
    for layout, n in some:
        mine = [digest_of(len(digests) + i) for i in range(n)]
        noise = np.frombuffer(order.randbytes(n * layout.nbytes), np.uint8).reshape(n, layout.nbytes)
        data = noise if is_random else np.zeros_like(noise)
        records += pack_rows(NAMESPACE, Rows(mine, layout, data), zstd_level)
        expected |= {digest: (layout, row.tobytes()) for digest, row in zip(mine, data, strict=True)}
        digests += mine
    shuffled = list(zip(digests, records, strict=True))
    order.shuffle(shuffled)
    found, missing, corrupt = unpack_many(NAMESPACE, [d for d, _ in shuffled], [memoryview(r) for _, r in shuffled])
    assert (missing, corrupt) == ([], 0)
    got = {}
    for item in found:
        assert item.data.shape == (len(item.positions), item.layout.nbytes)
        for position, row in zip(item.positions, item.data, strict=True):
            got[shuffled[position][0]] = (item.layout, row.tobytes())
    assert got == expected
    assert all(length_of(record) == len(record) for record in records)


wild_layouts = st.builds(
    Layout,
    st.lists(
        st.builds(
            Leaf,
            st.sampled_from(["uint8", "float32", "complex128"]),
            st.sampled_from(["uint8", "float32", "no such dtype"]),
            st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 1 << 20]), max_size=70).map(tuple),
            st.sampled_from([0, 0, 0, 1, 2, 3]),
        ),
        max_size=3,
    ).flatmap(lambda some: st.sampled_from([1, 1, 1, 100, 257]).map(lambda n: tuple(some) * n)),
    st.sampled_from([0, 0, 5, 300, 40_000, 65_000, 65_480, 65_490, 65_500, 65_510, 65_520, 65_530, 70_000]).map(bytes),
)


@pytest.mark.slow
@given(layout=wild_layouts)
@example(layout=Layout((Leaf("uint8", "uint8", (0, 0)),), bytes(65_490)))  # a header of one byte too many
@settings(max_examples=400)
def test_what_is_not_refused_is_read_again_and_the_rest_would_not_be(layout):
    refusal = refusal_of(layout)
    if refusal is None and layout.nbytes < 1 << 16:
        data = np.full((1, layout.nbytes), 7, np.uint8)
        (record,) = pack_rows(NAMESPACE, Rows([DIGEST], layout, data), None)
        assert unpack(NAMESPACE, DIGEST, record) == (layout, data.tobytes())
        assert length_of(record) == len(record)
    elif layout.nbytes < 1 << 16 and all(leaf.output_dtype in DTYPE_SIZES for leaf in layout.leaves):
        assert refusal == "too_large_to_describe"
        (record,) = pack_rows(NAMESPACE, Rows([DIGEST], layout, np.zeros((1, layout.nbytes), np.uint8)), None)
        found, _, _ = unpack_many(NAMESPACE, [DIGEST], [memoryview(record)])
        assert not found or length_of(record) is None


@given(st.lists(st.one_of(st.none(), st.binary(max_size=200)), max_size=6))
@settings(max_examples=200)
def test_random_bytes_are_refused(some):
    records = [None if item is None else memoryview(item) for item in some]
    found, missing, corrupt = unpack_many(NAMESPACE, [DIGEST] * len(some), records)
    assert (found, missing) == ([], list(range(len(some))))
    assert corrupt == sum(item is not None for item in some)
    for item in some:
        assert item is None or length_of(item) is None


@given(described=st.binary(max_size=80), payload=st.binary(max_size=80), codec=st.sampled_from([0, 0, 1, 1, 9]))
@settings(max_examples=400)
def test_random_headers_with_a_valid_checksum_never_raise(described, payload, codec):
    assert_refused_or_consistent(forge(described=described, payload=payload, codec=codec))


@pytest.mark.slow
@given(
    structure=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    sizes=st.lists(st.integers(-2, 2**33) | st.integers(0, 8), max_size=6),
    numbers=st.tuples(*[st.integers(-2, 40)] * 3),
    payload=st.binary(max_size=64),
    codec=st.integers(0, 2),
)
@settings(max_examples=400)
def test_well_formed_headers_of_any_content_never_raise(structure, sizes, numbers, payload, codec):
    record = forge(structure=structure, leaves=[[*numbers, sizes]], payload=payload, codec=codec)
    assert_refused_or_consistent(record)


def assert_refused(record: bytes, digest: bytes = DIGEST) -> None:
    assert unpack_many(NAMESPACE, [digest], [memoryview(record)]) == ([], [0], 1)


def assert_refused_or_consistent(record: bytes) -> None:
    found, missing, corrupt = unpack_many(NAMESPACE, [DIGEST], [memoryview(record)])
    if not found:
        assert (missing, corrupt) == ([0], 1)
        return
    ((item),) = found
    nbytes = sum(DTYPE_SIZES[leaf.dtype] * math.prod(leaf.shape) for leaf in item.layout.leaves)
    assert item.data.shape == (1, nbytes)
    assert all(size >= 0 for leaf in item.layout.leaves for size in leaf.shape)
