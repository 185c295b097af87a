"""The hooks with which transformers records what layers return, as ``output_hidden_states`` and its like ask for.

The first call that asks installs them, on all models below the one that is called. They record and change nothing, so
a model returns the same before and after. That holds only for exactly the hooks that such a call would install: a
layer that was put in later has none and is missing in what is recorded, and an inner model that was asked by itself
gets them twice. This module does not import torch, and imports nothing of transformers that is not loaded.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torchcache.keys.origins import functions_behind, origin_of_module

#: On a model, that it has its hooks.
INSTALLED = "_output_capturing_hooks_installed"

_LIBRARY = "transformers.utils.output_capturing"
_MODELS = "transformers.modeling_utils"
_HOOK = "install_output_capuring_hook.<locals>.output_capturing_hook"

#: What the wrapper around a forward calls that records.
_INSTALLER = "maybe_install_capturing_hooks"

#: What tells the hooks of one module apart, in their closures: what is recorded, and which part of it.
_OF_HOOK = ("key", "index", "capture_initial_hidden_state")

_Module = Any  # of torch, which is not imported here
_Specs = tuple[object, ...]


@dataclass(slots=True)
class Captured:
    """What does not count of a tree of modules, because the next call that asks would make it so.

    Attributes:
        models: The ids of models whose mark does not count.
        hooks: The keys of the hooks that do not count, by the id of the module.
    """

    models: set[int] = field(default_factory=set)
    hooks: dict[int, set[int]] = field(default_factory=dict)


def captured_in(root: _Module) -> Captured:
    """Return which hooks and marks of transformers below a module do not count."""
    library, models = sys.modules.get(_LIBRARY), sys.modules.get(_MODELS)
    if library is None or models is None or origin_of_module(_LIBRARY) is None:
        return Captured()
    try:
        return _Rules(library, models.PreTrainedModel).look_below(root, Captured())
    except Exception:  # noqa: BLE001 - another version of transformers does it in another way: then all of it counts
        return Captured()


class _Rules:
    """What transformers installs, by its own rules.

    Args:
        library: Its module that does it.
        kind: The class of its models.
    """

    def __init__(self, library: Any, kind: type) -> None:  # noqa: ANN401 - a module without types
        self._recorder = library.OutputRecorder
        self._registry = library._CAN_RECORD_REGISTRY  # noqa: SLF001 - there is no public one
        self._kind = kind

    def look_below(self, root: _Module, captured: Captured) -> Captured:
        """Look at each model that installs hooks and lies in no other one that does."""
        if isinstance(root, self._kind):
            if _installs(type(root)):
                self._look_at(root, captured)
                return captured
            captured.models.add(id(root))  # its mark, which another model has set, is read by none here
        for child in root.children():
            self.look_below(child, captured)
        return captured

    def _look_at(self, model: _Module, captured: Captured) -> None:
        """Note what does not count of a model and of the models in it: all that a call would install, or nothing."""
        modules = list(model.modules())
        models = [module for module in modules if isinstance(module, self._kind)]
        # A call would install them on all models below one that has none, also on those that have them.
        if not all(vars(module).get(INSTALLED, False) is True for module in models):
            return

        wanted: dict[int, list[_Specs]] = {}
        self._install(model, "", wanted)
        keys: dict[int, set[int]] = {}
        for module in modules:
            found = _hooks_on(module)
            if list(found.values()) != wanted.get(id(module), []) or not _are_last(module, [*found]):
                return
            keys[id(module)] = {*found}
        captured.models.update(map(id, models))
        captured.hooks.update(keys)

    def _install(self, model: _Module, name: str, wanted: dict[int, list[_Specs]]) -> None:
        """Note what ``install_all_output_capturing_hooks`` would install, in its order."""
        tasks: list[tuple[str, Any]] = []
        for key, found in self._registry.get(model).items():
            recorders = found if isinstance(found, list) else [found]
            tasks += [(key, self._recorder_of(key, recorder)) for recorder in recorders]
        self._install_below(model, name, tasks, wanted)

    def _recorder_of(self, key: str, recorder: Any) -> Any:  # noqa: ANN401 - a class of transformers
        if isinstance(recorder, self._recorder):
            return recorder
        is_name = isinstance(recorder, str)
        return self._recorder(
            target_class=None if is_name else recorder,
            index=0 if "hidden_states" in key else 1,
            class_name=recorder if is_name else None,
        )

    def _install_below(
        self, module: _Module, name: str, tasks: list[tuple[str, Any]], wanted: dict[int, list[_Specs]]
    ) -> None:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}"
            if isinstance(child, self._kind):
                self._install(child, path, wanted)
            else:
                self._install_below(child, path, tasks, wanted)
        for key, recorder in tasks:
            is_target = recorder.target_class is not None and isinstance(module, recorder.target_class)
            is_named = recorder.class_name is not None and name.endswith(recorder.class_name)
            layer = recorder.layer_name
            is_elsewhere = layer is not None and f".{layer.strip('.')}." not in f"{name}."
            if (is_target or is_named) and not is_elsewhere:
                specs = key, recorder.index, recorder.capture_initial_hidden_state
                wanted.setdefault(id(module), []).append(specs)


_installing: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _installs(cls: type) -> bool:
    """Tell whether a method of a class of models installs hooks when it is called."""
    known = _installing.get(cls)
    if known is None:
        members = [value for base in cls.__mro__ for value in vars(base).values()]
        codes = [function.__code__ for value in members for function in functions_behind(value)]
        known = _installing[cls] = any(_INSTALLER in code.co_names for code in codes)
    return known


def _hooks_on(module: _Module) -> dict[int, _Specs]:
    """Return the hooks of transformers on a module by their keys, and what each records."""
    found: dict[int, _Specs] = {}
    for key, hook in vars(module)["_forward_hooks"].items():
        if type(hook) is types.FunctionType and (hook.__module__, hook.__qualname__) == (_LIBRARY, _HOOK):
            cells = zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)
            held = {name: cell.cell_contents for name, cell in cells}
            found[key] = tuple(held[name] for name in _OF_HOOK)
    return found


def _are_last(module: _Module, keys: list[int]) -> bool:
    """Tell whether hooks run behind all others, as those do that are installed last, and are nothing more."""
    if not keys:
        return True
    attributes = vars(module)
    more = {*attributes["_forward_hooks_with_kwargs"], *attributes["_forward_hooks_always_called"]}
    return more.isdisjoint(keys) and list(attributes["_forward_hooks"])[-len(keys) :] == keys
