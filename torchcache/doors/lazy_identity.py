"""What identifies a model that may not be there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from torchcache.doors.factory import FactoryModel
from torchcache.doors.model_notes import ModelNotes
from torchcache.keys.digest import digest_named, digest_parts
from torchcache.keys.fast.mode import current_mode
from torchcache.keys.identity import Identity, Look, Target
from torchcache.keys.key_parts import Part
from torchcache.keys.moves import Move
from torchcache.options import CacheOptions
from torchcache.report.reasons import Reason


@dataclass(frozen=True, slots=True)
class _Built:
    """The model that the factory built: its identity, and its marks at that time."""

    identity: Identity
    marks: object


@dataclass(frozen=True, slots=True)
class _Joined:
    """What was seen of factory and model, and the look that was made of it."""

    factory: Look
    key: bytes
    note: bytes | None
    model: Look | None
    look: Look

    def is_of(self, factory: Look, key: bytes, note: bytes | None, model: Look | None) -> bool:
        """Tell whether the same was seen this time."""
        return self.factory is factory and (self.key, self.note, self.model) == (key, note, model)


class LazyIdentity:
    """The identity of a lazy module: that of its factory, and what is noted of the model that the factory built.

    The note is made right after the model is built, before anybody can have changed it. From then on, the model is
    looked at as any other is.

    Args:
        factory: The identity of the factory.
        options: Those in force.
        model: The model, which is built at the first miss.
        notes: Where it is noted what the factory built.
    """

    def __init__(self, factory: Identity, options: CacheOptions, model: FactoryModel, notes: ModelNotes) -> None:
        self._factory = factory
        self._options = options
        self._model = model
        self._notes = notes
        self._built: _Built | None = None
        self._joined: _Joined | None = None
        self._first: tuple[str, bytes] | None = None  # the factory's module hash, and what was seen of it then

    def module_hash(self) -> str:
        return self._factory.module_hash()

    def look(self) -> Look:
        factory = self._factory.look()
        if factory.reason not in (None, Reason.RANDOM_NUMBERS):  # what the factory draws shows in what it builds
            return factory

        mode = repr(current_mode())
        dtype = self._model.dtype_name()
        key = digest_parts([self._fingerprint(factory), mode.encode(), dtype.encode()])
        if self._model.built is None:
            note = self._notes.read(factory, key)
            return self._join(factory, key, note, None)

        built = self._of_model()
        model = built.identity.look()
        note = digest_parts([model.module_hash.encode(), model.fingerprint])
        look = self._join(factory, key, note, model)
        is_as_built = built.identity.marks() == built.marks
        if is_as_built and not model.is_private:
            self._notes.write(look, key, note)
        return look

    def settle(self, look: Look) -> bool:
        if self._model.built is None:
            self._model.build()
        return self.look().fingerprint != look.fingerprint

    def refresh(self) -> None:
        self._factory.refresh()
        if self._built is not None:
            self._built.identity.refresh()

    def apart(self) -> LazyIdentity:
        twin = LazyIdentity(self._factory.apart(), self._options, self._model, self._notes)
        twin._built = self._built
        twin._first = self._first
        return twin

    def key_parts(self) -> tuple[list[Part], list[Part]]:
        module, state = self._factory.key_parts()
        if self._built is not None:
            of_model, state_of_model = self._built.identity.key_parts()
            state = [*state, *of_model, *state_of_model]
        return module, state

    def describe(self) -> Iterator[tuple[str, bytes]]:
        yield from self._factory.describe()
        if self._joined is not None:
            yield "model", self._joined.look.fingerprint
        if self._built is not None:
            for name, value in self._built.identity.describe():
                yield f"model {name}", value

    # -- the state: the factory's shows in what it builds, so it is the model's, if there is one ----------------------

    def has_moved(self, since: Look) -> bool:
        last = self._joined
        if last is None or last.model is None or last.look.fingerprint != since.fingerprint:
            return True
        return self._of_model().identity.has_moved(last.model)

    def look_past_flags(self, since: Look) -> Look | None:  # noqa: ARG002 - a model that a factory builds has none yet
        return None

    def moves(self) -> list[Move]:
        return [] if self._built is None else self._built.identity.moves()

    def marks(self) -> object:
        if self._built is None:
            return None
        return self._built.identity.marks()

    def parameters(self) -> list[torch.Tensor]:
        if self._built is None:
            return []
        return self._built.identity.parameters()

    def requires_grad(self) -> bool:
        if self._built is None:
            return False
        return self._built.identity.requires_grad()

    def note_hashed(self, n_bytes: int) -> None:
        if self._built is not None:
            self._built.identity.note_hashed(n_bytes)

    # -- what both have -----------------------------------------------------------------------------------------------

    def whole_bytes(self) -> int:
        n_bytes = self._factory.whole_bytes()
        if self._built is not None:
            n_bytes += self._built.identity.whole_bytes()
        return n_bytes

    def generators(self) -> list[object]:
        generators = self._factory.generators()
        if self._built is not None:
            generators = generators + self._built.identity.generators()
        return generators

    def sets_generators(self) -> bool:
        return self._factory.sets_generators() or (self._built is not None and self._built.identity.sets_generators())

    def classes(self) -> tuple[type, ...]:
        classes = self._factory.classes()
        if self._built is not None:
            classes = classes + self._built.identity.classes()
        return classes

    # -----------------------------------------------------------------------------------------------------------------

    def _fingerprint(self, factory: Look) -> bytes:
        """Return what identifies the factory as it was first seen: building a model may change what it refers to."""
        if self._first is None or self._first[0] != factory.module_hash:
            parts = [(name, value) for name, value in self._factory.describe() if name != "mode"]
            self._first = factory.module_hash, digest_named(parts)
        return self._first[1]

    def _of_model(self) -> _Built:
        if self._built is None:
            model = self._model.build()
            cls = type(model)
            target = Target(name=cls.__qualname__, code=cls, function=cls.forward, instance=weakref.ref(model))
            identity = make_identity(target, self._options)
            identity.look()
            self._built = _Built(identity, identity.marks())
        return self._built

    def _join(self, factory: Look, key: bytes, note: bytes | None, model: Look | None) -> Look:
        """Return one look for factory and model; the same one as long as they are the same."""
        last = self._joined
        if last is not None and last.is_of(factory, key, note, model):
            return last.look

        fingerprint = digest_parts([key, note or b"nothing"])
        if model is None:
            look = Look(factory.module_hash, fingerprint, factory.is_private, None, classes=self.classes())
        else:
            is_private = factory.is_private or model.is_private
            look = Look(
                factory.module_hash, fingerprint, is_private, model.reason, model.evidence, classes=self.classes()
            )
        self._joined = _Joined(factory, key, note, model, look)
        return look


def make_identity(target: Target, options: CacheOptions) -> Identity:
    """Return the identity of a factory, or of the model that it built."""
    # A name to ignore may be one of the factory's, or of the model's that is not there yet.
    return Identity(target, options, checks_ignored=False)
