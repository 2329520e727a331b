"""Concentration: whether the attribution of memorized samples is on the same few units, against chance.

N  flagged samples    M  unflagged samples    U  units
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SAMPLES = 5
"""Samples that a group needs: with fewer, 999 permutations repeat a handful of groups."""
CHUNK = 64
"""Permutations at once, so that memory stays at CHUNK * U."""


def gini(shares: Tensor) -> float:
    """Gini coefficient of ``[U]`` shares >= 0: 0 if all are equal (or all zero), ``1 - 1/U`` if one unit has it all."""
    return float(_ginis(shares[None]))


def effective_units(shares: Tensor) -> float:
    """``exp`` of the entropy of ``[U]`` shares: the number of equal units with that entropy. 1…U; 0 of all zeros."""
    total = shares.double().sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(shares.double() / total).sum().exp())


def top_share(shares: Tensor, fraction: float = 0.01) -> float:
    """Sum of the largest ``fraction`` of ``[U]`` shares (at least one) over the sum of all: 0…1; 0 of all zeros.

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
    """Concentration of the mean attribution of flagged samples, and what is expected by chance.

    ``gini``, ``effective_units``, ``top_share`` (of 1 % of the units) are of the flagged samples' mean. ``null_gini``
    is the mean, ``null_low`` to ``null_high`` the middle 95 %, over as many samples with permuted flags.
    ``scattered_gini``: the Gini if each flagged sample were as concentrated on random units of its own; above it, they
    share units. The Gini of an even spread is 0. ``p`` is one-sided, of the null hypothesis that flagged samples are no
    more concentrated than others.
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
        verdict = "more concentrated than" if self.p < 0.05 else "not shown to be more concentrated than"
        return (
            f"The attribution of {self.samples} flagged samples is {verdict} that of as many others: Gini "
            f"{self.gini:.3f} against {self.null_gini:.3f} [{self.null_low:.3f}, {self.null_high:.3f}], "
            f"p = {self.p:.3g}; {self.effective_units:.0f} effective units, {self.top_share:.0%} in the top 1 %."
        )


@dataclass(frozen=True)
class NotTested:
    """The reason why concentration was not tested."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def concentration_test(
    flagged: Tensor, unflagged: Tensor, permutations: int = 999, seed: int = 0
) -> Concentration | NotTested:
    """Permutation test: is the mean attribution of flagged samples more concentrated than that of random samples?

    The statistic is the Gini coefficient of the mean over samples: it is high only if samples are concentrated on the
    *same* units. The null permutes the flags among all ``N + M`` samples, so it keeps units that matter to every
    sample, layers of unequal weight, and the similarity of samples. Any trained model would be more concentrated than
    an even spread. Unflagged samples should be as hard as the flagged ones: otherwise the test is of difficulty.

    Args:
        flagged: ``[N, U]`` shares >= 0, one row a sample.
        unflagged: ``[M, U]``.
        permutations: their number; p is at least ``1 / (1 + permutations)``.
        seed: of a generator of its own.

    Returns:
        `NotTested` with fewer than 5 samples in either group.

    Raises:
        ValueError: the groups have other units, or shares are negative or not finite.
    """
    if flagged.ndim != 2 or flagged.shape[1:] != unflagged.shape[1:]:
        raise ValueError(f"concentration_test takes [N, U] and [M, U], but got {[*flagged.shape], [*unflagged.shape]}.")
    for group, rows in (("flagged", flagged), ("unflagged", unflagged)):
        if len(rows) < MIN_SAMPLES:
            return NotTested(f"Concentration was not tested: {len(rows)} {group} samples, and it needs {MIN_SAMPLES}.")
        if not bool((rows.isfinite() & (rows >= 0)).all()):
            raise ValueError(f"concentration_test takes shares >= 0, but {group} ones are negative or not finite.")
    pooled, count = torch.cat([flagged, unflagged]).double().cpu(), len(flagged)
    mean = pooled[:count].mean(0)
    generator = torch.Generator().manual_seed(seed)
    null = torch.cat([_permuted(pooled, count, part, generator) for part in _chunks(permutations)])
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


def _permuted(pooled: Tensor, count: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Gini coefficients of the means of ``count`` rows drawn at random, ``permutations`` times."""
    drawn = torch.rand(permutations, len(pooled), generator=generator).argsort(1)[:, :count]
    chosen = torch.zeros(permutations, len(pooled), dtype=pooled.dtype).scatter_(1, drawn, 1.0 / count)
    return _ginis(chosen @ pooled)


def _scattered(rows: Tensor, generator: torch.Generator, times: int = 20) -> float:
    shuffled = [
        torch.stack([row[torch.randperm(len(row), generator=generator)] for row in rows]).mean(0) for _ in range(times)
    ]
    return float(_ginis(torch.stack(shuffled)).mean())
