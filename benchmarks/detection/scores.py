"""What else has been proposed to see memorization by, as pure functions.

Every score is ``[N]`` and is larger the more the sample looks memorized. Definitions: loss and its calibration by
compressed size, and min-k %, as in Carlini et al. 2021 and Shi et al. 2024; cartography: Swayamdipta et al. 2020.

    N  samples      V  visits      T  tokens
"""

from __future__ import annotations

import math

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor


def final_loss(nll: Tensor) -> Tensor:
    """``nll`` ``[N, T]``: a low mean."""
    return -nll.mean(1)


def loss_drop(nll: Tensor, first_loss: Tensor) -> Tensor:
    """How far the loss fell since the first visit, ``first_loss`` ``[N]``."""
    return first_loss - nll.mean(1)


def compressed_ratio(nll: Tensor, compressed_bits: Tensor) -> Tensor:
    """A low loss for its compressed size; both per token."""
    return -nll.mean(1) / compressed_bits


def min_k(nll: Tensor, share: float = 0.2) -> Tensor:
    """A low mean of the ``share`` of tokens that are least likely.

    >>> min_k(torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]]), share=0.4)
    tensor([-6.5000])
    """
    return -nll.topk(max(1, round(share * nll.shape[1])), dim=1).values.mean(1)


def cartography(ids: Tensor, probability: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Confidence and variability: mean and standard deviation over the visits ``[V]`` of the true tokens' probability.

    NaN for a sample that was never visited.
    """
    visits = torch.zeros(samples, dtype=torch.float64).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))
    mean = torch.zeros_like(visits).index_add_(0, ids, probability.double()) / visits
    square = torch.zeros_like(visits).index_add_(0, ids, (probability.double() - mean[ids]).square()) / visits
    return mean.float(), square.sqrt().float()


def counterfactual(main: Tensor, twin: Tensor, main_controls: Tensor, twin_controls: Tensor) -> Tensor:
    """``[N]`` counterfactual memorization of samples of one kind, in nats per token.

    What seeing the samples took off their loss (``main`` against ``twin``, trained without them; ``[N]``), less
    what the run took off the loss of controls ``[M]`` of the same kind, which neither run has seen.
    """
    return (twin - main) - (twin_controls - main_controls).mean()


def auroc(score: Tensor, positive: Tensor, negative: Tensor) -> float:
    """How often a positive scores above a negative; masks ``[N]``. A sample without a score is the least suspicious."""
    if not positive.any() or not negative.any():
        return math.nan
    tested = positive | negative
    lowest = torch.where(torch.isfinite(score), score, torch.inf).min() - 1
    return float(roc_auc_score(positive[tested], torch.where(torch.isfinite(score), score, lowest)[tested]))


def first_time(happened: Tensor) -> Tensor:
    """``[N]`` the first evaluation at which ``happened`` ``[E, N]``; E if it never did.

    >>> first_time(torch.tensor([[True, False, False], [False, True, False]]))
    tensor([0, 1, 2])
    """
    return torch.where(happened.any(0), happened.int().argmax(0), len(happened))
