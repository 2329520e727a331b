"""gluonts: DeepAR through its own estimator, which makes the Trainer, streams windows and has its own likelihood."""

from __future__ import annotations

from typing import Any

import numpy as np
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator
from lightning.pytorch import LightningModule

from tests.ecosystem.fitting import Case


def fit(callbacks: list[Any], **options: Any) -> LightningModule:
    noise = np.random.default_rng(0).normal(0, 0.1, (10, 120))
    values = 2 + np.sin(np.arange(120) / 3 + np.arange(10)[:, None]) + noise
    data = ListDataset([{"start": "2024-01-01", "target": row} for row in values], freq="D")
    settings = {"callbacks": callbacks, "logger": False, "enable_checkpointing": True, **options}
    estimator = DeepAREstimator(
        freq="D", prediction_length=4, hidden_size=8, batch_size=16, num_batches_per_epoch=8, trainer_kwargs=settings
    )
    module: LightningModule = estimator.train_model(data, data).trained_net
    return module


CASES = {"gluonts-deepar": Case(fit)}
