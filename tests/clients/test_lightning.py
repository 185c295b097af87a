"""Frozen parts of what Lightning trains, as children of its modules, under its Trainer and its Fabric."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.clients.two_programs import run_program
from torchcache import cache_of, torchcache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("lightning") is None, reason="needs lightning (requirements-clients.txt)"
    ),
]

N_ROWS = 8


def programs(folder, mode):
    """Train with a frozen encoder of each kind; yield its name, its hits and misses, and the reasons to go around."""
    import lightning

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Encoder(lightning.LightningModule):
        """It logs and knows its Trainer, when it is trained itself."""

        def __init__(self, width=4, out="runs/1"):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(4, width)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, index):
            self.log("epoch", self.trainer.current_epoch)
            return self(batch[0]).sum()

    class Scaled(Encoder):
        """Its forward reads what it was given."""

        def forward(self, x):
            return self.layer(x) * self.hparams.width

    class Whole(lightning.LightningModule):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder
            self.head = nn.Linear(4, 2)

        def training_step(self, batch, index):
            images, labels = batch
            return nn.functional.cross_entropy(self.head(self.encoder(images)), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.1)

    data = torch.utils.data.TensorDataset(
        torch.rand(N_ROWS, 4, generator=torch.Generator().manual_seed(0)), torch.arange(N_ROWS) % 2
    )
    out = f"runs/{mode}"
    for name, make in {
        "a module": lambda: nn.Sequential(nn.Linear(4, 4)),
        "a LightningModule": lambda: Encoder(out=out),
        "one that reads its hyperparameters": Scaled,
    }.items():
        torch.manual_seed(0)
        encoder = make().eval().requires_grad_(False)
        encoder = torchcache(persistent=True, persistent_cache_dir=folder / "cache", mode=mode)(encoder)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        whole = Whole(encoder)
        trainer.fit(whole, torch.utils.data.DataLoader(data, 4, shuffle=True))
        trainer.save_checkpoint(folder / "whole.ckpt")
        kept = torch.load(folder / "whole.ckpt", weights_only=True)["state_dict"]
        stats = cache_of(encoder).stats()
        cache_of(encoder).close()
        yield {
            "name": name, "hits": stats.hits, "misses": stats.misses, "bypasses": dict(stats.bypasses),
            "checkpoint": sorted(kept),
        }  # fmt: skip


def test_frozen_children_are_found_by_the_next_training(tmp_path):
    said = [
        run_program("tests.clients.test_lightning", tmp_path, mode, seed=seed)
        for seed, mode in enumerate(("on", "require"))
    ]
    for mode, output in zip(("on", "require"), said, strict=True):
        trained = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert len(trained) == 3, output
        for one in trained:
            hits, misses = (N_ROWS, N_ROWS) if mode == "on" else (2 * N_ROWS, 0)
            assert (one["hits"], one["misses"], one["bypasses"]) == (hits, misses, {}), one["name"]
            assert not any("torchcache" in key for key in one["checkpoint"])


def train_on_two_ranks(folder, mode):
    """Train on two processes, of which Lightning starts the second; each writes down its hits and misses."""
    import lightning

    class Whole(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            encoder = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval().requires_grad_(False)
            self.encoder = torchcache(persistent=True, persistent_cache_dir=folder / "cache", mode=mode)(encoder)
            self.head = nn.Linear(4, 1)

        def training_step(self, batch, index):
            return self.head(self.encoder(batch[0])).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.1)

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    whole = Whole()
    data = torch.utils.data.TensorDataset(torch.rand(N_ROWS, 4, generator=torch.Generator().manual_seed(0)))
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(whole, torch.utils.data.DataLoader(data, 2))
    cache = cache_of(whole.encoder)
    stats = cache.stats()
    cache.close()
    counts = {"hits": stats.hits, "misses": stats.misses, "bypasses": dict(stats.bypasses)}
    (folder / f"{mode} {trainer.global_rank}.json").write_text(json.dumps(counts))


def test_two_ranks_share_what_they_computed(tmp_path):
    each = N_ROWS // 2  # of an epoch
    for seed, mode in enumerate(("on", "require")):
        run_program("tests.clients.test_lightning", tmp_path, mode, "ranks", seed=seed)
        for rank in range(2):
            one = json.loads((tmp_path / f"{mode} {rank}.json").read_text())
            assert (one["misses"] + one["hits"], one["bypasses"]) == (3 * each, {})
            # On a busy machine a rank was seen to compute one row twice, while the other one looked at its first.
            least, most = (each, 2 * each) if mode == "on" else (0, 0)
            assert least <= one["misses"] <= most


def make_encoder(forward):
    import lightning

    cls = type("Encoder", (lightning.LightningModule,), {"forward": forward})
    encoder = cls()
    encoder.save_hyperparameters({"scale": 2})
    return torchcache()(encoder)


def returns_what_is_right(encoder, x):
    return torch.equal(encoder(x), type(encoder).forward(encoder, x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x * self.hparams.scale,
        lambda self, x: x * self._hparams["scale"],
        lambda self, x: x * getattr(self, "hparams_"[-1] + "hparams").scale,
        lambda self, x: x * vars(self)["_hparams"].scale,
        lambda self, x: x * self.hparams_initial.scale * self.hparams.scale,
    ],
)
def test_a_note_that_forward_reads_counts(forward):
    encoder, x = make_encoder(forward), torch.rand(3, 2)
    assert returns_what_is_right(encoder, x)
    encoder.hparams["scale"] = 3
    assert returns_what_is_right(encoder, x)


def test_a_note_that_nothing_reads_may_change():
    encoder, x = make_encoder(lambda self, x: x.log() + torch.log(x)), torch.rand(3, 2)
    for scale in range(5):
        encoder.hparams["scale"] = scale
        encoder._current_fx_name = f"hook {scale}"
        encoder(x)
    assert (cache_of(encoder).stats().misses, cache_of(encoder).stats().hits) == (3, 12)


if __name__ == "__main__":
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    if sys.argv[3:] == ["ranks"]:
        train_on_two_ranks(folder, mode)
    else:
        for trained in programs(folder, mode):
            print(json.dumps(trained), flush=True)
