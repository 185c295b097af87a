"""One frozen ``CacheOptions``: defaults, validation and ``torchcache_`` attributes."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from torchcache.errors import ConfigError
from torchcache.our_names import OPTION_PREFIX
from torchcache.report.log import warn_once

if TYPE_CHECKING:
    from typing_extensions import Self


#: Sizes may be written with these units, in any case; decimal and binary.
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("b", 1000), ("", 1000), ("ib", 1024))
}

#: Options of torchcache 0.6 that are gone, and why.
_GONE = {
    "subsample_count": "every byte of a sample is hashed, so there is nothing to subsample; drop it",
    "use_mmap_on_load": "the store is memory-mapped always; drop it",
    "zstd_compression_threads": "compression runs on one background thread; drop it",
}

#: How names of directories begin and end that torchcache makes beside one that is named by a module hash: the private
#: temporary ones, environments that are set aside, and those beside a directory of torchcache 0.6. Others begin with a
#: dot.
_OUR_PREFIXES = ("torchcache-tmp-",)
_OUR_SUFFIXES = (".damaged", ".beside-0.6")


class OptionArguments(TypedDict, total=False):
    """The keyword arguments of ``torchcache()``; ``CacheOptions`` says what each means."""

    enabled: bool
    mode: str
    persistent: bool
    persistent_cache_dir: str | os.PathLike[str] | None
    persistent_module_hash: str | None
    max_memory_cache_size: float | str
    max_persistent_cache_size: float | str
    memory_cache_device: str | torch.device | None
    cache_dtype: torch.dtype | None
    zstd_compression: bool
    zstd_compression_level: int
    version: str | None
    batch_dim: int | None
    batch_size: int | None
    progress: bool
    unbatched: Sequence[str]
    ignore: Sequence[str]
    padded: Mapping[str, str]
    min_free_disk: float | str | None
    eviction: str
    shared: str | None
    when_grad: str
    check_rows: bool
    verify_hits: float
    queue_bytes: float | str | None
    queue_timeout_seconds: float
    lock_timeout_seconds: float
    flush_timeout_seconds: float | None


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        hint = ""
        if name == "zstd_compression" and isinstance(value, (int, float)):
            hint = f"; for the level use zstd_compression=True, zstd_compression_level={value}"
        raise ConfigError(f"{name}={value!r} must be True or False{hint}", argument=name)
    return value


def parse_size(name: str, value: object) -> int:
    """Return a size in bytes from an int, a float or a string like ``"5GB"`` or ``"5GiB"``."""
    remedy = 'give bytes as a number (5e9) or a string ("5GB", "5GiB")'
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(?:e(\d+))?\s*([a-zA-Z]*)\s*", value, re.IGNORECASE)
        unit = match and _UNITS.get(match[3].lower())
        if not match or not unit:
            raise ConfigError(f"{name}={value!r} is not a size; {remedy}", argument=name)
        number = float(match[1]) * 10.0 ** int(match[2] or 0) * unit
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    else:
        raise ConfigError(f"{name}={value!r} is not a size; {remedy}", argument=name)
    if not math.isfinite(number) or number < 0:
        raise ConfigError(f"{name}={value!r} must be finite and not negative; {remedy}", argument=name)
    return int(number) if isinstance(value, str) else int(value)


def _optional_size(name: str, value: object) -> int | None:
    return None if value is None else parse_size(name, value)


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name}={value!r} must be a finite number of seconds, 0 or more", argument=name)
    return float(value)


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{name}={value!r} must be a share between 0 and 1, such as 0.01", argument=name)
    return float(value)


def _optional_seconds(name: str, value: object) -> float | None:
    return None if value is None else _seconds(name, value)


def _optional_text(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be a string or None", argument=name)
    return value


def _names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ConfigError(f"{name}={value!r} must be a tuple of argument names, such as ('mask',)", argument=name)


def _masks(name: str, value: object) -> tuple[tuple[str, str], ...]:
    if isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # as this returns it
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise ConfigError(
            f"{name}={value!r} must be a dict of argument names, each with that of its mask, such as "
            "{'input_ids': 'attention_mask'}",
            argument=name,
        )
    if len(set(value.values())) > 1:
        raise ConfigError(
            f"{name}={value!r} names several masks, and all padded arguments of a call must share one; decorate the "
            "parts of the model that have one each",
            argument=name,
        )
    return tuple(sorted(value.items()))


def _dimension(name: str, value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError(
            f"{name}={value!r} must be the number of a dimension, 0 or more, or None for calls that are one sample",
            argument=name,
        )
    return value


def _count(name: str, value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name}={value!r} must be a number of samples, 1 or more, or None", argument=name)
    return value


def _directory(name: str, value: object) -> Path | None:
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)) and str(value):
        text = os.fsdecode(value)
        if "\0" in text:
            raise ConfigError(f"{name}={value!r} is not a path: it holds a null character", argument=name)
        try:
            return Path(text).expanduser().absolute()  # the program may change its directory
        except RuntimeError as error:
            raise ConfigError(
                f"{name}={value!r} starts at a home directory that is not known here; write it out, or set HOME",
                argument=name,
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{name}={value!r} is relative, and the current directory cannot be found ({error}); give an "
                "absolute path",
                argument=name,
            ) from error
    raise ConfigError(f"{name}={value!r} must be a path (str or pathlib.Path) or None", argument=name)


def _file_name(name: str, value: object) -> str | None:
    text = _optional_text(name, value)
    if text is None:
        return None
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,127}", text):
        raise ConfigError(
            f"{name}={text!r} must be a plain file name: 1 to 128 ASCII letters, digits, '_', '-', '.', '+', '=' or "
            "'@', of which the first is a letter, a digit or '_'; it names the subdirectory of the cache",
            argument=name,
        )
    if text.startswith(_OUR_PREFIXES) or text.endswith(_OUR_SUFFIXES):
        raise ConfigError(
            f"{name}={text!r} is a name that torchcache gives to directories of its own: choose one that does not "
            f"start with {' or '.join(_OUR_PREFIXES)} nor end with {' or '.join(_OUR_SUFFIXES)}",
            argument=name,
        )
    return text


def _level(name: str, value: object) -> int:
    import zstandard  # noqa: PLC0415 - only its range is wanted here, and only when options are made

    highest = zstandard.MAX_COMPRESSION_LEVEL
    if isinstance(value, bool) or not isinstance(value, int) or not -100 <= value <= highest or value == 0:
        raise ConfigError(
            f"{name}={value!r} must be an int from -100 (fastest) to {highest} (smallest), without 0",
            argument=name,
        )
    return value


def _floating_dtype(name: str, value: object) -> torch.dtype | None:
    if value is None:
        return None
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ConfigError(f"{name}={value!r} must be a floating torch dtype such as torch.half, or None", argument=name)
    return value


def _device(name: str, value: object) -> torch.device | None:
    if value is None:
        return None
    try:
        if isinstance(value, (str, torch.device)):
            device = torch.device(value)
            if device.type != "meta":
                return device
    except RuntimeError:
        pass
    raise ConfigError(
        f"{name}={value!r} is not a device; give a name such as 'cpu' or 'cuda:0', or None for the "
        "device of the module's output",
        argument=name,
    )


def _one_of(*choices: str) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            nearest = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}{hint}", argument=name)
        return value

    return check


def _one_of_or_none(*choices: str) -> Callable[[str, object], str | None]:
    check = _one_of(*choices)
    return lambda name, value: None if value is None else check(name, value)


def _option(default: object, check: Callable[[str, object], object], *, shapes_key: bool) -> Any:  # noqa: ANN401 - as field()
    """Declare an option: its default, its check, and whether it enters the module hash."""
    return field(default=default, metadata={"check": check, "shapes_key": shapes_key})


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """The options of one cache, checked and in their final types.

    Attributes:
        enabled: ``False`` leaves the target as if it were not decorated.
        mode: What a call may do: "on" looks up and stores; "read" looks up, and writes nothing to disk; "refresh"
            computes every row and overwrites what is cached; "require" looks up, and raises a ``CacheMissError``
            instead of computing anything; "off" computes as if there were no cache.
        persistent: Keep results on disk too.
        persistent_cache_dir: Directory on disk, shared by all processes. ``None``: a private temporary one, deleted
            at the end of the program.
        persistent_module_hash: Your own name instead of the module hash. Code, arguments, options and weights no
            longer count; methods are told apart by their names. 1 to 128 ASCII letters, digits and ``_ - . + = @``;
            the first is a letter, a digit or ``_``. Names that start with ``torchcache-tmp-`` or end with
            ``.damaged`` or ``.beside-0.6`` are refused, since torchcache gives such names itself.
        max_memory_cache_size: Bytes in memory, per cache and process. ``0``: nothing.
        max_persistent_cache_size: Bytes under ``persistent_cache_dir``, over all modules and processes.
        min_free_disk: Bytes of the file system that stay free for others, such as checkpoints: writing stops
            before. ``None``: 1 GB, or 2 % of a file system smaller than 50 GB.
        memory_cache_device: Where results in memory lie. ``None``: on the device of the module's output.
        cache_dtype: Floating-point results are stored in this dtype and come back in their own. Integers, bools and
            complex numbers are never cast.
        zstd_compression: Compress what is on disk. Needs ``persistent=True``.
        zstd_compression_level: -100 (fastest) to 22 (smallest), not 0.
        version: Any string. Another one starts afresh.
        batch_dim: The dimension of tensors, arguments and results, that the samples lie along. ``None``: a call is
            one sample, with any arguments that have a value and any result made of tensors, arrays, images and
            plain values.
        batch_size: At most this many missing samples of a call are computed at once, and kept before the next ones
            are. A call that fails then loses little, and needs memory for so many only. To find out whether rows depend
            on their batch, a few more may be. ``None``: all missing samples of a call at once.
        progress: Show a bar while a call is computed in parts. Needs ``batch_size`` and tqdm
            (``pip install 'torchcache[progress]'``).
        unbatched: Names of arguments whose tensors all samples of a call share, such as ``("mask",)``. They count
            by value.
        ignore: Attributes, globals or closure variables that do not count, by their path: ``("step", "cfg.out",
            "encoder.history")``. You vouch that they shape no result. A name that is not there raises at the first
            call.
        padded: Arguments that are padded along their first dimension beside the batch, each with its mask:
            ``{"input_ids": "attention_mask"}``. One mask for all. A tensor in a container is named with its way,
            such as ``"batch['input_ids']"``.
        eviction: What makes room on disk: ``"stale"`` what nobody touched for an hour, ``"lru"`` the least recently
            used, ``"none"`` nothing.
        shared: ``"group"``: the members of the directory's group use it together (modes 2770 and 0660, whatever the
            umask). ``None``: only you.
        when_grad: What to do if parameters require grad while grad mode is on: ``"detach"``, ``"bypass"`` or
            ``"raise"``.
        check_rows: Find out whether rows depend on their batch: a few rows of the first computed batch are computed
            once more by themselves, and one with the second batch. If they come back grossly different, the
            namespace is not cached.
        verify_hits: Compute so large a share of the hits again and compare; ``0.01`` is one in a hundred. What
            differs is said once, counted in ``mismatched_rows``, and replaced.
        queue_bytes: Bound of the write queue. ``None``: 64 MB, and 16 MB in a worker process.
        queue_timeout_seconds: How long a call waits for a full queue before its rows are dropped.
        lock_timeout_seconds: How long the background writer waits for the directory's lock if it stays with one
            process; five times as long if others get it in turn.
        flush_timeout_seconds: How long the end of the program waits for the queue, and for those of its workers.
            ``None``: 10, and 4 in a worker process.
    """

    enabled: bool = _option(True, _flag, shapes_key=False)
    mode: str = _option("on", _one_of("on", "read", "refresh", "require", "off"), shapes_key=False)
    persistent: bool = _option(False, _flag, shapes_key=False)
    persistent_cache_dir: Path | None = _option(None, _directory, shapes_key=False)
    persistent_module_hash: str | None = _option(None, _file_name, shapes_key=False)
    max_memory_cache_size: int = _option(int(1e9), parse_size, shapes_key=False)
    max_persistent_cache_size: int = _option(int(10e9), parse_size, shapes_key=False)
    min_free_disk: int | None = _option(None, _optional_size, shapes_key=False)
    memory_cache_device: torch.device | None = _option(torch.device("cpu"), _device, shapes_key=False)
    cache_dtype: torch.dtype | None = _option(None, _floating_dtype, shapes_key=True)
    zstd_compression: bool = _option(False, _flag, shapes_key=True)
    zstd_compression_level: int = _option(3, _level, shapes_key=False)
    version: str | None = _option(None, _optional_text, shapes_key=True)
    batch_dim: int | None = _option(0, _dimension, shapes_key=True)
    batch_size: int | None = _option(None, _count, shapes_key=False)
    progress: bool = _option(False, _flag, shapes_key=False)
    unbatched: tuple[str, ...] = _option((), _names, shapes_key=False)
    ignore: tuple[str, ...] = _option((), _names, shapes_key=True)
    padded: tuple[tuple[str, str], ...] = _option((), _masks, shapes_key=True)
    eviction: str = _option("stale", _one_of("stale", "none", "lru"), shapes_key=False)
    shared: str | None = _option(None, _one_of_or_none("group"), shapes_key=False)
    when_grad: str = _option("detach", _one_of("detach", "bypass", "raise"), shapes_key=False)
    check_rows: bool = _option(True, _flag, shapes_key=False)
    verify_hits: float = _option(0.0, _share, shapes_key=False)
    queue_bytes: int | None = _option(None, _optional_size, shapes_key=False)
    queue_timeout_seconds: float = _option(5.0, _seconds, shapes_key=False)
    lock_timeout_seconds: float = _option(2.0, _seconds, shapes_key=False)
    flush_timeout_seconds: float | None = _option(None, _optional_seconds, shapes_key=False)

    def __post_init__(self) -> None:
        for option in fields(self):
            checked = option.metadata["check"](option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, object]) -> Self:
        """Make options from ``torchcache()``'s keyword arguments.

        Raises:
            ConfigError: If a name is unknown (with the nearest known one) or a value is wrong.
        """
        for name in arguments:
            _check_name(name, shown=name)
        return cls(**arguments)  # type: ignore[arg-type] # the checks of __post_init__ settle the types

    def with_attributes(self, target: object) -> Self:
        """Return the options with the ``torchcache_<option>`` attributes of ``target`` merged in.

        Attributes of the instance and of its classes count, the most derived first.

        Raises:
            ConfigError: If such an attribute names no option or its value is wrong.
        """
        found: dict[str, object] = {}
        for namespace in (*(vars(c) for c in reversed(type(target).__mro__)), getattr(target, "__dict__", {})):
            for key, value in namespace.items():
                if key.startswith(OPTION_PREFIX):
                    name = key[len(OPTION_PREFIX) :]
                    _check_name(name, shown=key)
                    found[name] = getattr(target, key) if hasattr(type(value), "__get__") else value  # a property
        if not found:
            return self
        merged = {option.name: getattr(self, option.name) for option in fields(self)} | found
        return type(self)(**merged)

    @property
    def looks_up(self) -> bool:
        """Whether a call is answered from what is cached."""
        return self.mode in ("on", "read", "require")

    @property
    def writes(self) -> bool:
        """Whether anything is written to disk."""
        return self.mode in ("on", "refresh")

    def check_combinations(self) -> None:
        """Check what only the merged options can tell.

        Raises:
            ConfigError: If ``zstd_compression`` is set without ``persistent``, ``shared`` without a directory,
                ``progress`` without ``batch_size``, what is of batches for calls that have none, or
                ``mode="require"`` without anything on disk that could answer.
        """
        for name in ("unbatched", "padded", "batch_size"):
            if self.batch_dim is None and getattr(self, name):
                raise ConfigError(
                    f"{name} has no meaning with batch_dim=None, where a call is one sample and all arguments count by "
                    "value; drop it",
                    argument=name,
                )
        if self.progress and self.batch_size is None:
            raise ConfigError(
                "progress=True shows how far a call is that is computed in parts, and without batch_size all of it is "
                "computed at once; set batch_size, or drop progress",
                argument="progress",
            )
        if self.zstd_compression and not self.persistent:
            raise ConfigError(
                "zstd_compression=True has no effect without persistent=True: only the disk tier is "
                "compressed; set persistent=True or drop zstd_compression",
                argument="zstd_compression",
            )
        if self.shared is not None and self.persistent and self.persistent_cache_dir is None:
            raise ConfigError(
                f"shared={self.shared!r} needs a persistent_cache_dir: without one the cache is temporary and private",
                argument="shared",
            )
        has_directory = self.persistent and self.persistent_cache_dir is not None and self.max_persistent_cache_size > 0
        if self.mode == "require" and not has_directory:
            raise ConfigError(
                "mode='require' computes nothing, so it needs a cache on disk that was filled before; set "
                "persistent=True and persistent_cache_dir, and no max_persistent_cache_size=0, or set mode='on'",
                argument="mode",
            )
        if self.mode == "read" and self.persistent and self.persistent_cache_dir is None:
            warn_once(
                ("nothing to read",),
                "persistent=True is ignored in mode='read' without a persistent_cache_dir: there is nothing to read",
            )
        if self.persistent_cache_dir is not None and not self.persistent:
            warn_once(
                ("ignored directory", str(self.persistent_cache_dir)),
                "persistent_cache_dir=%s is ignored because persistent is False",
                self.persistent_cache_dir,
            )

    def key_parts(self) -> list[tuple[str, str]]:
        """Return name and value of every option that shapes what is stored."""
        return [
            (option.name, str(getattr(self, option.name))) for option in fields(self) if option.metadata["shapes_key"]
        ]


OPTION_NAMES = tuple(option.name for option in fields(CacheOptions))


def _check_name(name: str, *, shown: str) -> None:
    if name in OPTION_NAMES:
        return
    if name in _GONE:
        raise ConfigError(f"{shown} is an option of torchcache 0.6 that is gone: {_GONE[name]}", argument=shown)
    prefix = shown[: len(shown) - len(name)]
    containing = [option for option in OPTION_NAMES if name and name in option]
    nearest = containing or difflib.get_close_matches(name, OPTION_NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"the options are {', '.join(OPTION_NAMES)}"
    raise ConfigError(f"{shown} is no option of torchcache; {hint}", argument=shown)
