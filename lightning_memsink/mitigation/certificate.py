"""The certificate of designed sinks: whether memorization is in the sinks or in the shared weights.

A low loss with the own mask and a high loss without it could also mean that the model does not work without a pool. So
the pool is not only dropped, but also replaced by another sample's units (the placebo): the rise in loss that this
causes is no general damage. The loss of a never-trained twin of equal difficulty is the most that a sample can lose.
In fine-tuning, sinks can stay empty because the shared weights learn everything; the certificate then says so.

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
"""Sinks that hold a smaller share of what was learned count as empty."""
ISOLATED = 0.5
"""Sinks that hold this share or more of what was learned isolate it."""
FEWEST = 8
"""Number of samples below which there is no verdict: seven can just reach the required significance."""


@dataclass(frozen=True)
class Certificate:
    """Mean losses, in nats, of trained samples under four masks and of their never-trained twins, and the verdict.

    Args:
        samples: number of samples measured.
        own: mean loss with the sample's own units.
        dropped: mean loss without the pool.
        placebo: mean loss with the units of another trained sample.
        random: mean loss with as many units that belong to no sample.
        twins: mean loss expected of untrained samples of equal difficulty, without the pool; NaN if unknown.
        p_dropped: one-sided p-value that own losses are lower than dropped ones, paired by sample.
        p_placebo: the same against the placebo.
        content: share of what was learned of a sample, beyond what its twin shows, that is lost without its own units:
            (min(dropped, placebo) - own) / (twins - own). 1 if all is lost, 0 if nothing; it may be outside 0…1. NaN
            without twins, and if nothing was learned.
        exact: share of samples reproduced exactly, by the name of the mask.
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
        """Where the memorization is. ``isolated`` requires twins: without them, ``content`` is NaN."""
        if self.samples < FEWEST:
            return "too few samples"
        if self.p_placebo >= SIGNIFICANCE or self.content < EMPTY:
            return "sinks are empty"
        return "isolated" if self.content >= ISOLATED else "partly"

    def words(self) -> str:
        """The verdict as one sentence, with the losses behind it."""
        if self.verdict == "too few samples":
            return (
                f"Too few samples: {self.samples} seen twice or more, and at least {FEWEST} are needed to show whether "
                "sinks hold what was memorized."
            )
        twins = "unknown for" if math.isnan(self.twins) else f"{self.twins:.2f} for"
        losses = (
            f"(loss {self.own:.2f} with them, {self.dropped:.2f} with the pool dropped, {self.placebo:.2f} with "
            f"another sample's, {twins} never-trained twins)"
        )
        if self.verdict == "sinks are empty":
            return f"Sinks are empty: the model knows {self.samples} samples as well without their own sinks {losses}."
        share = "an unknown share" if math.isnan(self.content) else f"{100 * self.content:.0f} %"
        return (
            f"{self.verdict.capitalize()}: of what training taught of {self.samples} samples, {share} is in their own "
            f"sinks {losses}."
        )

    def state(self) -> dict[str, Any]:
        """The certificate in plain types, for a checkpoint; ``Certificate(**state)`` restores it."""
        return {**asdict(self), "exact": dict(self.exact)}


def certify(
    own: Tensor,
    dropped: Tensor,
    placebo: Tensor,
    random: Tensor,
    twins: Tensor | None = None,
    exact: Mapping[str, Tensor] | None = None,
) -> Certificate:
    """The certificate from the losses of N samples under each mask.

    Args:
        own, dropped, placebo, random: ``[N]`` losses in nats. Samples with a loss that is not finite are left out.
        twins: ``[N]`` losses expected of never-trained samples of equal difficulty; NaN for a sample without a match.
        exact: bool ``[N]`` by the name of the mask: whether the sample is reproduced exactly.

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
    own_loss = _mean(own[matched])
    learned = _mean(twins[matched]) - own_loss
    lost = min(_mean(dropped[matched]), _mean(placebo[matched])) - own_loss
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
    """One-sided p-value that ``differences`` ``[N]`` are above zero: Wilcoxon's signed-rank test, exact also with ties.

    The probability that random signs give a rank sum at least as large. Zeros are left out; ties get their mean rank.

    >>> signed_rank_p(torch.tensor([1.0, 2.0, 3.0]))
    0.125
    """
    differences = differences[differences != 0].double()
    if not len(differences):
        return 1.0
    size = differences.abs()
    # Twice the mean rank, which is an integer for ties too.
    ranks = (size[:, None] > size).sum(1) + (size[:, None] >= size).sum(1) + 1
    chance = torch.zeros(int(ranks.sum()) + 1, dtype=torch.float64)
    chance[0] = 1
    for rank in ranks.tolist():
        chance = chance / 2
        chance[rank:] += chance[:-rank].clone()
    return min(1.0, float(chance[int(ranks[differences > 0].sum()) :].sum()))


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan
