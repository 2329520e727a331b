"""When memorization set in, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_memsink.detection.verdicts import Onset


def estimate_onset(
    steps: Tensor, exposures: Tensor, evaluations: Sequence[int], *, quantile: float = 0.1, draws: int = 1000
) -> Onset | None:
    """The run's onset from the onsets of its memorized samples.

    Args:
        steps: ``[N]`` onset step of each memorized sample.
        exposures: ``[N]`` visits each had had by then.
        evaluations: steps at which the detector looked; onset lies between two of them.
        quantile: the run's onset is this quantile of the samples' (0: the first sample; .5: the median one).
        draws: bootstrap resamples over samples, from a generator of their own, always the same.

    Returns:
        The estimate with a 95 % percentile interval, or None if no sample is memorized.
    """
    if not len(steps):
        return None
    rank = math.floor(quantile * (len(steps) - 1))
    picks = _picks(len(steps), rank, draws)
    step, step_low, step_high = _interval(steps, rank, picks)
    visits, visits_low, visits_high = _interval(exposures, rank, picks)
    before = max((at for at in evaluations if at < step_low), default=0)
    return Onset(
        step=round(step),
        step_low=min(before, round(step_low)),
        step_high=round(step_high),
        exposures=visits,
        exposures_low=visits_low,
        exposures_high=visits_high,
        samples=len(steps),
    )


def _picks(samples: int, rank: int, draws: int) -> Tensor:
    """``[draws]``: which of ``samples`` in order of size has rank ``rank`` in a resample of as many.

    That of uniform numbers is distributed as Beta(rank + 1, samples - rank), so no resample has to be drawn.
    """
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([[rank + 1.0], [samples - rank]], dtype=torch.float64).expand(2, draws)
    below, above = torch._standard_gamma(shape, generator=generator)
    picks: Tensor = (below / (below + above) * samples).long().clamp(max=samples - 1)
    return picks


def _interval(values: Tensor, rank: int, picks: Tensor) -> tuple[float, float, float]:
    ordered = values.sort().values.double()
    drawn = ordered[picks]
    return float(ordered[rank]), float(drawn.quantile(0.025)), float(drawn.quantile(0.975))
