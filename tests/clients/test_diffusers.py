"""Models of diffusers as they are, with random weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.clients.two_programs import Model, problems_in_two_programs

BLOCKS = {"block_out_channels": (8,), "norm_num_groups": 4}
UNET = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def images(n_channels=3, side=16):
    return torch.rand(4, n_channels, side, side, generator=torch.Generator().manual_seed(0))


def autoencoder():
    from diffusers import AutoencoderKL

    return AutoencoderKL(**BLOCKS)


def tiny():
    from diffusers import AutoencoderTiny

    one = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    few = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return Model(AutoencoderTiny(**few, **one), {"sample": images()})


def unet():
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return Model(UNet2DModel(**UNET, **blocks), {"sample": images(side=8), "timestep": 3})


def conditional_unet():
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    module = UNet2DConditionModel(**UNET, **blocks, cross_attention_dim=8, attention_head_dim=2)
    states = images(side=8).reshape(4, 24, 8)
    return Model(module, {"sample": images(4, 8), "timestep": 3, "encoder_hidden_states": states})


MODELS = {
    # It notes which options it was not given, from a set: another list in each process.
    "AutoencoderKL": lambda: Model(autoencoder(), {"sample": images()}),
    "its encoder": lambda: Model(autoencoder().encoder, {"sample": images()}),
    "its decoder": lambda: Model(autoencoder().decoder, {"sample": images(4, 8)}),
    "AutoencoderTiny": tiny,
    "UNet2DModel": unet,
    "UNet2DConditionModel": conditional_unet,
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers (requirements-clients.txt)")
def test_models_of_diffusers_hit_in_another_program(tmp_path):
    assert problems_in_two_programs(__file__, tmp_path) == {}
