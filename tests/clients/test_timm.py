"""Models of timm as they are, with random weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from tests.clients.two_programs import Model, problems_in_two_programs

#: Where tox.ini puts torchvision, which timm imports.
TORCHVISION = Path(sys.prefix) / "torchvision"


@cache
def timm():
    """Import timm, and with it torchvision, which describes operators that are not there; nothing here calls them."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(TORCHVISION))
    return importlib.import_module("timm"), library


def make(name, side, **options):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, side, side, generator=generator)
    return Model(timm()[0].create_model(name, pretrained=False, num_classes=0, **options), {"x": images})


#: Small depths and images: what is tried is code and state.
MODELS = {
    name: partial(make, name, side, **options)
    for name, side, options in (
        ("resnet18", 32, {}),
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
        ("deit3_small_patch16_224", 32, {"img_size": 32, "depth": 1}),
        ("eva02_tiny_patch14_224", 28, {"img_size": 28, "depth": 1}),
        ("convnext_atto", 32, {}),
        ("efficientnet_b0", 32, {}),
        ("mobilenetv3_small_050", 32, {}),
        ("regnetx_002", 32, {}),
    )
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not TORCHVISION.is_dir(), reason=f"torchvision is not in {TORCHVISION}, where tox.ini puts it")
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm (requirements-clients.txt)")
def test_models_of_timm_hit_in_another_program(tmp_path):
    assert problems_in_two_programs(__file__, tmp_path) == {}
