"""Whose code lies in the folders of libraries, and how what is installed there counts. Runs without torch."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import lib
from torchcache.keys.code import walk_code
from torchcache.keys.origins import origin_of_module

def target(x):
    return lib.double(x)

print(walk_code(target).fingerprint.hex(), origin_of_module("lib"))
"""

DOUBLE = "def double(x):\n    return inner(x)\n\n\ndef inner(x):\n    return x * 2\n"


def install(folder, text, *, record="hashed", info="lib-1.0.dist-info"):
    """Install a library of one package as pip does."""
    package = folder / "lib"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(text)
    metadata = folder / info
    metadata.mkdir(exist_ok=True)
    name = "METADATA" if info.endswith(".dist-info") else "PKG-INFO"
    (metadata / name).write_text("Metadata-Version: 2.1\nName: lib\nVersion: 1.0\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
    entry = f"lib/__init__.py,sha256={digest},{len(text)}" if record == "hashed" else "lib/__init__.py,,"
    if record:
        (metadata / "RECORD").write_text(f"{entry}\n{info}/METADATA,,\n{info}/RECORD,,\nlib/__pycache__/x.pyc,,\n")


def start(tmp_path, folder, *more):
    """Return the fingerprint of a program that uses the library, and whose the library is."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(root=str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *more, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    fingerprint, origin = done.stdout.split()
    return fingerprint, origin


@pytest.mark.parametrize("name", ["deps", "site-packages"])
def test_a_library_counts_by_the_hashes_of_its_files_also_under_one_version(tmp_path, name):
    install(tmp_path / name, DOUBLE)
    before = start(tmp_path, tmp_path / name)
    assert before[1] == "lib"
    assert start(tmp_path, tmp_path / name) == before
    install(tmp_path / name, DOUBLE.replace("x * 2", "x * 3"))
    assert start(tmp_path, tmp_path / name)[0] != before[0]
    install(tmp_path / name, DOUBLE)
    assert start(tmp_path, tmp_path / name) == before


@pytest.mark.parametrize("record", ["", "without hashes"])
def test_a_library_without_hashes_counts_by_the_sizes_and_times_of_its_files(tmp_path, record):
    folder = tmp_path / "site-packages"
    install(folder, DOUBLE, record=record)
    before = start(tmp_path, folder)
    assert start(tmp_path, folder) == before
    os.utime(folder / "lib" / "__init__.py", (1, 1))
    assert start(tmp_path, folder)[0] != before[0]


def test_a_package_that_nobody_installed_counts_by_the_sizes_and_times_of_its_files(tmp_path):
    folder = tmp_path / "site-packages"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "__init__.py").write_text(DOUBLE)
    before = start(tmp_path, folder)
    assert start(tmp_path, folder) == before
    (folder / "lib" / "__init__.py").write_text(DOUBLE.replace("x * 2", "x * 33"))
    assert start(tmp_path, folder)[0] != before[0]


def test_where_the_files_of_a_library_lie_does_not_count(tmp_path):
    for name in ("one", "other"):
        install(tmp_path / name, DOUBLE)
    assert start(tmp_path, tmp_path / "one") == start(tmp_path, tmp_path / "other")


def test_scripts_beside_a_library_that_pip_put_there_are_the_users_own(tmp_path):
    install(tmp_path / "deps", DOUBLE)
    (tmp_path / "deps" / "lib").rename(tmp_path / "deps" / "other")
    (tmp_path / "deps" / "lib.py").write_text(DOUBLE)
    record = tmp_path / "deps" / "lib-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text().replace("lib/", "other/"))
    assert start(tmp_path, tmp_path / "deps")[1] == "None"


def test_the_sources_of_a_package_that_is_installed_editable_are_the_users_own(tmp_path):
    install(tmp_path / "sources", DOUBLE, record="", info="lib.egg-info")
    (tmp_path / "sources" / "lib.egg-info" / "SOURCES.txt").write_text("lib/__init__.py\n")
    assert start(tmp_path, tmp_path / "sources")[1] == "None"
    (tmp_path / "sources" / "lib.egg-info" / "installed-files.txt").write_text("../lib/__init__.py\n")
    (tmp_path / "sources" / "lib.egg-info" / "top_level.txt").write_text("lib\n")
    assert start(tmp_path, tmp_path / "sources")[1] == "lib"
