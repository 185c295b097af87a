"""The doors: a module class, a function, a method, somebody else's module. All end in ``Cache.call``."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
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
from torchcache.instances import InstanceCaches, prepare, reserve, say_replica
from torchcache.keys.attributes import adds_attributes_only
from torchcache.keys.code import StandIn
from torchcache.keys.collectives import plain_class
from torchcache.keys.digest import digest_parts
from torchcache.keys.plain import type_name
from torchcache.keys.values import UnnamedValueError, encode_argument
from torchcache.options import CacheOptions, OptionArguments
from torchcache.samples import CallSignature

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

_caches = InstanceCaches()  # of modules, whichever door they came through
_making = process.ForkLock()  # guards the cache of each static method


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
    if isinstance(target, nn.Module) and isinstance(vars(target).get("forward"), _CachedForward):
        cache = vars(target)["forward"].cache(target)
    elif isinstance(target, nn.Module) and hasattr(type(target), _OPTIONS):
        cache = _cache_of_instance(target)
    elif isinstance(target, (nn.Module, types.FunctionType, StandIn, Dataset)):
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
    cls.__new__ = staticmethod(_make_new(cls))  # type: ignore[method-assign] # torch asks an instance for it
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


def _cache_of_instance(module: nn.Module) -> Cache | None:
    """Return the cache of an instance of a decorated class; None if it is not cached."""
    return _caches.of(module, getattr(type(module), _OPTIONS), _make_cache)


def _make_cache(module: nn.Module) -> Cache:
    options = _merged_options(module)
    prepare(options, type(module).forward, is_method=True)
    arguments = vars(module).get(_ARGUMENTS, b"")
    cls: type[nn.Module] = plain_class(type(module))
    target = Target(
        name=cls.__qualname__,
        code=cls,
        function=cls.forward,
        instance=weakref.ref(module),
        arguments=None if isinstance(arguments, UnnamedArgument) else arguments,
        is_method=True,
    )
    return Cache(target, lambda: options)


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
        """Return the module's cache, and let the attribute ``cache_instance`` be it; None if it is not cached."""
        cache = _caches.of(module, self._options, self._make_cache)
        attributes = vars(module)
        if cache is None:
            attributes.pop("cache_instance", None)
        elif attributes.get("cache_instance") is not cache:
            attributes["cache_instance"] = cache
        return cache

    def _make_cache(self, module: nn.Module) -> Cache:  # noqa: ARG002 - as of the other doors
        return _InstanceCache(self)

    def cache_of_copy(self) -> Cache:
        """Return the cache of the module, which is a copy that is still being made."""
        module = self._module()
        assert module is not None
        return _caches.get(module, self._make_cache)

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
    """A cache that its module has as an attribute: a copy of the module gets one of its own."""

    def __init__(self, forward: _CachedForward) -> None:
        super().__init__(forward.describe(), forward.merged_options)
        self._forward = forward

    def __reduce__(self) -> tuple[Callable[..., object], tuple[_CachedForward]]:
        return _CachedForward.cache_of_copy, (self._forward,)


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
    _CopyHooks(module).install()
    forward.cache(module)
    return module


class _CopyHooks:
    """Stands in a module's ``__dict__`` for how it is copied in part.

    What is bound to a module and lies in its ``__dict__`` computes with that module's weights, whoever holds it. So a
    shallow copy, and a copy that ``nn.DataParallel`` makes, are made without it: they compute with their own weights
    and are not cached. A deep copy and a pickle take it along, bound to the copy.
    """

    __torchcache_original__ = None

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def install(self) -> None:
        """Let the module be copied in this way."""
        module = self._module()
        assert module is not None
        vars(module)["__getstate__"] = self.get_state  # the copy protocol asks the instance for it
        vars(module)["_replicate_for_data_parallel"] = self.replicate

    def get_state(self) -> object:
        """Return what the module's own ``__getstate__`` does, without what is bound to it for ``copy.copy``."""
        module = self._module()
        own = getattr(type(module), "__getstate__", None)  # that of object, from Python 3.11 on
        state = vars(module) if own is None else own(module)
        # deepcopy and pickle ask in the same way.
        is_shallow = sys._getframe(1).f_code is copy.copy.__code__  # noqa: SLF001 - the only way to tell
        return self._unbound(state) if is_shallow and isinstance(state, dict) else state

    def replicate(self) -> nn.Module:
        """Return a copy of the module for one call of ``nn.DataParallel``."""
        module = self._module()
        assert module is not None
        say_replica(type(module).__qualname__)
        replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # noqa: SLF001
        replica.__dict__ = self._unbound(vars(replica))
        return replica

    def _unbound(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return attributes of the module without those of ours."""
        module = self._module()
        kept: dict[str, Any] = {}
        for name, value in attributes.items():
            is_method = isinstance(value, _BoundMethod) and value.__self__ is module
            if isinstance(value, _CachedForward):
                if value.__torchcache_original__ is not None:
                    kept[name] = value.__torchcache_original__
            elif is_method and name == value.__name__:
                continue  # the class has it
            elif not isinstance(value, _InstanceCache) and getattr(value, "__self__", None) is not self:
                kept[name] = value
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._module = weakref.ref(state["module"])


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
        self._static: Callable[..., Any] | None = None  # guarded by _making
        self._caches = InstanceCaches()
        # What instances may set by attributes is checked with them.
        if options.unbatched or options.padded:
            CallSignature.of_options(function, options, is_method=False)
        reserve(options)

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
        """Return the cache of an instance; None if it is not cached."""
        return self._caches.of(instance, self._options, self._make_cache)

    def merged_options(self, instance: object) -> CacheOptions:
        """Return the options with those the instance's attributes set, checked together."""
        options = self._options.with_attributes(instance)
        prepare(options, self._function, is_method=True)
        return options

    def _make_cache(self, instance: object) -> Cache:
        cls = type(instance)
        _check_instance(instance, self._function)
        options = self.merged_options(instance)
        target = Target(
            name=f"{cls.__qualname__}.{self._function.__name__}",
            code=self._function,
            function=self._function,
            instance=weakref.ref(instance),
            is_method=True,
            method=type_name(self._function).decode("utf-8", "surrogatepass"),
        )
        return Cache(target, lambda: options)

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
    if isinstance(bound.__self__, nn.Module):  # which its user may assign it to
        _CopyHooks(bound.__self__).install()
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
