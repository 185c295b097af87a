"""The key of a call: what the call itself and ``explain`` look its results up by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchcache.inputs.batch import Batch
from torchcache.inputs.signature import CallSignature
from torchcache.keys.digest import digest_parts
from torchcache.keys.identity import Function, Look, Target
from torchcache.keys.ours import unwrap
from torchcache.options import CacheOptions


class Keys:
    """Splits the calls of one target into samples, and names them.

    Safe from any thread: what two threads find out at the same time is the same.

    Args:
        target: What is cached.
        options: The options in force.
    """

    def __init__(self, target: Target, options: CacheOptions) -> None:
        self._target = target
        self._options = options
        self._signatures: dict[Function, CallSignature] = {}
        # Rows that nobody checks are kept apart: check_rows=False starts afresh where rows were found to depend.
        self._checked = b"checked twice" if options.check_rows else b"unchecked"
        self._last: tuple[Look | None, bytes, bytes] = None, b"", b""  # a look, a form, and their namespace

    def split(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
        """Return a call as samples.

        Raises:
            UncacheableError: If the call has no batch dimension or an argument that cannot be named.
            TypeError: If the call does not fit the signature; the function itself would raise the same.
        """
        given = getattr(function, "__func__", function)
        signature = self._signatures.get(given) or self._signature_of(function, given)
        return signature.split(args, kwargs)

    def digests_of_plain(self, function: Function, calls: Sequence[tuple[object, ...]]) -> list[bytes] | None:
        """Return the digests of calls that are one sample each; None if an argument of theirs is not plain."""
        given = getattr(function, "__func__", function)
        signature = self._signatures.get(given) or self._signature_of(function, given)
        return signature.digests_of_plain(calls)

    def namespace(self, form: bytes, look: Look) -> bytes:
        """Return the namespace of calls in a state, of the form that ``Batch.form`` says."""
        last_look, last_form, namespace = self._last
        if look is not last_look or form != last_form:
            namespace = digest_parts([look.fingerprint, form, self._checked])
            self._last = look, form, namespace
        return namespace

    def namespace_of(self, batch: Batch, look: Look) -> bytes:
        """Return the namespace of a batch in a state."""
        return self.namespace(batch.form(batch.signature()), look)

    def _signature_of(self, function: Function, given: Any) -> CallSignature:  # noqa: ANN401 - a function, not bound
        """Make the signature of a function, to be found from now on."""
        plain: Any = unwrap(given)
        # The base's forward, called past the decorated one, gives other results for the same input.
        is_target = plain is unwrap(self._target.function)
        label = self._target.method if is_target else getattr(plain, "__qualname__", "")
        is_method = hasattr(function, "__self__")
        signature = CallSignature.of_options(plain, self._options, is_method=is_method, label=label)
        self._signatures[given] = signature
        return signature
