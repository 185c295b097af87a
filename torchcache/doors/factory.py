"""The model that a factory builds once it is needed, and the factory as what is cached of it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchcache.errors import ConfigError
from torchcache.keys.digest import digest_parts
from torchcache.keys.identity import Target
from torchcache.keys.values import UnnamedValueError, encode_argument
from torchcache.process import ForkLock

Factory = Callable[[], nn.Module]


class FactoryModel:
    """The real model of one lazy module, if it is built; safe from any thread.

    Args:
        factory: Builds it.
        place: A tensor where and as what the model is wanted; None to leave it as it was built.

    Attributes:
        built: The model, or None.
    """

    def __init__(self, factory: Factory, place: torch.Tensor | None) -> None:
        self._factory = factory
        self._place = place
        self._building = ForkLock()
        self.built: nn.Module | None = None  # made under _building

    def build(self) -> nn.Module:
        """Return the model, built by the first who asks.

        Raises:
            ConfigError: If the factory returned something else.
            Exception: Whatever the factory raises.
        """
        with self._building.raw:
            if self.built is None:
                model = self._factory()
                if not isinstance(model, nn.Module):
                    raise ConfigError(
                        f"the factory of a lazy module returned {type(model).__qualname__}, and must return an "
                        "nn.Module",
                        argument="factory",
                    )
                place = self._place
                if place is not None:
                    model.to(place.device if place.dtype is torch.float32 else place)
                self.built = model
            return self.built

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor], place: torch.Tensor, *, recurse: bool) -> None:
        """Do to the model what ``to()`` and its like do, now or once it is built; ``place`` is what that comes to."""
        self._place = place
        if self.built is not None:
            self.built._apply(fn, recurse)  # noqa: SLF001 - what to() and its like are made of

    def dtype_name(self) -> str:
        """Return what shapes the model beside its factory: the dtype that it is wanted as."""
        return str(torch.float32 if self._place is None else self._place.dtype)

    def compute(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the model returns
        """Return what the model returns."""
        return self.build()(*args, **kwargs)

    # Is in the key of each sample: what is on disk is found by it.
    compute.__qualname__ = "_Holder.compute"

    def describe(self) -> Target:
        """Return the factory as what is cached.

        Raises:
            ConfigError: If it is nothing whose code can be named.
        """
        arguments = b""
        code: object = self._factory
        while isinstance(code, functools.partial):
            try:
                given = encode_argument((code.args, code.keywords), "factory")
            except UnnamedValueError as error:
                raise ConfigError(
                    f"{error.path} of the factory of a lazy module is a {error.type_name} without a stable name; give "
                    "plain values",
                    argument="factory",
                ) from error
            arguments = digest_parts([arguments, given])
            code = code.func

        if not isinstance(code, (type, types.FunctionType)):
            raise ConfigError(
                f"lazy() cannot name {self._factory!r}; give a function, a class or a functools.partial that builds "
                "the model: lazy(lambda: load(...))",
                argument="factory",
            )
        return Target(name=f"lazy {code.__qualname__}", code=code, function=self.compute, arguments=arguments)
