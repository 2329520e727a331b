"""pytorch-tabular: category embeddings through its `TabularModel`, which lives in the `pytorch_lightning` namespace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import LightningModule
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from torch import Tensor

from tests.ecosystem.fitting import Case, rows


def table(size: int, seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    first, second, kind = draw.normal(size=size), draw.normal(size=size), draw.choice(["a", "b", "c"], size)
    target = np.where(first + second + (kind == "a") > 0.3, "yes", "no")
    return pd.DataFrame({"first": first, "second": second, "kind": kind, "target": target})


def fit(callbacks: list[Any], **options: Any) -> LightningModule:
    own = {name: options.pop(name) for name in ("accelerator", "max_epochs", "enable_progress_bar")}
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=["first", "second"], categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-8", dropout=0.1),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=16,
            accelerator=own["accelerator"],
            max_epochs=own["max_epochs"],
            progress_bar="none",
            checkpoints=None,
            early_stopping=None,
            load_best=False,
            trainer_kwargs=options,
        ),
        suppress_lightning_logger=True,
        verbose=False,
    )
    model.fit(train=table(160, 0), validation=table(60, 1), callbacks=callbacks)
    module: LightningModule = model.model
    return module


def alone(module: LightningModule, batch: Any) -> Tensor:
    """Its training step, but for the metrics, which can't take a batch of one."""
    losses = []
    for sample in range(len(batch["target"])):
        output, target = module.forward_pass(rows(batch, sample))
        target = rows(batch, sample)["target"] if target is None else target
        losses.append(module.calculate_loss(output, target, tag="train"))
    return torch.stack(losses)


CASES = {"tabular": Case(fit, alone)}
