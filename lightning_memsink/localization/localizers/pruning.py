"""Localizers that learn which units the targets can't do without.

U  units of a hidden layer
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.localization.localizers.task import Scores, Task, gated, mean_loss, open_gates

LOWEST, HIGHEST, TEMPERATURE = -0.1, 1.1, 2 / 3
"""Of the hard concrete distribution: the stretch beyond 0…1, and the temperature."""


def slimming(task: Task, steps: int = 100, lr: float = 0.05, price: float = 2.0) -> Scores:
    """Gates in 0…1, learned from all open: the targets' loss plus ``price`` nats times the mean gate.

    Chang et al. 2024. The score is the last gate; units that were shut are told apart by how long they stayed open.
    """
    gates = {name: gate.requires_grad_() for name, gate in open_gates(task).items()}
    total = {name: torch.zeros_like(gate) for name, gate in gates.items()}

    def clamp() -> None:
        for name, gate in gates.items():
            gate.clamp_(0, 1)
            total[name] += gate / steps

    _learn(task, gates, lambda: gates, lambda: price * _mean(gates), clamp, steps, lr)
    return {name: (gate + 1e-3 * total[name]).detach().cpu() for name, gate in gates.items()}


def hard_concrete(
    task: Task, steps: int = 100, lr: float = 0.1, price: float = 2.0, start: float = 0.9, seed: int = 0
) -> Scores:
    """Gates drawn from hard concrete distributions, the chance to be open learned (Louizos et al. 2018).

    The targets' loss plus ``price`` nats times the mean probability of a gate not to be zero. ``start``: that
    probability before the first step is near it. The score is the logit.
    """
    generator = {
        name: torch.Generator(gate.device).manual_seed(seed + n)
        for n, (name, gate) in enumerate(open_gates(task).items())
    }
    first = math.log(start / (1 - start))
    logits = {name: (gate * first).requires_grad_() for name, gate in open_gates(task).items()}

    def draw() -> dict[str, Tensor]:
        return {name: hard_gate(own, _uniform_like(own, generator[name])) for name, own in logits.items()}

    def cost() -> Tensor:
        return price * _mean({name: open_probability(own) for name, own in logits.items()})

    _learn(task, logits, draw, cost, lambda: None, steps, lr)
    return {name: own.detach().cpu() for name, own in logits.items()}


def hard_gate(logit: Tensor, uniform: Tensor) -> Tensor:
    """A draw in 0…1, exactly 0 or 1 with positive probability, of ``uniform`` draws in 0…1 (exclusive)."""
    soft = ((uniform.log() - (1 - uniform).log() + logit) / TEMPERATURE).sigmoid()
    return (soft * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)


def open_probability(logit: Tensor) -> Tensor:
    """The probability of `hard_gate` to be above zero."""
    return (logit - TEMPERATURE * math.log(-LOWEST / HIGHEST)).sigmoid()


def _uniform_like(logit: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(logit.shape, generator=generator, device=logit.device).clamp(1e-6, 1 - 1e-6)


def _learn(
    task: Task,
    weights: dict[str, Tensor],
    gates: Callable[[], dict[str, Tensor]],
    cost: Callable[[], Tensor],
    after: Callable[[], None],
    steps: int,
    lr: float,
) -> None:
    """Adam on ``weights`` alone; the model's own gradients are never written."""
    optimizer = torch.optim.Adam(weights.values(), lr)
    with isolated_eval(task.model), torch.enable_grad():
        for _ in range(steps):
            with gated(task.layers, gates()):
                loss = mean_loss(task, task.targets) + cost()
            for weight, gradient in zip(
                weights.values(), torch.autograd.grad(loss, list(weights.values())), strict=True
            ):
                weight.grad = gradient
            optimizer.step()
            with torch.no_grad():
                after()


def _mean(gates: dict[str, Tensor]) -> Tensor:
    return torch.cat([gate.abs() for gate in gates.values()]).mean()
