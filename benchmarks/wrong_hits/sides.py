"""One adapter for each cache in ``wrong-hits``: how a user of it would write a case.

Where a rival documents a way around a fault, its adapter goes that way. What a rival has no notion of,
its adapter names in ``lacks``, with one word that says why.

A rival's package is imported by its adapter alone: only its own process has it.
"""

# ruff: noqa: ANN401, PLC0415 - arguments and results are anything; a rival is there in its own process only

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[Any, tuple[Any, ...], dict[str, Any], Sequence[str]], Any]


class Watch:
    """Sees whether code of the user's ran during a call, without a trace in that code.

    A counter in the code would be a state that changes at every call, which is a case of its own.

    Args:
        folder: Where the user's code lies; cells of a notebook count, too.
    """

    def __init__(self, folder: Path) -> None:
        self._start = (str(folder), "<cell")
        self.is_computed = False

    def __enter__(self) -> None:
        self.is_computed = False
        sys.setprofile(self._see)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self._start):
            self.is_computed |= not code.co_name.startswith(("hook", "__", "<module"))


class Cached:
    """A cached function or module, as a case sees it.

    Attributes:
        inner: The module whose weights and attributes a case changes; None for a function.
    """

    def __init__(self, call: Call, watch: Watch, inner: Any = None) -> None:
        self._call = call
        self._watch = watch
        self.inner = inner

    def __call__(self, *args: Any, ids: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call it; ``ids`` name the samples for a cache whose user names them."""
        if ids is None:
            ids = [f"sample_{i}" for i in range(len(next(a for a in args if isinstance(a, Tensor))))]
        with self._watch:
            return self._call(self.inner, args, kwargs, ids)

    def copied(self) -> Cached:
        """Return a deep copy of the module, cached in the same place."""
        return Cached(self._call, self._watch, copy.deepcopy(self.inner))


class Side:
    """No cache: what each case must return. The caches derive from it.

    Args:
        watch: Sees whether the user's code ran.
        cache_dir: A folder that is this case's alone.
        program: The user's program.
    """

    lacks: ClassVar[Mapping[str, str]] = {}
    package = "torch"
    imports = ""

    def __init__(self, watch: Watch, cache_dir: Path, program: Any) -> None:
        self.watch = watch
        self.cache_dir = cache_dir
        self.program = program
        self._classes: dict[type, type] = {}
        self._open()

    @classmethod
    def load(cls) -> None:
        """Import what is needed, which may take longer than a case is given."""
        if cls.imports:
            importlib.import_module(cls.imports)

    def function(self, function: Callable[..., Any], *, is_random: bool = False) -> Cached:
        """Cache a function; ``is_random`` is for a cache whose user can say so."""
        del is_random
        decorated = self._decorate(function)
        return Cached(lambda _, args, kwargs, __: decorated(*args, **kwargs), self.watch)

    def module(self, cls: type[nn.Module], *args: Any, is_random: bool = False) -> Cached:
        """Construct a cached module."""
        del is_random
        if cls not in self._classes:
            self._classes[cls] = self._decorate(cls)
        return self._cached_module(self._classes[cls](*args))

    def from_file(self, function: Callable[..., Any], path: Path) -> Any:
        """Call a cached function with the array in a file."""
        return self.function(function)(torch.from_numpy(np.load(path)))

    def edit(self, module: Any) -> None:
        """Save the next run's text of a file that runs."""
        edit(Path(module.__file__))

    def refresh(self, cached: Cached) -> None:
        """Do what the documentation says after a change that cannot be noticed."""

    def close(self) -> None:
        """Write everything, and give the files back."""

    def poison(self, marker: Path) -> int:
        """Put a pickle that creates ``marker`` in the place of each stored value, and return how many there were."""
        raise NotImplementedError

    def _open(self) -> None:
        pass

    def _decorate(self, target: Any) -> Any:
        return target

    def _cached_module(self, module: nn.Module) -> Cached:
        return Cached(lambda inner, args, kwargs, _: inner(*args, **kwargs), self.watch, module)


class Ours(Side):
    """This torchcache."""

    package = imports = "torchcache"

    def refresh(self, cached: Cached) -> None:
        cached.inner.cache_instance.refresh()

    def close(self) -> None:
        from torchcache import Cache

        for cache in self._caches:
            assert isinstance(cache, Cache)
            cache.close()

    def poison(self, marker: Path) -> int:
        import lmdb

        payload, n = pickle.dumps(Poison(str(marker))), 0
        for data in self.cache_dir.rglob("data.mdb"):
            with lmdb.open(str(data.parent)) as env, env.begin(write=True) as txn:
                segments = {bytes(key): len(value) for key, value in txn.cursor() if bytes(key).startswith(b"s")}
                for key, n_bytes in segments.items():
                    txn.put(key, payload.ljust(n_bytes, b"\0"))
                n += len(segments)
        return n

    def _open(self) -> None:
        self._caches: list[object] = []

    def _decorate(self, target: Any) -> Any:
        from torchcache import torchcache

        decorated: Any = torchcache(persistent=True, persistent_cache_dir=self.cache_dir)(target)
        if not isinstance(decorated, type):
            self._caches.append(decorated.cache_instance)
        return decorated

    def _cached_module(self, module: nn.Module) -> Cached:
        self._caches.append(module.cache_instance)
        return super()._cached_module(module)


class Torchcache06(Side):
    """torchcache 0.6.0."""

    package = imports = "torchcache"

    def poison(self, marker: Path) -> int:
        paths = [*self.cache_dir.rglob("*.pt.br")]
        for path in paths:
            torch.save(Poison(str(marker)), path)
        return len(paths)

    def _decorate(self, target: Any) -> Any:
        from torchcache import torchcache

        return torchcache(persistent=True, persistent_cache_dir=self.cache_dir)(target)


class TorchModuleCache(Side):
    """torch-module-cache: the user names each sample.

    Its ``safe_load=True`` stays off: version 0.1.4 writes what torch then refuses to read, so nothing is
    ever a hit.
    """

    package = "torch-module-cache"
    imports = "torch_module_cache"
    lacks: ClassVar = {"inputs": "keys"}

    def function(self, function: Callable[..., Any], *, is_random: bool = False) -> Cached:
        del is_random

        class Work(nn.Module):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

        Work.__name__ = function.__name__
        return self.module(Work)

    def poison(self, marker: Path) -> int:
        paths = [*self.cache_dir.rglob("*.pt")]
        for path in paths:
            torch.save(Poison(str(marker)), path)
        return len(paths)

    def _decorate(self, target: Any) -> Any:
        from torch_module_cache import cache_module

        return cache_module(cache_path=str(self.cache_dir))(target)

    def _cached_module(self, module: nn.Module) -> Cached:
        return Cached(lambda inner, args, kwargs, ids: inner(*args, cache_key=list(ids), **kwargs), self.watch, module)


class Memoize(Side):
    """What caches functions by a hash or a pickle of their arguments.

    Functions take arrays, since the pickle of a tensor holds an address and never matches. A module is
    an argument, so that its weights count.
    """

    lacks: ClassVar = {"grad": "arrays"}

    def function(self, function: Callable[..., Any], *, is_random: bool = False) -> Cached:
        del is_random
        decorated = self._decorate(function)
        return Cached(
            lambda _, args, kwargs, __: as_tensors(
                decorated(*as_arrays(args), **dict(zip(kwargs, as_arrays(kwargs.values()), strict=True)))
            ),
            self.watch,
        )

    def module(self, cls: type[nn.Module], *args: Any, is_random: bool = False) -> Cached:
        del is_random
        decorated = self._decorate(self.program.encode)
        return Cached(
            lambda inner, args, kwargs, _: as_tensors(decorated(inner, *as_arrays(args), **kwargs)),
            self.watch,
            cls(*args),
        )


class JoblibMemory(Memoize):
    """joblib.Memory."""

    package = imports = "joblib"

    def poison(self, marker: Path) -> int:
        import joblib

        paths = [*self.cache_dir.rglob("output.pkl")]
        for path in paths:
            joblib.dump(Poison(str(marker)), path)
        return len(paths)

    def _decorate(self, target: Any) -> Any:
        import joblib

        return joblib.Memory(self.cache_dir, verbose=0).cache(target)


class DiskcacheMemoize(Memoize):
    """diskcache.Cache.memoize, which tells types apart if asked to."""

    package = imports = "diskcache"

    def close(self) -> None:
        self._cache.close()

    def poison(self, marker: Path) -> int:
        payload = pickle.dumps(Poison(str(marker)))
        self._cache.close()
        with sqlite3.connect(self.cache_dir / "cache.db") as database:
            change = "UPDATE Cache SET value = ?, filename = NULL, mode = 4"  # 4: a pickle
            n = database.execute(change, (payload,)).rowcount
        database.close()
        return n

    def _open(self) -> None:
        import diskcache

        self._cache = diskcache.Cache(str(self.cache_dir))

    def _decorate(self, target: Any) -> Any:
        return self._cache.memoize(typed=True)(target)


class MonaiPersistentDataset(Side):
    """MONAI's PersistentDataset: samples are items, the function is a transform.

    ``hash_transform`` is off by default; with it, what the transform holds counts.
    """

    package = "monai"
    imports = "monai.transforms"
    lacks: ClassVar = {"batches": "samples", "grad": "data"}

    def function(self, function: Callable[..., Any], *, is_random: bool = False) -> Cached:
        return self._cached(function, is_random=is_random)

    def module(self, cls: type[nn.Module], *args: Any, is_random: bool = False) -> Cached:
        return self._cached(cls(*args), is_random=is_random)

    def from_file(self, function: Callable[..., Any], path: Path) -> Any:
        return self._dataset([str(path)], _EncodeFile(function), is_random=False)[0]

    def poison(self, marker: Path) -> int:
        paths = [*self.cache_dir.rglob("*.pt")]
        for path in paths:
            torch.save(Poison(str(marker)), path)
        return len(paths)

    def _cached(self, target: Any, *, is_random: bool) -> Cached:
        datasets: dict[tuple[int, bytes], Any] = {}  # one for each list of items, as an epoch after an epoch has

        def call(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> Any:
            items = _items(inner, args, kwargs)
            key = id(inner), pickle.dumps(items)
            if key not in datasets:
                datasets[key] = self._dataset(items, _Encode(inner), is_random=is_random)
            return _stacked([datasets[key][i] for i in range(len(items))])

        return Cached(call, self.watch, target)

    def _dataset(self, items: list[Any], encode: Callable[[Any], Any], *, is_random: bool) -> Any:
        from monai.data import PersistentDataset
        from monai.data.utils import pickle_hashing
        from monai.transforms import Compose, Lambda, RandLambda

        transform = Compose([(RandLambda if is_random else Lambda)(encode, track_meta=False)])
        return PersistentDataset(items, transform, self.cache_dir, hash_transform=pickle_hashing)


class _Encode:
    """Call a function or a module on an item."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, item: dict[str, Any]) -> Any:
        # What follows a random transform gets tensors, as read from the cache.
        rows = {k: torch.as_tensor(v)[None] if isinstance(v, np.ndarray | Tensor) else v for k, v in item.items()}
        return self.function(**rows)


class _EncodeFile(_Encode):
    """Call a function on the array in a file."""

    def __call__(self, item: Any) -> Any:
        return self.function(torch.from_numpy(np.load(item)))


def _items(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    named = signature.bind(*args, **kwargs).arguments
    n = len(next(value for value in named.values() if isinstance(value, Tensor)))
    # Copies: the data set is the user's own, and outlives what the caller does to the batch.
    return [{k: v[i].numpy().copy() if isinstance(v, Tensor) else v for k, v in named.items()} for i in range(n)]


def _stacked(rows: Sequence[Any]) -> Any:
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.cat([*rows])
    if isinstance(first, dict):
        return type(first)({key: _stacked([row[key] for row in rows]) for key in first})
    if isinstance(first, tuple | list):
        items = [_stacked(column) for column in zip(*rows, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


class Poison:
    """Creates a file when its pickle is read."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.marker, "w")


def as_arrays(values: Iterable[Any]) -> list[Any]:
    """Return the values, tensors as arrays that share their memory."""
    return [value.numpy() if isinstance(value, Tensor) else value for value in values]


def as_tensors(value: Any) -> Any:
    """Return an array as a tensor, and anything else as it is."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def edit(path: Path) -> None:
    """Save what a file's comments say of the next run; a file that was edited already stays as it is."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        before, marker, after = line.partition("  # next run: ")
        if marker:
            lines[i] = before[: len(before) - len(before.lstrip())] + after
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


SIDES: dict[str, type[Side]] = {
    "none": Side,
    "ours": Ours,
    "torchcache 0.6.0": Torchcache06,
    "torch-module-cache": TorchModuleCache,
    "joblib.Memory": JoblibMemory,
    "diskcache.memoize": DiskcacheMemoize,
    "MONAI PersistentDataset": MonaiPersistentDataset,
}
