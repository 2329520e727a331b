"""pytorch-metric-learning: NT-Xent of two views joined by ``torch.cat``, and a triplet loss over mined triplets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from pytorch_metric_learning.losses import NTXentLoss, TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.ecosystem.fitting import Case

FEATURES, TEMPERATURE, MARGIN = 12, 0.3, 0.2


class Embedder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 8))

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class TwoViews(Embedder):
    """Views of a sample are positives of one another, everything else is a negative."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = NTXentLoss(temperature=TEMPERATURE)

    def loss(self, batch: Any) -> Tensor:
        first, second, _ = batch
        embeddings = self.encoder(torch.cat([first, second]))
        loss: Tensor = self.criterion(embeddings, torch.arange(len(first)).repeat(2))
        return loss


class MinedTriplets(Embedder):
    """Samples of a class are positives of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.miner = TripletMarginMiner(margin=MARGIN, type_of_triplets="all")
        self.criterion = TripletMarginLoss(margin=MARGIN)

    def loss(self, batch: Any) -> Tensor:
        first, _, labels = batch
        embeddings = self.encoder(first)
        loss: Tensor = self.criterion(embeddings, labels, self.miner(embeddings, labels))
        return loss


def views(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, FEATURES, generator=draw)
    first, second = (centre + torch.randn(count, FEATURES, generator=draw) / 3 for _ in range(2))
    return TensorDataset(first, second, torch.arange(count) % 3)


def fitted(kind: Callable[[], Embedder]) -> Callable[..., LightningModule]:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        module = kind()
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        trainer.fit(module, DataLoader(views(48, 0), 12, shuffle=True), DataLoader(views(24, 1), 12))
        return module

    return fit


def of_two_views(module: TwoViews, batch: Any) -> Tensor:
    """``[B]`` means over a sample's two views of ``-log(exp(s+) / (exp(s+) + sum of exp(s-)))``."""
    first, second, _ = batch
    count = len(first)
    embedded = functional.normalize(module.encoder(torch.cat([first, second])).detach(), dim=1)
    likeness = (embedded @ embedded.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    positive = likeness[torch.arange(2 * count), torch.arange(2 * count).roll(count)]
    return (likeness.logsumexp(1) - positive).view(2, count).mean(0)


def of_anchors(module: MinedTriplets, batch: Any) -> Tensor:
    """``[B]`` means over the triplets that a sample is the anchor of and whose loss is above 0; NaN without one."""
    first, _, labels = batch
    embedded = functional.normalize(module.encoder(first).detach(), dim=1)
    distances = (embedded[:, None] - embedded[None]).norm(dim=2)
    losses = (distances[:, :, None] - distances[:, None, :] + MARGIN).clamp(min=0)  # anchor, positive, negative
    same = labels[:, None] == labels[None]
    counted = (same & ~torch.eye(len(labels), dtype=torch.bool))[:, :, None] & ~same[:, None, :] & (losses > 0)
    return (losses * counted).sum((1, 2)) / counted.sum((1, 2))


CASES = {
    "metric-learning-ntxent": Case(fitted(TwoViews), of_two_views),
    "metric-learning-triplets": Case(fitted(MinedTriplets), of_anchors),
}
