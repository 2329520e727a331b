"""Attribution of single samples: of one training step, and of the most recent ones of a run.

B  samples in a batch      R  samples kept      U  units of all hidden layers together      K  blocks of modules
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepAttribution:
    """What one recorded training step showed of each of its samples."""

    ids: Tensor
    """``[B]``."""
    shares: Tensor
    """``[B, U]``, signed."""
    norms: Tensor | None = None
    """``[B, K]`` gradient norms, not squared."""
    alignment: Tensor | None = None
    """``[B]`` cosines with the gradient of held-out samples."""

    def select(self, rows: Tensor) -> StepAttribution:
        """The samples at ``rows``, a mask ``[B]``."""
        norms, alignment = (None if each is None else each[rows] for each in (self.norms, self.alignment))
        return StepAttribution(self.ids[rows], self.shares[rows], norms, alignment)


class RecentSamples:
    """Shares of the most recent samples, a row a sample: ``ids`` ``[R]``, signed ``shares`` ``[R, U]`` float16."""

    def __init__(self) -> None:
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.shares = torch.zeros(0, 0, dtype=torch.float16)

    def add(self, ids: Tensor, shares: Tensor, most: int) -> None:
        """Keeps ``most`` rows, newest first; of a repeated sample only the last visit."""
        if not len(ids):
            return
        old = ~torch.isin(self.ids, ids)
        fresh = [n for n, sample in enumerate(ids.tolist()) if not bool((ids[n + 1 :] == sample).any())][::-1]
        kept = self.shares[old] if len(self.ids) else shares.new_zeros(0, shares.shape[1]).half()
        self.ids = torch.cat([ids[fresh], self.ids[old]])[:most]
        self.shares = torch.cat([shares[fresh].half(), kept])[:most]

    def state_dict(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "shares": self.shares}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.ids, self.shares = state["ids"], state["shares"]
