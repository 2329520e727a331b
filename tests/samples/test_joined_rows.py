"""Rows of the data set that documents came in, where a collator has joined samples to one row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_memsink.samples.documents import documents_in
from lightning_memsink.samples.joined_rows import joined_lengths, rows_of_documents
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.tagged_batch import Fetched

SAMPLES = [{"input_ids": [5, 6, 7, 8, 9]}, {"input_ids": torch.tensor([4, 3])}]
"""Two rows, of which the first holds two documents."""
TEXT = [5, 6, 7, 8, 9, 4, 3]
POSITIONS = [0, 1, 2, 0, 1, 0, 1]


def joined(padding: int = 0, **more: Any) -> dict[str, Any]:
    rows = {"input_ids": TEXT + [0] * padding, "position_ids": POSITIONS + [0] * padding}
    return {name: torch.tensor([row]) for name, row in rows.items()} | more


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_samples_one_after_the_other_are_joined_padded_or_not(padding):
    assert joined_lengths(SAMPLES, joined(padding)) == [5, 2]


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (SAMPLES, [*TEXT, 1, 2]),  # something else behind them
        (SAMPLES, TEXT[:-1]),
        (SAMPLES[::-1], TEXT),
        ([*SAMPLES, {"input_ids": []}], TEXT),
        ([*SAMPLES, {"text": "word"}], TEXT),
        ([*SAMPLES, {"input_ids": "word"}], TEXT),
        ([], TEXT),
        (None, TEXT),
    ],
)
def test_anything_else_is_not(samples, text):
    assert joined_lengths(samples, {"input_ids": torch.tensor([text])}) is None
    assert joined_lengths(samples, {"input_ids": torch.tensor([text, text])}) is None


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_each_document_has_the_row_that_it_came_in(padding):
    """More documents than rows: a row of the data set is itself packed."""
    fetched = Fetched(torch.tensor([70, 80]), 2, lengths=torch.tensor([5, 2]))
    ids = SampleIds()
    found = ids.of(joined(padding), fetched.ids, fetched)
    assert found is not None and len(found) == 3
    assert ids.rows is not None and ids.rows.tolist() == [70, 70, 80]


def test_rows_of_a_batch_of_several_rows_are_those_of_its_documents():
    batch = {name: rows.reshape(1, 7).repeat(2, 1) for name, rows in joined().items()}
    documents = documents_in(batch)
    assert documents is not None
    found = rows_of_documents(documents, torch.tensor([70, 80]), None)
    assert found is not None and found.tolist() == [70, 70, 70, 80, 80, 80]
    assert rows_of_documents(documents, torch.tensor([70, 80, 90]), None) is None


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q", "position_ids"])
def test_padding_that_is_numbered_like_documents_is_none(name):
    """As trl pads its joined rows to a multiple: each token of padding is a sequence of its own."""
    positions = torch.tensor([[*POSITIONS, 0, 0, 0]])
    begins = (positions[0] == 0).nonzero().flatten()
    said = {
        "position_ids": positions,
        "seq_idx": (positions == 0).long().cumsum(1).int() - 1,
        "cu_seq_lens_q": torch.cat([begins, torch.tensor([10])]).int(),
    }
    labels = torch.tensor([[-100, 6, 7, -100, 9, -100, 3, -100, -100, -100]])
    batch = {"input_ids": torch.tensor([[*TEXT, 0, 0, 0]]), "labels": labels, name: said[name]}
    documents = documents_in(batch)
    assert documents is not None and documents.count == 3
    assert documents.owners.tolist() == [[0, 0, 0, 1, 1, 2, 2, -1, -1, -1]]
