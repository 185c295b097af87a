"""Containers and arrays by what lies in them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from torchcache.keys.digest import digest_parts
from torchcache.keys.encoding import Encoding
from torchcache.keys.places import is_module
from torchcache.keys.plain import items_of_tuple, type_name
from torchcache.keys.registry import find_part
from torchcache.keys.tensor_digest import encode_array

#: Containers that may change, by their exact class.
CONTAINERS = (list, dict, set, deque, bytearray, OrderedDict, defaultdict)

#: What a masked array notes about itself, such as whether others share its mask; its value is told without these.
_NOTES_OF_MASKED_ARRAYS = frozenset({
    "_mask", "_fill_value", "_hardmask", "_sharedmask", "_isfield", "_baseclass", "_optinfo", "_basedict",
})  # fmt: skip


def container(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - of one of ``CONTAINERS`` or derived
    """Encode what lies in a container that may change, by the methods of the built-in class."""
    if encoding.is_content or not encoding.observer.note_container(value):
        return _contents(encoding, value, path)
    return encoding.inside_content(lambda: _contents(encoding, value, path))


def _contents(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - as above
    if isinstance(value, list):
        return encoding.items(b"list", list.__iter__(value), path)
    if isinstance(value, dict):
        return _mapping(encoding, value, path)
    if isinstance(value, deque):
        return encoding.items(f"deque {value.maxlen}".encode(), deque.__iter__(value), path)
    if isinstance(value, set):
        return _unordered(encoding, b"set", set.__iter__(value), path)
    return b"bytearray " + bytes(value)


def _mapping(encoding: Encoding, value: dict[Any, Any], path: str) -> bytes:
    if isinstance(value, OrderedDict):
        return encoding.pairs(
            b"ordered", _items_as_told(type(value), OrderedDict.items(value)), path, is_order_kept=True
        )

    # A library may make a table of functions from a set, in an order that each process has for itself.
    is_table = encoding.is_in_library and all(map(_is_function, dict.values(value)))
    is_order_kept = encoding.observer.is_order_kept and not is_table
    encoded = encoding.pairs(b"dict", dict.items(value), path, is_order_kept=is_order_kept)
    if isinstance(value, defaultdict):
        factory = encoding.encode(value.default_factory, f"{path}.default_factory")
        return digest_parts([encoded, factory])
    return encoded


def _items_as_told(kind: type, items: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
    """Return the items of a container of a library, some of which are told in a way of their own, as attributes are."""
    if kind in CONTAINERS:
        return items
    told: list[tuple[Any, Any]] = []
    for key, item in items:
        registration = find_part(kind, key) if type(key) is str else None
        told.append((key, item if registration is None else registration.encode(item)))
    return told


def _is_function(value: object) -> bool:
    """Tell whether a value is called and is no module: code may go through those that another one holds, in order."""
    return callable(value) and not is_module(value)


def _unordered(encoding: Encoding, name: bytes, values: Iterable[object], path: str) -> bytes:
    items = [encoding.encode(item, f"{path}{{}}") for item in values]
    return digest_parts([name, *sorted(items)])


def tuple_(encoding: Encoding, value: tuple[object, ...], path: str) -> bytes:
    """Encode a tuple that is not plain."""
    return encoding.items(b"tuple", items_of_tuple(value), path)


def frozen_set(encoding: Encoding, value: frozenset[object], path: str) -> bytes:
    """Encode a frozenset, whatever order its items come in."""
    return _unordered(encoding, b"frozenset", frozenset.__iter__(value), path)


def slice_(encoding: Encoding, value: slice, path: str) -> bytes:
    """Encode a slice that is not plain."""
    return encoding.items(b"slice", [value.start, value.stop, value.step], path)


def array(encoding: Encoding, value: np.ndarray[Any, Any], path: str) -> bytes:
    """Encode an array, without what a class derived from that of arrays adds."""
    plain = value.view(np.ndarray)
    if plain.dtype.hasobject:
        return encoding.whole(b"objects", value, [plain.shape, plain.dtype, *plain.ravel().tolist()], path)
    if not encoding.is_content:
        encoding.observer.note_array(plain)
    return digest_parts([encode_array(plain), encoding.encode(plain.dtype, f"{path}.dtype")])


def masked_array(encoding: Encoding, value: Any, path: str) -> bytes:  # noqa: ANN401 - a masked array
    """Encode a masked array by its data and mask, and what somebody hung on it."""
    notes = {name: note for name, note in vars(value).items() if name not in _NOTES_OF_MASKED_ARRAYS}
    parts = [value.data, np.ma.getmaskarray(value), value.fill_value, value.hardmask, notes]
    return encoding.whole(type_name(type(value)), value, parts, path)


def record(encoding: Encoding, value: np.void, path: str) -> bytes:
    """Encode a row of a structured array."""
    return encoding.whole(type_name(type(value)), value, [np.array(value)], path)
