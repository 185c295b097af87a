"""The door for data sets: what they return is cached sample by sample, by index or id."""

from __future__ import annotations

import contextlib
import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from torchcache import process
from torchcache.cache import Cache, is_disabled
from torchcache.errors import ConfigError, SampleError, UncacheableError
from torchcache.identity import FixedIdentity, Target, unknown_name
from torchcache.keys.objects import Findings, ObjectState, UnknownNamesError, find_out, look_at_state
from torchcache.log import warn_once
from torchcache.options import CacheOptions, OptionArguments
from torchcache.reasons import RANDOM_CODE
from torchcache.stats import CacheStats
from torchcache.storage import temporary

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")

Version = str | int | bytes | float | None
Transform = Callable[[Any], Any]

#: Options that mean something for batches, or for modules, and why they mean nothing here.
_REFUSED = {
    "batch_dim": "a sample of a dataset is one call; drop it",
    "unbatched": "a sample of a dataset is one call, and all of it counts; drop it",
    "padded": "a sample of a dataset is one call, and has a length of its own; drop it",
    "check_rows": "a sample of a dataset does not depend on a batch; drop it",
    "when_grad": "samples come without gradients; drop it",
    "memory_cache_device": "samples stay in host memory, and a batch of them goes to the device; drop it",
}

_REMEDIES = {
    "random_numbers": "random numbers were drawn while a sample was computed, which caching would freeze, so it is not "
    "stored; give what is random to augment=, which runs after the cache at every access",
    RANDOM_CODE: "the code of a sample may draw random numbers that no seed decides, which caching would "
    "freeze, so it is not stored; give what is random to augment=, which runs after the cache at every access, or set "
    "persistent_module_hash if samples do not depend on it",
}

#: Queue and flush wait so long for the disk while ``warm`` fills a cache.
_WARM_SECONDS = 60.0


class _Cached:
    """What both doors have: a dataset and its cache, which a copy has of its own."""

    augment: Transform | None
    _dataset: Any

    @property
    def dataset(self) -> Any:  # noqa: ANN401 - as it was given
        """The dataset behind the cache."""
        return self._dataset

    @property
    def cache_instance(self) -> Cache:
        """The cache of the samples in this process."""
        if not self._torchcache_options.enabled:
            raise AttributeError("cache_instance: torchcache is not enabled for this dataset")
        self._torchcache_door.identify()
        return self._torchcache_door.cache

    def refresh(self) -> None:
        """Find the fingerprint out afresh at the next use: after the dataset was changed."""
        self._torchcache_door.identity.refresh()

    def _set_up(
        self, dataset: object, deterministic: Transform | None, augment: Transform | None, options: OptionArguments
    ) -> None:
        self._dataset = dataset
        self._deterministic = deterministic
        self.augment = augment
        self._torchcache_options = _check_options(options)
        self._torchcache_door = self._make_door(None)

    def _make_door(self, travelled: ObjectState | None) -> _Door:
        return _Door(self._dataset, self._deterministic, self._torchcache_options, travelled=travelled)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle keeps: not the cache, which each process has of its own."""
        state = {key: value for key, value in vars(self).items() if key != "_torchcache_door"}
        return {**state, "_torchcache_travelled": self._torchcache_door.travelling()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        travelled = state.pop("_torchcache_travelled")
        vars(self).update(state)
        self._torchcache_door = self._make_door(travelled)


class CachedDataset(_Cached, Dataset[Any]):
    """A map-style dataset whose samples are cached by index.

    ``CachedDataset(dataset)[i]`` returns what ``dataset[i]`` returned the first time. It takes the dataset's place in a
    ``DataLoader``, a ``Subset``, a ``ConcatDataset`` or below a sampler, with workers of any start method; with
    ``persistent=True`` all of them share what each has computed. Samples are made of tensors, NumPy arrays, PIL images
    and plain values, in containers.

    The key of a sample is its index (an int, or a str or bytes that the dataset takes) and the fingerprint of the
    dataset: the code of its class and of what it holds, such as transforms, and its state by value (arguments, lists of
    files, arrays, inner datasets). The fingerprint is found out *once*, when the dataset is first used (``len`` counts)
    or sent to a worker, and not followed: call ``refresh`` after you changed the dataset. A worker that is
    spawned gets the state's part of it with the dataset and does not hash again; its code it looks at itself. A
    copy, or a pickle that is read elsewhere, finds it out afresh. A dataset that holds something without a visible
    value, such as an open file, is not cached, which is counted and logged once; leave it out in a ``__getstate__``
    and open it at first use, name it in ``ignore``, or set ``persistent_module_hash``.

    A sample whose computation draws random numbers that shape it is not stored, as caching would freeze it; that is
    counted in ``stats().bypasses`` and logged once. The global generators (``torch``, ``numpy``, ``random``) and those
    that the dataset holds are compared before and after, and the code is searched for entropy and for generators
    without a seed, such as ``uuid.uuid4()`` or ``default_rng()``. Give what is random to ``augment``. A sample that
    would not come back as it is, such as a masked array, is not stored either.

    ``cache_instance``, or ``cache_of``, is the cache. Its ``stats()`` are those of this process: what workers did is
    not in them, and each worker has its own ``max_memory_cache_size``.

    Args:
        dataset: The dataset; it stays as it is, behind the attribute ``dataset``.
        augment: Applied to each sample after the cache, at every access: what is random belongs here.
        deterministic: Applied to each sample before it is cached. Its code and state count.
        item_version: Returns for an index what else the sample depends on, such as the time its file was changed; asked
            at every access. Another value is another sample.
        **options: As of ``torchcache()``, without those that are about batches and modules.

    Raises:
        ConfigError: If the dataset is iterable, or an option is unknown, wrong or meaningless here.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 - whatever has __getitem__
        *,
        augment: Transform | None = None,
        deterministic: Transform | None = None,
        item_version: Callable[[Any], Version] | None = None,
        **options: Unpack[OptionArguments],
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(type(dataset), "__getitem__"):
            raise ConfigError(
                f"dataset={dataset!r} has no samples by index; let it yield (id, sample) and give it to "
                "CachedIterableDataset",
                argument="dataset",
            )
        _check_callables(augment=augment, deterministic=deterministic, item_version=item_version)
        self.item_version = item_version
        self._set_up(dataset, deterministic, augment, options)

    def __len__(self) -> int:
        self._torchcache_door.identify()  # a sampler asks in the parent, before workers are forked
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as the dataset has them
        sample = self._sample(self._torchcache_door.cache, index)
        return sample if self.augment is None else self.augment(sample)

    def warm(
        self,
        *,
        num_workers: int = 0,
        progress: bool = True,
        batch_size: int = 32,
        indices: Sequence[Any] | None = None,
    ) -> Warmed:
        """Compute and store every sample that is not there yet.

        What is counted as computed is on disk, if ``persistent``, when this returns. After an interruption, call it
        again to go on. Samples do not travel to this process, and workers keep none in memory.

        Args:
            num_workers: So many workers compute; needs ``persistent=True``.
            progress: Show a bar, if tqdm is installed (``pip install 'torchcache[progress]'``).
            batch_size: After so many samples a worker waits until they are on disk.
            indices: What to compute; ``range(len(self))`` if None.

        Returns:
            How many samples were there, were computed, and could not be stored; none while caching is turned off.

        Raises:
            ConfigError: If it is not ``enabled``, or there are workers and ``persistent`` is False.
            SampleError: If the dataset raised; ``index`` says where. Samples before it are kept.
        """
        options = self._torchcache_options
        if not options.enabled:
            raise ConfigError("enabled=False leaves nothing to warm; drop it", argument="enabled")
        if num_workers and not options.persistent:
            raise ConfigError(
                f"num_workers={num_workers} needs persistent=True: workers keep what they compute in memory of their "
                "own, which ends with them; set persistent=True, or num_workers=0",
                argument="num_workers",
            )
        if is_disabled():
            return Warmed()
        wanted = range(len(self)) if indices is None else indices
        loader = DataLoader(
            _Warming(self),
            batch_size=batch_size,
            sampler=wanted,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the global one is the user's
        )
        self._torchcache_door.identify()
        total = Warmed()
        with _bar(len(wanted), self._torchcache_door.name, is_wanted=progress) as advance:
            for outcome, failure in loader:
                total += outcome
                advance(outcome.found + outcome.computed + outcome.not_stored)
                if failure is not None:
                    index, error, trace = failure
                    raise SampleError(
                        f"the sample at index {index!r} of {self._torchcache_door.name} raised {error}\n\n{trace}",
                        index=index,
                    )
        return total

    def _sample(self, cache: Cache, index: Any) -> Any:  # noqa: ANN401 - as __getitem__
        try:
            index = index if type(index) is int else _plain_index(index)
        except UncacheableError as error:
            return cache.refuse(error, self._fetch, (index,), {}, rows=1)
        version: Any = None
        if self.item_version is not None:
            version = self.item_version(index)
            if not isinstance(version, (str, int, bytes, float, type(None))):
                refusal = UncacheableError(
                    f"item_version({index!r}) returned {version!r}; return a str, int, float, bytes or None",
                    argument="item_version",
                )
                return cache.refuse(refusal, self._fetch, (index,), {}, rows=1)
        return self._torchcache_door.sample(cache, index, version, self._fetch)

    def _fetch(self, index: object) -> object:
        return self._dataset[index]


class CachedIterableDataset(_Cached, IterableDataset[Any]):
    """An iterable dataset whose samples are cached by the ids that it yields with them.

    The dataset yields ``(id, sample)``, with a str, int or bytes that names the sample, and has done its own work by
    then: what is cached is what ``deterministic`` makes of the sample, such as decoding it. Iterating yields
    ``augment(deterministic(sample))``. Each worker sees what the dataset gives it there: sharding is the dataset's
    matter.

    Everything else is as of ``CachedDataset``; the fingerprint is of the dataset and of ``deterministic``.

    Args:
        dataset: The dataset; it stays as it is, behind the attribute ``dataset``.
        deterministic: What is cached, as a function of the sample. Its code and state count.
        augment: Applied to each sample after the cache, at every access: what is random belongs here.
        **options: As of ``torchcache()``, without those that are about batches and modules.

    Raises:
        ConfigError: If the dataset cannot be iterated over, or an option is unknown, wrong or meaningless here.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 - whatever has __iter__
        *,
        deterministic: Transform,
        augment: Transform | None = None,
        **options: Unpack[OptionArguments],
    ) -> None:
        if not hasattr(type(dataset), "__iter__"):
            raise ConfigError(
                f"dataset={dataset!r} cannot be iterated over; give a map-style dataset to CachedDataset",
                argument="dataset",
            )
        _check_callables(augment=augment, deterministic=deterministic)
        self._set_up(dataset, deterministic, augment, options)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        door = self._torchcache_door
        for pair in self._dataset:
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], (str, int, bytes)):
                raise UncacheableError(
                    f"{door.name} yielded {type(pair).__qualname__} {str(pair)[:80]}; let it yield (id, sample) with a "
                    "str, int or bytes that names the sample",
                    argument="dataset",
                )
            sample = door.sample(door.cache, pair[0], None, partial(_second, pair))
            yield sample if self.augment is None else self.augment(sample)


@dataclass(frozen=True, slots=True)
class Warmed:
    """What ``CachedDataset.warm`` came to, in samples.

    Attributes:
        found: Were there before.
        computed: Were computed and stored.
        not_stored: Were computed and could not be stored: they draw random numbers, or disk or budget are full.
    """

    found: int = 0
    computed: int = 0
    not_stored: int = 0

    def __add__(self, other: Warmed) -> Warmed:
        return Warmed(self.found + other.found, self.computed + other.computed, self.not_stored + other.not_stored)


class _Door:
    """What both doors share: a cache, and an identity that is found out once.

    Args:
        dataset: Somebody else's.
        deterministic: What is done to a sample before it is cached.
        options: Of the cache.
        travelled: What the process that started this one found out.
    """

    def __init__(
        self,
        dataset: object,
        deterministic: Transform | None,
        options: CacheOptions,
        *,
        travelled: ObjectState | None,
    ) -> None:
        self.name = type(dataset).__qualname__
        self._held = {"dataset": dataset, "deterministic": deterministic}
        self._deterministic = deterministic
        self._options = options
        self._state: ObjectState | None = None
        self._given = travelled
        self.identity = FixedIdentity(self.name, self._find_out, lambda: options)
        self.cache = self.make_cache(options)

    def make_cache(self, options: CacheOptions) -> Cache:
        """Return a cache of these samples with options that do not shape what is stored."""
        function = _Computing(_nothing, None).compute
        target = Target(name=self.name, code=type(self._held["dataset"]), function=function, remedies=_REMEDIES)
        return Cache(target, lambda: options, self.identity)

    def identify(self) -> None:
        """Find out the fingerprint now, if that was not done."""
        if self._options.enabled:
            self.cache.identify()

    def sample(self, cache: Cache, index: object, version: Version, fetch: Callable[[Any], object]) -> Any:  # noqa: ANN401
        """Return the sample that ``fetch(index)`` leads to, from the cache where it can."""
        computing = _Computing(fetch, self._deterministic)
        if not self._options.enabled:
            return computing.compute(index)
        return cache.call(computing.compute, (index, version), {})

    def travelling(self) -> ObjectState | None:
        """Return what a process that is being started need not find out itself; None for any other pickle."""
        if not self._options.enabled or not process.is_starting_a_child():
            return None
        self.identify()
        state = self._state
        return state if state is not None and state.can_travel() else None

    def _find_out(self) -> Findings:
        target = type(self._held["dataset"])
        try:
            self._state = self._given or look_at_state(self._held, target, self._options.ignore)
        except UnknownNamesError as error:
            raise ConfigError(unknown_name(error.name, error.there, self.name), argument="ignore") from None
        self._given = None
        # What yields the samples of an iterable dataset runs at every epoch: it is not cached.
        computes = None if hasattr(target, "__getitem__") else self._deterministic
        return find_out(self._state, target, computes)


class _Computing:
    """One sample that may have to be computed."""

    __slots__ = ("_deterministic", "_fetch")

    def __init__(self, fetch: Callable[[Any], object], deterministic: Transform | None) -> None:
        self._fetch = fetch
        self._deterministic = deterministic

    def compute(self, index: object, version: Version = None) -> object:  # noqa: ARG002 - a version is part of the name
        sample = self._fetch(index)
        return sample if self._deterministic is None else self._deterministic(sample)


def _second(pair: tuple[object, object], _: object) -> object:
    return pair[1]


def _nothing(index: object) -> object:
    raise NotImplementedError(index)  # only the signature of what is computed with it counts


def _check_callables(**given: Callable[..., object] | None) -> None:
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ConfigError(f"{name}={value!r} must be a function or another callable", argument=name)


def _check_options(options: OptionArguments) -> CacheOptions:
    for name in options:
        if name in _REFUSED:
            raise ConfigError(f"{name} has no meaning for a dataset: {_REFUSED[name]}", argument=name)
    checked = replace(CacheOptions.from_arguments(options), batch_dim=None)
    checked.check_combinations()
    if checked.enabled and checked.persistent:
        temporary.reserve()
    return checked


def _plain_index(index: Any) -> object:  # noqa: ANN401 - whatever a sampler gives
    """Return an index as a plain value: an int of NumPy or torch is an int."""
    if isinstance(index, (str, bytes)):
        return index
    try:
        return int(operator.index(index))
    except TypeError:
        raise UncacheableError(
            f"index {index!r} is no int, str or bytes; ask for one sample at a time, or ask the attribute dataset",
            argument="index",
        ) from None


# -- filling a cache ------------------------------------------------------------------------------------------------


class _Warming(Dataset[Any]):
    """Computes samples where it is asked for them, and returns what became of each batch only."""

    def __init__(self, cached: CachedDataset) -> None:
        self._cached = cached
        self._cache: Cache | None = None

    def __getitems__(self, indices: list[Any]) -> tuple[Warmed, tuple[Any, str, str] | None]:
        cached = self._cached
        cache = self._cache = self._cache or self._make_cache()
        before, failure = cache.stats(), None
        for index in indices:
            try:
                cached._sample(cache, index)  # noqa: SLF001 - a part of it
            except Exception as error:  # noqa: BLE001 - whatever a dataset raises; told to the parent
                failure = index, repr(error), traceback.format_exc()
                break
        cache.flush(_WARM_SECONDS)
        return _difference(before, cache.stats()), failure

    def __getitem__(self, index: Any) -> object:  # noqa: ANN401 - as of Dataset
        return self.__getitems__([index])

    def _make_cache(self) -> Cache:
        """Return the cache to fill; one that keeps nothing in memory and is patient in a worker."""
        door = self._cached._torchcache_door  # noqa: SLF001 - as above
        if get_worker_info() is None:
            return door.cache
        return door.make_cache(
            replace(
                self._cached._torchcache_options,  # noqa: SLF001 - as above
                max_memory_cache_size=0,
                queue_timeout_seconds=_WARM_SECONDS,
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_cached": self._cached, "_cache": None}


def _difference(before: CacheStats, after: CacheStats) -> Warmed:
    dropped = sum(after.dropped_rows.values()) - sum(before.dropped_rows.values())
    lost = dropped + after.queued_rows  # what the flush left is not on disk
    bypassed = after.bypassed_rows - before.bypassed_rows
    return Warmed(
        found=after.hits - before.hits,
        computed=after.misses - before.misses - lost,
        not_stored=lost + bypassed,
    )


def _as_it_is(batch: T) -> T:
    return batch


@contextlib.contextmanager
def _bar(total: int, name: str, *, is_wanted: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar while the body runs; yields what advances it."""
    if is_wanted:
        try:
            from tqdm import tqdm  # noqa: PLC0415 - an extra
        except ImportError:
            warn_once(
                ("progress",),
                "there is no progress bar without tqdm: pip install 'torchcache[progress]', or pass progress=False",
            )
        else:
            with tqdm(total=total, desc=f"warming {name}", unit="sample") as bar:
                yield bar.update
            return
    yield _as_it_is
