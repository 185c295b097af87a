"""What runs at the orderly end of a process, however that is ended.

At the end of a program Python runs ``atexit``. A child of multiprocessing ends past that, up to Python 3.12, and runs
finalizers of the library that started it. A worker of billiard's pools runs neither.

This module does not import torch.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import util as _util  # noqa: F401 - registers with atexit before us, so that we come first
from typing import Any

from torchcache import starters

#: Finalizers run from high to low, and those of torch's own pools are lower. Below 0 the children are ended first.
_EXIT_PRIORITY = 100

_callbacks: dict[Callable[[], None], None] = {}
_lasting: list[Callable[[float], None]] = []
_pid = os.getpid()  # of the process that all else here is about
_is_registered = False  # with atexit, by the first callback of this process
_finalized: set[str] = set()  # libraries that run the callbacks at the end of this process
_told: set[str] = set()  # libraries that say when a process has become their child
_spent_seconds = 0.0


def at_exit(callback: Callable[[], None]) -> None:
    """Call ``callback`` once when this process ends in an orderly way; bounded by the callback itself.

    A forked child does not inherit it: what the parent registered is the parent's to do.
    """
    global _is_registered  # noqa: PLW0603 - there is one end of one process
    if _pid != os.getpid():  # forked by C code that runs no hooks
        renew()
    if callback in _callbacks:
        return
    if not _is_registered:
        _is_registered = True
        atexit.register(_run)
    arm()
    _callbacks[callback] = None


def at_each_exit(callback: Callable[[float], None]) -> None:
    """Call ``callback`` after all of ``at_exit``, also in forked children; again if those run again.

    Args:
        callback: Gets for how many seconds the end of the process was delayed so far.
    """
    _lasting.append(callback)


def arm() -> None:
    """See to it that the callbacks run at the end of this process before a library ends it, or ends its children.

    To be called whenever this process may have come to something that has to be done at its end: a library may have
    been loaded meanwhile, and registered with ``atexit`` after us.
    """
    for name in starters.LIBRARIES:
        util: Any = sys.modules.get(f"{name}.util")
        if not hasattr(util, "Finalize"):
            continue
        if name not in _told:
            _told.add(name)
            util.register_after_fork(_rearm, _rearm)  # one of the two is held weakly, and given to the other
        if name not in _finalized:
            _finalized.add(name)
            util.Finalize(None, _run, (name,), exitpriority=_EXIT_PRIORITY)
    if "billiard" in starters.starters():
        _arm_pool_of_billiard()


def renew() -> None:
    """Start without callbacks in a forked child."""
    global _is_registered, _pid, _spent_seconds  # noqa: PLW0603 - as above
    _pid = os.getpid()
    _is_registered = False
    _spent_seconds = 0.0
    _callbacks.clear()
    _finalized.clear()


def _rearm(_: object) -> None:
    """Arm a child of a library, which has just dropped the finalizers that its parent or an import made."""
    _finalized.clear()
    arm()


def _run(caller: str = "") -> None:
    """Run the callbacks, the latest first. What is interrupted is not run again.

    Args:
        caller: The library that runs its finalizers; empty for ``atexit``.
    """
    global _spent_seconds  # noqa: PLW0603 - as above
    if os.getpid() != _pid:
        return
    # Finalizers may be run at any time. In a program itself those of the standard library come after atexit's.
    if caller == "multiprocessing" and not starters.is_child():
        return
    begun = time.monotonic()
    try:
        while _callbacks:
            callback, _ = _callbacks.popitem()
            callback()
        for lasting in _lasting:
            lasting(_spent_seconds + time.monotonic() - begun)
    finally:
        _spent_seconds += time.monotonic() - begun


def _arm_pool_of_billiard() -> None:
    """Run the callbacks before a worker of billiard's pools ends itself by ``os._exit``.

    The pool offers no hook that it does not give to the program. This process is its worker, so the class is
    changed in workers only.
    """
    worker = getattr(sys.modules.get("billiard.pool"), "Worker", None)
    plain = getattr(worker, "_do_exit", None)
    if worker is None or plain is None or hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def do_exit(*args: object, **kwargs: object) -> None:
        try:
            _run()
        finally:
            plain(*args, **kwargs)  # does not return

    worker._do_exit = do_exit  # noqa: SLF001 - see above


atexit.register(_run)
arm()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=arm, after_in_child=renew)
