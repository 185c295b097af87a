"""What type checkers see of the decorator and of what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar, overload

from torch import nn

from torchcache.cache import Cache

P = ParamSpec("P")
Q = ParamSpec("Q")
R_co = TypeVar("R_co", covariant=True)
Instance = TypeVar("Instance")
Module = TypeVar("Module", bound=nn.Module)


class CachedFunction(Protocol[P, R_co]):
    """What ``torchcache()`` makes of a function or a method, for type checkers: called as before, and with a cache.

    ``model.encode`` is one too, without the parameter ``self``, where ``encode`` is a method in the model's class.
    """

    @property
    def cache_instance(self) -> Cache:
        """The cache; of a method, that of its instance."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Return what the function returns, from the cache where it can."""

    @overload
    def __get__(self, instance: None, owner: type, /) -> CachedFunction[P, R_co]: ...

    @overload
    def __get__(
        self: CachedFunction[Concatenate[Instance, Q], R_co], instance: Instance, owner: type | None = None, /
    ) -> CachedFunction[Q, R_co]: ...

    @overload  # of a static method, whose first parameter is no instance
    def __get__(self, instance: object, owner: type | None = None, /) -> CachedFunction[P, R_co]: ...


class Decorator(Protocol):
    """What ``torchcache(**options)`` returns, for type checkers."""

    # Classes and modules can be called, so the last one would take them, too: checkers take the first that fits.
    @overload
    def __call__(self, target: type[Module], /) -> type[Module]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, target: Module, /) -> Module: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, target: Callable[P, R_co], /) -> CachedFunction[P, R_co]: ...
