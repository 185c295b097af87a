"""Each tier keeps the contract of tiers."""

from __future__ import annotations

import pytest
import torch

from tests.storage.fakes import FakeStore, Observer
from tests.storage.known_values import forget_environments, open_store
from tests.tiers.contract import TierContract
from torchcache.options import CacheOptions
from torchcache.storage.writer import writer
from torchcache.tiers.disk import StoreTier
from torchcache.tiers.memory import MemoryTier
from torchcache.tiers.queue import WriteQueue


class TestMemory(TierContract):
    @pytest.fixture
    def tier(self):
        return MemoryTier(1_000_000, torch.device("cpu"))


class TestWriteQueue(TierContract):
    @pytest.fixture
    def tier(self):
        """A queue whose rows stay: the commit waits until the test is over."""
        store = FakeStore()
        yield WriteQueue(store, Observer(), CacheOptions())
        store.let_through.set()
        assert writer.flush(10, store)


class TestStore(TierContract):
    @pytest.fixture
    def tier(self, tmp_path):
        yield StoreTier(open_store(tmp_path / "cache"), None, Nobody())
        forget_environments()


class Nobody:
    """Does not mind that rows are in use."""

    def on_used(self, store):
        raise AssertionError("nothing is marked without a queue")
