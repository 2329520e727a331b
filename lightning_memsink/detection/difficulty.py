"""Features that samples and controls are matched on: text difficulty, the user's features."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.detection.ngram_features import TOKEN_FEATURES, NgramCounts, Ngrams, compressed_bits
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.tokens import Tokens
from lightning_memsink.samples.unique import last_of_each

_COMPRESSED = TOKEN_FEATURES.index("compressed_bits")


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
        parts = []
        if tokens is not None:
            text = self.counts.look_up(tokens.ids, tokens.mask)
            if trained_on:
                self.counts.update(text)
            compressed = table.described(rows, column=_COMPRESSED)
            compressed[new] = compressed_bits(tokens.ids[new], tokens.mask[new])
            parts += [self._likelihood(text, table.exposures[rows]), compressed[:, None]]
        if extra is not None:
            parts.append(extra)
        if parts:
            rows, last = last_of_each(rows)  # the last description of a sample that came twice
            table.describe(rows, torch.cat(parts, 1)[last])

    def of_controls(self, ids: Tensor, tokens: Tokens | None, extra: Tensor | None) -> Tensor:
        """``[B, F]`` the same features of controls ``ids`` ``[B]``, which are never trained on."""
        parts = []
        if tokens is not None:
            text = self.counts.look_up(tokens.ids, tokens.mask)
            parts.append(self._likelihood(text, torch.zeros(len(ids))))
            new = [n for n, control in enumerate(ids.tolist()) if control not in self._control_bits]
            if new:
                new_bits = compressed_bits(tokens.ids[new], tokens.mask[new]).tolist()
                self._control_bits.update(zip(ids[new].tolist(), new_bits, strict=True))
            parts.append(torch.tensor([[self._control_bits[control]] for control in ids.tolist()]))
        if extra is not None:
            parts.append(extra)
        return torch.cat(parts, 1) if parts else torch.zeros(len(ids), 0)

    def _likelihood(self, text: Ngrams, exposures: Tensor) -> Tensor:
        return torch.cat([self.counts.nll(text, exposures), self.counts.familiarity(text, exposures)[:, None]], 1)
