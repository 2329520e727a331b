"""Fits on packed documents, with the loss of each document alone as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.hashing import text_ids
from lightning_memsink.samples.tokens import Tokens
from tests.support.packed import PackedGPT, texts, unpacked
from tests.support.small_runs import trainer

STEPS = [texts(7, seed) for seed in (1, 2, 3)]
NUMBERS = "numbers_of_the_models_own"
"""Where the model reads the documents of tokens, a name that says nothing to the callbacks."""


def id_of(document: Tensor) -> int:
    return int(text_ids(Tokens(document[None], torch.ones(1, len(document), dtype=torch.bool))))


class Model(PackedGPT):
    """With the documents under a name of its own; ``lr`` 0 leaves the weights alone."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.lr = lr

    def forward(self, batch: Any) -> Tensor:
        return super().forward({**batch, "document_ids": batch[NUMBERS]} if NUMBERS in batch else batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr)


def fit(
    model: PackedGPT, batches: Any, controls: Any = None, detector: MemorizationDetector | None = None, **options: Any
) -> Trainer:
    """Two epochs by default, in float64."""
    own = {name: options.pop(name) for name in ("segments", "key", "identity", "loss") if name in options}
    extra = options.pop("callbacks", [])
    extra += [] if controls is None else [detector or MemorizationDetector(k=4)]
    run = trainer(
        [LossTracker(flush_every=2, **own), *extra],
        **{"max_epochs": 2, "val_check_interval": 1.0, "precision": "64-true", **options},
    )
    run.fit(model, batches, controls)
    return run


def visits(run: Trainer) -> dict[int, tuple[int, float]]:
    """By id, exposures and the latest loss; the loss of a document of one token is none."""
    table = Ledger.of(run).losses
    rows = zip(table.ids.tolist(), table.exposures.tolist(), table.last_loss.tolist(), strict=True)
    return {id: (count, loss) for id, count, loss in rows}


def assert_same(found: dict[int, tuple[int, float]], expected: dict[int, tuple[int, float]]) -> None:
    assert found.keys() == expected.keys()
    for id, (count, loss) in expected.items():
        assert found[id] == (count, pytest.approx(loss, abs=1e-4, nan_ok=True)), id


@torch.no_grad()
def loss_of(model: PackedGPT, document: Tensor) -> Tensor:
    return PackedGPT.training_step(model, unpacked([document]), 0)


def alone(model: PackedGPT, steps: list[list[Tensor]], epochs: int = 2) -> dict[int, tuple[int, float]]:
    """The oracle: a forward of each document by itself, and how often the steps show it."""
    losses: dict[int, tuple[int, float]] = {}
    model = model.double()
    for each in (document for step in steps for document in step):
        loss = float(loss_of(model, each)) if len(each) > 1 else float("nan")
        losses[id_of(each)] = losses.get(id_of(each), (0, 0.0))[0] + epochs, loss
    return losses


Change = Callable[[dict[str, Tensor]], dict[str, Any]]


def only(batch: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """The text and its labels, and the numbers of documents under the model's own name."""
    kept = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    hidden = torch.arange(batch["input_ids"].shape[-1]).expand_as(batch["input_ids"])
    return {**kept, "places": kept.pop("position_ids"), "position_ids": hidden, NUMBERS: batch["document_ids"], **more}


class OwnPlaces(Model):
    """Reads positions under a name of its own too, so that nothing but the tested says where documents begin."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward({**batch, "position_ids": batch["places"]})


def seen(batch: dict[str, Tensor]) -> Tensor:
    """Bool ``[R, T, T]``"""
    numbers = batch["document_ids"]
    return ((numbers[:, :, None] == numbers[:, None]) & (numbers >= 0)[:, :, None]).tril()


def ends(batch: dict[str, Tensor]) -> Tensor:
    numbers = batch["document_ids"].flatten()
    lengths = torch.bincount(numbers[numbers >= 0])
    return F.pad(lengths.cumsum(0), (1, 0)).int()


SAID: dict[str, Change] = {
    "position_ids": lambda batch: {**only(batch), "position_ids": batch["position_ids"]},
    "positions and a mask": lambda batch: {
        **only(batch, attention_mask=batch["attention_mask"]), "position_ids": batch["position_ids"]
    },
    "seq_idx": lambda batch: only(batch, seq_idx=batch["document_ids"]),
    "sequence_ids": lambda batch: only(batch, sequence_ids=batch["document_ids"].int()),
    "document_ids": lambda batch: only(batch, document_ids=batch["document_ids"]),
    "numbers in the attention mask": lambda batch: only(batch, attention_mask=batch["document_ids"] + 1),
    "a mask by blocks": lambda batch: only(batch, attention_mask=seen(batch)[:, None]),
    "an added mask by blocks": lambda batch: only(
        batch, attention_mask=torch.zeros(seen(batch).shape).masked_fill(~seen(batch), -1e9)[:, None]
    ),
    "segments": only,
}  # fmt: skip


def changed(steps: list[list[Tensor]], lay: Callable[[list[Tensor]], Any], change: Callable[[Any], Any]) -> Any:
    """A batch for each step."""
    return DataLoader([change(lay(step)) for step in steps], batch_size=None)
