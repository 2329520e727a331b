"""scvi-tools: SCVI on synthetic counts, trained by its own Trainer and training plan, on an ELBO of its own."""

from __future__ import annotations

from typing import Any

import scvi
import torch
from torch import Tensor

from tests.ecosystem.fitting import Case


def fit(callbacks: list[Any], **options: Any) -> Any:
    scvi.settings.seed = 0  # without it the split of the data comes from a generator that nobody seeds
    data = scvi.data.synthetic_iid(batch_size=100, n_genes=40)
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    model = scvi.model.SCVI(data, n_hidden=16, n_latent=4)
    options.pop("enable_model_summary")  # SCVI's Trainer chooses it
    model.train(batch_size=32, train_size=0.8, check_val_every_n_epoch=1, callbacks=callbacks, logger=False, **options)
    return model.module


def of_cells(plan: Any, batch: Any) -> Tensor:
    """What the step is about to compute of each cell, with the latent variables that it is about to draw."""
    with torch.random.fork_rng(devices=[]):
        _, _, losses = plan.forward(batch, loss_kwargs={"kl_weight": plan.kl_weight})
    before, at_once = (losses.kl_local[name] for name in ("kl_divergence_z", "kl_divergence_l"))
    return losses.reconstruction_loss["reconstruction_loss"] + plan.kl_weight * before + at_once


CASES = {"scvi": Case(fit, of_cells)}
