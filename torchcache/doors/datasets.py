"""The door for data sets: what they return is cached sample by sample, by index or id."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from torchcache.cache import Cache
from torchcache.call.disabled import is_disabled
from torchcache.doors.samples import CachedSamples, Transform, Version
from torchcache.doors.setup import identified, prepare
from torchcache.doors.warming import WARM_SECONDS, Filling, Warmed, fill
from torchcache.errors import ConfigError, UncacheableError
from torchcache.keys.objects import ObjectState
from torchcache.options import CacheOptions, OptionArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Options that mean something for batches, or for modules, and why they mean nothing here.
_REFUSED = {
    "batch_dim": "a sample of a dataset is one call; drop it",
    "batch_size": "a sample of a dataset is one call; warm() has a batch_size of its own; drop it",
    "progress": "a sample of a dataset is one call; warm() shows a bar; drop it",
    "unbatched": "a sample of a dataset is one call, and all of it counts; drop it",
    "padded": "a sample of a dataset is one call, and has a length of its own; drop it",
    "check_rows": "a sample of a dataset does not depend on a batch; drop it",
    "when_grad": "samples come without gradients; drop it",
    "memory_cache_device": "samples stay in host memory, and a batch of them goes to the device; drop it",
}

#: What ``item_version`` may return.
_VERSIONS = (str, int, bytes, float, type(None))


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
        cache = None
        if self._torchcache_options.enabled:
            cache = self._torchcache_samples.cache
        return identified(cache, "dataset")

    def refresh(self) -> None:
        """Find the fingerprint out afresh at the next use: after the dataset was changed."""
        self._torchcache_samples.refresh()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as the dataset has it
        """Return an attribute of the dataset, such as ``classes``.

        Not a method of it: one that changes the dataset, such as ``set_format``, would leave the samples behind.

        Raises:
            AttributeError: If there is none, or it is a method.
        """
        dataset = vars(self).get("_dataset")
        if name.startswith("_") or dataset is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = getattr(dataset, name)
        if getattr(value, "__self__", None) is dataset and callable(value):
            raise AttributeError(
                f"{name} is a method of the dataset, which may change it; call it as dataset.{name}() of the "
                f"{type(self).__name__}, and then refresh() if it did"
            )
        return value

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - of any kind
        """Set an attribute, unless it is one of the dataset's, which would not see it.

        A derived class may have attributes of its own that are called so.

        Raises:
            AttributeError: If the dataset has it; it names what to do.
        """
        dataset = vars(self).get("_dataset")
        is_own = name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        if not is_own and type(self).__module__ == __name__ and dataset is not None and hasattr(dataset, name):
            raise AttributeError(
                f"{name} is an attribute of the dataset; set it as dataset.{name} of the {type(self).__name__}, and "
                "call refresh()"
            )
        super().__setattr__(name, value)

    def _set_up(
        self, dataset: object, deterministic: Transform | None, augment: Transform | None, options: OptionArguments
    ) -> None:
        self.augment = augment
        self._dataset = dataset
        self._deterministic = deterministic
        self._torchcache_options = _check_options(options)
        self._torchcache_samples = self._make_samples(None)

    def _make_samples(self, travelled: ObjectState | None) -> CachedSamples:
        return CachedSamples(self._dataset, self._deterministic, self._torchcache_options, travelled=travelled)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle keeps: not the cache, which each process has of its own."""
        state = dict(vars(self))
        samples: CachedSamples = state.pop("_torchcache_samples")
        return {**state, "_torchcache_travelled": samples.travelling()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        travelled = state.pop("_torchcache_travelled")
        vars(self).update(state)
        self._torchcache_samples = self._make_samples(travelled)


class CachedDataset(_Cached, Dataset[Any]):
    """A map-style dataset whose samples are cached by index.

    ``CachedDataset(dataset)[i]`` returns what ``dataset[i]`` returned the first time. It takes the dataset's place in a
    ``DataLoader``, a ``Subset``, a ``ConcatDataset`` or below a sampler, with workers of any start method; with
    ``persistent=True`` all of them share what each has computed. A ``DataLoader`` gets a batch by one lookup. Samples
    are made of tensors, NumPy arrays, PIL images, plain values, dates, paths and sets, in containers.

    Attributes of the dataset, such as ``classes``, are passed on. Its methods are not, and its attributes cannot be set
    here, since a change of the dataset would leave its samples behind: ask, change and call ``dataset``, and
    ``refresh``.

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
        self._torchcache_samples.identify()  # a sampler asks in the parent, before workers are forked
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as the dataset has them
        sample = self._sample(self._torchcache_samples.cache, index)
        if self.augment is None:
            return sample
        return self.augment(sample)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Return the samples at some indices by one lookup; a ``DataLoader`` and a ``Subset`` ask for a batch so."""
        if type(self).__getitem__ is not CachedDataset.__getitem__:  # of a derived class, which does more
            return [self[index] for index in indices]
        try:
            keys = [self._key(index) for index in indices]
        except UncacheableError:
            return [self[index] for index in indices]  # of which one says what it is
        samples = self._torchcache_samples
        return samples.get_many(samples.cache, keys, self._fetch, self.augment)

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

        if indices is None:
            indices = range(len(self))
        self._torchcache_samples.identify()  # before workers start
        return fill(
            Filling(self._sample, self._make_cache_to_fill),
            indices,
            self._torchcache_samples.name,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=progress,
        )

    def _make_cache_to_fill(self) -> Cache:
        """Return the cache of this process; in a worker one that keeps nothing in memory and is patient."""
        samples = self._torchcache_samples
        if get_worker_info() is None:
            return samples.cache
        return samples.patient_cache(WARM_SECONDS)

    def _sample(self, cache: Cache, index: Any) -> Any:  # noqa: ANN401 - as __getitem__
        try:
            key = self._key(index)
        except UncacheableError as error:
            return cache.refuse(error, self._fetch, (index,), {}, rows=1)
        return self._torchcache_samples.get(cache, *key, self._fetch)

    def _key(self, index: Any) -> tuple[Any, Version]:  # noqa: ANN401 - as __getitem__
        """Return an index as a plain value, and what else the sample at it depends on.

        Raises:
            UncacheableError: If one of them is not plain.
        """
        if type(index) is not int:
            index = _plain_index(index)
        if self.item_version is None:
            return index, None
        version = self.item_version(index)
        if not isinstance(version, _VERSIONS):
            raise UncacheableError(
                f"item_version({index!r}) returned {version!r}; return a str, int, float, bytes or None",
                argument="item_version",
            )
        return index, version

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
        samples = self._torchcache_samples
        for pair in self._dataset:
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], (str, int, bytes)):
                raise UncacheableError(
                    f"{samples.name} yielded {type(pair).__qualname__} {str(pair)[:80]}; let it yield (id, sample) "
                    "with a str, int or bytes that names the sample",
                    argument="dataset",
                )

            sample = samples.get(samples.cache, pair[0], None, partial(_second, pair))
            if self.augment is not None:
                sample = self.augment(sample)
            yield sample


def _second(pair: tuple[object, object], _: object) -> object:
    return pair[1]


def _check_callables(**given: Callable[..., object] | None) -> None:
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ConfigError(f"{name}={value!r} must be a function or another callable", argument=name)


def _check_options(options: OptionArguments) -> CacheOptions:
    for name in options:
        if name in _REFUSED:
            raise ConfigError(f"{name} has no meaning for a dataset: {_REFUSED[name]}", argument=name)
    checked = replace(CacheOptions.from_arguments(options), batch_dim=None)
    prepare(checked, _second, is_method=False)  # no option names a parameter here
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
