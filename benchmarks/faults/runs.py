"""One training that may die: it goes on from its newest whole checkpoint, and says when the moment to die has come.

    python -m benchmarks.faults.runs FOLDER DATA [AIM]

The order of the data follows from the epoch, and the loader's place in it is in the checkpoint: Lightning restores the
place of a loader that has one, and starts any other from the epoch's beginning. No checkpoint falls on the very step of
a validation or on an epoch's end, for Lightning 2.6 leaves out what was still due at that step when it resumes there.
There is no dropout: the state of random generators is in no checkpoint of Lightning.
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

EPOCHS, BATCH, LOOK_EVERY, SAVE_EVERY = 3, 16, 41, 10
TRAINING = "training"
READY = "now"
"""The line that asks for the kill."""

MOMENTS = {
    "checkpoint begun": ("open", "tmp", ""),
    "checkpoint written, not named": ("os.rename", "checkpoints", ".ckpt"),
    "report file begun": ("open", "report", ".part"),
    "report file written, not named": ("os.rename", "report", ""),
}
"""Python's own audit events: name, and the folder and the ending of the file that it is about (of a rename, the new
name's). Nothing is patched: what is killed is the code that users run."""


class Rows(Dataset[dict[str, Tensor]]):
    """``tokens`` ``[U, T]``, each of them as often as ``rows`` ``[R]`` names it; the row named is the sample's id."""

    def __init__(self, tokens: Tensor, rows: Tensor) -> None:
        self.tokens, self.rows = tokens, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[self.rows[place]], "sample_id": self.rows[place]}


class Watch:
    """An audit hook that counts the moments, and stops at the one aimed at until the process is killed.

    Args:
        folder: of the run.
        aim: ``MOMENT:N:wait``, the N-th such moment of this process; with ``run`` at its end training goes on, to be
            killed while it is at it. ``training:1:run``: when training begins.
    """

    def __init__(self, folder: Path, aim: str | None) -> None:
        self.folder = folder
        self.seen: Counter[str] = Counter()
        self.moment, number, self.end = aim.split(":") if aim else ("", "0", "")
        self.number = int(number)

    def __call__(self, event: str, about: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename"):
            return
        path, writes = (about[1], True) if event == "os.rename" else (about[0], _writes(*about[1:3]))
        if not writes or not isinstance(path, str):
            return
        for moment, (wanted, part, ending) in MOMENTS.items():
            if event == wanted and path.startswith(str(self.folder / part)) and path.endswith(ending):
                self.seen[moment] += 1
                if moment == self.moment and self.seen[moment] == self.number:
                    print(READY, flush=True)
                    if self.end == "wait":
                        time.sleep(600)


def _writes(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else mode[:1] in ("w", "a", "x")


def newest_whole(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint in ``folder`` that loads, and how many newer ones do not."""
    found = sorted(folder.glob("*.ckpt"), key=step_of, reverse=True)
    for torn, path in enumerate(found):
        try:
            torch.load(path, weights_only=True)
        except Exception:  # whatever a torn file raises
            continue
        return path, torn
    return None, len(found)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step="))


def train(folder: Path, data: Path, aim: str | None = None) -> None:
    """From the newest whole checkpoint in ``folder`` to the end; then ``end.pt`` is all that must not be lost."""
    tokens: dict[str, Any] = torch.load(data, weights_only=True)
    watch = Watch(folder, aim)
    sys.addaudithook(watch)
    seed_everything(tokens["seed"], verbose=False)
    module = TextModel(tokens["vocab_size"], tokens["train"].shape[1], layers=2, width=64)
    mask = SampleGradientMask(mode="hold", at=1.5)
    crew = memsink(mask, path=folder / "report" / "run.md")
    checkpoints = folder / "checkpoints"
    crew.append(
        ModelCheckpoint(checkpoints, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=SAVE_EVERY)
    )
    trainer = Trainer(
        callbacks=crew,
        max_epochs=tokens["epochs"],
        val_check_interval=LOOK_EVERY,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = Rows(tokens["train"], tokens["rows"])
    batches = ResumableBatchSampler(EpochShuffledSampler(len(rows)), BATCH, drop_last=False)
    held_out = Rows(tokens["held_out"], torch.arange(len(tokens["held_out"])))
    path, _ = newest_whole(checkpoints)
    if watch.moment == TRAINING:
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
    about = {
        "moments": dict(watch.seen),
        "held": mask.interventions.total("acted"),
        "seconds": time.monotonic() - began,
    }
    torch.save({"facts": facts, **about}, folder / "end.part")
    os.replace(folder / "end.part", folder / "end.pt")


if __name__ == "__main__":
    configure_process()
    run, texts, *where = sys.argv[1:]
    tempfile.tempdir = str(Path(run) / "tmp")  # Lightning writes a checkpoint there before it is named
    train(Path(run), Path(texts), *where)
