"""Results as rows of bytes: every leaf comes back bit for bit, in an object of the same types."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from torchcache import UncacheableError
from torchcache.errors import CorruptRecordError
from torchcache.layout import CHANNELS_LAST, CONTIGUOUS, DTYPE_SIZES, MAX_TENSORS, Layout, Leaf
from torchcache.results import leaves
from torchcache.results.classes import KnownClasses
from torchcache.results.nodes import class_name
from torchcache.results.rows import (
    check_leaves,
    detached,
    devices_of,
    flatten,
    is_known,
    plain_numbers,
    put_together,
    rounded,
    take_apart,
    unsupported_leaf,
)

CPU = torch.device("cpu")
DTYPES = [dtype for name in DTYPE_SIZES if (dtype := getattr(torch, name, None)) is not None]
N = 3


class Pair(NamedTuple):
    first: object
    second: object


@dataclasses.dataclass(frozen=True, slots=True)
class Sealed:
    content: object
    label: str = "sealed"

    def __post_init__(self):
        made.append(self)


made: list[Sealed] = []


class Fussy:
    """Registered, and wants what it is made of to be as it was made first."""

    refuses = False

    def __init__(self, content):
        if Fussy.refuses or content.dim() != 2 or not len(content):
            raise ValueError("no")
        self.content = content


pytree.register_pytree_node(Fussy, lambda fussy: ([fussy.content], None), lambda items, _: Fussy(*items))


def raw(tensor):
    """Return the bytes of a tensor in row-major order, whatever its dtype."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return bytes(plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy())


def assert_same_tensor(a, b):
    assert (type(a), a.dtype, a.shape, a.device) == (torch.Tensor, b.dtype, b.shape, b.device)
    assert raw(a) == raw(b)
    assert not a.requires_grad


def assert_same(a, b):
    """Assert that two results are of the same types and equal bit for bit."""
    a, b = flatten(a), flatten(b)
    assert a.encode() == b.encode()
    assert list(a.node.classes()) == list(b.node.classes())
    assert a.paths == b.paths
    for tensor_a, tensor_b in zip(a.leaves, b.leaves, strict=True):
        assert_same_tensor(tensor_a, tensor_b)


def stored(output, n=N, cache_dtype=None, known=None):
    tree = flatten(output)
    check_leaves(tree, n)
    return take_apart(tree, n, cache_dtype, KnownClasses() if known is None else known)


def round_trip(output, n=N, cache_dtype=None):
    """Take a result apart and put it together in a process that knows its classes, but has not seen it."""
    tree = flatten(output)
    layout, data, _ = take_apart(tree, n, cache_dtype, KnownClasses())
    known = KnownClasses(tree.node.classes())
    assert is_known(layout, known)
    assert data.shape == (n, layout.nbytes)
    return put_together(layout, data, devices_of(tree), known)


def noise(dtype, *shape, seed=0):
    """Return random bits as any dtype: NaNs with payloads, subnormals, minus zeros."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return (bits % 2).bool().reshape(shape) if dtype is torch.bool else bits.view(dtype).reshape(shape)


@st.composite
def tensors(draw):
    """Draw a tensor of ``N`` rows with any bits, dtype, shape, strides and flags."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = noise(dtype, N, *shape, seed=draw(st.integers(0, 99)))
    form = draw(st.sampled_from(["plain", "turned", "expanded", "channels_last", "grad", "conj", "neg", "inference"]))
    if form == "turned" and len(shape) > 1:
        tensor = tensor.transpose(1, -1)
    elif form == "expanded" and N * len(shape):
        tensor = tensor[:1].expand(N, *shape)
    elif form == "channels_last" and len(shape) == 3 and dtype.itemsize > 1:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif form == "grad" and dtype in (torch.float32, torch.float64):
        tensor = torch.nn.Parameter(tensor)
    elif form == "conj" and dtype in (torch.complex64, torch.complex128):
        tensor = tensor.conj()
    elif form == "neg" and dtype in (torch.complex64, torch.complex128):
        tensor = tensor.conj().imag
    elif form == "inference":
        with torch.inference_mode():
            tensor = tensor.view(torch.uint8).clone().view(dtype) if dtype is not torch.bool else tensor.clone()
    return tensor


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.sampled_from(DTYPES))
OUTPUTS = st.recursive(
    tensors() | PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=3).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Sealed, inner, st.text(max_size=2)),
    ),
    max_leaves=8,
).filter(lambda output: flatten(output).leaves)


# -- what comes back ----------


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@given(OUTPUTS)
def test_any_tree_of_tensors_comes_back_bit_for_bit(output):
    assert_same(round_trip(output), output)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@given(OUTPUTS)
def test_the_first_result_is_as_the_later_ones(output):
    assert_same(rounded(flatten(output), None), round_trip(output))


@given(OUTPUTS, st.permutations(range(N)))
def test_rows_may_be_put_together_in_any_order(output, order):
    tree = flatten(output)
    known = KnownClasses()
    layout, data, _ = take_apart(tree, N, None, known)
    result = put_together(layout, data[order], devices_of(tree), known)
    for leaf, original in zip(flatten(result).leaves, tree.leaves, strict=True):
        rows = [raw(row) for row in original]
        assert [raw(row) for row in leaf] == [rows[i] for i in order]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_goes_beside_one_byte(dtype):
    output = (noise(torch.uint8, N, 1), noise(dtype, N, 5), noise(torch.bool, N), noise(dtype, N, 2, 2))
    assert_same(round_trip(output), output)


def test_one_row_comes_back_aligned():
    output = (noise(torch.uint8, 1, 1), noise(torch.float64, 1, 3))
    result = round_trip(output, n=1)
    assert_same(result, output)
    assert result[1].data_ptr() % 8 == 0


def test_rows_without_bytes_come_back():
    for output in (torch.ones(N, 0), [torch.ones(N, 0, 2), 1], {"a": torch.ones(N, 0), "b": torch.ones(N, 2)}):
        assert_same(round_trip(output), output)
    assert_same(round_trip((torch.ones(0, 2), torch.ones(0)), n=0), (torch.ones(0, 2), torch.ones(0)))


def test_each_leaf_keeps_its_memory_format():
    images = torch.rand(N, 2, 3, 4)
    output = [images.contiguous(memory_format=torch.channels_last), images, images.transpose(1, 2)]
    layout, _, _ = stored(output)
    assert [leaf.memory_format for leaf in layout.leaves] == [CHANNELS_LAST, CONTIGUOUS, CONTIGUOUS]
    result = round_trip(output)
    assert_same(result, output)
    assert result[0].is_contiguous(memory_format=torch.channels_last)
    assert result[1].is_contiguous()
    assert result[2].is_contiguous()


def test_no_two_leaves_share_memory():
    tensor = torch.zeros(N, 2)
    result = round_trip((tensor, tensor, [tensor[:, :1].expand(N, 4)]))
    result[0].fill_(1)
    result[2][0][:, 0] = 2
    assert_same(result, (torch.ones(N, 2), torch.zeros(N, 2), [torch.tensor([[2.0, 0, 0, 0]] * N)]))
    pointers = {leaf.untyped_storage().data_ptr() for leaf in flatten(result).leaves}
    assert len(pointers) == 3


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x, 1], lambda x: {"x": x, "empty": x[:, :0]}])
def test_one_leaf_is_not_copied(form):
    tree, known = flatten(form(torch.rand(N, 5))), KnownClasses()
    layout, data, _ = take_apart(tree, N, None, known)
    result = put_together(layout, data, devices_of(tree), known)
    assert flatten(result).leaves[0].data_ptr() == data.ctypes.data


def test_rows_may_lie_in_a_tensor_as_on_an_accelerator():
    for output in ((torch.rand(N, 5), noise(torch.uint8, N, 3), torch.rand(N)), torch.rand(N, 5)):
        tree, known = flatten(output), KnownClasses()
        layout, data, _ = take_apart(tree, N, None, known)
        for n in (N, 1):
            rows = torch.from_numpy(data[:n].copy())
            result = put_together(layout, rows, devices_of(tree), known)
            for leaf, original in zip(flatten(result).leaves, tree.leaves, strict=True):
                assert_same_tensor(leaf, original[:n])


def test_each_leaf_goes_to_its_own_device():
    tree, known = flatten((torch.rand(N, 2), torch.rand(N, 3))), KnownClasses()
    layout, data, _ = take_apart(tree, N, None, known)
    result = put_together(layout, data, (torch.device("meta"), CPU), known)
    assert [leaf.device.type for leaf in result] == ["meta", "cpu"]
    assert devices_of(flatten(result)) == (torch.device("meta"), CPU)


def test_the_modules_own_object_is_not_changed_and_not_returned():
    x = torch.rand(N, 2, requires_grad=True)
    inner = [x]
    output = {"a": inner}
    result = rounded(flatten(output), torch.half)
    assert output["a"] is inner
    assert inner[0] is x
    assert result["a"] is not inner
    assert_same(result, {"a": [x.detach().half().float()]})


def test_a_result_knows_nothing_of_the_rows_it_was_made_of():
    output = (torch.zeros(N, 2), torch.zeros(N, 3))
    tree, known = flatten(output), KnownClasses()
    layout, data, _ = take_apart(tree, N, None, known)
    output[0].fill_(7)
    result = put_together(layout, data, devices_of(tree), known)
    assert_same(result, (torch.zeros(N, 2), torch.zeros(N, 3)))


# -- classes ----------


def test_a_frozen_dataclass_with_slots_comes_back_without_its_init():
    output = Sealed({"x": torch.rand(N, 2)}, "label")
    made.clear()
    result = round_trip(output)
    first = rounded(flatten(output), None)
    assert not made
    for each in (result, first):
        assert type(each) is Sealed
        assert each.label == "label"
        assert_same(each, output)
        with pytest.raises(dataclasses.FrozenInstanceError):
            each.label = "other"


def test_a_named_tuple_comes_back():
    result = round_trip(Pair(torch.rand(N), None))
    assert type(result) is Pair
    assert result.second is None


def test_results_of_torchs_own_functions_come_back():
    output = torch.rand(N, 5).max(dim=1)
    result = round_trip(output)
    assert type(result) is torch.return_types.max
    assert_same_tensor(result.values, output.values)
    assert_same_tensor(result.indices, output.indices)


def model_outputs():
    from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

    hidden, layers = torch.rand(N, 4, 2), (torch.rand(N, 4, 2), torch.rand(N, 4, 2))
    late = BaseModelOutput(last_hidden_state=hidden)
    late["attentions"] = (torch.rand(N, 2, 4, 4),)
    late["hidden_states"] = layers
    backwards = BaseModelOutputWithPooling(pooler_output=hidden)
    backwards["last_hidden_state"] = hidden
    return {
        "one": BaseModelOutput(last_hidden_state=hidden),
        "some": BaseModelOutputWithPooling(last_hidden_state=hidden, hidden_states=layers),
        "without the first": BaseModelOutput(hidden_states=layers),
        "only a tuple": BaseModelOutput(last_hidden_state=layers),
        "keys added later": late,
        "in another order": backwards,
    }


@pytest.mark.parametrize("kind", [
    "one", "some", "without the first", "only a tuple", "keys added later", "in another order",
])  # fmt: skip
def test_an_output_of_transformers_comes_back(kind):
    output = model_outputs()[kind]
    for result in (round_trip(output), rounded(flatten(output), None)):
        assert type(result) is type(output)
        assert list(result) == list(output)
        assert len(result) == len(output)
        assert vars(result).keys() == vars(output).keys()
        for field in dataclasses.fields(output):
            value = getattr(output, field.name)
            assert (getattr(result, field.name) is None) == (value is None)
            if value is not None:
                assert_same(getattr(result, field.name), value)
                assert result[field.name] is getattr(result, field.name)
        assert result[0] is result[next(iter(output))]
        assert_same(result.to_tuple(), output.to_tuple())


def test_what_an_output_of_transformers_would_lose_is_refused():
    output = model_outputs()["some"]
    output.hidden_states = None  # transformers keeps the item
    with pytest.raises(UncacheableError, match=r"hidden_states"):
        stored(output)
    output = model_outputs()["one"]
    output.beside = 1
    with pytest.raises(UncacheableError, match=r"attributes \['beside'\]"):
        stored(output)


def test_the_whole_output_of_a_model_of_transformers_comes_back():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    config._attn_implementation = "eager"
    model = BertModel(config).eval()
    with torch.no_grad():
        output = model(torch.randint(0, 9, (N, 5)), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert_same(round_trip(output), output)


# -- a smaller dtype ----------


def test_floats_are_rounded_leaf_by_leaf_and_nothing_else_is():
    x = torch.tensor([[1 / 3, 1e6, math.nan]] * N)
    output = {"a": x, "b": [x.double(), x.half()], "c": x[:, :1].long(), "d": x.to(torch.complex64), "e": 1 / 3}
    _, data, overflowed = stored(output, cache_dtype=torch.half)
    assert data.shape == (N, 3 * 2 + 3 * 2 + 3 * 2 + 8 + 3 * 8)
    assert overflowed == 2 * N
    expected = dict(output, a=x.half().float(), b=[x.double().half().double(), x.half()])
    assert_same(rounded(flatten(output), torch.half), expected)
    assert_same(round_trip(output, cache_dtype=torch.half), expected)


# -- what is refused ----------


@pytest.mark.parametrize(
    ("output", "part"),
    [
        (torch.tensor(1.0), r"shape \(\) for a batch of 3; dimension 0 of the result"),
        (torch.ones(N - 1, 2), r"shape \(2, 2\) for a batch of 3"),
        ({"x": torch.ones(N), "loss": torch.tensor(1.0)}, r"shape \(\) at output\['loss'\] for a batch of 3"),
        (Pair(torch.ones(N), [torch.ones(1, N)]), r"shape \(1, 3\) at output.second\[0\] for a batch of 3"),
        (Sealed(torch.ones(2)), r"shape \(2,\) at output.content"),
        ([torch.ones(N), np.array(["a"] * N)], r"an array of <U1 at output\[1\]; return arrays of numbers"),
        ([torch.ones(N), np.ones(N - 1)], r"shape \(2,\) at output\[1\] for a batch of 3"),
        ([torch.ones(N), {1}], r"a builtins.set at output\[1\], no tensor; return tensors or NumPy arrays"),
        (None, "NoneType, not a tensor"),
        ({"a": 1}, "dict, not a tensor"),
    ],
)
def test_a_result_that_is_not_of_rows_is_refused(output, part):
    with pytest.raises(UncacheableError, match=part):
        stored(output)


def test_too_many_leaves_are_refused():
    output = [torch.ones(N)] * MAX_TENSORS
    assert_same(round_trip(output), output)
    with pytest.raises(UncacheableError, match=f"{MAX_TENSORS + 1} tensors"):
        stored([*output, torch.ones(N)])


class Tagged(torch.Tensor):
    pass


def test_a_leaf_without_plain_rows_is_named():
    plain = torch.ones(N, 2)
    assert unsupported_leaf(flatten({"a": plain, "b": [plain.to_sparse()]}))[0] == "sparse_tensor"
    assert unsupported_leaf(flatten((object(), plain.as_subclass(Tagged))))[0] == "tensor_subclass"
    assert unsupported_leaf(flatten(plain.to("meta")))[0] == "meta_tensor"
    assert unsupported_leaf(flatten([plain, torch.nn.Parameter(plain)]))[0] == "parameter_as_result"
    noted = plain.clone()
    noted.unit = "km"
    assert unsupported_leaf(flatten([plain, noted]))[0] == "attributes_of_result"
    assert unsupported_leaf(flatten([plain, None])) is None
    assert unsupported_leaf(flatten(object())) is None


# -- without a batch ----------


def test_a_result_is_detached_whatever_it_contains():
    strange = object()
    x = torch.rand(0, 2, requires_grad=True)
    result = detached({"a": [x, strange], "b": Pair(x * 2, {1, 2}), "c": torch.tensor(1.0)})
    assert result["a"][1] is strange
    assert result["b"].second == {1, 2}
    assert not result["a"][0].requires_grad
    assert not result["b"].first.requires_grad
    assert detached(None) is None
    assert detached(strange) is strange
    assert not detached(x).requires_grad


# -- layouts from a store ----------


def test_a_class_becomes_known_by_a_result():
    layout, data, _ = stored(Pair(torch.rand(N), 1))
    known = KnownClasses()
    assert not is_known(layout, known)
    with pytest.raises(CorruptRecordError):
        put_together(layout, data, (CPU,), known)
    stored(Pair(torch.rand(2), 2), n=2, known=known)
    assert is_known(layout, known)


def test_two_classes_of_one_name_are_not_known():
    def make():
        class Local(NamedTuple):
            content: object

        return Local(torch.rand(N))

    known = KnownClasses()
    for expected in (True, False):
        output = make()
        layout, data, _ = stored(output, known=known)
        assert is_known(layout, known) is expected
        # What has just been computed can be put together all the same.
        assert type(put_together(layout, data, (CPU,), known)) is type(output)


def test_a_registered_class_is_tried_before_it_is_believed():
    layout, data, _ = stored(Fussy(torch.rand(N, 2)))
    assert is_known(layout, KnownClasses())
    flat = Layout((Leaf("float32", "float32", ()),), layout.structure)
    assert not is_known(flat, KnownClasses())
    known = KnownClasses()
    assert is_known(layout, known)
    Fussy.refuses = True
    try:
        with pytest.raises(CorruptRecordError, match="no"):
            put_together(layout, data, (CPU,), known)
    finally:
        Fussy.refuses = False


def test_a_layout_must_fit_its_structure():
    layout, _, _ = stored([torch.rand(N), torch.rand(N, 2)])
    known = KnownClasses()
    assert is_known(layout, known)
    assert not is_known(Layout(layout.leaves[:1], layout.structure), known)
    assert not is_known(Layout(layout.leaves, b""), known)
    assert not is_known(Layout((), layout.structure), known)
    assert is_known(Layout(layout.leaves[:1]), known)


@pytest.mark.parametrize("output", [torch.rand(N).half(), [torch.rand(N), torch.rand(N).half()]], ids=["one", "two"])
@pytest.mark.parametrize("cache_dtype", [None, torch.float64], ids=str)
def test_a_dtype_this_torch_has_not_is_not_known(output, cache_dtype, monkeypatch):
    known = KnownClasses()
    layout, _, _ = stored(output, cache_dtype=cache_dtype)
    assert is_known(layout, known)
    monkeypatch.delitem(leaves.DTYPES, "float16" if cache_dtype is None else "float64")
    assert not is_known(layout, known)


@given(st.binary(max_size=100))
def test_a_structure_nobody_wrote_is_unknown(structure):
    layout = Layout((Leaf("float32", "float32", (2,)),), structure)
    known = KnownClasses([Pair])
    if is_known(layout, known):
        put_together(layout, np.zeros((N, 8), np.uint8), (CPU,), known)


def test_a_layout_too_large_to_try_is_unknown():
    huge = Leaf("complex128", "complex128", (2**31, 2**31, 2**31))
    layout, _, _ = stored([torch.rand(N)])
    assert not is_known(Layout((huge,), layout.structure), KnownClasses())


def test_plain_numbers_of_a_layout_are_told():
    known = KnownClasses()
    output = {"x": torch.rand(N), "n": N, "flag": True, "rest": (torch.Size([7]), 1.0, Pair(2, "2"))}
    layout, _, _ = stored(output, known=known)
    assert plain_numbers(layout, known) == {N, 7, 2}
    assert plain_numbers(stored(torch.rand(N))[0], known) == frozenset()
    assert plain_numbers(layout, KnownClasses()) == frozenset()
    assert class_name(Pair).encode() in layout.structure
