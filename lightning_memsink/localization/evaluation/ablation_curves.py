"""Ablation curves: the loss of several groups of samples as more and more of the highest-scored units are zeroed.

The DEL test of Chang et al., NAACL 2024, with two baselines that it lacks: random units, as many or also as active.

F  fractions      U  units of a layer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.localization.ablation import ablated
from lightning_memsink.localization.localizers.attribution_methods import hidden_units
from lightning_memsink.localization.localizers.task import Batch, Scores, Task
from lightning_memsink.localization.locate import masks_of, top_units

FRACTIONS = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1)
BUDGET = 0.02
MIN_DAMAGE = 0.005
"""Nats: the selectivity divides by at least this held-out damage, since smaller differences are noise."""

Exact = Callable[[Any], Tensor]
"""From a batch to bool ``[B]``: the model still reproduces the sample verbatim."""


@dataclass(frozen=True)
class Groups:
    """The samples whose losses are measured while units are zeroed."""

    target: Sequence[Batch]
    others: Sequence[Batch]
    """Other memorized samples, which should not be forgotten."""
    twins: Sequence[Batch]
    """Controls: drawn as the targets are, never trained on. Complete forgetting would reach their loss."""
    held_out: Sequence[Batch]

    def items(self) -> list[tuple[str, Sequence[Batch]]]:
        return [(name, getattr(self, name)) for name in ("target", "others", "twins", "held_out")]


@dataclass(frozen=True)
class Curve:
    """Losses by group after zeroing each of the fractions; the first of them is 0, the model as it is."""

    fractions: tuple[float, ...]
    """``F``, of all units, 0…1."""
    loss: Mapping[str, Tensor]
    """``[F]`` nats, mean over the group's samples."""
    exact: Mapping[str, Tensor]
    """``[F]`` 0…1, the share of samples still reproduced verbatim; NaN if that is not measured."""

    def change(self, group: str) -> Tensor:
        """``[F]`` nats: the loss less the loss at fraction 0."""
        return self.loss[group] - self.loss[group][0]

    def selectivity(self) -> Tensor:
        """``[F]`` nats of forgetting per nat of damage: the target's change over that of held-out text, which counts
        as at least `MIN_DAMAGE`."""
        return self.change("target") / self.change("held_out").clamp(min=MIN_DAMAGE)

    def closure(self) -> Tensor:
        """``[F]`` share of the gap between the target's loss and that of its twins that is closed: 0 none, 1 all."""
        gap = self.loss["twins"][0] - self.loss["target"][0]
        return self.change("target") / gap

    def closure_within(self, budget: float = BUDGET) -> float:
        """Largest closure before held-out damage first exceeds ``budget`` nats, linear between the fractions."""
        damage: list[float] = self.change("held_out").tolist()
        closed: list[float] = self.closure().tolist()
        best = closed[0]
        for before, after, low, high in zip(damage, damage[1:], closed, closed[1:], strict=False):
            if after > budget:
                return max(best, low + (high - low) * (budget - before) / (after - before))
            best = max(best, high)
        return best


@dataclass(frozen=True)
class AblationTest:
    """The curve of one localizer, and those of two random choices of units."""

    localized: Curve
    random: Curve
    """As many units at random."""
    matched: Curve
    """As many units at random that are as active: a unit with large activations matters anyway."""


def evaluate_ablation(
    task: Task,
    scores: Scores,
    groups: Groups,
    exact: Exact | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> AblationTest:
    """Zeroes units in the order of ``scores`` and in two random orders. The scores of other targets are a placebo.

    Args:
        task: its model, layers and loss are used; its targets are not.
        scores: ``[U]`` by layer, from a localizer.
        exact: None: exact match is not measured.
        fractions: of all units; 0 comes first by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    activity = activation_norms(task, groups.held_out)
    at_random = {name: torch.rand(len(own), generator=generator) for name, own in scores.items()}
    matched_masks = [
        matched_units(masks_of(top_units(scores, fraction), _sizes(scores)), activity, generator)
        for fraction in fractions
    ]
    orders = [[masks_of(top_units(own, each), _sizes(own)) for each in fractions] for own in (scores, at_random)]
    return AblationTest(*(ablation_curve(task, masks, groups, exact) for masks in (*orders, matched_masks)))


def ablation_curve(
    task: Task, masks: Sequence[Mapping[str, Tensor]], groups: Groups, exact: Exact | None = None
) -> Curve:
    """Measures every group with nothing zeroed and with each of ``masks``, bool ``[U]`` by layer."""
    losses: dict[str, list[float]] = {name: [] for name, _ in groups.items()}
    shares: dict[str, list[float]] = {name: [] for name, _ in groups.items()}
    fractions = []
    with isolated_eval(task.model), torch.no_grad():
        for mask in ({}, *masks):
            zeroed = sum(int(own.sum()) for own in mask.values())
            fractions.append(zeroed / sum(layer.units for layer in task.layers))
            with ablated(task.layers, mask):
                for name, batches in groups.items():
                    loss, share = mean_losses(task, batches, exact)
                    losses[name].append(loss)
                    shares[name].append(share)
    return Curve(
        tuple(fractions),
        {name: torch.tensor(values) for name, values in losses.items()},
        {name: torch.tensor(values) for name, values in shares.items()},
    )


def mean_losses(task: Task, batches: Sequence[Batch], exact: Exact | None = None) -> tuple[float, float]:
    """Mean loss in nats, and the share reproduced verbatim; NaN for either that can't be measured."""
    samples = sum(size for _, size in batches)
    if not samples:
        return float("nan"), float("nan")
    loss = sum(float(task.loss(batch)) * size for batch, size in batches) / samples
    verbatim = sum(float(exact(batch).float().sum()) for batch, _ in batches) / samples if exact else float("nan")
    return loss, verbatim


def activation_norms(task: Task, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """``[U]`` by layer: root of the sum of squared activations over all positions."""
    squares = {layer.name: torch.zeros(layer.units) for layer in task.layers}
    with isolated_eval(task.model), torch.no_grad():
        for batch, _ in batches:
            for name, hidden in hidden_units(task, batch).items():
                squares[name] += hidden.square().sum(0)
    return {name: own.sqrt() for name, own in squares.items()}


def matched_units(
    masks: Mapping[str, Tensor], activity: Mapping[str, Tensor], generator: torch.Generator, choices: int = 5
) -> dict[str, Tensor]:
    """Bool ``[U]`` by layer: for each unit in ``masks`` another unit of its layer, in no mask and about as active.

    Each is drawn at random among the ``choices`` nearest by ``activity`` that are free, or among all free ones if there
    are fewer.
    """
    matched = {}
    for name, mask in masks.items():
        free, own = ~mask.cpu(), torch.zeros_like(mask, device="cpu")
        order = torch.randperm(int(mask.sum()), generator=generator).to(mask.device)
        for unit in mask.nonzero().flatten()[order].tolist():
            distance = torch.where(free, (activity[name] - activity[name][unit]).abs(), torch.inf)
            near = distance.argsort(stable=True)[: min(choices, int(free.sum()))]
            if len(near):
                picked = near[torch.randint(len(near), (1,), generator=generator)]
                own[picked], free[picked] = True, False
        matched[name] = own
    return matched


def _sizes(scores: Scores) -> dict[str, int]:
    return {name: len(own) for name, own in scores.items()}
