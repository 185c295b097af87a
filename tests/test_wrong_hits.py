"""Our side of every row of ``python -m benchmarks wrong-hits``; docs/keys.md shows what the rivals do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import wrong_hits
from benchmarks._wrong_hits_child import is_same, see, write_program
from benchmarks._wrong_hits_rows import Row


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all rows of one process: the program is compiled once, and each row has its own cache."""
    path = tmp_path_factory.mktemp("wrong_hits")
    write_program(path)
    return path


@pytest.fixture(scope="module")
def seen_between_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the second of two runs saw. All rows share the runs: a process takes seconds to import torch."""
    path = tmp_path_factory.mktemp("wrong_hits_between_runs")
    write_program(path)
    return wrong_hits.see_between_runs(wrong_hits.OURS, None, path)


@pytest.mark.parametrize("row", wrong_hits.ROWS_HERE, ids=lambda row: row.name)
def test_a_cached_program_returns_what_it_returns_without_a_cache(row: Row, work_dir: Path):
    assert see(row, wrong_hits.OURS, work_dir).startswith("right")


@pytest.mark.parametrize("row", wrong_hits.ROWS_BETWEEN_RUNS, ids=lambda row: row.name)
def test_a_second_run_returns_what_it_returns_without_a_cache(row: Row, seen_between_runs):
    assert seen_between_runs[row.name].startswith("right")


@pytest.mark.parametrize("name", ["again_function", "again_module", "result_written"])
def test_what_did_not_change_is_a_hit(name: str, tmp_path):
    write_program(tmp_path)
    row = next(row for row in wrong_hits.ROWS_HERE if row.name == name)
    assert see(row, wrong_hits.OURS, tmp_path) == "right (hit)"


@pytest.mark.parametrize("name", ["nothing_function", "nothing_module"])
def test_what_did_not_change_between_two_runs_is_a_hit(name: str, seen_between_runs):
    assert seen_between_runs[name] == "right (hit)"


def test_a_difference_of_one_bit_type_or_structure_is_seen():
    one, other = torch.zeros(2), -torch.zeros(2)
    assert is_same({"a": (one, 1)}, {"a": (one.clone(), 1)})
    assert not is_same(one, other)
    assert not is_same(one, one.double())
    assert not is_same((one,), [one])
    assert not is_same(1, True)
    assert not is_same({"a": one}, {"b": one})


def test_no_two_rows_have_one_name():
    names = [row.name for row in wrong_hits.ROWS]
    assert len(set(names)) == len(names)
