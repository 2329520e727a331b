"""A batch of graphs begins with the nodes of them all: a mitigation counts samples by their ids, not by its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.loss_truncation import LossTruncation
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask
from lightning_memsink.localization.sinks import Sinks
from tests.support.small_runs import trainer

GRAPHS, NODES, BATCH = 40, 3, 8
READOUT = Sinks({"readout.2": torch.arange(4)}, {"readout.2": torch.ones(4)}, {"readout.2": 16})


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


@pytest.mark.parametrize(
    ("mitigation", "acted"),
    [
        (LossTruncation(0.2, window=16), lambda times: 0 < times < 2 * GRAPHS),
        (SinkDropout(who="all", sinks=READOUT), lambda times: times == 2 * GRAPHS),
        (SinkGradientMask(sinks=READOUT), lambda times: times == 2 * GRAPHS),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("tracker_first", [True, False])
def test_samples_are_graphs(mitigation, acted, tracker_first, recwarn):
    crew = [LossTracker(), mitigation] if tracker_first else [mitigation, LossTracker()]
    before = mitigation.interventions.total("visits"), mitigation.interventions.total("acted")
    trainer(crew, max_epochs=2, val_check_interval=None).fit(
        OfGraphs(), DataLoader(graphs(seed=0), BATCH, collate_fn=collated)
    )
    assert mitigation.interventions.total("visits") - before[0] == 2 * GRAPHS
    assert acted(mitigation.interventions.total("acted") - before[1])
    assert not [str(each.message) for each in recwarn if type(mitigation).__name__ in str(each.message)]
