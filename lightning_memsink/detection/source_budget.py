"""Budgets: the largest share of a source's samples that may be memorized, and whether it is crossed.

S  sources
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memsink.detection.proportions import binomial_tail
from lightning_memsink.detection.source_shares import source_shares
from lightning_memsink.detection.source_summary import SourceSummary, summarize_sources
from lightning_memsink.detection.verdicts import Flags
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.sources import NO_SOURCE, OTHER, OTHER_CODE, label_text

DEFAULT = "default"
"""The name of the budget of all sources without one of their own, and of samples without a source."""
UNLABELLED = "no source"
LEVEL = 0.05
"""Largest probability that false flags alone explain what is above a budget, where it counts as crossed."""
State = Literal["inside", "crossed", "undecided"]


@dataclass(frozen=True)
class BudgetRow:
    """A source and its budget, at one evaluation."""

    source: str
    budget: float
    state: State
    reason: str
    """Why it is undecided; empty otherwise."""
    share: float = torch.nan
    """Memorized samples as a share of those measured; NaN where none was."""
    share_low: float = torch.nan
    share_high: float = torch.nan
    """What the share can be, by the gaps of all its measured samples (`source_shares`), flagged or not: it is below the
    lower end in no evaluation and of no source with 95 %, and above the higher end in 2.5 % of them at most."""
    memorized: int = 0
    measured: int = 0
    samples: int = 0
    crossed_at: int | None = None
    """Optimizer step of the first evaluation that found it crossed."""


class SourceBudget:
    """Watches the budgets of sources over evaluations.

    A budget is crossed where more of the source's measured samples are memorized than it allows, by a number that false
    flags don't explain. They come at most at the rate at which controls, which were never trained on, pass the
    threshold of a flag, and at most at the false-discovery rate; the number above the budget must be one that has a
    probability of at most `LEVEL` under the smaller of the two. So a single false flag in a large source is no alarm,
    and a source of two samples that are both memorized is one. It is crossed, too, where the gaps of all its samples
    leave no doubt that more of them are memorized, although few or none are flagged by themselves (`source_shares`).

    A source is undecided where the share is above the budget by no more than false flags explain, where its gaps say
    that it is probably above, and where fewer than half of its repeated samples were measured.

    Args:
        budget: by source, the largest share of its samples in 0…1 that may be memorized; ``default`` is that of all
            others.

    Raises:
        ValueError: a share is no number from 0 to 1, or there is none.
    """

    def __init__(self, budget: Mapping[Any, float]) -> None:
        if not isinstance(budget, Mapping) or not budget:
            raise ValueError(
                f'budget is a share for each source, budget={{"customer-a": 0.001, "default": 0.01}}, but it is '
                f"{budget!r}."
            )
        self.shares: dict[str, float] = {}
        for source, share in budget.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(
                    f"budget[{source!r}] is the largest share of its samples that may be memorized, from 0 to 1 "
                    f"(0.001: one in a thousand), but it is {share!r}."
                )
            self.shares[label_text(source) or ""] = float(share)
        self.crossed_at: dict[str, int] = {}
        """By source, the step of the first evaluation at which its budget was crossed."""

    def update(self, table: LossTable, flags: Flags, summary: SourceSummary | None = None) -> list[BudgetRow]:
        """The sources whose budget the last evaluation finds crossed for the first time."""
        summary = summarize_sources(table, flags) if summary is None else summary
        rows = self._rows(table, flags, summary)
        new = [row for row in rows if row.state == "crossed" and row.source not in self.crossed_at]
        step = flags.evaluations[-1].step if flags.evaluations else 0
        self.crossed_at |= {row.source: step for row in new}
        return [replace(row, crossed_at=step) for row in new]

    def rows(self, table: LossTable, flags: Flags, summary: SourceSummary | None = None) -> list[BudgetRow]:
        """All sources with a budget at the last evaluation, crossed ones first; then names that no sample has."""
        summary = summarize_sources(table, flags) if summary is None else summary
        rows = self._rows(table, flags, summary)
        rows += [
            BudgetRow(name, self.shares[name], "undecided", "no sample of this source was seen")
            for name in self.unknown(table, summary)
        ]
        order = ("crossed", "undecided", "inside")
        return sorted(rows, key=lambda row: order.index(row.state))

    def unknown(self, table: LossTable, summary: SourceSummary) -> list[str]:
        """Names in the budget that no sample has."""
        present = set(self._budgets(table, summary)[0])
        return [name for name in self.shares if name not in present and name != DEFAULT]

    def state_dict(self) -> dict[str, Any]:
        return {"crossed_at": dict(self.crossed_at)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.crossed_at = dict(state.get("crossed_at", {}))

    def _budgets(self, table: LossTable, summary: SourceSummary) -> tuple[list[str], Tensor]:
        """Labels of the sources of a summary, and the budget ``[S]`` of each; NaN without one."""
        labels = [*table.source_names.labels]
        special = {NO_SOURCE: UNLABELLED, OTHER_CODE: OTHER}
        names = [special[code] if code in special else labels[code] for code in summary.codes.tolist()]
        default = self.shares.get(DEFAULT, torch.nan)
        return names, torch.tensor([self.shares.get(name, default) for name in names], dtype=torch.float64)

    def _rows(self, table: LossTable, flags: Flags, summary: SourceSummary) -> list[BudgetRow]:
        rate = _false_flag_rate(summary, flags)
        names, budgets = self._budgets(table, summary)
        has_budget = ~torch.isnan(budgets)
        names = [name for name, has in zip(names, has_budget.tolist(), strict=True) if has]
        summary, budgets = summary.only(has_budget), budgets[has_budget]
        looks = max(1, len(flags.evaluations))
        tail = LEVEL / max(1, len(summary)) / (looks * (looks + 1))  # adds up to LEVEL over sources and evaluations
        by_gaps, low, high = source_shares(table, flags, summary.codes, tail)
        flagged = summary.share.nan_to_num(0.0)
        is_crossed = (_is_crossed(summary, budgets, rate) | (low > budgets)).tolist()
        is_above = (summary.memorized > _allowed(summary, budgets)).tolist()
        may_be_above = (by_gaps > budgets).tolist()
        columns = {
            "share": summary.share,
            "share_low": low,
            "share_high": torch.maximum(high, flagged),
            **{name: getattr(summary, name) for name in ("memorized", "measured", "samples")},
        }
        rows = []
        for place, name in enumerate(names):
            state: State = "crossed" if is_crossed[place] else "inside"
            reason = "" if is_crossed[place] else _undecided(summary, place, is_above[place], may_be_above[place])
            numbers = {key: column[place].item() for key, column in columns.items()}
            state = "undecided" if reason else state
            rows.append(
                BudgetRow(name, float(budgets[place]), state, reason, **numbers, crossed_at=self.crossed_at.get(name))
            )
        return rows


def budget_numbers(rows: list[BudgetRow]) -> list[dict[str, Any]]:
    """The rows as plain values, for the report's JSON."""
    return [asdict(row) for row in rows]


def _allowed(summary: SourceSummary, budgets: Tensor) -> Tensor:
    """``[S]`` how many of the measured samples may be memorized."""
    return (budgets * summary.measured + 1e-9).floor()


def _is_crossed(summary: SourceSummary, budgets: Tensor, rate: float) -> Tensor:
    """Bool ``[S]``; False without a budget. ``rate``: of false flags."""
    allowed = _allowed(summary, budgets)
    crossed = torch.zeros(len(summary), dtype=torch.bool)
    above = summary.memorized > allowed
    others = summary.measured - allowed
    tail = binomial_tail((summary.memorized - allowed)[above], others[above], rate)
    crossed[above] = tail <= LEVEL
    return crossed


def _false_flag_rate(summary: SourceSummary, flags: Flags) -> float:
    """An upper estimate of the probability that a sample that is not memorized is flagged all the same."""
    if not flags.evaluations:
        return 1.0
    last = flags.evaluations[-1]
    null = flags.null_gaps[torch.isfinite(flags.null_gaps)]
    of_controls = (1 + int((null >= last.threshold).sum())) / (1 + len(null))
    flagged, measured = int(summary.memorized.sum()), int(summary.measured.sum())
    return min(1.0, of_controls, last.alpha * flagged / max(1, measured - flagged))


def _undecided(summary: SourceSummary, place: int, is_above: bool, may_be_above: bool) -> str:
    measured, repeated = int(summary.measured[place]), int(summary.repeated[place])
    if not measured:
        return "no sample of it was measured" if repeated else "its samples were seen once, which can't be judged"
    if 2 * measured < repeated:
        return f"only {measured:,} of {repeated:,} repeated samples were measured"
    if is_above:
        return "its share is above the budget, by no more than false flags explain"
    return "more of its samples may be memorized than are flagged: their gaps say so together" if may_be_above else ""
