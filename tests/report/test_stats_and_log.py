"""What a cache says about itself: counters, and lines in the log."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import nn

from torchcache import CacheStats, cache_of, flush_all, set_logger_config, torchcache
from torchcache.errors import CorruptRecordError, StoreError
from torchcache.kinds import Drop, Fault
from torchcache.report import log
from torchcache.report.notices import Notices
from torchcache.report.reasons import Reason
from torchcache.storage.writer import writer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def logger():
    """Give each test the logger as an import leaves it, and take its handlers away afterwards."""
    logger = logging.getLogger("torchcache")
    level, handlers = logger.level, list(logger.handlers)
    yield logger
    for handler in log._own_handlers:
        logger.removeHandler(handler)
        handler.close()
    log._own_handlers.clear()
    logger.setLevel(level)
    assert logger.handlers == handlers


def batch(n=4, start=0):
    return torch.arange(float(start * 10), float((start + n) * 10)).reshape(n, 10)


def run_python(code, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TORCHCACHE_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )


def let_nobody_write(patch):
    """Let rows stay in the queue: no writer starts, and one of an earlier test is gone."""
    patch.setattr(writer, "_start", lambda: None)
    thread = writer._thread
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


def test_flush_all_commits_what_every_cache_of_the_process_accepted(tmp_path, monkeypatch):
    def make(k):
        @torchcache(persistent=True, persistent_cache_dir=tmp_path / str(k))
        def function(x):
            return x * k

        return function

    functions = [make(k) for k in (2, 3)]
    assert flush_all()
    with monkeypatch.context() as patch:
        let_nobody_write(patch)
        for function in functions:
            function(batch(4))
        assert [cache_of(f).stats().queued_rows for f in functions] == [4, 4]
    assert flush_all()
    assert [cache_of(f).stats().written_rows for f in functions] == [4, 4]
    assert [cache_of(f).stats().queued_rows for f in functions] == [0, 0]


def test_flush_all_says_if_the_time_was_too_short(cache_dir, monkeypatch):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    def function(x):
        return x + 1

    let_nobody_write(monkeypatch)
    function(batch(4))
    assert not flush_all(0)
    assert flush_all(5)


# -- statistics ----------


def test_the_statistics_add_up(cache_dir):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir)
    def function(x):
        return x + 1

    cache = cache_of(function)
    assert cache.stats() == CacheStats()
    function(batch(4))
    function(batch(6))
    function(batch(2).repeat(3, 1))
    assert cache.flush()
    stats = cache.stats()
    assert (stats.misses, stats.memory_hits, stats.hits) == (6, 10, 10)
    assert (stats.memory_rows, stats.written_rows, stats.queued_rows, stats.queued_bytes) == (6, 6, 0, 0)
    assert stats.memory_bytes >= 6 * 40
    assert stats.written_bytes >= 6 * 40
    assert stats.store_bytes >= stats.written_bytes
    assert not stats.bypasses
    assert not stats.faults
    assert not stats.dropped_rows


def test_hits_are_counted_by_the_tier_that_answered(cache_dir):
    def make():
        @torchcache(persistent=True, persistent_cache_dir=cache_dir)
        def function(x):
            return x + 1

        return function

    first = make()
    first(batch())
    cache_of(first).close()
    second = make()
    second(batch())
    second(batch())
    stats = cache_of(second).stats()
    assert (stats.store_hits, stats.memory_hits, stats.misses) == (4, 4, 0)


def test_rows_that_wait_to_be_written_answer_as_queue_hits(cache_dir, monkeypatch):
    @torchcache(persistent=True, persistent_cache_dir=cache_dir, max_memory_cache_size=0)
    def function(x):
        return x + 1

    with monkeypatch.context() as patch:
        let_nobody_write(patch)
        function(batch())
        assert torch.equal(function(batch()), batch() + 1)
        stats = cache_of(function).stats()
    assert (stats.queue_hits, stats.queued_rows, stats.written_rows) == (4, 4, 0)
    assert cache_of(function).flush()
    function(batch())
    stats = cache_of(function).stats()
    assert (stats.store_hits, stats.queued_rows, stats.written_rows) == (4, 0, 4)


def test_a_duplicate_is_counted_once_whatever_answers():
    @torchcache()
    def function(x):
        return x + 1

    function(batch(2).repeat(2, 1))
    stats = cache_of(function).stats()
    assert (stats.misses, stats.duplicates, stats.hits) == (2, 2, 0)
    function(batch(2).repeat(2, 1))
    stats = cache_of(function).stats()
    assert stats.misses + stats.duplicates + stats.hits == 8


def test_a_snapshot_does_not_change():
    @torchcache()
    def function(x):
        return x + 1

    before = cache_of(function).stats()
    function(batch())
    assert before.misses == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.misses = 3


def test_every_statistic_is_documented_once():
    for field in dataclasses.fields(CacheStats):
        assert CacheStats.__doc__.count(f"\n        {field.name}: ") == 1, field.name


def test_kinds_are_counted_and_logged_as_plain_strings(caplog):
    notices = Notices("a model", {})
    notices.bypass(Reason.OPAQUE_STATE, 1)
    notices.drop(Drop.BUDGET, 2)
    notices.fault(Fault.MEMORY, "no room")
    notices.error(StoreError("stuck", kind=Fault.LOCK), 3)
    notices.error(CorruptRecordError("refused"), 0)
    notices.error(KeyError("key"), 0)
    counted = notices.counters.values()
    faults = {"memory": 1, "lock": 1, "CorruptRecordError": 1, "KeyError": 1}
    dropped = {"budget": 2, "lock": 3}
    expected = {"bypassed_rows": 1, "bypasses": {"opaque_state": 1}, "dropped_rows": dropped, "faults": faults}
    assert repr(counted) == repr(expected)
    assert "(fault 'lock', said once)" in caplog.text
    assert "(opaque_state)" in caplog.text


def test_nothing_is_counted_by_kind_but_through_what_takes_the_members_of_an_enum():
    calls = {}
    for path in (ROOT / "torchcache").rglob("*.py"):
        found = re.findall(r"\badd_to\(\"?(\w+)", path.read_text(encoding="utf-8"))
        if found:
            calls[path.name] = found
    assert calls.pop("stats.py") == ["self"]
    # What moved is counted by its path, which is no kind.
    assert calls == {"notices.py": ["bypasses", "dropped_rows", "dropped_rows", "moved", "faults"]}
    kinds = {name: get_type_hints(getattr(Notices, name)) for name in ("bypass", "drop", "fault")}
    assert (kinds["bypass"]["reason"], kinds["drop"]["kind"], kinds["fault"]["kind"]) == (Reason, Drop, Fault)
    assert get_type_hints(StoreError.__init__)["kind"] is Fault


def test_statistics_pickle():
    import pickle

    module = torchcache()(nn.Dropout())
    module(batch())
    stats = cache_of(module).stats()
    assert pickle.loads(pickle.dumps(stats)) == stats
    assert dict(stats.bypasses) == {"dropout_in_training_mode": 1}


def test_clear_and_close_keep_the_counts_and_empty_the_memory():
    @torchcache()
    def function(x):
        return x + 1

    cache = cache_of(function)
    for forget in (cache.clear, cache.close):
        function(batch())
        forget()
        assert (cache.stats().memory_rows, cache.stats().memory_bytes) == (0, 0)
    function(batch())
    function(batch())
    assert (cache.stats().misses, cache.stats().memory_hits) == (12, 4)


def test_the_repr_of_a_cache_names_its_target():
    assert repr(cache_of(torchcache()(nn.Linear(2, 2)))) == "<torchcache.Cache of Linear>"


# -- the log ----------


def test_the_module_hash_is_said_at_info_before_the_first_call_returns(caplog):
    caplog.set_level(logging.INFO, logger="torchcache")
    module = torchcache()(nn.Linear(10, 4).requires_grad_(False))
    module(batch())
    module(batch())
    cache = cache_of(module)
    lines = [r for r in caplog.records if cache.module_hash in r.getMessage()]
    assert [(r.levelno, "Linear" in r.getMessage()) for r in lines] == [(logging.INFO, True)]


def test_a_module_hash_of_ones_own_is_said_once_with_what_it_means(caplog):
    caplog.set_level(logging.INFO, logger="torchcache")
    module = torchcache(persistent_module_hash="mine")(nn.Linear(10, 4).requires_grad_(False))
    for _ in range(3):
        module(batch())
    lines = [r for r in caplog.records if "do not invalidate" in r.getMessage()]
    assert [(r.levelno, "mine" in r.getMessage()) for r in lines] == [(logging.INFO, True)]


def test_a_cached_call_is_silent_in_the_normal_case(caplog):
    caplog.set_level(logging.WARNING, logger="torchcache")
    module = torchcache()(nn.Linear(10, 4).requires_grad_(False))
    for n in (4, 4, 6):
        module(batch(n))
    assert not caplog.records


def test_every_line_comes_from_a_logger_below_torchcache(caplog):
    caplog.set_level(logging.DEBUG)
    module = torchcache()(nn.Linear(10, 4))
    module(batch())
    ours = [r for r in caplog.records if "Linear" in r.getMessage()]
    assert ours
    assert all(r.name.startswith("torchcache") for r in ours)


def test_set_logger_config_sets_level_format_and_stream(logger):
    stream = io.StringIO()
    set_logger_config(level="info", fmt="%(levelname)s|%(message)s", stream=stream)
    logger.getChild("somewhere").info("hello")
    logger.getChild("somewhere").debug("too fine")
    assert stream.getvalue() == "INFO|hello\n"


def test_set_logger_config_writes_to_a_file_too(logger, tmp_path):
    path, stream = tmp_path / "log.txt", io.StringIO()
    path.write_text("kept\n")
    set_logger_config(
        level=logging.WARNING, fmt="%(asctime)s %(message)s", datefmt="then", stream=stream, filename=path
    )
    logger.warning("hello")
    assert path.read_text() == "kept\nthen hello\n"
    assert stream.getvalue() == "then hello\n"


def test_a_second_call_replaces_the_handlers_of_the_first(logger):
    first, second = io.StringIO(), io.StringIO()
    set_logger_config(level="INFO", stream=first)
    set_logger_config(level="INFO", stream=second)
    logger.info("hello")
    assert first.getvalue() == ""
    assert second.getvalue().count("hello") == 1


def test_handlers_of_the_user_are_left_alone(logger):
    stream = io.StringIO()
    mine = logging.StreamHandler(stream)
    logger.addHandler(mine)
    try:
        set_logger_config(stream=io.StringIO())
        logger.warning("hello")
    finally:
        logger.removeHandler(mine)
    assert stream.getvalue() == "hello\n"


def test_propagation_and_the_root_logger_are_left_alone(logger):
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logger.propagate)
    set_logger_config(level="DEBUG", stream=io.StringIO())
    assert (root.level, list(root.handlers), logger.propagate) == before


@pytest.mark.parametrize("level", ["loud", "", "INF0", "1.5"])
def test_a_level_that_is_none_raises_and_changes_nothing(logger, level):
    stream = io.StringIO()
    set_logger_config(level="INFO", stream=stream)
    with pytest.raises(ValueError, match=r"level=.*INFO"):
        set_logger_config(level=level)
    logger.info("hello")
    assert "hello" in stream.getvalue()


@pytest.mark.parametrize(
    ("level", "number"), [("debug", 10), (" Warning ", 30), (35, 35), ("15", 15), ("CRITICAL", 50)]
)
def test_a_level_is_a_name_in_any_case_or_a_number(logger, level, number):
    set_logger_config(level=level, stream=io.StringIO())
    assert logger.level == number


def test_a_file_that_cannot_be_opened_is_said_and_left_out(logger, tmp_path):
    stream = io.StringIO()
    set_logger_config(stream=stream, filename=tmp_path / "missing" / "log.txt")
    assert "cannot be opened" in stream.getvalue()
    logger.warning("hello")
    assert "hello" in stream.getvalue()


def test_arguments_win_over_the_environment(logger, monkeypatch):
    monkeypatch.setenv("TORCHCACHE_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("TORCHCACHE_LOG_FMT", "env %(message)s")
    stream = io.StringIO()
    set_logger_config(level="ERROR", stream=stream)
    logger.warning("hello")
    logger.error("bad")
    assert stream.getvalue() == "env bad\n"


# -- at import ----------

SAY = """
import logging
import torchcache
logging.getLogger("torchcache").debug("one")
logging.getLogger("torchcache").info("two")
logging.getLogger("torchcache").warning("three")
"""


def test_importing_touches_neither_the_root_logger_nor_torch():
    code = """
    import sys, logging
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.raiseExceptions, logging.root.manager.disable
    import torchcache
    dir(torchcache)
    assert before == (root.level, list(root.handlers), logging.raiseExceptions, logging.root.manager.disable)
    assert logging.getLogger("torchcache").handlers == []
    assert logging.getLogger("torchcache").level == logging.NOTSET
    assert logging.getLogger("torchcache").propagate
    heavy = {"torch", "numpy", "lmdb", "zstandard", "msgpack"} & set(sys.modules)
    assert "torch" not in heavy, heavy
    """
    assert run_python(code).stderr == ""


@pytest.mark.slow
def test_the_names_that_need_no_torch_do_not_load_it():
    code = """
    import sys
    from torchcache import CacheStats, ConfigError, UncacheableError, set_logger_config
    import torchcache.storage.lmdb, torchcache.storage.writer, torchcache.keys.digest, torchcache.keys.code
    assert "torch" not in sys.modules
    from torchcache import torchcache
    assert "torch" in sys.modules
    """
    run_python(code)


def test_without_variables_the_log_is_left_to_the_program():
    done = run_python(SAY)
    assert done.stderr == "three\n"


def test_the_environment_sets_up_the_log():
    done = run_python(
        SAY,
        TORCHCACHE_LOG_LEVEL="info",
        TORCHCACHE_LOG_FMT="%(asctime)s/%(levelname)s/%(message)s",
        TORCHCACHE_LOG_DATEFMT="now",
    )
    assert done.stderr == "now/INFO/two\nnow/WARNING/three\n"


def test_the_environment_names_a_log_file(tmp_path):
    path = tmp_path / "log.txt"
    run_python(SAY, TORCHCACHE_LOG_FILE=str(path), TORCHCACHE_LOG_FMT="%(message)s")
    assert path.read_text() == "three\n"


def test_a_wrong_level_in_the_environment_is_said_and_does_not_raise():
    done = run_python(SAY, TORCHCACHE_LOG_LEVEL="loud", TORCHCACHE_LOG_FMT="%(message)s")
    first, *rest = done.stderr.splitlines()
    assert "TORCHCACHE_LOG_LEVEL=loud" in first
    assert rest == ["three"]


def test_a_wrong_file_in_the_environment_is_said_and_does_not_raise(tmp_path):
    done = run_python(SAY, TORCHCACHE_LOG_FILE=str(tmp_path), TORCHCACHE_LOG_FMT="%(message)s")
    first, *rest = done.stderr.splitlines()
    assert str(tmp_path) in first
    assert rest == ["three"]


def test_a_format_that_is_wrong_does_not_break_the_import():
    done = run_python("import torchcache\nprint('fine')", TORCHCACHE_LOG_FMT="%(nonsense")
    assert done.stdout == "fine\n"
