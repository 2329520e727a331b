"""What each sample's gradient is multiplied by, and what that leaves out.

B  samples in a batch      L  latched ids
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lightning_memsink.mitigation.set_point import MARGIN


@dataclass(frozen=True)
class SampleWeights:
    """Weights on the gradients of one batch, and the counts that the intervention log gets of them."""

    weights: Tensor
    """``[B]`` in 0…1, on any device; 0 leaves a sample's gradient out."""
    shares: Tensor | None = None
    """``[B]`` each sample's share of the loss's coefficients; None where all weights are 1."""
    unmatched: int = 0
    """Known samples without a matched control."""
    unknown: int = 0
    """Samples on their first visit, whose features are not recorded yet."""

    def left_out(self) -> tuple[int, float]:
        """How many samples weigh less than 1, and the share of the loss's coefficients left out (0 if that is not
        finite). Of tensors in host memory: elsewhere it would wait."""
        weights = self.weights.tolist()
        shares = weights if self.shares is None else self.shares.tolist()
        left_out = [(1 - weight) * share for weight, share in zip(weights, shares, strict=True) if weight != 1]
        total = sum(left_out)
        return len(left_out), total if isfinite(total) else 0.0


def latch(latched: Tensor, flagged: Tensor) -> Tensor:
    """Sorted ids ``[L]``: those of ``latched`` and those of ``flagged``, each once."""
    ids: Tensor = torch.unique(torch.cat([latched, flagged]))
    return ids


def is_latched(ids: Tensor, latched: Tensor) -> Tensor:
    """Bool ``[B]``: which ``ids`` are among ``latched``, sorted ids ``[L]``.

    By binary search: ``torch.isin`` would go through all of ``latched`` at every step.
    """
    if not len(latched):
        return torch.zeros_like(ids, dtype=torch.bool)
    return latched[torch.searchsorted(latched, ids).clamp(max=len(latched) - 1)] == ids


def latched_weights(ids: Tensor, latched: Tensor, weight: float) -> Tensor:
    """``[B]``: ``weight`` for each of ``ids`` that is among ``latched``, 1 for the others."""
    weights = torch.ones(len(ids))
    weights[is_latched(ids, latched)] = weight
    return weights


def described(mode: str, at: float | str, weight: float, reserved: float) -> str:
    """What a `SampleGradientMask` with these arguments does, as a predicate."""
    farther = f"{MARGIN:g} nats further below their matched controls than samples usually are"
    predicates = {
        "hold": f"leaves out the gradient of samples more than {farther}"
        if at == "auto"
        else f"leaves out the gradient of samples more than {at:g} nats below their matched controls",
        "skip": "leaves out the gradient of samples from the moment they are flagged",
        "attenuate": f"multiplies the gradient of samples by {weight:g} from the moment they are flagged",
        "route": f"routes the gradient of flagged samples to {reserved:.0%} of the hidden units",
    }
    return predicates[mode]
