"""The payload of a record: the bytes of a row, raw or in one zstd frame, and back, many at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from torchcache.errors import CorruptRecordError
from torchcache.layout import Bytes2D, empty_rows

#: The codecs.
RAW, ZSTD = 0, 1

#: A zstd frame has to save at least a twentieth, or the value is stored raw.
_WORTHWHILE = 0.95

_local = threading.local()


def compress_row(row: memoryview, level: int | None) -> tuple[int, bytes | memoryview]:
    """Return the codec and the payload of a row; as it is without a level, and where a frame saves too little."""
    if level is None or not len(row):
        return RAW, row
    # One compressor a thread: shared ones crash. The content size lets the reader refuse a bomb.
    if getattr(_local, "level", None) != level:
        _local.level = level
        _local.compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
    frame: bytes = _local.compressor.compress(row)
    if len(frame) >= _WORTHWHILE * len(row):
        return RAW, row
    return ZSTD, frame


def copy_out(payloads: Sequence[memoryview], codec: int, nbytes: int) -> tuple[Bytes2D, list[int]]:
    """Copy the payloads of sound records into memory of their own; also say which could not be decoded.

    Args:
        payloads: Of one codec and length of row.
        codec: ``RAW`` or ``ZSTD``.
        nbytes: How many bytes a row has.
    """
    # Before anything is allocated: a hostile frame of 60 bytes may claim 2 GiB.
    bad: list[int] = []
    if codec == ZSTD:
        bad = [i for i, frame in enumerate(payloads) if not _is_plausible(frame, nbytes)]
    if len(bad) == len(payloads):
        return empty_rows(0, nbytes), bad

    try:
        data = empty_rows(len(payloads), nbytes)
    except MemoryError:
        return empty_rows(0, nbytes), list(range(len(payloads)))

    if codec == ZSTD:
        bad = _decompress_into(data, payloads, bad)
    elif data.size:
        _copy_into(data, payloads)
    if bad:
        data = np.delete(data, bad, axis=0)
    return data, bad


def _copy_into(data: Bytes2D, payloads: Sequence[memoryview]) -> None:
    """Copy payloads that are not compressed to the rows of ``data``, which has some bytes a row."""
    nbytes = data.shape[1]
    flat = data.data.cast("B")
    for i, payload in enumerate(payloads):
        flat[i * nbytes : (i + 1) * nbytes] = payload


def _decompress_into(data: Bytes2D, frames: Sequence[memoryview], bad: Sequence[int]) -> list[int]:
    """Decompress frames, but for those in ``bad``, to the rows of ``data``; return ``bad`` and what failed."""
    nbytes = data.shape[1]
    flat = data.data.cast("B")
    failed = list(bad)
    for i, frame in enumerate(frames):
        if i in bad:
            continue
        try:
            flat[i * nbytes : (i + 1) * nbytes] = _decompress(frame, nbytes)
        except CorruptRecordError:
            failed.append(i)
    return failed


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
