"""What training on a sample took off its loss, from fits that have not seen it.

N  samples      K  fits that have not seen a sample      M  held-out samples
"""

from __future__ import annotations

from torch import Tensor


def counterfactual(own: Tensor, unseen: Tensor, held_out: Tensor, unseen_held_out: Tensor, unit: str) -> Tensor:
    """``[N]`` memorization (Feldman & Zhang 2020): the loss without the sample less the loss with it.

    The loss without it is that of fits on half of the data, times what the whole data did to the mean loss of samples
    that none has seen: a model that is surer of itself is so of all of them, and a difference would make easy samples
    hard.

    Args:
        own: ``[N]`` losses in the run.
        unseen: ``[K, N]`` losses in fits that were trained without the sample.
        held_out: ``[M]`` losses in the run.
        unseen_held_out: ``[M]`` mean losses in the fits.
        unit: ``nats``; or ``ratio``, where all of these are logarithms and a difference is a factor.
    """
    before, after = unseen_held_out.mean(), held_out.mean()
    unseen = unseen.mean(0) + after - before if unit == "ratio" else unseen.mean(0) * (after / before)
    return unseen - own
