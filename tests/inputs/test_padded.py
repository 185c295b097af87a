"""Padded batches: a sample and its value do not depend on how far its batch was padded."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from torchcache import ConfigError, UncacheableError, cache_of, disabled, torchcache

PADDED = {"ids": "mask"}
WORDS = 100


class Encoded(NamedTuple):
    hidden: torch.Tensor  # (B, L, C)
    pooled: torch.Tensor  # (B, C)
    scores: torch.Tensor  # (B, heads, L, L)


class Encoder(nn.Module):
    """One layer of attention, with positions counted from the first real one."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.words = nn.Parameter(torch.randn(WORDS, channels, generator=generator), requires_grad=False)
        self.places = nn.Parameter(torch.randn(64, channels, generator=generator), requires_grad=False)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Encoded:
        self.sizes.append(tuple(ids.shape))
        places = (mask.cumsum(1) - 1).clamp(min=0).long()
        x = self.words[ids] + self.places[places]
        scores = (x @ x.transpose(1, 2)).masked_fill(mask[:, None, :] == 0, float("-inf")).softmax(-1)
        hidden = scores @ x
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return Encoded(hidden, pooled, torch.stack([scores, scores], 1))


def sentence(number: int, length: int | None = None) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(1, WORDS) for _ in range(length or 1 + number % 9)]


def padded(numbers, width=None, side="right", fill=0):
    """Return ids and mask of a batch of sentences."""
    sentences = [sentence(number) for number in numbers]
    width = width or max(map(len, sentences))
    ids, mask = torch.full((len(numbers), width), fill), torch.zeros(len(numbers), width)
    for i, words in enumerate(sentences):
        place = slice(0, len(words)) if side == "right" else slice(width - len(words), width)
        ids[i, place] = torch.tensor(words)
        mask[i, place] = 1
    return ids, mask


def check(got, module, ids, mask):
    """Compare with what is computed without a cache; what the mask leaves out is zero."""
    sizes = list(module.sizes)
    with disabled():
        want = module(ids, mask)
    module.sizes[:] = sizes
    hidden = want.hidden * mask[:, :, None]
    scores = want.scores * mask[:, None, :, None] * mask[:, None, None, :]
    assert type(got) is Encoded
    for a, b in zip(got, (hidden, want.pooled, scores), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-5)


def cached(**options):
    return torchcache(padded=PADDED, **options)(Encoder())


def call(module, *args, **kwargs):
    ids, mask = padded(*args, **kwargs)
    got = module(ids, mask)
    check(got, module, ids, mask)
    return got


def test_a_sample_hits_in_a_batch_of_another_length():
    module = cached()
    call(module, [1, 2, 3])
    call(module, [3, 8, 1], width=20)
    call(module, [2, 8], width=9)
    stats = cache_of(module).stats()
    assert (stats.misses, stats.hits, stats.bypasses) == (4, 4, {})


def test_only_what_is_missing_is_computed_and_only_as_long_as_it_is():
    module = cached(check_rows=False)
    call(module, [8, 7])
    del module.sizes[:]
    call(module, [8, 2, 1], width=30)
    assert module.sizes == [(2, 3)]


def test_lengths_are_found_out_once():
    module = cached(check_rows=False)
    for numbers in ([1, 4], [2, 5], [3, 6]):
        call(module, numbers)
    assert len(module.sizes) == 5  # a row by itself, and with other padding


@pytest.mark.parametrize("side", ["right", "left"])
def test_either_side_may_be_padded(side):
    module = cached()
    for numbers, width in (([1, 2, 8], None), ([2, 3], 12), ([8, 1, 5], 9), ([5, 3], None)):
        call(module, numbers, width, side)
    stats = cache_of(module).stats()
    assert (stats.misses, stats.hits, stats.bypasses) == (5, 5, {})


def test_what_stands_in_the_padding_does_not_count():
    module = cached()
    call(module, [1, 8])
    call(module, [1, 8], fill=7)
    assert cache_of(module).stats().misses == 2


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 4)), min_size=1, max_size=5
    ),
    st.sampled_from(["right", "left"]),
    st.sampled_from(["memory", "disk"]),
)
def test_any_batches_give_what_the_module_gives(tmp_path_factory, batches, side, where):
    options = {}
    if where == "disk":
        place = tmp_path_factory.mktemp("cache")
        options = {"persistent": True, "persistent_cache_dir": place, "max_memory_cache_size": 0}
    module, seen = cached(**options), set()
    call(module, [31, 32], 40, side)  # so that rows are known to be their own
    seen.update([31, 32])
    for numbers, more in batches:
        width = max(len(sentence(number)) for number in numbers) + more
        call(module, numbers, width, side)
        seen.update(numbers)
    stats = cache_of(module).stats()
    assert stats.bypasses == {}
    assert stats.misses == len({tuple(sentence(number)) for number in seen})
    cache_of(module).close()


def test_rows_of_one_length_differ_by_every_token():
    module = cached()
    ids, mask = torch.tensor([[1, 2, 3], [1, 2, 4]]), torch.ones(2, 3)
    got = module(ids, mask)
    check(got, module, ids, mask)
    assert cache_of(module).stats().misses == 2


def test_a_hole_in_the_mask_counts():
    module = cached()
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 0]])
    mask = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 0]])
    check_holes = module(ids, mask)
    assert cache_of(module).stats().misses == 2
    assert not torch.equal(check_holes.pooled[0], check_holes.pooled[1])


def test_a_corpus_sorted_by_length_serves_a_shuffled_epoch(tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path, "max_memory_cache_size": 0}
    module = cached(**options)
    numbers = sorted(range(64), key=lambda number: len(sentence(number)))
    for i in range(0, 64, 8):
        call(module, numbers[i : i + 8])
    misses = cache_of(module).stats().misses
    cache_of(module).flush()
    cache_of(module).close()
    again = cached(**options)
    random.Random(0).shuffle(numbers)
    for i in range(0, 64, 8):
        call(again, numbers[i : i + 8])
    stats = cache_of(again).stats()
    assert (stats.misses, stats.store_hits + stats.duplicates) == (0, 64)
    assert again.sizes == []
    assert misses <= 64


def test_a_dimension_that_happens_to_be_as_long_is_no_length():
    module = torchcache(padded=PADDED)(Encoder(channels=9))
    call(module, [8, 7])  # 9 and 8 long, and 9 channels
    call(module, [8, 7], width=20)
    stats = cache_of(module).stats()
    assert (stats.misses, stats.hits, stats.bypasses) == (2, 2, {})


def test_a_module_that_ignores_the_mask_is_not_cached(caplog):
    cached = torchcache(padded=PADDED)(lambda ids, mask: ids.float().mean(1, keepdim=True) + 0 * mask.sum(1, True))
    for _ in range(2):
        ids, mask = padded([1, 8])
        assert torch.equal(cached(ids, mask), ids.float().mean(1, keepdim=True))
    assert cache_of(cached).stats().bypasses == {"rows_depend_on_batch": 2}
    assert "take its mask into account" in caplog.text


def test_a_result_of_half_the_length_is_not_cached():
    cached = torchcache(padded=PADDED)(lambda ids, mask: (ids * mask)[:, ::2])
    for _ in range(2):
        ids, mask = padded([1, 8])
        assert torch.equal(cached(ids, mask), (ids * mask)[:, ::2])
    assert cache_of(cached).stats().bypasses == {"other_lengths": 2}


@pytest.mark.parametrize("check_rows", [True, False])
def test_a_plain_value_that_follows_the_length_is_not_cached(check_rows):
    cached = torchcache(padded=PADDED, check_rows=check_rows)(lambda ids, mask: (ids * mask, ids.shape[1]))
    for width in (9, 12):
        assert cached(*padded([1, 8], width))[1] == width
    assert cache_of(cached).stats().bypasses == {"other_lengths": 2}


def test_a_result_without_the_length_is_kept():
    cached = torchcache(padded=PADDED)(lambda ids, mask: (ids * mask).sum(1, keepdim=True))
    for width in (9, 12):
        ids, mask = padded([1, 8], width)
        assert torch.equal(cached(ids, mask), (ids * mask).sum(1, keepdim=True))
    assert cache_of(cached).stats().misses == 2


def test_a_row_without_any_real_position_goes_around():
    module = cached()
    ids, mask = padded([1, 2])
    mask[0] = 0
    module(ids, mask)
    assert cache_of(module).stats().bypasses == {"fully_masked_row": 1}


def test_a_limit_of_positions_is_no_obstacle():
    class Limited(Encoder):
        def forward(self, ids, mask):
            if ids.shape[1] > 9:
                raise RuntimeError("too long")
            return super().forward(ids, mask)

    module = torchcache(padded=PADDED)(Limited())
    call(module, [8, 2])
    call(module, [8, 1])
    stats = cache_of(module).stats()
    assert (stats.misses, stats.bypasses, stats.faults) == (3, {}, {})


def test_a_row_that_cannot_be_computed_otherwise_is_tried_again():
    lengths = []

    def total(ids, mask):
        lengths.append(ids.shape[1])
        if ids.shape[1] != 9:
            raise RuntimeError("nine only")
        return ids * mask

    cached = torchcache(padded=PADDED)(total)
    ids, mask = padded([8])
    for _ in range(2):
        assert torch.equal(cached(ids, mask), ids * mask)
    assert cache_of(cached).stats().bypasses == {"other_length_failed": 2}


def test_the_sequence_may_come_first():
    plain = Encoder()

    def turned(ids, mask):
        return [leaf.transpose(0, 1) for leaf in plain(ids.t(), mask.t())[:2]]

    cached = torchcache(padded=PADDED, batch_dim=1)(turned)
    for numbers, width in (([1, 2, 8], None), ([2, 8, 3], 15)):
        ids, mask = padded(numbers, width)
        hidden, pooled = cached(ids.t(), mask.t())
        want = plain(ids, mask)
        assert torch.allclose(hidden.transpose(0, 1), want.hidden * mask[:, :, None], atol=1e-5)
        assert torch.allclose(pooled.t(), want.pooled, atol=1e-5)
    assert cache_of(cached).stats().misses == 4


@pytest.mark.parametrize("form", [dict, BatchEncoding])
def test_tensors_in_a_container_are_named_with_their_way(form):
    plain = Encoder()
    cached = torchcache(padded={"batch['ids']": "batch['mask']"})(lambda batch: plain(batch["ids"], batch["mask"]))
    for numbers, width in (([1, 2, 8], None), ([2, 8, 3], 15)):
        ids, mask = padded(numbers, width)
        check(cached(form({"ids": ids, "mask": mask})), plain, ids, mask)
    assert cache_of(cached).stats().misses == 4


def test_other_arguments_count_whole():
    def weighted(ids, mask, weight):
        return ids * mask * weight[:, :1]

    cached = torchcache(padded=PADDED)(weighted)
    for weights, width in (([[1.0, 2]], None), ([[1.0, 2]], 20), ([[1.0, 3]], 20)):
        ids, mask = padded([3], width)
        assert torch.equal(cached(ids, mask, torch.tensor(weights)), ids * mask)
    assert cache_of(cached).stats().misses == 2


def test_values_on_disk_are_as_long_as_their_rows(tmp_path):
    module = cached(persistent=True, persistent_cache_dir=tmp_path)
    call(module, [0], width=60)
    cache_of(module).flush()
    assert cache_of(module).stats().written_bytes < 1000


@pytest.mark.parametrize("pooled", [False, True])
def test_a_mask_of_what_is_padding_gives_no_wrong_result(pooled):
    """As torch's own ``key_padding_mask``: True where nothing is."""
    plain = Encoder()

    def encode(ids, is_padding):
        mask = (~is_padding).float()
        states = plain(ids, mask)
        return (states.pooled if pooled else states.hidden * mask[:, :, None]).nan_to_num()

    cached = torchcache(padded={"ids": "is_padding"})(encode)
    for numbers, width in (([1, 2, 3], 12), ([4, 2, 5], 12), ([1, 2, 3], 12)):
        ids, mask = padded(numbers, width)
        assert torch.allclose(cached(ids, mask == 0), encode(ids, mask == 0), atol=1e-6)
    assert cache_of(cached).stats().hits == 0


@pytest.mark.parametrize(
    ("mask", "named", "said"),
    [
        (torch.tensor([[0.0, 0, 0, float("-inf")]] * 2), "mask", "must be 1 or True where a position is real"),
        (torch.full((2, 4), float("nan")), "mask", "must be 1 or True where a position is real"),
        (torch.ones(2), "mask", "must have two dimensions"),
        (torch.ones(2, 1, 4), "mask", "must have two dimensions"),
        (torch.ones(2, 5), "ids", "its mask has 5 positions"),
        (torch.ones(3, 4), "mask", "differ in their batch dimension"),
        (None, "mask", "no tensor 'mask', which is its mask"),
    ],
)
def test_a_mask_of_a_wrong_shape_is_refused(mask: Any, named, said):
    with pytest.raises(UncacheableError, match=said) as refused:
        cached()(torch.ones(2, 4, dtype=torch.long), mask)
    assert refused.value.argument == named


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"idz": "mask"}, "did you mean 'ids'"),
        ({"ids": "maks"}, "did you mean 'mask'"),
        ({"bacth['ids']": "mask"}, "names 'bacth'"),
        ({"ids": "mask", "mask": "ids"}, "several masks"),
        (("ids",), "must be a dict"),
        ("ids", "must be a dict"),
        ({"ids": 1}, "must be a dict"),
    ],
)
def test_padded_that_cannot_be_is_refused(value, said):
    with pytest.raises(ConfigError, match=said) as refused:
        torchcache(padded=value)(lambda ids, mask: ids)
    assert refused.value.argument == "padded"


def test_padded_has_no_meaning_for_whole_calls():
    with pytest.raises(ConfigError, match="padded has no meaning"):
        torchcache(padded=PADDED, batch_dim=None)(lambda ids, mask: ids)


#: What a model that ignores its mask makes of a row, as a share of which some padding changes little.
IGNORING = {
    "mean": lambda x: x.mean(1),
    "attention": lambda x: ((x @ x.transpose(1, 2)).softmax(-1) @ x).mean(1),
    "its own place": lambda x: x - x.mean(1, keepdim=True),
}


@pytest.mark.parametrize("lengths", [[1000, 1000], [999, 1000], [1000, 999, 998], [600, 1000], [3, 1000]], ids=str)
@pytest.mark.parametrize("kind", IGNORING)
def test_a_model_that_ignores_the_mask_is_noticed_whatever_the_length(kind, lengths):
    function = IGNORING[kind]
    x = torch.zeros(len(lengths), 1000, 4)
    mask = torch.zeros(len(lengths), 1000)
    for i, n in enumerate(lengths):
        x[i, :n] = torch.randn(n, 4, generator=torch.Generator().manual_seed(i)) + 1
        mask[i, :n] = 1
    cached = torchcache(padded={"x": "mask"})(lambda x, mask: function(x * mask[:, :, None]))
    for more in (0, 1000, 0):
        wide = nn.functional.pad(x, (0, 0, 0, more)), nn.functional.pad(mask, (0, more))
        assert torch.equal(cached(*wide), function(wide[0]))
    assert cache_of(cached).stats().bypasses == {"rows_depend_on_batch": 3}


def test_no_row_is_made_longer_than_its_batch():
    """Models have a limit, and beyond it an accelerator may not only raise."""
    widths = []

    def forward(ids, mask):
        widths.append(ids.shape[1])
        return (ids * mask)[:, :, None].float()

    for lengths in ([9, 9], [8, 9], [2, 9], [9]):
        cached = torchcache(padded=PADDED)(forward)
        ids = torch.arange(1, 1 + 9 * len(lengths)).reshape(len(lengths), 9)
        mask = (torch.arange(9)[None] < torch.tensor(lengths)[:, None]).long()
        for _ in range(2):
            assert torch.equal(cached(ids * mask, mask), (ids * mask)[:, :, None].float())
        assert not cache_of(cached).stats().bypasses
        assert cache_of(cached).stats().misses == len(lengths)
    assert max(widths) == 9


def test_rows_of_one_position_are_kept():
    cached = torchcache(padded=PADDED)(lambda ids, mask: torch.stack([ids * mask, ids * mask], 2)[:, :, :1].float())
    ids = torch.tensor([[3], [4]])
    for _ in range(2):
        assert torch.equal(cached(ids, torch.ones(2, 1)), ids[:, :, None].float())
    assert torch.equal(cached(*padded([1, 8])), (padded([1, 8])[0] * padded([1, 8])[1])[:, :, None])
    assert not cache_of(cached).stats().bypasses
    assert cache_of(cached).stats().memory_hits == 2
