"""Ranking metrics: how well scores rank units whose truth is known.

U  units of a layer
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_memsink.localization.locate import top_units


def recall_at(scores: Mapping[str, Tensor], truth: Mapping[str, Tensor], count: int | None = None) -> float:
    """Recall at k: the share of the true units among the ``count`` highest scores over all layers.

    Args:
        scores: ``[U]`` by layer.
        truth: bool ``[U]`` by layer, at least one true.
        count: as many as there are true units, if None: then precision is the same number.
    """
    true = sum(int(own.sum()) for own in truth.values())
    units = sum(map(len, scores.values()))
    chosen = top_units(scores, (count or true) / units)
    return sum(int(truth[name].cpu()[own].sum()) for name, own in chosen.items()) / true


def average_precision(
    scores: Mapping[str, Tensor], truth: Mapping[str, Tensor], among: Mapping[str, Tensor] | None = None
) -> float:
    """Mean over the true units of the precision among all units with at least that score.

    Units of equal scores count together. Chance is the share of true units. ``among``: bool ``[U]`` by layer, the only
    units to rank; None: all.
    """
    ranked, true = (
        torch.cat([own[among[name].cpu()] if among else own for name, own in _on_cpu(side).items()])
        for side in (scores, truth)
    )
    true = true.bool()
    levels, level = ranked.double().unique(return_inverse=True)
    hits, every = (torch.zeros(len(levels)).index_add_(0, level, one) for one in (true.float(), torch.ones(len(true))))
    precision = hits.flip(0).cumsum(0) / every.flip(0).cumsum(0)
    return float((precision.flip(0) * hits).sum() / hits.sum())


def _on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: own.detach().cpu() for name, own in values.items()}
