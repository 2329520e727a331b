"""litgpt: its GPT in the LightningModule that its documentation shows, with its chunked cross-entropy."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor
from torch.utils.data import DataLoader

from tests.ecosystem.fitting import Case, one_by_one, rows

LENGTH = 32


class LitLLM(LightningModule):
    """As in litgpt's README, smaller."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 128, "padded_vocab_size": 128}
        self.model = GPT(Config(block_size=LENGTH, **sizes))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(batch["input_ids"])
        return chunked_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def texts(first: int, count: int) -> list[dict[str, Tensor]]:
    """Characters of Python's documentation; the first quarter of each text is a prompt, and unlabelled."""
    characters = " ".join(sorted(pydoc_data.topics.topics.values())).encode("ascii", "replace")
    tokens = torch.tensor(list(characters[first * LENGTH : (first + count) * LENGTH])).view(count, LENGTH)
    labels = tokens.clone()
    for row in range(count):
        labels[row, : 4 + row % 8] = -100
    return [{"input_ids": one, "labels": label} for one, label in zip(tokens, labels, strict=True)]


def fit(callbacks: list[Any], **options: Any) -> LightningModule:
    module = LitLLM()
    trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader(texts(0, 160), 16, shuffle=True), DataLoader(texts(160, 60), 16))  # type: ignore[arg-type]
    return module


CASES = {"litgpt": Case(fit, one_by_one(rows, lambda batch: len(batch["labels"])))}
