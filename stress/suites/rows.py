"""Rows by the hundred thousand, many next to each other: no hit ever has the value of another row.

Invariant: whatever batch a row comes in, from whatever tier its value comes, it is the value that the module
returns without a cache, bit for bit. The value is a function of all bytes of the row: two sums of its 32-bit
words, each times a random odd number, in 64 bits. A row that differs in one bit has another value.

Each kind has 200,000 rows, made in parts of 10,000. A part comes once in batches of random size that hold new rows,
rows of earlier batches and repeats, in random order. The last parts go through a store with a memory tier that
holds next to none of them.

Before that, functions whose rows depend on their batch are called with batches of 2 to 2,048 rows, of which later ones
hold rows of earlier ones: each result is the function's own. Of functions whose rows are their own none is suspected.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stress.batch_functions import DEPENDENT, OWN, Function, make_own
from stress.interpreters import prepare
from stress.values import ViolationError
from stress.verdict import Run, Tally
from torchcache import Cache, cache_of, torchcache

ROWS = 200_000

_PART_ROWS = 10_000
_STORED_SHARE = 0.2  # of the parts
_SMALL_MEMORY_BYTES = 4000  # some dozens of values
_MOST_NEW_ROWS = 700
_FLUSH_CHANCE = 0.3
_MOST_VIOLATIONS = 20

#: For so many rows of a kind there is one case of a function; such cases take at most this share of the time.
_ROWS_PER_FUNCTION = 50
_FUNCTIONS_SHARE = 0.5
_SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 64, 100, 256, 500, 1024, 2048)


@dataclass(slots=True)
class RowTally(Tally):
    """What a run did; hits are expected of every row that came before.

    Attributes:
        rows: Different places of rows, by kind; some rows of quantised kinds are equal.
        lookups: Rows looked up, by kind.
        memory_hits: Values that came from memory, by kind.
        queue_hits: Values that came from the write queue, by kind.
        store_hits: Values that came from the disk, by kind.
        wrong: Values that were not right, by kind.
        functions: Cases of functions, by name.
    """

    rows: dict[str, int] = field(default_factory=dict)
    lookups: dict[str, int] = field(default_factory=dict)
    memory_hits: dict[str, int] = field(default_factory=dict)
    queue_hits: dict[str, int] = field(default_factory=dict)
    store_hits: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)

    def is_proof(self) -> bool:
        counts = self.rows, self.memory_hits, self.store_hits
        are_rows = all(count.get(kind) for kind in KINDS for count in counts)
        return are_rows and all(self.functions.get(name) for name in (*DEPENDENT, *OWN))


TALLY = RowTally


class Sums(nn.Module):
    """The value of a row; exact, so that it does not depend on the batch."""

    weights: torch.Tensor

    def __init__(self, row_bytes: int) -> None:
        super().__init__()
        numbers = np.random.default_rng(row_bytes).integers(0, 1 << 63, (2, row_bytes // 4), dtype=np.int64) | 1
        self.register_buffer("weights", torch.from_numpy(numbers))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        words = rows.flatten(1).contiguous().view(torch.int32).long()
        return torch.stack([(words * self.weights[0]).sum(1), (words * self.weights[1]).sum(1)], 1)


def run(asked: Run[RowTally]) -> None:
    """Go through the kinds one after the other, each for its share of the time."""
    prepare(asked.plant)
    start = time.monotonic()
    deadline = start + asked.seconds
    _try_functions(asked, start + _FUNCTIONS_SHARE * asked.seconds)
    for i, (kind, make) in enumerate(KINDS.items()):
        share = (deadline - time.monotonic()) / (len(KINDS) - i)
        _go_through(asked, kind, make, time.monotonic() + share)


def _try_functions(asked: Run[RowTally], deadline: float) -> None:
    """Call functions of both kinds, each in its turn, until there were enough cases or the time is over."""
    names = [*DEPENDENT, *OWN]
    for number in range(max(len(names), (asked.cases or ROWS) // _ROWS_PER_FUNCTION)):
        if time.monotonic() > deadline or len(asked.violations()) >= _MOST_VIOLATIONS:
            return
        name = names[number % len(names)]
        rng = np.random.default_rng([asked.seed, number])
        try:
            _try_function(asked, name, rng)
        except ViolationError as error:
            asked.note(ViolationError(error.kind, f"{name!r}, case {number}: {error}"))
        _add(asked.tally.functions, name, 1)


def _try_function(asked: Run[RowTally], name: str, rng: np.random.Generator) -> None:
    """Compute two batches, then batches of rows of both.

    Raises:
        ViolationError: If rows that depend on their batch went unnoticed, or others were suspected.
    """
    n, width = int(rng.choice(_SIZES)), int(rng.choice([8, 16, 32]))
    depends = name in DEPENDENT
    plain: Function
    if depends:
        plain, dtype = DEPENDENT[name], torch.float32
    else:
        plain, dtype = make_own(name, width, n)
    first, second = (torch.from_numpy(rng.standard_normal((n, width), dtype=np.float32)).to(dtype) for _ in range(2))
    mixed = torch.cat([first, second])[torch.from_numpy(rng.permutation(2 * n))]

    @torchcache()
    def cached(x: torch.Tensor) -> torch.Tensor:
        return plain(x)

    with contextlib.closing(cache_of(cached)) as cache:
        for x in (first, second, mixed[:n], mixed, first[: n // 2]):
            value, right = cached(x), plain(x)
            if depends and (value.shape != right.shape or not torch.equal(value, right)):
                raise ViolationError("wrong", f"a batch of {len(x)} rows, the first one had {n} of {width} numbers")
        stats = cache.stats()
    if depends and (stats.hits or not stats.bypasses):
        raise ViolationError("unnoticed", f"{stats.hits} hits; the first batch had {n} rows of {width} numbers")
    if not depends and stats.bypasses:
        raise ViolationError("alarm", f"{stats.bypasses}; the first batch had {n} rows of {width} numbers")
    if not depends:
        expected = 3 * n + n // 2
        asked.tally.expected += expected
        asked.tally.hits += min(expected, stats.hits)


def _go_through(asked: Run[RowTally], kind: str, make: _Maker, deadline: float) -> None:
    """Look up all rows of a kind: first parts from memory, then parts from a store."""
    wanted = asked.cases or ROWS
    parts = [min(_PART_ROWS, wanted - start) for start in range(0, wanted, _PART_ROWS)]
    n_stored = max(1, round(_STORED_SHARE * len(parts)))
    if len(parts) == 1:
        parts = [parts[0] - parts[0] // 2, parts[0] // 2]
    half = (time.monotonic() + deadline) / 2  # a store is slower
    rng = np.random.default_rng([asked.seed, list(KINDS).index(kind)])
    row_bytes = make(rng, 1)[0].nbytes
    in_memory = torchcache()(Sums(row_bytes))
    stored = torchcache(
        persistent=True, persistent_cache_dir=_directory(asked, kind), max_memory_cache_size=_SMALL_MEMORY_BYTES,
        queue_timeout_seconds=60.0, flush_timeout_seconds=60.0,
    )(Sums(row_bytes))  # fmt: skip
    plain = Sums(row_bytes)
    with contextlib.closing(cache_of(in_memory)), contextlib.closing(cache_of(stored)):
        for module, chosen, until in ((in_memory, parts[:-n_stored], half), (stored, parts[-n_stored:], deadline)):
            for n in chosen:
                if len(asked.violations()) >= _MOST_VIOLATIONS:
                    return
                rows = make(rng, n)
                for batch, n_new in _batches(rng, n):
                    _look_up(asked, kind, module, plain, rows, batch, n_new)
                    if rng.random() < _FLUSH_CHANCE:  # else all is answered by the queue
                        cache_of(module).flush()
                cache_of(module).flush()
                _look_up(asked, kind, module, plain, rows, rng.integers(0, n, min(n, _MOST_NEW_ROWS)), 0)
                _add(asked.tally.rows, kind, n)
                if time.monotonic() > until:
                    break
            _count(asked.tally, kind, cache_of(module))


def _directory(asked: Run[RowTally], kind: str) -> Path:
    return asked.directory / kind.replace(" ", "-")


def _batches(rng: np.random.Generator, n: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the places of the rows of each batch, and how many are new: as many came before, and some come twice."""
    order = rng.permutation(n)
    start = 0
    while start < n:
        stop = min(n, start + int(rng.integers(1, _MOST_NEW_ROWS)))
        new = order[start:stop]
        before = rng.choice(order[:start], len(new)) if start else new[:0]
        batch = np.concatenate([new, before, rng.choice(new, 1 + len(new) // 10)])
        yield rng.permutation(batch), len(new)
        start = stop


def _look_up(
    asked: Run[RowTally], kind: str, module: Sums, plain: Sums, rows: torch.Tensor, batch: np.ndarray, n_new: int
) -> None:
    """Look up a batch and compare all of it; equal rows of different places make more hits than expected."""
    tally, cache = asked.tally, cache_of(module)
    chosen = rows[torch.from_numpy(batch)]
    before = cache.stats().misses
    cached, right = module(chosen), plain(chosen)
    computed = cache.stats().misses - before
    expected = len(batch) - n_new
    tally.expected += expected
    tally.hits += min(expected, len(batch) - computed)
    if computed > n_new:
        asked.note(ViolationError("missed", f"{computed} rows of {kind!r} were computed, and {n_new} are new"))
    _add(tally.lookups, kind, len(batch))
    is_wrong = (cached != right).any(1)
    n_wrong = int(is_wrong.sum())
    _add(tally.wrong, kind, n_wrong)
    if n_wrong:
        place = int(batch[int(is_wrong.nonzero()[0])])
        asked.note(ViolationError("wrong", f"{n_wrong} rows of {kind!r} in one batch, such as row {place} of its part"))


def _count(tally: RowTally, kind: str, cache: Cache) -> None:
    """Take over what a cache counted.

    Raises:
        ViolationError: If it went around the cache, had a fault, or computed a row again.
    """
    stats = cache.stats()
    _add(tally.memory_hits, kind, stats.memory_hits)
    _add(tally.queue_hits, kind, stats.queue_hits)
    _add(tally.store_hits, kind, stats.store_hits)
    if stats.bypasses or stats.faults or stats.dropped_rows:
        raise ViolationError("trouble", f"{kind}: {stats}")


def _add(counts: dict[str, int], kind: str, more: int) -> None:
    counts[kind] = counts.get(kind, 0) + more


# -- the rows -----------------------------------------------------------------------------------------------------

_Maker = Callable[[np.random.Generator, int], torch.Tensor]


def _floats(width: int) -> _Maker:
    def make(rng: np.random.Generator, n: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((n, width), dtype=np.float32))

    return make


def _images(rng: np.random.Generator, n: int) -> torch.Tensor:
    """Make images of 8 grey levels that are mostly alike: a few patterns, moved and with a few spots."""
    patterns = np.kron(rng.integers(0, 8, (16, 3, 8, 8), dtype=np.uint8) * 32, np.ones((1, 1, 4, 4), np.uint8))
    images = patterns[rng.integers(0, 16, n)]
    for _ in range(2):
        places = tuple(rng.integers(0, size, n) for size in images.shape[1:])
        images[(np.arange(n), *places)] = rng.integers(0, 8, n) * 32
    return torch.from_numpy(images)


def _float_images(rng: np.random.Generator, n: int) -> torch.Tensor:
    return _images(rng, n).float() / 255


def _near_duplicates(rng: np.random.Generator, n: int) -> torch.Tensor:
    """Make rows that differ from another one in one element: by one unit in the last place, 0.001 or one bit."""
    rows = np.repeat(rng.standard_normal((-(-n // 100), 64), dtype=np.float32), 100, 0)[:n]
    places = np.arange(n), rng.integers(0, 64, n)
    old = rows[places]
    bit = np.int32(1) << rng.integers(0, 31, n, dtype=np.int32)
    changed = np.stack(
        [np.nextafter(old, np.float32(9)), old + np.float32(1e-3), (old.view(np.int32) ^ bit).view(np.float32)]
    )
    rows[places] = changed[rng.integers(0, 3, n), np.arange(n)]
    return torch.from_numpy(rows)


KINDS: dict[str, _Maker] = {
    "width 16": _floats(16),
    "width 64": _floats(64),
    "width 768": _floats(768),
    "images": _images,
    "float images": _float_images,
    "near duplicates": _near_duplicates,
}
