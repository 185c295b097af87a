"""Kinds of layers and weights: which are torch's own, and whose results are no function of each sample alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchcache.keys.tensor_kinds import has_elements
from torchcache.report.reasons import Reason


def reason_of(modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor]) -> Reason | None:
    """Say why results of these modules are not a function of each sample alone, or None."""
    for module in modules:
        reason = _reason_of_module(module)
        if reason is not None:
            return reason
    for tensor in tensors:
        if is_lazy(tensor):
            return Reason.UNINITIALIZED_PARAMETERS
        if tensor.is_meta:
            return Reason.META_TENSOR
        if not has_elements(tensor):
            return Reason.OPAQUE_WEIGHTS
    return None


#: Reasons for which there are no weights to look at.
WITHOUT_WEIGHTS = (Reason.UNINITIALIZED_PARAMETERS, Reason.META_TENSOR, Reason.OPAQUE_WEIGHTS)


def _reason_of_module(module: nn.Module) -> Reason | None:
    if isinstance(module, torch.jit.ScriptModule):
        return Reason.SCRIPTED_MODULE
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of all batch norms
        if module.training:
            return Reason.BATCH_NORM_IN_TRAINING_MODE
        return Reason.BATCH_NORM_WITHOUT_RUNNING_STATISTICS if module.running_mean is None else None
    if module.training and _is_random(module):
        return Reason.DROPOUT_IN_TRAINING_MODE
    return None


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the base of all dropouts
        return module.p > 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return float(module.dropout) > 0
    return isinstance(module, nn.RReLU)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is what ``torch.compile(module)`` returns, without importing the compiler."""
    return type(module).__name__ == "OptimizedModule" and type(module).__module__ == "torch._dynamo.eval_frame"


def is_of_torch(module: nn.Module) -> bool:
    """Tell whether a module's forward is torch's and uses just what its constructor made."""
    name = type(module).__module__
    return name.startswith("torch.nn.modules.") and name != "torch.nn.modules.container"
