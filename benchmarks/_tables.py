"""Where the tables of the documentation are written that a benchmark measures."""

from __future__ import annotations

import sys
from pathlib import Path

TABLES = Path(__file__).parents[1] / "docs" / "tables"


def write_table(name: str, text: str) -> None:
    """Write what a page of the documentation includes as ``tables/<name>``."""
    path = TABLES / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
