"""The settings of thread and process that change the bytes of a result.

They are asked for at every call, so torch's own functions in Python are asked only where a torch lacks what is behind
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import zip_longest
from operator import getitem

import torch
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from torchcache.report.reasons import Reason

#: Devices that have an autocast state of their own.
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "privateuseone")

_OF_CPU = (
    "_get_cpu_allow_fp16_reduced_precision_reduction", "_get_mkldnn_enabled", "_get_nnpack_enabled",
    "_get_flash_sdp_enabled", "_get_math_sdp_enabled", "_get_math_sdp_allow_fp16_bf16_reduction",
    "_get_onednn_allow_tf32",
)  # fmt: skip
_OF_CUDA = (
    "_get_cublas_allow_fp16_reduced_precision_reduction", "_get_cublas_allow_bf16_reduced_precision_reduction",
    "_get_cublas_allow_fp16_accumulation", "_get_cudnn_enabled", "_get_mem_efficient_sdp_enabled",
    "_get_cudnn_sdp_enabled",
)  # fmt: skip

#: What float32 is computed in, up to torch 2.8.
_OLD_PRECISIONS = ("_get_float32_matmul_precision", "_get_cublas_allow_tf32", "_get_cudnn_allow_tf32")

#: The same from torch 2.9 on: by backend and operation, with what an operation inherits from the others. The old
#: setters set these too, and the kernels ask for nothing else. The old getters are not called there: they raise once
#: the new setters said what they cannot express.
_PRECISION: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)  # noqa: SLF001
_BACKENDS = ("mkldnn",) * 4 + ("cuda",) * 4
_OPERATIONS = ("matmul", "conv", "rnn", "all") * 2

#: Precision and choice of kernels, as torch's own ``backends`` modules ask for them, which cost three times as much.
#: Numbers of threads do not count: a worker has one, its parent many, and they share a cache.
_FLAGS: tuple[Callable[[], object], ...] = tuple(
    getattr(torch._C, name)  # noqa: SLF001
    for name in (
        *_OF_CPU,
        *(_OF_CUDA if torch.backends.cuda.is_built() else ()),
        *(_OLD_PRECISIONS if _PRECISION is None else ()),
    )
    if hasattr(torch._C, name)  # noqa: SLF001
)

#: Where ``torch.backends.opt_einsum.enabled`` and ``strategy`` are, which decide the order that an einsum of three
#: operands or more is computed in: what users assign is in the first, and what it has by default in the second. To ask
#: for both by attribute costs 3 microseconds.
_EINSUM: Mapping[str, object] = vars(torch.backends.opt_einsum)
_EINSUM_DEFAULTS: Mapping[str, object] = vars(getattr(torch.backends.opt_einsum, "m", torch.backends.opt_einsum))

#: Whether deterministic algorithms are demanded, and whether nn.MultiheadAttention may take its fast path.
_IS_DETERMINISTIC: Callable[[], bool] = (
    getattr(torch._C, "_get_deterministic_algorithms", None)  # noqa: SLF001
    or torch.are_deterministic_algorithms_enabled
)
_HAS_FAST_PATH: Callable[[], object] = (
    partial(getitem, vars(torch.backends.mha), "_is_fastpath_enabled")
    if "_is_fastpath_enabled" in vars(torch.backends.mha)
    else torch.backends.mha.get_fastpath_enabled
)

#: The smallest number above zero: a thread that flushes such numbers makes nothing of it.
_SMALLEST = [5e-324, 1.0]


def current_mode() -> tuple[object, ...]:
    """Return the settings in force where the call is made; equal tuples mean equal bytes."""
    return (
        autocast_in_force(),
        torch.get_default_dtype(),
        _IS_DETERMINISTIC(),
        _HAS_FAST_PATH(),
        _SMALLEST[0] * _SMALLEST[1] == 0.0,  # torch.set_flush_denormal has no getter
        [flag() for flag in _FLAGS],
        _float32_precisions(),
        _EINSUM.get("enabled", _EINSUM_DEFAULTS.get("enabled")),
        _EINSUM.get("strategy", _EINSUM_DEFAULTS.get("strategy")),
        _default_devices() if torch._C._len_torch_function_stack() else [],  # noqa: SLF001 - the usual case, at once
    )


#: What the settings in the order of ``current_mode`` are called; a state may add its rank.
_SETTINGS = (
    "autocast", "default dtype", "deterministic algorithms", "fast path of attention", "denormal numbers",
    "kernels of backends", "float32 precision", "einsum", "einsum strategy", "default device", "rank", "other ranks",
)  # fmt: skip


def differing_settings(before: tuple[object, ...], after: tuple[object, ...]) -> list[str]:
    """Return the names of the settings that differ between two modes."""
    return [name for name, old, new in zip_longest(_SETTINGS, before, after, fillvalue="setting") if old != new]


def setting_parts(mode: tuple[object, ...]) -> list[tuple[str, bytes]]:
    """Return each setting of a mode by name, as parts of a key."""
    named = zip_longest(_SETTINGS, mode)
    return [(f"setting:{name}", repr(value).encode()) for name, value in named if value is not None]


def is_precision_reduced() -> bool:
    """Tell whether matrix products of float32 are computed in less, on any device."""
    if _PRECISION is None:
        return torch.get_float32_matmul_precision() != "highest"
    return set(_float32_precisions().split()[:5]) != {"ieee"}  # the fifth is CUDA's for matrix products


def _float32_precisions() -> str:
    """Return what each backend computes each operation of float32 in, where this torch tells them apart."""
    if _PRECISION is None:
        return ""
    # "none" is what a backend has that nothing was set for, and the same as "ieee".
    return " ".join(map(_PRECISION, _BACKENDS, _OPERATIONS)).replace("none", "ieee")


def ambient_reason() -> Reason | None:
    """Say why nothing can be cached where the call is made, or None."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:  # noqa: SLF001
        return Reason.GLOBAL_MODULE_HOOKS  # they run on inner modules too, and may change what these return
    if parametrize._cache:  # noqa: SLF001 - torch has no public question
        return Reason.PARAMETRIZATIONS_HELD
    if torch._C._len_torch_dispatch_stack():  # noqa: SLF001 - nor here
        return Reason.TORCH_DISPATCH_MODE
    if not torch._C._len_torch_function_stack():  # noqa: SLF001 - the usual case, at once
        return None
    if all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()):
        return None
    return Reason.TORCH_FUNCTION_MODE


def _default_devices() -> list[str]:
    """Return the devices that new tensors are made on, other than the CPU, the outermost context's first."""
    contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    return [str(context.device) for context in contexts if context.device.type != "cpu"]


def autocast_in_force() -> tuple[object, ...]:
    """Return each device that autocast is on for, with its dtype."""
    if not torch._C._is_any_autocast_enabled():  # noqa: SLF001 - the usual case, at once
        return ()
    enabled = []
    for device in _AUTOCAST_DEVICES:
        try:
            if torch.is_autocast_enabled(device):
                enabled.append((device, torch.get_autocast_dtype(device)))
        except RuntimeError:  # a device that this torch does not know
            continue
    return tuple(enabled)
