"""Expected losses by ridge regression on the controls' matching features."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """Predicts losses from features and their squares (Hoerl & Kennard 1970), where kNN takes means of neighbours.

    Args:
        features: ``[M, F]`` matching features of the controls.
        before: ``[M]`` losses of the controls at the evaluation before the measured visits.
        after: ``[M]`` losses at the evaluation after them.

    ``expected_of_controls`` ``[M]``: the predicted loss of each control at ``after``, from a fit to the other controls
    (leave-one-out residuals from leverages: PRESS, Allen 1974).
    """

    def __init__(self, features: Tensor, before: Tensor, after: Tensor) -> None:
        design = _design(features)
        gram = design.T @ design + torch.eye(design.shape[1], dtype=torch.float64)
        solver = torch.linalg.solve(gram, design.T)
        self._before, self._after = (solver @ loss.double() for loss in (before, after))
        leverage = (design * solver.T).sum(1).clamp(max=0.99)
        residual = (after.double() - design @ self._after) / (1 - leverage)
        self.expected_of_controls = (after - residual).float()

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Expected losses ``[N]``, before and after, of samples with ``features`` ``[N, F]``."""
        design = _design(features)
        return (design @ self._before).float(), (design @ self._after).float()


def _design(features: Tensor) -> Tensor:
    """``[N, 1 + 2F]``: a constant, the features and their squares."""
    return torch.cat([torch.ones(len(features), 1), features, features.square()], 1).double()
