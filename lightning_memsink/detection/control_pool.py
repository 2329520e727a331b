"""All controls of an evaluation: held-out samples, and first visits of training samples.

The loss of a sample at its first visit was taken before the model was trained on it. So training itself gives as many
controls as there are samples, of every kind that it has, at no cost. They are of earlier steps, and taken in training
mode; what that makes of a loss is estimated and taken off.

M  held-out samples      V  first visits      F  matching features
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.detection.feature_units import in_units, limit_of, standard_units
from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.matched_controls import MAX_REFERENCE, Controls, DetectionRule, evenly
from lightning_memsink.detection.statistics import robust_sd
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

OLDEST = 0.1
"""First visits before this share of the steps so far are no controls: the model was another one."""
MOST_FIRST_VISITS = 1 << 17
TRIMMED = 3.0
"""Median absolute deviations (as standard deviations) beyond which a first visit has no say in the trend."""


def pooled_controls(table: LossTable, controls: ControlTable, rule: DetectionRule) -> Controls:
    """The held-out samples of ``controls``, then the first visits of samples in ``table``; losses in its unit.

    Without matching features a first visit takes part only if there are too few held-out samples.
    """
    held_out = held_out_controls(controls, table)
    usable = held_out.finite()
    if table.features.shape[1] or len(usable) < rule.controls_needed:
        first = first_visit_controls(table, controls, usable, rule)
        if len(first):
            return _joined(held_out, first) if len(usable) >= rule.controls_needed else first
    return held_out


def held_out_controls(controls: ControlTable, table: LossTable) -> Controls:
    """The held-out samples as `measure_gaps` takes them. Their features are unknown where others are known of them."""
    features, width = controls.features, table.features.shape[1]
    if len(table) and features.shape[1] != width:  # batches of another kind than those of training
        features = torch.full((len(features), width), torch.nan)
    return Controls(in_unit(controls.previous, table), in_unit(controls.unknown_to_the_model, table), features)


def first_visit_controls(table: LossTable, controls: ControlTable, held_out: Controls, rule: DetectionRule) -> Controls:
    """The first visits since `OLDEST` of the steps so far, with the losses that they would have at the evaluation.

    The trend is a line in the logarithm of the step (Hestness et al. 2017: losses fall about so): of the distance of
    first visits from matched held-out samples, which also holds what training mode adds; or, without these, of the
    losses themselves, less what their features explain. Losses spread as a model comes to know its data: distances are
    stretched to those of held-out samples to one another.
    """
    now, before = max(1, controls.latest_step), max(1, controls.previous_step)
    rows = naive_rows(table, now)
    losses, features = in_unit(table.first_loss[rows].float(), table), table.features[rows].float()
    ago = (table.first_step[rows].double().clamp(min=1) / now).log()
    if len(rows) < rule.controls_needed:
        losses, features, ago = losses[:0], features[:0], ago[:0]
    elif len(held_out) >= rule.controls_needed and features.shape[1] == held_out.features.shape[1]:
        units, some = standard_units(held_out.features), evenly(torch.arange(len(held_out)), MAX_REFERENCE)
        reference, after = in_units(held_out.features[some], units), held_out.after[some]
        others, apart = nearest(reference, reference, rule.k, leave_one_out=True)
        index, distance = nearest(in_units(features, units), reference, rule.k)
        expected, matched = after[index].mean(1), distance <= limit_of(apart, rule.reach)
        level, slope = _trend(losses - expected, ago, matched)
        away = losses - (level + slope * ago).float() - expected
        theirs = after[others].mean(1) - after
        losses = expected + away * _spread_ratio(theirs, away[matched])
    else:
        design = in_units(features, standard_units(features)) if len(features) else features
        _, slope = _trend(losses, ago, torch.ones_like(ago, dtype=torch.bool), design)
        losses = losses - (slope * ago).float()
    shift = slope * float(torch.tensor(before / now).log()) if len(losses) else 0.0
    return Controls(losses + shift, losses, features, is_first_visit=torch.ones_like(losses, dtype=torch.bool))


def naive_rows(table: LossTable, step: int) -> Tensor:
    """Rows of the samples whose first loss is that of a text unknown to the model then, and not long ago.

    Texts with a near-duplicate that came earlier are left out, and all samples where training had begun before they
    were recorded.
    """
    if not table.begins_with_training or not len(table):
        return torch.zeros(0, dtype=torch.int64)
    own = torch.arange(len(table))
    is_recent = (table.first_step >= OLDEST * step) & (table.first_step <= step)
    is_alone = (table.family < 0) | (table.family == own)
    rows = (is_recent & is_alone & torch.isfinite(table.first_loss)).nonzero().flatten()
    return rows if len(rows) <= MOST_FIRST_VISITS else rows[:: -(-len(rows) // MOST_FIRST_VISITS)]


def in_unit(losses: Tensor, table: LossTable) -> Tensor:
    """Losses as they are compared: the logarithm of those that are a scale and no likelihood (``ratio``).

    Less than a millionth of the median first loss of the run counts as that much: 0 has no logarithm.
    """
    if table.unit != "ratio":
        return losses
    known = table.first_loss[torch.isfinite(table.first_loss) & (table.first_loss > 0)]
    least = 1e-6 * float(known.float().median()) if len(known) else 1e-6
    return torch.where(losses < 0, torch.nan, losses).clamp(min=least).log()


def _spread_ratio(theirs: Tensor, own: Tensor) -> float:
    """How much wider held-out losses lie around those of their neighbours than first visits do; at least 1."""
    spread = robust_sd(own) if len(own) else 0.0
    return max(1.0, robust_sd(theirs) / spread) if spread > 0 else 1.0


def _trend(values: Tensor, ago: Tensor, use: Tensor, design: Tensor | None = None) -> tuple[float, float]:
    """Level at ``ago`` = 0 and slope of a line through ``values`` ``[V]``, outliers left out; 0 and 0 from too few.

    Args:
        values: to be explained.
        ago: logarithms of shares of the steps so far.
        use: bool ``[V]``.
        design: ``[V, F]`` what else explains the values.
    """
    columns = [torch.ones_like(ago), ago, *([] if design is None else design.double().T)]
    everything, y = torch.stack(columns, 1), values.double()
    use = use & torch.isfinite(y)
    coefficients = torch.zeros(len(columns), dtype=torch.float64)
    for _ in range(3):
        if int(use.sum()) < 2 * len(columns):
            break
        x = everything[use]
        gram = x.T @ x + 1e-6 * torch.eye(x.shape[1], dtype=torch.float64)
        coefficients = torch.linalg.solve(gram, x.T @ y[use])
        left = y - everything @ coefficients
        spread = 1.4826 * left[use].abs().median()
        use = use & (left.abs() <= TRIMMED * spread + 1e-9)
    return float(coefficients[0]), float(coefficients[1])


def _joined(held_out: Controls, first: Controls) -> Controls:
    return Controls(
        torch.cat([held_out.before, first.before]),
        torch.cat([held_out.after, first.after]),
        torch.cat([held_out.features, first.features]),
        torch.cat([held_out.from_training, first.from_training]),
    )
