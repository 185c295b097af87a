"""The bytes of one value on disk: a msgpack header of fixed layout, then the payload.

::

    offset  bytes  field
    0       1      msgpack array of 7
    1       1      format version
    2       2+8    checksum: XXH3-64, seeded with the namespace, over everything after it
    12      2+16   digest of the sample
    30      1      codec: 0 raw, 1 one zstd frame
    31      5      stored payload size, uint32
    36      ...    structure: nil for one tensor, else bin
    ...     ...    leaves: array of [dtype, output dtype, memory format, [shape]]
    ...     ...    payload

Integers are of fixed width where they differ between records of one layout, so these have headers of
one length and a batch is checked and copied in bulk. dtypes are indexes into ``DTYPE_SIZES``. The
namespace is in no record: as the checksum's seed it still makes a record of another namespace fail.

Nothing is believed before its check: constant bytes, exact length, checksum, digest, known codec and
dtypes, sizes that agree with the shape, and for zstd the size that the frame states. Nothing is ever
executed: no pickle, no import, no path. The format is specified in docs/storage.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress

import msgpack
import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_digest

from torchcache.errors import CorruptRecordError
from torchcache.kinds import Drop
from torchcache.layout import DTYPE_SIZES, FORMAT_VERSION, MAX_LEAVES, Bytes2D, Found, Layout, Leaf, Rows
from torchcache.storage.payloads import RAW, ZSTD, compress_row, copy_out

#: A value larger than this is not stored; it bounds what a damaged or hostile record can claim.
MAX_VALUE_BYTES = 2**31
MAX_HEADER_BYTES = 65536
MAX_DIMENSIONS = 64

_CHECKSUM_BYTES = 8
_PREFIX = bytes([0x97, FORMAT_VERSION, 0xC4, _CHECKSUM_BYTES])
_CHECKSUM = slice(len(_PREFIX), len(_PREFIX) + _CHECKSUM_BYTES)
_CHECKED_FROM = _CHECKSUM.stop
_DIGEST_BYTES = 16
_DIGEST_MARK = bytes([0xC4, _DIGEST_BYTES])
_DIGEST = slice(_CHECKED_FROM + 2, _CHECKED_FROM + 2 + _DIGEST_BYTES)
_CODEC = _DIGEST.stop
_SIZE = slice(_CODEC + 1, _CODEC + 6)
_SIZE_MARK = 0xCE
_LAYOUT_FROM = _SIZE.stop

#: How many dimensions a row has in each memory format (None: any number).
_ROW_DIMENSIONS = (None, 3, 4)

_DTYPE_NAMES = tuple(DTYPE_SIZES)
_DTYPE_CODES = {name: code for code, name in enumerate(_DTYPE_NAMES)}

#: What msgpack raises for bytes that it cannot read.
UNREADABLE = (ValueError, msgpack.exceptions.UnpackException)


def pack_rows(namespace: bytes, rows: Rows, zstd_level: int | None) -> list[bytes]:
    """Return one record a row.

    Args:
        namespace: 16 bytes.
        rows: The values; ``refusal_of`` their layout is None.
        zstd_level: Compress at this level where it saves something; None stores raw.
    """
    seed = seed_of(namespace)
    described = _describe(rows.layout)
    records: list[bytes] = []
    for digest, row in zip(rows.digests, rows.data, strict=True):
        codec, payload = compress_row(memoryview(row), zstd_level)
        fixed = struct.pack(">BBI", codec, _SIZE_MARK, len(payload))
        checked = b"".join([_DIGEST_MARK, digest, fixed, described, payload])
        checksum = xxh3_64_digest(checked, seed)
        records.append(b"".join([_PREFIX, checksum, checked]))
    return records


@lru_cache(maxsize=256)
def refusal_of(layout: Layout) -> Drop | None:
    """Say why values of a layout cannot be records; None if they can."""
    if layout.nbytes > MAX_VALUE_BYTES:
        return Drop.TOO_LARGE
    try:
        described = _describe(layout)
        if _LAYOUT_FROM + len(described) > MAX_HEADER_BYTES:
            return Drop.TOO_LARGE_TO_DESCRIBE
        # By reading it: what is written and what is believed cannot drift apart.
        as_read, _ = _parse_layout(described)
    except (KeyError, OverflowError, CorruptRecordError):
        return Drop.TOO_LARGE_TO_DESCRIBE
    return None if as_read == layout else Drop.TOO_LARGE_TO_DESCRIBE


def unpack_many(
    namespace: bytes, digests: Sequence[bytes], records: Sequence[memoryview | None]
) -> tuple[list[Found], list[int], int]:
    """Check records and copy their values out.

    Args:
        namespace: 16 bytes.
        digests: What each record must be of.
        records: One record, or None, for each digest.

    Returns:
        The values, one item a layout; the positions of those missing or damaged; how many were damaged.
    """
    seed = seed_of(namespace)
    if len(records) == 1:  # without the bookkeeping below, which costs more than such a row
        if records[0] is None:
            return [], [0], 0
        lone, _ = _unpack_alike(seed, digests, records, [0])
        if lone is None:
            return [], [0], 1
        return [lone], [], 0

    # Records with one header have one length, so only those of one length are compared.
    by_length: dict[int, list[int]] = {}
    absent: list[int] = []
    for position, record in enumerate(records):
        if record is None:
            absent.append(position)
        else:
            by_length.setdefault(len(record), []).append(position)

    by_layout: dict[Layout, list[Found]] = {}
    damaged: set[int] = set()
    for positions in by_length.values():
        left = positions
        while left:
            damaged.update(left)
            part, left = _unpack_alike(seed, digests, records, left)
            damaged.difference_update(left)
            if part is not None:
                damaged.difference_update(part.positions)
                by_layout.setdefault(part.layout, []).append(part)
    found = [_join(layout, parts) for layout, parts in by_layout.items()]
    return found, sorted([*absent, *damaged]), len(damaged)


def _unpack_alike(
    seed: int, digests: Sequence[bytes], records: Sequence[memoryview | None], positions: list[int]
) -> tuple[Found | None, list[int]]:
    """Check and copy the first of some records of one length, and in bulk those that have its header.

    Args:
        seed: The namespace's.
        digests: What each record must be of.
        records: The records of a lookup.
        positions: Of those to look at, one at least.

    Returns:
        The values of those that are sound, None if there are none; and the positions of those with another header. All
        others are damaged.
    """
    first = positions[0]
    leader = _there(records[first])
    try:
        header = _read_header(leader, seed, digests[first])
    except CorruptRecordError:
        return None, positions[1:]

    views = [leader]
    sound = positions
    others: list[int] = []
    if len(positions) > 1:
        views = [_there(records[position]) for position in positions]
        wanted = [digests[position] for position in positions]
        are_alike, are_sound = _check_bulk(views, header, seed, wanted)
        numbers = np.array(positions)
        sound = numbers[are_sound].tolist()
        others = numbers[~are_alike].tolist()
        views = list(compress(views, are_sound.tolist()))

    data, bad = copy_out([view[header.payload_from :] for view in views], header.codec, header.layout.nbytes)
    if bad:
        sound = [position for i, position in enumerate(sound) if i not in bad]
    if not sound:
        return None, others
    return Found(sound, header.layout, data), others


def _there(record: memoryview | None) -> memoryview:
    assert record is not None
    return record


def unpack(namespace: bytes, digest: bytes, record: bytes | memoryview) -> tuple[Layout, bytes]:
    """Return layout and payload of one record.

    Raises:
        CorruptRecordError: If any check fails.
    """
    found, _, _ = unpack_many(namespace, [digest], [memoryview(record)])
    if not found:
        raise CorruptRecordError("the record fails a check")
    return found[0].layout, bytes(found[0].data[0])


def digest_of(record: bytes | memoryview) -> bytes:
    """Return the digest a record says it is of, unchecked; for finding its index entry."""
    return bytes(record[_DIGEST])


def length_of(record: bytes | memoryview) -> int | None:
    """Return the length of the record that begins at the start of ``record``; None if it is none.

    Used to walk the records of a segment; what is found is checked before it is believed.
    """
    if len(record) < _LAYOUT_FROM or record[: len(_PREFIX)] != _PREFIX:
        return None
    size = _stated_size(record)
    if size is None:
        return None
    try:
        header = _unpacker(memoryview(record)[1:MAX_HEADER_BYTES])  # behind the array mark lie seven objects
        for _ in range(7):
            header.skip()
    except UNREADABLE:
        return None
    length = 1 + int(header.tell()) + size
    return length if length <= len(record) else None


def _stated_size(record: bytes | memoryview) -> int | None:
    """Return how many bytes of payload a record says it has; None if it does not say that."""
    if record[_SIZE.start] != _SIZE_MARK:
        return None
    return int.from_bytes(record[_SIZE.start + 1 : _SIZE.stop], "big")


def seed_of(namespace: bytes) -> int:
    """Return the checksum seed of a namespace."""
    return int.from_bytes(namespace[:8], "little")


# -- writing ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _describe(layout: Layout) -> bytes:
    leaves: list[list[object]] = []
    for leaf in layout.leaves:
        dtype = _DTYPE_CODES[leaf.dtype]
        output_dtype = _DTYPE_CODES[leaf.output_dtype]
        leaves.append([dtype, output_dtype, leaf.memory_format, list(leaf.shape)])
    structure: bytes = msgpack.packb(layout.structure or None, use_bin_type=True)
    packed_leaves: bytes = msgpack.packb(leaves)
    return structure + packed_leaves


# -- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    """What a checked record says of itself, and where its payload begins."""

    layout: Layout
    codec: int
    payload_from: int


def _is_sound(record: memoryview, seed: int, digest: bytes) -> bool:
    return (
        len(record) > _LAYOUT_FROM
        and record[: len(_PREFIX)] == _PREFIX
        and record[_DIGEST] == digest
        and xxh3_64_digest(record[_CHECKED_FROM:], seed) == record[_CHECKSUM]
    )


def _check_bulk(
    records: Sequence[memoryview], header: _Header, seed: int, digests: Sequence[bytes]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell which records of one length have the first one's header, and which of those are sound."""
    width = header.payload_from
    heads = _byte_rows([record[:width] for record in records], width)
    is_constant = np.ones(width, dtype=bool)
    is_constant[_CHECKSUM] = False
    is_constant[_DIGEST] = False
    constant = heads[:, is_constant]
    are_alike: NDArray[np.bool_] = (constant == constant[0]).all(axis=1)

    checksums = [xxh3_64_digest(record[_CHECKED_FROM:], seed) for record in records]
    have_checksum = (heads[:, _CHECKSUM] == _byte_rows(checksums, _CHECKSUM_BYTES)).all(axis=1)
    have_digest = (heads[:, _DIGEST] == _byte_rows(digests, _DIGEST_BYTES)).all(axis=1)
    return are_alike, are_alike & have_checksum & have_digest


def _byte_rows(parts: Sequence[bytes | memoryview], width: int) -> Bytes2D:
    """Return parts of ``width`` bytes as the rows of an array that is only read."""
    return np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(-1, width)


def _unpacker(view: memoryview | bytes) -> msgpack.Unpacker:
    unpacker = msgpack.Unpacker(
        raw=False,
        use_list=True,
        strict_map_key=True,
        max_buffer_size=MAX_HEADER_BYTES,
        max_array_len=MAX_LEAVES,
        max_map_len=0,
        max_str_len=0,
        max_ext_len=0,
        max_bin_len=MAX_HEADER_BYTES,
    )
    unpacker.feed(view[:MAX_HEADER_BYTES])
    return unpacker


def _read_header(record: memoryview, seed: int, digest: bytes) -> _Header:
    """Check one record and read its header.

    Raises:
        CorruptRecordError: If any check fails; before the checksum holds nothing else is looked at.
    """
    if not _is_sound(record, seed, digest):
        raise CorruptRecordError("the checksum or the digest does not fit")
    layout, payload_from = _read_layout(record)
    size = len(record) - payload_from
    codec = record[_CODEC]
    is_raw = codec == RAW and size == layout.nbytes
    is_compressed = codec == ZSTD and layout.nbytes > 0
    if not is_raw and not is_compressed:
        raise CorruptRecordError("the payload's size is not its shape's, or the codec is not known")
    return _Header(layout, codec, payload_from)


def _read_layout(record: memoryview) -> tuple[Layout, int]:
    """Return the layout of a record whose checksum holds, and where its payload begins.

    Raises:
        CorruptRecordError: If what lies before the payload, of which the record states the size, describes none.
    """
    size = _stated_size(record)
    if size is None or len(record) - size <= _LAYOUT_FROM:
        raise CorruptRecordError("the stored size is not the record's")
    end = len(record) - size
    described = bytes(record[_LAYOUT_FROM:end])
    layout = _layouts.get(described)
    if layout is None:
        layout, length = _parse_layout(described)
        if length != len(described):
            raise CorruptRecordError("the stored size is not the record's")
        if len(_layouts) >= _MOST_LAYOUTS:
            _layouts.clear()
        _layouts[described] = layout
    return layout, end


#: Layouts that were read, by what describes them: reading one costs 5 us, and rows of one store share a few.
_layouts: dict[bytes, Layout] = {}
_MOST_LAYOUTS = 1024


def _parse_layout(described: bytes | memoryview) -> tuple[Layout, int]:
    """Return the layout that bytes begin with, and how many of them describe it."""
    unpacker = _unpacker(described)
    try:
        structure = unpacker.unpack()
        leaves = unpacker.unpack()
    except UNREADABLE as error:
        raise CorruptRecordError("the header cannot be read") from error
    return _checked_layout(structure, leaves), int(unpacker.tell())


def _checked_layout(structure: object, leaves: object) -> Layout:
    if not isinstance(structure, (bytes, type(None))) or not isinstance(leaves, list) or not leaves:
        raise CorruptRecordError("the header does not describe a value")
    checked = tuple(_checked_leaf(leaf) for leaf in leaves)
    layout = Layout(checked, structure or b"")
    if layout.nbytes > MAX_VALUE_BYTES:
        raise CorruptRecordError("the header claims more bytes than a value may have")
    return layout


def _checked_leaf(leaf: object) -> Leaf:
    if not isinstance(leaf, list) or len(leaf) != 4:
        raise CorruptRecordError("the header describes no leaf this version knows")
    dtype, output_dtype, memory_format, shape = leaf
    dtypes = range(len(_DTYPE_NAMES))
    if (
        not _all_in((dtype, output_dtype), dtypes)
        or not _all_in((memory_format,), range(len(_ROW_DIMENSIONS)))
        or not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not _all_in(shape, range(MAX_VALUE_BYTES + 1))
        or _ROW_DIMENSIONS[memory_format] not in (None, len(shape))
        or math.prod(size for size in shape if size) > MAX_VALUE_BYTES  # also where a 0 makes no bytes of it
    ):
        raise CorruptRecordError("the header describes no leaf this version knows")
    return Leaf(_DTYPE_NAMES[dtype], _DTYPE_NAMES[output_dtype], tuple(shape), memory_format)


def _all_in(values: Sequence[object], allowed: range) -> bool:
    """Tell whether all values are ints (and not bools) of a range."""
    return all(type(value) is int and value in allowed for value in values)


def _join(layout: Layout, parts: list[Found]) -> Found:
    if len(parts) == 1:
        return parts[0]
    positions = [position for part in parts for position in part.positions]
    return Found(positions, layout, np.concatenate([part.data for part in parts]))
