"""The settings of thread and process that change the bytes of a result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

#: Devices that have an autocast state of their own.
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "privateuseone")

_OF_CPU = (
    "_get_cpu_allow_fp16_reduced_precision_reduction", "_get_mkldnn_enabled", "_get_nnpack_enabled",
    "_get_flash_sdp_enabled", "_get_math_sdp_enabled", "_get_math_sdp_allow_fp16_bf16_reduction",
)  # fmt: skip
_OF_CUDA = (
    "_get_cublas_allow_tf32", "_get_cudnn_allow_tf32", "_get_cublas_allow_fp16_reduced_precision_reduction",
    "_get_cublas_allow_bf16_reduced_precision_reduction", "_get_cublas_allow_fp16_accumulation", "_get_cudnn_enabled",
    "_get_mem_efficient_sdp_enabled", "_get_cudnn_sdp_enabled",
)  # fmt: skip

#: Precision and choice of kernels, as torch's own ``backends`` modules ask for them, which cost three times as much.
#: Numbers of threads do not count: a worker has one, its parent many, and they share a cache.
_FLAGS: tuple[Callable[[], object], ...] = tuple(
    getattr(torch._C, name)  # noqa: SLF001
    for name in (*_OF_CPU, *(_OF_CUDA if torch.backends.cuda.is_built() else ()))
    if hasattr(torch._C, name)  # noqa: SLF001
)

#: Per backend and operation, from torch 2.9 on; the setters of these reach ``_FLAGS`` only in part.
_PRECISION: Callable[[str, str], object] | None = getattr(torch._C, "_get_fp32_precision_getter", None)  # noqa: SLF001
_BACKENDS = ("mkldnn", *(("cuda",) if torch.backends.cuda.is_built() else ()))
_OPERATIONS = [(backend, operation) for backend in _BACKENDS for operation in ("matmul", "conv", "rnn")]

#: The smallest number above zero: a thread that flushes such numbers makes nothing of it.
_SMALLEST = [5e-324, 1.0]


def current_mode() -> tuple[object, ...]:
    """Return the settings in force where the call is made; equal tuples mean equal bytes."""
    return (
        autocast_in_force(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        _SMALLEST[0] * _SMALLEST[1] == 0.0,  # torch.set_flush_denormal has no getter
        [flag() for flag in _FLAGS],
        # "none" and "ieee" are the same: what a backend inherits is resolved already.
        []
        if _PRECISION is None
        else [_PRECISION(*place) not in ("none", "ieee") and _PRECISION(*place) for place in _OPERATIONS],
        [
            str(mode.device)
            for mode in _function_modes()
            if isinstance(mode, DeviceContext) and mode.device.type != "cpu"
        ],
    )


def ambient_reason() -> str | None:
    """Say why nothing can be cached where the call is made, or None."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:  # noqa: SLF001
        return "global_module_hooks"  # they run on inner modules too, and may change what these return
    if torch._C._len_torch_dispatch_stack():  # noqa: SLF001 - torch has no public question
        return "torch_dispatch_mode"
    if any(not isinstance(mode, DeviceContext) for mode in _function_modes()):
        return "torch_function_mode"
    return None


def _function_modes() -> list[object]:
    if not torch._C._len_torch_function_stack():  # noqa: SLF001 - the usual case, at once
        return []
    return list(_get_current_function_mode_stack())


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
