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
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray
from xxhash import xxh3_64_digest

from torchcache.errors import CorruptRecordError
from torchcache.layout import DTYPE_SIZES, MAX_LEAVES, Bytes2D, Found, Layout, Leaf, Rows, empty_rows

FORMAT_VERSION = 1
RAW, ZSTD = 0, 1

#: A value larger than this is not stored; it bounds what a damaged or hostile record can claim.
MAX_VALUE_BYTES = 2**31
MAX_HEADER_BYTES = 65536
MAX_DIMENSIONS = 64

#: A zstd frame has to save at least a twentieth, or the value is stored raw.
_WORTHWHILE = 0.95

_CHECKSUM_BYTES = 8
_PREFIX = bytes([0x97, FORMAT_VERSION, 0xC4, _CHECKSUM_BYTES])
_CHECKSUM = slice(len(_PREFIX), len(_PREFIX) + _CHECKSUM_BYTES)
_CHECKED_FROM = _CHECKSUM.stop
_DIGEST_MARK = bytes([0xC4, 16])
_DIGEST = slice(_CHECKED_FROM + 2, _CHECKED_FROM + 18)
_CODEC = _DIGEST.stop
_SIZE = slice(_CODEC + 1, _CODEC + 6)
_SIZE_MARK = 0xCE
_LAYOUT_FROM = _SIZE.stop

#: How many dimensions a row has in each memory format (None: any number).
_ROW_DIMENSIONS = (None, 3, 4)

_DTYPE_NAMES = tuple(DTYPE_SIZES)
_DTYPE_CODES = {name: code for code, name in enumerate(_DTYPE_NAMES)}

_local = threading.local()


def pack_rows(namespace: bytes, rows: Rows, zstd_level: int | None) -> list[bytes]:
    """Return one record a row.

    Args:
        namespace: 16 bytes.
        rows: The values; ``refusal_of`` their layout is None.
        zstd_level: Compress at this level where it saves something; None stores raw.
    """
    seed = seed_of(namespace)
    described = _describe(rows.layout)
    records = []
    for digest, row in zip(rows.digests, rows.data, strict=True):
        codec, payload = _compress(memoryview(row), zstd_level)
        checked = b"".join(
            [_DIGEST_MARK, digest, struct.pack(">BBI", codec, _SIZE_MARK, len(payload)), described, payload]
        )
        records.append(b"".join([_PREFIX, xxh3_64_digest(checked, seed), checked]))
    return records


@lru_cache(maxsize=256)
def refusal_of(layout: Layout) -> str | None:
    """Say why values of a layout cannot be records, as the reason of a dropped row; None if they can."""
    if layout.nbytes > MAX_VALUE_BYTES:
        return "too_large"
    try:
        described = _describe(layout)
        # By reading it: what is written and what is believed cannot drift apart.
        is_readable = _LAYOUT_FROM + len(described) <= MAX_HEADER_BYTES and _parse_layout(described)[0] == layout
    except (KeyError, OverflowError, CorruptRecordError):
        is_readable = False
    return None if is_readable else "too_large_to_describe"


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
    if len(records) == 1:
        return _unpack_one(seed, digests[0], records[0])
    sound: dict[Layout, list[tuple[list[int], Bytes2D]]] = {}
    missing: list[int] = []
    by_length: dict[int, list[int]] = {}
    for position, record in enumerate(records):
        if record is None:
            missing.append(position)
        else:
            by_length.setdefault(len(record), []).append(position)
    absent = len(missing)
    for positions in by_length.values():
        while positions:
            # The first record leads: those with its header are checked and copied in bulk.
            leader = records[positions[0]]
            assert leader is not None
            try:
                header = _read_header(leader, seed, digests[positions[0]])
            except CorruptRecordError:
                missing.append(positions.pop(0))
                continue
            if len(positions) == 1:
                data, bad = _copy_out([leader], header)
                if bad:
                    missing += positions
                else:
                    sound.setdefault(header.layout, []).append((positions, data))
                break
            views = [leader if p == positions[0] else records[p] for p in positions]
            alike, is_sound = _check_bulk(views, header, seed, [digests[p] for p in positions])  # type: ignore[arg-type]
            good = [i for i, fine in enumerate(is_sound.tolist()) if fine]
            data, bad = _copy_out([views[i] for i in good], header)  # type: ignore[misc]
            kept = [positions[i] for k, i in enumerate(good) if k not in bad]
            if kept:
                sound.setdefault(header.layout, []).append((kept, data))
            missing += set(np.array(positions)[alike].tolist()) - set(kept)
            positions[:] = np.array(positions)[~alike].tolist()
    return [_join(layout, parts) for layout, parts in sound.items()], sorted(missing), len(missing) - absent


def _unpack_one(seed: int, digest: bytes, record: memoryview | None) -> tuple[list[Found], list[int], int]:
    """Do what ``unpack_many`` says for one record, without its bookkeeping."""
    if record is None:
        return [], [0], 0
    try:
        header = _read_header(record, seed, digest)
    except CorruptRecordError:
        return [], [0], 1
    data, bad = _copy_out([record], header)
    return ([], [0], 1) if bad else ([Found([0], header.layout, data)], [], 0)


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
    if len(record) < _LAYOUT_FROM or record[: len(_PREFIX)] != _PREFIX or record[_SIZE.start] != _SIZE_MARK:
        return None
    try:
        header = _unpacker(memoryview(record)[1:MAX_HEADER_BYTES])  # behind the array mark lie seven objects
        for _ in range(7):
            header.skip()
    except (ValueError, msgpack.exceptions.UnpackException):
        return None
    length = int(header.tell()) + int.from_bytes(record[_SIZE.start + 1 : _SIZE.stop], "big") + 1
    return length if length <= len(record) else None


def seed_of(namespace: bytes) -> int:
    """Return the checksum seed of a namespace."""
    return int.from_bytes(namespace[:8], "little")


# -- writing ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _describe(layout: Layout) -> bytes:
    leaves = [
        [_DTYPE_CODES[leaf.dtype], _DTYPE_CODES[leaf.output_dtype], leaf.memory_format, list(leaf.shape)]
        for leaf in layout.leaves
    ]
    packed: bytes = msgpack.packb(layout.structure or None, use_bin_type=True) + msgpack.packb(leaves)
    return packed


def _compress(row: memoryview, level: int | None) -> tuple[int, bytes | memoryview]:
    if level is None or not len(row):
        return RAW, row
    # One compressor a thread: shared ones crash. The content size lets the reader refuse a bomb.
    if getattr(_local, "level", None) != level:
        _local.level = level
        _local.compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
    frame: bytes = _local.compressor.compress(row)
    return (ZSTD, frame) if len(frame) < _WORTHWHILE * len(row) else (RAW, row)


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
    heads = np.frombuffer(b"".join([record[:width] for record in records]), dtype=np.uint8).reshape(-1, width)
    constant = np.ones(width, dtype=bool)
    constant[_CHECKSUM] = constant[_DIGEST] = False
    alike: NDArray[np.bool_] = (heads[:, constant] == heads[0, constant]).all(axis=1)
    checksums = b"".join([xxh3_64_digest(record[_CHECKED_FROM:], seed) for record in records])
    is_sound = (
        alike
        & (heads[:, _CHECKSUM] == np.frombuffer(checksums, dtype=np.uint8).reshape(-1, _CHECKSUM_BYTES)).all(axis=1)
        & (heads[:, _DIGEST] == np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16)).all(axis=1)
    )
    return alike, is_sound


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
    if record[_SIZE.start] != _SIZE_MARK or int.from_bytes(record[_SIZE.start + 1 : _SIZE.stop], "big") != size:
        raise CorruptRecordError("the stored size is not the record's")
    if codec not in (RAW, ZSTD) or (size != layout.nbytes if codec == RAW else not layout.nbytes):
        raise CorruptRecordError("the payload's size is not its shape's, or the codec is not known")
    return _Header(layout, codec, payload_from)


def _read_layout(record: memoryview) -> tuple[Layout, int]:
    """Return the layout of a record whose checksum holds, and where its payload begins."""
    global _last_layout  # noqa: PLW0603 - rows of one store mostly share a layout; one slot saves 5 us a call
    described, layout = _last_layout
    end = _LAYOUT_FROM + len(described)
    if layout is not None and record[_LAYOUT_FROM:end] == described:
        return layout, end
    layout, size = _parse_layout(record[_LAYOUT_FROM:])
    end = _LAYOUT_FROM + size
    _last_layout = bytes(record[_LAYOUT_FROM:end]), layout
    return layout, end


_last_layout: tuple[bytes, Layout | None] = (b"", None)


def _parse_layout(described: bytes | memoryview) -> tuple[Layout, int]:
    """Return the layout that bytes begin with, and how many of them describe it."""
    unpacker = _unpacker(described)
    try:
        structure, leaves = unpacker.unpack(), unpacker.unpack()
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise CorruptRecordError("the header cannot be read") from error
    return _checked_layout(structure, leaves), int(unpacker.tell())


def _checked_layout(structure: object, leaves: object) -> Layout:
    if not isinstance(structure, (bytes, type(None))) or not isinstance(leaves, list) or not leaves:
        raise CorruptRecordError("the header does not describe a value")
    layout = Layout(tuple(_checked_leaf(leaf) for leaf in leaves), structure or b"")
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


def _copy_out(records: Sequence[memoryview], header: _Header) -> tuple[Bytes2D, list[int]]:
    """Copy the payloads of sound records into memory of their own; also say which could not be decoded."""
    nbytes, start = header.layout.nbytes, header.payload_from
    bad: list[int] = []
    if header.codec == ZSTD:
        # Before anything is allocated: a hostile frame of 60 bytes may claim 2 GiB.
        bad = [i for i, record in enumerate(records) if not _is_plausible(record[start:], nbytes)]
    try:
        data = empty_rows(len(records) if len(bad) < len(records) else 0, nbytes)
    except MemoryError:
        return empty_rows(0, nbytes), list(range(len(records)))
    if not data.size:
        return data, bad
    flat = data.data.cast("B")
    for i, record in enumerate(records):
        row = slice(i * nbytes, (i + 1) * nbytes)
        if header.codec == RAW:
            flat[row] = record[start:]
        elif i not in bad:
            try:
                flat[row] = _decompress(record[start:], nbytes)
            except CorruptRecordError:
                bad.append(i)
    return (np.delete(data, bad, axis=0) if bad else data), bad


def _is_plausible(frame: memoryview, nbytes: int) -> bool:
    """Tell whether a frame says it holds ``nbytes``, and could: 4 bytes make 128 KiB at most."""
    try:
        stated = zstandard.frame_content_size(frame)
    except zstandard.ZstdError:
        return False
    return stated == nbytes and nbytes <= len(frame) << 15


def _decompress(frame: memoryview, nbytes: int) -> bytes:
    """Decompress a frame whose stated size was compared: max_output_size is ignored when there is one."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        plain: bytes = _local.decompressor.decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError, ValueError) as error:
        raise CorruptRecordError("the frame cannot be decompressed") from error
    if len(plain) != nbytes:
        raise CorruptRecordError("the frame is shorter than it says")
    return plain


def _join(layout: Layout, parts: list[tuple[list[int], Bytes2D]]) -> Found:
    if len(parts) == 1:
        return Found(parts[0][0], layout, parts[0][1])
    positions = [position for some, _ in parts for position in some]
    return Found(positions, layout, np.concatenate([data for _, data in parts]))
