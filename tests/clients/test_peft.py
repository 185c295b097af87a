"""Models with adapters of PEFT, with random weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.clients.two_programs import Model, problems_in_two_programs


def inputs(**more):
    ids = torch.arange(1, 25).reshape(4, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(**sizes, vocab_size=50))


def adapted(kind="LoraConfig", **options):
    import peft

    return peft.get_peft_model(bert(), getattr(peft, kind)(**options))


def lora(**options):
    return adapted(r=2, target_modules=["query", "value"], init_lora_weights=False, **options)


def disabled():
    model = lora()
    model.base_model.disable_adapter_layers()
    return model


IA3 = {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"], "init_ia3_weights": False}
PROMPT = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 2}
MODELS = {
    "LoRA": lambda: Model(lora(), inputs()),
    "DoRA": lambda: Model(lora(use_dora=True), inputs()),
    "LoHa": lambda: Model(adapted("LoHaConfig", r=2, target_modules=["query"], init_weights=False), inputs()),
    "IA3": lambda: Model(adapted("IA3Config", **IA3), inputs()),
    "prompts": lambda: Model(adapted("PromptTuningConfig", **PROMPT), inputs()),
    "merged": lambda: Model(lora().merge_and_unload(), inputs()),
    "disabled": lambda: Model(disabled(), inputs()),
    "LoRA, states": lambda: Model(lora(), inputs(output_hidden_states=True)),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft (requirements-clients.txt)")
def test_models_with_adapters_hit_in_another_program(tmp_path):
    assert problems_in_two_programs(__file__, tmp_path) == {}
