"""Did designed sinks take the memorization, or did the shared weights keep it?

A low loss with the own mask and a high one without could also mean that the model merely does not work without a pool.
So the pool is not only dropped but also exchanged for another sample's (the placebo): what that leaves of the loss is
no memory of this sample. And what a never-trained twin of equal difficulty would have is the most there is to lose.
In fine-tuning sinks can stay empty, the shared weights learning everything; then nobody may speak of isolation.

    N  samples
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

CertificateVerdict = Literal["isolated", "partly", "sinks are empty", "too few samples"]

SIGNIFICANCE = 0.01
"""Largest p-value at which the own mask counts as better than another sample's."""
EMPTY = 0.1
"""Sinks that hold a smaller share of what was learned are empty."""
ISOLATED = 0.5
"""Sinks that hold this share or more isolate it."""
FEWEST = 8
"""Samples, below which there is no verdict: seven could just reach the significance asked for."""


@dataclass(frozen=True)
class Certificate:
    """Mean losses, in nats, of ``samples`` trained samples under four masks, and of their never-trained twins.

    ``own``: with their own units. ``dropped``: without the pool. ``placebo``: with the units of another trained sample.
    ``random``: with as many units that no sample was given. ``twins``: what untrained samples of equal difficulty have
    without the pool; NaN if nobody knows. ``exact``: share of samples reproduced exactly under each of the masks.

    ``p_dropped``, ``p_placebo``: one-sided p-values that own losses are the lower ones, paired by sample.
    ``content``: the share of what was learned of a sample, beyond what its twin knows, that goes with its own units:
    (min(dropped, placebo) - own) / (twins - own). 1 if nothing of it is left, 0 if all; it may lie outside. NaN without
    twins, and where nothing was learned.
    """

    samples: int
    own: float
    dropped: float
    placebo: float
    random: float
    twins: float
    p_dropped: float
    p_placebo: float
    content: float
    exact: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> CertificateVerdict:
        """``isolated`` is only said where twins are known."""
        if self.samples < FEWEST:
            return "too few samples"
        if self.p_placebo >= SIGNIFICANCE or self.content < EMPTY:
            return "sinks are empty"
        return "isolated" if self.content >= ISOLATED else "partly"

    def words(self) -> str:
        """One plain sentence, with the losses that it rests on."""
        if self.verdict == "too few samples":
            return (
                f"Too few samples: {self.samples} seen twice or more, and {FEWEST} is the least that shows whether "
                "sinks hold what was memorized."
            )
        twins = "unknown for" if math.isnan(self.twins) else f"{self.twins:.2f} for"
        losses = (
            f"(loss {self.own:.2f} with them, {self.dropped:.2f} with the pool dropped, {self.placebo:.2f} with "
            f"another sample's, {twins} never-trained twins)"
        )
        if self.verdict == "sinks are empty":
            return f"Sinks are empty: {self.samples} samples are known as well without their own sinks {losses}."
        share = "an unknown share" if math.isnan(self.content) else f"{100 * self.content:.0f} %"
        return (
            f"{self.verdict.capitalize()}: of what training taught of {self.samples} samples, {share} is in their own "
            f"sinks {losses}."
        )

    def state(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint; ``Certificate(**state)`` is the certificate."""
        return {**asdict(self), "exact": dict(self.exact)}


def certify(
    own: Tensor,
    dropped: Tensor,
    placebo: Tensor,
    random: Tensor,
    twins: Tensor | None = None,
    exact: Mapping[str, Tensor] | None = None,
) -> Certificate:
    """A certificate from the losses of N samples under each mask.

    Args:
        own, dropped, placebo, random: ``[N]`` losses in nats. Samples with a loss that is not finite are left out.
        twins: ``[N]`` losses expected of never-trained samples of equal difficulty; NaN where there is no match.
        exact: bool ``[N]`` by the name of a mask: whether the sample is reproduced exactly.

    Raises:
        ValueError: the arguments are not all ``[N]``.
    """
    twins = torch.full_like(own, torch.nan) if twins is None else twins
    masks = {"own": own, "dropped": dropped, "placebo": placebo, "random": random}
    sizes = {name: list(values.shape) for name, values in {**masks, "twins": twins, **(exact or {})}.items()}
    if own.ndim != 1 or any(size != sizes["own"] for size in sizes.values()):
        raise ValueError(f"certify takes one value a sample under every mask, but the shapes are {sizes}.")
    finite = torch.isfinite(torch.stack(list(masks.values()))).all(0)
    means = {name: _mean(values[finite]) for name, values in masks.items()}
    matched = finite & torch.isfinite(twins)
    mine = _mean(own[matched])
    learned = _mean(twins[matched]) - mine
    lost = min(_mean(dropped[matched]), _mean(placebo[matched])) - mine
    return Certificate(
        samples=int(finite.sum()),
        **means,
        twins=_mean(twins[matched]),
        p_dropped=signed_rank_p((dropped - own)[finite]),
        p_placebo=signed_rank_p((placebo - own)[finite]),
        content=lost / learned if learned > 0 else math.nan,
        exact={name: _mean(values[finite].double()) for name, values in (exact or {}).items()},
    )


def signed_rank_p(differences: Tensor) -> float:
    """One-sided p-value that ``differences`` ``[N]`` are above zero: Wilcoxon's signed-rank test, exact.

    The chance that random signs give a rank sum at least as large. Zeros are left out, ties share their mean rank.

    >>> signed_rank_p(torch.tensor([1.0, 2.0, 3.0]))
    0.125
    """
    differences = differences[differences != 0].double()
    if not len(differences):
        return 1.0
    size = differences.abs()
    # Twice the mean rank of ties: a whole number.
    ranks = (size[:, None] > size).sum(1) + (size[:, None] >= size).sum(1) + 1
    chance = torch.zeros(int(ranks.sum()) + 1, dtype=torch.float64)
    chance[0] = 1
    for rank in ranks.tolist():
        chance = chance / 2
        chance[rank:] += chance[:-rank].clone()
    return min(1.0, float(chance[int(ranks[differences > 0].sum()) :].sum()))


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan
