"""trl: documents packed into rows, and its padding-free collator."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.text_runs import PAD, Fitted, by_position, by_row, check, fit_and_compare, id_of, texts

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEXTS, WIDTH = texts(), 16


def loader(data: Any, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=PAD, **options)
    generator = torch.Generator().manual_seed(3)
    return DataLoader(data, batch_size, shuffle=True, collate_fn=collate, generator=generator)


def plain() -> Any:
    return datasets.Dataset.from_dict({"input_ids": [list(text) for text in TEXTS]})


def check_each_text(fitted: Fitted) -> None:
    """However documents were put together, each text has its visits."""
    check(fitted)
    expected = Counter(id_of(text) for text in TEXTS)
    assert fitted.exposures == {id: 2 * count for id, count in expected.items()}


def check_rows(fitted: Fitted, rows: list[Counter[int]]) -> None:
    """The first row is one that holds the text."""
    found = fitted.column("first_row")
    assert all(id in rows[int(row)] for id, row in found.items())
    assert len(set(found.values())) > 3


def packed_rows(data: Any) -> list[Counter[int]]:
    """The texts of each row."""
    rows = []
    for row in data:
        parts = torch.tensor(row["input_ids"]).split(row["seq_lengths"])
        rows.append(Counter(id_of(part.tolist()) for part in parts))
    return rows


@pytest.mark.parametrize("multiple", [None, 8])
def test_packed_and_free_of_padding(multiple):
    """Two rows of several documents each are one row of the batch."""
    data = trl.pack_dataset(plain(), WIDTH, "bfd")
    fitted = fit_and_compare(partial(loader, data, padding_free=True, pad_to_multiple_of=multiple), by_position)
    check_each_text(fitted)
    check_rows(fitted, packed_rows(data))


def test_free_of_padding():
    fitted = fit_and_compare(partial(loader, plain(), 4, padding_free=True), by_position)
    check_each_text(fitted)
    check_rows(fitted, [Counter([id_of(text)]) for text in TEXTS])


def test_wrapped():
    """Rows cut wherever they are full have no documents: they are the texts."""
    data = trl.pack_dataset(plain(), WIDTH, "wrapped")
    fitted = fit_and_compare(partial(loader, data, 4), by_row)
    check(fitted)
    assert set(fitted.exposures.values()) == {2} and len(fitted.exposures) == len(data)


def test_padded():
    fitted = fit_and_compare(partial(loader, plain(), 4), by_row)
    check_each_text(fitted)
