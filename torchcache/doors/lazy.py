"""A model that need not exist: built by its factory when the first sample is missing, known by what it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchcache.cache import Cache
from torchcache.doors.factory import Factory, FactoryModel
from torchcache.doors.lazy_identity import LazyIdentity, make_identity
from torchcache.doors.model_notes import ModelNotes
from torchcache.doors.setup import CacheRegistry, identified, merge_options, prepare
from torchcache.options import CacheOptions, OptionArguments
from torchcache.report.log import warn_once
from torchcache.tiers.tiers import Tiers

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


def lazy(factory: Factory, **options: Unpack[OptionArguments]) -> Lazy:
    """Return a module whose real model ``factory`` builds when the first sample is missing.

    With a warm cache and ``mode="require"`` a machine trains on the features of a model that it could not load.

    Samples are known by the code of the factory, by what it refers to, and by a note in the cache of the code and the
    weights of the model that it built before. Files that it loads are not looked at until it is built again: then the
    note is compared, and a model that has become another one is said and starts afresh. To be sure before that, name
    what is loaded in ``version``.

    Args:
        factory: A function, a class or a ``functools.partial`` without further arguments; it returns the model as it
            is to be used: with its weights, frozen, in eval mode.
        **options: As of ``torchcache()``.

    Raises:
        ConfigError: If the factory is none of these, or an option is wrong.
    """
    return Lazy(factory, CacheOptions.from_arguments(options))


class Lazy(nn.Module):
    """A module in place of one that may not be there; ``lazy()`` makes it.

    The real model is no submodule, built or not: ``parameters()`` and ``state_dict()`` of this module, and of one that
    contains it, leave it out, and ``train()`` does not reach it. ``to()`` and its like do. Ask ``model`` for it. Give
    arguments in one way, by position or by keyword: their names are the model's to know. It is copied and pickled as
    its factory. Do not cache what is around it: that would go by the factory alone.
    """

    def __init__(self, factory: Factory, options: CacheOptions) -> None:
        super().__init__()
        self.eval()
        self._factory = factory
        self._options = options
        self._place: torch.Tensor | None = None  # where and as what the model is wanted, once somebody said so
        self._start()

    def _start(self) -> None:
        model = FactoryModel(self._factory, self._place)
        self._torchcache_model = model
        self._torchcache_caches = CacheRegistry()  # its own: a factory may lead back to it
        if self._options.enabled:
            prepare(self._options, model.compute, is_method=False)
            model.describe()  # refuses a factory that cannot be named

    @property
    def cache_instance(self) -> Cache:
        """The cache; an attribute ``torchcache_enabled`` turns it off and on."""
        cache = self._torchcache_caches.of(self, self._options, Lazy._make_cache)
        return identified(cache, "module")

    def _make_cache(self) -> Cache:
        model = self._torchcache_model
        options = merge_options(self._options, self, model.compute, is_method=False)
        return _LazyCache(model, options)

    @property
    def is_built(self) -> bool:
        """Whether the real model is there."""
        return self._torchcache_model.built is not None

    @property
    def model(self) -> nn.Module:
        """The real model; it is built if it is not there."""
        return self._torchcache_model.build()

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the model returns
        """Return what the model returns, from the cache where it can."""
        cache = self._torchcache_caches.of(self, self._options, Lazy._make_cache)
        compute = self._torchcache_model.compute
        if cache is None:
            return compute(*args, **kwargs)
        return cache.call(compute, args, kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return no parameters: those of the real model are kept out of this module."""
        self._say_empty("parameters()")
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as of nn.Module
        """Return no state: that of the real model is kept out of this module."""
        if not args and "destination" not in kwargs:  # not as a part of another module
            self._say_empty("state_dict()")
        return super().state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        state = "built" if self.is_built else "not built"
        return f"{self._torchcache_model.describe().name}, {state}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - as of nn.Module
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        place = self._place
        if place is None:
            place = torch.empty(0, device="cpu", dtype=torch.float32)
        self._place = fn(place)
        self._torchcache_model.apply(fn, self._place, recurse=recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_torchcache_model": None, "_torchcache_caches": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()

    def _say_empty(self, what: str) -> None:
        warn_once(
            ("lazy", what, str(id(self))),
            "%s of a lazy module is empty, before its model is built and after: the model is frozen and no part of it; "
            "ask .model.%s, which builds it",
            what,
            what,
        )


class _LazyCache(Cache):
    """The cache of a lazy module, which also keeps the notes of what its factory built."""

    def __init__(self, model: FactoryModel, options: CacheOptions) -> None:
        super().__init__(model.describe(), options)
        self._model = model

    def _make_identity(self, options: CacheOptions, tiers: Tiers) -> LazyIdentity:
        # The notes are kept beside the results.
        notes = ModelNotes(tiers, self._notices, options)
        factory = make_identity(self._target, options)
        return LazyIdentity(factory, options, self._model, notes)
