"""The settings of thread and process that change the bytes of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

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

#: The smallest number above zero: a thread that flushes such numbers makes nothing of it.
_SMALLEST = [5e-324, 1.0]


def current_mode() -> tuple[object, ...]:
    """Return the settings in force where the call is made; equal tuples mean equal bytes."""
    return (
        autocast_in_force(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        _SMALLEST[0] * _SMALLEST[1] == 0.0,  # torch.set_flush_denormal has no getter
        [flag() for flag in _FLAGS],
        _float32_precisions(),
        _EINSUM.get("enabled", _EINSUM_DEFAULTS.get("enabled")),
        _EINSUM.get("strategy", _EINSUM_DEFAULTS.get("strategy")),
        [
            str(mode.device)
            for mode in _function_modes()
            if isinstance(mode, DeviceContext) and mode.device.type != "cpu"
        ],
    )


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


def ambient_reason() -> str | None:
    """Say why nothing can be cached where the call is made, or None."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:  # noqa: SLF001
        return "global_module_hooks"  # they run on inner modules too, and may change what these return
    if parametrize._cache:  # noqa: SLF001 - torch has no public question
        return "parametrizations_held"
    if torch._C._len_torch_dispatch_stack():  # noqa: SLF001 - nor here
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
