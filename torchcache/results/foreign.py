"""What to return in place of results that hold objects of other libraries."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from torchcache.keys.origins import module_of


def advice_on(value: object, path: str) -> str | None:
    """Say what a cached call is to return in place of a value that cannot be kept; None if there is no advice.

    Args:
        value: What it returned.
        path: Where in its result, beginning with ``output``.
    """
    for base in type(value).__mro__:
        package = module_of(base).partition(".")[0]
        for where, ending, remedy in _REMEDIES:
            if package == where and base.__name__.endswith(ending):
                return remedy.format(re.sub(r"\['(\w+)'\]", r".\1", path.removeprefix("output")))
    for kind, made in _PLAIN:
        if isinstance(value, kind) and type(value) is not kind:  # a derived class may hold more
            return f"return {made}(x)"
    return None


#: Packages, how names of classes in them end, and what to do.
_REMEDIES: Sequence[tuple[str, str, str]] = (
    (
        "transformers",
        "Cache",
        "call the model with use_cache=False: keys and values of earlier tokens are of no use beside a cached result",
    ),
    (
        "diffusers",
        "Distribution",
        (
            "cache a function or method that returns {0}.mean or {0}.parameters, from which the distribution can be "
            "made again, and draw from it outside"
        ),
    ),
    (
        "torch",
        "Distribution",
        (
            "cache a function or method that returns what it is made of, such as {0}.mean and {0}.stddev, or "
            "{0}.logits, and make the distribution outside"
        ),
    ),
    ("pandas", "Series", "return x.to_dict()"),
    ("pandas", "DataFrame", "return x.to_dict('list')"),
    ("pandas", "Timestamp", "return x.to_pydatetime()"),
    ("pandas", "Timedelta", "return x.to_pytimedelta()"),
    ("pandas", "NAType", "return None"),
    ("datasets", "Dataset", "return x[:], or cache what takes items from it"),
    ("transformers", "BatchEncoding", "return dict(x)"),
    ("transformers", "BatchFeature", "return dict(x)"),
    ("numpy", "MaskedArray", "return x.data and x.mask"),
)

#: Kinds that are kept where they are of the very class, and what makes one of a derived class.
_PLAIN: Sequence[tuple[type, str]] = (
    (np.ndarray, "np.asarray"),
    (str, "str"),
    (bytes, "bytes"),
    (int, "int"),
    (float, "float"),
    (complex, "complex"),
    (list, "list"),
    (tuple, "tuple"),
    (set, "set"),
    (frozenset, "frozenset"),
    (Mapping, "dict"),
    (pathlib.PurePath, "pathlib.Path"),
    (Iterator, "list"),
)
