"""pytorch-forecasting: a temporal fusion transformer on quantiles and N-BEATS on its scaled error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from pytorch_forecasting import NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import MASE, QuantileLoss
from torch import Tensor

from tests.ecosystem.fitting import Case, rows

SERIES, LENGTH, PAST, AHEAD = 24, 40, 12, 4


def series() -> pd.DataFrame:
    noise = np.random.default_rng(0).normal(0, 0.1, (SERIES, LENGTH))
    values = 2 + np.sin(np.arange(LENGTH) / 3 + np.arange(SERIES)[:, None]) + noise
    return pd.DataFrame(
        {
            "series": np.repeat([f"s{one}" for one in range(SERIES)], LENGTH),
            "time": np.tile(np.arange(LENGTH), SERIES),
            "value": values.reshape(-1),
        }
    )


def fitted(build: Callable[[TimeSeriesDataSet], LightningModule]) -> Callable[..., LightningModule]:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        table = series()
        shape = {"max_encoder_length": PAST, "min_encoder_length": PAST}
        shape |= {"max_prediction_length": AHEAD, "min_prediction_length": AHEAD}
        data = TimeSeriesDataSet(
            table[table.time < LENGTH - AHEAD],
            time_idx="time",
            target="value",
            group_ids=["series"],
            time_varying_unknown_reals=["value"],
            **shape,
        )
        held_out = TimeSeriesDataSet.from_dataset(data, table, min_prediction_idx=LENGTH - AHEAD)
        module = build(data)
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        trainer.fit(
            module,
            data.to_dataloader(train=True, batch_size=16, num_workers=0),
            held_out.to_dataloader(train=False, batch_size=16, num_workers=0),
        )
        return module

    return fit


def transformer(data: TimeSeriesDataSet) -> LightningModule:
    return TemporalFusionTransformer.from_dataset(data, hidden_size=8, attention_head_size=2, loss=QuantileLoss())


def nbeats(data: TimeSeriesDataSet) -> LightningModule:
    return NBeats.from_dataset(data, widths=[16, 32], backcast_loss_ratio=0.0, loss=MASE())


def scaled_errors(module: LightningModule, batch: Any) -> Tensor:
    """MASE of each series alone: its absolute error over that of forecasting each value by the one before."""
    inputs, (target, _) = batch
    losses = []
    for series in range(len(target)):
        one, metric = rows(inputs, series), MASE()
        past = {name: one[name] for name in ("encoder_target", "encoder_lengths")}
        metric.update(module(one)["prediction"], rows(target, series), **past)
        losses.append(metric.compute())
    return torch.stack(losses)


CASES = {
    "forecasting-tft": Case(fitted(transformer)),
    "forecasting-nbeats": Case(fitted(nbeats), scaled_errors),
}
