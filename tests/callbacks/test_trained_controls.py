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
from tests.support.small_runs import Rows, TinyLM, chain

pytestmark = QUIET

SEEDED = torch.Generator().manual_seed(0)
X = torch.rand(24, 3, 8, 8, generator=SEEDED)
HELD_OUT = torch.cat([X[20:24], torch.rand(8, 3, 8, 8, generator=SEEDED)])
Y, OTHER_LABELS = torch.arange(24) % 4, (torch.arange(24) + 1) % 4
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


def run(kind=Labelled, model=None, own_controls=False, held_out=HELD_OUT, **options):
    control_loader = DataLoader(kind(held_out, OTHER_LABELS[: len(held_out)]), batch_size=5)
    tracker = LossTracker(**({"controls": control_loader} if own_controls else {}))
    loader = DataLoader(kind(X, Y), batch_size=6, shuffle=kind is not Stream)
    return fit(tracker, model or Classifier(), loader, None if own_controls else control_loader, **options)


def fit(tracker, model, loader, control_loader, **options):
    tracker.probe.overlap = tracker.loader_ids.overlap
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[tracker],
        **{"max_epochs": 1, **options},
    )
    trainer.fit(model, loader, control_loader)
    return tracker


def losses_left_out(tracker):
    """Number of controls whose losses are unknown at the last evaluation."""
    return int(torch.isnan(tracker.controls.unknown_to_the_model).sum())


FOUR = "4 of 12 controls have the content of training samples"


@pytest.mark.parametrize("kind", [Labelled, Named, Stream])
@pytest.mark.parametrize("own_controls", [False, True], ids=["validation set", "own controls"])
def test_controls_that_are_training_inputs_are_left_out_after_one_epoch(kind, own_controls):
    with pytest.warns(UserWarning, match=FOUR):
        tracker = run(kind, own_controls=own_controls)
    assert len(tracker.controls) == 12
    assert losses_left_out(tracker) == 4


@pytest.mark.parametrize("moves", [False, True], ids=["in their order", "moved by a hook"])
def test_those_that_are_left_out_are_the_right_ones(moves):
    with pytest.warns(UserWarning, match=FOUR):
        tracker = run(model=Classifier(moves))
    assert tracker.controls.ids.tolist() == list(range(12))
    assert torch.isnan(tracker.controls.unknown_to_the_model).tolist() == TRAINED


@pytest.mark.parametrize("identity", ["auto", "index", "content"])
def test_texts_that_are_trained_on_are_left_out_whatever_their_ids_are(identity):
    texts = chain(24, seed=1)
    held_out = torch.cat([texts[20:], chain(8, seed=2)])
    loaders = DataLoader(Rows(texts), batch_size=6), DataLoader(Rows(held_out), batch_size=5)
    with pytest.warns(UserWarning, match=FOUR):
        tracker = fit(LossTracker(identity), TinyLM(), *loaders)
    assert losses_left_out(tracker) == 4


def test_rows_of_one_number_in_both_sets_are_others():
    assert losses_left_out(run(held_out=HELD_OUT[4:])) == 0


def test_a_validation_set_that_is_the_training_set_is_known_as_such():
    with pytest.warns(UserWarning, match="all 12 controls have the content of training samples"):
        tracker = run(held_out=X[:12])
    assert losses_left_out(tracker) == 12


def test_only_what_was_trained_on_so_far_is_left_out():
    """Six training rows, all of them among the controls."""
    with pytest.warns(UserWarning, match="6 of 24 controls"):
        tracker = run(held_out=X, limit_train_batches=1)
    assert losses_left_out(tracker) == 6


def test_an_odd_batch_is_not_compared_and_ends_nothing(monkeypatch):
    def fails(*args):
        raise RuntimeError("odd")

    monkeypatch.setattr("lightning_memsink.callbacks.runtime.fetched_batches.input_prints", fails)
    tracker = run()
    assert len(tracker.controls) == 12
    assert losses_left_out(tracker) == 0
