"""Whether tensors were changed: what torch counts of them, a probe of their memory, and what they hold."""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from xxhash import xxh3_128_digest

from torchcache.keys.digest import DIGEST_BYTES, LEAF_BYTES, digest_leaves
from torchcache.keys.mode import autocast_in_force
from torchcache.keys.tensor_digest import is_freed

_PROBE_BYTES = 64


class Marks:
    """What torch says of tensors without their bytes: where they lie, what form they have, how often written.

    A write through ``.data`` counts no version, but the tensor it puts in place may lie elsewhere or, if it is a
    part or a view of the old one, have another form. Built for speed: one call of C a tensor and question, and
    for the form one for all, where torch's own guards of compiled code can be asked.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._counted = [t for t in tensors if not t.is_inference()]  # the others count no versions
        self._matrices = [t for t in tensors if t.dim() > 1]
        self._guards: dict[tuple[object, ...], Any] = {}

    def read(self) -> tuple[list[object], ...]:
        """Return where the tensors lie and how often they were written."""
        return list(map(_POINTER, self._tensors)), list(map(_VERSION, self._counted))

    def forms(self) -> tuple[list[object], ...]:
        """Return sizes, strides, dtypes, who is lazily conjugated or negated, and who requires grad."""
        return (
            list(map(_BYTES, self._tensors)),
            list(map(_STRIDES, self._matrices)),
            list(map(_DTYPE, self._tensors)),
            [(tensor.is_conj(), tensor.is_neg()) for tensor in self._tensors],
            list(map(_REQUIRES_GRAD, self._tensors)),
        )

    def have_form(self, seen: tuple[list[object], ...]) -> bool:
        """Tell whether ``forms`` would still return what was ``seen``."""
        if not self._tensors:
            return True
        # What a guard sees depends on these: the tensors' dispatch keys are masked by them.
        surroundings = torch.is_inference_mode_enabled(), autocast_in_force()
        guard = self._guards.get(surroundings)
        if guard is not None and guard.check(*self._tensors):
            return True
        if self.forms() != seen:
            return False
        if len(self._guards) < _MOST_GUARDS:
            self._guards[surroundings] = _make_guard(self._tensors)
        return True


#: Guards are kept for so many surroundings (inference mode, autocast).
_MOST_GUARDS = 8

_POINTER = torch.Tensor.data_ptr
_VERSION = attrgetter("_version")
_BYTES = attrgetter("nbytes")
_STRIDES = torch.Tensor.stride
_DTYPE = attrgetter("dtype")
_REQUIRES_GRAD = attrgetter("requires_grad")


def _make_guard(tensors: Sequence[torch.Tensor]) -> Any:  # noqa: ANN401 - a class of torch without a public name
    """Return torch's check that tensors keep their form; None where this torch has none that does."""
    return _guard_of(tensors) if _guards_work() else None


def _guard_of(tensors: Sequence[torch.Tensor]) -> Any:  # noqa: ANN401 - as above
    guards: Any = torch._C._dynamo.guards  # noqa: SLF001 - what it promises is tried below
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


@lru_cache(maxsize=1)
def _guards_work() -> bool:
    """Try the guards of this torch once: they are no public interface."""
    tensor = torch.zeros(4, 4, device="cpu", dtype=torch.float32)
    forms = (tensor.t(), tensor[:2], tensor.view(torch.int32), tensor.view(2, 8))
    try:
        guard = _guard_of([tensor])
        return bool(guard.check(tensor)) and not any(map(guard.check, forms))
    except Exception:  # noqa: BLE001 - whatever a later torch makes of it: the tensors are asked one by one
        return False


class Contents:
    """What weights held when they were hashed, to be compared with what they hold now.

    In host memory, tensors that require grad, and those of which torch counts no writes, are compared whole at each
    call: they are what training code writes, also in ways that torch does not count. The others are compared in turn, a
    share per call. On a device, the first and last elements of the former are compared, and nothing of the others.

    Addresses are read only while a tensor's pointer is unchanged, so they cannot outlive its memory: whoever asks
    compares ``Marks`` first.

    Args:
        tensors: The tensors, which are read now.

    Attributes:
        whole_bytes: How much is compared whole at each call.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        memories = [_memory_of(tensor) for tensor in tensors]
        self._seen = [None if memory is None else (memory, digest_leaves(memory)) for memory in memories]
        self.whole_bytes = 0
        self._suspects: list[bool] = []
        self._whole: list[tuple[memoryview, bytes]] = []
        self._frozen: list[tuple[memoryview, bytes]] = []
        self._numbers: list[int] = []  # of these among all tensors
        self._turn = 0  # which of these is under way
        self._offset = 0  # and how much of it was compared
        self._bytes_left = 0
        self._call = 0
        self._on_devices: list[torch.Tensor] = []
        self._ends: list[bytes] = []
        self._has_moved = False
        self._divide(tensors)

    def leaves_of_values(self, tensors: Sequence[torch.Tensor]) -> list[bytes | None]:
        """Return the digests of leaves that are those of the tensors' values in row-major order too; else None."""
        return [
            seen[1] if seen and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() else None
            for tensor, seen in zip(tensors, self._seen, strict=True)
        ]

    def follow(self, tensors: Sequence[torch.Tensor]) -> None:
        """Compare with other tensors of the same marks from now on, or the same ones of which others require grad."""
        if list(map(_is_suspect, tensors)) != self._suspects:
            # What required grad until now may have been written since the last call.
            self._has_moved = self._has_moved or self._whole_differs()
            ends = self._ends
            self._divide(tensors)
            # What was not compared on a device may have moved since it was hashed.
            self._has_moved = self._has_moved or self._ends != ends
        else:
            self._on_devices = _suspects_on_devices(tensors)

    def have_moved(self, hashed_bytes: int = 0) -> bool:
        """Tell whether something else lies there, as far as this call looks.

        Args:
            hashed_bytes: How many bytes of input the last call hashed; the more, the larger is the share.
        """
        if self._has_moved:
            return True
        self._has_moved = self._whole_differs()
        self._bytes_left += _BYTES_IN_TURN + hashed_bytes // _HASHED_PER_BYTE_IN_TURN
        self._call = (self._call + 1) % _CALLS_PER_TURN
        if not self._call and self._frozen:
            self._has_moved = self._has_moved or self._share_differs()
            self._bytes_left = min(self._bytes_left, 0)
        if self._on_devices:
            self._has_moved = self._has_moved or _read_ends(self._on_devices) != self._ends
        return self._has_moved

    def _whole_differs(self) -> bool:
        """Compare all of what is compared whole."""
        return any(digest_leaves(memory) != leaves for memory, leaves in self._whole)

    def _share_differs(self) -> bool:
        """Compare the next share of the frozen tensors, once around at most."""
        for _ in range(len(self._frozen)):
            memory, leaves = self._frozen[self._turn]
            while self._offset < memory.nbytes:
                if self._bytes_left <= 0:
                    return False
                leaf, at = memory[self._offset : self._offset + LEAF_BYTES], self._offset // LEAF_BYTES * DIGEST_BYTES
                if xxh3_128_digest(leaf) != leaves[at : at + DIGEST_BYTES]:
                    return True
                self._offset += LEAF_BYTES
                self._bytes_left -= max(leaf.nbytes, _BYTES_PER_LEAF)
            self._turn, self._offset = (self._turn + 1) % len(self._frozen), 0
        return False

    def _divide(self, tensors: Sequence[torch.Tensor]) -> None:
        """Tell apart what is compared whole, in turn, and on devices; the turn goes on where it was."""
        self._suspects = list(map(_is_suspect, tensors))
        seen = list(zip(self._seen, self._suspects, strict=True))
        self._whole = [each for each, is_suspect in seen if each and is_suspect]
        self.whole_bytes = sum(memory.nbytes for memory, _ in self._whole)

        under_way = self._numbers[self._turn] if self._numbers else 0
        # Of the smallest, the probes are all there is.
        frozen = {
            number: each for number, (each, is_suspect) in enumerate(seen)
            if each and not is_suspect and each[0].nbytes > 2 * _PROBE_BYTES
        }  # fmt: skip
        self._numbers, self._frozen = list(frozen), list(frozen.values())
        self._turn = bisect_left(self._numbers, under_way) % max(1, len(self._numbers))
        if under_way not in self._numbers:
            self._offset = 0

        self._on_devices = _suspects_on_devices(tensors)
        self._ends = _read_ends(self._on_devices)


#: So much of the frozen tensors is compared per call, in turn: half a microsecond.
_BYTES_IN_TURN = 4096

#: The shares of so many calls are compared together: what is in no cache of the processor then is loaded once.
_CALLS_PER_TURN = 8

#: One byte more for so many bytes of input that a call hashes, which is at most 3 % of the time that this takes.
_HASHED_PER_BYTE_IN_TURN = 64

#: What the digest of a small leaf costs, in bytes.
_BYTES_PER_LEAF = 8192

_ELEMENTS_AT_ENDS = 16

_PLAIN = (torch.Tensor, nn.Parameter)


def _memory_of(tensor: torch.Tensor) -> memoryview | None:
    """Return a live view of a tensor in host memory, from its first to its last element; None if it is elsewhere."""
    place = _place_of(tensor)
    if place is None:
        return None
    pointer, size = place
    return memoryview((ctypes.c_char * size).from_address(pointer)).cast("B")


def probes_of(tensor: torch.Tensor) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """Yield the first and last bytes of a tensor in host memory, as live views.

    They are read only while the tensor's pointer is unchanged, so they cannot outlive its memory.
    """
    place = _place_of(tensor)
    if place is None:
        return
    pointer, size = place
    first = min(size, _PROBE_BYTES)
    yield (ctypes.c_char * first).from_address(pointer)
    if size > first:
        last = min(size - first, _PROBE_BYTES)
        yield (ctypes.c_char * last).from_address(pointer + size - last)


def _place_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the address of a tensor in host memory and how far it is from its first byte to its last one."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return None
    if type(tensor) not in _PLAIN:
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return None  # its class decides where its values are
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents it for subclasses
            tensor = tensor.as_subclass(torch.Tensor)
    if is_freed(tensor):
        return None
    pointer = tensor.data_ptr()
    return (pointer, _extent_of(tensor) * tensor.element_size()) if pointer else None


def _is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu" and type(tensor) in _PLAIN and bool(tensor.numel()) and not is_freed(tensor)


def _is_suspect(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor may well be written without torch counting it."""
    return tensor.requires_grad or tensor.is_inference()


def _suspects_on_devices(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if _is_suspect(tensor) and _is_on_device(tensor)]


def _read_ends(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Return the first and last elements of tensors on devices, copied to the host together."""
    ends: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        plain = tensor.detach().resolve_conj().resolve_neg()
        flat = plain.as_strided((_extent_of(plain),), (1,))
        both = flat[:_ELEMENTS_AT_ENDS], flat[-_ELEMENTS_AT_ENDS:]
        ends.setdefault(tensor.device, []).extend(end.view(torch.uint8) for end in both)
    return [bytes(torch.cat(parts).cpu().numpy()) for parts in ends.values()]


def _extent_of(tensor: torch.Tensor) -> int:
    """Return how many elements its storage has from a tensor's first one to its last one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
