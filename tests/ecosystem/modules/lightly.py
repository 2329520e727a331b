"""lightly: SimCLR as in its documentation, on two random views of each image, in the `pytorch_lightning` namespace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18

from tests.ecosystem.fitting import Case

SIZE, TEMPERATURE = 32, 0.5


class SimCLR(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet18(weights=None).children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 64, 32)
        self.criterion = NTXentLoss(temperature=TEMPERATURE)

    def forward(self, images: Tensor) -> Tensor:
        projected: Tensor = self.projection_head(self.backbone(images).flatten(start_dim=1))
        return projected

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (first, second), _ = batch
        loss: Tensor = self.criterion(self.forward(first), self.forward(second))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (first, second), _ = batch
        self.log("val_loss", self.criterion(self.forward(first), self.forward(second)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class Pictures(Dataset[Any]):
    """Coloured noise, viewed anew at each visit."""

    def __init__(self, count: int, seed: int) -> None:
        colours = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        self.images = [Image.fromarray(colour).resize((SIZE, SIZE)) for colour in colours]
        self.transform = SimCLRTransform(input_size=SIZE)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index]), index % 4


def fit(callbacks: list[Any], **options: Any) -> LightningModule:
    module = SimCLR()
    trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
    train = DataLoader(Pictures(48, 0), 8, shuffle=True, drop_last=True)
    trainer.fit(module, train, DataLoader(Pictures(16, 1), 8))
    return module


def two_views(views: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """``[B]`` losses of SimCLR, equation 1 of the paper: of 2B embeddings ``[2B, D]``, row i and row B + i are views of
    sample i. A view's candidates are all others; a sample's loss is the mean of its two views'."""
    count = len(views) // 2
    embedded = functional.normalize(views, dim=1)
    likeness = (embedded @ embedded.T / temperature).fill_diagonal_(-torch.inf)
    partners = torch.arange(2 * count).roll(count)
    chances = likeness.softmax(1)[torch.arange(2 * count), partners]
    return -chances.log().view(2, count).mean(0)


def in_its_batch(module: SimCLR, batch: Any) -> Tensor:
    """A sample's loss is against the whole batch, so it can't go through the step alone."""
    (first, second), _ = batch
    return two_views(torch.cat([module(first), module(second)]).detach())


CASES = {"lightly-simclr": Case(fit, in_its_batch)}
