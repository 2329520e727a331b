"""In a run, controls whose input is trained on are known, whatever their labels and row numbers are."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_memsink.callbacks.loss_tracker import LossTracker
from tests.support.capturing import QUIET

pytestmark = QUIET

SEEDED = torch.Generator().manual_seed(0)
X = torch.rand(24, 3, 8, 8, generator=SEEDED)
HELD_OUT = torch.cat([X[20:24], torch.rand(8, 3, 8, 8, generator=SEEDED)])
Y, OTHER_LABELS = torch.arange(24) % 4, (torch.arange(12) + 1) % 4
TRAINED = [True] * 4 + [False] * 8


class Labelled(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row], self.y[row]


class Named(Labelled):
    def __getitem__(self, row):
        return {"x": self.x[row], "y": self.y[row], "sample_id": f"{len(self.x)}/{row}"}


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


class Classifier(LightningModule):
    def __init__(self, moves=False):
        super().__init__()
        self.layer = nn.Linear(192, 4)
        self.moves = moves

    def training_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) and len(batch) == 2 else list_of(batch)
        return F.cross_entropy(self.layer(x.flatten(1)), y)

    validation_step = training_step

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.moves:
            return batch
        order = torch.randperm(len(batch[0]))
        return [part[order] for part in batch]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def list_of(batch):
    return (batch["x"], batch["y"]) if isinstance(batch, dict) else batch


def run(kind=Labelled, model=None, own_controls=False, tracker=None, held_out=HELD_OUT, **options):
    control_loader = DataLoader(kind(held_out, OTHER_LABELS[: len(held_out)]), batch_size=5)
    if tracker is None:
        tracker = LossTracker(**({"controls": control_loader} if own_controls else {}))
    tracker.probe.overlap = tracker.loader_ids.overlap
    tracker.ids_in_order = []
    note = tracker.loader_ids.overlap.note_controls

    def note_controls(ids, prints):
        tracker.ids_in_order.append(ids)
        note(ids, prints)

    tracker.loader_ids.overlap.note_controls = note_controls
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[tracker],
        num_sanity_val_steps=0,
        **{"max_epochs": 1, **options},
    )
    loader = DataLoader(kind(X, Y), batch_size=6, shuffle=kind is not Stream)
    trainer.fit(model or Classifier(), loader, None if own_controls else control_loader)
    return tracker


def trained(tracker):
    """Of the held-out rows, in their order, those that the run takes for trained on."""
    return tracker.loader_ids.overlap.overlap(torch.cat(tracker.ids_in_order))


@pytest.mark.parametrize("kind", [Labelled, Named, Stream])
@pytest.mark.parametrize("own_controls", [False, True], ids=["validation set", "own controls"])
def test_controls_that_are_training_inputs_are_known_after_one_epoch(kind, own_controls):
    tracker = run(kind, own_controls=own_controls)
    assert sorted(torch.cat(tracker.ids_in_order).tolist()) == sorted(tracker.controls.ids.tolist())
    assert trained(tracker).tolist() == TRAINED


def test_rows_of_one_number_in_both_sets_are_others():
    assert not bool(trained(run(held_out=HELD_OUT[4:])).any())


def test_rows_that_a_hook_has_moved_are_followed():
    tracker = run(model=Classifier(moves=True))
    order = torch.cat(tracker.ids_in_order).argsort()
    assert trained(tracker)[order].tolist() == TRAINED


def test_a_validation_set_that_is_the_training_set_is_known_as_such():
    tracker = run(held_out=X[:12])
    assert trained(tracker).tolist() == [True] * 12


def test_nothing_is_known_before_training():
    tracker = run(max_epochs=1, limit_train_batches=1)
    assert int(trained(tracker).sum()) <= 6


def test_an_odd_batch_is_not_compared_and_ends_nothing(monkeypatch):
    def fails(*args):
        raise RuntimeError("odd")

    monkeypatch.setattr("lightning_memsink.callbacks.runtime.fetched_batches.input_prints", fails)
    tracker = run()
    assert len(tracker.controls) == 12
    assert not bool(tracker.loader_ids.overlap.overlap(tracker.controls.ids).any())
