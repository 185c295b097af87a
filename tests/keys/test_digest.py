"""Digests by value: whoever changes them makes every cache on every disk start afresh."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from torchcache.keys.digest import DIGEST_BYTES, LEAF_BYTES, combine, digest_bytes, digest_parts, digest_rows

LEAF = 16 * 1024


def straightforward(data):
    """Compute the digest as the module's docstring says it, in the plainest way."""
    if len(data) <= LEAF:
        return xxh3_128(data).digest()
    whole = xxh3_128()
    while data:
        whole.update(xxh3_128(data[:LEAF]).digest())
        data = data[LEAF:]
    return whole.digest()


def pattern(n):
    return bytes(i * 7 % 251 for i in range(n))


@pytest.mark.parametrize(
    ("n", "golden"),
    [
        (0, "99aa06d3014798d86001c324468d497f"),
        (1, "a6cd5e9392000f6ac44bdff4074eecdb"),
        (12_288, "952ceefd60a3802062e0049d84f28fdc"),
        (LEAF, "dc6686c5f372f445864dbfe804f84fda"),
        (LEAF + 1, "e83d45eb7a3d940c17d118374a1c7c1a"),
        (2 * LEAF, "090697b785ef8e15316bf250ea350822"),
        (602_112, "79b25f56e8d5cdccf46d835ca28e8fe9"),
    ],
)
def test_digests_by_value(n, golden):
    data = pattern(n)
    assert straightforward(data).hex() == golden
    assert digest_bytes(data).hex() == golden


def test_the_sizes_are_part_of_the_format():
    assert (DIGEST_BYTES, LEAF_BYTES) == (16, LEAF)


@given(st.integers(0, 3 * LEAF + 5), st.integers(0, 255))
def test_every_length_has_the_straightforward_digest(n, byte):
    data = bytes([byte]) * n
    assert digest_bytes(data) == straightforward(data)
    assert digest_bytes(memoryview(data)) == straightforward(data)


@pytest.mark.parametrize("width", [0, 1, 5, 400, LEAF - 1, LEAF, LEAF + 1, 3 * LEAF + 17])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_rows_have_the_digests_they_have_alone(width, n):
    data = np.random.default_rng(0).integers(0, 256, n * width, dtype=np.uint8).tobytes()
    expected = [straightforward(data[i * width : (i + 1) * width]) for i in range(n)]
    assert digest_rows(memoryview(data), n) == expected


def test_a_row_of_one_leaf_is_not_its_leafs_digest_hashed_again():
    leaf = pattern(LEAF)
    assert digest_bytes(leaf) != digest_bytes(xxh3_128(leaf).digest())
    assert digest_bytes(leaf + leaf) == xxh3_128(xxh3_128(leaf).digest() * 2).digest()


def test_one_argument_is_combined_by_the_signature_alone():
    signature = digest_parts([b"signature"])
    rows = [digest_bytes(bytes([i])) for i in range(5)]
    expected = [bytes(a ^ b for a, b in zip(row, signature, strict=True)) for row in rows]
    assert combine(signature, [rows]) == expected


def test_several_arguments_are_combined_row_by_row_and_in_order():
    signature = digest_parts([b"signature"])
    a, b = ([digest_bytes(bytes([i, j])) for i in range(3)] for j in range(2))
    expected = [
        bytes(p ^ q for p, q in zip(xxh3_128(x + y).digest(), signature, strict=True))
        for x, y in zip(a, b, strict=True)
    ]
    assert combine(signature, [a, b]) == expected
    assert combine(signature, [b, a]) != expected


def test_no_rows_combine_to_none():
    assert combine(digest_parts([]), [[]]) == []
    assert combine(digest_parts([]), [[], []]) == []


def test_parts_by_value():
    lengths = (2).to_bytes(8, "little") + (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert digest_parts([b"a", b"bc"]) == straightforward(lengths + b"abc")


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_where_one_part_ends_and_the_next_begins_counts(a, b):
    assert (digest_parts(a) == digest_parts(b)) == (a == b)


def test_parts_may_come_from_a_generator():
    assert digest_parts(part for part in (b"a", b"b")) == digest_parts([b"a", b"b"])
