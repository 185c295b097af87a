"""Towers of open_clip, as modules and as the methods that people call."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.clients.two_programs import Model, problems_in_two_programs
from tests.clients.with_torchvision import TORCHVISION, import_with_torchvision
from torchcache import cache_of, disabled, torchcache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not TORCHVISION.is_dir(), reason=f"torchvision is not in {TORCHVISION}, where tox.ini puts it"),
    pytest.mark.skipif(
        importlib.util.find_spec("open_clip") is None, reason="needs open_clip (requirements-clients.txt)"
    ),
]

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(1, 50, (4, 8), generator=torch.Generator().manual_seed(1))


def make(kind="CLIP"):
    models = import_with_torchvision("open_clip.model")
    vision = models.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = models.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    return getattr(models, kind)(16, vision, text)


MODELS = {
    "image tower": lambda: Model(make().visual, {"x": IMAGES}),
    "text tower": lambda: Model(make("CustomTextCLIP").text, {"text": TOKENS}),
}


def test_towers_hit_in_another_program(tmp_path):
    assert problems_in_two_programs(__file__, tmp_path) == {}


@pytest.mark.parametrize(("method", "batch"), [("encode_image", IMAGES), ("encode_text", TOKENS)])
def test_methods_return_what_the_model_does(method, batch):
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    encode = torchcache()(getattr(model, method))
    for normalize in (False, True):
        for rows in (range(4), [3, 1, 0, 2], [2, 2]):
            with disabled():
                expected = encode(batch[[*rows]], normalize=normalize)
            torch.testing.assert_close(encode(batch[[*rows]], normalize=normalize), expected)
    assert (cache_of(encode).stats().misses, cache_of(encode).stats().hits) == (8, 12)
