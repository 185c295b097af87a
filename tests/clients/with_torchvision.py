"""Imports libraries that import torchvision, where tox.ini puts it."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

TORCHVISION = Path(sys.prefix) / "torchvision"


@cache
def _describe_operators() -> torch.library.Library:
    """Describe the operators of torchvision's C++, which was built for another torch; nothing here calls them."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(TORCHVISION))
    return library


def import_with_torchvision(name: str) -> ModuleType:
    """Import a library, and with it torchvision."""
    _describe_operators()
    return importlib.import_module(name)
