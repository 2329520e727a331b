"""The step at which memorization began, with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_memsink.detection.verdicts import Onset


def estimate_onset(
    steps: Tensor, exposures: Tensor, evaluations: Sequence[int], *, quantile: float = 0.1, draws: int = 1000
) -> Onset | None:
    """Estimates the run's onset of memorization from the onsets of its memorized samples.

    Args:
        steps: ``[N]`` onset step of each memorized sample.
        exposures: ``[N]`` number of visits that each sample had had at its onset.
        evaluations: steps of the detector's evaluations; the onset lies between two of them.
        quantile: the run's onset is this quantile of the samples' (0: the first sample; .5: the median one).
        draws: bootstrap resamples over samples, from a separate generator with a fixed seed.

    Returns:
        The estimate with a 95 % bootstrap percentile interval (Efron 1979), or None if no sample is memorized.
    """
    if not len(steps):
        return None
    rank = math.floor(quantile * (len(steps) - 1))
    ranks = _resampled_ranks(len(steps), rank, draws)
    step, step_low, step_high = _interval(steps, rank, ranks)
    visits, visits_low, visits_high = _interval(exposures, rank, ranks)
    before = max((evaluation for evaluation in evaluations if evaluation < step_low), default=0)
    return Onset(
        step=round(step),
        step_low=min(before, round(step_low)),
        step_high=round(step_high),
        exposures=visits,
        exposures_low=visits_low,
        exposures_high=visits_high,
        samples=len(steps),
    )


def _resampled_ranks(samples: int, rank: int, draws: int) -> Tensor:
    """``[draws]`` ranks, among ``samples`` sorted values, of the value with rank ``rank`` in a bootstrap resample.

    A resample with replacement is ``floor(samples * U)`` of as many uniform numbers, whose order statistic of rank
    ``rank`` has the distribution Beta(rank + 1, samples - rank) (David & Nagaraja 2003, section 2.3). So it is drawn
    directly, as a ratio of gamma variates, instead of through whole resamples.
    """
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([[rank + 1.0], [samples - rank]], dtype=torch.float64).expand(2, draws)
    below, above = torch._standard_gamma(shape, generator=generator)
    ranks: Tensor = (below / (below + above) * samples).long().clamp(max=samples - 1)
    return ranks


def _interval(values: Tensor, rank: int, ranks: Tensor) -> tuple[float, float, float]:
    """The value with rank ``rank``, and the 2.5 % and 97.5 % quantiles of those with the resampled ``ranks``."""
    ordered = values.sort().values.double()
    drawn = ordered[ranks]
    return float(ordered[rank]), float(drawn.quantile(0.025)), float(drawn.quantile(0.975))
