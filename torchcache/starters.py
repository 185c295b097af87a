"""Which library started this process, if any did.

Three have an idea of their own of which process is whose child: multiprocessing, billiard (the pools of celery) and
multiprocess (pathos). The latter two were made from the first, and are asked only if they are loaded.

This module does not import torch.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import sys
from typing import Any

from torchcache import process

#: By the names that they are imported by.
LIBRARIES = ("multiprocessing", "billiard", "multiprocess")


def is_child() -> bool:
    """Tell whether one of the libraries started this process: a DataLoader worker, a spawned rank, a pool's worker."""
    return bool(starters())


def starters() -> list[str]:
    """Return the names of the libraries that started this process, or the one that it was forked from by hand."""
    if multiprocessing.parent_process() is not None:
        return ["multiprocessing"]
    return [name for name in LIBRARIES[1:] if _is_child_of(name)]


def is_starting_a_child() -> bool:
    """Tell whether what is pickled at the moment goes to a process that multiprocessing is starting."""
    return multiprocessing.context.get_spawning_popen() is not None


def program_key() -> bytes:
    """Return what the processes of one program have in common, and no other program has.

    It is the authentication key of the library that started this process. A forked process has that of the standard
    library from its parent, whichever library forked it.
    """
    started_by = starters()
    if started_by and process.generation() == 0:
        return _authentication_key(started_by[0])
    return _authentication_key("multiprocessing")


def keys_of_children() -> set[bytes]:
    """Return the ``program_key`` that each process has which this one started."""
    return {_authentication_key(name) for name in LIBRARIES if _process_module(name) is not None}


def _is_child_of(name: str) -> bool:
    """Tell whether another library than multiprocessing calls this process a child."""
    module = _process_module(name)
    return module is not None and getattr(module.current_process(), "_parent_pid", None) is not None


def _authentication_key(name: str) -> bytes:
    module = _process_module(name)
    assert module is not None
    return bytes(module.current_process().authkey)


def _process_module(name: str) -> Any:  # noqa: ANN401 - a module that need not be installed
    """Return the module of a library that knows the current process; None if it is not loaded, or not yet whole."""
    module = sys.modules.get(f"{name}.process")
    return module if hasattr(module, "current_process") else None
