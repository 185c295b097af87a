"""Functions of a batch whose rows depend on it, each in another way, and functions whose rows are their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Function = Callable[[torch.Tensor], torch.Tensor]


def _stronger_half(x: torch.Tensor) -> torch.Tensor:
    strengths = x.norm(dim=1, keepdim=True)
    return x * (strengths >= strengths.quantile(0.5))


def _noise(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(x.double().sum().mul(1e4)) % (1 << 32))
    return x + 0.1 * torch.randn(x.shape[1:], generator=generator)


DEPENDENT: dict[str, Function] = {
    "size": lambda x: x * len(x),
    "share of the size": lambda x: x / len(x),
    "median": lambda x: x - x.median(0).values,
    "rank": lambda x: x.argsort(0).argsort(0),
    "maximum": lambda x: x - x.amax(0),
    "quantile": lambda x: x - x.quantile(0.9, 0),
    "mean": lambda x: x - x.mean(0),
    "a bit of the mean": lambda x: x + 0.3 * x.mean(0),
    "softmax over the batch": lambda x: x.softmax(0),
    "pairing": lambda x: x + x.roll(1, 0),
    "position": lambda x: x + 0.1 * torch.arange(len(x))[:, None],
    "scale by the largest": lambda x: x / x.abs().max(),
    "clip by the maximum": lambda x: x.clamp(max=0.5 * x.max()),
    "stronger half": _stronger_half,
    "noise from the batch": _noise,
    "length": lambda x: torch.cat([x, torch.full((len(x), 1), float(len(x)))], 1),
    "mean beside a mask": lambda x: torch.cat([x - x.mean(0), torch.full((len(x), 1), -1e9)], 1),
    "second dimension": lambda x: x @ x.T,
    "sum": lambda x: x.cumsum(0),
    "odd or even": lambda x: x * (1 + len(x) % 2),
    "first rows": lambda x: x - x[:2].sum(0),
}

#: Makes a function for rows of a width, and the dtype they have.
_Maker = Callable[[int], nn.Module]


def _deep(dtype: torch.dtype) -> _Maker:
    def make(width: int) -> nn.Module:
        layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())]
        return nn.Sequential(*layers).to(dtype)

    return make


OWN: dict[str, tuple[_Maker, torch.dtype]] = {
    "float32": (_deep(torch.float32), torch.float32),
    "float16": (_deep(torch.float16), torch.float16),
    "bfloat16": (_deep(torch.bfloat16), torch.bfloat16),
    "one output": (lambda width: nn.Linear(width, 1), torch.float32),
    "one output of bfloat16": (lambda width: nn.Linear(width, 1).to(torch.bfloat16), torch.bfloat16),
    "many zeros": (lambda width: nn.Sequential(nn.Linear(width, 2), nn.ReLU()), torch.float32),
    "batch norm": (lambda width: nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)), torch.float32),
    "group norm": (lambda width: nn.GroupNorm(2, width), torch.float32),
    "softmax of a row": (lambda width: nn.Sequential(nn.Linear(width, width), nn.Softmax(1)), torch.float32),
}


def make_own(name: str, width: int, seed: int) -> tuple[nn.Module, torch.dtype]:
    """Make a module whose rows are their own, and say what dtype it takes."""
    make, dtype = OWN[name]
    torch.manual_seed(seed)
    return make(width).eval().requires_grad_(False), dtype
