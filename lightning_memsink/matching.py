"""What samples and controls are matched on, before the early loss: a text's difficulty, the user's own features."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.features import TOKEN_FEATURES, NgramCounts, compressed_bits
from lightning_memsink.table import LossTable
from lightning_memsink.tokens import Tokens

_COMPRESSED = TOKEN_FEATURES.index("compressed_bits")


class Matching:
    """Running n-gram counts of the training text, and the features they give."""

    def __init__(self) -> None:
        self.counts = NgramCounts()
        self._control_bits: dict[int, float] = {}

    def count(self, tokens: Tokens) -> None:
        """What was just trained on."""
        self.counts.update(tokens.ids, tokens.mask)

    def describe(
        self, table: LossTable, rows: Tensor, new: Tensor, tokens: Tokens | None, extra: Tensor | None
    ) -> None:
        """Writes to ``table`` the features that the samples in ``rows`` ``[V]`` have by what was counted so far.

        ``new``: bool ``[V]``, samples seen for the first time; their compressed size, which never changes, is due.
        ``extra`` ``[V, F]``: the user's features.
        """
        rows, last = _last_of_each(rows)  # of a sample that came twice only the last description stands
        parts = []
        if tokens is not None:
            fresh, tokens = new[last], Tokens(tokens.ids[last], tokens.mask[last])
            parts.append(self._ngrams(tokens, table.exposures[rows]))
            compressed = table.described(rows, column=_COMPRESSED)
            compressed[fresh] = compressed_bits(tokens.ids[fresh], tokens.mask[fresh])
            parts.append(compressed[:, None])
        if extra is not None:
            parts.append(extra[last])
        if parts:
            table.describe(rows, torch.cat(parts, 1))

    def of_controls(self, ids: Tensor, tokens: Tokens | None, extra: Tensor | None) -> Tensor:
        """``[B, F]`` the same columns for samples ``ids`` ``[B]`` that were never trained on."""
        parts = []
        if tokens is not None:
            parts.append(self._ngrams(tokens, torch.zeros(len(ids))))
            new = [n for n, sample in enumerate(ids.tolist()) if sample not in self._control_bits]
            if new:
                fresh = compressed_bits(tokens.ids[new], tokens.mask[new]).tolist()
                self._control_bits.update(zip(ids[new].tolist(), fresh, strict=True))
            parts.append(torch.tensor([[self._control_bits[sample]] for sample in ids.tolist()]))
        if extra is not None:
            parts.append(extra)
        return torch.cat(parts, 1) if parts else torch.zeros(len(ids), 0)

    def _ngrams(self, tokens: Tokens, exposures: Tensor) -> Tensor:
        likelihood = self.counts.nll(tokens.ids, tokens.mask, exposures)
        return torch.cat([likelihood, self.counts.familiarity(tokens.ids, tokens.mask, exposures)[:, None]], 1)


def _last_of_each(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted unique rows and the position of the last of each."""
    unique, inverse = torch.unique(rows, return_inverse=True)
    return unique, torch.zeros_like(unique).scatter_reduce(0, inverse, torch.arange(len(rows)), "amax")
