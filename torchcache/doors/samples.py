"""The samples of one data set: their cache, and an identity that is found out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torchcache import starters
from torchcache.cache import Cache
from torchcache.errors import ConfigError
from torchcache.inputs.cached_call import CachedCall
from torchcache.keys.fixed_identity import FixedIdentity
from torchcache.keys.identity import Target, unknown_name
from torchcache.keys.objects import Findings, ObjectState, UnknownNamesError, find_out, look_at_state
from torchcache.keys.registry import names_its_code
from torchcache.options import CacheOptions
from torchcache.report.go_around import NOTHING
from torchcache.report.reasons import RANDOM_CODE, Reason
from torchcache.tiers.tiers import Tiers

Version = str | int | bytes | float | None
Transform = Callable[[Any], Any]
Fetch = Callable[[Any], object]

#: What to do about a reason to go around the cache, where it is another thing than for a module.
_REMEDIES = {
    Reason.RANDOM_NUMBERS: "random numbers were drawn while a sample was computed, or state of the dataset was changed "
    "on which the sample depends, which caching would freeze, so it is not stored; give what is random to augment=, "
    "which runs after the cache at every access",
    RANDOM_CODE: "the code of a sample may draw random numbers that no seed decides, which caching would "
    "freeze, so it is not stored; give what is random to augment=, which runs after the cache at every access, or set "
    "persistent_module_hash if samples do not depend on it",
}


class CachedSamples:
    """What map-style and iterable data sets share: a cache of samples, and what identifies them.

    Args:
        dataset: Somebody else's.
        deterministic: What is done to a sample before it is cached.
        options: Of the cache.
        travelled: What the process that started this one found out.

    Attributes:
        name: What to call the dataset in the log.
        cache: The cache of the samples in this process.
    """

    def __init__(
        self,
        dataset: object,
        deterministic: Transform | None,
        options: CacheOptions,
        *,
        travelled: ObjectState | None,
    ) -> None:
        self.name: str = type(dataset).__qualname__
        self._held = {"dataset": dataset, "deterministic": deterministic}
        self._deterministic = deterministic
        self._options = options
        self._state: ObjectState | None = None
        self._travelled = travelled
        self._identity = FixedIdentity(self.name, self._find_out, options)
        self.cache: Cache = self._make_cache(options)

    def get(self, cache: Cache, index: object, version: Version, fetch: Fetch) -> Any:  # noqa: ANN401 - as the dataset has them
        """Return the sample that ``fetch(index)`` leads to, from ``cache`` where it can."""
        compute = _Computing(fetch, self._deterministic).compute
        if not self._options.enabled:
            return compute(index, version)
        key = (index, version)
        (found,) = cache.recall(compute, [key])
        return _answer(cache, compute, key, found)

    def get_many(
        self, cache: Cache, keys: Sequence[tuple[object, Version]], fetch: Fetch, then: Transform | None
    ) -> list[Any]:
        """Return the samples of indices, each with its version: found by one lookup, or computed one by one.

        Args:
            cache: Where to look.
            keys: The indices, each with its version.
            fetch: As of ``get``.
            then: What is done to each sample before the next one is computed, so that what both draw follows each other
                as one by one.
        """
        compute = _Computing(fetch, self._deterministic).compute
        is_cached = self._options.enabled
        found = cache.recall(compute, keys) if is_cached else [NOTHING] * len(keys)
        samples: list[Any] = []
        for key, answer in zip(keys, found, strict=True):
            sample = _answer(cache, compute, key, answer) if is_cached else compute(*key)
            samples.append(sample if then is None else then(sample))
        return samples

    def identify(self) -> None:
        """Find out the fingerprint now, if that was not done."""
        if self._options.enabled:
            self.cache.identify()

    def refresh(self) -> None:
        """Find out the fingerprint again at the next use."""
        self._identity.refresh()

    def patient_cache(self, timeout_seconds: float) -> Cache:
        """Return another cache of these samples, which keeps nothing in memory and waits for the disk."""
        return self._make_cache(replace(self._options, max_memory_cache_size=0, queue_timeout_seconds=timeout_seconds))

    def travelling(self) -> ObjectState | None:
        """Return what a process that is being started need not find out itself; None for any other pickle."""
        if not self._options.enabled or not starters.is_starting_a_child():
            return None
        self.identify()
        state = self._state
        if state is None or not state.can_travel():
            return None
        return state

    def _make_cache(self, options: CacheOptions) -> Cache:
        signature = _Computing(_nothing, None).compute
        target = Target(name=self.name, code=type(self._held["dataset"]), function=signature, remedies=_REMEDIES)
        return _SamplesCache(target, options, self._identity)

    def _find_out(self) -> Findings:
        kind = type(self._held["dataset"])
        target = object if names_its_code(kind) else kind
        try:
            self._state = self._travelled or look_at_state(self._held, target, self._options.ignore)
        except UnknownNamesError as error:
            raise ConfigError(unknown_name(error.name, error.there, self.name), argument="ignore") from None
        self._travelled = None

        # What yields the samples of an iterable dataset runs at every epoch: it is not cached.
        computes = self._deterministic
        if hasattr(kind, "__getitem__"):
            computes = None
        return find_out(self._state, target, computes, self._held.values())


class _SamplesCache(Cache):
    """A cache of samples; all of one data set have the same identity, which is found out once."""

    def __init__(self, target: Target, options: CacheOptions, identity: FixedIdentity) -> None:
        super().__init__(target, options)
        self._identity = identity

    def _make_identity(self, options: CacheOptions, tiers: Tiers) -> FixedIdentity:  # noqa: ARG002 - as of Cache
        return self._identity


class _Computing:
    """One sample that may have to be computed."""

    __slots__ = ("_deterministic", "_fetch")

    def __init__(self, fetch: Fetch, deterministic: Transform | None) -> None:
        self._fetch = fetch
        self._deterministic = deterministic

    def compute(self, index: object, version: Version = None) -> object:  # noqa: ARG002 - a version is part of the name
        sample = self._fetch(index)
        if self._deterministic is None:
            return sample
        return self._deterministic(sample)

    # Is in the key of each sample: what is on disk is found by it.
    compute.__qualname__ = "_Computing.compute"


def _answer(cache: Cache, compute: Callable[..., object], key: tuple[object, Version], found: object) -> object:
    """Return a sample by what ``Cache.recall`` said of it."""
    if found is NOTHING:
        return cache.call(compute, key, {})
    return cache.compute(found) if type(found) is CachedCall else found


def _nothing(index: object) -> object:
    raise NotImplementedError(index)  # only the signature of what is computed with it counts
