"""Notices that one id comes with different content in the same run, so that it is not the id of a sample.

B  samples in a batch      K  elements kept of a sample
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_memsink.samples.batch_rows import Axes, rows_of
from lightning_memsink.samples.tokens import Tokens, tokens_of

_TOKENS, _NUMBERS, _LABELS = 32, 16, 4
_CONTENTS = 16


class Contents(NamedTuple):
    """``rows`` ``[B, K]``: a little of each sample's content: tokens spread over its text, labels, or floats."""

    rows: Tensor
    kind: Literal["tokens", "labels", "floats"]

    @staticmethod
    def of(batch: Any, size: int, axes: Axes | None = None) -> Contents | None:
        """Of a batch in host memory; None if it has none of these.

        Text is what names a sample best. Else a few integers a sample are its labels, which random views of an image
        leave alone.
        """
        text = tokens_of(batch, [entry for entry in axes if isinstance(entry, int)] if axes else None)
        if text is not None and len(text.ids) == size and text.ids.numel():
            return Contents(_spread(text), "tokens")
        owned = [tensor for tensor, owners in rows_of(batch, size, axes) if owners.shape[:1] == (size,)]
        per_sample = [tensor.detach().reshape(size, -1) for tensor in owned if tensor.numel()]
        labels = [rows for rows in per_sample if not _is_real(rows) and rows.shape[1] <= _LABELS]
        if labels:
            return Contents(torch.cat([rows.long() for rows in labels], 1), "labels")
        floats = [rows for rows in per_sample if rows.is_floating_point()]
        if floats:
            rows = floats[0]
            return Contents(rows[:, :: max(1, rows.shape[1] // _NUMBERS)].double().nan_to_num(), "floats")
        return None


class IdContents:
    """The contents of the first ``many`` ids of a run, compared as the ids come again.

    Half of a text must differ: masked language modelling changes less. Where floats change for nearly every id that
    comes again, they are random views of the samples, and nothing is said.
    """

    def __init__(self, many: int = 256, enough: int = 4, most: int = 512) -> None:
        self.many = many
        self.enough = enough
        self._left = most  # comparisons of ids that came again; a run whose samples stay the same needs no more
        self._known: dict[int, set[tuple[float, ...]]] = {}
        self._first: dict[int, tuple[float, ...]] = {}
        self._came_again: set[int] = set()
        self._changed: set[int] = set()
        self._is_said = False

    def wants(self, ids: Tensor | None) -> bool:
        """Whether a batch with these ids would be compared; a batch whose ids aren't known yet may be."""
        if self._is_said or self._left <= 0:
            return False
        return ids is None or len(self._first) < self.many or not self._first.keys().isdisjoint(ids.tolist())

    def check(self, ids: Tensor, contents: Contents) -> str | None:
        """Compares a batch. Returns what was found, once: "4 of 5 sample ids that came again ..."; else None."""
        if self._is_said:
            return None
        wanted = [n for n, id in enumerate(ids.tolist()) if id in self._first or len(self._first) < self.many]
        for n, row in zip(wanted, contents.rows[wanted].tolist(), strict=True):
            self._compare(int(ids[n]), tuple(row), contents.kind)
        changed, came_again = len(self._changed), len(self._came_again)
        if changed < self.enough or (contents.kind == "floats" and (2 * changed > came_again or came_again < 16)):
            return None
        if contents.kind != "floats" and 8 * changed < came_again:
            return None
        self._is_said = True
        example = max(self._changed, key=lambda id: len(self._known[id]))
        many = len(self._known[example])
        more = "at least " if many >= _CONTENTS else ""
        return (
            f"{changed} of {came_again} sample ids that came again had other content: id {example} has come with "
            f"{more}{many} contents"
        )

    def _compare(self, id: int, row: tuple[float, ...], kind: str) -> None:
        first = self._first.get(id)
        if first is None:
            if len(self._first) < self.many:
                self._first[id], self._known[id] = row, {row}
            return
        self._came_again.add(id)
        self._left -= 1
        known = self._known[id]
        if row not in known and all(_differ(other, row, kind) for other in known):
            self._changed.add(id)
            if len(known) < _CONTENTS:
                known.add(row)


def _differ(first: Sequence[float], second: Sequence[float], kind: str) -> bool:
    if len(first) != len(second):  # padded to another width
        return False
    different = sum(one != other for one, other in zip(first, second, strict=True))
    return 2 * different > len(first) if kind == "tokens" else different > 0


def _spread(text: Tokens) -> Tensor:
    """``[B, K]`` tokens at even distances of each text, without its padding before or after."""
    lengths = text.mask.sum(1, keepdim=True)
    start = text.mask.int().argmax(1, keepdim=True)
    places = start + (torch.arange(_TOKENS) * lengths).div(_TOKENS, rounding_mode="floor")
    return text.ids.gather(1, places.clamp(max=text.ids.shape[1] - 1))


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
