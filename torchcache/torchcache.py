"""Where 0.6 had its code: imports from there say where the names are now.

``torchcache.torchcache`` itself is the decorator; nothing imports this module but code written for 0.6.
"""

from __future__ import annotations

raise ImportError(
    "torchcache.torchcache is a module of torchcache 0.6 that is gone; write: from torchcache import torchcache"
)
