"""chemprop: a message-passing network on molecules, whose batch is a graph of them all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from chemprop import data, models, nn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tests.ecosystem.fitting import Case

LINKS, ENDS = ("C", "CC", "CO", "CN", "C(C)", "C(=O)"), ("C", "O", "CC#N", "c1ccccc1", "CCl", "C(F)F")
SMILES = [f"{one}{two}{end}" for one in LINKS for two in LINKS for end in ENDS]


def loader(smiles: list[str], shuffle: bool) -> Any:
    points = [
        data.MoleculeDatapoint.from_smi(smi, np.array([len(smi) + smi.count("O")], dtype=float)) for smi in smiles
    ]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=8, num_workers=0, shuffle=shuffle)


def fit(callbacks: list[Any], **options: Any) -> LightningModule:
    module = models.MPNN(
        nn.BondMessagePassing(d_h=32, dropout=0.1), nn.MeanAggregation(), nn.RegressionFFN(input_dim=32, hidden_dim=32)
    )
    trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, loader(SMILES[:160], True), loader(SMILES[160:200], False))
    return module


def alone(module: LightningModule, batch: Any) -> Tensor:
    """A graph of several molecules can't be sliced, but the prediction of each is its own."""
    graph, atoms, extra, targets, weights, _, _ = batch
    predictions = module.predictor.train_step(module.fingerprint(graph, atoms, extra))
    return torch.stack(
        [
            module.criterion(predictions[one, None], targets[one, None], None, weights[one, None], None, None)
            for one in range(len(targets))
        ]
    )


CASES = {"chemprop": Case(fit, alone)}
