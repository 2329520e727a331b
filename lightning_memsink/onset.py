"""When memorization set in, with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_memsink.verdicts import Onset


def estimate_onset(
    steps: Tensor, exposures: Tensor, evaluations: Sequence[int], *, quantile: float = 0.1, draws: int = 1000
) -> Onset | None:
    """The run's onset from the onsets of its memorized samples.

    Args:
        steps: ``[N]`` onset step of each memorized sample.
        exposures: ``[N]`` visits each had had by then.
        evaluations: steps at which the detector looked; onset lies between two of them.
        quantile: the run's onset is this quantile of the samples' (0: the first sample; .5: the median one).
        draws: bootstrap resamples over samples. They come from a generator of their own, always the same.

    Returns:
        The estimate with a 95 % percentile interval, or None if no sample is memorized.
    """
    if not len(steps):
        return None
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(steps), (draws, len(steps)), generator=generator)
    step, step_low, step_high = _interval(steps.double(), pick, quantile)
    visits, visits_low, visits_high = _interval(exposures.double(), pick, quantile)
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


def _interval(values: Tensor, pick: Tensor, quantile: float) -> tuple[float, float, float]:
    drawn = values[pick].quantile(quantile, dim=1, interpolation="lower")
    at = values.quantile(quantile, interpolation="lower")
    return float(at), float(drawn.quantile(0.025)), float(drawn.quantile(0.975))
