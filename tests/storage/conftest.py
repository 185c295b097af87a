"""What every test of the storage leaves behind is looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.storage.known_values import forget_environments, open_store, verify


@pytest.fixture
def root(tmp_path: Path):
    """A cache directory; at the end every environment in it that can be opened is verified."""
    path = tmp_path / "cache"
    yield path
    forget_environments()
    if path.is_dir() and not (path / ".not-verified").exists():
        for data in path.glob("[!.]*/data.mdb"):
            if not data.parent.name.endswith(".damaged"):
                verify(data.parent)


@pytest.fixture
def store(root: Path):
    """A store of a generous budget, made and empty."""
    return open_store(root)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No child process outlives its test."""
    yield
    try:
        left = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return
    assert left is not None, "a child process still runs"
    raise AssertionError(f"a child process was not waited for: {left}")
