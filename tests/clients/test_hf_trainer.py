"""A frozen encoder beside a head that Hugging Face's Trainer trains, evaluates and keeps."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.clients.two_programs import run_program
from torchcache import cache_of, torchcache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None,
        reason="needs transformers and accelerate (requirements-clients.txt)",
    ),
]

N_ROWS = 8
EPOCHS = 3


def train(folder, mode):
    """Train a head over a frozen encoder; return the losses, hits and misses, and what the last checkpoint holds."""
    import transformers
    from safetensors.torch import load_file

    class Frozen(transformers.BertModel):
        def train(self, mode=True):
            return super().train(False)

    class Classifier(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder
            self.head = nn.Linear(16, 2)

        def forward(self, input_ids, attention_mask, labels):
            hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.head(hidden[:, 0])
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    warnings.simplefilter("ignore")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    torch.manual_seed(0)
    encoder = Frozen(config).eval().requires_grad_(False)
    if mode != "none":
        encoder = torchcache(persistent=True, persistent_cache_dir=folder / "cache", mode=mode)(encoder)
    rows = torch.randint(1, 50, (N_ROWS, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 2} for i, row in enumerate(rows)]
    arguments = transformers.TrainingArguments(
        output_dir=folder / mode, num_train_epochs=EPOCHS, per_device_train_batch_size=4, eval_strategy="epoch",
        save_strategy="epoch", logging_strategy="epoch", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(Classifier(encoder), arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    (kept,) = (folder / mode).glob(f"checkpoint-{trainer.state.global_step}/model.safetensors")
    said = {
        "losses": [line.get("loss", line.get("eval_loss")) for line in trainer.state.log_history],
        "checkpoint": sorted(load_file(kept)),
    }
    if mode != "none":
        stats = cache_of(encoder).stats()
        said |= {"hits": stats.hits, "misses": stats.misses, "bypasses": dict(stats.bypasses)}
        cache_of(encoder).close()
    return said


def test_a_head_is_trained_alike_and_the_encoder_computes_each_row_once(tmp_path):
    said = {}
    for seed, mode in enumerate(("none", "on", "require")):
        output = run_program("tests.clients.test_hf_trainer", tmp_path, mode, seed=seed)
        said[mode] = json.loads(output.splitlines()[-1])
    plain = said.pop("none")
    n_asked = 2 * EPOCHS * N_ROWS
    for mode, trained in said.items():
        misses = N_ROWS if mode == "on" else 0
        assert (trained["misses"], trained["hits"], trained["bypasses"]) == (misses, n_asked - misses, {})
        assert trained["losses"] == plain["losses"]
        assert trained["checkpoint"] == plain["checkpoint"]


if __name__ == "__main__":
    print(json.dumps(train(Path(sys.argv[1]), sys.argv[2])), flush=True)
