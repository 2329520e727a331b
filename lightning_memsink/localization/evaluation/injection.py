"""Injection: train a model on one sample through known units only, and let a localizer find them.

The INJ test of Chang et al., NAACL 2024, with each unit's weights clipped to the norm they had: without that, the
optimizer enlarges exactly the injected units, and any score that contains the weight's norm finds them.

U  units of a layer      n  injected units of it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.attribution.hidden_layers import base_layer, unit_weights
from lightning_memsink.localization.evaluation.ranking import recall_at
from lightning_memsink.localization.localizers.task import Localizer, Task, mean_loss
from lightning_memsink.localization.locate import quota


@dataclass(frozen=True)
class Injection:
    """The injected units, and the loss before and after."""

    truth: Mapping[str, Tensor]
    """Bool ``[U]`` by layer: the injected units."""
    before: float
    """Mean loss of the targets before, in nats."""
    after: float
    """Mean loss of the targets after, in nats."""
    steps: int

    @property
    def learned(self) -> float:
        """Share of the loss that is gone, 0…1. An injection that was not learned is no test of a localizer."""
        return 1 - self.after / self.before

    @property
    def count(self) -> int:
        return sum(int(own.sum()) for own in self.truth.values())


@dataclass(frozen=True)
class Recall:
    """The recall of one localizer on one injection."""

    injection: Injection
    recall: float
    """Of the injected units, among as many of the highest scores, 0…1."""
    chance: float


@contextmanager
def injected(
    task: Task,
    fraction: float = 0.2,
    until: float = 0.05,
    steps: int = 300,
    lr: float = 0.05,
    longest: float = 1.0,
    seed: int = 0,
) -> Iterator[Injection]:
    """Inside, a random ``fraction`` of units was trained on the task's targets; afterwards the weights are restored.

    Only the output weights of these units are trained, by Adam, up to a loss below ``until`` nats or for ``steps``.

    Args:
        task: its targets should not be learned yet.
        fraction: of all units. Norm-clipped, few units store little: in a GPT of 0.9 M parameters, 1 % of the units
            leave the loss of 64 tokens as it is, and 20 % bring it from 9.4 to 1.4 nats.
        until: nats.
        steps: of the optimizer, at most.
        lr: of the optimizer at the start; it falls to a twentieth over ``steps``.
        longest: largest norm of a unit's weights after each step, in units of their layer's mean norm: longer ones are
            scaled back. Above 1, `weight_norm` finds the units too.
        seed: of the random units.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = _draw(task, fraction, generator)
    weights = [unit_weights(layer).detach() for layer in task.layers]
    masks = [truth[layer.name].to(weight.device) for layer, weight in zip(task.layers, weights, strict=True)]
    kept = [weight[mask].clone() for weight, mask in zip(weights, masks, strict=True)]
    try:
        with isolated_eval(task.model):
            before = float(mean_loss(task, task.targets).detach())
            after, steps_taken = _train(task, masks, until, steps, lr, longest)
        yield Injection(truth, before, after, steps_taken)
    finally:
        with torch.no_grad():
            for weight, mask, values in zip(weights, masks, kept, strict=True):
                weight[mask] = values


def evaluate_injection(localizer: Localizer, task: Task, injection: Injection) -> Recall:
    """Recall of ``localizer`` on an injection. Call it inside `injected`."""
    units = sum(map(len, injection.truth.values()))
    return Recall(injection, recall_at(localizer(task), injection.truth), injection.count / units)


def _draw(task: Task, fraction: float, generator: torch.Generator) -> dict[str, Tensor]:
    sizes = [layer.units for layer in task.layers]
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[torch.randperm(len(chosen), generator=generator)[: quota(len(chosen), fraction)]] = True
    return {layer.name: own for layer, own in zip(task.layers, chosen.split(sizes), strict=True)}


def _train(task: Task, masks: list[Tensor], until: float, steps: int, lr: float, longest: float) -> tuple[float, int]:
    """Trains the weights of the masked units in place. Returns the last loss and the number of steps."""
    views = [unit_weights(layer).detach() for layer in task.layers]
    rows = [weight[mask].clone() for weight, mask in zip(views, masks, strict=True)]
    limits = [longest * weight.flatten(1).norm(dim=1).mean() for weight in views]
    optimizer = torch.optim.Adam(rows, lr)
    # At a constant rate the noise of the last steps stays in the injected weights and costs a tenth of recall.
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for step in range(steps):
        loss, gradients = _gradients(task)
        if loss < until:
            return loss, step
        for own, gradient, mask in zip(rows, gradients, masks, strict=True):
            own.grad = gradient[mask]
        optimizer.step()
        decay.step()
        for weight, own, mask, limit in zip(views, rows, masks, limits, strict=True):
            length = own.flatten(1).norm(dim=1)
            own *= (limit / length.clamp(min=1e-30)).clamp(max=1).reshape(-1, *[1] * (own.ndim - 1))
            weight[mask] = own
    return _gradients(task)[0], steps


def _gradients(task: Task) -> tuple[float, list[Tensor]]:
    """The targets' loss, and its gradient for each layer's weight, units first; no ``.grad`` is written."""
    owners = [base_layer(layer.module).get_parameter("weight") for layer in task.layers]
    required_grad = [owner.requires_grad for owner in owners]
    try:
        for owner in owners:
            owner.requires_grad_(True)
        with torch.enable_grad():
            loss = mean_loss(task, task.targets)
        gradients = torch.autograd.grad(loss, owners)
    finally:
        for owner, before in zip(owners, required_grad, strict=True):
            owner.requires_grad_(before)
    return float(loss.detach()), [
        gradient if unit_weights(layer) is owner else gradient.transpose(0, 1)
        for layer, owner, gradient in zip(task.layers, owners, gradients, strict=True)
    ]
