"""Model and data of the recipe of packed text: documents of two sources, several in a row.

D  documents of a batch      R  rows      T  tokens of a row
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_memsink.examples.corpora import byte_level_bpe, python_code, python_docs
from lightning_memsink.examples.text import CausalLM

IGNORED = -100
SHORTEST = 16
"""Tokens. A shorter document says little of what is memorized."""


@dataclass(frozen=True)
class Document:
    """A text and where it is from."""

    tokens: Tensor
    """``[L]`` int64"""
    source: str


class PackedCausalLM(CausalLM):
    """A `CausalLM` that keeps the documents of a row apart: no token attends to one of another document.

    transformers makes the block-diagonal mask from positions that start anew, where nothing is cached.
    """

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
        loss: Tensor = self.transformer(**inputs, use_cache=False).loss
        return loss


class PackedSources(LightningDataModule):
    """Python's documentation, shown once an epoch, and some of its code, shown over and over, packed into rows.

    The rows are packed anew in each epoch. The source of a document, ``documentation`` or ``code``, is its label.

    Args:
        documentation: documents of that source.
        code: documents of that source.
        code_times: times per epoch that each of them is shown.
        controls: held-out documents of each source.
        vocab_size: of the tokenizer trained on the text; the model's.
        context: tokens of a row, and of the longest document; a longer text is cut off. The model's.
        batch_size: documents per step.
        seed: of the choice of documents.

    Raises:
        ValueError: in ``setup``, if this Python has too little text.
    """

    def __init__(
        self,
        documentation: int = 2000,
        code: int = 60,
        code_times: int = 16,
        controls: int = 150,
        vocab_size: int = 1024,
        context: int = 96,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shown = {"documentation": documentation, "code": code}
        self.times = {"documentation": 1, "code": code_times}
        self.controls, self.vocab_size, self.context = controls, vocab_size, context
        self.batch_size, self.seed = batch_size, seed

    def setup(self, stage: str) -> None:
        texts = {"documentation": python_docs(), "code": python_code()}
        tokenizer = byte_level_bpe([text for some in texts.values() for text in some], self.vocab_size)
        self.train: list[Document] = []
        """Each document as often as it is shown in an epoch."""
        self.held_out: list[Document] = []
        for source, some in texts.items():
            distinct = list(dict.fromkeys(some))
            random.Random(self.seed).shuffle(distinct)
            encoded = tokenizer.encode_batch(distinct, add_special_tokens=False)
            rows = dict.fromkeys(tuple(each.ids[: self.context]) for each in encoded if len(each.ids) >= SHORTEST)
            documents = [Document(torch.tensor(row), source) for row in rows]
            held_out, shown = documents[: self.controls], documents[self.controls :][: self.shown[source]]
            if len(shown) < self.shown[source]:
                raise ValueError(
                    f"This Python has {len(documents)} documents of {source}, fewer than the {self.controls} controls "
                    f"and {self.shown[source]} others that are asked for. Lower data.{source} or data.controls."
                )
            self.train += shown * self.times[source]
            self.held_out += held_out

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.held_out, 2 * self.batch_size, shuffle=False)

    def _loader(self, documents: list[Document], batch_size: int, shuffle: bool) -> DataLoader[Any]:
        collate = partial(packed, context=self.context)
        return DataLoader(documents, batch_size, shuffle, collate_fn=collate)  # type: ignore[arg-type]


def packed(documents: Sequence[Document], context: int) -> dict[str, Any]:
    """Rows of documents, each put into the first one that has room for it.

    Args:
        documents: none longer than a row.
        context: T.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` and ``attention_mask`` ``[R, T]``, and ``source``, by row a list of
        its documents'. The mask is 0 for padding; a model that is given it would let documents see one another. The
        first token of a document has no label: nothing of its own precedes it.

    Raises:
        ValueError: a document is longer than ``context``.
    """
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in documents:
        length = len(document.tokens)
        if length > context:
            raise ValueError(f"A document of {length} tokens does not fit a row of {context}.")
        place = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(context)
        rows[place].append(document)
        room[place] -= length
    shape = len(rows), context
    ids, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels, mask = torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.int64)
    for row, own in enumerate(rows):
        begin = 0
        for document in own:
            end = begin + len(document.tokens)
            ids[row, begin:end] = document.tokens
            positions[row, begin:end] = torch.arange(end - begin)
            labels[row, begin + 1 : end] = document.tokens[1:]
            begin = end
        mask[row, :begin] = 1
    sources = [[document.source for document in own] for own in rows]
    tensors = {"input_ids": ids, "position_ids": positions, "labels": labels, "attention_mask": mask}
    return {**tensors, "source": sources}
