"""A model that need not exist: built by its factory when the first sample is missing, known by what it was before."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from torchcache.cache import Cache
from torchcache.errors import ConfigError, StoreError
from torchcache.identity import Identity, Look, Target
from torchcache.instances import is_cached, prepare
from torchcache.keys.digest import DIGEST_BYTES, digest_parts
from torchcache.keys.mode import current_mode
from torchcache.keys.values import UnnamedValueError, encode_argument
from torchcache.layout import Layout, Leaf, Rows
from torchcache.log import warn_once
from torchcache.options import CacheOptions, OptionArguments
from torchcache.process import ForkLock
from torchcache.storage.lmdb import LmdbStore

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Factory = Callable[[], nn.Module]

#: What is noted of a model: 16 bytes that name its code, weights and state.
_NOTE = Layout((Leaf("uint8", "uint8", (DIGEST_BYTES,)),))


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
        self._torchcache_holder = _Holder(self)
        self._torchcache_cache = self._make_cache() if self._options.enabled else None

    @property
    def cache_instance(self) -> Cache:
        """The cache; an attribute ``torchcache_enabled`` turns it off and on."""
        cache = self._cache()
        if cache is None:
            raise AttributeError("cache_instance: torchcache is not enabled for this module")
        return cache

    def _cache(self) -> Cache | None:
        if not is_cached(self, self._options):
            return None
        if self._torchcache_cache is None:
            self._torchcache_cache = self._make_cache()
        return self._torchcache_cache

    def _make_cache(self) -> Cache:
        return _LazyCache(_describe(self._factory), self._options, self._torchcache_holder)

    @property
    def is_built(self) -> bool:
        """Whether the real model is there."""
        return self._torchcache_holder.model is not None

    @property
    def model(self) -> nn.Module:
        """The real model; it is built if it is not there."""
        return self._torchcache_holder.build()

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the model returns
        """Return what the model returns, from the cache where it can."""
        cache = self._cache()
        if cache is None:
            return self.model(*args, **kwargs)
        return cache.call(self._torchcache_holder.compute, args, kwargs)

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
        return f"{_describe(self._factory).name}, {'built' if self.is_built else 'not built'}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - as of nn.Module
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place = fn(torch.empty(0, device="cpu", dtype=torch.float32) if self._place is None else self._place)
        if self._torchcache_holder.model is not None:
            self._torchcache_holder.model._apply(fn, recurse)  # noqa: SLF001 - what to() and its like are made of
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_torchcache_holder": None, "_torchcache_cache": None}

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


class _Holder:
    """The real model of one lazy module, if there is one; safe from any thread."""

    def __init__(self, owner: Lazy) -> None:
        self.owner = weakref.ref(owner)
        self._lock = ForkLock()
        self.model: nn.Module | None = None  # guarded by _lock while it is made

    def build(self) -> nn.Module:
        """Return the model, built by the first who asks."""
        with self._lock.raw:
            if self.model is None:
                owner = self.owner()
                assert owner is not None
                model = owner._factory()  # noqa: SLF001 - they are one
                if not isinstance(model, nn.Module):
                    raise ConfigError(
                        f"the factory of a lazy module returned {type(model).__qualname__}, and must return an "
                        "nn.Module",
                        argument="factory",
                    )
                place = owner._place  # noqa: SLF001
                if place is not None:
                    model.to(place.device if place.dtype is torch.float32 else place)
                self.model = model
            return self.model

    def place(self) -> str:
        """Return what shapes the model beside its factory: the dtype that it is wanted as."""
        owner = self.owner()
        place = None if owner is None else owner._place  # noqa: SLF001
        return str(torch.float32 if place is None else place.dtype)

    def compute(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the model returns
        """Return what the model returns."""
        return self.build()(*args, **kwargs)


def _describe(factory: object) -> Target:
    """Return the factory as what is cached.

    Raises:
        ConfigError: If it is nothing whose code can be named.
    """
    arguments = b""
    code = factory
    while isinstance(code, functools.partial):
        try:
            arguments = digest_parts([arguments, encode_argument((code.args, code.keywords), "factory")])
        except UnnamedValueError as error:
            raise ConfigError(
                f"{error.path} of the factory of a lazy module is a {error.type_name} without a stable name; give "
                "plain values",
                argument="factory",
            ) from error
        code = code.func
    if not isinstance(code, (type, types.FunctionType)):
        raise ConfigError(
            f"lazy() cannot name {factory!r}; give a function, a class or a functools.partial that builds the model: "
            "lazy(lambda: load(...))",
            argument="factory",
        )
    return Target(name=f"lazy {code.__qualname__}", code=code, function=_Holder.compute, arguments=arguments)


class _LazyIdentity(Identity):
    """What identifies a model that may not be there: its factory, and what is noted of the model.

    The note is made right after the model is built, before anybody can have changed it.
    """

    def __init__(self, target: Target, cache: _LazyCache, holder: _Holder) -> None:
        super().__init__(target, lambda: cache.options)
        self._cache = weakref.ref(cache)
        self._holder = holder
        self._built: tuple[Identity, object] | None = None  # the model's identity, and its marks as it was built
        self._joined: tuple[Look, object, Look] | None = None
        self._first: tuple[str, bytes] | None = None  # the factory's module hash, and what was seen of it then
        self._has_checked_ignored = True  # a name may be one of the factory's, or of the model's that is not there yet

    def look(self) -> Look:
        factory = super().look()
        cache = self._cache()
        assert cache is not None
        if factory.reason not in (None, "random_numbers"):  # what the factory draws shows in what it builds
            return factory
        key = digest_parts([self._fingerprint(factory), repr(current_mode()).encode(), self._holder.place().encode()])
        if self._holder.model is None:
            return self._join(factory, cache.read_note(factory, key), key)
        identity, marks = self._of_model()
        seen = identity.look()
        note = digest_parts([seen.module_hash.encode(), seen.namespace])
        if identity.marks() == marks and not seen.is_private:
            cache.write_note(factory, key, note)
        return self._join(factory, note, key, seen)

    def settle(self, look: Look) -> bool:
        if self._holder.model is None:
            self._holder.build()
        return self.look().namespace != look.namespace

    def has_moved(self) -> bool:
        return self._of_model()[0].has_moved()

    def refresh(self) -> None:
        super().refresh()
        if self._built is not None:
            self._built[0].refresh()

    def parameters(self) -> list[torch.Tensor]:
        return [] if self._built is None else self._built[0].parameters()

    def requires_grad(self) -> bool:
        return self._built is not None and self._built[0].requires_grad()

    def whole_bytes(self) -> int:
        return super().whole_bytes() + (0 if self._built is None else self._built[0].whole_bytes())

    def note_hashed(self, n_bytes: int) -> None:
        if self._built is not None:
            self._built[0].note_hashed(n_bytes)

    def generators(self) -> list[object]:
        return [*super().generators(), *([] if self._built is None else self._built[0].generators())]

    def marks(self) -> object:
        return None if self._built is None else self._built[0].marks()

    def classes(self) -> tuple[type, ...]:
        return (*super().classes(), *(() if self._built is None else self._built[0].classes()))

    def apart(self) -> Identity:
        cache = self._cache()
        assert cache is not None
        twin = _LazyIdentity(self._target, cache, self._holder)
        twin._own_name, twin._built, twin._first = self._own_name, self._built, self._first
        return twin

    def describe(self) -> Iterator[tuple[str, bytes]]:
        yield from super().describe()
        if self._joined is not None:
            yield "model", self._joined[2].namespace
        if self._built is not None:
            yield from ((f"model {name}", value) for name, value in self._built[0].describe())

    def _fingerprint(self, factory: Look) -> bytes:
        """Return what identifies the factory as it was first seen: building a model may change what it refers to."""
        if self._first is None or self._first[0] != factory.module_hash:
            parts = (part for name, value in super().describe() if name != "mode" for part in (name.encode(), value))
            self._first = factory.module_hash, digest_parts(parts)
        return self._first[1]

    def _of_model(self) -> tuple[Identity, object]:
        if self._built is None:
            model = self._holder.build()
            cls = type(model)
            target = Target(name=cls.__qualname__, code=cls, function=cls.forward, instance=weakref.ref(model))
            identity = Identity(target, self._options)
            identity._has_checked_ignored = True  # noqa: SLF001 - as for the factory
            identity.look()
            self._built = identity, identity.marks()
        return self._built

    def _join(self, factory: Look, note: bytes | None, key: bytes, seen: Look | None = None) -> Look:
        """Return one look for both; the same one as long as they are the same."""
        last = self._joined
        if last is not None and last[0] is factory and last[1] == (note, key, seen):
            return last[2]
        is_private = factory.is_private or (seen is not None and seen.is_private)
        look = Look(
            factory.module_hash,
            digest_parts([key, note or b"nothing"]),
            is_private,
            None if seen is None else seen.reason,
            "" if seen is None else seen.evidence,
        )
        self._joined = factory, (note, key, seen), look
        return look


class _LazyCache(Cache):
    """The cache of a lazy module, which also keeps the notes of what its factory built."""

    def __init__(self, target: Target, options: CacheOptions, holder: _Holder) -> None:
        prepare(options, holder.compute, is_method=False)
        target = replace(target, function=holder.compute)
        owner = holder.owner
        super().__init__(target, lambda: options.with_attributes(owner()), _LazyIdentity(target, self, holder))
        self._notes: dict[bytes, bytes] = {}
        self._tiers.on_touch = self._touch_notes

    def read_note(self, factory: Look, key: bytes) -> bytes | None:
        """Return what is noted under a key, or None."""
        note = self._notes.get(key)
        store = self._tiers.open(factory)
        if note is None and store is not None and self.options.looks_up:
            note = self._read(store, _namespace_of_notes(factory), key)
            if note is not None:
                self._notes[key] = note
        return note

    def write_note(self, factory: Look, key: bytes, note: bytes) -> None:
        """Note what was built; say so if that was something else before."""
        before = self.read_note(factory, key)
        if before == note:
            return
        if before is not None:
            self._notices.say(
                "another model",
                "the factory built another model than the one whose results are cached, so it starts afresh; results "
                "that were given until now, in this run, were those of the other one. Name what it loads in version",
            )
        self._notes[key] = note
        store = self._tiers.open(factory)
        if store is not None and self.options.writes:
            rows = Rows([key], _NOTE, np.frombuffer(note, np.uint8).reshape(1, -1))
            self._tiers.store(store, _namespace_of_notes(factory), rows, replaces=before is not None)

    def _touch_notes(self, store: LmdbStore) -> None:
        """Let what is noted be in use as long as what hangs on it is."""
        notes = _namespace_of_notes(self._identity.look())
        self._tiers.touch(store, notes)
        for key in list(self._notes):
            self._read(store, notes, key)

    def _read(self, store: LmdbStore, namespace: bytes, key: bytes) -> bytes | None:
        try:
            found = store.get_many(namespace, [key]).found
        except StoreError as error:
            self._notices.error(error, 0)
            return None
        return bytes(found[0].data[0]) if found and found[0].layout == _NOTE else None


def _namespace_of_notes(look: Look) -> bytes:
    return digest_parts([b"lazy", look.module_hash.encode()])
