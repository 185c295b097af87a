"""Classes derived from ``torch.Tensor`` whose objects are a plain tensor and attributes, and nothing else."""

from __future__ import annotations

import enum
import sys
import types
from typing import Any
from weakref import WeakKeyDictionary

import torch

from torchcache.keys.tensor_kinds import as_plain, notes_on, unsupported_kind
from torchcache.results.nodes import class_name

#: Which classes were found to be such.
_known: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def is_kept_whole(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is of a derived class or has attributes, and can be kept with both."""
    if type(tensor) is torch.Tensor:
        return bool(notes_on(tensor))
    return is_plain_with_attributes(type(tensor)) and unsupported_kind(plain_part(tensor)) is None


def is_plain_with_attributes(kind: type[Any]) -> bool:
    """Tell whether objects of a class are a plain tensor with attributes.

    One whose class takes part in dispatching, or that has slots, holds more than that.
    """
    is_such = _known.get(kind)
    if is_such is None:
        is_such = _known[kind] = _holds_no_more(kind)
    return is_such


def _holds_no_more(kind: type[Any]) -> bool:
    if not issubclass(kind, torch.Tensor) or issubclass(kind, torch.nn.Parameter):
        return False
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return False
    for base in kind.__mro__[: kind.__mro__.index(torch.Tensor)]:
        if any(isinstance(member, types.MemberDescriptorType) for member in vars(base).values()):
            return False
    return True


def plain_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor of one that is kept whole; it shares its memory."""
    plain = as_plain(tensor)
    assert plain is not None
    return plain.detach()


def attributes_on(tensor: torch.Tensor) -> dict[str, object]:
    """Return the attributes of a tensor that is kept whole."""
    return notes_on(tensor)


def with_class(tensor: torch.Tensor, kind: type[Any], attributes: dict[str, object]) -> torch.Tensor:
    """Return a plain tensor as one of a derived class with attributes. No code of the class runs."""
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents it for subclasses
        made: torch.Tensor = tensor.as_subclass(kind)
    vars(made).update(attributes)
    return made


def loaded_class(name: str) -> type[Any] | None:
    """Return the class of a name, if this process has loaded it and it is derived from ``Tensor`` or ``Enum``.

    Nothing is imported, and no module is asked to load what it does not have.

    Args:
        name: Module and qualified name, as ``class_name`` puts them together.
    """
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:n]) or "__main__")
        if isinstance(module, types.ModuleType):
            found: object = module
            for part in parts[n:]:
                found = getattr(found, "__dict__", {}).get(part)
            if isinstance(found, type) and issubclass(found, (torch.Tensor, enum.Enum)) and class_name(found) == name:
                return found
    return None
