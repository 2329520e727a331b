"""Fits of small Hugging Face models on texts, with the loss of each text alone at each of its visits as the oracle."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_memsink import Ledger, memsink
from lightning_memsink.samples.hashing import text_ids
from lightning_memsink.samples.tokens import Tokens
from tests.support.small_runs import weights

PAD, MASK, END, FIRST, VOCABULARY = 0, 1, 2, 3, 60
OF_MODEL = ("input_ids", "attention_mask", "position_ids", "labels")

Text = tuple[int, ...]
Split = Callable[[Any], Iterator[tuple[Text, dict[str, Tensor]]]]
"""Of a batch, each sample's text, and what the model gets of it by itself."""


def texts(count: int = 24, seed: int = 0, repeated: int = 3) -> list[Text]:
    """Texts of 4 to 15 tokens, of which the first ``repeated`` come three times, as rows of their own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 16, (count,), generator=generator).tolist()
    some = [tuple(torch.randint(FIRST, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]
    return [*some, *some[:repeated], *some[:repeated]]


def held_out() -> DataLoader[Any]:
    return DataLoader([{"input_ids": torch.tensor(text)} for text in texts(40, seed=9, repeated=0)], 1)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": PAD, "[MASK]": MASK, "[END]": END} | {f"w{n}": n for n in range(FIRST, VOCABULARY)}
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[END]"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")), **names)


def id_of(text: Sequence[int]) -> int:
    ids = torch.tensor(text)[None]
    return int(text_ids(Tokens(ids, torch.ones_like(ids, dtype=torch.bool))))


class TextModel(LightningModule):
    """Notes the loss of each text of a batch alone, before the batch is trained on."""

    def __init__(self, split: Split, is_masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        if is_masked:
            none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            self.model: Any = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes, **none))
        else:
            self.model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
        self.split, self.is_masked = split, is_masked
        self.visits: dict[Text, list[float]] = defaultdict(list)

    def loss(self, batch: Any) -> Tensor:
        batch = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        given = {name: batch[name].long() for name in OF_MODEL if name in batch}
        if "labels" not in given:
            labels = given["input_ids"]
            given["labels"] = (
                labels.masked_fill(given["attention_mask"] == 0, -100) if "attention_mask" in given else labels
            )
        return self.model(**given, use_cache=False).loss if not self.is_masked else self.model(**given).loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for text, alone in self.split(batch):
                self.visits[text].append(float(self.loss(alone)))
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def by_row(batch: Any) -> Iterator[tuple[Text, dict[str, Tensor]]]:
    """Rows of their own, without their padding."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = torch.ones_like(ids) if isinstance(batch, Tensor) else batch.get("attention_mask", ids != PAD)
    for row in range(len(ids)):
        own = mask[row] > 0
        text = ids[row][own][None]
        labels = text if isinstance(batch, Tensor) or "labels" not in batch else batch["labels"][row][own][None]
        known = torch.where(labels >= 0, labels, text)[0].tolist()
        yield tuple(known), {"input_ids": text, "labels": labels}


def by_position(batch: Any) -> Iterator[tuple[Text, dict[str, Tensor]]]:
    """Documents of rows, where positions start anew, without padding."""
    for row, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        begins = [n for n, place in enumerate(positions.tolist()) if place == 0] + [len(row)]
        for begin, end in pairwise(begins):
            text = row[begin:end][None]
            if text.tolist() != [[PAD]]:
                yield tuple(text[0].tolist()), {"input_ids": text, "labels": text}


@dataclass
class Fitted:
    """A fit with our callbacks, and what it left behind."""

    trainer: Trainer
    model: TextModel
    messages: list[str] = field(default_factory=list)

    @property
    def ledger(self) -> Ledger:
        return Ledger.of(self.trainer)

    @property
    def exposures(self) -> dict[int, int]:
        table = self.ledger.losses
        return dict(zip(table.ids.tolist(), table.exposures.tolist(), strict=True))

    def column(self, name: str) -> dict[int, float]:
        table = self.ledger.losses
        return dict(zip(table.ids.tolist(), getattr(table, name).tolist(), strict=True))


def fit_texts(
    loader: Any, split: Split, options: dict[str, Any] | None = None, is_masked: bool = False, **trainer: Any
) -> Fitted:
    """Two epochs with ``memsink(**options)``; with ``options`` None without callbacks."""
    seed_everything(7, verbose=False)
    ckpt_path = trainer.pop("ckpt_path", None)
    model = trainer.pop("model", None) or TextModel(split, is_masked)
    own = memsink(path=None, flush_every=3, **options) if options is not None else []
    callbacks = [*trainer.pop("callbacks", []), *own]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain = {"max_epochs": 2, "accelerator": "cpu", "enable_model_summary": False}
    run = Trainer(callbacks=callbacks, **{**quiet, **plain, **trainer})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.fit(model, loader, held_out(), ckpt_path=ckpt_path)
    return Fitted(run, model, [str(warning.message) for warning in found if "lightning_memsink" in warning.filename])


class SaveAfter(Checkpoint):
    """Saves a checkpoint after ``steps`` batches, when other callbacks are done with the last."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


def visits_of(*runs: Fitted) -> dict[int, int]:
    """By id, of all runs together."""
    visits: dict[int, int] = defaultdict(int)
    for run in runs:
        for text, losses in run.model.visits.items():
            visits[id_of(text)] += len(losses)
    return dict(visits)


def check(fitted: Fitted, ids: dict[Text, int] | None = None, messages: Sequence[str] = ()) -> None:
    """The ledger has each text once, with its visits and its losses alone; nothing but ``messages`` was said."""
    visits = fitted.model.visits
    ids = {text: id_of(text) for text in visits} if ids is None else ids
    assert fitted.exposures == {ids[text]: len(losses) for text, losses in visits.items()}
    for name, place, within in (("last_loss", -1, 1e-5), ("first_loss", 0, 2**-8)):
        column = fitted.column(name)
        off = {
            text: (column[ids[text]], losses[place])
            for text, losses in visits.items()
            if not math.isclose(column[ids[text]], losses[place], rel_tol=within)
        }
        assert off == {}, name
    flags = fitted.ledger.flags
    assert flags is not None and len(flags.verdict) == len(visits)
    assert len(fitted.messages) == len(messages), fitted.messages
    for found, part in zip(fitted.messages, messages, strict=True):
        assert part in found


def fit_and_compare(loader: Callable[[], Any], split: Split, is_masked: bool = False, **options: Any) -> Fitted:
    """A fit with our callbacks, after which weights are those of a fit without, to the bit."""
    runs = []
    for own in (None, options):
        seed_everything(7, verbose=False)  # a loader may draw the seed of its order when it is made
        runs.append(fit_texts(loader(), split, own, is_masked))
    plain, watched = runs
    assert torch.equal(weights(plain.model), weights(watched.model))
    assert plain.model.visits == watched.model.visits
    return watched
