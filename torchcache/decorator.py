"""The doors: a module class, a function, a method, somebody else's module. All end in ``Cache.call``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from torch import nn
from torch.utils.data import Dataset

from torchcache import process
from torchcache.cache import Cache
from torchcache.errors import ConfigError
from torchcache.identity import Target
from torchcache.keys.attributes import adds_attributes_only
from torchcache.keys.code import StandIn
from torchcache.keys.collectives import plain_class
from torchcache.keys.digest import digest_parts
from torchcache.keys.plain import type_name
from torchcache.keys.values import UnnamedValueError, encode_argument
from torchcache.options import CacheOptions, OptionArguments
from torchcache.samples import CallSignature
from torchcache.storage import temporary

if TYPE_CHECKING:
    from typing_extensions import Never, Unpack

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


@dataclass(frozen=True, slots=True)
class UnnamedArgument:
    """A construction argument that is known by its address only: what it was called, and its type."""

    path: str
    type_name: str


#: What a class may hold in place of a method, and what to do instead.
_REMEDIES = {
    staticmethod: "write @staticmethod above @torchcache()",
    classmethod: "a class has no weights; decorate a method of its instances, or a function",
    property: "a property takes no batch; decorate a method that takes one",
}

#: Functions that return before they have computed anything.
_LATE = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)

_OPTIONS = "__torchcache_options__"
_ARGUMENTS = "_torchcache_arguments"

_caches: dict[int, Cache] = {}  # id of a live module -> its cache
_making = process.ForkLock()  # guards _caches, and those of each method


def torchcache(*target: Never, **options: Unpack[OptionArguments]) -> Decorator:
    """Cache what a module class, a function or a module returns, sample by sample.

    Use it as ``@torchcache()`` above an ``nn.Module`` class, a function or a method, or call
    ``torchcache()(module)`` or ``torchcache()(module.method)`` with a module that somebody else wrote. Classes and
    modules are changed in place and returned; of functions and methods a wrapper is returned (``CachedFunction``).

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

    def decorate(target: object) -> Any:  # noqa: ANN401 - Decorator says what for what
        if isinstance(target, type):
            return _decorate_class(target, checked)
        if isinstance(target, nn.Module):
            return _decorate_instance(target, checked)
        if isinstance(target, types.FunctionType):
            return _decorate_function(target, checked)
        if isinstance(target, types.MethodType):
            return _decorate_bound_method(target, checked)
        if isinstance(target, StandIn):
            raise ConfigError(f"{_name_of(target)} is decorated with torchcache() already; drop one of the two")
        raise ConfigError(
            f"torchcache() cannot decorate {target!r}: "
            + _REMEDIES.get(
                type(target),
                "give it an nn.Module class, an nn.Module, a function or a method, and a dataset to CachedDataset",
            )
        )

    return decorate


def cache_of(target: object) -> Cache:
    """Return the cache of a decorated function or module, of an instance of a decorated class, or of its method.

    So it does of a ``CachedDataset`` and of what ``lazy()`` made.

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
        else:
            cache = vars(target).get("cache_instance")
    elif isinstance(target, (types.FunctionType, StandIn, Dataset)):
        found = getattr(target, "cache_instance", None)
        cache = found if isinstance(found, Cache) else None
    elif isinstance(target, types.MethodType):
        # Another decorator may be above ours.
        method = inspect.unwrap(target.__func__, stop=lambda function: isinstance(function, _CachedMethod))
        cache = method.cache(target.__self__) if isinstance(method, _CachedMethod) else None
    if cache is None:
        raise ConfigError(
            f"{_name_of(target)} has no cache: it is not decorated with torchcache(), or not enabled"
            + ("; ask an instance of the class" if isinstance(target, (type, _CachedMethod)) else "")
        )
    cache.identify()
    return cache


def _name_of(target: object) -> str:
    if isinstance(target, (type, types.FunctionType, types.MethodType)):
        return target.__qualname__
    return _name_of(target.stands_for()) if isinstance(target, StandIn) else type(target).__qualname__


def prepare(options: CacheOptions, function: Callable[..., Any], *, is_method: bool) -> None:
    """Check the merged options, and see to it that a temporary directory is gone at the end.

    Here and not at first use: workers may use it although this process never does.
    """
    options.check_combinations()
    if options.unbatched or options.padded:
        CallSignature.of_options(function, options, is_method=is_method)
    _reserve(options)


def _reserve(options: CacheOptions) -> None:
    if options.enabled and options.writes and options.persistent and options.persistent_cache_dir is None:
        temporary.reserve()


# -- classes ----------------------------------------------------------------------------------------------------


def _decorate_class(cls: type, options: CacheOptions) -> type:
    """Replace ``forward``, ``__init__`` and ``__new__`` in place.

    A subclass under the old name would make ``super(MyModule, self)`` recurse for ever and break pickle,
    spawn and scripting.
    """
    if not issubclass(cls, nn.Module):
        raise ConfigError(
            f"torchcache() cannot decorate the class {cls.__qualname__}: it is no nn.Module; decorate its methods"
        )
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
    prepare(options, type(module).forward, is_method=True)
    arguments = vars(module).get(_ARGUMENTS)
    if isinstance(arguments, UnnamedArgument) and options.enabled and not options.persistent_module_hash:
        warnings.warn(
            f"argument {arguments.path!r} of {type(module).__qualname__} is an object of type "
            f"{arguments.type_name} without a stable name, so its cache is good for this process only; register the "
            "type with torchcache.register_value(), pass plain values, or set persistent_module_hash",
            stacklevel=3,
        )


def _merged_options(module: nn.Module) -> CacheOptions:
    options: CacheOptions = getattr(type(module), _OPTIONS)
    return options.with_attributes(module)


def _is_enabled(instance: object, options: CacheOptions) -> bool:
    """Tell whether calls of an instance are cached, as its options and attributes are now."""
    own = getattr(instance, "__dict__", {})
    if own.get("_is_replica"):  # DataParallel's copies live for one call
        return False
    enabled: bool | None = own.get("torchcache_enabled")
    if enabled is None:
        enabled = getattr(type(instance), "torchcache_enabled", None)
    return options.enabled if enabled is None else enabled


def _cache_of_instance(module: nn.Module) -> Cache | None:
    """Return the cache of an instance of a decorated class, made at its first use; None if it has none."""
    if not _is_enabled(module, getattr(type(module), _OPTIONS)):
        return None
    cache = _caches.get(id(module))
    return cache if cache is not None else _make_cache(module)


def _make_cache(module: nn.Module) -> Cache:
    options = _merged_options(module)
    prepare(options, type(module).forward, is_method=True)
    arguments = vars(module).get(_ARGUMENTS, b"")
    with _making.raw:
        cache = _caches.get(id(module))
        if cache is None:
            cls: type[nn.Module] = plain_class(type(module))
            target = Target(
                name=cls.__qualname__,
                code=cls,
                function=cls.forward,
                instance=weakref.ref(module),
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
            instance=self._module,
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
    prepare(options.with_attributes(module), module.forward, is_method=False)
    forward = _CachedForward(module, options)
    module.forward = forward
    forward.cache(module)
    return module


# -- functions --------------------------------------------------------------------------------------------------


def _decorate_function(function: types.FunctionType, options: CacheOptions) -> Callable[..., Any]:
    _check_function(function)
    if _class_around(function):
        return _CachedMethod(function, options)
    return _cache_function(function, options)


def _cache_function(function: types.FunctionType, options: CacheOptions) -> Callable[..., Any]:
    prepare(options, function, is_method=False)
    if not options.enabled:
        return function
    cache = Cache(Target(name=function.__qualname__, code=function, function=function), lambda: options)

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> object:
        return cache.call(function, args, kwargs)

    cached.__torchcache_original__ = function  # type: ignore[attr-defined]
    cached.cache_instance = cache  # type: ignore[attr-defined]
    return cached


def _check_function(function: types.FunctionType) -> None:
    if hasattr(function, "__torchcache_original__"):
        raise ConfigError(f"{function.__qualname__} is decorated with torchcache() already; drop one of the two")
    if any(is_kind(function) for is_kind in _LATE):
        raise ConfigError(
            f"torchcache() cannot decorate {function.__qualname__}: what an async or generator function returns is not "
            "its result yet; decorate the function inside that computes the tensors"
        )


def _class_around(function: types.FunctionType) -> str:
    """Return the qualified name of the class in whose body a function was written; empty if it was in none."""
    around = function.__qualname__.rpartition(".")[0]
    return "" if around.endswith("<locals>") else around


# -- methods ----------------------------------------------------------------------------------------------------


class _CachedMethod(StandIn):
    """Stands in a class in place of a method, and caches for each instance what the method returns.

    Called without an instance, as a static method is, it is a cached function.
    """

    # Its own attributes are not in its __dict__: functools.wraps copies that to whatever is put around it.
    __slots__ = ("__dict__", "__weakref__", "_caches", "_function", "_is_method", "_is_private", "_options", "_static")

    def __init__(self, function: types.FunctionType, options: CacheOptions, *, is_private: bool = False) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._options = options
        self._is_private = is_private  # to one instance: no name leads to it
        self._is_method = False  # until it is asked for in a class or an instance, as a static method never is
        # Guarded by _making:
        self._static: Callable[..., Any] | None = None
        self._caches: dict[int, tuple[weakref.ref[Any], Cache]] = {}  # by the id of a live instance
        # What instances may set by attributes is checked with them.
        if options.unbatched or options.padded:
            CallSignature.of_options(function, options, is_method=False)
        _reserve(options)

    def __get__(self, instance: object, owner: type | None = None) -> _CachedMethod | _BoundMethod:
        self._is_method = True
        return self if instance is None else _BoundMethod(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        if args and self._is_of_the_class(args[0]):
            return _BoundMethod(self, args[0])(*args[1:], **kwargs)
        return self._as_function()(*args, **kwargs)

    def __reduce__(self) -> str | tuple[Callable[..., object], tuple[object, ...]]:
        return (_make_private, (self._function, self._options)) if self._is_private else self._function.__qualname__

    @property
    def cache_instance(self) -> Cache:
        """The cache of a static method."""
        if self._is_method:
            raise AttributeError(f"cache_instance: {_name_of(self)} has a cache for each instance; ask an instance")
        cache: Cache = self._as_function().cache_instance  # type: ignore[attr-defined]
        return cache

    def stands_for(self) -> types.FunctionType:
        """Return the user's own function."""
        return self._function

    def cache(self, instance: object) -> Cache | None:
        """Return the cache of an instance, made at its first use; None if it is not enabled."""
        if not _is_enabled(instance, self._options):
            return None
        known = self._caches.get(id(instance))
        return known[1] if known is not None else self._make_cache(instance)

    def merged_options(self, instance: object) -> CacheOptions:
        """Return the options with those the instance's attributes set, checked together."""
        options = self._options.with_attributes(instance)
        prepare(options, self._function, is_method=True)
        return options

    def _make_cache(self, instance: object) -> Cache:
        cls = type(instance)
        _check_instance(instance, self._function)
        options = self.merged_options(instance)
        name = f"{cls.__qualname__}.{self._function.__name__}"
        with _making.raw:
            known = self._caches.get(id(instance))
            if known is None:
                # No weakref.finalize: it would hold the caches, and what a cache saw of the state may lead back to
                # the instance.
                caches, key = self._caches, id(instance)
                reference = weakref.ref(instance, lambda _: caches.pop(key, None))
                target = Target(
                    name=name,
                    code=self._function,
                    function=self._function,
                    instance=reference,
                    is_method=True,
                    method=type_name(self._function).decode("utf-8", "surrogatepass"),
                )
                known = self._caches[key] = reference, Cache(target, lambda: options)
            return known[1]

    def _is_of_the_class(self, value: object) -> bool:
        """Tell whether a first argument is what the method is called on, by the name of the class around it."""
        around = _class_around(self._function), self._function.__module__
        mro = value.__mro__ if isinstance(value, type) else type(value).__mro__
        return any((base.__qualname__, base.__module__) == around for base in mro)

    def _as_function(self) -> Callable[..., Any]:
        with _making.raw:
            if self._static is None:
                self._static = _cache_function(self._function, self._options)
            return self._static


class _BoundMethod(StandIn):
    """A cached method of one instance, which it keeps alive as any bound method does."""

    # torch.compile traces some of this: nothing here may be beyond it.

    def __init__(self, method: _CachedMethod, instance: object) -> None:
        self.__func__ = method
        self.__self__ = instance

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        cache, function = self.__func__.cache(self.__self__), self.stands_for()
        return function(*args, **kwargs) if cache is None else cache.call(function, args, kwargs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _BoundMethod):
            return NotImplemented
        return self.__self__ is other.__self__ and self.__func__ is other.__func__

    def __hash__(self) -> int:
        return hash((id(self.__self__), id(self.__func__)))

    def __repr__(self) -> str:
        return f"<cached {self.stands_for()!r}>"

    # The instance may hold this object; as state, it comes when there is an object to hold.
    def __getstate__(self) -> tuple[_CachedMethod, object]:
        return self.__func__, self.__self__

    def __setstate__(self, state: tuple[_CachedMethod, object]) -> None:
        self.__func__, self.__self__ = state

    @property
    def cache_instance(self) -> Cache:
        """The cache of this method and this instance."""
        cache = self.__func__.cache(self.__self__)
        if cache is None:
            raise AttributeError("cache_instance: torchcache is not enabled for this instance")
        cache.identify()
        return cache

    def stands_for(self) -> Callable[..., object]:
        """Return the user's own method, bound."""
        bound: Callable[..., object] = self.__func__.stands_for().__get__(self.__self__)
        return bound

    # What inspect and help() ask for.
    __wrapped__ = property(stands_for)
    __name__ = property(lambda self: self.__func__.__name__)
    __doc__ = property(lambda self: self.__func__.__doc__)


def _decorate_bound_method(bound: types.MethodType, options: CacheOptions) -> _BoundMethod:
    function = bound.__func__
    if not isinstance(function, types.FunctionType):
        raise ConfigError(f"torchcache() cannot decorate {bound!r}: there is no Python function behind it")
    _check_function(function)
    _check_instance(bound.__self__, function)
    method = _make_private(function, options)
    method.merged_options(bound.__self__)
    return _BoundMethod(method, bound.__self__)


def _make_private(function: types.FunctionType, options: CacheOptions) -> _CachedMethod:
    return _CachedMethod(function, options, is_private=True)


def _check_instance(instance: object, function: types.FunctionType) -> None:
    """Check that the state of what a method is called on can be seen, and that it need not live for its cache."""
    if isinstance(instance, type):
        raise ConfigError(f"torchcache() cannot cache {function.__qualname__}: {_REMEDIES[classmethod]}")
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
