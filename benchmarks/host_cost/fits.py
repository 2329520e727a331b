"""Fits whose device is busy for a tenth of a second a step, while the host does next to nothing but what watches it."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.criteria import configure_process
from lightning_memsink import RunReport, memsink

VOCABULARY, CLASSES = 32_000, 8
UNTIMED = 10
"""First steps, most of which are watched."""


@dataclass(frozen=True)
class Load:
    """Tokens of a step, in each process, and how long the device takes for it."""

    batch: int
    length: int
    steps: int
    seconds: float = 0.1

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


@dataclass(frozen=True)
class Times:
    """Of each step of one process after the first `UNTIMED`, in milliseconds."""

    wall: list[float]
    training_thread: list[float]
    """Processor time of the thread that trains."""
    process: list[float]
    """Of all its threads."""
    evaluations: list[int]
    """Steps that an evaluation of the detector lies in."""


class Texts(Dataset[dict[str, Tensor]]):
    """Tokens drawn by Zipf's law, each text its own."""

    def __init__(self, texts: int, length: int, seed: int) -> None:
        uniform = torch.rand(texts, length, generator=torch.Generator().manual_seed(seed))
        self.tokens = (VOCABULARY**uniform).int().clamp(max=VOCABULARY - 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = self.tokens[row].long()
        return {"input_ids": tokens, "labels": tokens}


class Busy(LightningModule):
    """A cross-entropy of every token by a handful of weights, and then the time that a device would take."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weights, self.seconds = nn.Parameter(torch.zeros(CLASSES, CLASSES)), seconds

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        started = time.perf_counter()
        logits = self.weights[batch["input_ids"] % CLASSES]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten() % CLASSES)
        time.sleep(max(0.0, self.seconds - (time.perf_counter() - started)))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """The first of a Trainer's callbacks: a step includes the hooks of the others, and loading the next batch."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.marks: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= UNTIMED:
            self.marks.append((time.perf_counter(), time.thread_time(), time.process_time()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = list(zip(*self.marks, strict=True))
        wall, thread, process = ([1000 * (end - begin) for begin, end in pairwise(marks)] for marks in every)
        detectors = [each for each in trainer.callbacks if hasattr(each, "flags")]  # type: ignore[attr-defined]
        steps = [each.step for detector in detectors for each in detector.flags.evaluations]
        near = sorted({step - UNTIMED + beside for step in steps for beside in (-1, 0)})
        times = {"wall": wall, "training_thread": thread, "process": process, "evaluations": near}
        Path(self.folder, f"{trainer.global_rank}.json").write_text(json.dumps(times))


def fit(load: Load, seed: int, watch: bool, processes: int = 1) -> list[Times]:
    """One epoch and a half; the times of each process."""
    configure_process()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = Texts(load.batch * processes * (2 * load.steps // 3), load.length, seed)
    watching = [each for each in memsink(recheck=0) if not isinstance(each, RunReport)] if watch else []
    many = {"strategy": "ddp_spawn", "devices": processes} if processes > 1 else {"devices": 1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=load.steps,
            callbacks=[Clock(folder), *watching],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **many,  # type: ignore[arg-type]
        )
        trainer.fit(Busy(load.seconds), DataLoader(data, load.batch, shuffle=True))
        return [Times(**json.loads(file.read_text())) for file in sorted(Path(folder).iterdir())]
