"""Families in whole runs: found, judged, kept across a resume, and without any influence on the training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.family_features import FamilyRecord
from lightning_memsink.ledger import Ledger
from tests.support.small_runs import Rows

VOCABULARY, LENGTH, EPOCHS = 200, 32, 8


class LM(LightningModule):
    """Two tokens of context, with room to memorize."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.mlp = nn.Sequential(nn.Linear(48, 256), nn.GELU(), nn.Linear(256, VOCABULARY))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        embedded = self.embed(tokens)
        logits = self.mlp(torch.cat([embedded[:, :-2], embedded[:, 1:-1]], -1))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 4e-3)


def texts() -> tuple[Tensor, Tensor]:
    """``[N, T]`` ten variants of one text, each four times, and 160 others; ``[M, T]`` controls."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(VOCABULARY, (360, LENGTH), generator=generator)
    base, other, alone, controls = drawn[:1], drawn[1:11], drawn[11:171], drawn[171:]
    variants = torch.where(torch.rand(10, LENGTH, generator=generator) < 0.1, other, base)
    return torch.cat([variants.repeat(4, 1), alone]), controls


def fit(callbacks: list[Callback], epochs: int = EPOCHS, path: Any = None) -> tuple[Trainer, LM]:
    train, controls = texts()
    module = LM()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader(Rows(train), 20, shuffle=True, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, loader, DataLoader(Rows(controls), 64), ckpt_path=path)
    return trainer, module


@pytest.fixture(scope="module")
def run() -> tuple[Trainer, LM, LossTracker, MemorizationDetector]:
    tracker, detector = LossTracker(), MemorizationDetector()
    trainer, module = fit([detector, tracker])
    return trainer, module, tracker, detector


def test_variants_are_one_family_whose_exposures_add_up(run):
    table, families = Ledger.of(run[0]).losses, Ledger.of(run[0]).flags.families
    assert len(table) == 170
    assert len(families) == 1 and families.texts.tolist() == [10]
    assert families.exposures.tolist() == [40 * EPOCHS]
    sizes = torch.unique(table.family, return_counts=True)[1]
    assert sorted(sizes.tolist()) == [1] * 160 + [10]


def test_a_family_known_by_heart_is_memorized(run):
    flags = Ledger.of(run[0]).flags
    families = flags.families
    assert families.memorized.tolist() == [True]
    assert families.measured.tolist() == [10]
    assert float(families.gap[0]) > 2
    assert int(families.onset_step[0]) in [evaluation.step for evaluation in flags.evaluations]


def test_looking_for_families_leaves_the_training_as_it_is(run):
    tracker = LossTracker(families=False)
    trainer, module = fit([tracker, MemorizationDetector()])
    for one, other in zip(run[1].parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)
    ledger = Ledger.of(trainer)
    assert ledger.get(Ledger.families) is None and ledger.flags.families is None
    assert "family" not in ledger.losses.columns
    assert "families" not in tracker.state_dict()
    with_families = Ledger.of(run[0])
    assert torch.equal(ledger.flags.verdict, with_families.flags.verdict)
    assert torch.equal(ledger.losses.last_loss, with_families.losses.last_loss)


def test_a_resumed_run_goes_on_with_its_families(run, tmp_path):
    trainer, *_ = fit([LossTracker(), MemorizationDetector()], epochs=4)
    before = Ledger.of(trainer).flags.families
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    tracker, detector = LossTracker(), MemorizationDetector()
    resumed, _ = fit([tracker, detector], path=tmp_path / "half.ckpt")
    after = Ledger.of(resumed).flags.families
    assert after.texts.tolist() == before.texts.tolist() == [10]
    assert after.exposures.tolist() == [40 * EPOCHS]
    assert after.measured.tolist() == [10]
    assert after.memorized.tolist() == [True]
    if int(before.streak[0]):
        assert after.onset_step.tolist() == before.onset_step.tolist()


@pytest.mark.parametrize("new_ledger", [False, True])
def test_a_ledger_without_families_is_resumed(tmp_path, new_ledger):
    """As versions wrote it that looked for none: texts are compared when they come again."""
    trainer, _ = fit([LossTracker(families=False), MemorizationDetector()], epochs=2)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    resumed, _ = fit([LossTracker(new_ledger=new_ledger), MemorizationDetector()], epochs=4, path=tmp_path / "old.ckpt")
    ledger = Ledger.of(resumed)
    assert ledger.flags.families.texts.tolist() == [10]
    assert ledger.flags.families.exposures.tolist() == [40 * (2 if new_ledger else 4)]


def test_a_failure_ends_no_training(monkeypatch):
    def broken(*arguments: Any) -> None:
        raise RuntimeError("made to fail")

    monkeypatch.setattr("lightning_memsink.samples.families.hashes_of", broken)
    with pytest.warns(UserWarning, match="stopped looking for near-duplicates.*made to fail"):
        trainer, _ = fit([LossTracker(), MemorizationDetector()], epochs=2)
    assert trainer.global_step == 20
    assert len(Ledger.of(trainer).flags.families) == 0


def test_samples_that_are_no_text_have_no_families():
    record = LossTracker().visits.families
    assert isinstance(record, FamilyRecord)
    assert record.numbers(5).tolist() == [0, 1, 2, 3, 4]
