"""What every test of the storage leaves behind is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage.children import no_child_is_left
from tests.storage.known_values import forget_environments, open_store, verify


@pytest.fixture
def root(tmp_path: Path):
    """A cache directory; at the end every environment in it that can be opened is verified."""
    path = tmp_path / "cache"
    yield path
    forget_environments()
    if path.is_dir():
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
    with no_child_is_left():
        yield
