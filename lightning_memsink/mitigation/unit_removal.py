"""Removes localized units from a model for good, as many as a budget of held-out loss allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor, nn

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.attribution.hidden_layers import HiddenLayer
from lightning_memsink.localization.ablation import ablated, readers
from lightning_memsink.localization.sink_layers import sink_layers
from lightning_memsink.localization.sinks import Sinks

LADDER_RATIO = sqrt(2)
"""Ratio of the numbers of units tried one after the other: the number chosen is at most this factor below the best."""


@dataclass(frozen=True)
class Removal:
    """The units that `ablate` removed, and the cost of every number of units tried."""

    sinks: Sinks
    """The units removed; none if the best unit alone exceeds the budget."""
    ladder: tuple[tuple[int, float], ...]
    """For each number of units zeroed, best first: the number, and the loss in nats with them zero. The first row is
    the unchanged model. NaN and infinite losses exceed any budget."""
    budget: float
    """Nats that the loss may rise by."""

    @property
    def rise(self) -> float:
        """How much the loss rose, in nats; negative if it fell."""
        return dict(self.ladder)[len(self.sinks)] - self.ladder[0][1]

    def __str__(self) -> str:
        before, most = self.ladder[0][1], self.ladder[-1][0]
        if self.sinks.empty:
            why = "there are no sinks"
            if most:
                count, loss = self.ladder[1]
                why = f"already the best {count} of {most} sinks cost {loss - before:+.3f} nats"
            return f"Nothing removed: {why} (budget {self.budget:g})."
        return (
            f"Removed {len(self.sinks)} of {most} sinks: loss {before:.3f} to {before + self.rise:.3f} nats "
            f"({self.rise:+.3f}, budget {self.budget:g})."
        )


def ablate(model: nn.Module, sinks: Sinks, *, loss: Callable[[], float], budget: float = 0.02) -> Removal:
    """Zeroes the weights that read the best of ``sinks``, as many as raise the loss by at most ``budget``.

    Changes the model in place. For after training: a step of the optimizer would fill the weights again. The numbers of
    units tried grow geometrically. All are tried, since the loss need not rise with the number of units: the largest
    number within the budget may be above one that exceeds it. Units of several layers are taken by score (`Sinks.top`).

    Args:
        loss: returns the mean loss of ``model`` in nats on held-out samples, the same each time. It is called some
            ``2 log2(sinks)`` times, in evaluation mode and without gradients; global random state is restored.
        budget: nats that the loss may rise by.

    Raises:
        ValueError: the sinks are of another model, the budget is negative, or the initial loss is not finite.
    """
    if not budget >= 0:
        raise ValueError(f"budget is how many nats the loss may rise by, at least 0, but it is {budget}.")
    layers = sink_layers(model, sinks)
    with isolated_eval(model), torch.no_grad():
        before = float(loss())
        if not isfinite(before):
            raise ValueError(f"The loss of the unchanged model must be finite, for the comparison, but it is {before}.")
        ladder = [(0, before)]
        for count in _counts(len(sinks)):
            with ablated(layers, _masks(layers, sinks.top(count))):
                ladder.append((count, float(loss())))
        kept = sinks.top(max(count for count, value in ladder if isfinite(value) and value - before <= budget))
        for layer, mask in zip(layers, _masks(layers, kept).values(), strict=True):
            for weight in readers(layer):
                weight[mask.to(weight.device)] = 0
    return Removal(kept, tuple(ladder), budget)


def _masks(layers: Sequence[HiddenLayer], sinks: Sinks) -> dict[str, Tensor]:
    """Bool ``[U]`` by name of the layer."""
    masks = sinks.masks()
    return {layer.name: masks[layer.name] for layer in layers}


def _counts(most: int) -> list[int]:
    """Numbers of units to try: 1, 2, 3, 4, 6, 8, 11, … and ``most``.

    >>> _counts(10)
    [1, 2, 3, 4, 6, 8, 10]
    """
    counts, count = set(), 1.0
    while count < most:
        counts.add(round(count))
        count *= LADDER_RATIO
    return sorted(counts | {most}) if most else []
