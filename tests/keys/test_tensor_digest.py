"""The digest of a tensor is that of its bytes, and what computes it on a device never holds it twice.

No accelerator is needed: what runs on one is called here with tensors in host memory.
"""

from __future__ import annotations

import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from xxhash import xxh3_128_digest

from torchcache.keys.digest import LEAF_BYTES, digest_bytes
from torchcache.keys.fast import device_digest
from torchcache.keys.fast.device_digest import PIECE_BYTES, digest_on_device
from torchcache.keys.tensor_digest import digest_tensor
from torchcache.keys.tensors import byte_view

LEAF = LEAF_BYTES
PIECE = 4 * LEAF


def random_bytes(n, seed=0):
    return np.random.default_rng(seed).bytes(n)


def as_tensor(data):
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


@pytest.fixture
def never_exact(monkeypatch):
    """Let the device be one that lacks the operations."""
    monkeypatch.setattr(device_digest, "_computes_exactly", lambda _: False)


@pytest.fixture
def no_xxhash_of_leaves(monkeypatch):
    """Let xxhash refuse full leaves, so that what hashes them is the tensor operations."""

    def refuse_leaves(data):
        assert len(data) != LEAF
        return xxh3_128_digest(data)

    assert device_digest._computes_exactly(torch.device("cpu"))  # asks xxhash, once
    monkeypatch.setattr(device_digest, "xxh3_128_digest", refuse_leaves)


SIZES = [0, 1, 63, 240, 241, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF - 1, 2 * LEAF, PIECE - 1, PIECE, PIECE + 1]
SIZES += [PIECE + LEAF, 3 * PIECE, 3 * PIECE + 5, 1_000_003]


@pytest.mark.usefixtures("no_xxhash_of_leaves")
@pytest.mark.parametrize("n", SIZES)
def test_the_device_computes_the_digest_of_the_bytes(n):
    data = random_bytes(n, seed=n)
    assert digest_on_device(as_tensor(data), PIECE) == digest_bytes(data)
    assert digest_on_device(as_tensor(data)) == digest_bytes(data)


@pytest.mark.usefixtures("no_xxhash_of_leaves")
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_words_with_and_without_their_sign_bit_carry_alike(byte):
    data = bytes([byte]) * (3 * LEAF)
    assert digest_on_device(as_tensor(data)) == digest_bytes(data)


@given(st.integers(0, 3 * LEAF - 1), st.integers(0, 255))
def test_every_byte_counts_where_it_lies(place, byte):
    data = bytearray(3 * LEAF)
    data[place] = byte
    assert digest_on_device(as_tensor(data), LEAF) == digest_bytes(bytes(data))


@pytest.mark.usefixtures("no_xxhash_of_leaves")
@pytest.mark.parametrize("offset", range(9))
def test_bytes_that_do_not_begin_at_a_word_are_read_too(offset):
    data = random_bytes(3 * LEAF + 9)
    assert digest_on_device(as_tensor(data)[offset:], LEAF) == digest_bytes(data[offset:])


@pytest.mark.usefixtures("no_xxhash_of_leaves")
@pytest.mark.parametrize(("base", "offset"), [(1, 0), (1, 7), (0, 3)])
def test_what_does_not_begin_at_a_word_of_its_storage_or_memory_is_copied(base, offset):
    """A CPU would read it all the same, an accelerator would not."""
    array = np.frombuffer(bytearray(random_bytes(2 * LEAF + 16)), np.uint8)
    storage = torch.from_numpy(array[(base - array.ctypes.data) % 8 :])
    view = storage[offset : offset + 2 * LEAF]
    assert (view.data_ptr() % 8, view.storage_offset()) == ((base + offset) % 8, offset)
    with Storages() as storages:
        digest = digest_on_device(view)
    assert digest == digest_bytes(view.numpy().tobytes())
    assert "aten.clone.default" in storages.made_by


@pytest.mark.usefixtures("no_xxhash_of_leaves")
def test_the_digests_of_leaves_are_not_cut_into_leaves_again():
    data = random_bytes(LEAF) * (LEAF // 16 + 1)
    assert digest_on_device(as_tensor(data)) == digest_bytes(data)


@pytest.mark.usefixtures("never_exact")
@pytest.mark.parametrize("n", SIZES)
def test_a_device_that_lacks_the_operations_has_the_same_digest(n):
    data = random_bytes(n, seed=n)
    assert digest_on_device(as_tensor(data), PIECE) == digest_bytes(data)


@pytest.mark.parametrize("fault", ["raises", "wrong bits"])
def test_a_device_that_cannot_compute_it_is_found_out(monkeypatch, fault):
    accumulate = device_digest._accumulate

    def faulty(leaves):
        if fault == "raises":
            raise NotImplementedError
        return accumulate(leaves) + 1

    monkeypatch.setattr(device_digest, "_accumulate", faulty)
    # The answer kept for this process is not to be changed.
    assert not device_digest._computes_exactly.__wrapped__(torch.device("cpu"))


def test_a_digest_by_value():
    data = bytes(i * 7 % 251 for i in range(602_112))
    assert digest_on_device(as_tensor(data)).hex() == "79b25f56e8d5cdccf46d835ca28e8fe9"
    assert digest_tensor(as_tensor(data)).hex() == "79b25f56e8d5cdccf46d835ca28e8fe9"


# -- tensors ----------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.int64, torch.complex32, torch.complex64]
DTYPES += [torch.complex128]


def both_ways(tensor):
    """Return the digest in host memory and that of the device, after seeing that they agree."""
    digest = digest_tensor(tensor)
    assert digest_on_device(byte_view(tensor), PIECE) == digest
    return digest


def example(dtype, shape):
    n = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
    data = bytes(b & 1 for b in random_bytes(n)) if dtype is torch.bool else random_bytes(n)
    return as_tensor(data).view(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (7, 5, 11), (3, 16, 64, 32)], ids=str)
def test_a_tensor_of_any_dtype_counts_by_its_bytes(dtype, shape):
    tensor = example(dtype, shape)
    assert both_ways(tensor) == digest_bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_count(dtype):
    tensor = example(dtype, (4, 6, 32, 34))
    digest = both_ways(tensor)
    bytes_by_hand = b"".join(value.reshape(1).view(torch.uint8).numpy().tobytes() for value in tensor[0, 0].reshape(-1))
    assert digest_bytes(bytes_by_hand) == both_ways(tensor[0, 0])

    channels_last = tensor.contiguous(memory_format=torch.channels_last)
    assert not channels_last.is_contiguous()
    assert both_ways(channels_last) == digest

    padded = torch.zeros(4, 6, 32, 40, dtype=torch.uint8).repeat_interleave(tensor.element_size(), -1).view(dtype)
    padded[..., :34] = tensor
    assert both_ways(padded[..., :34]) == digest

    expanded = tensor[:1].expand(3, -1, -1, -1)
    rows = [tensor[:1].reshape(-1).view(torch.uint8)] * 3
    assert both_ways(expanded) == digest_bytes(torch.cat(rows).numpy().tobytes())


def test_what_torch_negates_and_conjugates_lazily_counts_by_value():
    tensor = torch.complex(torch.randn(70, 90), torch.randn(70, 90))
    conjugate, negative = tensor.conj(), tensor.conj().imag
    assert conjugate.is_conj()
    assert negative.is_neg()
    assert both_ways(conjugate) == digest_bytes(np.conjugate(tensor.numpy()).tobytes()) != both_ways(tensor)
    assert both_ways(conjugate.T) == digest_bytes(np.conjugate(tensor.numpy()).T.tobytes())
    assert both_ways(negative) == digest_bytes((-tensor.numpy().imag).tobytes())


def test_bits_decide_not_numbers():
    zeros = torch.zeros(2 * LEAF)
    assert both_ways(zeros) != both_ways(-zeros)
    one_nan, other_nan = (torch.full((2 * LEAF,), bits, dtype=torch.int32) for bits in (0x7FC00000, 0x7FC00001))
    assert both_ways(one_nan.view(torch.float32)) != both_ways(other_nan.view(torch.float32))


def test_empty_tensors_have_the_digest_of_no_bytes():
    for tensor in (torch.empty(0), torch.empty(3, 0, 2), torch.empty(0, 3, dtype=torch.complex128)[:, ::2]):
        assert both_ways(tensor) == digest_bytes(b"")


@pytest.mark.parametrize("values", [torch.randn(300, 300), torch.randn(300, 300).double().T], ids=["contiguous", "not"])
def test_a_parameter_counts_whatever_the_grad_mode(values):
    parameter = torch.nn.Parameter(values)
    with torch.inference_mode():
        inside = both_ways(parameter)
        born_inside = parameter.clone()
    assert both_ways(parameter) == both_ways(born_inside) == inside == digest_bytes(values.numpy().tobytes())


def test_a_tensor_without_plain_bytes_has_no_digest():
    with warnings.catch_warnings():  # torch warns of both, once a process
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    for tensor in (torch.empty(3, device="meta"), torch.eye(3).to_sparse(), nested, quantized):
        assert byte_view(tensor) is None
        assert digest_tensor(tensor) is None


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.complex128]
)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3), (), (1,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("step", [2, 3])
def test_a_tensor_of_one_element_or_none_counts_whatever_its_strides(dtype, shape, step):
    wide = torch.ones(*shape, step, dtype=dtype)
    tensor = wide[..., 1]
    assert byte_view(tensor) is not None
    assert both_ways(tensor) == both_ways(tensor.clone(memory_format=torch.contiguous_format))


def test_a_contiguous_tensor_is_viewed_not_copied():
    tensor = torch.randn(50, 60)
    assert byte_view(tensor).data_ptr() == tensor.data_ptr()
    assert byte_view(tensor[3:]).data_ptr() == tensor[3:].data_ptr()


def test_torch_copies_nothing_in_host_memory():
    """Its parallel copies hang in a forked child."""
    tensors = [torch.randn(300, 400).T, torch.randn(300, 400).bfloat16().T, torch.randn(4, 400).expand(100, 4, 400)]
    with Storages() as storages:
        digests = [digest_tensor(tensor) for tensor in tensors]
    assert not storages.made_by
    assert digests == [digest_tensor(tensor.contiguous()) for tensor in tensors]


# -- bounds ----------


class Storages(TorchDispatchMode):
    """Follow the memory that operations allocate: what lives, the most that lived, and what made it."""

    def __init__(self):
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.made_by = []
        self._users = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() and not any(result is each for each in args):
            storage = result.untyped_storage()
            pointer, size = storage.data_ptr(), storage.nbytes()
            if pointer in known and pointer not in self._users:
                return result  # a view of what was there before
            if pointer not in known:
                self.made_by.append(str(func))
            if not self._users.setdefault(pointer, 0):
                self.live_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._users[pointer] += 1
            weakref.finalize(result, self._drop, pointer, size)
        return result

    def _drop(self, pointer, size):
        self._users[pointer] -= 1
        if not self._users[pointer]:
            del self._users[pointer]
            self.live_bytes -= size


@pytest.mark.parametrize(("offset", "least"), [(0, 2), (1, 3)], ids=["aligned", "not aligned"])
def test_temporaries_are_bounded_by_the_piece_not_by_the_tensor(offset, least):
    piece = 64 * LEAF
    view = as_tensor(random_bytes(8 * piece + LEAF + 77))[offset:]
    digest_on_device(view[:LEAF])  # the device is asked now whether it computes exactly
    with Storages() as storages:
        digest = digest_on_device(view, piece)
    assert digest == digest_bytes(view.numpy().tobytes())
    assert least * piece <= storages.peak_bytes <= 3.25 * piece


def test_only_accumulators_and_the_last_leaf_come_to_the_host(monkeypatch):
    moved = []
    cpu = torch.Tensor.cpu

    def counting(tensor):
        moved.append(tensor.nbytes)
        return cpu(tensor)

    n = 8 * PIECE + LEAF + 77
    view = as_tensor(random_bytes(n))
    digest_on_device(view[:LEAF])
    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    assert digest_on_device(view, PIECE) == digest_bytes(view.numpy().tobytes())
    assert moved == [4 * 64] * 8 + [64, 77]


@pytest.mark.usefixtures("never_exact")
def test_without_the_operations_no_more_than_a_piece_comes_to_the_host(monkeypatch):
    moved = []
    cpu = torch.Tensor.cpu

    def counting(tensor):
        moved.append(tensor.nbytes)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    digest_on_device(as_tensor(random_bytes(3 * PIECE + 5)), PIECE)
    assert moved == [PIECE, PIECE, PIECE, 5]


def test_the_size_of_a_piece_is_a_multiple_of_a_leaf():
    assert PIECE_BYTES == 64 * 1024 * 1024
    assert PIECE_BYTES % LEAF == 0


def test_every_accelerator_that_is_here_has_the_digest_of_the_host():
    for backend in (torch.cuda, torch.mps, torch.xpu):
        if not backend.is_available():
            continue
        device = torch.device(backend.__name__.rpartition(".")[2])
        assert device_digest._computes_exactly(device)
        for n in SIZES:
            data = random_bytes(n, seed=n)
            assert digest_tensor(as_tensor(data).to(device)) == digest_bytes(data)


def test_hashing_weights_leaves_torch_free_to_resize_them():
    """FSDP frees weights so; what was once seen by NumPy cannot be resized any more."""
    for tensor in (torch.rand(8, 4), torch.rand(8, 4).t()):
        digest_tensor(tensor)
        assert tensor.untyped_storage().resizable()
        tensor.untyped_storage().resize_(0)
