"""Code of libraries that stands in their namespaces where other code was defined, as that of a faster kernel does.

What is defined in a namespace counts by the version of its library. What has another name there than it was defined by,
or was set on a class by another library, is told by where it was defined. This module does not import torch.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

from torchcache.keys.origins import STANDARD, origin_of_module
from torchcache.keys.reach import ASIDE

_OF_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)

#: What does not run in a forward. Libraries wrap it once they are used, as Lightning does with ``torch.compile``, and
#: that with the constructor of modules.
_COMPUTING_NOTHING = ASIDE | {"compile"}


@dataclass(frozen=True, slots=True)
class Displaced:
    """Code of a library that stands in a namespace, and was defined by another name, or for a class by another library.

    Attributes:
        name: Where it was defined, and as what.
        is_added: Whether another library put it into a class, where it may stand in place of nothing: it counts if
            code of the class's own library reads the name.
    """

    name: str
    is_added: bool

    @classmethod
    def of(cls, value: object, namespace: str, library: str | None, key: str) -> Displaced | None:
        """Describe what stands under a name; None if it was defined there as that, or is no code.

        Args:
            value: What stands there.
            namespace: The name of a module, or that and the name of a class in it.
            library: The distribution that the module is from.
            key: The name.
        """
        kind = type(value)
        if key in _COMPUTING_NOTHING or not issubclass(kind, (types.FunctionType, type, *_OF_C)):
            return None
        name = str(getattr(value, "__qualname__", ""))
        if isinstance(value, types.FunctionType):
            module = str(value.__globals__.get("__name__"))  # a wrapper takes the names of what it wraps, but not this
            has_name = f".{namespace}.{key}".endswith(f".{name}")
        else:
            module = str(getattr(value, "__module__", None) or "")
            has_name = name.rpartition(".")[2] == key
        origin = origin_of_module(module)
        is_other = origin != library and namespace not in sys.modules  # a module has by name what it imports
        if origin == STANDARD or (has_name and not is_other):
            return None
        return cls(f"{module}.{name}", is_other)
