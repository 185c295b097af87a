"""No process, no temporary file and no lock is left behind by any of these tests."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import filelock
import pytest

from tests.storage.children import no_child_is_left
from tests.storage.known_values import forget_environments, verify


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A temporary directory of the test's own, which is empty again at its end."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with no_child_is_left():
        yield path
    left = [entry for entry in path.iterdir() if not is_of_the_standard_library(entry)]
    assert left == [], "something was left under the temporary directory"


@pytest.fixture
def root(tmp_path: Path, temporary: Path):
    """A cache directory; at the end its lock is free, nothing unfinished lies in it and it is sound."""
    path = tmp_path / "cache"
    yield path
    forget_environments()
    if not path.exists():
        return
    with filelock.FileLock(path / ".torchcache.lock", timeout=0, is_singleton=False):
        pass
    for data in path.glob("[!.]*/data.mdb"):
        verify(data.parent)


def is_of_the_standard_library(entry: Path) -> bool:
    """Tell what multiprocessing, or a worker that was let go while tempfile tried the directory, may leave."""
    if entry.name.startswith("pymp-"):
        return True
    return re.fullmatch("[a-z0-9_]{8}", entry.name) is not None and entry.read_bytes() in {b"", b"blat"}
