"""Locating sinks: from the effect of each unit on each sample to the units that carry memorized samples.

N  flagged samples      M  controls      U  units of a layer      k  units chosen
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_memsink.localization.sinks import Sinks

HALVINGS = 8
"""Random halvings that the stability is the mean of."""


def locate(
    target: Mapping[str, Tensor],
    control: Mapping[str, Tensor] | None = None,
    fraction: float = 0.01,
    per_layer: bool = False,
    method: str = "activation x gradient",
) -> Sinks:
    """The units whose effect on flagged samples is larger than on matched controls.

    Args:
        target: per layer ``[N, U]``, each flagged sample's shares, signed or not, from
            `lightning_memsink.attribution.unit_effects.shares`.
        control: the same ``[M, U]`` of matched controls, whose mean is subtracted; None: nothing is subtracted.
        fraction: of all units, 0…1, rounded, and at least one unit. Units whose contrast is not above zero are no
            sinks, so there may be fewer.
        per_layer: that fraction of each layer, instead of all layers' units together.
        method: the name of the method, for the result.

    Raises:
        ValueError: no samples, layers that differ, or a fraction outside 0…1.
    """
    _check(target, control, fraction)
    scores = contrast(target, control)
    chosen = top_units(scores, fraction, per_layer)
    units = {name: picked[scores[name][picked] > 0] for name, picked in chosen.items()}
    return Sinks(
        units,
        {name: scores[name][picked] for name, picked in units.items()},
        {name: len(own) for name, own in scores.items()},
        method,
        _stability(target, control, fraction, per_layer),
    )


def contrast(target: Mapping[str, Tensor], control: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """``[U]`` per layer: mean over ``target`` ``[N, U]`` less the mean over ``control`` ``[M, U]``, if there is one."""
    mean = {name: rows.detach().float().mean(0).cpu() for name, rows in target.items()}
    if control is None:
        return mean
    return {name: scores - control[name].detach().float().mean(0).cpu() for name, scores in mean.items()}


def top_units(scores: Mapping[str, Tensor], fraction: float, per_layer: bool = False) -> dict[str, Tensor]:
    """``[k]`` int64 per layer: the ``fraction`` of units with the highest ``scores`` ``[U]``, the highest first.

    Rounded, and at least one: of all units together, or of each layer. Equal scores are taken in the order of layers
    and units, so the choice is reproducible.
    """
    if per_layer:
        return {name: _best(own, quota(len(own), fraction)) for name, own in scores.items()}
    sizes = [len(own) for own in scores.values()]
    every = torch.cat([own.detach().double().cpu() for own in scores.values()])
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[_best(every, quota(len(every), fraction))] = True
    picked = dict(zip(scores, chosen.split(sizes), strict=True))
    return {name: _best(scores[name], int(own.sum())) for name, own in picked.items()}


def quota(units: int, fraction: float) -> int:
    """The number of ``units`` that a fraction is: rounded, and at least one if there is any."""
    return min(units, max(1, round(units * fraction)))


def masks_of(chosen: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Bool ``[U]`` per layer of unit numbers ``[k]``."""
    return {name: torch.zeros(sizes[name], dtype=torch.bool).index_fill_(0, own, True) for name, own in chosen.items()}


def jaccard(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Units in both over units in either, 0…1, of unit numbers per layer; two empty sets agree."""
    sets = [{(name, unit) for name, own in each.items() for unit in own.tolist()} for each in (first, second)]
    either = sets[0] | sets[1]
    return len(sets[0] & sets[1]) / len(either) if either else 1.0


def chance_jaccard(units: int, first: int, second: int) -> float:
    """Expected `jaccard` of two independent random sets of ``first`` and ``second`` out of ``units``."""
    if not first and not second:
        return 1.0
    overlaps = range(max(0, first + second - units), min(first, second) + 1)
    total = _log_choose(units, second)
    return sum(
        overlap
        / (first + second - overlap)
        * math.exp(_log_choose(first, overlap) + _log_choose(units - first, second - overlap) - total)
        for overlap in overlaps
    )


def _stability(
    target: Mapping[str, Tensor], control: Mapping[str, Tensor] | None, fraction: float, per_layer: bool
) -> tuple[float, float] | None:
    """Observed and chance `jaccard` of units from two halves. Controls are halved too: shared ones would agree."""
    samples = len(next(iter(target.values())))
    controls = None if control is None else len(next(iter(control.values())))
    if samples < 2 or (controls is not None and controls < 2):
        return None
    generator = torch.Generator().manual_seed(0)
    sizes = [rows.shape[1] for rows in target.values()]
    observed = []
    for _ in range(HALVINGS):
        order = torch.randperm(samples, generator=generator)
        rest = None if controls is None else torch.randperm(controls, generator=generator)
        halves = [
            top_units(contrast(_rows(target, order[side::2]), _half(control, rest, side)), fraction, per_layer)
            for side in (0, 1)
        ]
        observed.append(jaccard(*halves))
    if per_layer:
        # Overlaps of independent layers: the ratio of expectations, not the expectation of the ratio.
        counts = [quota(size, fraction) for size in sizes]
        common = sum(count**2 / size for count, size in zip(counts, sizes, strict=True))
        return sum(observed) / HALVINGS, common / (2 * sum(counts) - common)
    count = quota(sum(sizes), fraction)
    return sum(observed) / HALVINGS, chance_jaccard(sum(sizes), count, count)


def _half(control: Mapping[str, Tensor] | None, order: Tensor | None, side: int) -> dict[str, Tensor] | None:
    return None if control is None or order is None else _rows(control, order[side::2])


def _rows(values: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: own[rows.to(own.device)] for name, own in values.items()}


def _best(scores: Tensor, count: int) -> Tensor:
    order = scores.detach().double().cpu().nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
    return order[:count]


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _check(target: Mapping[str, Tensor], control: Mapping[str, Tensor] | None, fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is a share of units above 0 and at most 1, but it is {fraction}.")
    for word, side in (("target", target), ("control", control)):
        if side is not None and (not side or any(rows.ndim != 2 or not len(rows) for rows in side.values())):
            shapes = {name: list(rows.shape) for name, rows in side.items()}
            raise ValueError(f"{word} is [samples, units] per layer with at least one of each, but it is {shapes}.")
    if control is not None:
        sizes = [{name: rows.shape[1] for name, rows in side.items()} for side in (target, control)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"target and control have the same layers and units, but they are {sizes[0]} and {sizes[1]}."
            )
