"""`lightning.pytorch.demos`: Transformer and LSTM on a text of our own, and manual optimization."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos import LightningTransformer, WikiText2
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tests.ecosystem.fitting import Case, one_by_one, rows

WORDS = 3000


def text() -> WikiText2:
    """The place where `WikiText2` would download to holds text from Python's documentation instead."""
    path = Path("data/wikitext-2.txt")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        words = " ".join(pydoc_data.topics.topics.values()).split()[:WORDS]
        path.write_text("\n".join(" ".join(words[at : at + 20]) for at in range(0, WORDS, 20)))
    return WikiText2()


def transformer(callbacks: list[Any], **options: Any) -> LightningModule:
    data = text()
    module = LightningTransformer(vocab_size=data.vocab_size)
    trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader(Subset(data, range(80)), 20, shuffle=True))  # it has no validation step
    return module


def lstm(callbacks: list[Any], **options: Any) -> LightningModule:
    module = LightningLSTM(vocab_size=text().vocab_size)
    trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module)  # its own loader, whose batches continue one another
    return module


def lstm_alone(module: LightningLSTM, batch: Any) -> Tensor:
    """The hidden state continues from the batch before, row by row."""
    before, losses = module.hidden, []
    for sample in range(len(batch[0])):
        if before is not None:
            module.hidden = tuple(part[:, sample : sample + 1].contiguous() for part in before)
        else:
            module.hidden = None
        losses.append(module.training_step(rows(batch, sample), 0))
    module.hidden = before
    return torch.stack(losses)


def manual(callbacks: list[Any], **options: Any) -> LightningModule:
    module = ManualOptimBoringModel()
    Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options).fit(module)
    return module


def manual_alone(module: ManualOptimBoringModel, batch: Tensor) -> Tensor:
    return torch.stack([module.step(row[None]) for row in batch])


CASES = {
    "demos-transformer": Case(transformer, one_by_one(rows, lambda batch: len(batch[0]))),
    "demos-lstm": Case(lstm, lstm_alone),
    "demos-manual": Case(manual, manual_alone),
}
