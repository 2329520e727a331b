"""transformers' collators: padded, masked anew each time, flattened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
)

from tests.support.text_runs import (
    MASK,
    PAD,
    TextModel,
    by_position,
    by_row,
    check,
    fit_and_compare,
    fit_texts,
    id_of,
    texts,
    tokenizer,
)

TEXTS = texts()


def rows(**more: Any) -> list[dict[str, Any]]:
    return [{"input_ids": list(text), **more} for text in TEXTS]


def loader(collate: Any, data: list[dict[str, Any]] | None = None) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(data or rows(), 4, shuffle=True, collate_fn=collate, generator=generator)


def check_rows(fitted: Any) -> None:
    """Each text came from as many rows as hold it; its first row is one of them."""
    places: dict[int, set[int]] = {}
    for row, text in enumerate(TEXTS):
        places.setdefault(id_of(text), set()).add(row)
    assert fitted.column("rows") == {id: len(some) for id, some in places.items()}
    assert all(row in places[id] for id, row in fitted.column("first_row").items())


def test_texts_padded_for_a_causal_model():
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    fitted = fit_and_compare(lambda: loader(collate), by_row)
    check(fitted)
    check_rows(fitted)


def test_texts_that_are_masked_anew_each_time():
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm=True, mlm_probability=0.4)
    fitted = fit_and_compare(lambda: loader(collate), by_row, is_masked=True)
    check(fitted)
    check_rows(fitted)


@pytest.mark.parametrize("options", [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}])
def test_flattened_texts(options):
    collate = DataCollatorWithFlattening(**options)
    fitted = fit_and_compare(lambda: loader(collate), by_position)
    check(fitted)
    check_rows(fitted)


def test_texts_with_prompts_that_have_no_loss():
    data = [{"input_ids": list(text), "labels": [-100, -100, *text[2:]]} for text in TEXTS]
    fitted = fit_and_compare(lambda: loader(DataCollatorForSeq2Seq(tokenizer()), data), by_row)
    check(fitted)
    check_rows(fitted)


def test_texts_padded_without_labels():
    fitted = fit_and_compare(lambda: loader(DataCollatorWithPadding(tokenizer())), by_row)
    check(fitted)
    check_rows(fitted)


def test_translations_are_samples_by_their_row():
    """Some batches have texts and translations of one length, by chance."""
    data = [
        {"input_ids": list(text), "labels": list(reversed(text))[: max(4, len(text) - row % 2)]}
        for row, text in enumerate(TEXTS)
    ]
    collate = DataCollatorForSeq2Seq(tokenizer())
    taken: list[int] = []

    class Translator(TextModel):
        def loss(self, batch: Any) -> Tensor:
            logits = self.model(batch["input_ids"]).logits.mean(1, keepdim=True)
            labels = batch["labels"]
            return F.cross_entropy(logits.expand(-1, labels.shape[1], -1).flatten(0, 1), labels.flatten())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            taken.append(batch["input_ids"].shape == batch["labels"].shape)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    fitted = fit_texts(loader(collate, data), by_row, {}, model=Translator(by_row))
    assert 0 < sum(taken) < len(taken)
    assert fitted.exposures == dict.fromkeys(range(len(TEXTS)), 2)


def test_texts_padded_by_hand_with_labels():
    """No attention mask: what has no label at a row's end is padding."""

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in some]
        padded = {"input_ids": pad_sequence(ids, True, MASK), "labels": pad_sequence(ids, True, -100)}
        assert all(len(each) >= 4 for each in ids)
        return padded

    def split(batch: Any) -> Any:
        for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = row[labels >= 0][None]
            yield tuple(text[0].tolist()), {"input_ids": text, "labels": text}

    fitted = fit_and_compare(lambda: loader(collate), split)
    check(fitted)
    check_rows(fitted)


def test_texts_padded_by_hand_without_labels_are_said_to_have_padding_that_is_unknown():
    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"input_ids": pad_sequence([torch.tensor(row["input_ids"]) for row in some], True, PAD)}

    fitted = fit_texts(loader(collate), by_row, {})
    (message,) = [each for each in fitted.messages if "could not measure" not in each]
    assert "If they are padded, put batch['attention_mask'] into the batch" in message
