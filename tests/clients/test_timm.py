"""Models of timm as they are, with random weights."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch

from tests.clients.two_programs import Model, problems_in_two_programs
from tests.clients.with_torchvision import TORCHVISION, import_with_torchvision


def make(name, side, **options):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, side, side, generator=generator)
    return Model(
        import_with_torchvision("timm").create_model(name, pretrained=False, num_classes=0, **options), {"x": images}
    )


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
        ("swin_tiny_patch4_window7_224", 32, {"img_size": 32, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4)}),
        ("mixer_s32_224", 64, {"img_size": 64}),
        ("densenet121", 32, {"block_config": (1, 1)}),
        ("repvgg_a0", 32, {}),
    )
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not TORCHVISION.is_dir(), reason=f"torchvision is not in {TORCHVISION}, where tox.ini puts it")
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm (requirements-clients.txt)")
def test_models_of_timm_hit_in_another_program(tmp_path):
    assert problems_in_two_programs(__file__, tmp_path) == {}
