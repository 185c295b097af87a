"""What frameworks note on modules and hooks for themselves, and what shapes no result.

It is known by the class that has it and the package of that class, which must come from an installed distribution;
nothing is imported. A note counts all the same if code that runs may read it: by its name, or by a name under which the
framework hands it out, such as ``trainer`` for ``_trainer``. This module does not import torch.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from functools import lru_cache
from weakref import WeakKeyDictionary

from torchcache.keys.names_read import NamesRead
from torchcache.keys.origins import functions_behind, is_own_class, origin_of_class
from torchcache.keys.reads import reads_of

_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")

#: Where a note is: the packages that the class may come from, and its name in its module.
_MODULE_OF_LIGHTNING = (_LIGHTNING, "LightningModule")
_HYPERPARAMETERS = (_LIGHTNING, "HyperparametersMixin")
_DEVICES = (_LIGHTNING, "_DeviceDtypeModuleMixin")
_HOOK_OF_ACCELERATE = (("accelerate",), "AlignDevicesHook")

_Where = tuple[tuple[str, ...], str]

#: Each note with its reason.
_NOTES: dict[str, tuple[_Where, str]] = {
    "_trainer": (_MODULE_OF_LIGHTNING, "the Trainer that runs it, with loaders and progress"),
    "_fabric": (_MODULE_OF_LIGHTNING, "the Fabric that set it up"),
    "_fabric_optimizers": (_MODULE_OF_LIGHTNING, "optimizers that Fabric set up"),
    "_current_fx_name": (_MODULE_OF_LIGHTNING, "which hook runs"),
    "_metric_attributes": (_MODULE_OF_LIGHTNING, "ids of the metrics, for log()"),
    "_param_requires_grad_state": (_MODULE_OF_LIGHTNING, "what toggle_optimizer() set aside"),
    "_automatic_optimization": (_MODULE_OF_LIGHTNING, "who calls the optimizer"),
    "_strict_loading": (_MODULE_OF_LIGHTNING, "how checkpoints are loaded"),
    "_example_input_array": (_MODULE_OF_LIGHTNING, "an input for summaries and exports"),
    "_device_mesh": (_MODULE_OF_LIGHTNING, "how ranks are laid out"),
    "_log_hyperparams": (_HYPERPARAMETERS, "whether hyperparameters are logged"),
    "_hparams": (_HYPERPARAMETERS, "what save_hyperparameters() noted"),
    "_hparams_initial": (_HYPERPARAMETERS, "the same as it was then"),
    "_hparams_name": (_HYPERPARAMETERS, "the name of the argument that has it"),
    "_device": (_DEVICES, "where it is"),
    "input_device": (_HOOK_OF_ACCELERATE, "where the last input was"),
    "tied_params_map": (_HOOK_OF_ACCELERATE, "copies of weights by their addresses"),
}

#: Those that count for nothing even where they are read: devices are no part of a key.
_NEVER_COUNT = frozenset({"_device"})


def leaves_out(cls: type, name: str, read: NamesRead) -> bool:
    """Tell whether an attribute of an object of a class is a framework's note that no code reads.

    Args:
        cls: The class of the object.
        name: The attribute.
        read: What code of the user's own may read.
    """
    if name not in _NOTES:
        return False
    of_class = _notes_of(cls)
    names = of_class.get(name)
    if names is None:
        return False
    return name in _NEVER_COUNT or not (read.may_read(names) or _read_in_libraries(cls).may_read(names))


_known: WeakKeyDictionary[type, dict[str, frozenset[str]]] = WeakKeyDictionary()
_known_in_libraries: WeakKeyDictionary[type, NamesRead] = WeakKeyDictionary()


def _notes_of(cls: type) -> dict[str, frozenset[str]]:
    """Return the notes of frameworks that objects of a class may have, each with the names that hand it out."""
    found = _known.get(cls)
    if found is None:
        found = {}
        for name, (where, _) in _NOTES.items():
            if any(_is_at(base, where) for base in cls.__mro__):
                found[name] = _names_that_give(cls, name, where[0])
        _known[cls] = found
    return found


def _is_at(cls: type, where: _Where) -> bool:
    packages, name = where
    return cls.__qualname__ == name and _package_of(cls) in packages and not is_own_class(cls)


def _package_of(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


def _names_that_give(cls: type, name: str, packages: tuple[str, ...]) -> frozenset[str]:
    """Return a note's name, and those of the framework's members from which code can come to know it."""
    members = [
        (key, function.__code__)
        for base in cls.__mro__
        if _package_of(base) in packages
        for key, function in _functions_of(base)
    ]
    giving = {name}
    while True:
        more = {
            key
            for key, code in members
            if key not in giving and not giving.isdisjoint(reads_of(code).attributes) and _returns_something(code)
        }
        if not more:
            return frozenset(giving)
        giving |= more


def _functions_of(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the functions behind the members of a class, each with the name of the member."""
    for key, value in list(vars(cls).items()):
        held: list[object] = [value]
        if not isinstance(value, (type, types.FunctionType)):  # a descriptor of another kind, such as cached_property
            held += (getattr(value, "__dict__", None) or {}).values()
        for item in held:
            for function in functions_behind(item):
                yield key, function


@lru_cache(maxsize=1024)
def _returns_something(code: types.CodeType) -> bool:
    """Tell whether a function may return anything but None, such as a property; ``log()`` does not."""
    before: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        opname = instruction.opname
        if opname in ("YIELD_VALUE", "RETURN_GENERATOR", "GEN_START"):
            return True
        if opname == "RETURN_CONST" and instruction.argval is not None:
            return True
        if opname == "RETURN_VALUE":
            is_none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
            if not is_none:
                return True
        before = instruction
    return False


def _read_in_libraries(cls: type) -> NamesRead:
    """Return what methods of bases from other distributions may read: those are not walked."""
    read = _known_in_libraries.get(cls)
    if read is None:
        read = _known_in_libraries[cls] = NamesRead()
        packages = {package for (of_note, _), _ in _NOTES.values() for package in of_note}
        for base in cls.__mro__:
            is_of_framework = _package_of(base) in packages
            if base is object or _package_of(base) == "torch" or is_of_framework or origin_of_class(base) is None:
                continue
            for _, function in _functions_of(base):
                read.note(function)
    return read
