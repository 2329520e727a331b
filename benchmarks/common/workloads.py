"""Four ordinary modules and their data, to measure overhead on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from benchmarks.common.training import Sequences, TextModel

VOCABULARY, CONTEXT, CLASSES = 1024, 64, 10


@dataclass(frozen=True)
class Workload:
    """``module()`` draws its weights from the global generator; ``data(samples, seed)`` uses a generator of its own."""

    name: str
    module: Callable[[], LightningModule]
    data: Callable[[int, int], Dataset[Any]]
    batch_size: int
    steps: int


class Classifier(LightningModule):
    """Cross-entropy of ``network`` on images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Patches(nn.Module):
    """Images ``[B, 3, 32, 32]`` as 64 tokens ``[B, 64, width]`` with position embeddings added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(64, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images).flatten(2).transpose(1, 2) + self.position


def cnn(width: int = 32) -> Classifier:
    sizes = [3, width, 2 * width, 4 * width]
    layers = [
        nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
        for before, after in pairwise(sizes)
    ]
    return Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES)))


def vit(width: int = 128, layers: int = 4) -> Classifier:
    block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
    pool = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, CLASSES))
    return Classifier(nn.Sequential(Patches(width), encoder, _Transpose(), pool))


class _Transpose(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2)


def texts(samples: int, seed: int) -> Dataset[Any]:
    tokens = torch.randint(VOCABULARY, (samples, CONTEXT), generator=torch.Generator().manual_seed(seed))
    return Sequences(tokens, torch.arange(samples), torch.empty(0), VOCABULARY, seed)


def images(samples: int, seed: int) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(samples, 3, 32, 32, generator=generator)
    return TensorDataset(pixels, torch.randint(CLASSES, (samples,), generator=generator))


WORKLOADS = (
    Workload("GPT, 2 layers of 64", lambda: TextModel(VOCABULARY, CONTEXT, 2, 64), texts, batch_size=32, steps=150),
    Workload("GPT, 4 layers of 256", lambda: TextModel(VOCABULARY, CONTEXT, 4, 256), texts, batch_size=16, steps=75),
    Workload("CNN", cnn, images, batch_size=32, steps=150),
    Workload("ViT", vit, images, batch_size=32, steps=75),
)
