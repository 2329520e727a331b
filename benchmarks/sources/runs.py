"""Small fits on packed documents of six sources, with all of them and without one at a time.

D  documents of all sources
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.verdicts import Flags
from lightning_memsink.examples.corpora import byte_level_bpe, python_docs
from lightning_memsink.examples.packed import Document, PackedCausalLM, packed
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.loss_table import LossTable

CONTEXT, VOCABULARY = 128, 512
SHORTEST, LONGEST = 16, 48
"""Tokens of a document; a longer text is cut off."""
BACKGROUND = "background"
WARMUP = 40


@dataclass(frozen=True)
class Sizes:
    """Of the data and of training."""

    doses: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
    """Of each source: how many times per epoch its documents are shown."""
    documents: int = 32
    """Of each source."""
    background: int = 3000
    """Documents of no planted source, shown once an epoch."""
    controls: int = 400
    batch_size: int = 32
    """Documents of a step."""
    evaluations: int = 6
    """In an epoch."""


@dataclass(frozen=True)
class Data:
    """Documents of one distribution, drawn at random for each source."""

    shown: tuple[Document, ...]
    """Each as often as it is shown in an epoch."""
    planted: tuple[Document, ...]
    """``[D]`` those of the sources, each once, source after source."""
    controls: tuple[Document, ...]


@dataclass(frozen=True)
class Outcome:
    """What a fit left."""

    losses: Tensor
    """``[D]`` the planted documents' at the end, summed over their tokens, in nats."""
    table: LossTable | None = None
    """What the callbacks have recorded; None where there were none, as the next."""
    flags: Flags | None = None


class Decayed(PackedCausalLM):
    """With a learning rate that rises and then falls to a twentieth, as usual: what two fits differ by chance is less
    where the last steps are small."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = min(WARMUP, steps // 4)

        def rate(step: int) -> float:
            return min((step + 1) / warmup, 1 - 0.95 * max(0, step - warmup) / (steps - warmup))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def label(dose: int) -> str:
    """The name of the source of this dose."""
    return f"shown {dose} times"


def planted(sizes: Sizes, seed: int) -> Data:
    count = len(sizes.doses) * sizes.documents + sizes.controls + sizes.background
    drawn = iter([torch.tensor(text) for text in random.Random(seed).sample(_texts(), count)])

    def draw(count: int, source: str) -> list[Document]:
        return [Document(next(drawn), source) for _ in range(count)]

    by_dose = {dose: draw(sizes.documents, label(dose)) for dose in sizes.doses}
    controls, background = draw(sizes.controls, BACKGROUND), draw(sizes.background, BACKGROUND)
    repeated = [document for dose, some in by_dose.items() for document in some * dose]
    once = [document for some in by_dose.values() for document in some]
    return Data((*background, *repeated), tuple(once), tuple(controls))


def fit(sizes: Sizes, seed: int, epochs: int, left_out: str | None) -> Outcome:
    """One fit, with the callbacks if no source is left out.

    Without a source the model starts from the same weights and takes as many steps, each on the same documents but
    those of that source.
    """
    data = planted(sizes, seed)
    seed_everything(seed, verbose=False)
    model = Decayed(n_layer=2, n_embd=64, n_head=2, vocab_size=VOCABULARY, context=CONTEXT, lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    collate = partial(packed_without, source=left_out)
    shown: Any = data.shown
    train = DataLoader(shown, sizes.batch_size, shuffle=True, drop_last=True, collate_fn=collate, generator=order)
    held_out: Any = data.controls
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        val_check_interval=1 / sizes.evaluations,
        limit_val_batches=1.0 if left_out is None else 0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[LossTracker(), MemorizationDetector()] if left_out is None else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train, DataLoader(held_out, 100, collate_fn=packed_without))
    losses = document_losses(model, data.planted)
    if left_out is not None:
        return Outcome(losses)
    ledger = Ledger.of(trainer)
    return Outcome(losses, ledger.losses, ledger.flags)


def packed_without(documents: Sequence[Document], source: str | None = None) -> dict[str, Any]:
    """A batch of the documents that are not of ``source``."""
    return packed([each for each in documents if each.source != source], CONTEXT)


@torch.no_grad()
def document_losses(model: PackedCausalLM, documents: Sequence[Document]) -> Tensor:
    """``[D]`` summed over the tokens of each but the first, in nats. Each document is a row of its own."""
    losses = []
    for begin in range(0, len(documents), 64):
        some = [each.tokens for each in documents[begin : begin + 64]]
        ids = pad_sequence(some, batch_first=True)
        targets = pad_sequence(some, batch_first=True, padding_value=-100)[:, 1:]
        logits = model.transformer(input_ids=ids, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1))
    return torch.cat(losses)


@cache
def _texts() -> list[tuple[int, ...]]:
    """Distinct documents of Python's documentation, as tokens."""
    texts = list(dict.fromkeys(python_docs()))
    encoded = byte_level_bpe(texts, VOCABULARY).encode_batch(texts, add_special_tokens=False)
    return list(dict.fromkeys(tuple(each.ids[:LONGEST]) for each in encoded if len(each.ids) >= SHORTEST))
