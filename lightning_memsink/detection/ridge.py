"""What loss do features foretell: ridge regression on the controls."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """Losses by ridge regression on features and their squares, of what would be means of neighbours otherwise.

    ``own`` ``[M, F]`` are the controls' features, ``before`` and ``after`` ``[M]`` their losses at two evaluations;
    ``expected_of_controls`` ``[M]``, after, leaves each out of its own (PRESS).
    """

    def __init__(self, own: Tensor, before: Tensor, after: Tensor) -> None:
        design = _design(own)
        gram = design.T @ design + torch.eye(design.shape[1], dtype=torch.float64)
        pull = torch.linalg.solve(gram, design.T)
        self._before, self._after = (pull @ loss.double() for loss in (before, after))
        leverage = (design * pull.T).sum(1).clamp(max=0.99)
        residual = (after.double() - design @ self._after) / (1 - leverage)
        self.expected_of_controls = (after - residual).float()

    def expected(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``[N]`` of samples with features ``points`` ``[N, F]``, before and after."""
        at = _design(points)
        return (at @ self._before).float(), (at @ self._after).float()


def _design(points: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(points), 1), points, points.square()], 1).double()
