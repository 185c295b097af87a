"""Classes whose objects have a value that a function of somebody's can tell. This module does not import torch.

``register_value`` is for users. What comes with torchcache (``registered.py``) is found by the names of classes, so
that no library is imported for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torchcache.errors import ConfigError

T = TypeVar("T")

Encode = Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Registration:
    """How the value of objects of a class is told.

    Attributes:
        encode: Returns what an object is made of: plain values, arrays, tensors, or a tuple of these. What it raises
            says that the object has no value that can be told.
        is_immutable: Whether an object of exactly that class never changes, so that it need not be encoded again.
        stands_for_subclasses: Whether objects of derived classes are told by it alone. Else their further attributes
            count too, and objects of a derived class that has more than attributes are not told by it.
        quick: Returns a part of that, for objects too large to be encoded at each call: what shows most changes
            at once. The whole is encoded now and then.
        names_code: What it returns says which code its objects run, too, so that the code is not walked where such an
            object is the target.
    """

    encode: Encode
    is_immutable: bool = False
    stands_for_subclasses: bool = False
    quick: Encode | None = None
    names_code: bool = False


#: The registrations of users, by class; and of torchcache, by top-level package and qualified name of the class.
_by_class: dict[type, Registration] = {}
_by_name: dict[tuple[str, str], Registration] = {}
#: And of attributes that are told in another way than elsewhere, by the class that has them.
_parts: dict[str, tuple[tuple[str, str], Registration]] = {}
#: The classes that users registered, in order.
_registered: list[type] = []


def register_value(cls: type[T], encode: Callable[[T], object]) -> None:
    """Say what objects of a class are made of, so that they can be part of a key.

    For classes whose state torchcache cannot see: written in C, or behind a handle. ``encode`` is called at each call
    of what is cached, so a change of the object is seen. A second registration of a class replaces the first.

    Args:
        cls: The class. Objects of classes derived from it are told by ``encode`` as well, and by their further
            attributes; register a derived class to say more.
        encode: Takes an object and returns plain values, NumPy arrays, tensors, or a tuple, list or dict of these, in
            which registered objects may lie too. Equal ones must mean equal results. If it raises, the object counts
            as one without a value, and the call is not cached.

    Raises:
        ConfigError: If ``cls`` is no class or ``encode`` cannot be called.

    Example:
        >>> import torchcache
        >>> class Index:  # stands for a class written in C
        ...     def __init__(self, path): self.path = path
        >>> torchcache.register_value(Index, lambda index: index.path)
    """
    if not isinstance(cls, type):
        raise ConfigError(f"cls={cls!r} must be a class; pass type(value) to register one object's", argument="cls")
    if not callable(encode):
        raise ConfigError(
            f"encode={encode!r} must be a function that takes an object of {cls.__qualname__}", argument="encode"
        )
    _by_class[cls] = Registration(encode)
    _registered.append(cls)


def ship(package: str, name: str, registration: Registration) -> None:
    """Register a class that a library has under that name, whether the library is installed or not."""
    _by_name[package, name] = registration


def ship_part(package: str, name: str, attribute: str, registration: Registration) -> None:
    """Register an attribute of the objects of a class, and of those derived from it; of a dict, an item too."""
    _parts[attribute] = (package, name), registration


def find_part(cls: type, attribute: str) -> Registration | None:
    """Return how an attribute of the objects of a class is told, if that is in a way of its own."""
    known = _parts.get(attribute)
    if known is None:
        return None
    place, registration = known
    return registration if any(_name_of(base) == place for base in cls.__mro__) else None


def count_registered() -> int:
    """Return how often users have registered a class so far."""
    return len(_registered)


def find_registration(cls: type) -> tuple[type, Registration] | None:
    """Return the nearest registered class among a class and its bases, with its registration."""
    for base in cls.__mro__:
        found = _by_class.get(base) or _by_name.get(_name_of(base))
        if found is not None:
            return base, found
    return None


def names_its_code(cls: type) -> bool:
    """Tell whether the registration of a class, and not of a base of it, says which code its objects run."""
    found = find_registration(cls)
    return found is not None and found[0] is cls and found[1].names_code


def _name_of(cls: type) -> tuple[str, str]:
    return str(cls.__module__).partition(".")[0], cls.__qualname__
