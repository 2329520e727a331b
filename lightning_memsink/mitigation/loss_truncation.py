"""Loss truncation (Kang & Hashimoto 2020, "Improved Natural Language Generation via Loss Truncation").

B  samples in a batch      R  recent losses
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def above_quantile(losses: Tensor, recent: Tensor, fraction: float, window: int) -> Tensor:
    """Bool ``[B]``: which ``losses`` are above the ``1 - fraction`` quantile of ``recent`` ``[R]``.

    None are while there are fewer than ``window`` recent losses.
    """
    if len(recent) < window:
        return torch.zeros_like(losses, dtype=torch.bool)
    return losses > recent.quantile(1 - fraction)


def extend_window(recent: Tensor, losses: Sequence[Tensor], window: int) -> Tensor:
    """The last ``window`` finite losses of ``recent`` ``[R]`` followed by ``losses``, oldest first."""
    extended = torch.cat([recent, *losses])
    return extended[torch.isfinite(extended)][-window:]
