"""Texts with families of variants among them, and what `samples.families` finds of these.

N  texts      T  tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.planted_text import documentation
from lightning_memsink.samples.families import Families
from lightning_memsink.samples.tokens import Tokens
from lightning_memsink.samples.unique import distinct_rows

MEMBERS = 12
BATCH = 256
UNKNOWN = -1


@dataclass(frozen=True)
class Texts:
    """``owners`` ``[N]``: the family of each text, or a number of its own; those of planted families come first."""

    tokens: Tokens
    owners: Tensor
    families: int


@dataclass(frozen=True)
class Found:
    """``recall``: share of texts that are in the largest group of their family. ``false_joins``: share of pairs of
    texts of different families that are in one group."""

    recall: float
    false_joins: float


class Source:
    """Where the tokens of texts come from: real documentation, or uniform numbers."""

    def __init__(self, seed: int, vocabulary: int | None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary
        if vocabulary is None:
            corpus = documentation(seed)
            sequences = distinct_rows(torch.cat([corpus.train, corpus.held_out]))
            self._sequences = sequences[torch.randperm(len(sequences), generator=self.generator)]
            self._used = 0

    def text(self, length: int) -> Tensor:
        if self.vocabulary is not None:
            return torch.randint(self.vocabulary, (length,), generator=self.generator)
        needed = -(-length // self._sequences.shape[1])
        start, self._used = self._used, self._used + needed
        return self._sequences[start : start + needed].flatten()[:length]

    def tokens(self, count: int) -> Tensor:
        """Single tokens, as often as they are."""
        if self.vocabulary is not None:
            return self.text(count)
        flat = self._sequences.flatten()
        return flat[torch.randint(len(flat), (count,), generator=self.generator)]

    def variant(self, text: Tensor, rate: float) -> Tensor:
        changed = torch.rand(len(text), generator=self.generator) < rate
        return torch.where(changed, self.tokens(len(text)), text)


def with_families(
    source: Source, rate: float, lengths: tuple[int, int], families: int, alone: int, header: int = 0
) -> Texts:
    """``families`` of `MEMBERS` variants each, with a share ``rate`` of their tokens changed, and ``alone`` others.

    All have the same first ``header`` tokens.
    """
    start, texts, owners = source.text(header), [], []
    for owner in range(families + alone):
        length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=source.generator))
        base = source.text(length)
        members = [source.variant(base, rate) for _ in range(MEMBERS)] if owner < families else [base]
        texts += [torch.cat([start, text]) for text in members]
        owners += [owner] * len(members)
    return _shuffled(texts, owners, families, source.generator)


def of_templates(source: Source, share: float, length: int, templates: int, texts: int) -> Texts:
    """Templates in each of which a ``share`` of the tokens is filled in, the same places in all its ``texts``."""
    made = []
    for _ in range(templates):
        order = torch.rand(length, generator=source.generator).argsort().argsort()
        base, filled = source.text(length), order < round(share * length)  # of few tokens, texts are near-duplicates
        made += [torch.where(filled, source.tokens(length), base) for _ in range(texts)]
    return _shuffled(made, list(range(len(made))), 0, source.generator)


def _shuffled(texts: Sequence[Tensor], owners: Sequence[int], families: int, generator: torch.Generator) -> Texts:
    order = torch.randperm(len(texts), generator=generator).tolist()
    width = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, n in enumerate(order):
        ids[row, : len(texts[n])], mask[row, : len(texts[n])] = texts[n], True
    return Texts(Tokens(ids, mask), torch.tensor(owners)[order], families)


def found_in(texts: Texts) -> Found:
    """What is found where the texts come in batches."""
    families, count = Families(), len(texts.owners)
    for rows in torch.arange(count).split(BATCH):
        families.add(rows, Tokens(texts.tokens.ids[rows], texts.tokens.mask[rows]))
    numbers = families.numbers(count).long()
    largest = [
        int(torch.unique(numbers[texts.owners == family], return_counts=True)[1].max())
        for family in range(texts.families)
    ]
    in_families = sum(size for size in largest if size > 1)
    joined, right = pairs(numbers), pairs(numbers * (int(texts.owners.max()) + 1) + texts.owners)
    return Found(
        in_families / max(1, MEMBERS * texts.families),
        (joined - right) / (count * (count - 1) / 2 - pairs(texts.owners)),
    )


def pairs(groups: Tensor) -> float:
    """How many pairs of entries are equal."""
    sizes = torch.unique(groups, return_counts=True)[1].double()
    return float((sizes * (sizes - 1)).sum() / 2)
