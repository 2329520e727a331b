"""Small fits whose validation runs under averaged weights: a language model and a classifier.

N  samples
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common.planted_text import Sizes, planted_documentation
from benchmarks.common.training import Sequences, TextModel
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.runtime.validation_weights import ValidationWeights
from lightning_memsink.examples.digits import DigitClassifier, Digits
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.control_table import ControlBatch

PLAIN = "no average"
LEARNING_RATE = {"language model": 2e-3, "classifier": 1e-3}
TEXTS = Sizes(
    background=300, natural=4, natural_times=8, twice=0, canaries=12, canary_times=16, easy=4, easy_times=4, unseen=0
)


@dataclass(frozen=True)
class Outcome:
    """What one fit flagged."""

    verdicts: Tensor
    """``[N]``, sorted by id."""
    ordinary: int
    """Ordinary samples that are flagged as memorized."""
    of_ordinary: int
    planted: int
    """Planted samples that are: repeated random sequences, or digits with a wrong label."""
    of_planted: int
    evaluations: int


@dataclass(frozen=True)
class Task:
    """A fit that is ready to run. ``planted``: ids of the samples that can only be memorized, ``ordinary``: of those
    that are as the controls."""

    model: LightningModule
    train: DataLoader[Any]
    controls: DataLoader[Any]
    planted: Tensor
    ordinary: Tensor
    evaluations: int
    """In an epoch."""


class AsValidated(ValidationWeights):
    """Takes a validation's losses for controls whatever weights it runs under, as before this was checked."""

    def attach(self, *arguments: Any) -> None:
        pass

    def gather(self, collected: list[ControlBatch]) -> list[list[ControlBatch]]:
        return [collected]


class NormedClassifier(DigitClassifier):
    """With batch norm, whose statistics are averaged too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )


def language_model(seed: int) -> Task:
    """A small GPT on Python's documentation with random sequences that are repeated."""
    world = planted_documentation(TEXTS, seed)
    data = Sequences(world.tokens, world.rows, torch.empty(0), world.vocab_size, seed)
    held_out = Sequences(world.controls, torch.arange(len(world.controls)), torch.empty(0), world.vocab_size, seed)
    model = TextModel(world.vocab_size, world.tokens.shape[1], 2, 64, LEARNING_RATE["language model"])
    train = DataLoader(data, 16, shuffle=True, drop_last=True)
    return Task(model, train, DataLoader(held_out, 128), world.ids("canary"), world.ids("background"), 3)


def classifier(seed: int) -> Task:
    """A multilayer perceptron with batch norm on digits, some of them with a wrong label."""
    digits = Digits(seed=seed)
    digits.setup("fit")
    rows = torch.arange(len(digits.train))
    ordinary = rows[~torch.isin(rows, digits.flipped_rows)]
    return Task(
        NormedClassifier(), digits.train_dataloader(), digits.val_dataloader(), digits.flipped_rows, ordinary, 1
    )


TASKS: dict[str, Callable[[int], Task]] = {"language model": language_model, "classifier": classifier}


def averages(task: str, steps: int) -> dict[str, Callable[[], list[Callback]]]:
    """The callbacks of each way to average, for a fit of this many ``steps``."""
    rate = LEARNING_RATE[task]
    return {
        PLAIN: list,
        "decay .9": lambda: [EMAWeightAveraging(decay=0.9)],
        "decay .99": lambda: [EMAWeightAveraging(decay=0.99)],
        "decay .999": lambda: [EMAWeightAveraging(decay=0.999)],
        "from half-way on": lambda: [EMAWeightAveraging(decay=0.99, update_starting_at_step=steps // 2)],
        "mean of all steps": lambda: [WeightAveraging()],
        "SWA": lambda: [StochasticWeightAveraging(swa_lrs=rate, swa_epoch_start=0.5, annealing_epochs=1)],
    }


def run(task: str, average: str, checked: bool, seed: int, epochs: int) -> Outcome:
    """One fit. ``checked``: with controls as they are now; otherwise the validation's losses are taken as they come."""
    seed_everything(seed, verbose=False)
    made = TASKS[task](seed)
    tracker = LossTracker()
    if not checked:
        tracker.validation_weights = AsValidated()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        val_check_interval=len(made.train) // made.evaluations,
        num_sanity_val_steps=0,
        callbacks=[tracker, MemorizationDetector(), *averages(task, epochs * len(made.train))[average]()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(made.model, made.train, made.controls)
    ledger = Ledger.of(trainer)
    ids, order = ledger.losses.ids.sort()
    ledger.flags.grow(len(ids))  # where nothing was evaluated
    verdicts = ledger.flags.verdict[order]
    memorized = ids[ledger.flags.memorized[order]]
    ordinary, planted = (int(torch.isin(some, memorized).sum()) for some in (made.ordinary, made.planted))
    return Outcome(verdicts, ordinary, len(made.ordinary), planted, len(made.planted), len(ledger.flags.evaluations))
