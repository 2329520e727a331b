"""The number of evaluations that is announced is the number that takes place."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_memsink.callbacks.runtime.evaluation_schedule import EvaluationSchedule
from tests.support.capturing import QUIET

pytestmark = QUIET


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.ones(14, 2))


class Count(Callback):
    """Evaluations of a validation set, and those of own controls as `ControlProbe.is_due` has them."""

    def __init__(self, own_every=None):
        self.own_every = own_every
        self.evaluated: list[int] = []
        self.batches = 0

    def on_train_start(self, trainer, pl_module):
        self.schedule = EvaluationSchedule.of(trainer, self.own_every)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        step = trainer.global_step
        if self.own_every is not None and step % self.own_every == 0 and step > max([0, *self.evaluated]):
            self.evaluated.append(step)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.own_every is not None and max([0, *self.evaluated]) < trainer.global_step:
            self.evaluated.append(trainer.global_step)

    def on_validation_end(self, trainer, pl_module):
        if self.own_every is None and not trainer.sanity_checking:
            self.evaluated.append(trainer.global_step)


def run(model=None, own_every=None, data=None, resume=None, **options):
    count = Count(own_every)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[count],
        **options,
    )
    loader = DataLoader(torch.ones(14, 2) if data is None else data, batch_size=2)
    trainer.fit(model or Regression(), loader, DataLoader(torch.ones(2, 2)), ckpt_path=resume)
    count.trainer = trainer
    return count


RUNS = {
    "each epoch": {"max_epochs": 3},
    "every second epoch": {"max_epochs": 5, "check_val_every_n_epoch": 2},
    "never in so few epochs": {"max_epochs": 5, "check_val_every_n_epoch": 10},
    "thrice an epoch": {"max_epochs": 2, "val_check_interval": 0.3},
    "every third batch": {"max_epochs": 2, "val_check_interval": 3},
    "every third batch of every second epoch": {
        "max_epochs": 5,
        "val_check_interval": 3,
        "check_val_every_n_epoch": 2,
    },
    "every tenth batch over epochs": {"max_epochs": 3, "val_check_interval": 10, "check_val_every_n_epoch": None},
    "steps end first": {"max_epochs": 9, "max_steps": 17},
    "steps end with an epoch": {"max_epochs": 9, "max_steps": 14},
    "epochs end first": {"max_epochs": 2, "max_steps": 100},
    "steps only": {"max_epochs": -1, "max_steps": 17, "val_check_interval": 2},
    "accumulated": {"max_epochs": -1, "max_steps": 9, "accumulate_grad_batches": 2, "val_check_interval": 3},
    "accumulated, by epochs": {"max_epochs": 3, "accumulate_grad_batches": 3},
    "fewer batches": {"max_epochs": 2, "limit_train_batches": 3},
    "half of the batches": {"max_epochs": 2, "limit_train_batches": 0.5, "val_check_interval": 0.5},
    "no validation": {"max_epochs": 2, "limit_val_batches": 0},
    "a try": {"fast_dev_run": True},
    "few batches for each of both": {"max_epochs": 2, "overfit_batches": 2},
    "no epoch": {"max_epochs": 0},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_validations_are_counted_before_they_take_place(options):
    count = run(**options)
    if options.get("max_epochs") != 0:  # otherwise nothing starts
        assert count.schedule.evaluations == len(count.evaluated)
        assert count.schedule.batches_in_all == count.batches


OWN = {
    "each fourth step": {"max_epochs": 3},
    "steps end first": {"max_epochs": 9, "max_steps": 17},
    "steps end with an epoch": {"max_epochs": 9, "max_steps": 14},
    "accumulated": {"max_epochs": 3, "accumulate_grad_batches": 2},
    "without a validation set": {"max_epochs": 3, "limit_val_batches": 0},
}


@pytest.mark.parametrize("own_every", [1, 4, 7, 100])
@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_evaluations_of_own_controls_are_counted(options, own_every):
    count = run(own_every=own_every, **options)
    assert count.schedule.evaluations == len(count.evaluated)


def test_a_resumed_run_has_the_evaluations_that_are_left(tmp_path):
    first = run(max_epochs=2)
    first.trainer.save_checkpoint(tmp_path / "end.ckpt")
    second = run(max_epochs=5, resume=tmp_path / "end.ckpt")
    assert second.schedule.evaluations == len(second.evaluated) == 3


def test_a_stream_of_unknown_length_is_counted_by_steps():
    count = run(data=Stream(), max_steps=6, max_epochs=-1, val_check_interval=2)
    assert count.schedule.evaluations == len(count.evaluated) == 3


UNKNOWN = {
    "a stream by epochs": {"data": Stream(), "max_epochs": 2},
    "a stream that ends in time": {"data": Stream(), "max_steps": 6, "max_epochs": -1},
    "by the clock": {"max_epochs": 2, "val_check_interval": timedelta(hours=1)},
    "steps under manual optimization": {"model": Manual(), "max_steps": 9, "max_epochs": -1},
}


@pytest.mark.parametrize("options", UNKNOWN.values(), ids=UNKNOWN)
def test_a_number_that_nothing_shows_is_unknown(options):
    assert run(**options).schedule.evaluations is None


def test_manual_optimization_is_counted_by_epochs():
    count = run(model=Manual(), max_epochs=2)
    assert count.schedule.evaluations == len(count.evaluated) == 2


def test_an_endless_run_is_unknown():
    schedule = EvaluationSchedule(epochs=None, steps=None, batches=7)
    assert schedule.evaluations is None and schedule.batches_in_all is None
