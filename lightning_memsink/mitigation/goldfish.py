"""Which target tokens are never trained on: the goldfish loss (Hans et al. 2024, "Be like a Goldfish").

A target is dropped by a hash of the tokens before it, so a passage loses the same tokens wherever it occurs, and a
model that repeats it has to guess there. The published hash multiplies token ids: it can't tell orders apart, one token
0 decides everything, and its window takes in the target. This one does neither.

    B  samples in a batch      R  target tokens of all samples      h  context tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memsink.samples.hashing import mixed, shifted

_GOLDEN = -0x61C8864680B583EB  # 2^64 / the golden ratio, as int64
_BITS = 31


def dropped(targets: Tensor, samples: Tensor, counted: Tensor, k: int, context: int, seed: int = 0) -> Tensor:
    """Bool ``[R]``: the targets to leave out, about one in ``k``.

    A target with fewer than ``context`` targets before it in its sample, or one among those that is not counted
    (padding, a masked prompt), is kept: its context is not that of the passage.

    Args:
        targets: ``[R]`` int64 token ids, in the order of each sample's text; samples may lie in one another.
        samples: ``[R]`` whose target it is.
        counted: bool ``[R]``, False where ignored.
    """
    out = torch.zeros_like(counted)
    order = samples.argsort(stable=True)
    if len(order) <= context:
        return out
    text, owner, counted = targets[order].long(), samples[order], counted[order]
    key = mixed(torch.tensor(seed, device=text.device) + 1)
    weights = mixed(torch.arange(1, context + 1, device=text.device) * _GOLDEN + key) | 1
    before = (text[:-1].unfold(0, context, 1) * weights).sum(1)  # odd weights, all different: order counts
    chosen = shifted(mixed(before + key), 64 - _BITS) < (1 << _BITS) // k
    whole = counted[:-1].unfold(0, context, 1).all(1) & (owner[:-context] == owner[context:]) & counted[context:]
    out[order[context:]] = chosen & whole
    return out
