"""The classes that a stored result may be rebuilt from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from torchcache.report.log import warn_once
from torchcache.results.nodes import Node, class_name
from torchcache.results.tensor_classes import loaded_class
from torchcache.results.tree import Tree, decode

#: At most this many decoded structures are remembered by each ``KnownClasses``.
_MOST_DECODED = 256


class KnownClasses:
    """The classes a stored tree may be rebuilt from, found by name; any thread may use it.

    Invariant: names are only ever added. A name that two classes bear is doubtful for good: the latest is
    found, and ``is_certain`` denies a tree that has it.

    Args:
        classes: Known from the start; others are learned from results, or found among those registered
            with ``torch.utils._pytree``, or among the classes of tensors and enums that are loaded.
    """

    def __init__(self, classes: Iterable[type] = ()) -> None:
        self._classes: dict[str, type[Any]] = {}
        self._doubtful: set[str] = set()
        self._decoded: dict[bytes, Node] = {}  # the decodable ones only: what is unknown may be learned
        for cls in classes:
            self.learn(cls)

    def learn(self, cls: type) -> None:
        """Let ``cls`` be found."""
        name = class_name(cls)
        before = self._classes.get(name)
        if before is cls or _is_draft_of(cls, before):
            return

        self._classes[name] = cls
        if before is None:
            return
        if not _is_draft_of(before, cls):
            self._doubtful.add(name)
        self._decoded = {}  # whose trees would be of the class before

    def learn_from(self, tree: Tree) -> None:
        """Let the classes of a result be found."""
        for cls in tree.node.classes():
            self.learn(cls)
            name = class_name(cls)
            if name in self._doubtful:
                warn_once(
                    ("doubtful class", name),
                    "results are instances of two classes named %s, so they are computed again at every call; "
                    "define the class once, outside of functions",
                    name,
                )

    def find(self, name: str) -> type[Any] | None:
        """Return the class of that name; None if it is not known."""
        cls = self._classes.get(name)
        if cls is not None:
            return cls
        # A copy: another thread may be importing a module that registers its classes.
        registered: list[object] = list(pytree.SUPPORTED_NODES)  # a function stands for all named tuples
        named = [kind for kind in registered if isinstance(kind, type) and class_name(kind) == name]
        if len(named) == 1:
            return named[0]
        loaded = loaded_class(name)
        if loaded is not None:
            self.learn(loaded)  # so that another class of that name is noticed
        return loaded

    def is_certain(self, node: Node) -> bool:
        """Tell whether each class of the tree is the only one of its name."""
        if not self._doubtful:
            return True
        return all(class_name(cls) not in self._doubtful for cls in node.classes())

    def decode(self, structure: bytes, stand_ins: Callable[[int], Sequence[object]]) -> Node | None:
        """Return the tree that ``structure`` describes.

        Args:
            structure: Whatever a store gave; not one lone leaf.
            stand_ins: Makes that many leaves to try the tree with, the first time.

        Returns:
            The tree; None if this process cannot rebuild it, or the bytes describe none.
        """
        node = self._decoded.get(structure)
        if node is not None:
            return node
        try:
            node = decode(structure, self.find, stand_ins)
        except Exception:  # noqa: BLE001 - foreign bytes, and what other people registered: the row is computed
            return None
        if len(self._decoded) >= _MOST_DECODED:
            self._decoded = {}
        self._decoded[structure] = node
        return node


def _is_draft_of(cls: type, other: type | None) -> bool:
    """Tell whether ``other`` is what ``dataclass(slots=True)`` made of ``cls``.

    It makes a second class of the first one's parts, and methods of a frozen one still lead to the first.
    """
    fields = vars(cls).get("__dataclass_fields__")
    if fields is None or other is None:
        return False
    return vars(other).get("__dataclass_fields__") is fields and "__slots__" in vars(other)
