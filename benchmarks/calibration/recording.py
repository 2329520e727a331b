"""Losses of held-out samples over a whole run, from which any of them can pretend to have been trained on.

V  rounds of visits      L  looks      P  held-out samples      F  matching features
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PLANTED_NATS = 1.5
"""By how much the loss of a planted sample is lower; of a scale loss: its logarithm."""


@dataclass(frozen=True)
class Recording:
    """What a run measured of samples that it never trained on. Losses in nats, or in their own unit.

    A visit is measured as training measures a sample: in training mode, at the step at which it would have come. A
    look is measured as controls are: all at once, in evaluation mode.
    """

    visit_steps: Tensor
    """``[V, P]`` optimizer steps before the visits."""
    visit_losses: Tensor
    """``[V, P]``"""
    visit_features: Tensor
    """``[V, P, F]``"""
    look_steps: Tensor
    """``[L]`` ascending; a round of visits ends before a look."""
    look_losses: Tensor
    """``[L, P]``"""
    look_features: Tensor
    """``[L, P, F]``"""
    kinds: Tensor
    """``[P]`` number of the kind that a sample is of."""
    planted_gap: Tensor
    """``[P]`` by how much the loss of a sample is lower if it is planted."""
    is_scale: bool = False
    """Whether a loss is a scale (a squared error), so that a gap is a ratio; a planted loss is divided then."""

    def only_looks(self, count: int) -> Recording:
        """The same run with ``count`` evenly spaced looks, the last among them. Visits stay as they are."""
        total = len(self.look_steps)
        kept = torch.tensor([(number + 1) * total // count - 1 for number in range(count)])
        return replace(
            self,
            look_steps=self.look_steps[kept],
            look_losses=self.look_losses[kept],
            look_features=self.look_features[kept],
        )

    def memorized(self, losses: Tensor, samples: Tensor) -> Tensor:
        """``[N]`` the losses that planted ``samples`` ``[N]`` have in place of ``losses`` ``[N]``."""
        gap = self.planted_gap[samples]
        return losses * torch.exp(-gap) if self.is_scale else losses - gap
