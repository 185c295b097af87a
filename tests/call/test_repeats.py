"""A cache of which no sample is asked for twice says so once, and what it sees of them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchcache import cache_of, torchcache

IMAGES = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def backbone():
    return torchcache()(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval().requires_grad_(False))


@pytest.fixture
def lines(caplog):
    """Return a function that returns what the log has said of samples so far."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if "samples w" in r.getMessage() or "of 1" in r.getMessage()]


def crops(model, epochs):
    for epoch in epochs:
        for batch in IMAGES.split(25):
            model(batch.roll(epoch, -1) + epoch)


def test_random_crops_are_noticed_and_named(lines):
    model = backbone()
    crops(model, range(2))
    assert lines() == []
    crops(model, range(2, 8))
    (line,) = lines()
    assert "none was asked for twice (all of shape (3, 4, 4), each with other bytes)" in line
    assert "random crop" in line
    assert "In a first epoch that is as it should be" in line


def test_a_first_epoch_of_a_data_loader_is_none(lines):
    model = backbone()
    loader = DataLoader(TensorDataset(torch.rand(1200, 3, 4, 4)), batch_size=50)
    for (batch,) in loader:
        model(batch)
    assert lines() == []
    for (batch,) in loader:
        model(batch + torch.rand(1))
    (line,) = lines()
    assert "More than an epoch's" in line


def test_nothing_is_said_where_samples_come_again(lines):
    model = backbone()
    loader = DataLoader(TensorDataset(torch.rand(600, 3, 4, 4)), batch_size=50)
    for _ in range(3):
        for (batch,) in loader:
            model(batch)
    assert lines() == []


def test_nothing_is_said_of_a_stream_whose_length_nobody_knows(lines):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.rand(900, 3, 4, 4))

    model = backbone()
    for batch in DataLoader(Stream(), batch_size=50):
        model(batch)
    assert lines() == []


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 4)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        rows = self.embedding(input_ids)
        return rows.mean(1) if attention_mask is None else (rows * attention_mask[:, :, None]).sum(1)


def padded_batches(epochs, *, fill=0):
    """Yield batches of the same sentences, each time beside others."""
    random = torch.Generator().manual_seed(4)
    sentences = [torch.randint(3, 1000, (5 + i % 40,), generator=random) for i in range(120)]
    for epoch in range(epochs):
        for chosen in torch.randperm(120, generator=random).split(20):
            rows = [sentences[i] for i in chosen]
            width = max(map(len, rows)) + epoch
            ids = torch.full((20, width), fill)
            mask = torch.zeros(20, width, dtype=torch.long)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = row
                mask[i, : len(row)] = 1
            yield ids, mask


def test_the_same_ids_in_another_padding_are_noticed_and_the_cure_is_named(lines):
    model = torchcache()(Embedding().eval().requires_grad_(False))
    for ids, mask in padded_batches(3):
        model(ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))
    (line,) = lines()
    assert "with the same ids in another padding" in line
    assert "padded={'input_ids': 'attention_mask', 'token_type_ids': 'attention_mask'}" in line


def test_ids_whose_samples_lie_along_another_dimension_are_noticed_too(lines):
    class Transposed(Embedding):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids.t(), attention_mask.t()).t()

    model = torchcache(batch_dim=1)(Transposed().eval().requires_grad_(False))
    for ids, mask in padded_batches(3):
        model(ids.t().contiguous(), mask.t().contiguous())
    (line,) = lines()
    assert "with the same ids in another padding" in line


def test_ids_without_a_mask_are_noticed_too(lines):
    model = torchcache()(Embedding().eval().requires_grad_(False))
    for ids, _ in padded_batches(3, fill=1):
        model(ids)
    (line,) = lines()
    assert "with the same ids in another padding" in line
    assert "pass their mask too" in line


def test_padded_does_what_the_line_says(lines):
    model = torchcache(padded={"input_ids": "attention_mask"})(Embedding().eval().requires_grad_(False))
    for ids, mask in padded_batches(3):
        model(ids, mask)
    assert lines() == []
    assert cache_of(model).stats().hits >= 200


class Epochs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 4)
        self.epoch = 0

    def forward(self, x):
        return self.linear(x.flatten(1)) + 0 * self.epoch


def test_samples_that_come_again_in_another_state_are_told_which(lines, caplog):
    model = torchcache()(Epochs().eval().requires_grad_(False))
    for epoch in range(2):
        model.epoch = epoch
        for batch in IMAGES.split(25):
            model(batch)
    (line,) = [r.getMessage() for r in caplog.records if "another one then" in r.getMessage()]
    assert "epoch (0 -> 1)" in line
    assert "ignore" in line
