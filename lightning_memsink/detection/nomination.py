"""Which samples are looked at again: those that look memorized, and a random part of all.

N  samples known
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.detection.evaluate import Visits
from lightning_memsink.detection.verdicts import Flags, Verdict

RANDOM_SHARE = 0.25
"""Of the samples looked at, which are drawn from all."""


def nominate(visits: Visits, flags: Flags, budget: int) -> tuple[Tensor, Tensor]:
    """Rows of up to ``budget`` samples that were trained on, and whether each was drawn at random, ``[V]`` both.

    All of them, if there are no more. Otherwise a quarter is drawn uniformly, the same in every process. The others are
    first those that wait for a second flag or were flagged now by their visits; then memorized ones whose visit says
    otherwise; then those with the highest scores.
    """
    table = visits.table
    trained = ((table.exposures > 0) & (table.first_step < max(1, visits.controls.latest_step))).nonzero().flatten()
    if len(trained) <= budget:
        return trained, torch.ones(len(trained), dtype=torch.bool)
    generator = torch.Generator().manual_seed(max(0, visits.controls.latest_step))
    order = trained[torch.randperm(len(trained), generator=generator)]
    drawn, others = order.split([round(RANDOM_SHARE * budget), len(order) - round(RANDOM_SHARE * budget)])
    candidates = _by_urgency(visits, flags)
    candidates = candidates[~torch.isin(candidates, drawn)]
    filling = others[: 2 * budget]  # where few look memorized
    candidates = torch.cat([candidates, filling[~torch.isin(filling, candidates)]])[: budget - len(drawn)]
    return torch.cat([drawn, candidates]), torch.arange(len(drawn) + len(candidates)) < len(drawn)


def _by_urgency(visits: Visits, flags: Flags) -> Tensor:
    """Rows of samples that may be memorized, most urgent first."""
    waiting = (flags.verdict == Verdict.WAITING).nonzero().flatten()
    measured, rows = visits.measurement, visits.rows
    if measured is None:
        return waiting
    score = torch.where(measured.matched, (measured.gap - measured.threshold) / measured.scale, -torch.inf)
    is_memorized = flags.verdict[rows] == Verdict.MEMORIZED
    is_waiting = flags.verdict[rows] == Verdict.WAITING
    group = torch.full_like(rows, 3)
    group[measured.matched & (measured.gap > measured.threshold)] = 2
    group[is_memorized & (score > 0)] = 3
    group[is_memorized & (score <= 0)] = 1
    group[(measured.flagged & ~is_memorized) | is_waiting] = 0
    order = (-score).argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    ranked = rows[order]
    return torch.cat([waiting[~torch.isin(waiting, ranked)], ranked])
