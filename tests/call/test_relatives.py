"""When nothing is cached under a key and results are there under another one, one line names what differs."""

from __future__ import annotations

import argparse
import logging
import os

import pytest
import torch
from torch import nn

from torchcache import CacheMissError, cache_of, torchcache
from torchcache.call import relatives
from torchcache.keys.key_parts import KeyParts
from torchcache.storage.access import PRIVATE
from torchcache.storage.key_parts_file import FILE_NAME, MOST_BYTES, KeptParts, KeptState, pack_parts, read_parts

X = torch.arange(12.0).reshape(3, 4)


class Net(nn.Module):
    def __init__(self, width=4, out="a"):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, width)
        self.run_id = "first"
        self.cfg = argparse.Namespace(rate=0.1, out="a")

    def forward(self, x, shift=0):
        return self.linear(x) + shift + 0 * (len(self.run_id) + len(self.cfg.out))


@pytest.fixture
def program(cache_dir, caplog, monkeypatch):
    """Return a function that runs a program with a changed module, and returns what it logged and its counts."""
    caplog.set_level(logging.INFO)

    def run(change=lambda module: None, *, calls=((X,),), cls=Net, arguments=(), **options):
        caplog.clear()
        monkeypatch.setattr(relatives, "_STARTED_AT", relatives.time.time())  # as a process that begins now
        monkeypatch.setattr("torchcache.report.log._said", set())
        module = cls(*arguments).eval().requires_grad_(False)
        change(module)
        module = torchcache(persistent=True, persistent_cache_dir=cache_dir, **options)(module)
        for call in calls:
            module(*call)
        cache = cache_of(module)
        cache.flush()
        stats = cache.stats()
        cache.close()
        said = [(r.levelno, r.getMessage()) for r in caplog.records if "under another one" in r.getMessage()]
        return said, stats

    return run


def another_run(module):
    module.run_id = "second"
    module.cfg.out = "b"


def test_attributes_that_differ_are_named_with_the_remedy(program):
    assert program()[0] == []
    ((level, line),), stats = program(another_run)
    assert level == logging.WARNING
    assert "`run_id`, `cfg.out` differ; if they shape no result: ignore=('run_id', 'cfg.out')" in line
    assert stats.misses == 3


def test_nothing_is_said_where_the_key_is_known(program):
    program()
    program(another_run)
    assert program(another_run)[0] == []
    assert program()[0] == []
    # Other samples of a known key are no other key.
    assert program(calls=((X + 1,),))[0] == []


def test_the_remedy_works(program):
    options = {"ignore": ("run_id", "cfg.out")}
    program(**options)
    said, stats = program(another_run, **options)
    assert (said, stats.misses) == ([], 0)


def test_weights_that_are_made_anew_are_named(program):
    program()
    ((_, line),), _ = program(lambda module: nn.init.normal_(module.linear.weight))
    assert "the weights `linear.weight` differs; if the weights should be the same, load them" in line


def test_a_training_flag_is_named(program):
    program()
    ((_, line),), _ = program(lambda module: module.train())
    assert "`training`" in line
    assert "call eval()" in line


def test_another_module_hash_is_another_directory_and_named_too(program, cache_dir):
    decorated = torchcache(persistent=True, persistent_cache_dir=cache_dir)(type("Net", (Net,), {}))
    for arguments, expected in (((4, "a"), None), ((4, "b"), "the constructor's argument `out` differs")):
        relatives._STARTED_AT = relatives.time.time()
        module = decorated(*arguments).eval().requires_grad_(False)
        module(X)
        cache = module.cache_instance
        cache.flush()
        if expected is not None:
            with pytest.raises(CacheMissError, match=expected.replace("(", r"\(")):
                required(decorated, cache_dir, (4, "c"))(X)
        cache.close()
    assert len(list(cache_dir.glob(f"*/{FILE_NAME}"))) == 2


def required(decorated, cache_dir, arguments):
    module = decorated(*arguments).eval().requires_grad_(False)
    module.torchcache_mode = "require"
    relatives._STARTED_AT = relatives.time.time()
    return module


def test_an_error_of_a_required_call_names_what_differs(program):
    program()
    with pytest.raises(CacheMissError, match=r"under another key: `run_id`, `cfg.out` differ; .*ignore=\('run_id'"):
        program(another_run, mode="require")


def test_code_that_was_edited_is_named(program):
    program()

    class Edited(Net):
        def forward(self, x, shift=0):
            return super().forward(x, shift) + 1

    Edited.__qualname__ = Net.__qualname__
    ((_, line),), _ = program(cls=Edited)
    assert "the code of" in line


def test_another_form_of_the_call_alone_is_no_warning(program):
    program()
    ((level, line),), _ = program(calls=((X, 5),))
    assert level == logging.INFO
    assert "`argument shift` differs" in line


def test_states_of_the_running_program_are_no_relatives(program, cache_dir, caplog):
    for run_id in ("one", "two"):
        module = Net().eval().requires_grad_(False)
        module.run_id = run_id
        module = torchcache(persistent=True, persistent_cache_dir=cache_dir)(module)
        module(X)
        cache_of(module).flush()
    assert [r for r in caplog.records if "under another one" in r.getMessage()] == []


def test_what_is_kept_is_bounded_and_may_be_anything(program, cache_dir):
    program()
    (path,) = cache_dir.glob(f"*/{FILE_NAME}")
    whole = path.read_bytes()
    assert len(whole) <= MOST_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_parts(path.parent, PRIVATE).target == "Net"
    for data in (b"", whole[:-1], whole[:50] + b"x" + whole[51:], b"x" * 100_000, whole + b"x"):
        path.write_bytes(data)
        assert read_parts(path.parent, PRIVATE) is None
        _, stats = program(another_run)
        assert stats.faults == {}
        path.unlink()
        program()
    # It is written again by the next program that stores under a key.
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert program(another_run)[1].faults == {}


def test_parts_of_a_large_model_are_folded_and_still_told_apart():
    parts = [(f"weights:encoder.layer.{i}.{name}", bytes([i])) for i in range(200) for name in ("weight", "bias")]
    parts += [(f"state:attribute_{i}", b"1") for i in range(100)]
    kept = KeyParts(parts).shortened()
    rows = tuple((entry.kind, entry.name, entry.digest, entry.is_group) for entry in kept)
    data = pack_parts(KeptParts("target", rows, (KeptState(b"n" * 16, 0.0, rows),) * 4))
    assert len(data) <= MOST_BYTES
    assert KeyParts(parts).differences(kept) == []
    changed = [(name, b"other" if name == "weights:encoder.layer.7.bias" else value) for name, value in parts]
    (difference,) = KeyParts(changed).differences(kept)
    assert difference.kind == "weights"
    assert "encoder.layer.7.bias".startswith(difference.name.removesuffix("*"))
    assert KeyParts([*parts, ("state:new", b"1")]).differences(kept)
