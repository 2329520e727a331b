"""A second look: the losses that samples have in evaluation, and nothing else of the training changes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lightning_memsink.callbacks.loss_tracker import LossTracker
from tests.support.looking import watched
from tests.support.small_runs import TRAIN, fit, train_loader


@torch.no_grad()
def losses_of(module: Any, tokens: Tensor) -> Tensor:
    """``[N]`` each text's own loss, one at a time."""
    return torch.stack([module.loss({"input_ids": row[None]}) for row in tokens])


@pytest.mark.parametrize("mode", ["validation_step", "training_step", "training"])
@pytest.mark.parametrize("identity", ["content", "index"])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_sample_has_the_loss_of_now(mode, identity, workers):
    tracker, looks = watched(mode, LossTracker(identity, families=False))

    def measured(module: Any, rows: Tensor) -> Tensor:
        return losses_of(module, TRAIN[tracker.table.first_row[rows]])

    looks.measured = measured
    fit([tracker, looks], train=train_loader(num_workers=workers), max_epochs=1)
    assert len(looks.looks) == 3
    for look, truth in zip(looks.looks, looks.truth, strict=True):
        assert len(look.rows) == len(look.rows.unique()) and look.mode == mode == looks.second.mode
        torch.testing.assert_close(look.losses, truth)
    assert len(looks.looks[-1].rows) == len(tracker.table) and not looks.second.refusal


def test_only_the_rows_that_were_asked_for_are_measured():
    tracker, looks = watched(pick=lambda known: torch.tensor([5, 3, 60]))
    fit([tracker, looks], max_epochs=1)
    assert [sorted(look.rows.tolist()) for look in looks.looks] == [[3, 5, 60]] * 3
    empty = watched(pick=lambda known: torch.zeros(0, dtype=torch.int64))
    fit(empty, max_epochs=1)
    assert [len(look.rows) for look in empty[1].looks] == [0, 0, 0]


class Augmented(Dataset[dict[str, Tensor]]):
    """Draws from every generator that a data set may draw from, and counts."""

    def __init__(self) -> None:
        self.own, self.array = torch.Generator().manual_seed(3), np.random.default_rng(4)
        self.old, self.python = np.random.RandomState(5), random.Random(6)
        self.inner = {"generators": [torch.Generator().manual_seed(7)], "count": 0}
        self.drawn, self.calls = torch.zeros(3), 0

    def __len__(self) -> int:
        return 48

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        self.calls += 1
        self.inner["count"] += 1
        self.drawn += 1
        numbers = [torch.rand(()), torch.rand((), generator=self.own), torch.rand((), generator=self.inner_generator)]
        numbers += [np.random.rand(), self.array.random(), self.old.rand(), random.random(), self.python.random()]
        shift = sum(map(float, numbers)) + self.calls / 10 + self.inner["count"] + float(self.drawn[0])
        x = torch.linspace(row, row + 1, 6) + 0.1 * shift
        return {"x": x.sin(), "y": torch.tensor(float(row % 5))}

    @property
    def inner_generator(self) -> torch.Generator:
        return self.inner["generators"][0]


class Stateful(LightningModule):
    """Whatever a module may keep: dropout, batch norm, metrics, lists, counts, a generator, plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
        self.frozen = nn.BatchNorm1d(1)
        self.metric, self.seen, self.steps = MeanMetric(), [], 0
        self.generator, self.scale = np.random.default_rng(0), torch.ones(1)
        self.logged: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.frozen(self.net(batch["x"]))[:, 0], batch["y"], reduction="none").mean()
        self.steps += 1
        self.seen.append(self.steps)
        self.scale.mul_(1.01)
        self.metric.update(loss)
        self.log("loss", loss)
        self.log("metric", self.metric, on_epoch=True)
        return loss * (1 + 1e-3 * (self.generator.random() + float(self.scale) + len(self.seen)))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def on_train_epoch_start(self) -> None:
        self.frozen.eval()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def facts(run: Any, module: Any, data: Augmented) -> list[Any]:
    generators = [data.own, data.inner_generator]
    return [
        {name: value.tolist() for name, value in module.state_dict().items()},
        {name: float(value) for name, value in run.callback_metrics.items()},
        [
            module.seen,
            module.steps,
            module.generator.bit_generator.state,
            module.scale.tolist(),
            module.frozen.training,
        ],
        [data.calls, data.inner["count"], data.drawn.tolist(), [each.get_state().tolist() for each in generators]],
        [data.array.bit_generator.state, repr(data.old.get_state()), data.python.getstate()],
        [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()],
    ]


@pytest.mark.parametrize("mode", ["validation_step", "training_step", "training"])
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_training_is_the_same_to_the_bit(mode, workers, persistent):
    found = []
    for looks in (False, True):
        seed_everything(1, verbose=False)
        data = Augmented()
        options = {"num_workers": workers, "persistent_workers": persistent, "shuffle": True}
        train = DataLoader(data, 8, **options)
        callbacks = watched(mode) if looks else [LossTracker(families=False)]
        run, module = fit(
            callbacks, Stateful(), train=train, controls=DataLoader(Augmented(), 16), max_epochs=2, val_check_interval=4
        )
        found.append(facts(run, module, data))
    look = callbacks[1].looks
    assert len(look) == 2 and [len(each.rows) for each in look] == [32, 48]
    assert all(each.losses.isfinite().all() for each in look)
    assert found[0] == found[1]


class Sizes(Stateful):
    """Notes how many samples its steps get."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        SEEN.append(len(batch["x"]))
        return super().training_step(batch, batch_idx)


SEEN: list[int] = []


@pytest.mark.parametrize("count", [1, 3, 8, 9, 48])
def test_every_batch_of_a_look_is_full(count):
    """Batch statistics of one sample are an error, and compiled code is compiled anew for another size."""
    tracker, looks = watched("training", pick=lambda known: torch.arange(known)[:count], at="on_train_epoch_end")
    SEEN.clear()
    fit(
        [tracker, looks],
        Sizes(),
        train=DataLoader(Augmented(), 8),
        controls="none",
        max_epochs=1,
        val_check_interval=None,
    )
    assert sorted(looks.looks[0].rows.tolist()) == [*range(count)] and looks.looks[0].losses.isfinite().all()
    assert SEEN == [8] * (6 + -(-count // 8))
