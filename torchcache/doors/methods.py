"""The door for methods: in a class, where each instance has a cache, or of one object."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from torchcache import process
from torchcache.cache import Cache
from torchcache.doors.copies import LEFT_OUT, BoundToModule, CopyHooks, is_pickled_by_value
from torchcache.doors.functions import check_function, decorate_function
from torchcache.doors.setup import CacheRegistry, check_parameters, identified, merge_options, reserve
from torchcache.errors import ConfigError
from torchcache.keys.attributes import adds_attributes_only
from torchcache.keys.identity import Target
from torchcache.keys.ours import StandIn
from torchcache.keys.plain import type_name
from torchcache.options import CacheOptions

#: What to do instead of caching a class method.
NO_CLASS_METHODS = "a class has no weights; decorate a method of its instances, or a function"

_making = process.ForkLock()  # guards the cache of each static method


def decorate_method(function: types.FunctionType, options: CacheOptions) -> CachedMethod:
    """Return what stands in a class in place of a method, or of a static method.

    Raises:
        ConfigError: If it is decorated already, returns before it has computed, or the options do not fit it.
    """
    check_function(function)
    return CachedMethod(function, options)


def decorate_bound_method(bound: types.MethodType, options: CacheOptions) -> BoundMethod:
    """Return a method of one object, cached; the object's class stays as it was.

    Raises:
        ConfigError: If it is decorated already, is no Python function, or the options or the object do not fit.
    """
    function, instance = bound.__func__, bound.__self__
    if not isinstance(function, types.FunctionType):
        raise ConfigError(f"torchcache() cannot decorate {bound!r}: there is no Python function behind it")
    check_function(function)
    _check_instance(instance, function)

    method = CachedMethod(function, options, is_private=True)
    method.merged_options(instance)
    if isinstance(instance, nn.Module):  # which its user may assign it to
        CopyHooks(instance).install()
    return BoundMethod(method, instance)


def is_written_in_a_class(function: types.FunctionType) -> bool:
    """Tell whether a function was written in the body of a class."""
    return bool(_class_around(function))


class CachedMethod(StandIn):
    """Stands in a class in place of a method, and caches for each instance what the method returns.

    Called without an instance, as a static method is, it is a cached function.
    """

    # Its own attributes are not in its __dict__: functools.wraps copies that to whatever is put around it.
    __slots__ = ("__dict__", "__weakref__", "_caches", "_function", "_is_method", "_is_private", "_options", "_static")

    def __init__(self, function: types.FunctionType, options: CacheOptions, *, is_private: bool = False) -> None:
        self._set_up(function, options, is_private)

        # Combinations of options are checked with those that instances may set by attributes.
        check_parameters(options, function, is_method=False)
        reserve(options)

    def _set_up(self, function: types.FunctionType, options: CacheOptions, is_private: bool) -> None:  # noqa: FBT001 - see __setstate__
        functools.update_wrapper(self, function)
        self._function = function
        self._options = options
        self._is_private = is_private  # to one instance: no name leads to it
        self._is_method = False  # until it is asked for in a class or an instance, as a static method never is
        self._static: Callable[..., Any] | None = None  # guarded by _making
        self._caches = CacheRegistry()

    def __get__(self, instance: object, owner: type | None = None) -> CachedMethod | BoundMethod:
        self._is_method = True
        if instance is None:
            return self
        return BoundMethod(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        if args and self._is_of_the_class(args[0]):
            return BoundMethod(self, args[0])(*args[1:], **kwargs)
        return self._as_function()(*args, **kwargs)

    def __reduce__(self) -> str | tuple[object, ...]:
        if self._is_private or is_pickled_by_value(self, self._function):
            # As state, the function comes when there is an object that it may refer to.
            return CachedMethod.__new__, (CachedMethod,), (self._function, self._options, self._is_private)
        return self._function.__qualname__

    def __setstate__(self, state: tuple[types.FunctionType, CacheOptions, bool]) -> None:
        self._set_up(*state)

    @property
    def cache_instance(self) -> Cache:
        """The cache of a static method."""
        if self._is_method:
            name = self._function.__qualname__
            raise AttributeError(f"cache_instance: {name} has a cache for each instance; ask an instance")
        cache: Cache = self._as_function().cache_instance  # type: ignore[attr-defined]
        return cache

    def stands_for(self) -> types.FunctionType:
        """Return the user's own function."""
        return self._function

    def cache(self, instance: object) -> Cache | None:
        """Return the cache of an instance; None if it is not cached."""
        return self._caches.of(instance, self._options, self._make_cache)

    def cache_of_copy(self, instance: object) -> Cache:
        """Return the cache of an instance, which is a copy that may still be being made."""
        return self._caches.get(instance, self._make_cache)

    def merged_options(self, instance: object) -> CacheOptions:
        """Return the options in force for an instance, checked."""
        return merge_options(self._options, instance, self._function, is_method=True)

    def _make_cache(self, instance: object) -> Cache:
        function = self._function
        _check_instance(instance, function)
        options = self.merged_options(instance)
        target = Target(
            name=f"{type(instance).__qualname__}.{function.__name__}",
            code=function,
            function=function,
            instance=weakref.ref(instance),
            is_method=True,
            method=type_name(function).decode("utf-8", "surrogatepass"),
        )
        return _MethodCache(self, target, options)

    def _is_of_the_class(self, value: object) -> bool:
        """Tell whether a first argument is what the method is called on, by the name of the class around it."""
        around = _class_around(self._function), self._function.__module__
        cls = value if isinstance(value, type) else type(value)
        return any((base.__qualname__, base.__module__) == around for base in cls.__mro__)

    def _as_function(self) -> Callable[..., Any]:
        with _making.raw:
            if self._static is None:
                self._static = decorate_function(self._function, self._options)
            return self._static


class _MethodCache(Cache):
    """The cache of a method and an instance; a pickle of it is that of the two it comes with."""

    def __init__(self, method: CachedMethod, target: Target, options: CacheOptions) -> None:
        super().__init__(target, options)
        self._method = method

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return CachedMethod.cache_of_copy, (self._method, self._instance())


class BoundMethod(StandIn, BoundToModule):
    """A cached method of one instance, which it keeps alive as any bound method does."""

    # torch.compile traces some of this: nothing here may be beyond it.

    def __init__(self, method: CachedMethod, instance: object) -> None:
        self.__func__: CachedMethod = method
        self.__self__: object = instance

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        cache = self.__func__.cache(self.__self__)
        function = self.__func__.stands_for().__get__(self.__self__)
        if cache is None:
            return function(*args, **kwargs)
        return cache.call(function, args, kwargs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoundMethod):
            return NotImplemented
        return self.__self__ is other.__self__ and self.__func__ is other.__func__

    def __hash__(self) -> int:
        return hash((id(self.__self__), id(self.__func__)))

    def __repr__(self) -> str:
        return f"<cached {self.stands_for()!r}>"

    # The instance may hold this object; as state, it comes when there is an object to hold.
    def __getstate__(self) -> tuple[CachedMethod, object]:
        return self.__func__, self.__self__

    def __setstate__(self, state: tuple[CachedMethod, object]) -> None:
        self.__func__, self.__self__ = state

    @property
    def cache_instance(self) -> Cache:
        """The cache of this method and this instance."""
        return identified(self.__func__.cache(self.__self__), "instance")

    def stands_for(self) -> Callable[..., object]:
        """Return the user's own method, bound."""
        bound: Callable[..., object] = self.__func__.stands_for().__get__(self.__self__)
        return bound

    def in_shallow_copy(self, module: nn.Module, name: str) -> object:
        if self.__self__ is module and name == self.__name__:
            return LEFT_OUT  # the copy's class has it
        return self

    # What inspect and help() ask for.
    __wrapped__: property = property(stands_for)
    __name__: property = property(lambda self: self.__func__.__name__)
    __doc__ = property(lambda self: self.__func__.__doc__)


def _class_around(function: types.FunctionType) -> str:
    """Return the qualified name of the class in whose body a function was written; empty if it was in none."""
    around = function.__qualname__.rpartition(".")[0]
    return "" if around.endswith("<locals>") else around


def _check_instance(instance: object, function: types.FunctionType) -> None:
    """Check that the state of what a method is called on can be seen, and that it need not live for its cache."""
    if isinstance(instance, type):
        raise ConfigError(f"torchcache() cannot cache {function.__qualname__}: {NO_CLASS_METHODS}")
    cls = type(instance)
    if not isinstance(instance, nn.Module) and not adds_attributes_only(cls):
        raise ConfigError(
            f"torchcache() cannot cache {function.__qualname__}: {cls.__qualname__} derives from a built-in class, "
            "whose contents are no attributes and would not be seen to change; keep such an object in an attribute"
        )
    if not cls.__weakrefoffset__:
        raise ConfigError(
            f"torchcache() cannot cache {function.__qualname__}: instances of {cls.__qualname__} cannot be referenced "
            "weakly; add '__weakref__' to its __slots__"
        )
