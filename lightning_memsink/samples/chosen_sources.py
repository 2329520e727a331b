"""The sources of the samples that a callback acts on, by their labels.

V  samples      N  samples known
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.sources import NO_SOURCE, label_text


def labels_of(table: LossTable, ids: Tensor) -> list[str | None]:
    """The label of each of the samples ``ids`` ``[V]``; None where it is not known."""
    rows = table.index.find(ids)
    codes = torch.where(rows < 0, NO_SOURCE, table.source[rows.clamp(min=0)].long())
    return [table.source_names.label(code) for code in codes.tolist()]


class ChosenSources:
    """Chosen labels; they need not have come yet.

    Args:
        labels: at least one.

    Raises:
        ValueError: it is no list of labels.
    """

    def __init__(self, labels: Sequence[Any]) -> None:
        if isinstance(labels, (str, bytes)) or not isinstance(labels, Sequence) or not labels:
            hint = f"[{labels!r}]" if isinstance(labels, (str, bytes)) else '["customer-a"]'
            raise ValueError(f"sources is a list of labels with at least one, sources={hint}, but it is {labels!r}.")
        self.labels = [label_text(label) or "" for label in labels]

    def __str__(self) -> str:
        """For a report."""
        return f"of the source{'s' if len(self.labels) > 1 else ''} {', '.join(self.labels)}"

    def includes(self, table: LossTable, rows: Tensor) -> Tensor:
        """Bool ``[V]``: whether the samples in ``rows`` of the table, -1 for an unknown one, are of these sources."""
        codes = self._codes(table)
        if not codes or "source" not in table.columns:
            return torch.zeros(len(rows), dtype=torch.bool)
        return (rows >= 0) & torch.isin(table.source[rows.clamp(min=0)], torch.tensor(codes, dtype=torch.int16))

    def missing(self, table: LossTable) -> list[str]:
        """The labels that no sample has."""
        present = set(table.source.unique().tolist())
        return [label for label in self.labels if table.source_names.code(label) not in present]

    def _codes(self, table: LossTable) -> list[int]:
        codes = [table.source_names.code(label) for label in self.labels]
        return [code for code in codes if code is not None]
