"""Values that are functions of their keys, so that any process can check any read alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import lmdb
import numpy as np

from torchcache.layout import Layout, Leaf, Rows
from torchcache.storage import environment
from torchcache.storage.contract import Lookup, Packed, StoreSettings, Verdict, Written
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.lmdb import LmdbStore
from torchcache.storage.record import digest_of as record_digest_of
from torchcache.storage.record import length_of, unpack
from torchcache.storage.table import LOCATION, Namespace, parse_namespace

NAMESPACE = b"one namespace...".ljust(16)
NAME = "module-hash"


def digest_of(number: int) -> bytes:
    """Return the digest of sample ``number``."""
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest()


def digests_of(numbers: Iterable[int]) -> list[bytes]:
    return [digest_of(number) for number in numbers]


def value_of(namespace: bytes, digest: bytes, nbytes: int) -> bytes:
    """Return the one right value of a sample that has ``nbytes``: halves repeat, so it can be compressed."""
    half = hashlib.shake_128(namespace + digest + b"%d" % nbytes).digest(nbytes // 2 + 1)
    return (half + half)[:nbytes]


def plain_layout(nbytes: int) -> Layout:
    return Layout((Leaf("uint8", "uint8", (nbytes,)),))


def rows_of(digests: Sequence[bytes], nbytes: int = 100, namespace: bytes = NAMESPACE) -> Rows:
    """Return the right values of ``digests``, each of ``nbytes``."""
    data = b"".join(value_of(namespace, digest, nbytes) for digest in digests)
    return Rows(list(digests), plain_layout(nbytes), np.frombuffer(data, np.uint8).reshape(len(digests), nbytes))


def open_store(path: Path, name: str = NAME, **settings: object) -> LmdbStore:
    """Open a store as a cache does."""
    settings = {"max_persistent_cache_size": 1 << 30, **settings}
    return LmdbStore(CacheDirectory(path), name, StoreSettings(**settings))


def put(store: LmdbStore, digests: Sequence[bytes], nbytes: int = 100, namespace: bytes = NAMESPACE) -> Written:
    """Commit the right values of ``digests``."""
    return store.put_many(packed_of(store, digests, nbytes, namespace))


def packed_of(
    store: LmdbStore, digests: Sequence[bytes], nbytes: int = 100, namespace: bytes = NAMESPACE
) -> list[Packed]:
    return [store.pack(namespace, rows_of(digests, nbytes, namespace))]


def check(lookup: Lookup, digests: Sequence[bytes], namespace: bytes = NAMESPACE) -> set[int]:
    """Check every value that was found; return the positions of those found.

    Every position is answered exactly once, with the right bytes or as missing.
    """
    answered = list(lookup.missing)
    hits: set[int] = set()
    for item in lookup.found:
        assert item.data.shape == (len(item.positions), item.layout.nbytes)
        for position, row in zip(item.positions, item.data, strict=True):
            assert row.tobytes() == value_of(namespace, digests[position], item.layout.nbytes)
            hits.add(int(position))
        answered += list(item.positions)
    assert sorted(answered) == list(range(len(digests)))
    return hits


def hits_of(store: LmdbStore, digests: Sequence[bytes], namespace: bytes = NAMESPACE) -> set[int]:
    """Look ``digests`` up, check what was found and return its positions."""
    return check(store.get_many(namespace, digests), digests, namespace)


def verdict_of(store: LmdbStore, namespace: bytes = NAMESPACE) -> Verdict:
    """Return what a lookup says of a namespace."""
    return store.get_many(namespace, []).verdict


def entry_of(store: LmdbStore, namespace: bytes = NAMESPACE) -> Namespace | None:
    """Return a namespace's entry as it is on disk."""
    with store._environment.reading() as txn:
        value = txn.get(b"n" + namespace)
        return None if value is None else parse_namespace(bytes(value))


def close_environments() -> None:
    """Close every environment of this process, as its end would; the next use opens them again."""
    for opened in list(environment._environments.values()):
        opened.close()


def forget_environments() -> None:
    close_environments()
    environment._environments.clear()


def directory_bytes(path: Path) -> int:
    """Count the bytes under a cache directory from outside, itself included; what moves meanwhile counts once."""
    sizes = {}
    for folder, _, names in os.walk(path):  # passes by what is removed while it looks
        for entry in [Path(folder), *(Path(folder, name) for name in names)]:
            with contextlib.suppress(FileNotFoundError):
                status = entry.lstat()
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def verify(path: Path) -> int:
    """Check an environment that nobody writes: every index entry has its sound record; return how many.

    Opens its own handle, so it must be closed in this process.
    """
    with lmdb.open(str(path), readonly=True, lock=False, max_dbs=0) as env, env.begin() as txn:
        entries = dict(txn.cursor())
        assert (env.info()["last_pgno"] + 1) * env.stat()["psize"] <= (path / "data.mdb").stat().st_size
    numbers = {}
    for key, value in entries.items():
        if key[:1] == b"n":
            entry = parse_namespace(value)
            if entry is not None:
                numbers[entry.number] = key[1:]
    count = 0
    for key, location in entries.items():
        if key[:1] != b"i":
            continue
        _, offset, length = LOCATION.unpack(location)
        segment = entries[b"s" + key[1:4] + location[:4]]
        record = segment[offset : offset + length] if length else segment[offset:]
        assert length_of(record) == len(record)
        digest = record_digest_of(record)
        assert digest[:8] == key[4:], "an index entry points at another sample's record"
        namespace = numbers.get(int.from_bytes(key[1:4], "big"))
        if namespace is not None:  # else its entry was damaged, and it has a new number now
            layout, payload = unpack(namespace, digest, record)
            assert len(payload) == layout.nbytes
            count += 1
    for key in entries:
        if key[:1] == b"r":
            assert b"s" + key[1:] in entries, "a segment is gone and its time of use is not"
    return count
