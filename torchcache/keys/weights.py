"""Whether weights still hold what they held when they were hashed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from xxhash import xxh3_128_digest

from torchcache.keys.digest import DIGEST_BYTES, LEAF_BYTES, digest_leaves
from torchcache.keys.fast.host_memory import PROBE_BYTES, extent_of, is_freed, memory_of
from torchcache.keys.tensor_kinds import PLAIN_TENSORS


@dataclass(frozen=True, slots=True)
class _Hashed:
    """A tensor's memory, and the digests of the leaves that it was cut into when it was hashed."""

    memory: memoryview
    leaves: bytes

    def differs_at(self, offset: int) -> bool:
        """Compare the leaf that begins at a byte."""
        leaf = self.memory[offset : offset + LEAF_BYTES]
        place = offset // LEAF_BYTES * DIGEST_BYTES
        return xxh3_128_digest(leaf) != self.leaves[place : place + DIGEST_BYTES]


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
        self._seen = list(map(_hash, tensors))  # None for one that is not in host memory
        self.whole_bytes: int = 0
        self._suspects: list[bool] = []
        self._whole: list[_Hashed] = []
        self._in_turn = _InTurn()
        self._on_devices: list[torch.Tensor] = []
        self._ends: list[bytes] = []
        self._has_moved = False
        self._divide(tensors)

    def leaves_of_values(self, tensors: Sequence[torch.Tensor]) -> list[bytes | None]:
        """Return the digests of leaves that are those of the tensors' values in row-major order too; else None."""
        found: list[bytes | None] = []
        for tensor, seen in zip(tensors, self._seen, strict=True):
            are_values = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
            found.append(seen.leaves if seen is not None and are_values else None)
        return found

    def follow(self, tensors: Sequence[torch.Tensor]) -> None:
        """Compare with other tensors of the same marks from now on, or the same ones of which others require grad."""
        if list(map(_is_suspect, tensors)) == self._suspects:
            self._on_devices = _suspects_on_devices(tensors)
            return

        # What required grad until now may have been written since the last call.
        self._has_moved = self._has_moved or self._whole_differs()
        ends = self._ends
        self._divide(tensors)
        # What was not compared on a device may have moved since it was hashed.
        self._has_moved = self._has_moved or self._ends != ends

    def take(self, numbers: Sequence[int], others: Contents, tensors: Sequence[torch.Tensor]) -> None:
        """Compare with other tensors at some places from now on, which hold what the former ones held.

        Args:
            numbers: Of these among all tensors.
            others: What they hold.
            tensors: All of them.
        """
        # What is compared whole until now may have been written since the last call; the memory of those that are
        # gone is not read any more.
        gone = set(numbers)
        stayed = [
            hashed
            for number, (hashed, was_suspect) in enumerate(zip(self._seen, self._suspects, strict=True))
            if hashed is not None and was_suspect and number not in gone
        ]
        self._has_moved = (
            self._has_moved
            or any(digest_leaves(hashed.memory) != hashed.leaves for hashed in stayed)
            or (bool(self._on_devices) and _read_ends(self._on_devices) != self._ends)
        )
        for number, hashed in zip(numbers, others._seen, strict=True):
            self._seen[number] = hashed
        self._divide(tensors)

    def have_moved(self, hashed_bytes: int = 0) -> bool:
        """Tell whether something else lies there, as far as this call looks.

        Args:
            hashed_bytes: How many bytes of input the last call hashed; the more, the larger is the share.
        """
        if self._has_moved:
            return True
        self._has_moved = (
            (bool(self._whole) and self._whole_differs())
            or self._in_turn.differs(hashed_bytes)
            or (bool(self._on_devices) and _read_ends(self._on_devices) != self._ends)
        )
        return self._has_moved

    def _whole_differs(self) -> bool:
        """Compare all of what is compared whole."""
        return any(digest_leaves(hashed.memory) != hashed.leaves for hashed in self._whole)

    def _divide(self, tensors: Sequence[torch.Tensor]) -> None:
        """Tell apart what is compared whole, in turn, and on devices; the turn goes on where it was."""
        self._suspects = list(map(_is_suspect, tensors))
        self._whole = []
        frozen: dict[int, _Hashed] = {}
        for number, (hashed, is_suspect) in enumerate(zip(self._seen, self._suspects, strict=True)):
            if hashed is None:
                continue
            if is_suspect:
                self._whole.append(hashed)
            elif hashed.memory.nbytes > 2 * PROBE_BYTES:  # of the smallest, the probes are all there is
                frozen[number] = hashed
        self.whole_bytes = sum(hashed.memory.nbytes for hashed in self._whole)
        self._in_turn.replace(frozen)
        self._on_devices = _suspects_on_devices(tensors)
        self._ends = _read_ends(self._on_devices)


class _InTurn:
    """Frozen tensors in host memory, of which each call compares the next leaves."""

    def __init__(self) -> None:
        self._frozen: list[_Hashed] = []
        self._numbers: list[int] = []  # of these among all tensors
        self._turn = 0  # which of these is under way
        self._offset = 0  # and how much of it was compared
        self._bytes_left = 0
        self._call = 0

    def replace(self, frozen: dict[int, _Hashed]) -> None:
        """Go on with these, by their number among all tensors, from the one that is under way."""
        under_way = self._numbers[self._turn] if self._numbers else 0
        self._numbers = list(frozen)
        self._frozen = list(frozen.values())
        self._turn = bisect_left(self._numbers, under_way) % max(1, len(self._numbers))
        if under_way not in self._numbers:
            self._offset = 0

    def differs(self, hashed_bytes: int) -> bool:
        """Compare what is due after a call that hashed so many bytes of input."""
        self._bytes_left += _BYTES_IN_TURN + hashed_bytes // _HASHED_PER_BYTE_IN_TURN
        self._call = (self._call + 1) % _CALLS_PER_TURN
        if self._call or not self._frozen:
            return False
        differs = self._share_differs()
        self._bytes_left = min(self._bytes_left, 0)
        return differs

    def _share_differs(self) -> bool:
        """Compare the next share, once around at most."""
        for _ in range(len(self._frozen)):
            hashed = self._frozen[self._turn]
            while self._offset < hashed.memory.nbytes:
                if self._bytes_left <= 0:
                    return False
                if hashed.differs_at(self._offset):
                    return True
                n_bytes = min(hashed.memory.nbytes - self._offset, LEAF_BYTES)
                self._offset += LEAF_BYTES
                self._bytes_left -= max(n_bytes, _BYTES_PER_LEAF)
            self._turn = (self._turn + 1) % len(self._frozen)
            self._offset = 0
        return False


#: At least this many bytes of the frozen tensors are compared per call, in turn: half a microsecond.
_BYTES_IN_TURN = 4096

#: The shares of this many calls are compared together: what is in no cache of the processor then is loaded once.
_CALLS_PER_TURN = 8

#: How many bytes of input a call hashes for each byte more, which is at most 3 % of the time that this takes.
_HASHED_PER_BYTE_IN_TURN = 64

#: What the digest of a small leaf costs, in bytes.
_BYTES_PER_LEAF = 8192

_ELEMENTS_AT_ENDS = 16


def _hash(tensor: torch.Tensor) -> _Hashed | None:
    """Hash a tensor in host memory; None for one that is elsewhere."""
    memory = memory_of(tensor)
    return None if memory is None else _Hashed(memory, digest_leaves(memory))


def _is_on_device(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type != "cpu" and type(tensor) in PLAIN_TENSORS and bool(tensor.numel()) and not is_freed(tensor)
    )


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
        flat = plain.as_strided((extent_of(plain),), (1,))
        both = flat[:_ELEMENTS_AT_ENDS], flat[-_ELEMENTS_AT_ENDS:]
        ends.setdefault(tensor.device, []).extend(end.view(torch.uint8) for end in both)
    return [bytes(torch.cat(parts).cpu().numpy()) for parts in ends.values()]
