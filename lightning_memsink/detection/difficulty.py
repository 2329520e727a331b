"""Features that samples and controls are matched on: text difficulty, the user's features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_memsink.detection.ngram_features import EXCERPT, TOKEN_FEATURES, NgramCounts, compressed_bits
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.tokens import Tokens
from lightning_memsink.samples.unique import last_of_each

_COMPRESSED = TOKEN_FEATURES.index("compressed_bits")
BLOCK = 1 << 14
"""Numbers that torch works on with one thread, and that stay in a processor's cache."""


class Matching:
    """Running n-gram counts of the training text, and matching features computed from them."""

    def __init__(self) -> None:
        self.counts = NgramCounts()
        self._control_bits: dict[int, float] = {}

    def describe(
        self,
        table: LossTable,
        rows: Tensor,
        new: Tensor,
        tokens: Tokens | None,
        extra: Tensor | None,
        trained_on: bool = False,
    ) -> None:
        """Writes to ``table`` the features of the samples in ``rows`` ``[V]``, by the counts so far.

        Args:
            table: the table of the samples.
            rows: ``[V]`` rows of ``table``, a row as often as it was visited.
            new: bool ``[V]``, first visits, whose compressed size is computed; it never changes.
            tokens: the texts ``[V, T]``; None for samples that are not text.
            extra: ``[V, F]`` features of the user's own.
            trained_on: whether the model has just been trained on these texts, which then are counted first.
        """
        found = None
        if tokens is not None:
            if trained_on:
                self.count(tokens)
            found = self.of_texts(tokens, table.exposures[rows], new)
        write_features(table, rows, new, found, extra)

    def count(self, tokens: Tokens) -> None:
        """Counts the n-grams of texts ``[V, T]`` that were trained on."""
        for part in _blocks(tokens):
            self.counts.update(self.counts.look_up(tokens.ids[part], tokens.mask[part]))

    def of_texts(self, tokens: Tokens, exposures: Tensor, new: Tensor) -> Tensor:
        """``[V, F]`` features of texts ``[V, T]``, without the compressed size of those that are not ``new`` ``[V]``.

        Like `count` it works through blocks on one thread, and reads nothing but the counts: others may be training.
        ``exposures`` ``[V]``: how often each text was counted.
        """
        found = torch.zeros(len(tokens.ids), len(TOKEN_FEATURES), dtype=torch.float32)
        for part in _blocks(tokens):
            text = self.counts.look_up(tokens.ids[part], tokens.mask[part])
            found[part, : _COMPRESSED - 1] = self.counts.nll(text, exposures[part])
            found[part, _COMPRESSED - 1] = self.counts.familiarity(text, exposures[part])
            first = new[part].nonzero().flatten() + part.start
            found[first, _COMPRESSED] = compressed_bits(tokens.ids[first], tokens.mask[first])
        return found

    def of_controls(self, ids: Tensor, tokens: Tokens | None, extra: Tensor | None) -> Tensor:
        """``[B, F]`` the same features of controls ``ids`` ``[B]``, which are never trained on."""
        parts = []
        if tokens is not None:
            new = torch.tensor([control not in self._control_bits for control in ids.tolist()], dtype=torch.bool)
            found = self.of_texts(tokens, torch.zeros(len(ids)), new)
            self._control_bits.update(zip(ids[new].tolist(), found[new, _COMPRESSED].tolist(), strict=True))
            found[:, _COMPRESSED] = torch.tensor([self._control_bits[control] for control in ids.tolist()])
            parts.append(found)
        if extra is not None:
            parts.append(extra)
        return torch.cat(parts, 1) if parts else torch.zeros(len(ids), 0)


def write_features(table: LossTable, rows: Tensor, new: Tensor, of_texts: Tensor | None, extra: Tensor | None) -> None:
    """Writes features of visits ``[V]`` to their ``rows``: those that `Matching.of_texts` found, and the user's own."""
    parts = [] if extra is None else [extra]
    if of_texts is not None:
        compressed = torch.where(new, of_texts[:, _COMPRESSED], table.described(rows, column=_COMPRESSED))
        parts = [of_texts[:, :_COMPRESSED], compressed[:, None], *parts]
    if parts:
        rows, last = last_of_each(rows)  # the last description of a sample that came twice
        table.describe(rows, torch.cat(parts, 1)[last])


def _blocks(tokens: Tokens) -> Iterator[slice]:
    """Parts of a batch of texts, each with `BLOCK` tokens that are read, or one text."""
    rows = max(1, BLOCK // max(1, min(EXCERPT, tokens.ids.shape[1])))
    return (slice(start, start + rows) for start in range(0, len(tokens.ids), rows))
