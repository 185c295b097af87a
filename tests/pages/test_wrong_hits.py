"""Our side of every row of ``python -m benchmarks wrong-hits``, and the table that it wrote for docs/keys.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks._tables import TABLES
from benchmarks.wrong_hits import compare as wrong_hits
from benchmarks.wrong_hits.child import is_same, see, write_program
from benchmarks.wrong_hits.rows import Row

WRITTEN = (TABLES / wrong_hits.TABLE).read_text(encoding="utf-8")


def cells_of(line: str) -> list[str]:
    """Return the cells of a line of the table, as the benchmark saw them."""
    return [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]


def written() -> dict[str, dict[str, str]]:
    """Return what docs/keys.md says of each cache, by the title of the row."""
    head, _, *lines = [line for line in WRITTEN.splitlines() if line.startswith("|")]
    _, *caches = cells_of(head)
    rows = [cells_of(line) for line in lines if not line.startswith("| **")]
    return {cache: {title: cells[i] for title, *cells in rows} for i, cache in enumerate(caches)}


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
    assert see(row, wrong_hits.OURS, work_dir) == written()[wrong_hits.OURS][row.title]


@pytest.mark.parametrize("row", wrong_hits.ROWS_BETWEEN_RUNS, ids=lambda row: row.name)
def test_a_second_run_returns_what_it_returns_without_a_cache(row: Row, seen_between_runs):
    assert seen_between_runs[row.name] == written()[wrong_hits.OURS][row.title]


def test_ours_is_right_in_every_row_of_the_table():
    assert [cell for cell in written()[wrong_hits.OURS].values() if not cell.startswith("right")] == []


def test_the_table_is_the_one_that_the_benchmark_writes_of_its_rows_and_caches():
    seen_with = re.findall(r"^Seen with (.*)\.$", WRITTEN, re.MULTILINE)
    again = "python -m benchmarks wrong-hits --write"
    assert list(written()[wrong_hits.OURS]) == [row.title for row in wrong_hits.ROWS], again
    by_name = {cache: {row.name: cells[row.title] for row in wrong_hits.ROWS} for cache, cells in written().items()}
    assert tuple(by_name) == wrong_hits.CACHES
    assert f"{wrong_hits.markdown(by_name, *seen_with)}\n" == WRITTEN


def test_the_rivals_in_the_table_are_those_that_are_installed_now():
    for requirement in wrong_hits.REQUIREMENTS.values():
        assert f", {requirement.replace('==', ' ')}, " in WRITTEN


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


def test_no_two_rows_have_one_name_or_title():
    for names in ([row.name for row in wrong_hits.ROWS], [row.title for row in wrong_hits.ROWS]):
        assert len(set(names)) == len(names)
