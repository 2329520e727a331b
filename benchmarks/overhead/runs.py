"""Fits of a workload, plain and watched."""

from __future__ import annotations

import tempfile
from typing import Any

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.common.interleaving import StepTimer
from benchmarks.common.workloads import Workload
from lightning_memsink import memsink

SAMPLES, CONTROLS, EVALUATIONS = 1024, 128, 3


PLAIN, AGAIN, WATCHED = "plain", "plain again", "watched"


def fit(workload: Workload, seed: int, watch: bool, turn: StepTimer) -> list[Tensor]:
    """The trained weights, in double precision."""
    seed_everything(seed, verbose=False)
    module = workload.module()
    with tempfile.TemporaryDirectory() as folder:  # silent W&B still writes its files
        logger = WandbLogger(save_dir=folder, offline=True, settings=wandb.Settings(silent=True)) if watch else False
        run(module, workload, seed, [turn, *(memsink(path=None, recheck=0) if watch else [])], logger)
        if watch:
            wandb.finish()
    return [weight.detach().double() for weight in module.state_dict().values()]


def run(
    module: LightningModule,
    workload: Workload,
    seed: int,
    callbacks: list[Callback],
    logger: Logger | bool = False,
    samples: int = SAMPLES,
    evaluations: int = EVALUATIONS,
    **options: Any,
) -> Trainer:
    """A whole fit of the workload, validated ``evaluations`` times."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=workload.steps,
        val_check_interval=max(1, workload.steps // evaluations),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(
        module,
        DataLoader(workload.data(samples, seed), workload.batch_size, shuffle=True),
        DataLoader(workload.data(CONTROLS, seed + 1), CONTROLS),
    )
    return trainer
