"""What one look at the state saw, in a form that the next call compares quickly."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import nn

from torchcache.keys.collector import StateCollector
from torchcache.keys.digest import digest_named
from torchcache.keys.fast.attribute_dicts import Makeup
from torchcache.keys.fast.host_memory import probes_of
from torchcache.keys.fast.marks import Marks
from torchcache.keys.layers import WITHOUT_WEIGHTS
from torchcache.keys.walked import CodeWalk


class Snapshot:
    """What one look at the state saw.

    Args:
        root: The module or object whose state counts; None for a function.
        walk: What the code walk found; None leaves out all but training flags.
        is_inside: Whether calls of the module itself, with its hooks, may come from inside what is cached.
        ignored: What does not count: attributes, globals and closure variables by their path.
        flags: Training flags to count in place of those that are set, by the number of the module.

    Attributes:
        found: What was found, by its kind.
        code: The functions and classes that were found.
        plain: Digest of all that is not a weight.
        tensors: The weights that are to be hashed and compared.
        parameters: The parameters, in the order of the module tree.
        requires_grad: Whether one of them required grad.
    """

    def __init__(
        self,
        root: object,
        walk: CodeWalk | None,
        *,
        is_inside: bool,
        ignored: frozenset[str],
        flags: Mapping[int, bool] | None = None,
    ) -> None:
        self.found: StateCollector = StateCollector(walk, ignored, flags)
        self.found.collect(root, is_inside=is_inside)
        self.code: list[object] = self.found.code
        self.plain: bytes = digest_named(self.found.parts)
        self.parameters: list[torch.Tensor] = [t for t in self.found.tensors if isinstance(t, nn.Parameter)]
        self.requires_grad: bool = any(parameter.requires_grad for parameter in self.parameters)
        has_weights = walk is not None and self.found.reason not in WITHOUT_WEIGHTS
        self.tensors: list[torch.Tensor] = self.found.tensors if has_weights else []

        # What is there now, to be compared at the next call.
        self._modules = self.found.modules
        self._root = None if root is None else weakref.ref(root)
        self._makeup = Makeup(self._owners())
        # Alive, so that no other dictionary takes the place of one; that of the root is watched, too.
        self._attributes = list(map(vars, self._modules))
        self._watched = self.found.watched
        self._watched.remember()
        self._marks = Marks(self.tensors)
        self._seen_marks = self._marks.read()
        self._seen_forms = self._marks.forms()
        probes = [[*probes_of(tensor)] for tensor in self.tensors]
        self._probes = [probe for of_tensor in probes for probe in of_tensor]
        self._seen_probes = b"".join(self._probes)
        self._probe_bytes = [sum(map(len, of_tensor)) for of_tensor in probes]

    def is_same(self, other: Snapshot) -> bool:
        """Tell whether two looks saw the same state."""
        return self.plain == other.plain and self.seen_weights() == other.seen_weights()

    def seen_weights(self) -> tuple[object, ...]:
        """Return what was seen of the weights short of hashing them."""
        return self._seen_marks, self._seen_forms[:-1], self._seen_probes

    def replaced_since(self, before: Snapshot) -> list[int] | None:
        """Return which tensors took the place of others since an earlier look; None if anything else moved.

        What a tensor holds that was written in place, as torch counts it, does not tell what it held meanwhile, where
        another thread wrote it: that has moved, whatever is there now.
        """
        if self.plain != before.plain or len(self.tensors) != len(before.tensors):
            return None
        replaced: list[int] = []
        for number, (now, then) in enumerate(zip(self._seen_each(), before._seen_each(), strict=True)):
            is_same_tensor = self.tensors[number] is before.tensors[number]
            if now == then and is_same_tensor:
                continue
            (_, version, *_), (_, version_then, *_) = now, then
            if is_same_tensor and version != version_then:
                return None
            replaced.append(number)
        return replaced

    def written_since(self, before: Snapshot) -> list[int]:
        """Return which tensors were written or replaced since an earlier look at as many, as far as a look shows."""
        return [
            number
            for number, (now, then) in enumerate(zip(self._seen_each(), before._seen_each(), strict=True))
            if now != then or self.tensors[number] is not before.tensors[number]
        ]

    def weight_paths(self) -> list[str]:
        """Return the paths of the tensors."""
        return [path for path, _ in self.found.named_tensors] if self.tensors else []

    def _seen_each(self) -> list[tuple[object, ...]]:
        """Return what was seen of each tensor, short of hashing it."""
        found: list[tuple[object, ...]] = []
        offset = 0
        marks = self._marks.each(self._seen_marks, self._seen_forms)
        for mark, n_bytes in zip(marks, self._probe_bytes, strict=True):
            found.append((*mark, self._seen_probes[offset : offset + n_bytes]))
            offset += n_bytes
        return found

    def moved_marks(self) -> object:
        """Return what torch says of all tensors, whether they count or not; None if they count and it says as then."""
        marks = Marks(self.found.tensors)
        now = marks.read(), marks.forms()
        if self.tensors is self.found.tensors and now == (self._seen_marks, self._seen_forms):
            return None
        return now

    def _owners(self) -> list[object]:
        """Return the modules, and the root, which is held weakly, as the last one; None once it is gone."""
        return [*self._modules] if self._root is None else [*self._modules, self._root()]

    def looks_moved(self) -> bool:
        """Compare with the present; costs tens of microseconds for a ViT-B."""
        try:
            return (
                self._watched.have_moved()
                or self._makeup.has_changed(self._owners())
                or self._marks.read() != self._seen_marks
                or not self._marks.have_form(self._seen_forms)
                or b"".join(self._probes) != self._seen_probes
            )
        except Exception:  # noqa: BLE001 - a foreign __eq__ may raise anything (a tensor's does); then look again
            return True
