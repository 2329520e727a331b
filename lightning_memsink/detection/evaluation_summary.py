"""An evaluation in numbers: what was measured, against what, and what it says of the whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_memsink.detection.matched_controls import DetectionRule, Measurement
from lightning_memsink.detection.run_statement import RunStatement, state_run
from lightning_memsink.detection.statistics import controls_for, finite_mean, robust_sd
from lightning_memsink.detection.verdicts import Evaluation, Flags, Verdict

if TYPE_CHECKING:
    from lightning_memsink.detection.evaluate import Visits


@dataclass(frozen=True)
class Judged:
    """What the verdicts of an evaluation rest on."""

    measured: Measurement | None
    """Of ``L`` samples, by a second look or by their visits; None where nothing was measured."""
    rows: Tensor
    """``[L]`` their rows."""
    is_random: Tensor
    """Bool ``[L]``: drawn from all samples, whatever their losses."""
    by_second_look: bool
    null_share: float
    level: float
    """The false-discovery rate, over the share of null hypotheses."""
    few: float
    """`too_few_together` of this evaluation."""


def summarize(
    visits: Visits, flags: Flags, judged: Judged, statement: RunStatement | None, epoch: int, rule: DetectionRule
) -> Evaluation:
    """The evaluation of the run, after the verdicts were written to ``flags``."""
    table, controls, pool, measured = visits.table, visits.controls, visits.pool, judged.measured
    null = torch.full((2,), torch.nan) if measured is None else measured.null
    band = null.nanquantile(torch.tensor([0.025, 0.975])) if len(null) < 1 << 20 else torch.full((2,), torch.nan)
    below = int((flags.verdict == Verdict.BELOW_FLOOR).sum())
    first_visits = int(pool.from_training.sum())
    by_visits = visits.measurement
    return Evaluation(
        step=controls.latest_step,
        epoch=epoch,
        controls=len(pool),
        tested=len(visits.rows),
        counts=flags.counts(),
        train_loss=finite_mean(visits.losses),
        control_loss=finite_mean(controls.latest) if len(controls) else finite_mean(pool.after),
        gap=math.nan if by_visits is None else finite_mean(by_visits.gap[by_visits.matched]),
        gap_memorized=finite_mean(flags.gap[flags.memorized].float()),
        null_low=float(band[0]),
        null_high=float(band[1]),
        null_sd=math.nan if measured is None else robust_sd(null),
        threshold=math.nan if measured is None else measured.threshold,
        p_floor=1 / (len(pool) + 1),
        alpha=rule.alpha,
        tail="none" if measured is None else "conformal",
        unit=table.unit,
        held_out=len(pool) - first_visits,
        first_visits=first_visits,
        looked=len(judged.rows) if judged.by_second_look else 0,
        by_first_visits=_by_first_visits(measured),
        controls_needed=controls_for(visits.population, judged.level, below, judged.few) if below else 0,
        null_share=judged.null_share,
        statement=statement,
    )


def _by_first_visits(measured: Measurement | None) -> float:
    """Share of the samples beyond all controls that were matched with first visits for the most part."""
    return math.nan if measured is None else finite_mean((measured.first_visits[measured.beyond] > 0.5).float())


def _p_needed(visits: Visits, judged: Judged) -> float:
    """The largest p-value at which one more sample like those flagged, or a single one, is flagged now."""
    assert judged.measured is not None
    many = max(1, int(judged.measured.flagged.sum()))
    return judged.level * min(1.0, many / judged.few) * many / max(1, visits.population)


def state(visits: Visits, judged: Judged) -> RunStatement | None:
    """What the random sample of an evaluation says of the run; None where nothing was measured."""
    measured, table = judged.measured, visits.table
    if measured is None:
        return None
    some = (judged.is_random & measured.matched).nonzero().flatten()
    rows = judged.rows[some]
    return state_run(
        measured.gap[some],
        measured.scale[some],
        measured.by_chance[some],
        measured.null,
        measured.null_scale,
        threshold=measured.threshold,
        p_needed=_p_needed(visits, judged),
        population=visits.population,
        exposures=table.exposures[rows],
        source=table.source[rows] if "source" in table.columns else None,
        label_of=table.source_names.label,
        by_second_look=judged.by_second_look,
    )
