"""Edits of what runs behind operators of ``torch.ops`` make another key."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from torchcache import cache_of, torchcache
from torchcache.keys.code import walk_code

ROOT = Path(__file__).parents[2]

OPERATORS = """
import torch
@torch.library.custom_op("mine::made", mutates_args=())
def made(x: torch.Tensor) -> torch.Tensor:
    return helper(x)
def helper(x):
    return x * 2
@made.register_fake
def _(x):
    return torch.empty_like(x) * 1
library = torch.library.Library("theirs", "DEF")
library.define("given(Tensor x) -> Tensor")
library.impl("given", lambda x: x * 3, "CPU")
torch.library.define("named::by_text", "(Tensor x) -> Tensor")
@torch.library.impl("named::by_text", "cpu")
def by_text(x):
    return x * SCALE
SCALE = 4
torch.library.define("other::unused", "(Tensor x) -> Tensor")
@torch.library.impl("other::unused", "cpu")
def unused(x):
    return x * 5
"""

PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {folder!r}]
import torch
import torchcache
import operators
from torch import nn
TAKEN = torch.ops.mine.made
TABLE = {{"made": torch.ops.mine.made}}

def made(x):
    return torch.ops.mine.made(x)
def made_default(x):
    return torch.ops.mine.made.default(x)
def made_in_a_global(x):
    return TAKEN(x)
def made_in_a_table(x, key="made"):
    return TABLE[key](x)
def made_imported(x):
    from torch import ops
    return ops.mine.made(x)
def made_in_a_variable(x):
    mine = torch.ops.mine
    return mine.made(x)
def made_by_a_computed_name(x, name="made"):
    return getattr(torch.ops.mine, name)(x)
def given(x):
    return torch.ops.theirs.given(x)
def by_text(x):
    return torch.ops.named.by_text(x)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.made = torch.ops.mine.made
    def forward(self, x):
        return self.made(x)

x = torch.ones(2, 3)
for target in (made, made_default, made_in_a_global, made_in_a_table, made_imported, made_in_a_variable,
               made_by_a_computed_name, given, by_text, Net()):
    name = getattr(target, "__name__", "Net")
    called = torchcache.torchcache()(target)
    called(x)
    called(x)
    cache = torchcache.cache_of(called)
    explained, stats = cache.explain(x), cache.stats()
    print("key", name, explained.module_hash, explained.namespace, stats.memory_hits, dict(stats.bypasses))
"""

OF_MADE = {
    "made", "made_default", "made_in_a_global", "made_in_a_table", "made_imported", "made_in_a_variable",
    "made_by_a_computed_name", "Net",
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that runs the program with its operators, and returns the keys by the names of the targets."""
    folder = tmp_path_factory.mktemp("operators")

    def run(operators=OPERATORS):
        (folder / "operators.py").write_text(operators)
        script = folder / "program.py"
        script.write_text(PROGRAM.format(root=str(ROOT), folder=str(folder)))
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
        assert not done.returncode, done.stderr
        lines = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("key ")]
        return dict(lines)

    return run


@pytest.fixture(scope="module")
def before(start):
    return start()


def test_what_is_called_through_an_operator_is_found_in_the_next_program(start, before):
    assert start() == before
    assert {line.partition("{")[2] for line in before.values()} == {"}"}, "nothing goes around the cache"


@pytest.mark.parametrize(
    ("edit", "targets"),
    [
        (("x * 2", "x * 22"), OF_MADE),
        (("x * 3", "x * 33"), {"given"}),
        (("SCALE = 4", "SCALE = 44"), {"by_text"}),
        (("x * SCALE", "x / SCALE"), {"by_text"}),
        (("x * 5", "x * 55"), set()),
        (("* 1", "* 11"), set()),
    ],
    ids=["custom_op", "Library.impl", "its global", "impl by a text", "another operator", "its shapes"],
)
def test_an_edit_behind_an_operator_makes_another_key_where_it_is_called(start, before, edit, targets):
    after = start(OPERATORS.replace(*edit))
    assert {name for name in before if before[name] != after[name]} == targets


def test_an_implementation_that_is_registered_later_is_noticed():
    def target(x):
        return torch.ops.torchcache_late.scale(x)

    walk = walk_code(target)
    with torch.library._scoped_library("torchcache_late", "DEF") as library:
        library.define("scale(Tensor x) -> Tensor")
        library.impl("scale", lambda x: x * 2, "CPU")
        assert walk.has_changed()
        with_two = walk_code(target)
        assert not with_two.has_changed()
        assert not with_two.unseen
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that one takes the place of another
            library.impl("scale", lambda x: x * 3, "CPU")
        assert with_two.has_changed()
        assert walk_code(target).fingerprint != with_two.fingerprint


def test_an_operator_of_which_it_is_not_known_what_runs_goes_around(monkeypatch, caplog):
    with torch.library._scoped_library("torchcache_unseen", "DEF") as library:
        library.define("scale(Tensor x) -> Tensor")
        monkeypatch.setattr("torchcache.keys.registrations._note", lambda key, function: None)
        library.impl("scale", lambda x: x * 2, "CPU")

        class Net(nn.Module):
            def forward(self, x):
                return torch.ops.torchcache_unseen.scale(x)

        module = torchcache()(Net())
        for _ in range(2):
            assert torch.equal(module(torch.ones(2, 3)), torch.full((2, 3), 2.0))
        assert cache_of(module).stats().bypasses == {"opaque_code": 2}
        said = [record.getMessage() for record in caplog.records if "opaque_code" in record.getMessage()]
        assert len(said) == 1
        assert "torchcache_unseen::scale" in said[0]
        assert "persistent_module_hash" in said[0]


def test_torchs_own_operators_are_not_looked_at():
    def target(x):
        return torch.ops.aten.relu(x)

    walk = walk_code(target)
    assert not walk.unseen
    assert not any(label.startswith("operators") for label, _ in walk.parts)
