"""Significance for good: the false-discovery rate of actions that are never taken back, over all looks of a run.

A verdict is of its look: what one look flags by chance, another withdraws. An action that stays acts on every sample
that any look flags, so it collects the chance findings of all.

N  samples known
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.detection.statistics import benjamini_hochberg, exposure_weights
from lightning_memsink.detection.verdicts import Flags
from lightning_memsink.samples.loss_table import LossTable

ROUNDING = 2.0**-8
"""Largest error of a p-value that is kept in bfloat16, as a share of it."""


def alpha_of_look(look: int, alpha: float) -> float:
    """The false-discovery rate that actions which stay may spend at the ``look``-th look, counted from 1.

    Each time that the number of looks doubles, ``alpha / (j (j + 1))`` is spent at the j-th doubling; that sums to
    ``alpha``, however many looks follow. The looks of one doubling share a level and not a budget: what one look
    flags is mostly what the next one does, among the same controls. The first look
    has no share, because a verdict takes two.

    >>> [round(alpha_of_look(look, 0.06), 4) for look in (1, 2, 3, 4, 8, 16)]
    [0.0, 0.03, 0.03, 0.01, 0.005, 0.003]
    """
    doubling = look.bit_length() - 1
    return alpha / (doubling * (doubling + 1)) if doubling > 0 else 0.0


def significant_for_good(table: LossTable, flags: Flags) -> Tensor:
    """Bool ``[N]``: samples that are memorized, and so by a p-value of the last look that passes at `alpha_of_look`.

    The procedure is the detector's own: Benjamini and Hochberg's over all samples that were trained on, with its
    weights and the estimated share of those that are not memorized. A sample that this look did not measure has p = 1.
    """
    found = torch.zeros(len(flags.verdict), dtype=torch.bool)
    if not flags.evaluations:
        return found
    last = flags.evaluations[-1]
    level = min(1.0, alpha_of_look(len(flags.evaluations), last.alpha) / last.null_share)
    rows = _measured(table, flags).nonzero().flatten()
    trained = table.exposures[table.exposures > 0]
    p = flags.p[rows].double() * (1 + ROUNDING)
    weighted = p / exposure_weights(table.exposures[rows], trained)
    found[rows] = benjamini_hochberg(weighted, level, len(trained))
    return found & flags.memorized


def _measured(table: LossTable, flags: Flags) -> Tensor:
    """Bool ``[N]``: samples whose p-value is of the last evaluation."""
    known = torch.isfinite(flags.p)
    if flags.evaluations[-1].looked:
        return known & torch.zeros_like(known).index_fill(0, flags.looked, True)
    before = flags.evaluations[-2].step if len(flags.evaluations) > 1 else -1
    return known & (table.last_step[: len(known)] >= before)
