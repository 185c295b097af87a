"""Ranks of torch.distributed share a cache, and none waits for another because of it."""

from __future__ import annotations

import json

import pytest

from tests.processes.jobs import BATCH, EPOCHS, SAMPLES
from tests.storage.children import run

#: Forked ranks start with torch and its compiler, which DistributedDataParallel imports, loaded once for all.
START = """
import sys
import torch._dynamo
import torch.multiprocessing
from tests.processes import jobs

if __name__ == "__main__":
    method, function, world, *arguments = sys.argv[1:]
    torch.multiprocessing.start_processes(
        getattr(jobs, function), (int(world), *arguments), nprocs=int(world), start_method=method
    )
"""

TORCHRUN = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"

#: Everything on loopback. Each try of a job meets in a store of its own: in the launcher's, gloo finds the addresses
#: of ranks that died (torch 2.13).
NETWORK = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(autouse=True)
def compiler_folder(tmp_path, monkeypatch):
    """The compiler, which torch loads, makes a folder for itself."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiler"))


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report"
    path.mkdir()
    return path


def epochs_of(report, world):
    """Return what each rank saw in each epoch."""
    ranks = [json.loads((report / f"rank-{rank}-of-{world}.json").read_text()) for rank in range(world)]
    assert all(len(epochs) == EPOCHS for epochs in ranks)
    return list(zip(*ranks, strict=True))


def check_later_epochs(epochs):
    """From the second epoch on nothing is computed, although rows change ranks."""
    first, *others = epochs
    for epoch in others:
        assert [rank["misses"] for rank in epoch] == [0] * len(epoch)
        assert all(rank["hits"] == 2 * len(rank["seen"]) for rank in epoch), "the rows did not come from the disk"
        assert sorted(i for rank in epoch for i in rank["seen"]) == list(range(SAMPLES))
        moved = [set(now["seen"]) - set(then["seen"]) for now, then in zip(epoch, first, strict=True)]
        assert all(moved), "no row changed its rank"


def test_no_row_is_computed_twice_by_four_ranks_whatever_rank_it_comes_to(root, tmp_path, report):
    run(START, "fork", "rank_that_trains", 4, tmp_path / "meeting", root, report, timeout_seconds=90, **NETWORK)
    epochs = epochs_of(report, 4)
    assert sum(rank["misses"] for rank in epochs[0]) == SAMPLES
    check_later_epochs(epochs)


def test_a_job_that_torchrun_restarts_after_a_rank_died_computes_only_what_was_not_committed(root, tmp_path, report):
    run(
        TORCHRUN, "--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "--log-dir", tmp_path / "log",
        "--module", "tests.processes.jobs", root, report, timeout_seconds=90, **NETWORK,
    )  # fmt: skip
    epochs = epochs_of(report, 2)
    committed = [set(json.loads((report / f"committed-{rank}.json").read_text())) for rank in range(2)]
    assert all(committed)
    for rank, done in zip(epochs[0], committed, strict=True):
        left = len(set(rank["seen"]) - done)
        assert left - 2 * BATCH <= rank["misses"] <= left, "two batches more may have been committed"
    check_later_epochs(epochs)


def test_what_ranks_do_together_is_done_by_all_of_them_whoever_has_it_cached(root, tmp_path):
    run(START, "spawn", "rank_that_talks", 2, tmp_path / "meeting", root, timeout_seconds=90, **NETWORK)
