"""Write the tables of the reference that list what the code has: ``python docs/write_tables.py``.

A table is what lies under its heading, from the first line that starts with ``|`` to the last. A test compares.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from torchcache import CacheOptions
from torchcache.kinds import Drop, Fault
from torchcache.report.reasons import Reason

REFERENCE = Path(__file__).with_name("reference.md")

#: What another value of these options does, which takes more than a yes or a no to say.
NEW_HASH = {"persistent_module_hash": "names it", "check_rows": "namespace"}

#: What is written as code in a line of the log: calls, settings, dotted names and names with underscores.
_CODE = re.compile(
    r"(?<![\w`(\[])"
    r"(?:\w+=(?:\w+|'[^']*')?|[\w.]*\w\(\w*\)|[a-z]{2,}(?:\.\w+)+|[a-z]+(?:_[a-z]+)+|None|[A-Z][a-z]+[A-Z]\w+|DTensor)"
    r"(?![\w`])"
)


def options() -> list[list[str]]:
    """Return the rows of the table of options: as the docstring of ``CacheOptions`` has them."""
    _, _, attributes = (inspect.getdoc(CacheOptions) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", attributes, re.MULTILINE | re.DOTALL)
    meanings = {name: " ".join(text.split()).replace("``", "`") for name, text in entries}
    rows = []
    for option in fields(CacheOptions):
        new_hash = NEW_HASH.get(option.name, "yes" if option.metadata["shapes_key"] else "no")
        rows.append([f"`{option.name}`", f"`{_default(option.name, option.default)}`", new_hash, meanings[option.name]])
    return rows


def reasons() -> list[list[str]]:
    """Return the rows of the table of reasons: what the log says of each, and what there is to say beside it."""
    return [
        [f"`{reason.value}`", " ".join(map(_sentences, filter(None, [reason.remedy, reason.note])))]
        for reason in Reason
    ]


def mishaps(kinds: type[Fault | Drop]) -> list[list[str]]:
    """Return the rows of the table of faults, or of why rows were not stored."""
    return [[f"`{kind.value}`", _sentences(kind.happened), _sentences(kind.remedy)] for kind in kinds]


def with_tables(page: str) -> str:
    """Return the page with its tables written anew."""
    page = _with_table(page, "## Options", ["Option", "Default", "New hash", "Meaning"], options())
    page = _with_table(
        page, "## Reasons to go around the cache", ["Reason", "What it means, and what to do"], reasons()
    )
    page = _with_table(page, "### Faults", ["Fault", "What happened", "What to do"], mishaps(Fault))
    return _with_table(page, "### Rows that were not stored", ["Kind", "What happened", "What to do"], mishaps(Drop))


def _with_table(page: str, heading: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    before, found, rest = page.partition(f"\n{heading}\n")
    if not found:
        raise ValueError(f"the page has no heading {heading!r}")
    lines = rest.split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    table = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    table.insert(1, "|" + "---|" * len(head))
    return before + found + "\n".join([*lines[:first], *table, *lines[last:]])


def _default(name: str, default: object) -> str:
    """Return how a default is written where an option is set."""
    if name == "memory_cache_device":
        return '"cpu"'
    if name == "padded":
        return "{}"
    if name.startswith("max_"):
        return f"{default / 1e9:g}e9"  # type: ignore[operator] # a number of bytes
    if isinstance(default, str):
        return f'"{default}"'
    return f"{default:g}" if isinstance(default, float) and default else repr(default)


def _sentences(text: str) -> str:
    """Return what the log says in one line as sentences, with code marked as such."""
    parts = [_CODE.sub(r"`\g<0>`", part) for part in text.split("; ")]
    return " ".join(f"{part[0].upper()}{part[1:]}{'' if part.endswith('.') else '.'}" for part in parts)


if __name__ == "__main__":
    REFERENCE.write_text(with_tables(REFERENCE.read_text(encoding="utf-8")), encoding="utf-8")
