"""One run of a scenario: what it was asked, what it counted, what it saw that never may happen."""

from __future__ import annotations

import glob
import json
import os
import platform
import random
import shlex
import time
import traceback
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import filelock
import lmdb
import numpy as np

import torchcache
from stress.ledger import Ledger
from stress.values import BATCH_ROWS, Batch, ViolationError, check
from torchcache.layout import Rows
from torchcache.storage.contract import Lookup, StoreSettings
from torchcache.storage.directory import CacheDirectory
from torchcache.storage.lmdb import LmdbStore

#: Of expected hits; the rest may be what was under way when a member was killed.
LEAST_HIT_SHARE = 0.95

_PLANT_EVERY = 5


@dataclass(slots=True)
class Tally:
    """What a run counted; each suite adds what it counts.

    Attributes:
        expected: Lookups that must be hits.
        hits: How many of these were.
    """

    expected: int = 0
    hits: int = 0

    def is_proof(self) -> bool:
        """Tell whether enough was counted to prove something."""
        raise NotImplementedError

    def check_hits(self) -> None:
        """Check that next to all that had to be found was.

        Raises:
            ViolationError: If not.
        """
        if self.expected and self.hits / self.expected < LEAST_HIT_SHARE:
            raise ViolationError("missed", f"only {self.hits} of {self.expected} expected hits were hits")


@dataclass(slots=True)
class SharedTally(Tally):
    """What a run counted whose processes share a cache directory.

    Attributes:
        reads: Rows that were found and compared byte by byte.
        second_run_rows_computed: Rows that a later process did not find, or had to compute, although they had
            been committed.
        kills: Members that were killed while they worked.
        samples: How often the bytes under the directory were counted.
        longest_gap_ms: The longest time between two samples.
        peak_share: The most bytes seen under the directory, as a share of its budget.
        over_budget_bytes: The most bytes seen above a budget.
    """

    reads: int = 0
    second_run_rows_computed: int = 0
    kills: int = 0
    samples: int = 0
    longest_gap_ms: float = 0.0
    peak_share: float = 0.0
    over_budget_bytes: int = 0

    def is_proof(self) -> bool:
        return bool(self.reads and self.kills)


@dataclass(slots=True)
class StoreTally(SharedTally):
    """What a run did to a store, over all its members; expected are acknowledged rows where nothing is evicted.

    Attributes:
        acknowledged: Rows that the store said are stored.
        evictable: Rows looked up that were acknowledged before and may have been evicted since.
        evictable_hits: How many of these were found.
    """

    acknowledged: int = 0
    evictable: int = 0
    evictable_hits: int = 0

    def add(self, ledger: Ledger, *, is_strict: bool) -> None:
        """Add what the members of one directory counted; the last one came after the others."""
        counts = ledger.counts()
        self.reads += counts["reads"]
        self.acknowledged += BATCH_ROWS * counts["acknowledged"]
        if is_strict:
            self.expected += counts["expected"]
            self.hits += counts["hits"]
            last = ledger.counts(-1)
            self.second_run_rows_computed += last["expected"] - last["hits"]
        else:
            self.evictable += counts["expected"]
            self.evictable_hits += counts["hits"]


_TallyT = TypeVar("_TallyT", bound=Tally)


@dataclass(frozen=True, kw_only=True)
class Run(Generic[_TallyT]):
    """One suite with its options.

    Attributes:
        directory: Empty and the run's own; caches and the list of violations lie in it.
        jobs: How many processes of a kind work at a time.
        tally: What is counted.
        cases: How many cases at most, of a suite that has cases; None for as many as it thinks are enough.
        case: The number of the only case to run, or None.
        only: What the names of the kinds have in them of which there are cases; None for all kinds.
        plant: One of the suite's plants, or none.
    """

    suite: str
    seed: int
    seconds: float
    jobs: int
    directory: Path
    tally: _TallyT
    cases: int | None = None
    case: int | None = None
    only: str | None = None
    plant: str | None = None

    def rng(self, *place: object) -> random.Random:
        """Return the random numbers of one place of the scenario; the same for the same seed."""
        return random.Random(" ".join(map(str, (self.suite, self.seed, *place))))

    @property
    def command(self) -> str:
        """The command that runs this again."""
        words = f"python -m stress run --suite {self.suite} --seconds {self.seconds:g} --seed {self.seed}"
        words += f" --jobs {self.jobs}"
        words += "".join(
            f" --{name} {shlex.quote(str(value))}"
            for name, value in (("cases", self.cases), ("case", self.case), ("only", self.only))
            if value is not None
        )
        return words + (f" --plant {shlex.quote(self.plant)}" if self.plant else "")

    def note(self, error: BaseException) -> None:
        """Note a violation; from any process."""
        kind = error.kind if isinstance(error, ViolationError) else "raised"
        text = str(error) if isinstance(error, ViolationError) else "".join(traceback.format_exception(error))
        line = json.dumps({"kind": kind, "what": text, "pid": os.getpid()})
        descriptor = os.open(self._violations, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode() + b"\n")  # at once: nobody's line is cut by another's
        finally:
            os.close(descriptor)

    def has_failed(self) -> bool:
        """Tell whether there is a violation."""
        try:
            return self._violations.stat().st_size > 0
        except FileNotFoundError:
            return False

    def violations(self) -> list[dict[str, object]]:
        """Return what was noted."""
        return [json.loads(line) for line in self._violations.read_text().splitlines()] if self.has_failed() else []

    def verdict(self, took_seconds: float) -> dict[str, object]:
        """Return the run as one JSON object."""
        tally = asdict(self.tally)
        hits, expected = self.tally.hits, self.tally.expected
        return {
            "suite": self.suite,
            "seed": self.seed,
            "seconds": self.seconds,
            "took_seconds": round(took_seconds, 1),
            "jobs": self.jobs,
            "plant": self.plant,
            **{name: round(value, 3) if isinstance(value, float) else value for name, value in tally.items()},
            "hit_share": round(hits / expected, 4) if expected else None,
            "hangs": sum(violation["kind"] == "hang" for violation in self.violations()),
            "violations": len(self.violations()),
            "versions": {
                "torchcache": torchcache.__version__,
                "python": platform.python_version(),
                "py-lmdb": lmdb.__version__,
                "lmdb": ".".join(map(str, lmdb.version())),
                "filelock": filelock.__version__,
                "numpy": np.__version__,
                "torch": metadata.version("torch"),
                "kernel": platform.release(),
            },
        }

    @property
    def _violations(self) -> Path:
        return self.directory / "violations.jsonl"


class Readable(Protocol):
    """What can be looked up in: a store, or a store with a queue in front."""

    def get_many(self, namespace: bytes, digests: Sequence[bytes]) -> Lookup: ...


@dataclass(frozen=True, slots=True)
class Trial:
    """One cache directory of a run, as its members use it.

    Attributes:
        is_strict: Whether every row that was acknowledged has to be found: nothing is evicted.
    """

    run: Run[Any]
    root: Path
    settings: StoreSettings
    ledger: Ledger
    is_strict: bool

    def open_store(self) -> LmdbStore:
        """Open the store as a cache does."""
        return LmdbStore(CacheDirectory(self.root), "module-hash", self.settings)

    def rows(self, batch: Batch) -> Rows:
        """Return the right values of a batch, unless a wrong one is planted."""
        rows = batch.rows()
        if self.run.plant == "wrong-value" and _is_planted(batch):
            rows.data[0, 0] ^= 1
        return rows

    def loses(self, batch: Batch) -> bool:
        """Tell whether it is planted that a batch is acknowledged and not stored."""
        return self.run.plant == "lost-record" and _is_planted(batch)

    def put(self, store: LmdbStore, batch: Batch) -> bool:
        """Commit a batch and acknowledge it; return whether all of it was stored.

        Raises:
            ViolationError: If the store did not account for every row.
        """
        if self.loses(batch):
            self.ledger.acknowledge(batch)
            return True
        written = store.put_many([store.pack(batch.namespace, self.rows(batch))])
        dropped = sum(written.dropped.values())
        if written.rows + dropped != BATCH_ROWS:
            raise ViolationError("uncounted", f"of {BATCH_ROWS} rows {written.rows} stored, {dropped} dropped")
        if not dropped:
            self.ledger.acknowledge(batch)
        return not dropped

    def read(self, store: Readable, member: int, batches: Sequence[Batch], own: Container[Batch] = ()) -> int:
        """Look up batches of one namespace and check all that is found; return how many rows were.

        Args:
            store: Where to look.
            member: Who looks.
            batches: Of one namespace.
            own: Batches that have to be found although nobody acknowledged them: this process gave them away.

        Raises:
            ViolationError: If a value is wrong, or a row that must be there is not.
        """
        expected = [self.ledger.is_acknowledged(batch) or batch in own for batch in batches]  # before the look
        digests = [digest for batch in batches for digest in batch.digests]
        found = check(batches[0].namespace, digests, store.get_many(batches[0].namespace, digests))
        lost = [i for i in range(len(digests)) if expected[i // BATCH_ROWS] and i not in found]
        rows = BATCH_ROWS * sum(expected)
        self.ledger.count(member, reads=len(found), expected=rows, hits=rows - len(lost))
        if lost and self.is_strict:
            raise ViolationError(
                "lost", f"{len(lost)} rows were acknowledged and are gone: {batches[lost[0] // BATCH_ROWS]}"
            )
        return len(found)

    def read_everything(self, member: int) -> None:
        """Look up every batch that was acknowledged."""
        store = self.open_store()
        for line in range(self.ledger.n_lines):
            for batch in self.ledger.acknowledged(line):
                self.read(store, member, [batch])


class Sampler:
    """Counts the bytes under cache directories from outside, a few hundred microseconds a look.

    Args:
        run: Whose directories they are.
        pattern: Which of the paths in the run's directory are cache directories.
        budget_bytes: What each of them may hold.
    """

    def __init__(self, run: Run[Any], pattern: str, budget_bytes: int) -> None:
        self._run: Run[SharedTally] = run
        self._pattern = pattern
        self._budget_bytes = budget_bytes
        self._looked_at: float | None = None

    def look(self) -> None:
        """Count once.

        Raises:
            ViolationError: If there are more bytes than the budget, or a store was found to be damaged.
        """
        tally = self._run.tally
        now = time.monotonic()
        if self._looked_at is not None:
            tally.longest_gap_ms = max(tally.longest_gap_ms, 1000 * (now - self._looked_at))
        self._looked_at = now
        tally.samples += 1
        for path in _glob(self._run.directory, self._pattern):
            self._look_at(self._run.directory / path)

    def _look_at(self, root: Path) -> None:
        tally, limit = self._run.tally, self._budget_bytes
        if self._run.plant == "over-budget":
            planted = root / "planted"
            planted.touch()
            os.truncate(planted, limit + 1)
        used = _bytes_under(root)
        tally.peak_share = max(tally.peak_share, used / limit)
        tally.over_budget_bytes = max(tally.over_budget_bytes, used - limit)
        if used > limit:
            raise ViolationError("budget", f"{used} bytes lie under {root}, {limit} are allowed")
        if _glob(root, "*.damaged"):
            raise ViolationError("damaged", f"a store under {root} was set aside as damaged")


def _is_planted(batch: Batch) -> bool:
    return batch.line == 0 and batch.number % _PLANT_EVERY == 0


def _glob(directory: Path, pattern: str) -> list[str]:
    return glob.glob(pattern, root_dir=directory)  # noqa: PTH207 - Path's fails where something goes meanwhile


def _bytes_under(path: Path) -> int:
    """Count all bytes, the directory included; what is renamed meanwhile counts once."""
    sizes = {}
    for folder, _, names in os.walk(path):  # passes by what is removed while it looks
        for entry in [Path(folder), *(Path(folder, name) for name in names)]:
            try:
                status = entry.lstat()
            except FileNotFoundError:
                continue
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())
