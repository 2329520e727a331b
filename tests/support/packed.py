"""The same documents as rows of their own, packed into rows and flattened into one; a model that keeps them apart."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

VOCABULARY, WIDTH, LONGEST = 23, 8, 24
LAYOUTS = ("packed", "flattened", "joined")
"""Rows of several documents; one row, ``[1, N]``; and one without an axis of rows, ``[N]``."""

Batch = dict[str, Tensor]


def texts(count: int, seed: int) -> list[Tensor]:
    """Documents of 1 to 17 tokens; the second one has one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 18, (count,), generator=generator).tolist()
    lengths[1] = 1
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def unpacked(documents: list[Tensor]) -> Batch:
    """``[D, L]``, a row a document, padded at the end."""
    return _batch([[each] for each in documents], max(map(len, documents)))


def packed(documents: list[Tensor], width: int = LONGEST) -> Batch:
    """``[R, T]``, as many documents in a row as fit, in their order; and one row of padding only."""
    rows: list[list[Tensor]] = [[]]
    for each in documents:
        if sum(map(len, rows[-1])) + len(each) > width:
            rows.append([])
        rows[-1].append(each)
    return _batch([*rows, []], width)


def flattened(documents: list[Tensor]) -> Batch:
    """``[1, N]``, without padding."""
    return _batch([documents], sum(map(len, documents)))


def joined(documents: list[Tensor]) -> Batch:
    """``[N]``, without an axis of rows."""
    return {name: values[0] for name, values in flattened(documents).items()}


def laid_out(layout: str, documents: list[Tensor]) -> Batch:
    """The documents as a batch of this layout."""
    return {"unpacked": unpacked, "packed": packed, "flattened": flattened, "joined": joined}[layout](documents)


def _batch(rows: list[list[Tensor]], width: int) -> Batch:
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions, numbers, labels = torch.zeros_like(ids), torch.full_like(ids, -1), torch.full_like(ids, -100)
    for row, documents in enumerate(rows):
        begin = 0
        for number, each in enumerate(documents):
            own = slice(begin, begin + len(each))
            ids[row, own], positions[row, own], numbers[row, own] = each, torch.arange(len(each)), number
            labels[row, begin + 1 : begin + len(each)] = each[1:]  # nothing predicts a document's first token
            begin += len(each)
    mask = (numbers >= 0).long()
    return {
        "input_ids": ids,
        "position_ids": positions,
        "document_ids": numbers,
        "attention_mask": mask,
        "labels": labels,
    }


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        query, key, value = self.mix(self.norm(hidden)).chunk(3, -1)
        hidden = hidden + self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=seen))
        return hidden + self.mlp(self.second(hidden))


class PackedGPT(LightningModule):
    """A GPT in which no token sees another document's, with tied embeddings."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, batch: Batch) -> Tensor:
        ids, places, numbers = (torch.atleast_2d(batch[name]) for name in ("input_ids", "position_ids", "document_ids"))
        seen = (numbers[:, :, None] == numbers[:, None]) & (places[:, :, None] >= places[:, None])
        seen = seen | torch.eye(ids.shape[1], dtype=torch.bool)
        hidden = self.embed(ids) + self.places(places)
        for block in self.blocks:
            hidden = block(hidden, seen)
        return self.head(self.norm(hidden))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        logits, labels = self(batch), torch.atleast_2d(batch["labels"])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


def loader(steps: list[list[Tensor]], layout: str) -> DataLoader[Any]:
    """A batch of these documents for each step, in this layout."""
    rows = [each for documents in steps for each in documents]
    ends = torch.tensor([len(documents) for documents in steps]).cumsum(0).tolist()
    batches = [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
    return DataLoader(rows, batch_sampler=batches, collate_fn=partial(laid_out, layout))  # type: ignore[arg-type]
