"""Results with another dimension as long as the batch: those of all pairs are never kept, others always are."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from torchcache import cache_of, torchcache

Logits = namedtuple("Logits", "images texts features")  # noqa: PYI024 - what is tested is not the class


def stats_of(target):
    return cache_of(target).stats()


def features(n, seed=0, width=5):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def pairs(x):
    return normalize(x) @ normalize(x).T


def padded_to(n):
    return lambda x: nn.functional.pad(pairs(x), (0, -len(x) % n))


#: What a call makes of its batch: in each, something of a row is of another row.
OF_PAIRS = {
    "(B, B)": pairs,
    "(B, B, D)": lambda x: x[:, None] - x[None],
    "(B, 2 * B)": lambda x: torch.cat([pairs(x), -pairs(x)], 1),
    "(B, B * D)": lambda x: (x[:, None] - x[None]).flatten(1),
    "(B, B - 1)": lambda x: pairs(x)[:, 1:],
    "(B, 1, B)": lambda x: pairs(x)[:, None],
    "(B, B) padded to a multiple of 8": padded_to(8),
    "(B, B) padded to a multiple of 64": padded_to(64),
    "ranks of the others": lambda x: pairs(x).argsort(1),
    "the nearest other row": lambda x: (pairs(x) - 2 * torch.eye(len(x))).topk(1).indices,
    "both ways": lambda x: Logits(pairs(x), pairs(x).T, x),
    "nested": lambda x: {"a": [x, {"b": (pairs(x), None)}]},
    "an array": lambda x: (pairs(x).numpy(), x),
    "a list of B per row": lambda x: [x - row for row in x],
    "a dict of B per row": lambda x: {i: x - row for i, row in enumerate(x)},
    "a list of B plain values": lambda x: (x, ["a"] * len(x)),
    "a mask of whom it may see": lambda x: torch.ones(len(x), len(x), dtype=torch.bool).tril(),
    "the same for all": lambda x: torch.ones(len(x), len(x)),
    "zeros": lambda x: torch.zeros(len(x), len(x)),
    "softmax over the others": lambda x: pairs(x).softmax(1),
    "integers": lambda x: (pairs(x) * 100).long(),
}


@pytest.mark.parametrize("n", [2, 3, 5, 8, 40])
@pytest.mark.parametrize("kind", OF_PAIRS)
def test_what_is_of_pairs_is_never_kept(kind, n, cache_dir):
    make = OF_PAIRS[kind]
    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    for _ in range(2):
        cached = torchcache(**options)(lambda x: make(x))  # noqa: PLW0108 - each in a cache of its own
        # All data in one batch, in other orders: the size is always the same.
        x = features(n)
        for rows in (x, x, x.flip(0), x.roll(1, 0)):
            assert repr(cached(rows)) == repr(make(rows))
        assert repr(cached(x[: n - 1])) == repr(make(x[: n - 1])) or n == 2
        assert stats_of(cached).hits == 0
        assert set(stats_of(cached).bypasses) == {"rows_depend_on_batch"}
        cache_of(cached).close()


@pytest.mark.parametrize("kind", OF_PAIRS)
def test_what_is_of_pairs_is_noticed_after_batches_of_one_too(kind):
    make = OF_PAIRS[kind]
    cached = torchcache()(lambda x: make(x))  # noqa: PLW0108 - as above
    x = features(6)
    for rows in (*x.split(1), x, x.flip(0), *x.split(1)):
        assert repr(cached(rows)) == repr(make(rows))
    assert "rows_depend_on_batch" in stats_of(cached).bypasses


class TwoTowers(nn.Module):
    """As CLIP: pairs of what two inputs come to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.text = nn.Linear(5, 4), nn.Embedding(20, 4)

    def forward(self, image, ids, attention_mask):
        images = normalize(self.vision(image))
        texts = normalize((self.text(ids) * attention_mask[:, :, None]).sum(1))
        return {"logits_per_image": images @ texts.T, "image_embeds": images, "text_embeds": texts}


@pytest.mark.parametrize("options", [{}, {"padded": {"ids": "attention_mask"}}, {"batch_size": 3}], ids=str)
def test_logits_of_all_pairs_of_two_inputs_are_not_kept(options):
    model = TwoTowers().eval().requires_grad_(False)
    plain = TwoTowers().eval().requires_grad_(False)
    cached = torchcache(**options)(model)
    for n in (8, 8, 5, 8, 1, 2):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        image = features(n)[order]
        ids = torch.arange(8 * n).reshape(n, 8)[order] % 20
        mask = torch.ones(n, 8)
        found, expected = cached(image, ids, mask), plain(image, ids, mask)
        assert found["logits_per_image"].shape == (n, n)
        assert torch.allclose(found["logits_per_image"], expected["logits_per_image"], atol=1e-6)
    assert stats_of(cached).hits == 0


#: What is each row's own, however many there are, in as many columns as the batch has rows.
OF_ONE_ROW = {
    "as many features": lambda x: x @ torch.ones(x.shape[1], 8),
    "as many classes": lambda x: (x @ torch.ones(x.shape[1], 8)).softmax(1),
    "a multiple": lambda x: x.sum(1, keepdim=True).expand(-1, 16) * torch.arange(16),
    "a list of as many": lambda x: [x * i for i in range(8)],
    "as many plain values": lambda x: (x, list(range(8))),
    "a square for each": lambda x: x[:, :1, None] * torch.ones(8, 8),
    "as many of the same": lambda x: torch.ones(len(x), 8) * x[:, :1].sign(),
    "an array": lambda x: (x @ torch.ones(x.shape[1], 8)).numpy(),
}


@pytest.mark.parametrize("kind", OF_ONE_ROW)
def test_a_row_of_its_own_with_as_many_columns_as_the_batch_has_rows_is_kept(kind):
    make = OF_ONE_ROW[kind]
    cached = torchcache()(lambda x: make(x))  # noqa: PLW0108 - as above
    x = features(8).abs() + torch.arange(8.0)[:, None]
    for rows in (x, x.flip(0), x[:3], x):
        assert repr(cached(rows)) == repr(make(rows))
    assert not stats_of(cached).bypasses
    assert stats_of(cached).misses == 8
    assert stats_of(cached).hits == 8 + 3 + 8


def test_the_line_says_which_shapes_there_were(caplog):
    cached = torchcache()(lambda x: {"logits": pairs(x)})
    cached(features(8))
    (line,) = [line for line in caplog.messages if "rows_depend_on_batch" in line]
    assert "output['logits'] has rows of shape (8,) in a batch of 8" in line
