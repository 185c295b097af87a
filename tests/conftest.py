"""What every test gets: a directory, and no memory of what an earlier test made the log say."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

import torchcache.report.log

# No test fails because a machine is slow. Where everything must run, the examples are the same at each run: what
# random ones find is found at a desk, where it can be looked at.
hypothesis.settings.register_profile("torchcache", deadline=None, derandomize=bool(os.environ.get("TORCHCACHE_CI")))
hypothesis.settings.load_profile("torchcache")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Turn a skip into a failure where everything must run: a check that is skipped there checks nothing."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("TORCHCACHE_CI"):
        report.outcome = "failed"
    return report


@pytest.fixture(autouse=True)
def says_everything_once_again():
    """Let each test see the lines that are said once a process."""
    torchcache.report.log._said.clear()


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """Return a path for a persistent cache; nothing is there yet."""
    return tmp_path / "cache"
