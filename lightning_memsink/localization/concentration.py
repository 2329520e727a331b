"""Whether memorized samples lean on the same few units: concentration of attribution, against chance.

N  flagged samples    M  unflagged samples    U  units
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 5  # samples a group needs: below, 999 permutations repeat a handful of groups
CHUNK = 64  # permutations at once, so that memory stays at CHUNK * U


def gini(shares: Tensor) -> float:
    """Gini coefficient of ``[U]`` shares >= 0: 0 if all are equal (or all zero), ``1 - 1/U`` if one unit has it all."""
    return float(_ginis(shares[None]))


def effective_units(shares: Tensor) -> float:
    """``exp`` of the entropy of ``[U]`` shares: as many equal units would be as spread out. 1 to U; 0 of all zeros."""
    total = shares.double().sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(shares.double() / total).sum().exp())


def top_share(shares: Tensor, fraction: float = 0.01) -> float:
    """What the largest ``fraction`` of ``[U]`` units (at least one) hold of the whole: 0 to 1; 0 of all zeros.

    Raises:
        ValueError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"top_share takes a fraction of the units in (0, 1], but got {fraction}.")
    total = shares.double().sum()
    if total == 0:
        return 0.0
    most = max(1, round(fraction * shares.numel()))
    return float(shares.double().topk(most).values.sum() / total)


@dataclass(frozen=True)
class Concentration:
    """The mean attribution of flagged samples, and what it would be by chance.

    ``gini``, ``effective_units``, ``top_share`` (of 1 % of the units) are of the flagged samples' mean. ``null_gini``
    is the mean, ``null_low`` to ``null_high`` the middle 95 %, of as many samples with the flags dealt at random.
    ``scattered_gini``: each flagged sample as concentrated as it is, but on units of its own; above it, they share
    units. Of an even spread all over, the Gini is 0. ``p`` is one-sided: flagged samples are no more concentrated.
    """

    gini: float
    effective_units: float
    top_share: float
    null_gini: float
    null_low: float
    null_high: float
    scattered_gini: float
    p: float
    samples: int

    def __str__(self) -> str:
        than = "more concentrated than" if self.p < 0.05 else "not shown to be more concentrated than"
        return (
            f"The attribution of {self.samples} flagged samples is {than} that of as many others: Gini {self.gini:.3f} "
            f"against {self.null_gini:.3f} [{self.null_low:.3f}, {self.null_high:.3f}], p = {self.p:.3g}; "
            f"{self.effective_units:.0f} effective units, {self.top_share:.0%} in the top 1 %."
        )


@dataclass(frozen=True)
class NotTested:
    """No statement about concentration, and why."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def concentration_test(
    flagged: Tensor, unflagged: Tensor, permutations: int = 999, seed: int = 0
) -> Concentration | NotTested:
    """Is the mean attribution of flagged samples more concentrated than that of as many samples picked blindly?

    The statistic is the Gini coefficient of the mean over samples: it is high only if samples are concentrated on the
    *same* units. The null deals the flags among all ``N + M`` samples at random, so it keeps units that matter to
    everyone, layers of unequal weight, and how alike samples are. An even spread would be beaten by any trained model.
    Compare like with like: unflagged samples as hard as the flagged, or difficulty is what is tested.

    Args:
        flagged: ``[N, U]`` shares >= 0, one row a sample.
        unflagged: ``[M, U]``.
        permutations: of which p can be no smaller than ``1 / (1 + permutations)``.
        seed: of a generator of its own.

    Returns:
        `NotTested` with fewer than 5 samples in either group.

    Raises:
        ValueError: the groups have other units, or shares are negative or not finite.
    """
    if flagged.ndim != 2 or flagged.shape[1:] != unflagged.shape[1:]:
        raise ValueError(f"concentration_test takes [N, U] and [M, U], but got {[*flagged.shape], [*unflagged.shape]}.")
    for group, rows in (("flagged", flagged), ("unflagged", unflagged)):
        if len(rows) < FEWEST:
            return NotTested(f"Concentration was not tested: {len(rows)} {group} samples, and it takes {FEWEST}.")
        if not bool((rows.isfinite() & (rows >= 0)).all()):
            raise ValueError(f"concentration_test takes shares >= 0, but {group} ones are negative or not finite.")
    pooled, count = torch.cat([flagged, unflagged]).double().cpu(), len(flagged)
    mean = pooled[:count].mean(0)
    generator = torch.Generator().manual_seed(seed)
    null = torch.cat([_dealt(pooled, count, part, generator) for part in _chunks(permutations)])
    observed = _ginis(mean[None])
    low, high = null.quantile(torch.tensor([0.025, 0.975], dtype=null.dtype)).tolist()
    above = int((null >= observed - 1e-12).sum())  # equal groups add up in another order
    return Concentration(
        gini=float(observed),
        effective_units=effective_units(mean),
        top_share=top_share(mean),
        null_gini=float(null.mean()),
        null_low=low,
        null_high=high,
        scattered_gini=_scattered(pooled[:count], generator),
        p=(1 + above) / (1 + permutations),
        samples=count,
    )


def _ginis(rows: Tensor) -> Tensor:
    """``[R]`` Gini coefficients of ``[R, U]``."""
    ordered = rows.double().sort(1).values
    units = ordered.shape[1]
    ranks = torch.arange(1 - units, units, 2, dtype=ordered.dtype, device=ordered.device)
    totals = ordered.sum(1)
    return (ordered * ranks).sum(1) / (units * torch.where(totals > 0, totals, 1.0))


def _chunks(permutations: int) -> list[int]:
    return [min(CHUNK, permutations - start) for start in range(0, permutations, CHUNK)]


def _dealt(pooled: Tensor, count: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Gini coefficients of the means of ``count`` rows drawn at random, ``permutations`` times."""
    drawn = torch.rand(permutations, len(pooled), generator=generator).argsort(1)[:, :count]
    chosen = torch.zeros(permutations, len(pooled), dtype=pooled.dtype).scatter_(1, drawn, 1.0 / count)
    return _ginis(chosen @ pooled)


def _scattered(rows: Tensor, generator: torch.Generator, times: int = 20) -> float:
    shuffled = [
        torch.stack([row[torch.randperm(len(row), generator=generator)] for row in rows]).mean(0) for _ in range(times)
    ]
    return float(_ginis(torch.stack(shuffled)).mean())
