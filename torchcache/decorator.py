"""The doors: a module class, a function, somebody else's module. All end in ``Cache.call``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.utils.data import Dataset

from torchcache import process
from torchcache.cache import Cache
from torchcache.errors import ConfigError
from torchcache.identity import Target
from torchcache.keys.collectives import plain_class
from torchcache.keys.digest import digest_parts
from torchcache.keys.values import UnnamedValueError, encode_argument
from torchcache.options import CacheOptions, OptionArguments
from torchcache.samples import CallSignature
from torchcache.storage import temporary

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UnnamedArgument:
    """A construction argument that is known by its address only: what it was called, and its type."""

    path: str
    type_name: str


#: Functions that return before they have computed anything.
_LATE = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)

_OPTIONS = "__torchcache_options__"
_ARGUMENTS = "_torchcache_arguments"

_caches: dict[int, Cache] = {}  # id of a live module -> its cache
_making = process.ForkLock()  # guards _caches


def torchcache(*target: Any, **options: Unpack[OptionArguments]) -> Callable[[T], T]:
    """Cache what a module class, a function or a module returns, sample by sample.

    Use it as ``@torchcache()`` above an ``nn.Module`` class or a function, or call
    ``torchcache()(module)`` with a module that somebody else wrote. Classes and modules are changed in
    place and returned; of a function a wrapper is returned.

    Args:
        *target: Must be empty; only there to explain the missing parentheses of a bare ``@torchcache``.
        **options: See ``CacheOptions``; each is checked here. A module's attributes named
            ``torchcache_<option>`` win over them.

    Raises:
        ConfigError: If an option is unknown or wrong, or the target cannot be cached.
    """
    if target:
        raise ConfigError("torchcache needs parentheses: write @torchcache() or torchcache()(module)")
    checked = CacheOptions.from_arguments(options)

    def decorate(target: T) -> T:
        if isinstance(target, type):
            return _decorate_class(target, checked)  # type: ignore[return-value]
        if isinstance(target, nn.Module):
            return _decorate_instance(target, checked)  # type: ignore[return-value]
        if isinstance(target, types.FunctionType):
            return _decorate_function(target, checked)  # type: ignore[return-value]
        raise ConfigError(
            f"torchcache() cannot decorate {target!r}: give it an nn.Module class, an nn.Module or a function, and a "
            "dataset to CachedDataset"
        )

    return decorate


def cache_of(target: object) -> Cache:
    """Return the cache of a decorated function or module, an instance of a decorated class, or a ``CachedDataset``.

    Raises:
        ConfigError: If the target is not decorated, or is not enabled.
    """
    cache: Cache | None = None
    if isinstance(target, nn.Module):
        forward = vars(target).get("forward")
        if isinstance(forward, _CachedForward):
            cache = forward.cache(target)
        elif _OPTIONS in dir(type(target)):
            cache = _cache_of_instance(target)
    elif isinstance(target, (types.FunctionType, Dataset)):
        found = getattr(target, "cache_instance", None)
        cache = found if isinstance(found, Cache) else None
    if cache is None:
        raise ConfigError(
            f"{type(target).__qualname__ if not isinstance(target, type) else target.__qualname__} has no cache: "
            "it is not decorated with torchcache(), or not enabled"
            + ("; ask an instance of the class" if isinstance(target, type) else "")
        )
    cache.identify()
    return cache


def _prepare(options: CacheOptions, function: Callable[..., Any], *, is_method: bool) -> None:
    """Check the merged options, and see to it that a temporary directory is gone at the end.

    Here and not at first use: workers may use it although this process never does.
    """
    options.check_combinations()
    if options.unbatched:
        CallSignature(function, is_method=is_method, label="", unbatched=options.unbatched)
    if options.enabled and options.persistent and options.persistent_cache_dir is None:
        temporary.reserve()


# -- classes ----------------------------------------------------------------------------------------------------


def _decorate_class(cls: type, options: CacheOptions) -> type:
    """Replace ``forward``, ``__init__`` and ``__new__`` in place.

    A subclass under the old name would make ``super(MyModule, self)`` recurse for ever and break pickle,
    spawn and scripting.
    """
    if not issubclass(cls, nn.Module):
        raise ConfigError(f"torchcache() cannot decorate the class {cls.__qualname__}: it is no nn.Module")
    if cls.__module__.partition(".")[0] == "torch":
        raise ConfigError(
            f"torchcache() does not change torch's own class {cls.__qualname__}: decorate a subclass of your "
            "own, or one instance with torchcache()(module)"
        )
    if _OPTIONS in vars(cls):
        raise ConfigError(f"{cls.__qualname__} is decorated with torchcache() already; drop one of the two")
    setattr(cls, _OPTIONS, options)
    cls.__new__ = _make_new(cls)  # type: ignore[method-assign]
    cls.__init__ = _make_init(cls)  # type: ignore[method-assign]
    cls.forward = _make_forward(cls)
    if not hasattr(cls, "cache_instance"):
        cls.cache_instance = property(_cache_instance)  # type: ignore[attr-defined]
        # torch.jit.script compiles properties unless told not to.
        cls.__jit_unused_properties__ = [*getattr(cls, "__jit_unused_properties__", ()), "cache_instance"]  # type: ignore[attr-defined]
    return cls


def _make_forward(cls: type) -> Callable[..., Any]:
    own = vars(cls).get("forward")
    inherited = _next(cls, cls).forward

    @functools.wraps(own or inherited)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        function = own.__get__(self) if own is not None else _next(cls, self).forward
        cache = _cache_of_instance(self)
        return function(*args, **kwargs) if cache is None else cache.call(function, args, kwargs)

    forward.__torchcache_original__ = own  # type: ignore[attr-defined] # what the code walk sees
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

    init.__torchcache_original__ = own  # type: ignore[attr-defined]
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
        if isinstance(instance, cls) and _ARGUMENTS not in vars(instance):
            vars(instance)[_ARGUMENTS] = _encode_arguments(kls, args, kwargs)
        return instance

    new.__torchcache_original__ = own.__func__ if own is not None else None  # type: ignore[attr-defined]
    # inspect.signature(cls) asks __new__ first.
    new.__signature__ = inspect.signature(cls.__init__)  # type: ignore[attr-defined,misc]
    new.__name__ = "__new__"
    return new


def _next(cls: type, instance: Any) -> Any:  # noqa: ANN401 - super() is a proxy of no nameable type
    """Return ``super()`` as seen from a method of ``cls``, so that the MRO decides what comes next."""
    return super(cls, instance)


def _encode_arguments(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | UnnamedArgument:
    encoded: dict[str, bytes] = {}
    try:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        named = list(signature.bind(None, *args, **kwargs).arguments.items())[1:]
    except (TypeError, ValueError):
        named = [*((f"args[{i}]", value) for i, value in enumerate(args)), *kwargs.items()]
    else:  # a default given is the default left out; one without a name is part of the code and counts there
        defaults = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
        for name, default in defaults.items():
            with contextlib.suppress(UnnamedValueError):
                encoded[name] = encode_argument(default, name)
    try:
        encoded.update((name, encode_argument(value, name)) for name, value in named)
    except UnnamedValueError as error:
        return UnnamedArgument(error.path, error.type_name)
    return digest_parts(part for name in sorted(encoded) for part in (name.encode(), encoded[name]))


def _check_construction(module: nn.Module) -> None:
    """Check what only a whole instance can tell; called at the end of the outermost constructor."""
    options = _merged_options(module)
    _prepare(options, type(module).forward, is_method=True)
    arguments = vars(module).get(_ARGUMENTS)
    if isinstance(arguments, UnnamedArgument) and options.enabled and not options.persistent_module_hash:
        warnings.warn(
            f"argument {arguments.path!r} of {type(module).__qualname__} is an object of type "
            f"{arguments.type_name} without a stable name, so its cache is good for this process only; give the "
            "type a __repr__ that says its value, pass plain values, or set persistent_module_hash",
            stacklevel=3,
        )


def _merged_options(module: nn.Module) -> CacheOptions:
    options: CacheOptions = getattr(type(module), _OPTIONS)
    return options.with_attributes(module)


def _cache_of_instance(module: nn.Module) -> Cache | None:
    """Return the cache of an instance of a decorated class, made at its first use; None if it has none."""
    enabled = vars(module).get("torchcache_enabled")
    if enabled is None:
        enabled = getattr(type(module), "torchcache_enabled", None)
    if enabled is None:
        enabled = getattr(type(module), _OPTIONS).enabled
    if not enabled or vars(module).get("_is_replica"):  # DataParallel's copies live for one call
        return None
    cache = _caches.get(id(module))
    return cache if cache is not None else _make_cache(module)


def _make_cache(module: nn.Module) -> Cache:
    options = _merged_options(module)
    _prepare(options, type(module).forward, is_method=True)
    arguments = vars(module).get(_ARGUMENTS, b"")
    with _making.raw:
        cache = _caches.get(id(module))
        if cache is None:
            cls: type[nn.Module] = plain_class(type(module))
            target = Target(
                name=cls.__qualname__,
                code=cls,
                function=cls.forward,
                module=weakref.ref(module),
                arguments=None if isinstance(arguments, UnnamedArgument) else arguments,
                is_method=True,
            )
            cache = _caches[id(module)] = Cache(target, lambda: options)
            weakref.finalize(module, _caches.pop, id(module), None).atexit = False
        return cache


def _cache_instance(module: nn.Module) -> Cache:
    cache = _cache_of_instance(module)
    if cache is None:
        raise AttributeError("cache_instance: torchcache is not enabled for this instance")
    cache.identify()
    return cache


# -- instances --------------------------------------------------------------------------------------------------


class _CachedForward:
    """Stands in an instance's ``__dict__["forward"]`` and caches what the module's own forward returns."""

    def __init__(self, module: nn.Module, options: CacheOptions) -> None:
        self._module = weakref.ref(module)
        self._options = options
        self.__torchcache_original__ = vars(module).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        module = self._module()
        assert module is not None
        cache = self.cache(module)
        function = self._function(module)
        return function(*args, **kwargs) if cache is None else cache.call(function, args, kwargs)

    def cache(self, module: nn.Module) -> Cache | None:
        """Return the module's cache, which lies beside this object; None if it is not enabled."""
        if not vars(module).get("torchcache_enabled", self._options.enabled):
            vars(module).pop("cache_instance", None)
            return None
        cache: Cache | None = vars(module).get("cache_instance")
        if cache is None:
            cache = vars(module).setdefault("cache_instance", _InstanceCache(self))
        return cache

    def describe(self) -> Target:
        """Return what is cached; also while the module is still being copied."""
        module = self._module()
        assert module is not None
        cls: type[nn.Module] = plain_class(type(module))
        return Target(
            name=cls.__qualname__,
            code=cls,
            function=self.__torchcache_original__ or cls.forward,
            module=self._module,
            is_method=self.__torchcache_original__ is None,
        )

    def merged_options(self) -> CacheOptions:
        """Return the options with those the module's attributes set."""
        return self._options.with_attributes(self._module())

    def _function(self, module: nn.Module) -> Callable[..., Any]:
        function: Callable[..., Any] = self.__torchcache_original__ or type(module).forward.__get__(module)
        return function

    @property
    def __code__(self) -> types.CodeType:
        """The original forward's code; torch.export asks for it."""
        module = self._module()
        assert module is not None
        code: types.CodeType = inspect.unwrap(self._function(module)).__code__
        return code

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module(), "options": self._options, "original": self.__torchcache_original__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._module = weakref.ref(state["module"])
        self._options = state["options"]
        self.__torchcache_original__ = state["original"]


class _InstanceCache(Cache):
    """A cache that lies in its module's ``__dict__``: a copy of the module gets one of its own."""

    def __init__(self, forward: _CachedForward) -> None:
        super().__init__(forward.describe(), forward.merged_options)
        self._forward = forward

    def __reduce__(self) -> tuple[type[_InstanceCache], tuple[_CachedForward]]:
        return _InstanceCache, (self._forward,)


def _decorate_instance(module: nn.Module, options: CacheOptions) -> nn.Module:
    if isinstance(vars(module).get("forward"), _CachedForward) or hasattr(type(module), _OPTIONS):
        raise ConfigError(
            f"this {type(module).__qualname__} is decorated with torchcache() already; drop one of the two"
        )
    if type(module).__module__.startswith("torch.jit"):
        raise ConfigError(
            f"torchcache() cannot decorate a {type(module).__qualname__}: its code is not Python any more; call it "
            "from a module or function of your own and decorate that"
        )
    _prepare(options.with_attributes(module), module.forward, is_method=False)
    forward = _CachedForward(module, options)
    module.forward = forward
    forward.cache(module)
    return module


# -- functions --------------------------------------------------------------------------------------------------


def _decorate_function(function: types.FunctionType, options: CacheOptions) -> Callable[..., Any]:
    if hasattr(function, "__torchcache_original__"):
        raise ConfigError(f"{function.__qualname__} is decorated with torchcache() already; drop one of the two")
    if any(is_kind(function) for is_kind in _LATE):
        raise ConfigError(
            f"torchcache() cannot decorate {function.__qualname__}: what an async or generator function returns is not "
            "its result yet; decorate the function inside that computes the tensors"
        )
    _prepare(options, function, is_method=False)
    if not options.enabled:
        return function
    cache = Cache(Target(name=function.__qualname__, code=function, function=function), lambda: options)

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> object:
        return cache.call(function, args, kwargs)

    cached.__torchcache_original__ = function  # type: ignore[attr-defined]
    cached.cache_instance = cache  # type: ignore[attr-defined]
    return cached
