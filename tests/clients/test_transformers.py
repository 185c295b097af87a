"""Models of transformers as they are, with random weights, and what its recording of hidden states leaves on them."""

from __future__ import annotations

import copy
import importlib.util
from typing import ClassVar

import pytest
import torch

from tests.clients.two_programs import Model, problems_in_two_programs
from torchcache import cache_of, disabled, torchcache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="the extra 'examples' is not installed"
    ),
]

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {**SIZES, "vocab_size": 50, "pad_token_id": 0}
PICTURE = {**SIZES, "image_size": 8, "patch_size": 4}
WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 50, "num_mel_bins": 8, "max_source_positions": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAV2VEC2 = {
    **SIZES, "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def tokens(**more):
    ids = torch.arange(1, 25).reshape(4, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def decoded(**more):
    return {"input_ids": tokens()["input_ids"], "use_cache": False, **more}


def pixels(side=8, **more):
    return {"pixel_values": torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)), **more}


def make(name, config, inputs, model=None, **options):
    import transformers

    made = getattr(transformers, f"{name}Model")._from_config(getattr(transformers, config[0])(**config[1]), **options)
    return Model(made if model is None else getattr(made, model), inputs)


def text(name, inputs=None, **options):
    return lambda: make(name, (f"{name}Config", {**TEXT, **options}), inputs or tokens())


def picture(name, inputs=None, **options):
    return lambda: make(name, (f"{name}Config", {**PICTURE, **options}), inputs or pixels())


STATES = {"output_hidden_states": True}
MODELS = {
    "Bert": text("Bert"),
    "Roberta": text("Roberta"),
    "DebertaV2": text("DebertaV2"),
    "Electra": text("Electra", embedding_size=16),
    "Albert": text("Albert", embedding_size=16),
    "MPNet": text("MPNet"),
    "Mistral": text("Mistral", decoded(), head_dim=8, num_key_value_heads=1),
    "ModernBert": text("ModernBert", global_attn_every_n_layers=2),
    "DistilBert": lambda: make(
        "DistilBert", ("DistilBertConfig", {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2}), tokens()
    ),
    "GPT2": lambda: make(
        "GPT2", ("GPT2Config", {"vocab_size": 50, "n_layer": 1, "n_head": 2, "n_embd": 16}), decoded()
    ),
    "Llama": text("Llama", decoded()),
    "Qwen3": text("Qwen3", decoded(), head_dim=8, num_key_value_heads=2),
    "Gemma": text("Gemma", decoded(), head_dim=8, num_key_value_heads=2),
    "T5": lambda: make(
        "T5Encoder",
        ("T5Config", {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
        tokens(),
    ),
    "ViT": picture("ViT"),
    "ViTMSN": picture("ViTMSN"),
    "Dinov2": picture("Dinov2"),
    "DeiT": picture("DeiT"),
    "Beit": picture("Beit"),
    "CLIPVision": picture("CLIPVision"),
    "CLIPText": text("CLIPText", eos_token_id=2),
    "SiglipVision": picture("SiglipVision"),
    "ResNet": lambda: make(
        "ResNet", ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}), pixels(32)
    ),
    "ConvNext": lambda: make(
        "ConvNext", ("ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}), pixels(32)
    ),
    "Swin": lambda: make(
        "Swin",
        ("SwinConfig", {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2],
                        "window_size": 2}),
        pixels(16),
    ),
    "Wav2Vec2": lambda: make("Wav2Vec2", ("Wav2Vec2Config", WAV2VEC2), {"input_values": torch.rand(4, 400)}),
    "Whisper's encoder": lambda: make(
        "Whisper", ("WhisperConfig", WHISPER), {"input_features": torch.rand(4, 8, 16)}, "encoder"
    ),
    # The first call that asks installs hooks on the layers.
    "Bert, states": text("Bert", tokens(**STATES)),
    "Bert, attentions": lambda: make(
        "Bert", ("BertConfig", TEXT), tokens(output_attentions=True), attn_implementation="eager"
    ),
    "ViT, states": picture("ViT", pixels(**STATES)),
    "CLIPVision, states": picture("CLIPVision", pixels(**STATES)),
    "Llama, states": text("Llama", decoded(**STATES)),
    "T5, states": lambda: make(
        "T5Encoder",
        ("T5Config", {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
        tokens(**STATES),
    ),
    "Whisper's encoder, states": lambda: make(
        "Whisper", ("WhisperConfig", WHISPER), {"input_features": torch.rand(4, 8, 16), **STATES}, "encoder"
    ),
}  # fmt: skip


def test_models_of_transformers_hit_in_another_program(tmp_path):
    assert problems_in_two_programs(__file__, tmp_path) == {}


# -- hooks that record are not always the same -------------------------------------------------------------------------


@pytest.fixture
def recorded():
    """A cached model whose layers have the hooks."""
    torch.manual_seed(0)
    model = torchcache()(MODELS["ViT"]().module.eval().requires_grad_(False))
    for _ in range(2):
        model(**pixels(**STATES))
    assert (cache_of(model).stats().misses, cache_of(model).stats().memory_hits) == (4, 4)
    return model


def assert_returns_what_it_would_compute(model, n_states):
    with disabled():
        expected = model(**pixels(**STATES))
    returned = model(**pixels(**STATES))
    assert len(returned.hidden_states) == len(expected.hidden_states) == n_states
    assert all(map(torch.equal, returned.hidden_states, expected.hidden_states))


def test_a_layer_that_was_put_in_later_records_nothing(recorded):
    new = copy.deepcopy(recorded.layers[0])
    new._forward_hooks.clear()
    recorded.layers[0] = new
    assert_returns_what_it_would_compute(recorded, 2)


def test_hooks_that_were_removed_record_nothing(recorded):
    recorded.layers[1]._forward_hooks.clear()
    assert_returns_what_it_would_compute(recorded, 2)


def test_hooks_that_were_installed_twice_record_twice(recorded):
    from transformers.utils.output_capturing import install_all_output_capturing_hooks

    install_all_output_capturing_hooks(recorded)
    assert_returns_what_it_would_compute(recorded, 5)


def test_a_hook_behind_those_that_record_counts_beside_them(recorded):
    recorded.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    assert_returns_what_it_would_compute(recorded, 3)


def test_a_model_whose_inner_model_was_asked_before_it_records_more(cache_dir):
    from transformers import ViTModel
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.models.vit.modeling_vit import ViTLayer, ViTPreTrainedModel
    from transformers.utils.output_capturing import capture_outputs

    class Outer(ViTPreTrainedModel):
        _can_record_outputs: ClassVar = {"hidden_states": ViTLayer}

        def __init__(self, config):
            super().__init__(config)
            self.vit = ViTModel(config)

        @capture_outputs
        def forward(self, pixel_values, **kwargs):
            inner = self.vit(pixel_values, **kwargs)
            return BaseModelOutput(last_hidden_state=inner.last_hidden_state, attentions=inner.hidden_states)

    config = MODELS["ViT"]().module.config
    n_returned = []
    for is_asked_before in (False, True):
        torch.manual_seed(0)
        model = Outer(config).eval().requires_grad_(False)
        if is_asked_before:
            model.vit(**pixels(**STATES))
        expected = copy.deepcopy(model)(**pixels(**STATES)).attentions
        cached = torchcache(persistent=True, persistent_cache_dir=cache_dir)(model)
        returned = cached(**pixels(**STATES)).attentions
        cache_of(cached).close()
        assert len(returned) == len(expected)
        n_returned.append(len(returned))
    assert n_returned == [3, 5]
