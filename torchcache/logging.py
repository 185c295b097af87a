"""Where 0.6 set up its log: imports from there say where that is now."""

from __future__ import annotations

raise ImportError(
    "torchcache.logging is a module of torchcache 0.6 that is gone; write: from torchcache import set_logger_config"
)
