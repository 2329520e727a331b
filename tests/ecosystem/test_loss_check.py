"""Losses of samples alone: how a batch is taken apart, and that a difference is found."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_memsink import memsink
from tests.ecosystem.absent_cuda import stand_in
from tests.ecosystem.fitting import one_by_one, rows
from tests.ecosystem.loss_check import LossCheck, relative

FEATURES = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(FEATURES, FEATURES.sum(1, keepdim=True))
ALONE = one_by_one(rows, lambda batch: len(batch[0]))


class Regressor(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = functional.mse_loss(self.layers(inputs), targets)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def checked(alone: Any) -> LossCheck:
    torch.manual_seed(0)
    check = LossCheck(alone, alone, lambda module: module.eval())
    callbacks = [check.before(Callback), *memsink(path=None, flush_every=1), check.after(Callback)]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(callbacks=callbacks, logger=False, max_epochs=1, accelerator="cpu", **quiet)  # type: ignore[arg-type]
    loaders = DataLoader(DATA, 4, shuffle=True), DataLoader(DATA, 4)
    trainer.fit(Regressor(), *loaders)
    return check


@pytest.mark.filterwarnings("ignore")
def test_losses_of_samples_alone_are_those_of_the_ledger():
    check = checked(ALONE)
    assert len(check.errors) == 3 and max(check.errors) < 1e-6 and max(check.mean_errors) < 1e-6
    assert check.control_error() is not None and check.control_error() < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_losses_of_other_samples_are_found_out():
    check = checked(lambda module, batch: ALONE(module, batch).roll(1))
    assert len(check.errors) == 3 and min(check.errors) > 1e-2 and max(check.mean_errors) < 1e-6
    assert check.control_error() is not None and check.control_error() > 1e-2


def test_only_known_losses_are_compared():
    found, expected = torch.tensor([1.0, torch.nan, 5.0]), torch.tensor([1.0, 2.0, 3.0])
    assert relative(found, expected, torch.tensor([True, False, False])) == 0
    assert relative(found, expected, torch.tensor([True, False, True])) == 1
    assert relative(found[:2], expected) == torch.inf


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_batch_of_one_is_a_copy(kind):
    batch = kind(a=torch.arange(6.0).view(3, 2), b=[torch.arange(3)], name="kept")
    one = rows(batch, 1)
    assert one["a"].tolist() == [[2, 3]] and one["b"][0].tolist() == [1] and one["name"] == "kept"
    one["a"].zero_()
    assert batch["a"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_nothing_is_written_where_there_is_no_torchvision(tmp_path):
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    stand_in(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
