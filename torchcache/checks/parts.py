"""Rows of a result that was taken apart: picked, left out."""

from __future__ import annotations

from collections.abc import Sequence

from torchcache.layout import Found


def row_at(parts: Sequence[Found], row: int) -> tuple[Found, Found]:
    """Return the part that holds a row, and the row alone."""
    part = next(item for item in parts if row in item.positions)
    i = list(part.positions).index(row)
    return part, Found([row], part.layout, part.data[i : i + 1])


def rows_at(parts: Sequence[Found], rows: Sequence[int]) -> list[Found]:
    """Return what was computed at some rows, in their order and numbered anew."""
    if len(parts) == 1:  # all rows, in order
        (part,) = parts
        data = part.data[rows.start : rows.stop] if isinstance(rows, range) else part.data[list(rows)]
        return [Found(range(len(rows)), part.layout, data)] if rows else []
    return picked(parts, rows)


def picked(parts: Sequence[Found], rows: Sequence[int]) -> list[Found]:
    """Return what there is of some rows, numbered as they are given."""
    number = {row: i for i, row in enumerate(rows)}
    found: list[Found] = []
    for part in parts:
        here = [i for i, row in enumerate(part.positions) if row in number]
        if here:
            found.append(Found([number[part.positions[i]] for i in here], part.layout, part.data[here]))
    return found


def without(item: Found, positions: set[int]) -> Found | None:
    """Return what was found without some positions; None if nothing is left."""
    kept = [i for i, position in enumerate(item.positions) if position not in positions]
    if len(kept) == len(item.positions):
        return item
    return Found([item.positions[i] for i in kept], item.layout, item.data[kept]) if kept else None
