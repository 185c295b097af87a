"""Calls that users write. Nothing runs here: two type checkers read it, and what must be an error is marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import assert_type

from torchcache import Cache, CachedDataset, CachedFunction, cache_of, flush_all, lazy, sample_keys, torchcache


class Pair(NamedTuple):
    mean: Tensor
    spread: Tensor


# -- a class and a module keep their types ----------


@torchcache(persistent=True, persistent_cache_dir=Path("cache"), max_memory_cache_size="5GB", cache_dtype=torch.half)
class Encoder(nn.Module):
    def __init__(self, features: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * self.scale

    @torchcache()
    def encode_image(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.forward(x) + shift

    @torchcache(unbatched=("mask",))
    def statistics(self, x: Tensor, *, mask: Tensor) -> Pair:
        return Pair(self.encode_image(x) * mask, x)

    @staticmethod
    @torchcache()
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    def get_text_features(self, texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), 4)


class Larger(Encoder):
    @torchcache()  # pyright takes nothing but a function for a method in place of a function
    def get_text_features(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, texts: list[str]
    ) -> Tensor:
        return super().get_text_features(texts) + self.encode_image(torch.rand(len(texts), 10))


cached_on_disk = torchcache(persistent=True)


@cached_on_disk
class Other(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features


encoder = Encoder(10, scale=2.0)
assert_type(encoder, Encoder)
assert_type(encoder.forward(torch.rand(2, 10)), Tensor)
assert_type(cache_of(encoder), Cache)
Encoder()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
Encoder("10")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

linear = torchcache()(nn.Linear(10, 4))
assert_type(linear, nn.Linear)
assert_type(linear.in_features, int)


# -- a function keeps its parameters and its result ----------


@torchcache(when_grad="bypass", verify_hits=0.01)
def embed(x: Tensor, shift: float = 0.0) -> Tensor:
    return x + shift


def embed_texts(texts: list[str]) -> Pair:
    return Pair(torch.zeros(len(texts), 1), torch.zeros(len(texts), 1))


assert_type(embed(torch.rand(2, 3)), Tensor)
assert_type(embed(torch.rand(2, 3), shift=2), Tensor)
assert_type(embed.cache_instance, Cache)
assert_type(embed.cache_instance.stats().hits, int)
assert_type(torchcache()(embed_texts)(["a", "b"]), Pair)
embed("a")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
embed(torch.rand(2, 3), scale=2)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
embed.cache_instance.size()  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def takes_any_encoder(encode: CachedFunction[[Tensor], Tensor]) -> Tensor:
    return encode(torch.rand(2, 10))


# -- a method stays a method ----------


assert_type(encoder.encode_image(torch.rand(2, 10)), Tensor)
assert_type(encoder.encode_image(torch.rand(2, 10), shift=1.0), Tensor)
assert_type(encoder.encode_image.cache_instance, Cache)
assert_type(encoder.statistics(torch.rand(2, 10), mask=torch.ones(10)), Pair)
assert_type(Larger(10).encode_image(torch.rand(2, 10)), Tensor)
assert_type(Larger(10).get_text_features.cache_instance, Cache)
assert_type(Other(10).features, int)
takes_any_encoder(torchcache()(linear.forward))
assert_type(Encoder.encode_image(encoder, torch.rand(2, 10)), Tensor)
assert_type(Encoder.doubled(torch.rand(2, 10)), Tensor)
assert_type(Encoder.doubled.cache_instance, Cache)
encoder.encode_image()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
encoder.encode_image("a")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
encoder.encode_image(torch.rand(2, 10), 0.0, 1)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
encoder.statistics(torch.rand(2, 10))  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]

text_features = torchcache(persistent=True)(encoder.get_text_features)
assert_type(text_features(["a"]), Tensor)
assert_type(text_features.cache_instance, Cache)
text_features(torch.rand(2, 3))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


# -- calls that are one sample, padded ones, keys of one's own ----------


@torchcache(batch_dim=None)
def load(path: Path, size: int = 8) -> dict[str, Any]:
    return {"image": torch.zeros(size, size), "path": str(path)}


@torchcache(padded={"ids": "mask"})
def encode_tokens(ids: Tensor, mask: Tensor) -> Tensor:
    return ids * mask


assert_type(load(Path("cat.jpg")), dict[str, Any])
load("cat.jpg")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
torchcache(batch_dim="1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
torchcache(padded=("ids",))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
torchcache(mode=1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
assert_type(flush_all(), bool)

with sample_keys(["a", "b"]), sample_keys(torch.arange(2)), sample_keys([1, b"2"]):
    assert_type(encode_tokens(torch.rand(2, 3), torch.ones(2, 3)), Tensor)
with sample_keys([1.0]):  # type: ignore[list-item] # pyright: ignore[reportArgumentType]
    pass


# -- a model that need not exist, and datasets ----------


def build(features: int = 10) -> nn.Module:
    return Encoder(features)


later = lazy(build, mode="require", persistent=True, persistent_cache_dir="cache")
assert_type(later.model, nn.Module)
assert_type(later.is_built, bool)
assert_type(cache_of(later), Cache)
lazy("minilm")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
lazy(build, mod="require")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


class Images(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(index)


images = CachedDataset(Images(), augment=lambda image: image, persistent=True)
assert_type(cache_of(images), Cache)
CachedDataset(Images(), augmented=True)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


# -- options are checked, and parentheses ----------


torchcache(persistant=True)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
torchcache(persistent="yes")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
torchcache(cache_dtype="half")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
torchcache(max_memory_cache_size=None)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@torchcache  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
def without_parentheses(x: Tensor) -> Tensor:
    return x


@torchcache  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
class WithoutParentheses(nn.Module):
    pass
