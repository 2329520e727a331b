"""Verdicts on families of near-duplicate texts: is the text that they are variants of known by heart?

The other variants say nearly all of one of them: a model trained without it knows it as well, so its own memorization
is near zero. What the family's texts have in common is memorized all the same. It shows in the losses of its texts
against controls that are as difficult *without* the family (`detection.family_features`).

N  texts of families      G  families
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.detection.control_pool import pooled_controls
from lightning_memsink.detection.evaluate import samples_of
from lightning_memsink.detection.matched_controls import DetectionRule, MatchedControls, Measurement
from lightning_memsink.detection.statistics import benjamini_hochberg
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

FeaturesOf = Callable[[LossTable, Tensor, Tensor], tuple[Tensor, Tensor]]
"""As `FamilyRecord.features`."""


@dataclass(frozen=True)
class FamilyVerdicts:
    """The families of two texts or more, in the order of their lowest rows. Gaps in nats (per token for tokens)."""

    family: Tensor
    """``[G]`` int64: the lowest row of the table of a family's texts."""
    texts: Tensor
    """``[G]`` int64: number of texts."""
    exposures: Tensor
    """``[G]`` int64: visits of all its texts."""
    measured: Tensor
    """``[G]`` int64: texts that were compared with controls when the family was measured last."""
    gap: Tensor
    """``[G]`` float32: mean over them, each weighted by its tokens; NaN until measured."""
    p: Tensor
    """``[G]`` float32: twice the mean of their p-values, at most 1; NaN until measured."""
    streak: Tensor
    """``[G]`` int64: evaluations in a row that flagged it."""
    memorized: Tensor
    """Bool ``[G]``: flagged at as many evaluations in a row as the detector asks for."""
    onset_step: Tensor
    """``[G]`` int64: step of the evaluation at which it was flagged first; -1 if it is not flagged."""

    def __len__(self) -> int:
        return len(self.family)

    @staticmethod
    def none() -> FamilyVerdicts:
        return FamilyVerdicts.of(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))

    @staticmethod
    def of(family: Tensor, exposures: Tensor) -> FamilyVerdicts:
        """No verdicts yet. ``family``, ``exposures`` ``[N]`` of all texts known."""
        sizes = torch.bincount(family.long(), minlength=len(family))
        found = (sizes > 1).nonzero().flatten()
        in_all = torch.bincount(family.long(), exposures.double(), minlength=len(family)).long()
        zeros, unknown = torch.zeros_like(found), torch.full(found.shape, torch.nan)
        return FamilyVerdicts(
            found, sizes[found], in_all[found], zeros, unknown, unknown, zeros, zeros > 0, torch.full_like(found, -1)
        )

    def word(self, at: int) -> str:
        """``memorized``, ``not memorized`` or ``undecided``: not compared yet, or flagged too few times in a row."""
        if not bool(self.measured[at]) or (bool(self.streak[at]) and not bool(self.memorized[at])):
            return "undecided"
        return "memorized" if bool(self.memorized[at]) else "not memorized"

    def state_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def from_state(state: dict[str, Any]) -> FamilyVerdicts:
        return FamilyVerdicts(**{name: column.clone() for name, column in state.items()})


def judge_families(
    table: LossTable,
    controls: ControlTable,
    family: Tensor,
    features_of: FeaturesOf,
    before: FamilyVerdicts,
    rule: DetectionRule,
    consecutive: int,
    since: int,
    matched: MatchedControls | None = None,
) -> FamilyVerdicts:
    """Measures the families with texts visited since an evaluation; the others keep their verdicts.

    A text is measured by its last loss, if that was taken after a training step on any text of its family.

    Args:
        table: of the losses.
        controls: of the held-out samples.
        family: ``[N]`` the family of each text: the lowest row of it.
        features_of: matching features without the family's own counts.
        before: the verdicts so far.
        rule: when a gap is flagged.
        consecutive: evaluations in a row that must flag a family before it is memorized.
        since: step of the evaluation before.
        matched: all controls, where they are prepared already.
    """
    found = _carried(before, FamilyVerdicts.of(family, table.exposures), family)
    if matched is None:
        pool = pooled_controls(table, controls, rule).finite()
        matched = MatchedControls(pool, rule, table.unit) if len(pool) >= rule.controls_needed else None
    if matched is None or not len(found):
        return found
    number = torch.full((len(family),), -1)
    number[found.family] = torch.arange(len(found))
    rows = (number[family.long()] >= 0).nonzero().flatten()
    groups = number[family[rows].long()]
    visited = torch.isfinite(table.last_loss[rows])
    begun = _lowest(table.first_step[rows[visited]].long(), groups[visited], len(found))
    visited &= (table.last_step[rows].long() > begun[groups]) & (table.last_step[rows] >= since)
    due = torch.zeros(len(found), dtype=torch.bool)
    due[groups[visited]] = True
    rows, groups, visited = rows[due[groups]], groups[due[groups]], visited[due[groups]]
    with_text, features = features_of(table, rows, groups)
    at = torch.searchsorted(rows, with_text)
    features, at = features[visited[at]], at[visited[at]]
    rows, groups = rows[at], groups[at]
    if not len(rows):
        return found
    samples = replace(samples_of(table, controls, rows), features=features)
    measurement = matched.measure(samples)
    return _updated(found, measurement, groups, table.elements[rows].float(), rule, consecutive, controls.latest_step)


def family_gaps(measurement: Measurement, groups: Tensor, elements: Tensor, count: int) -> tuple[Tensor, ...]:
    """Number of matched texts, mean gap by elements, and p-value ``[G]`` of families, NaN without a matched text.

    The mean of p-values is no p-value, but twice the mean is one, however they depend on each other (Vovk & Wang 2020,
    "Combining p-values via averaging", Biometrika 107).

    Args:
        measurement: of ``N`` texts.
        groups: ``[N]`` number of the family of each.
        elements: ``[N]`` tokens of each loss.
        count: G.
    """
    kept = measurement.matched & torch.isfinite(measurement.gap)
    groups, gap, p = groups[kept], measurement.gap[kept].double(), measurement.p[kept].double()
    weight = elements[kept].double().clamp(min=1)
    texts = torch.bincount(groups, minlength=count)
    gaps = torch.bincount(groups, weight * gap, minlength=count) / torch.bincount(groups, weight, minlength=count)
    merged = 2 * torch.bincount(groups, p, minlength=count) / texts
    return texts, gaps.float(), torch.where(texts == 1, merged / 2, merged).clamp(max=1).float()


def _updated(
    found: FamilyVerdicts,
    measurement: Measurement,
    groups: Tensor,
    elements: Tensor,
    rule: DetectionRule,
    consecutive: int,
    step: int,
) -> FamilyVerdicts:
    texts, gap, p = family_gaps(measurement, groups, elements, len(found))
    due = texts > 0
    flagged = torch.zeros_like(due)
    flagged[due] = benjamini_hochberg(p[due], rule.alpha)
    streak = torch.where(due, torch.where(flagged, found.streak + 1, 0), found.streak)
    onset = torch.where(flagged & (found.streak == 0), step, found.onset_step)
    return replace(
        found,
        measured=torch.where(due, texts, found.measured),
        gap=torch.where(due, gap, found.gap),
        p=torch.where(due, p, found.p),
        streak=streak,
        memorized=streak >= consecutive,
        onset_step=torch.where(streak > 0, onset, -1),
    )


def _carried(before: FamilyVerdicts, now: FamilyVerdicts, family: Tensor) -> FamilyVerdicts:
    """``now`` with the verdicts of ``before``. Families that have become one have the strongest of theirs."""
    if not len(before) or not len(now):
        return now
    number = torch.full((len(family),), -1)
    number[now.family] = torch.arange(len(now))
    at = number[family[before.family].long()]
    columns = {field.name: getattr(now, field.name).clone() for field in fields(now)}
    for n in before.streak.argsort(stable=True).tolist():
        if at[n] >= 0:
            for name in ("measured", "gap", "p", "streak", "memorized", "onset_step"):
                columns[name][at[n]] = getattr(before, name)[n]
    return FamilyVerdicts(**columns)


def _lowest(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """``[G]`` the lowest of each group's values ``[N]``."""
    return torch.full((count,), torch.iinfo(torch.int64).max).scatter_reduce(0, groups, values, "amin")
