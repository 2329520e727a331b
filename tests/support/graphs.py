"""A data set of small graphs, and a model that reads them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

GRAPHS, NODES, BATCH = 40, 3, 8


def collated(graphs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """``nodes`` ``[sum of nodes, 4]`` comes first; the targets and ids have one row a graph."""
    return {
        "nodes": torch.cat([graph["nodes"] for graph in graphs]),
        "target": torch.stack([graph["target"] for graph in graphs]),
        "sample_id": torch.stack([graph["id"] for graph in graphs]),
    }


def graphs(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "nodes": torch.randn(NODES, 4, generator=generator),
            "target": torch.randn((), generator=generator),
            "id": torch.tensor(number),
        }
        for number in range(GRAPHS)
    ]


class OfGraphs(LightningModule):
    """Messages within each graph, their mean, and a readout with hidden units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.message = nn.Linear(4, 8)
        self.readout = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        pooled = self.message(batch["nodes"]).tanh().unflatten(0, (-1, NODES)).mean(1)
        return F.mse_loss(self.readout(pooled)[:, 0], batch["target"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)
