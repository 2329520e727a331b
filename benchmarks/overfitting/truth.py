"""What training on a sample took off its loss, from fits that have not seen it.

N  samples      K  fits that have not seen a sample      M  held-out samples
"""

from __future__ import annotations

import torch
from torch import Tensor


def counterfactual(own: Tensor, unseen: Tensor, held_out: Tensor, unseen_held_out: Tensor) -> Tensor:
    """``[N]`` memorization (Feldman & Zhang 2020), in the unit of the losses.

    The loss without the sample less the loss with it, corrected by what the same fits did to samples that none has
    seen: fits on half of the data are not the run's equals.

    Args:
        own: ``[N]`` losses in the run.
        unseen: ``[K, N]`` losses in fits that were trained without the sample.
        held_out: ``[M]`` losses in the run.
        unseen_held_out: ``[M]`` mean losses in the fits.
    """
    return expected(unseen) - own - (unseen_held_out.mean() - held_out.mean())


def expected(draws: Tensor) -> Tensor:
    """``[N]`` the expectation that each column of ``draws`` ``[K, N]`` is drawn from, from few draws.

    A few fits that have not seen a random label say it right by chance, and the mean over them is then far from what
    further fits would say. So means are moved to their common mean by the share of their variance that the draws'
    own variance explains (Efron & Morris 1973). Samples that differ in difficulty keep their own means.
    """
    mean = draws.mean(0)
    of_draws = draws.var(0).mean() / len(draws)
    kept = (1 - of_draws / mean.var()).clamp(min=0) if mean.var() > 0 else torch.tensor(0.0)
    return mean.mean() + kept * (mean - mean.mean())
