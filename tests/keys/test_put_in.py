"""What a user puts in place of a library's functions and methods counts as the user's own code does."""

from __future__ import annotations

import abc
import builtins
import copyreg
import json
import math
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.utils import _pytree

from tests.keys.test_noticed import X, check, program
from torchcache import cache_of, disabled, torchcache
from torchcache.keys import put_in
from torchcache.keys.code import walk_code
from torchcache.keys.fast import dict_versions

TIMES = """
def make(factor):
    def put(*args, **kwargs):
        return [value for value in args if isinstance(value, torch.Tensor)][0] * factor
    return put
"""

#: Where something is put, what calls it there, and how that is decorated.
PLACES = {
    "a method of tensors": (torch.Tensor, "put_for_a_test", "def target(x): return x.put_for_a_test()"),
    "an operator of tensors": (torch.Tensor, "__lshift__", "def target(x): return x << 1"),
    "a function of torch": (torch, "asinh", "def target(x): return torch.asinh(x)"),
    "a function that a layer calls": (F, "gelu", "target = nn.GELU()"),
    "a method of a layer": (nn.Softsign, "forward", "target = nn.Sequential(nn.Softsign())"),
    "a builtin": (builtins, "put_for_a_test", "def target(x): return put_for_a_test(x)"),
}


def put(where, key, value, monkeypatch):
    monkeypatch.setattr(where, key, value, raising=False)


@pytest.fixture(params=[True, False], ids=["versions", "no versions"])
def versions(request, monkeypatch):
    """Have it noticed with the versions of dictionaries, and without, as from Python 3.13 on."""
    monkeypatch.setattr(put_in, "_looked_through", {})
    if not request.param:
        monkeypatch.setattr(dict_versions, "IS_SUPPORTED", False)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("versions")
def test_what_is_put_in_place_while_a_program_runs_is_noticed(place, monkeypatch):
    where, key, text = PLACES[place]
    make = program(TIMES)["make"]
    if not hasattr(where, key) or key.startswith("__"):
        put(where, key, make(2), monkeypatch)
    target = program(text)["target"]
    if isinstance(target, nn.Module):
        for module in target.modules():
            module.requires_grad_(requires_grad=False)
    check(torchcache()(target), lambda: put(where, key, make(3), monkeypatch))


@pytest.mark.parametrize("place", PLACES)
def test_another_function_in_place_of_a_librarys_is_other_code(place, monkeypatch):
    where, key, text = PLACES[place]
    target = program(text)["target"]
    code = type(target) if isinstance(target, nn.Module) else target
    parts = [type(module) for module in target.modules()] if isinstance(target, nn.Module) else []
    fingerprints = set()
    for body in ("x * 2", "x * 3", "x * 2"):
        put(where, key, program(f"def put(x, *args): return {body}")["put"], monkeypatch)
        fingerprints.add(walk_code(code, parts).fingerprint)
    assert len(fingerprints) == 2


#: Where code of a library is put, which, and what calls it there.
OF_LIBRARIES = {
    "what the user's own code calls": (F, "softplus", F.relu, "def target(x): return F.softplus(x)"),
    "a function of C": (torch, "sin", torch.cos, "def target(x): return torch.sin(x)"),
    "what a layer calls": (F, "relu", F.relu6, "target = nn.Sequential(nn.ReLU())"),
    "a method of a layer": (nn.Softsign, "forward", nn.Tanh.forward, "target = nn.Sequential(nn.Softsign())"),
    "a method of tensors": (torch.Tensor, "tanh", torch.Tensor.sin, "def target(x): return x.tanh()"),
    "an operator": (torch.Tensor, "__add__", torch.Tensor.__sub__, "def target(x): return x + 2"),
    "a class": (nn, "SiLU", nn.Tanh, "def target(x): return nn.SiLU()(x)"),
    "an object": (F, "silu", nn.Tanh(), "def target(x): return F.silu(x)"),
    "a partial": (F, "silu", partial(F.leaky_relu, negative_slope=-3.0), "def target(x): return F.silu(x)"),
    "an operator of torch.ops": (F, "silu", torch.ops.aten.tanh.default, "def target(x): return F.silu(x)"),
    "what torch's own code calls": (torch._C._nn, "silu", torch.tanh, "def target(x): return F.silu(x)"),
    "a module in torch": (torch.linalg, "norm", torch.sum, "def target(x): return torch.linalg.norm(x, dim=-1)"),
    "a function of NumPy": (np, "mean", np.sum, "def target(x): return torch.from_numpy(np.mean(x.numpy(), -1))"),
    "a ufunc": (np, "sin", np.cos, "def target(x): return torch.from_numpy(np.sin(x.numpy()))"),
    "a function of the standard library": (math, "sin", math.cos, "def target(x): return x * math.sin(1)"),
}


@pytest.mark.parametrize("place", OF_LIBRARIES)
@pytest.mark.usefixtures("versions")
def test_code_of_a_library_in_place_of_another_is_other_code(place, monkeypatch):
    where, key, value, text = OF_LIBRARIES[place]
    target = program(text, F=F, math=math)["target"]
    check(torchcache()(target), lambda: put(where, key, value, monkeypatch), x=X * 8)


@pytest.mark.parametrize("where", [np, torch.linalg])
def test_a_function_of_ones_own_in_place_of_one_in_c_is_noticed(where, monkeypatch):
    key = "sin" if where is np else "inv"
    text = {
        "sin": "def target(x): return torch.from_numpy(np.sin(x.numpy()))",
        "inv": "def target(x): return torch.linalg.inv(torch.diag_embed(x))",
    }[key]
    put_in = program("def put(x): return x * 3")["put"]
    check(torchcache()(program(text)["target"]), lambda: monkeypatch.setattr(where, key, put_in))


@pytest.mark.parametrize("key", ["__compiled_fn_1_3d4cc01b", "__resume_at_30_2"])
def test_what_dynamo_puts_where_it_compiles_does_not_count(key, monkeypatch):
    target = program("def target(x): return F.silu(x)", F=F)["target"]
    walk = walk_code(target)
    put(F, key, program("def put(x): return getattr(x, 'a')")["put"], monkeypatch)
    assert walk_code(target).fingerprint == walk.fingerprint


def test_code_of_another_library_is_other_code(monkeypatch):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    target = program("def target(x): return F.silu(x)", F=F)["target"]
    check(torchcache()(target), lambda: monkeypatch.setattr(F, "silu", llama.rotate_half))


def test_what_a_library_adds_to_a_class_of_another_does_not_count(monkeypatch):
    target = program("class Target(nn.Module):\n    def forward(self, x): return x")["Target"]
    before = walk_code(target).fingerprint
    monkeypatch.setattr(nn.Module, "added_for_a_test", np.lib.stride_tricks.as_strided, raising=False)
    assert walk_code(target).fingerprint == before


def test_of_what_is_put_in_builtins_only_what_the_code_reads_counts(monkeypatch):
    def fingerprint():
        return walk_code(program("def target(x): return x * 2")["target"]).fingerprint

    before = fingerprint()
    monkeypatch.setattr(builtins, "print", program("def put(*args): return 1")["put"])
    assert fingerprint() == before


def test_what_lies_beside_a_function_that_is_put_in_place_of_a_librarys_does_not_count(monkeypatch):
    target = program("def target(x): return json.dumps(x)", json=json)["target"]
    # torch reads this name, but not there.
    text = "def put(*args): return 1\ndef handle_torch_function(): return {}"
    fingerprints = set()
    for value in (2, 3):
        monkeypatch.setattr(json, "dumps", program(text.format(value))["put"])
        fingerprints.add(walk_code(target).fingerprint)
    assert len(fingerprints) == 1


def test_the_last_result_of_a_prompt_does_not_count(monkeypatch):
    target = program("def target(x): return x * 2")["target"]
    walk = walk_code(target)
    monkeypatch.setattr(builtins, "_", program("def put(): return 1")["put"], raising=False)
    assert not walk.has_changed()


def test_what_is_registered_in_a_table_of_a_library_counts(monkeypatch):
    text = """
        class Own:
            pass

        own = Own()

        def target(x):
            return x * _pytree.tree_leaves(own)[0]
        """
    names = program(textwrap.dedent(text), _pytree=_pytree)
    own = names["Own"]
    _pytree.register_pytree_node(own, lambda own: ([], None), lambda values, context: own())

    def register(factor):
        flatten = program("def make(factor): return lambda own: ([factor], None)")["make"](factor)
        monkeypatch.setitem(_pytree.SUPPORTED_NODES, own, _pytree.SUPPORTED_NODES[own]._replace(flatten_fn=flatten))

    register(2)
    check(torchcache()(names["target"]), lambda: register(3))


def test_how_a_class_is_copied_counts(monkeypatch):
    text = """
        import copy

        class Own:
            factor = 1

        own = Own()

        def target(x):
            return x * copy.copy(own).factor
        """
    names = program(textwrap.dedent(text))
    own = names["Own"]

    def register(factor):
        made = own()
        made.factor = factor
        reduce = program("def make(made): return lambda own: (lambda: made, ())")["make"](made)
        monkeypatch.setitem(copyreg.dispatch_table, own, reduce)

    register(2)
    check(torchcache()(names["target"]), lambda: register(3))


def test_what_is_registered_with_an_abstract_class_counts():
    text = """
        class Abstract(abc.ABC):
            pass

        class Own:
            pass

        own = Own()

        def target(x):
            return x * (3 if isinstance(own, Abstract) else 2)
        """
    names = program(textwrap.dedent(text), abc=abc)
    check(torchcache()(names["target"]), lambda: names["Abstract"].register(names["Own"]))


ATTENTION = """
def make(factor):
    def attend(module, query, key, value, mask, **options):
        return (query * factor).transpose(1, 2).contiguous(), None
    return attend
"""


def bert(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False)
    return model.eval().requires_grad_(requires_grad=False)


class Encoder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.bert = bert(attention)

    def forward(self, x):
        return self.bert(x).last_hidden_state


def test_attention_that_is_registered_with_transformers_counts():
    make = program(ATTENTION)["make"]
    interface = pytest.importorskip("transformers").AttentionInterface
    try:
        interface.register("of_a_test", make(2.0))
        encoder = torchcache()(Encoder("of_a_test"))
        check(encoder, lambda: interface.register("of_a_test", make(3.0)), x=torch.arange(12).view(4, 3))
    finally:
        interface._global_mapping.pop("of_a_test", None)


def test_a_method_of_a_class_of_a_library_in_the_state_counts(monkeypatch):
    modeling = pytest.importorskip("transformers.models.bert.modeling_bert")
    make = program("def make(factor):\n    return lambda self, x: x * factor")["make"]
    encoder = torchcache()(Encoder("sdpa"))
    change = lambda: monkeypatch.setattr(modeling.BertLayer, "feed_forward_chunk", make(3.0))  # noqa: E731
    check(encoder, change, x=torch.arange(12).view(4, 3))


def test_a_number_that_a_library_assigns_at_each_call_costs_no_walk(monkeypatch):
    target = torchcache()(program("def target(x): return x * 2")["target"])
    target(X)
    before = cache_of(target).module_hash
    for number in range(3):
        monkeypatch.setattr(F, "n_calls", number, raising=False)
        target(X)
    assert cache_of(target).module_hash == before
    assert cache_of(target).stats().hits == 3 * len(X)
    with disabled():
        assert torch.equal(target(X), X * 2)
