"""Whether caching is off, for a thread or for a whole program."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

_disabled: ContextVar[bool] = ContextVar("torchcache_disabled", default=False)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Run the body as if nothing were cached, in this thread (or asyncio task).

    Nothing is looked up, stored or detached. TORCHCACHE_DISABLED=1 does the same for a whole program.
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def is_disabled() -> bool:
    """Tell whether caching is off here: inside ``disabled()`` or by TORCHCACHE_DISABLED."""
    return _disabled.get() or os.environ.get("TORCHCACHE_DISABLED", "") not in ("", "0")
