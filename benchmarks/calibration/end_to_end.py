"""Real fits with the callbacks, in which nothing is memorized: models of few parameters on much data, in few epochs.

B  samples of a batch      T  tokens      F  inputs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector

WORDS, CONTEXT, INPUTS, CLASSES = 32, 12, 8, 4
BATCH = 32


@dataclass(frozen=True)
class Run:
    """A fit. ``averaged``: whether validation runs under an exponential average of the weights."""

    name: str
    task: str
    samples: int
    controls: int
    epochs: int
    looks_an_epoch: int
    dropout: float = 0.0
    averaged: bool = False


RUNS = (
    Run("fit: text, one epoch, no repeats", "text", 768, 96, 1, 6),
    Run("fit: classification, dropout .3", "classification", 512, 64, 4, 2, dropout=0.3),
    Run("fit: classification, averaged weights", "classification", 512, 64, 4, 2, averaged=True),
    Run("fit: regression", "regression", 512, 128, 4, 2),
)


def any_memorized(run: Run, seed: int) -> bool:
    """Whether any sample was said to be memorized, at any time of the fit."""
    seed_everything(seed, verbose=False)
    data = TASKS[run.task](run.samples + run.controls)
    training, held_out = (
        TensorDataset(*(tensor[part] for tensor in data)) for part in (slice(run.samples), slice(run.samples, None))
    )
    loader = DataLoader(training, BATCH, shuffle=True, drop_last=True)
    detector, averages = MemorizationDetector(), [EMAWeightAveraging(decay=0.95)] if run.averaged else []
    watch = _EverMemorized(detector)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=run.epochs,
        val_check_interval=len(loader) // run.looks_an_epoch,
        num_sanity_val_steps=0,
        callbacks=[LossTracker(), detector, watch, *averages],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_Model(run), loader, DataLoader(held_out, 256))
    if len(detector.flags.evaluations) < run.epochs * run.looks_an_epoch:
        raise RuntimeError(f"{run.name}: {len(detector.flags.evaluations)} looks in {run.epochs} epochs.")
    return watch.found


class _EverMemorized(Callback):
    """Asks the detector at every step and at the end."""

    def __init__(self, detector: MemorizationDetector) -> None:
        self.detector, self.found = detector, False

    def _ask(self, *arguments: Any) -> None:
        self.found |= bool(self.detector.flags.memorized.any())

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._ask()

    def on_train_end(self, *arguments: Any) -> None:
        self._ask()


class _Model(LightningModule):
    """A bigram model, or one linear layer."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.task = run.task
        outputs = {"text": WORDS, "classification": CLASSES, "regression": 1}[run.task]
        first = nn.Embedding(WORDS, INPUTS) if run.task == "text" else nn.Dropout(run.dropout)
        self.layers = nn.Sequential(first, nn.Linear(INPUTS, outputs))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        outputs = self.layers(batch[0][:, :-1] if self.task == "text" else batch[0])
        if self.task == "text":
            return functional.cross_entropy(outputs.transpose(1, 2), batch[0][:, 1:])
        if self.task == "regression":
            return functional.mse_loss(outputs[:, 0], batch[1])
        return functional.cross_entropy(outputs, batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def _text(count: int) -> tuple[Tensor, ...]:
    """Chains ``[count, T]`` in which each word is followed by few others."""
    transitions = (2 * torch.randn(WORDS, WORDS)).softmax(1)
    words = [torch.randint(WORDS, (count,))]
    for _ in range(CONTEXT - 1):
        words.append(transitions[words[-1]].multinomial(1)[:, 0])
    return (torch.stack(words, 1),)


def _classification(count: int) -> tuple[Tensor, ...]:
    """Labels drawn from a softmax of linear scores, so that some are improbable."""
    inputs = torch.randn(count, INPUTS)
    return inputs, (inputs @ torch.randn(INPUTS, CLASSES)).softmax(1).multinomial(1)[:, 0]


def _regression(count: int) -> tuple[Tensor, ...]:
    """A linear function with noise of standard deviation 1."""
    inputs = torch.randn(count, INPUTS)
    return inputs, inputs @ torch.randn(INPUTS) + torch.randn(count)


TASKS = {"text": _text, "classification": _classification, "regression": _regression}
