"""The door for module classes: ``forward``, ``__init__`` and ``__new__`` are replaced in place."""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from torchcache import our_names
from torchcache.cache import Cache
from torchcache.doors.construction import UnnamedArgument, name_arguments
from torchcache.doors.setup import identified, merge_options, module_caches
from torchcache.errors import ConfigError
from torchcache.keys.collectives import plain_class
from torchcache.keys.identity import Target
from torchcache.options import CacheOptions


def decorate_class(cls: type, options: CacheOptions) -> type:
    """Let what ``forward`` of a module class returns be cached, for each instance; return the class.

    A subclass under the old name would make ``super(MyModule, self)`` recurse for ever and break pickle,
    spawn and scripting.

    Raises:
        ConfigError: If it is no module class, is torch's own, or is decorated already.
    """
    if not issubclass(cls, nn.Module):
        raise ConfigError(
            f"torchcache() cannot decorate the class {cls.__qualname__}: it is no nn.Module; decorate its methods"
        )
    _check_class(cls)
    setattr(cls, our_names.OPTIONS, options)

    cls.__new__ = staticmethod(_make_new(cls))  # type: ignore[method-assign] # torch asks an instance for it
    cls.__init__ = _make_init(cls)  # type: ignore[method-assign]
    cls.forward = _make_forward(cls)

    if not hasattr(cls, our_names.CACHE):
        setattr(cls, our_names.CACHE, property(_cache_instance))
        # torch.jit.script compiles properties unless told not to.
        others = getattr(cls, "__jit_unused_properties__", ())
        cls.__jit_unused_properties__ = [*others, our_names.CACHE]  # type: ignore[attr-defined]
    return cls


def cache_of_instance(module: nn.Module) -> Cache | None:
    """Return the cache of an instance of a decorated class; None if it is not cached."""
    options = getattr(type(module), our_names.OPTIONS)
    return module_caches.of(module, options, _make_cache)


def _check_class(cls: type[nn.Module]) -> None:
    if cls.__module__.partition(".")[0] == "torch":
        raise ConfigError(
            f"torchcache() does not change torch's own class {cls.__qualname__}: decorate a subclass of your "
            "own, or one instance with torchcache()(module)"
        )
    if our_names.OPTIONS in vars(cls):
        raise ConfigError(f"{cls.__qualname__} is decorated with torchcache() already; drop one of the two")


# -- what is replaced -------------------------------------------------------------------------------------------


def _make_forward(cls: type) -> Callable[..., Any]:
    own = vars(cls).get("forward")
    inherited = _next(cls, cls).forward

    @functools.wraps(own or inherited)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        function = own.__get__(self) if own is not None else _next(cls, self).forward
        options = getattr(type(self), our_names.OPTIONS)
        cache = module_caches.of(self, options, _make_cache)
        if cache is None:
            return function(*args, **kwargs)
        return cache.call(function, args, kwargs)

    setattr(forward, our_names.ORIGINAL, own)  # what the code walk sees
    return forward


def _make_init(cls: type) -> Callable[..., None]:
    own = vars(cls).get("__init__")

    @functools.wraps(own or cls.__init__)  # type: ignore[misc]
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if own is not None:
            own(self, *args, **kwargs)
        else:
            _next(cls, self).__init__(*args, **kwargs)
        if type(self).__init__ is init:  # the outermost constructor is done
            _check_construction(self)

    setattr(init, our_names.ORIGINAL, own)
    return init


def _make_new(cls: type) -> Callable[..., Any]:
    """Make a ``__new__`` that notes the arguments of the outermost construction.

    Only ``__new__`` sees them also for subclasses that are not decorated, however their ``__init__`` came
    to be. What it notes is plain bytes in the instance's ``__dict__``, so copies and pickles keep it.
    """
    own = vars(cls).get("__new__")

    def new(kls: type, *args: Any, **kwargs: Any) -> object:
        following = own.__func__ if own is not None else _next(cls, kls).__new__
        instance = following(kls) if following is object.__new__ else following(kls, *args, **kwargs)
        if isinstance(instance, cls) and our_names.ARGUMENTS not in vars(instance):
            named = name_arguments(kls, args, kwargs)
            vars(instance)[our_names.ARGUMENTS] = named if isinstance(named, UnnamedArgument) else named.digest
            vars(instance)[our_names.ARGUMENT_PARTS] = () if isinstance(named, UnnamedArgument) else named.parts
        return instance

    setattr(new, our_names.ORIGINAL, own.__func__ if own is not None else None)
    # inspect.signature(cls) asks __new__ first.
    new.__signature__ = inspect.signature(cls.__init__)  # type: ignore[attr-defined,misc]
    new.__name__ = "__new__"
    return new


def _next(cls: type, instance: Any) -> Any:  # noqa: ANN401 - super() is a proxy of no nameable type
    """Return ``super()`` as seen from a method of ``cls``, so that the MRO decides what comes next."""
    return super(cls, instance)


# -- one instance -----------------------------------------------------------------------------------------------


def _check_construction(module: nn.Module) -> None:
    """Check what only a whole instance can tell; called at the end of the outermost constructor."""
    options = _merged_options(module)
    arguments = vars(module).get(our_names.ARGUMENTS)
    if isinstance(arguments, UnnamedArgument) and options.enabled and not options.persistent_module_hash:
        warnings.warn(
            f"argument {arguments.path!r} of {type(module).__qualname__} is an object of type "
            f"{arguments.type_name} without a stable name, so its cache is good for this process only; register the "
            "type with torchcache.register_value(), pass plain values, or set persistent_module_hash",
            stacklevel=3,
        )


class _InstanceCache(Cache):
    """The cache of one instance; a pickle of it is that of the instance it comes with."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object]]:
        return _get_cache, (self._instance(),)


def _get_cache(module: nn.Module) -> Cache:
    return module_caches.get(module, _make_cache)


def _make_cache(module: nn.Module) -> Cache:
    options = _merged_options(module)
    arguments = vars(module).get(our_names.ARGUMENTS, b"")
    cls: type[nn.Module] = plain_class(type(module))
    target = Target(
        name=cls.__qualname__,
        code=cls,
        function=cls.forward,
        instance=weakref.ref(module),
        arguments=None if isinstance(arguments, UnnamedArgument) else arguments,
        is_method=True,
        argument_parts=vars(module).get(our_names.ARGUMENT_PARTS, ()),
    )
    return _InstanceCache(target, options)


def _merged_options(module: nn.Module) -> CacheOptions:
    cls = type(module)
    return merge_options(getattr(cls, our_names.OPTIONS), module, cls.forward, is_method=True)


def _cache_instance(module: nn.Module) -> Cache:
    return identified(cache_of_instance(module), "instance")
