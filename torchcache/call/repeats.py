"""Whether any sample of a cache is asked for twice; if none is, nothing can ever be found, whatever is kept."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence

import torch

from torchcache.inputs.batch import Batch
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.contract import FollowsState
from torchcache.keys.digest import digest_bytes
from torchcache.keys.moves import show_moves
from torchcache.options import CacheOptions
from torchcache.process import ForkLock
from torchcache.report.notices import Notices

#: After how many samples, and calls, it is logged that none came twice.
_SAMPLES_UNTIL_SAID = 512
_CALLS_UNTIL_SAID = 4

#: So many samples that came again, with another padding or in another state, are enough to say so.
_AGAIN_UNTIL_SAID = 32

#: So many that were found show that there is nothing to say, or as many as came with another padding.
_FOUND_UNTIL_DONE = 64

#: At most this many samples are remembered, and shapes of samples.
_MOST_REMEMBERED = 8192
_MOST_SHAPES = 8

#: Shorter ones may be equal by chance.
_LEAST_IDS = 4

#: What counts a sample as asked for twice.
_ASKED_TWICE = ("memory_hits", "queue_hits", "store_hits", "duplicates", "shared_rows")


class Repeats:
    """Notices a cache of which no sample is asked for twice, and logs once what it sees of them.

    It looks only at calls of which something is computed, until enough was found or the line was logged. Safe from
    any thread.

    Args:
        options: The options in force.
        identity: Knows what of the state moved.
        notices: Knows what was found, and logs.
    """

    def __init__(self, options: CacheOptions, identity: FollowsState, notices: Notices) -> None:
        self._identity = identity
        self._notices = notices
        self._asks_for_padding = not options.padded
        self._lock = ForkLock()
        # Guarded by _lock:
        self.is_done: bool = not options.looks_up
        self._calls = 0
        self._samples = 0
        self._found = 0
        self._next_look = _SAMPLES_UNTIL_SAID
        self._shapes: set[tuple[int, ...]] = set()
        self._asked: dict[bytes, bytes] = {}  # digests of samples, and the namespace in which each was asked for
        self._in_another_state = 0
        self._widths: dict[bytes, int] = {}  # digests of samples without their padding, and how wide each came
        self._repadded = 0
        self._padded: dict[str, str] = {}  # what is padded, and its mask

    def note(self, call: CachedCall, missing: Sequence[int]) -> None:
        """Note a call of which the samples at some positions were not found."""
        batch = call.batch
        if not batch.is_divisible or call.keys is not None:
            return
        counted = self._notices.counters.values()
        with self._lock.raw:
            if self.is_done:
                return
            self._found = sum(amount for name in _ASKED_TWICE if isinstance(amount := counted.get(name), int))
            if self._found > max(_FOUND_UNTIL_DONE, self._repadded):
                self._end()
                return
            self._calls += 1
            self._samples += batch.n
            for _, tensor in batch.named_tensors():
                if len(self._shapes) < _MOST_SHAPES:
                    self._shapes.add(tuple(tensor.shape[1:]))
            if self._came_again(call, missing):
                self._end()
                return
            if self._asks_for_padding:
                self._note_ids(batch, missing)
        line = self._line()  # without the lock: it asks the state, and datasets of anybody's for their length
        if line is None:
            return
        with self._lock.raw:
            self._end()
        self._notices.say("repeats", line)

    def _end(self) -> None:
        self.is_done = True
        self._asked.clear()
        self._widths.clear()

    def _came_again(self, call: CachedCall, missing: Sequence[int]) -> bool:
        """Count samples that came before in another state; tell whether one came before in this, and was not kept."""
        for digest in call.digests_at(missing):
            namespace = self._asked.get(digest)
            if namespace == call.namespace:
                return True
            if namespace is not None:
                self._in_another_state += 1
        if len(self._asked) < _MOST_REMEMBERED:
            self._asked.update(dict.fromkeys(call.digests, call.namespace))
        return False

    def _line(self) -> str | None:
        """Return what to log, if it is time."""
        if self._in_another_state >= _AGAIN_UNTIL_SAID and not self._found:
            moved = show_moves(self._identity.moves())
            return (
                f"nothing was found of {self._samples} samples: at least {self._in_another_state} of them came before, "
                f"and the state was another one then: {moved}. What of it shapes no result can be left out with "
                "ignore=(...); what is trained belongs outside of the cached part"
            )
        if self._repadded >= _AGAIN_UNTIL_SAID:
            remedy = f"set padded={self._padded!r}" if self._padded else "pass their mask too, and name both in padded"
            return (
                f"{self._found} of {self._samples} samples were found: at least {self._repadded} others came before "
                f"with the same ids in another padding, and without padded the padding is part of the key; {remedy}"
            )
        if self._found or self._samples < self._next_look or self._calls < _CALLS_UNTIL_SAID:
            return None

        epoch = _samples_in_loaders()
        if epoch is None:
            self.is_done = True  # nobody knows how many there will be
            return None
        if epoch >= self._samples:
            self._next_look = epoch + 1
            return None
        shapes = "of several shapes"
        if len(self._shapes) == 1:
            shapes = f"all of shape {next(iter(self._shapes))}"
        when = " More than an epoch's:"
        if not epoch:
            when = " In a first epoch that is as it should be; if this is a later one,"
        return (
            f"{self._samples} samples were computed and none was asked for twice ({shapes}, each with other bytes)."
            f"{when} something random comes before the cached call, such as a random crop, noise or masking, and "
            "makes each sample a new one. Cache what comes before that, or make it the same in each epoch"
        )

    def _note_ids(self, batch: Batch, missing: Sequence[int]) -> None:
        """Count samples whose ids came before with another padding, and were not found for that."""
        found = _ids_and_mask(batch)
        if found is None or len(self._widths) > _MOST_REMEMBERED:
            return
        self._padded, ids, mask = found
        width = ids.shape[1]
        for row in _without_padding(ids, mask, missing):
            if self._widths.setdefault(row, width) != width:
                self._repadded += 1


def _ids_and_mask(batch: Batch) -> tuple[dict[str, str], torch.Tensor, torch.Tensor | None] | None:
    """Find ids of tokens, and a mask of their shape.

    Returns:
        What ``padded`` would be, the ids, and their mask if there is one; None if there are no ids.
    """
    named = {name: tensor for name, tensor in batch.named_tensors() if _are_integers(tensor)}
    masks = {name for name, tensor in named.items() if _is_mask(tensor)}
    for name, ids in named.items():
        if name in masks:
            continue
        alike = [other for other, tensor in named.items() if tensor.shape == ids.shape]
        # token_type_ids look like a mask too: what is called one comes first.
        of_alike = sorted(masks.intersection(alike), key=lambda other: "mask" not in other)
        if not of_alike:
            return {}, ids, None
        mask = of_alike[0]
        return {other: mask for other in alike if other != mask}, ids, named[mask]
    return None


def _are_integers(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point() and not tensor.is_complex()


def _is_mask(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def _without_padding(ids: torch.Tensor, mask: torch.Tensor | None, positions: Sequence[int]) -> Iterator[bytes]:
    """Yield a digest of each of some samples without its padding."""
    rows = ids.detach().cpu().to(torch.int64)
    real = None if mask is None else mask.detach().cpu().bool()
    for number in positions:
        row = rows[number]
        if real is not None:
            kept = row[real[number]]
        else:
            others = (row != row[-1]).nonzero()
            last = int(others[-1]) + 1 if len(others) else 0
            is_padded = len(row) - last > 1 or int(row[-1]) == 0
            kept = row[:last] if is_padded else row
        if len(kept) >= _LEAST_IDS:
            yield digest_bytes(kept.numpy().tobytes())


def _samples_in_loaders() -> int | None:
    """Return how many samples the data loaders of this process have together; None if one does not say.

    With that it shows that an epoch is over. It goes through all objects, once or twice in the life of a cache.
    """
    loaded = sys.modules.get("torch.utils.data.dataloader")
    if loaded is None:
        return 0
    iterators = getattr(loaded, "_BaseDataLoaderIter", loaded.DataLoader)  # of a loader that is held by nobody
    datasets: dict[int, object] = {}
    for value in gc.get_objects():
        kind = type(value)
        if issubclass(kind, loaded.DataLoader):
            datasets[id(value.dataset)] = value.dataset
        elif issubclass(kind, iterators):
            dataset = vars(value).get("_dataset")
            datasets[id(dataset)] = dataset
    try:
        return sum(map(len, datasets.values()))  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - a foreign __len__ may raise anything, and a stream has none
        return None
