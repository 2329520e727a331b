"""lightning-gpt: MinGPT and NanoGPT, on its own `CharDataset`."""

from __future__ import annotations

import pydoc_data.topics
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from tests.ecosystem.fitting import Case, one_by_one, rows

NEEDED = ("CloudCompute", "LightningFlow", "LightningWork", "LightningTrainerMultiNode")


def with_lightning_app() -> None:
    """lightning-gpt 0.1.1 imports `lightning.app`, which Lightning has dropped, for a benchmark that we don't run."""
    for name in ("lightning.app", "lightning.app.components"):
        absent = ModuleType(name)
        vars(absent).update({needed: type(needed, (), {}) for needed in NEEDED})
        sys.modules[name] = absent


with_lightning_app()
from lightning_gpt import CharDataset, MinGPT, NanoGPT  # noqa: E402


def fitted(kind: Callable[..., LightningModule]) -> Callable[..., LightningModule]:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        text = " ".join(sorted(pydoc_data.topics.topics.values()))
        data, held_out = CharDataset(text[:6000], 31), CharDataset(text[:1500], 31)  # draws windows at random
        size = {"n_layer": 2, "n_head": 2, "n_embd": 32}
        module = kind(vocab_size=data.vocab_size, block_size=31, model_type=None, **size)
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        trainer.fit(module, DataLoader(data, 16, shuffle=True), DataLoader(held_out, 16))
        return module

    return fit


ALONE = one_by_one(rows, lambda batch: len(batch[0]))
CASES = {"mingpt": Case(fitted(MinGPT), ALONE), "nanogpt": Case(fitted(NanoGPT), ALONE)}
