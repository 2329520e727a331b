"""Batches that are lists of samples, or whose samples lie along the second axis: in training and as controls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.ledger import Ledger
from tests.support.small_runs import trainer

COUNT, CHANNELS = 18, 3


def sample(number: int, seed: int = 0) -> dict[str, Tensor]:
    """An image of its own height, with as many channels as there are samples in a batch, and its target."""
    generator = torch.Generator().manual_seed(100 * seed + number)
    return {
        "image": torch.randn(CHANNELS, 2 + number % 4, 5, generator=generator),
        "target": torch.randn((), generator=generator),
    }


def samples(seed: int = 0) -> list[dict[str, Tensor]]:
    return [sample(number, seed) for number in range(COUNT)]


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(samples(seed=1))


def as_list(some: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return some


def as_columns(some: list[dict[str, Tensor]]) -> tuple[list[Tensor], Tensor]:
    return [one["image"] for one in some], torch.stack([one["target"] for one in some])


class OfLists(LightningModule):
    """The step goes through the samples one by one, and remembers what each lost."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(CHANNELS, 1)
        self.lost: dict[float, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pairs = (
            zip(*batch, strict=True) if isinstance(batch, tuple) else ((one["image"], one["target"]) for one in batch)
        )
        losses = []
        for image, target in pairs:
            losses.append(F.mse_loss(self.layer(image.mean((1, 2)))[0], target))
            self.lost[float(target)] = float(losses[-1].detach())
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("collate", [as_list, as_columns])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_sample_of_a_list_has_its_own_loss(collate, workers):
    data, model = samples(), OfLists()
    run = trainer([LossTracker()], max_epochs=2, val_check_interval=None)
    run.fit(model, DataLoader(data, CHANNELS, shuffle=True, collate_fn=collate, num_workers=workers))
    table = Ledger.of(run).losses
    assert sorted(table.ids.tolist()) == list(range(COUNT))
    expected = torch.tensor([model.lost[float(data[number]["target"])] for number in table.ids.tolist()])
    torch.testing.assert_close(table.last_loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("collate", [as_list, as_columns])
@pytest.mark.parametrize("source", [samples(seed=1), Stream()], ids=["rows", "stream"])
def test_lists_of_samples_can_be_controls(collate, source):
    """A stream has no rows: its samples are numbered as they come, and counted by the loader."""
    controls, model = DataLoader(source, CHANNELS, collate_fn=collate), OfLists()
    identity = "auto"
    run = trainer([LossTracker(identity=identity, controls=controls)], max_epochs=2, val_check_interval=None)
    run.fit(model, DataLoader(samples(), CHANNELS, collate_fn=collate))
    table = Ledger.of(run).controls
    assert table.ids.tolist() == list(range(COUNT))
    expected = torch.tensor([model.lost[float(one["target"])] for one in samples(seed=1)])
    torch.testing.assert_close(table.latest, expected, rtol=1e-4, atol=1e-5)


class TimeMajor(LightningModule):
    """Batches ``[T, B]``, where B may be T."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.lost: dict[tuple[int, ...], float] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, targets = self.head(self.embed(batch["x"])), batch["y"]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(0)
        for text, loss in zip(batch["x"].T.tolist(), each.tolist(), strict=True):
            self.lost[tuple(text)] = loss
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def time_major(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in some], 1) for name in some[0]}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tokens", [6, 4], ids=["T of 6", "T equal to B"])
def test_time_major_batches_have_each_samples_own_loss(tokens, workers):
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(11, (20, tokens + 1), generator=generator)
    data, model = [{"x": text[:-1], "y": text[1:]} for text in texts], TimeMajor()
    run = trainer([LossTracker()], max_epochs=2, val_check_interval=None)
    run.fit(model, DataLoader(data, 4, shuffle=True, collate_fn=time_major, num_workers=workers))
    table = Ledger.of(run).losses
    expected = torch.tensor([model.lost[tuple(data[number]["x"].tolist())] for number in table.ids.tolist()])
    assert len(table) == len(data)
    torch.testing.assert_close(table.last_loss, expected, rtol=1e-4, atol=1e-5)
