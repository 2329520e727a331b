"""The sources of samples, data sets, licences or customers: codes in the table for labels.

V  visits      S  sources
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Labels = list[str | None]
"""A label a sample, as text; None where it has none."""
OTHER = "other"
NO_SOURCE = -1
OTHER_CODE = torch.iinfo(torch.int16).max


class SourceNames:
    """From the codes in `LossTable.source` to labels, in the order in which labels first came.

    Args:
        most: labels that have a code of their own. Samples with a later one are of the source ``other``.
    """

    def __init__(self, most: int = OTHER_CODE) -> None:
        self.most = most
        self.labels: list[str] = []
        """By code."""
        self._codes: dict[str, int] = {OTHER: OTHER_CODE}
        self._several: Tensor = torch.zeros(0, dtype=torch.bool)
        self._has_warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def with_several(self) -> int:
        """Samples that came with more than one label. The first one counts."""
        return int(self._several.sum())

    def label(self, code: int) -> str | None:
        """The label of a code; None for `NO_SOURCE`."""
        return OTHER if code == OTHER_CODE else None if code == NO_SOURCE else self.labels[code]

    def code(self, label: object) -> int | None:
        """The code of a label, or of anything with the same text; None if it has none."""
        return self._codes.get(label_text(label) or "")

    def codes(self, labels: Iterable[str | None]) -> Tensor:
        """``[V]`` int16 codes of ``labels``, which get new ones as long as there are any; `NO_SOURCE` for None."""
        return torch.tensor([NO_SOURCE if label is None else self._intern(label) for label in labels]).to(torch.int16)

    def note(self, known: Tensor, rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the table whose source is to be written, distinct, and the codes to write.

        The first label of a sample stays. Samples that come with another one are said once, with their number.

        Args:
            known: ``[V]`` codes that the table has for ``rows``.
            rows: ``[V]`` of the table, in the order of visits.
            codes: ``[V]`` that they came with now.
        """
        has_label = codes != NO_SOURCE
        samples, which = rows.unique(return_inverse=True)
        places = torch.where(has_label & (known == NO_SOURCE), torch.arange(len(rows)), len(rows))
        first = torch.full_like(samples, len(rows)).scatter_reduce(0, which, places, "amin")
        is_fresh = first < len(rows)
        fresh = codes[first[is_fresh]]
        expected = torch.full_like(samples, NO_SOURCE, dtype=codes.dtype)
        expected[is_fresh] = fresh
        expected = torch.where(known == NO_SOURCE, expected[which], known)
        self._note_several(rows[has_label & (codes != expected)])
        return samples[is_fresh], fresh

    def state_dict(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "several": self._several.nonzero().flatten()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the labels; a checkpoint of an older version has none."""
        self.labels = list(state.get("labels", []))
        self._codes = {OTHER: OTHER_CODE} | {label: code for code, label in enumerate(self.labels)}
        several = state.get("several", torch.zeros(0, dtype=torch.int64))
        self._several = torch.zeros(int(several.max()) + 1 if len(several) else 0, dtype=torch.bool)
        self._several[several] = True

    def _intern(self, label: str) -> int:
        code = self._codes.get(label)
        if code is not None:
            return code
        if len(self.labels) >= self.most:
            self._warn(
                "most",
                f"Samples have more than {self.most:,} sources, the largest number that the ledger keeps apart. "
                f"Samples of later ones count as of the source {OTHER!r}. Give coarser labels, "
                "memsink(source=lambda batch: ...).",
            )
            return OTHER_CODE
        self._codes[label] = len(self.labels)
        self.labels.append(label)
        return len(self.labels) - 1

    def _note_several(self, rows: Tensor) -> None:
        if not len(rows):
            return
        if int(rows.max()) >= len(self._several):
            more = torch.zeros(int(rows.max()) + 1024 - len(self._several), dtype=torch.bool)
            self._several = torch.cat([self._several, more])
        self._several[rows] = True
        count = self.with_several
        self._warn(
            "several",
            f"{count:,} sample{' has' if count == 1 else 's have'} come with more than one source so far: the first "
            "one counts. Equal texts are one sample; give a text that several sources share a label of its own, or "
            "use LossTracker(identity='index').",
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._has_warned:
            self._has_warned.add(kind)
            warnings.warn(message, stacklevel=4)


def label_text(label: object) -> str | None:
    """A label as text that any file can hold; None for None and NaN."""
    if hasattr(label, "item") and hasattr(label, "dtype"):
        label = label.item()
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    text = repr(bytes(label)) if isinstance(label, (bytes, bytearray)) else str(label)
    return text.encode("utf-8", "backslashreplace").decode()
