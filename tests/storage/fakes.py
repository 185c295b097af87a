"""A store that does what a test says, and who listens to the writer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchcache.layout import Rows
from torchcache.storage.contract import Packed, Written

_numbers = itertools.count()


@dataclass(eq=False)
class FakeStore:
    """A store whose commits wait until they are let through, or raise."""

    most_commit_bytes: int = 1 << 20
    errors: list[BaseException] = field(default_factory=list)
    let_through: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    commits: list[list[Packed]] = field(default_factory=list)
    touched: list[bytes] = field(default_factory=list)
    fails_in: str = "put_many"
    short: str | None = None
    path: Path = field(default_factory=lambda: Path(f"store-{next(_numbers)}"))

    def shortage(self) -> str | None:
        self._fail("shortage")
        return self.short

    def pack(self, namespace: bytes, rows: Rows) -> Packed:
        self._fail("pack")
        return Packed(namespace, rows.digests, [row.tobytes() for row in rows.data])

    def put_many(self, packed, cancel=None) -> Written:
        self.entered.set()
        assert self.let_through.wait(20)
        self._fail("put_many")
        self.commits.append(list(packed))
        return Written(rows=sum(len(p.digests) for p in packed), nbytes=sum(sum(map(len, p.records)) for p in packed))

    def delete_many(self, namespace: bytes, digests: Sequence[bytes], cancel=None) -> int:
        return 0

    def touch(self, namespace: bytes, cancel=None) -> None:
        self._fail("touch")
        self.touched.append(namespace)

    def _fail(self, where: str) -> None:
        if self.errors and where == self.fails_in:
            raise self.errors.pop(0)

    @property
    def written(self) -> set[bytes]:
        return {digest for packed in self.commits for item in packed for digest in item.digests}


class Observer:
    def __init__(self) -> None:
        self.written = 0
        self.dropped: dict[str, int] = {}
        self.faults: list[tuple[BaseException, int]] = []

    def on_written(self, written: Written) -> None:
        self.written += written.rows
        for reason, rows in written.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def on_fault(self, error: Exception, rows: int) -> None:
        self.faults.append((error, rows))

    @property
    def faulted_rows(self) -> int:
        return sum(rows for _, rows in self.faults)
