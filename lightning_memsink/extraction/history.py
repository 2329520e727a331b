"""What could be extracted of chosen texts, evaluation by evaluation. Logs and reports read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.extraction.probe import ExtractionResults, ProbeConfig


@dataclass
class ExtractionHistory:
    """By group of texts; a group may be of texts never trained on, for comparison.

    ``rows``: a dict an evaluation, ``step`` and by group the shares ``GROUP/exact`` and ``GROUP/discoverable`` of its
    texts and the mean share of the suffix that is the ``GROUP/longest_run``.
    """

    scheme: ProbeConfig
    sizes: dict[str, int] = field(default_factory=dict)
    """Texts by group, those that are long enough to be asked for."""
    rows: list[dict[str, float]] = field(default_factory=list)
    first: dict[str, Tensor] = field(default_factory=dict)
    """By group, ``[N]``: the step at which a text first came word for word; -1 if it never did."""

    def add(self, step: int, answers: Mapping[str, ExtractionResults]) -> None:
        """One evaluation."""
        row = {"step": float(step)}
        for group, told in answers.items():
            asked = told.suffix > 0
            self.sizes[group] = int(asked.sum())
            first = self.first.setdefault(group, torch.full((len(told),), -1))
            first[told.exact & (first < 0)] = step
            if asked.any():
                row[f"{group}/exact"] = float(told.exact[asked].double().mean())
                row[f"{group}/discoverable"] = float(told.discoverable(self.scheme.n)[asked].double().mean())
                row[f"{group}/longest_run"] = float((told.longest_run / told.suffix.clamp(min=1))[asked].mean())
        self.rows.append(row)

    def series(self, step: int) -> dict[str, float]:
        """``extraction/…`` of the evaluation at ``step``; empty if there was none."""
        last = self.rows[-1] if self.rows else {"step": -1.0}
        if last["step"] != step:
            return {}
        return {f"extraction/{name.replace(' ', '_')}": value for name, value in last.items() if name != "step"}

    def words(self) -> list[str]:
        """A sentence a group."""
        scheme, last = self.scheme, self.rows[-1] if self.rows else {}
        lines = []
        for group, size in self.sizes.items():
            if not size:
                lines.append(f"{group}: no text is longer than the prefix of {scheme.prefix} tokens.")
                continue
            said, ever = round(last[f"{group}/exact"] * size), self.first[group]
            found = round(last[f"{group}/discoverable"] * size)
            since = f", the first at step {int(ever[ever >= 0].min()):,}" if (ever >= 0).any() else ""
            lines.append(
                f"{group}: {said:,} of {size:,} come word for word after {scheme.prefix} tokens{since}; {found:,} come "
                f"within {scheme.n:,} sampled tries with probability {scheme.p:g}."
            )
        return lines

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": [dict(row) for row in self.rows],
            "sizes": dict(self.sizes),
            "first": {group: steps.clone() for group, steps in self.first.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows[:] = [dict(row) for row in state["rows"]]
        self.sizes, self.first = dict(state["sizes"]), {group: steps.clone() for group, steps in state["first"].items()}
