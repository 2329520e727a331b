"""Localizers that learn gates: which units the loss of the targets depends on, at a price for every open gate.

U  units of a hidden layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.localization.localizers.task import Scores, Task, gated, localizer, mean_loss, open_gates

LOWEST, HIGHEST, TEMPERATURE = -0.1, 1.1, 2 / 3
"""Of the hard concrete distribution: the stretch beyond 0…1, and the temperature."""


@dataclass(frozen=True)
class _LearnedGates:
    """Gates ``[U]`` by layer as a function of learned parameters."""

    parameters: Mapping[str, Tensor]
    gates: Callable[[], Mapping[str, Tensor]]
    """Computes the gates of one step."""
    penalty: Callable[[], Tensor]
    """Scalar that is added to the loss, in nats."""
    after_step: Callable[[], None] = lambda: None
    """Called after each step of the optimizer, without gradients."""


@localizer("slimming")
def slimming(task: Task, steps: int = 100, lr: float = 0.05, price: float = 2.0) -> Scores:
    """Gates in 0…1, learned from all open: the targets' loss plus ``price`` nats times the mean gate.

    Chang et al., NAACL 2024. The score is the last gate; closed gates are ranked by how long they stayed open.
    """
    gates = {name: gate.requires_grad_() for name, gate in open_gates(task).items()}
    total = {name: torch.zeros_like(gate) for name, gate in gates.items()}

    def clamp() -> None:
        for name, gate in gates.items():
            gate.clamp_(0, 1)
            total[name] += gate / steps

    _learn(task, _LearnedGates(gates, lambda: gates, lambda: price * _mean(gates), clamp), steps, lr)
    return {name: (gate + 1e-3 * total[name]).detach().cpu() for name, gate in gates.items()}


@localizer("hard concrete")
def hard_concrete(
    task: Task, steps: int = 100, lr: float = 0.1, price: float = 2.0, start: float = 0.9, seed: int = 0
) -> Scores:
    """Gates drawn from hard concrete distributions whose probability to be open is learned (Louizos et al. 2018).

    The loss is that of the targets plus ``price`` nats times the mean probability that a gate is not zero. ``start``:
    that probability before the first step is near it. The score is the logit.
    """
    generator = {
        name: torch.Generator(gate.device).manual_seed(seed + n)
        for n, (name, gate) in enumerate(open_gates(task).items())
    }
    first = math.log(start / (1 - start))
    logits = {name: (gate * first).requires_grad_() for name, gate in open_gates(task).items()}

    def draw() -> dict[str, Tensor]:
        return {name: hard_gate(own, _uniform_like(own, generator[name])) for name, own in logits.items()}

    def penalty() -> Tensor:
        return price * _mean({name: open_probability(own) for name, own in logits.items()})

    _learn(task, _LearnedGates(logits, draw, penalty), steps, lr)
    return {name: own.detach().cpu() for name, own in logits.items()}


def hard_gate(logit: Tensor, uniform: Tensor) -> Tensor:
    """A draw in 0…1, exactly 0 or 1 with positive probability, of ``uniform`` draws in 0…1 (exclusive)."""
    soft = ((uniform.log() - (1 - uniform).log() + logit) / TEMPERATURE).sigmoid()
    return (soft * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)


def open_probability(logit: Tensor) -> Tensor:
    """The probability that `hard_gate` is above zero."""
    return (logit - TEMPERATURE * math.log(-LOWEST / HIGHEST)).sigmoid()


def _uniform_like(logit: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(logit.shape, generator=generator, device=logit.device).clamp(1e-6, 1 - 1e-6)


def _learn(task: Task, learned: _LearnedGates, steps: int, lr: float) -> None:
    """Adam on the parameters of the gates alone; the gradients of the model are never written."""
    parameters = list(learned.parameters.values())
    optimizer = torch.optim.Adam(parameters, lr)
    with isolated_eval(task.model), torch.enable_grad():
        for _ in range(steps):
            with gated(task.layers, learned.gates()):
                loss = mean_loss(task, task.targets) + learned.penalty()
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            with torch.no_grad():
                learned.after_step()


def _mean(gates: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gate.abs() for gate in gates.values()]).mean()
