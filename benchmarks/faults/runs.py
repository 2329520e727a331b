"""One training run that may be killed: it resumes from its newest intact checkpoint, and announces the time to kill it.

    python -m benchmarks.faults.runs FOLDER DATA [AIM]

The order of the data follows from the epoch, and the loader's position is in the checkpoint: Lightning restores the
position of a loader with ``state_dict`` and starts any other at the beginning of the epoch. No checkpoint falls on the
step of a validation or on the end of an epoch, because Lightning 2.6 skips what was still due at that step when it
resumes there. There is no dropout: Lightning's checkpoints hold no state of random generators.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.criteria import configure_process
from benchmarks.common.training import TextModel
from lightning_memsink import SampleGradientMask, memsink
from lightning_memsink.examples.resumable import EpochShuffledSampler, ResumableBatchSampler, ResumableLoader
from lightning_memsink.ledger import Ledger

EPOCHS, BATCH, VALIDATE_EVERY, SAVE_EVERY = 3, 16, 41, 10
TRAINING = "training"
READY = "now"
"""The line that the process prints when it should be killed."""

MOMENTS = {
    "checkpoint begun": ("open", "tmp", ""),
    "checkpoint written, not named": ("os.rename", "checkpoints", ".ckpt"),
    "report file begun": ("open", "report", ".part"),
    "report file written, not named": ("os.rename", "report", ""),
}
"""Moments to kill at, by name: Python's audit event, folder and suffix of the file opened or of a rename's new name.
Nothing is patched: the killed code is the code that users run."""


class Rows(Dataset[dict[str, Tensor]]):
    """Samples ``tokens[rows]``: ``rows`` ``[R]`` are rows of ``tokens`` ``[U, T]`` and the samples' ids."""

    def __init__(self, tokens: Tensor, rows: Tensor) -> None:
        self.tokens, self.rows = tokens, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[self.rows[index]], "sample_id": self.rows[index]}


class MomentHook:
    """An audit hook that counts the moments, and prints ``READY`` at the one aimed at.

    Args:
        folder: folder of the run.
        aim: ``MOMENT:N:wait`` waits at the N-th such moment of this process until it is killed; ``MOMENT:N:run`` goes
            on, to be killed while it does. ``training:1:run`` is the beginning of training.
    """

    def __init__(self, folder: Path, aim: str | None) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.moment, number, self.end = aim.split(":") if aim else ("", "0", "")
        self.number = int(number)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename"):
            return
        path, writes = (args[1], True) if event == "os.rename" else (args[0], _writes(*args[1:3]))
        if not writes or not isinstance(path, str):
            return
        for moment, (awaited, part, suffix) in MOMENTS.items():
            if event == awaited and path.startswith(str(self.folder / part)) and path.endswith(suffix):
                self.counts[moment] += 1
                if moment == self.moment and self.counts[moment] == self.number:
                    print(READY, flush=True)
                    if self.end == "wait":
                        time.sleep(600)


def _writes(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else mode[:1] in ("w", "a", "x")


def newest_intact(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint in ``folder`` that loads, and the number of newer ones that do not."""
    paths = sorted(folder.glob("*.ckpt"), key=step_of, reverse=True)
    for torn, path in enumerate(paths):
        try:
            torch.load(path, weights_only=True)
        except Exception:  # whatever a torn file raises
            continue
        return path, torn
    return None, len(paths)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step="))


def train(folder: Path, data: Path, aim: str | None = None) -> None:
    """Trains from the newest intact checkpoint to the end, then writes the facts to compare to ``end.pt``."""
    tokens: dict[str, Any] = torch.load(data, weights_only=True)
    hook = MomentHook(folder, aim)
    sys.addaudithook(hook)
    seed_everything(tokens["seed"], verbose=False)
    module = TextModel(tokens["vocab_size"], tokens["train"].shape[1], layers=2, width=64)
    mask = SampleGradientMask(mode="hold", at=1.5)
    callbacks = memsink(mask, path=folder / "report" / "run.md")
    checkpoints = folder / "checkpoints"
    callbacks.append(
        ModelCheckpoint(checkpoints, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=SAVE_EVERY)
    )
    trainer = Trainer(
        callbacks=callbacks,
        max_epochs=tokens["epochs"],
        val_check_interval=VALIDATE_EVERY,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = Rows(tokens["train"], tokens["rows"])
    batches = ResumableBatchSampler(EpochShuffledSampler(len(rows)), BATCH, drop_last=False)
    held_out = Rows(tokens["held_out"], torch.arange(len(tokens["held_out"])))
    path, _ = newest_intact(checkpoints)
    if hook.moment == TRAINING:
        print(READY, flush=True)
    began = time.monotonic()
    trainer.fit(module, ResumableLoader(rows, batch_sampler=batches), DataLoader(held_out, 40), ckpt_path=path)
    ledger = Ledger.of(trainer)
    facts = {
        "losses": ledger.losses.state_dict(),
        "controls": ledger.controls.state_dict(),
        "flags": ledger.flags.state_dict(),
        "onset": None if ledger.onset is None else asdict(ledger.onset),
        "curves": ledger.history,
        "mitigation": mask.state_dict(),
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
    }
    measured = {
        "moments": dict(hook.counts),
        "withheld": mask.interventions.total("acted"),
        "seconds": time.monotonic() - began,
    }
    torch.save({"facts": facts, **measured}, folder / "end.part")
    os.replace(folder / "end.part", folder / "end.pt")


if __name__ == "__main__":
    configure_process()
    run, texts, *aim = sys.argv[1:]
    tempfile.tempdir = str(Path(run) / "tmp")  # Lightning writes a checkpoint there before it renames it
    train(Path(run), Path(texts), *aim)
