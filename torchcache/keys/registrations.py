"""Which functions are registered for operators of ``torch.ops``, from the import of torchcache on.

Torch hands them to its dispatcher, which does not give them back. This module does not import torch.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

#: Namespaces of torch's own operators.
OF_TORCH = frozenset({
    "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_native", "_quantized", "_test", "aten", "c10d",
    "c10d_functional", "debug_mode_ops", "debugprims", "export", "fsdp", "higher_order", "inductor", "inductor_prims",
    "mkl", "mkldnn", "mkldnn_prepacked", "onednn", "prim", "prims", "profiler", "quantization", "quantized",
    "quantized_decomposed", "rngprims", "sparse", "static_runtime", "symm_mem", "xnnpack",
})  # fmt: skip

#: Functions by their keys. The dispatcher keeps them as long as they are registered.
_noted: dict[str, Callable[[], object]] = {}
_n_noted = 0

_MARK = "__torchcache_notes__"


def registered() -> set[str]:
    """Return the key of each function that is registered now: namespace/operator/dispatch key."""
    return getattr(sys.modules.get("torch.library"), "_impls", None) or set()


def noted(key: str) -> object:
    """Return the function that was registered under a key, if that was noted."""
    function = _noted.get(key)
    return None if function is None else function()


def count_noted() -> int:
    """Return how often a function was registered: one may have taken the place of another."""
    return _n_noted


def note_registrations() -> None:
    """Note from now on what is registered, if torch is loaded."""
    library: Any = getattr(sys.modules.get("torch.library"), "Library", None)
    original: Callable[..., object] | None = getattr(library, "impl", None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def impl(self: Any, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> object:  # noqa: ANN401
        result = original(self, op_name, fn, dispatch_key, **options)
        name = op_name if isinstance(op_name, str) else getattr(op_name, "_name", "")
        _note(f"{self.ns}/{name.rpartition('::')[2]}/{dispatch_key or self.dispatch_key}", fn)
        return result

    setattr(impl, _MARK, True)
    library.impl = impl


def _note(key: str, function: object) -> None:
    global _n_noted  # noqa: PLW0603 - tells that another function took the place of one
    if key.partition("/")[0] not in OF_TORCH:
        try:
            _noted[key] = weakref.ref(function)
        except TypeError:
            _noted[key] = lambda: function
        _n_noted += 1
