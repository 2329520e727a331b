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

    def describe(self, table: LossTable, ids: Tensor, new: Tensor, tokens: Tokens | None, extra: Tensor | None) -> None:
        """Counts what samples ``ids`` ``[V]`` were just trained on and writes their features to ``table``.

        ``new`` ``[V]`` bool: seen for the first time, so that the compressed size, which never changes, is due.
        ``extra`` ``[V, F]``: the user's features.
        """
        parts = []
        if tokens is not None:
            self.counts.update(tokens.ids, tokens.mask)
            parts.append(self._ngrams(tokens, table.exposures_of(ids)))
            compressed = table.described(ids, column=_COMPRESSED)
            compressed[new] = compressed_bits(tokens.ids[new], tokens.mask[new])
            parts.append(compressed[:, None])
        if extra is not None:
            parts.append(extra)
        if parts:
            table.describe(ids, torch.cat(parts, 1))

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
        return torch.cat([likelihood, self.counts.coverage(tokens.ids, tokens.mask, exposures)[:, None]], 1)
