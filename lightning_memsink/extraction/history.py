"""The history of extraction results over training, which loggers and reports read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.extraction.probe import ExtractionResults, ProbeConfig


@dataclass
class ExtractionHistory:
    """Extraction results by group of texts; a group may hold texts never trained on, for comparison.

    ``rows`` has a dict per evaluation: ``step``, and for each group the shares of its texts that are extracted
    (``GROUP/exact``, ``GROUP/discoverable``) and the mean share of the suffix in the longest run
    (``GROUP/longest_run``).
    """

    config: ProbeConfig
    sizes: dict[str, int] = field(default_factory=dict)
    """By group, the number of texts that are longer than the prefix."""
    rows: list[dict[str, float]] = field(default_factory=list)
    first: dict[str, Tensor] = field(default_factory=dict)
    """By group, ``[N]``: the step at which a text was first extracted word for word; -1 if it never was."""

    def add(self, step: int, results: Mapping[str, ExtractionResults]) -> None:
        """Adds the results of one evaluation, by group."""
        row = {"step": float(step)}
        for group, of_group in results.items():
            long = of_group.suffix > 0
            self.sizes[group] = int(long.sum())
            first = self.first.setdefault(group, torch.full((len(of_group),), -1))
            first[of_group.exact & (first < 0)] = step
            if long.any():
                run_share = of_group.longest_run / of_group.suffix.clamp(min=1)
                row[f"{group}/exact"] = float(of_group.exact[long].double().mean())
                row[f"{group}/discoverable"] = float(of_group.discoverable(self.config.n)[long].double().mean())
                row[f"{group}/longest_run"] = float(run_share[long].mean())
        self.rows.append(row)

    def series(self, step: int) -> dict[str, float]:
        """The metrics ``extraction/…`` of the evaluation at ``step``; empty if there was none."""
        last = self.rows[-1] if self.rows else {"step": -1.0}
        if last["step"] != step:
            return {}
        return {f"extraction/{name.replace(' ', '_')}": value for name, value in last.items() if name != "step"}

    def words(self) -> list[str]:
        """One sentence per group about the last evaluation."""
        config, last = self.config, self.rows[-1] if self.rows else {}
        lines = []
        for group, size in self.sizes.items():
            if not size:
                lines.append(f"{group}: no text is longer than the prefix of {config.prefix} tokens.")
                continue
            exact, first = round(last[f"{group}/exact"] * size), self.first[group]
            discoverable = round(last[f"{group}/discoverable"] * size)
            since = f", the first at step {int(first[first >= 0].min()):,}" if (first >= 0).any() else ""
            lines.append(
                f"{group}: {exact:,} of {size:,} come word for word after {config.prefix} tokens{since}; "
                f"{discoverable:,} come within {config.n:,} sampled tries with probability {config.p:g}."
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
