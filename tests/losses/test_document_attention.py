"""Attention between the documents of a packed row is noticed, whatever computes it, and never where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memsink.losses.step_reader import StepReader
from lightning_memsink.samples.documents import documents_in

LENGTHS = ((5, 3), (2, 4, 2))
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
NUMBERS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])
BLOCKS = (NUMBERS[:, :, None] == NUMBERS[:, None, :]).tril()
ADDED = torch.zeros(BLOCKS.shape).masked_fill(~BLOCKS, -1e9)


class Attention(nn.Module):
    """One layer of two heads, and a head that predicts tokens."""

    def __init__(self, kind: str, mask: Tensor | None) -> None:
        super().__init__()
        self.kind, self.mask = kind, mask
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.query, self.recurrent = nn.Linear(8, 24), nn.GRU(8, 8, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if self.kind == "recurrent":
            return self.head(self.recurrent(hidden)[0])
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.query(hidden).chunk(3, -1))
        mask = None if self.mask is None else self.mask[:, None]
        if self.kind == "sdpa":
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        else:
            scores = query @ key.transpose(-1, -2) / 2
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
            mixed = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1) @ value
        return self.head(mixed.transpose(1, 2).flatten(2))


def attends_across(model: nn.Module) -> bool:
    """Whether a watched step of ``model`` has seen it."""
    ids = torch.randint(1, 20, POSITIONS.shape, generator=torch.Generator().manual_seed(1))
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": POSITIONS}
    documents = documents_in(batch)
    assert documents is not None
    reader = StepReader(model)
    reader.begin(batch, documents.count, documents.axes(batch), is_packed=True)
    try:
        reader.read(F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        return reader.watch.seen.attends_across
    finally:
        reader.end()  # else the mode watches all tests that follow


@pytest.mark.parametrize("kind", ["sdpa", "by hand", "recurrent"])
def test_documents_that_see_one_another_are_noticed(kind):
    assert attends_across(Attention(kind, None))


@pytest.mark.parametrize("mask", [BLOCKS, ADDED], ids=["bool", "added"])
def test_a_block_diagonal_mask_keeps_them_apart(mask):
    assert not attends_across(Attention("sdpa", mask))
    if mask.dtype == torch.bool:
        assert not attends_across(Attention("by hand", mask))
