"""What a process has not committed is seen by those that it descends from, and only as long as it lives."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.storage.children import fork, wait_for
from torchcache.storage.backlogs import Backlog, Debt, await_debts, debts_of_descendants


@contextlib.contextmanager
def child(*, levels: int = 1) -> Iterator[int]:
    """Fork a process that has accepted a job of three rows and one of two; yields its id.

    Args:
        levels: How many forks lie between it and this process; those between have no backlog.
    """
    reader, sender = os.pipe()
    first = fork()
    if first == 0:
        while levels > 1 and not fork():
            levels -= 1
        if levels == 1:
            backlog = Backlog()
            backlog.wait.add(7.0)
            backlog.accept(3)
            backlog.accept(2)
            os.write(sender, b"%d" % os.getpid())
        time.sleep(60)
    os.close(sender)
    last = int(os.read(reader, 20))
    try:
        yield last
    finally:
        os.close(reader)
        for process_id in {last, first}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        assert wait_for(first, 10) == -signal.SIGKILL


def check(debt: Debt) -> None:
    assert (debt.target, debt.rows, debt.wait.seconds()) == (2, 5, 7.0)
    assert debt.is_open()


def test_a_child_s_backlog_is_seen():
    with child():
        (debt,) = debts_of_descendants()
        check(debt)


def test_that_of_a_grandchild_is_seen():
    with child(levels=2):
        (debt,) = debts_of_descendants()
        check(debt)


def test_a_python_that_was_built_without_such_files_asks_the_system(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with child():
        (debt,) = debts_of_descendants()
        check(debt)


def test_nobody_waits_for_a_process_that_was_killed():
    with child() as process_id:
        debts = debts_of_descendants()
        os.kill(process_id, signal.SIGKILL)
        before = time.monotonic()
        assert await_debts(debts, 30) == []
        assert time.monotonic() - before < 10


def test_the_wait_for_a_process_that_does_nothing_is_bounded():
    with child():
        (late,) = await_debts(debts_of_descendants(), 0.1)
        check(late)


def test_a_system_without_such_files_is_said_once(monkeypatch, caplog):
    def refuse(_: str) -> int:
        raise OSError("not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    backlog = Backlog()
    backlog.accept(1)
    backlog.settle(1, 1)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "not permitted" in said


def test_a_default_wait_is_that_of_the_process_that_waits():
    backlog = Backlog()
    backlog.wait.add(None)
    assert backlog.wait.seconds() == 10
    backlog.wait.add(30.0)
    assert backlog.wait.seconds() == 30


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_a_wait_that_was_asked_for_is_no_longer(seconds):
    backlog = Backlog()
    backlog.wait.add(seconds)
    assert backlog.wait.seconds() == seconds
