"""What an earlier torchcache wrote is read: the same module hashes, the same keys, the same records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="code counts, and that of another Python is another")
def test_a_directory_of_an_earlier_version_is_read_whole(tmp_path):
    with tarfile.open(GOLDEN / "cache.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    there = {path.parent.name for path in tmp_path.glob("*/data.mdb")}
    done = subprocess.run(
        [sys.executable, GOLDEN / "program.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    stats, hashes = map(json.loads, done.stdout.splitlines())
    assert {name: counts["misses"] for name, counts in stats.items()} == dict.fromkeys(stats, 0)
    assert all(counts["hits"] and not counts["faults"] for counts in stats.values())
    assert set(hashes.values()) == there
