"""What an image of PIL is made of. This module does not import PIL."""

from __future__ import annotations

import sys
from typing import Any

from torchcache.keys.attributes import attributes_of
from torchcache.keys.origins import module_of

#: Attributes that are told apart by what else is told of an image, or that change while it is read.
_TOLD_ELSEWHERE = frozenset({
    "im", "_im", "mode", "_mode", "size", "_size", "palette", "info", "readonly", "_readonly", "_exif", "pyaccess",
    "category", "fp", "_fp", "_exclusive_fp", "_close_exclusive_fp_after_loading", "map", "tile", "decoderconfig",
    "decodermaxblock", "is_animated", "n_frames",
})  # fmt: skip

#: What attributes of a file are made of that are told: not what goes on reading it.
_PLAIN = (str, bytes, int, float, type(None))


def parts_of_picture(image: Any) -> object:  # noqa: ANN401 - an image of PIL
    """Return all that code may read of an image.

    Its EXIF as far as it is not what its file says: code that only asks for it leaves it as it is.
    """
    palette = None if image.palette is None else (image.palette.mode, bytes(image.palette.tobytes()))
    parts = image.mode, image.size, image.tobytes(), palette, image.info, getattr(image, "tell", int)()
    more: list[tuple[str, object]] = []
    # After the pixels: to read them completes what a file says.
    held = attributes_of(image) or {}
    for name, value in held.items():
        if name not in _TOLD_ELSEWHERE and (not _is_of_pil(image, name) or _is_read(name, value)):
            more.append((name, value))
    if hasattr(image, "tag_v2"):
        more.append(("tag_v2", dict(image.tag_v2)))
    more += _changes_of_exif(image)
    return (*parts, sorted(more, key=_name_of)) if more else parts


def _name_of(pair: tuple[str, object]) -> str:
    return pair[0]


def _is_of_pil(image: Any, name: str) -> bool:  # noqa: ANN401 - as above
    """Tell whether the code of PIL sets an attribute: what it has by itself is different in each format."""
    return any(name in _names_of(base) for base in type(image).__mro__ if module_of(base).startswith("PIL."))


def _names_of(cls: type) -> frozenset[str]:
    """Return the names in the code of the module of a class."""
    known = _names.get(cls.__module__)
    if known is None:
        found: set[str] = set()
        waiting: list[Any] = [*vars(sys.modules[cls.__module__]).values()]
        while waiting:
            value = waiting.pop()
            if getattr(value, "__module__", None) != cls.__module__:
                continue
            if isinstance(value, type):
                waiting += vars(value).values()
            else:
                found.update(getattr(getattr(value, "__code__", None), "co_names", ()))
        known = _names[cls.__module__] = frozenset(found)
    return known


#: The names in the code of modules of PIL, which stay as they are.
_names: dict[str, frozenset[str]] = {}


def _is_read(name: str, value: object) -> bool:
    """Tell whether code of others may read an attribute that PIL sets: it is public and plain."""
    return not name.startswith("_") and _is_plain(value)


def _is_plain(value: object, depth: int = 0) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if depth == _DEEPEST:
        return False
    if type(value) in (list, tuple):
        return all(_is_plain(item, depth + 1) for item in value)  # type: ignore[attr-defined]
    if type(value) is dict:
        return all(_is_plain(item, depth + 1) for item in (*value, *value.values()))
    return False


#: What PIL keeps of a file lies so deep at most.
_DEEPEST = 3


# -- EXIF --------------------------------------------------------------------------------------------------------


def _changes_of_exif(image: Any) -> list[tuple[str, object]]:  # noqa: ANN401 - as above
    exif = getattr(image, "_exif", None)
    if exif is None:
        return []
    unchanged = _exif_of_file(image)
    changes: list[tuple[str, object]] = []
    if dict(exif) != dict(unchanged):
        changes.append(("_exif", dict(exif)))
    for tag, entries in exif._ifds.items():  # noqa: SLF001 - those that were asked for; it has no public one
        if entries != unchanged.get_ifd(tag):
            changes.append((f"_exif {tag}", dict(entries)))
    return changes


def _exif_of_file(image: Any) -> Any:  # noqa: ANN401 - as above
    """Return the EXIF that an image had when its file was opened: what its ``info`` and its tags say."""
    pil: Any = sys.modules["PIL.Image"]
    blank = pil.Image()
    blank.info = image.info
    exif = blank.getexif()
    if "exif" not in image.info:
        for tag, entry in getattr(image, "tag_v2", {}).items():
            exif.setdefault(tag, entry)
    return exif
