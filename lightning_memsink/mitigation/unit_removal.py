"""Taking localized units out of a model for good, as many as held-out loss can bear."""

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

STEP = sqrt(2)
"""Each rung of the ladder has this many times the units of the one below: the choice falls at most that much short."""


@dataclass(frozen=True)
class Removal:
    """What `ablate` did, and what every choice would have cost."""

    sinks: Sinks
    """The units that are gone; none, if not even the first is within the budget."""
    ladder: tuple[tuple[int, float], ...]
    """Units zeroed, best first, and the loss with them zero; the first row is the model as it was. NaN and infinite
    losses are beyond any budget."""
    budget: float

    @property
    def rise(self) -> float:
        """Nats, of the loss that `ablate` was given; negative if it fell."""
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
    """Zeroes the weights that read the best of ``sinks``, as many as cost at most ``budget``. In place, after training:
    a step of the optimizer would fill them again.

    Counts of a geometric ladder are tried, all of them: loss need not rise with the number of units, so the largest
    count within the budget may lie above one that is not. Units of several layers are taken by score (`Sinks.top`).

    Args:
        loss: mean loss of ``model`` in nats, on held-out samples, the same each time. Called some ``2 log2(sinks)``
            times, in evaluation mode and without gradients; it leaves no trace in the global random generators.
        budget: nats that it may rise by at most.

    Raises:
        ValueError: sinks of another model, a negative budget, or a loss that is no finite number to begin with.
    """
    if not budget >= 0:
        raise ValueError(f"budget is how many nats the loss may rise by, at least 0, but it is {budget}.")
    layers = sink_layers(model, sinks)
    with isolated_eval(model), torch.no_grad():
        before = float(loss())
        if not isfinite(before):
            raise ValueError(f"The loss of the model as it is must be finite, to compare others with, but is {before}.")
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
    masks = sinks.masks()
    return {layer.name: masks[layer.name] for layer in layers}


def _counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 11, … and ``most``.

    >>> _counts(10)
    [1, 2, 3, 4, 6, 8, 10]
    """
    counts, rung = set(), 1.0
    while rung < most:
        counts.add(round(rung))
        rung *= STEP
    return sorted(counts | {most}) if most else []
