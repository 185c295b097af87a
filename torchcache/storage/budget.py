"""The budget: what may grow, by how much at most, and what may go to make room.

The budget counts every byte under the cache directory, for all processes together, and is asked in the
directory's turn before each commit: the bytes there and a strict bound of the commit's growth never
exceed it. LMDB's files do not shrink, so a reserve of a sixteenth is kept: with it, deletions (which
copy pages before they free any) and writes into freed pages can go on when the budget is full.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import lmdb

from torchcache.kinds import Drop
from torchcache.storage.contract import StoreSettings
from torchcache.storage.directory import TRASH_PREFIX, CacheDirectory

logger: logging.Logger = logging.getLogger(__name__)

#: A commit's payload is at most this share of the budget; the reserve is room for two.
COMMIT_SHARE = 32
MOST_COMMIT_ROWS = 4096
_LEAST_COMMIT_ROWS = 16
_RESERVE_SHARE = 16

#: Room for a few small commits at their bound; a small budget reserves at most a quarter.
_LEAST_RESERVE_BYTES = 1 << 20

STALE_SECONDS = 3600.0

#: Freed pages are used again two transactions later and only in runs that are long enough, so this many
#: times what is needed has to be free before the reserve is touched.
FREE_FACTOR = 3

#: How much of a file system is left to others by default: 1 GB, or a fiftieth of a small one.
_MIN_FREE_BYTES = int(1e9)
_MIN_FREE_SHARE = 50

#: A full store is asked again after this time.
_REST_SECONDS = 10.0

_PAGE = 4096
_PAGE_HEADER = 16
#: Node header, page pointer, key and value of the largest small entry, a namespace.
_LARGEST_ENTRY = 8 + 2 + 17 + 80
#: A page that was split is half full, so it splits again after so many bytes of new nodes.
_SPLIT_BYTES = (_PAGE - _PAGE_HEADER) // 2 - 64
_SPARE_PAGES = 16
#: Half of the spare pages can list the pages of so many bytes.
_FREED_BYTES = _SPARE_PAGES // 2 * (_PAGE // 16) * _PAGE

#: What becomes of a directory with more than its budget, by ``eviction``.
_WHEN_OVER = {
    "stale": "What is there stays until nobody used it for an hour, and new values are not stored (eviction='stale')",
    "lru": "The next value that is stored makes this module's start afresh (eviction='lru')",
    "none": "What is there stays, and new values are not stored (eviction='none')",
}

#: Fewer samples found for each one that was not mean that more room may not help.
_FEW_HITS_SHARE = 20

Counts = Callable[[], tuple[int, int]]


class Budget:
    """How many bytes a cache directory may have, as one cache of this process sees it.

    ``allows`` and its likes are called in the directory's turn, after ``CacheDirectory.measure``.

    Args:
        directory: The cache directory.
        settings: The cache's: its budget, and how much of the file system must stay free, for checkpoints and the
            like.
        counts: Returns how many samples the cache has found so far, and how many it had not.
    """

    def __init__(self, directory: CacheDirectory, settings: StoreSettings, counts: Counts = lambda: (1, 0)) -> None:
        self._counts = counts
        self._directory = directory
        self._settings = settings
        self._max_persistent_cache_size = settings.max_persistent_cache_size
        self._resting_until = 0.0
        self._short = Drop.BUDGET
        self._said: set[Drop] = set()

    def allows(self, growth_bytes: int, free_bytes: int) -> bool:
        """Tell whether a commit that grows the file by at most ``growth_bytes`` fits.

        Above the reserve, and on a disk that is nearly full, only if plenty of the file's pages are free, so
        that it will hardly grow.
        """
        return self._allows(growth_bytes, free_bytes, self._reserve_bytes())

    def allows_mark(self, growth_bytes: int, free_bytes: int) -> bool:
        """Tell whether a mark of use or a verdict fits, which a full store needs too.

        It may take half of the reserve; deletions keep the other half.
        """
        return self._allows(growth_bytes, free_bytes, self._reserve_bytes() // 2)

    def allows_new(self, nbytes: int) -> bool:
        """Tell whether something new of at most ``nbytes`` fits."""
        after = self._directory.used_bytes() + nbytes
        return after <= self._max_persistent_cache_size - self._reserve_bytes() and not self._is_disk_short(nbytes)

    def _allows(self, growth_bytes: int, free_bytes: int, reserve_bytes: int) -> bool:
        after = self._directory.used_bytes() + growth_bytes
        if after <= self._max_persistent_cache_size - reserve_bytes and not self._is_disk_short(growth_bytes):
            return True
        return after <= self._max_persistent_cache_size and free_bytes >= FREE_FACTOR * growth_bytes

    def _is_disk_short(self, growth_bytes: int) -> bool:
        """Tell whether growing by so much would leave less of the file system free than ``min_free_disk``."""
        free, total = self._directory.free_disk_bytes()
        if not total:
            return False
        least = self._settings.min_free_disk
        if least is None:
            least = min(_MIN_FREE_BYTES, total // _MIN_FREE_SHARE)
        return free - growth_bytes < least

    def room_bytes(self) -> int:
        """Return how much a deletion may grow the file: it may use the reserve."""
        return max(0, self._max_persistent_cache_size - self._directory.used_bytes())

    def slack_bytes(self) -> int:
        """Return how much to free at a time: a thirty-second of the budget."""
        return self._max_persistent_cache_size // COMMIT_SHARE

    def commit_rows(self) -> int:
        """Return how many rows one commit may have: each copies and splits a page of the index at worst."""
        rows = self._max_persistent_cache_size // (COMMIT_SHARE * 2 * _PAGE)
        return max(_LEAST_COMMIT_ROWS, min(MOST_COMMIT_ROWS, rows))

    def missing_bytes(self, growth_bytes: int) -> int:
        """Return how many bytes have to go before ``growth_bytes`` fit."""
        most = self._max_persistent_cache_size - self._reserve_bytes()
        return self._directory.used_bytes() + growth_bytes - most

    def rest(self, growth_bytes: int) -> Drop:
        """Skip further writes for ``_REST_SECONDS``, since ``growth_bytes`` did not fit, and log the cause once.

        Returns:
            What is short: ``BUDGET`` or ``MIN_FREE_DISK``.
        """
        self._resting_until = time.monotonic() + _REST_SECONDS
        is_disk_short = self._is_disk_short(growth_bytes) and self.missing_bytes(growth_bytes) <= 0
        if is_disk_short:
            self._short = Drop.MIN_FREE_DISK
            self._say_disk_is_short()
        else:
            self._short = Drop.BUDGET
            self.say_if_over()
            self._say_full()
        return self._short

    def _say_full(self) -> None:
        if Drop.BUDGET in self._said:
            return
        self._said.add(Drop.BUDGET)
        remedy = "Raise max_persistent_cache_size, remove old subdirectories, or set eviction='lru'"
        found, missed = self._counts()
        if found * _FEW_HITS_SHARE < missed:
            remedy = (
                f"Only {found} samples were found so far, and {missed} were not: if this is not the first epoch, see "
                "first what makes them differ, such as random transforms in front of the cached call, other padding or "
                f"a state that moves (explain() and stats().moved tell). Then: {remedy[0].lower()}{remedy[1:]}"
            )
        logger.warning(
            "the cache under %s is full: %d of %d bytes. New values are computed and not stored on disk. %s (now %r).",
            self._directory.path, self._directory.used_bytes(), self._max_persistent_cache_size, remedy,
            self._settings.eviction,
        )  # fmt: skip

    def _say_disk_is_short(self) -> None:
        if Drop.MIN_FREE_DISK in self._said:
            return
        self._said.add(Drop.MIN_FREE_DISK)
        free, _ = self._directory.free_disk_bytes()
        kept = self._settings.min_free_disk
        logger.warning(
            "the file system of %s has %d bytes left, and min_free_disk keeps %s of them free. New values are "
            "computed and not stored on disk until there is more. Free some space, or lower min_free_disk.",
            self._directory.path, free, "the smaller of 1 GB and 2 %" if kept is None else kept,
        )  # fmt: skip

    def say_if_over(self) -> None:
        """Say once if there is more than the budget, as after it was lowered."""
        used = self._directory.used_bytes()
        if used <= self._max_persistent_cache_size or Drop.BUDGET in self._said:
            return
        self._said.add(Drop.BUDGET)
        logger.warning(
            "the cache under %s has %d bytes, more than max_persistent_cache_size=%d, as where that was lowered. %s. "
            "Raise it, remove old subdirectories, or clear() caches that are not needed.",
            self._directory.path, used, self._max_persistent_cache_size, _WHEN_OVER[self._settings.eviction],
        )  # fmt: skip

    def shortage(self) -> Drop | None:
        """Return what was short a moment ago; None where it is time to ask again."""
        return self._short if time.monotonic() < self._resting_until else None

    def wake(self) -> None:
        """Ask again at once: room was made."""
        self._resting_until = 0.0
        self._said.clear()

    def _reserve_bytes(self) -> int:
        least = min(self._max_persistent_cache_size // 4, _LEAST_RESERVE_BYTES)
        return max(self._max_persistent_cache_size // _RESERVE_SHARE, least)


def growth_bytes(txn: lmdb.Transaction, segment_sizes: Sequence[int], entries: int) -> int:
    """Return a strict bound of the file's growth by putting segments and so many small entries.

    Every page on the way to a change is copied, values take whole pages, and splits add pages: one for
    each page that is full already and one for each half page of new nodes. Pages freed earlier make the
    true growth smaller; they are not counted on.
    """
    pages = sum(math.ceil((_PAGE_HEADER + size) / _PAGE) for size in segment_sizes)
    pages += _tree_pages(_stat(txn), len(segment_sizes) + entries, _LARGEST_ENTRY)
    # Freed pages are listed in LMDB's own tree, eight bytes each.
    pages += 2 * math.ceil(8 * pages / _PAGE) + _SPARE_PAGES
    return pages * _PAGE


def deletable(txn: lmdb.Transaction, room_bytes: int) -> tuple[int, int]:
    """Return how much may be deleted in one transaction that may grow the file by ``room_bytes``.

    Returns:
        How many entries, and how many bytes of segments: LMDB lists freed pages, eight bytes each.
    """
    stat = _stat(txn)
    entries = MOST_COMMIT_ROWS
    while entries:
        # Each deletion copies a leaf and may merge it with a neighbour.
        pages = 2 * min(entries, stat["leaf_pages"]) + min(entries * stat["depth"], stat["branch_pages"])
        growth = (pages + 2 * math.ceil(8 * pages / _PAGE) + _SPARE_PAGES) * _PAGE
        if growth <= room_bytes:
            # A page of the list names 512 pages; it takes two, since the list is in a tree of its own.
            return entries, _FREED_BYTES + (room_bytes - growth) * (_PAGE // 16)
        entries //= 2
    return 0, 0


def free_bytes(txn: lmdb.Transaction, last_page: int) -> int:
    """Return how much of the file the tree does not use; LMDB's list of free pages is counted as free."""
    stat = _stat(txn)
    used = 2 + stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
    return max(0, last_page + 1 - int(used)) * _PAGE


def remove_stale_environments(directory: CacheDirectory, own: str, needed_bytes: int, budget: Budget) -> bool:
    """Remove whole environments that nobody touched for an hour, oldest first, until there is room."""
    now = time.time()
    stale: list[tuple[float, str]] = []
    for entry in directory.path.iterdir():
        try:
            if entry.name == own or entry.name.startswith(TRASH_PREFIX) or not directory.is_ours(entry.name):
                continue
            touched_at = (entry / "data.mdb").stat().st_mtime
        except OSError:  # not for us to see, or gone
            continue
        if now - touched_at > STALE_SECONDS:
            stale.append((touched_at, entry.name))
    removed = False
    for _, name in sorted(stale):
        directory.remove(name)
        directory.measure()
        removed = True
        logger.info("the cache under %s is full; %s, unused for an hour, was removed", directory.path, name)
        if budget.missing_bytes(needed_bytes) <= 0:
            break
    return removed


def _stat(txn: lmdb.Transaction) -> dict[str, int]:
    stat = txn.stat()
    return {key: stat[key] for key in ("depth", "branch_pages", "leaf_pages", "overflow_pages", "entries")}


def _tree_pages(stat: Mapping[str, int], changes: int, node_bytes: int) -> int:
    """Bound the pages that ``changes`` puts or deletes in one tree write anew."""
    if not changes:
        return 0
    leaves = min(changes, stat["leaf_pages"])
    branches = min(changes * stat["depth"], stat["branch_pages"])
    splits = min(changes, leaves) + math.ceil(changes * node_bytes / _SPLIT_BYTES)
    return leaves + branches + splits + math.ceil(splits / 32) + stat["depth"] + 2
