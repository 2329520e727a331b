"""The run whose files are kept under ``f36e55b/``: model, data and callbacks, by names that old and new versions share.

Do not change it: the kept checkpoints fit this model, this data and these callbacks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_memsink as memsink

VOCABULARY, LENGTH, EPOCHS = 16, 10, 3


def noise(rows: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


CANARIES, ONCE, CONTROLS = noise(8, seed=1), noise(8, seed=2), noise(64, seed=3)
TRAIN = torch.cat([CANARIES.repeat(12, 1), ONCE])[torch.randperm(104, generator=torch.Generator().manual_seed(4))]


def rows(tokens: Tensor, batch_size: int) -> DataLoader[dict[str, Tensor]]:
    return DataLoader([{"input_ids": row} for row in tokens], batch_size)  # type: ignore[arg-type]


class SmallLM(LightningModule):
    """Predicts a token from the two before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, VOCABULARY))

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, T, V]``."""
        current = self.embed(tokens)
        return self.mlp(torch.cat([current, F.pad(current, (0, 0, 1, 0))[:, :-1]], -1))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        return F.cross_entropy(self.logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-2)


def watching(model: SmallLM, path: Path | None = None) -> list[Callback]:
    """Every callback that changes nothing."""
    return [
        memsink.LossTracker(identity="content", depth=2),
        memsink.MemorizationDetector(k=4),
        memsink.SinkLocalizer(every=1, fraction=0.1, agreement=True),
        memsink.LiveCurves(),
        memsink.ExtractionProbe({"canaries": CANARIES, "controls": CONTROLS[:8]}, prefix=4, n=10, logits=model.logits),
        memsink.RunReport(path),
    ]


def mitigating(model: SmallLM, path: Path | None = None) -> list[Callback]:
    """All mitigations together."""
    return [
        memsink.LossTracker(identity="content"),
        memsink.MemorizationDetector(k=4),
        memsink.SinkLocalizer(every=1, fraction=0.1),
        memsink.SampleGradientMask(at=1.0, k=4),
        memsink.SinkGradientMask(0.5),
        memsink.SinkDropout(0.3, modules=["mlp.2"]),
        memsink.MemSinks(0.3, 0.2),
        memsink.Goldfish(k=4, context=2),
        memsink.LossTruncation(0.1, window=32),
    ]


RUNS = {"watching": watching, "mitigating": mitigating}


def fit(callbacks: Sequence[Callback], model: SmallLM, epochs: int = EPOCHS, ckpt_path: Path | None = None) -> Trainer:
    trainer = Trainer(
        callbacks=list(callbacks),
        max_epochs=epochs,
        val_check_interval=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, rows(TRAIN, 8), rows(CONTROLS, 16), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return trainer


def facts(ledger: memsink.Ledger) -> dict[str, Any]:
    """What readers of the ledger read, as JSON holds it."""
    table, controls, flags, onset, sinks = ledger.losses, ledger.controls, ledger.flags, ledger.onset, ledger.sinks
    return plain(
        {
            "samples": {name: getattr(table, name) for name in ("ids", "exposures", "first_loss", "last_loss")},
            "controls": {name: getattr(controls, name) for name in ("ids", "latest", "latest_step")},
            "flags": {name: getattr(flags, name) for name in ("verdict", "gap", "p", "memorized")},
            "gaps": [evaluation.gap for evaluation in flags.evaluations],
            "onset": None if onset is None else [onset.step_low, onset.step, onset.step_high],
            "sinks": None if sinks is None else {"units": dict(sinks.units), "scores": dict(sinks.scores)},
        }
    )


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
