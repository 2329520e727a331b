"""torch_geometric: classes of whole graphs, of the nodes of many graphs, and of the nodes of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool

from tests.ecosystem.fitting import Case

FEATURES, CLASSES = 6, 3


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(FEATURES, 16), GCNConv(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def nodes(self, batch: Any) -> Tensor:
        hidden = self.first(batch.x, batch.edge_index).relu()
        return functional.dropout(self.second(hidden, batch.edge_index), 0.2, self.training)

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=batch.num_graphs)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class OfGraphs(Network):
    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.head(global_mean_pool(self.nodes(batch), batch.batch)), batch.y)


class OfNodes(Network):
    """Graphs have different numbers of nodes, each with labels that are 0 or 1; one graph's nodes are one sample."""

    def loss(self, batch: Any) -> Tensor:
        return functional.binary_cross_entropy_with_logits(self.head(self.nodes(batch)), batch.labels)


class OfMaskedNodes(Network):
    """As in the documentation's first example: the nodes of ``train_mask`` in one graph, all the data there is."""

    def loss(self, batch: Any) -> Tensor:
        found = self.head(self.nodes(batch))
        mask = batch.val_mask if self.trainer.validating else batch.train_mask
        return functional.cross_entropy(found[mask], batch.classes[mask])


def graph(draw: torch.Generator, nodes: int) -> Data:
    """A ring with chords, and features around the mean of its class."""
    ring = torch.arange(nodes)
    chords = torch.randint(0, nodes, (2, nodes), generator=draw)
    edges = torch.cat([torch.stack([ring, ring.roll(1)]), chords], 1)
    label = torch.randint(0, CLASSES, (1,), generator=draw)
    classes = torch.randint(0, CLASSES, (nodes,), generator=draw)
    features = torch.randn(nodes, FEATURES, generator=draw) + label + functional.one_hot(classes, FEATURES)
    masks = {"train_mask": ring % 2 == 0, "val_mask": ring % 2 == 1}
    labels = functional.one_hot(classes, CLASSES).float()
    return Data(
        x=features, edge_index=torch.cat([edges, edges.flip(0)], 1), y=label, labels=labels, classes=classes, **masks
    )


def graphs(count: int, seed: int) -> list[Data]:
    draw = torch.Generator().manual_seed(seed)
    return [graph(draw, 4 + index % 5) for index in range(count)]


def one_graph(count: int, seed: int) -> list[Data]:
    return [graph(torch.Generator().manual_seed(seed), count)]


def fitted(kind: type[Network], data: Callable[[int, int], list[Data]] = graphs) -> Callable[..., LightningModule]:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        module = kind()
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, log_every_n_steps=1, **options)
        trainer.fit(module, DataLoader(data(48, 0), 8, shuffle=True), DataLoader(data(24, 1), 8))
        return module

    return fit


def alone(module: Network, batch: Any) -> Tensor:
    return torch.stack([module.loss(Batch.from_data_list([one])) for one in batch.to_data_list()])


CASES = {
    "geometric-graphs": Case(fitted(OfGraphs), alone),
    "geometric-nodes": Case(fitted(OfNodes), alone),
    "geometric-masked-nodes": Case(fitted(OfMaskedNodes, one_graph), alone),
}
