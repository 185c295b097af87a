"""The names of what torchcache puts on a user's own classes, modules, functions and objects.

The doors put it there, and whatever names code or state leaves it out: it is no part of what the user wrote. This
module does not import torch.
"""

from __future__ import annotations

#: On a class or an instance, an option that the user sets: ``torchcache_<option>``.
OPTION_PREFIX = "torchcache_"

#: On what a door decorated, its cache.
CACHE = "cache_instance"

#: On a function or an object of ours that stands where the user's own stood: that one, or None if nothing stood there.
ORIGINAL = "__torchcache_original__"

#: On a decorated class, the options that it was decorated with.
OPTIONS = "__torchcache_options__"

#: On an instance of a decorated class, what names its construction arguments.
ARGUMENTS = "_torchcache_arguments"

#: Beside it, name and digest of each of them.
ARGUMENT_PARTS = "_torchcache_argument_parts"

#: In the ``__dict__`` of a module that was decorated by itself, how it is called.
FORWARD = "forward"

#: In the ``__dict__`` of a module that holds something bound to it, how it is copied.
COPYING = ("__getstate__", "_replicate_for_data_parallel")

#: On a function of ours, beside what ``functools.wraps`` copied.
ON_FUNCTIONS = frozenset({CACHE, ORIGINAL})

_ON_INSTANCES = (OPTION_PREFIX, "_torchcache_")

#: ``torch.jit.script`` is told there to leave our property alone.
_ON_CLASSES = (OPTION_PREFIX, "__torchcache_", "__jit_unused_properties__")


def is_on_instances(name: str) -> bool:
    """Tell whether an attribute of an instance is ours, or one of the options that a user sets for us."""
    return name == CACHE or name.startswith(_ON_INSTANCES)


def is_on_classes(name: str) -> bool:
    """Tell whether an attribute of a class is ours, or one of the options that a user sets for us."""
    return name == CACHE or name.startswith(_ON_CLASSES)
