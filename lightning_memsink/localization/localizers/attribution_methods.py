"""Localizers that measure what a unit does in the model as it is: attribution, activations and ablation.

B  samples in a batch      N  target samples      U  units of a hidden layer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.attribution.attribute import attribute
from lightning_memsink.attribution.hidden_layers import HiddenLayer
from lightning_memsink.attribution.unit_effects import shares
from lightning_memsink.localization.ablation import readers
from lightning_memsink.localization.localizers.task import Batch, Scores, Task, gated, localizer, mean_loss, open_gates
from lightning_memsink.localization.locate import contrast

DEFAULT = "activation x gradient"


@localizer("|activation x gradient|, less controls", signed=False, contrasted=True)
@localizer("activation x gradient, less controls", contrasted=True)
@localizer("activation x gradient, margin", objective="margin")
@localizer(DEFAULT)
def activation_times_gradient(
    task: Task, objective: Literal["loss", "margin"] = "loss", signed: bool = True, contrasted: bool = False
) -> Scores:
    """Mean over the targets of a unit's share of the effects of all units on a sample, to first order.

    One forward and backward of each batch.

    Args:
        task: which units of which model.
        objective: ``"margin"``: the effect on the lead of the right class, whose gradient remains when that of the
            loss is gone.
        signed: effects keep their sign, so only units that help rank high; else their sizes count.
        contrasted: less the same of the controls, if the task has any.
    """
    with isolated_eval(task.model):
        target = _sample_shares(task, task.targets, objective, signed)
        control = _sample_shares(task, task.controls, objective, signed) if contrasted and task.controls else None
    return contrast(target, control)


@localizer("activations")
def activations(task: Task) -> Scores:
    """``|mean h_j| ||w_j||`` over all positions of the targets: what a unit adds to the next layer.

    Chang et al., NAACL 2024, take the mean before the absolute value, so signs cancel.
    """
    means = {layer.name: torch.zeros(layer.units) for layer in task.layers}
    total = sum(size for _, size in task.targets)
    with isolated_eval(task.model), torch.no_grad():
        for batch, size in task.targets:
            for name, hidden in hidden_units(task, batch).items():
                means[name] += hidden.mean(0) * size / total
    return {layer.name: means[layer.name].abs() * weight_norms(layer) for layer in task.layers}


@localizer("integrated gradients")
def integrated_gradients(task: Task, steps: int = 20) -> Scores:
    """Mean signed shares of a unit's effect along the path from all hidden activations at zero to their values.

    All hidden activations are scaled together by ``(n + 1/2) / steps``, so the effects of a sample sum to its loss
    without hidden units less its loss with them (Sundararajan et al. 2017, completeness).
    """
    with isolated_eval(task.model):
        return contrast(shares(_path_effects(task, task.targets, steps), signed=True))


@localizer("zero-out")
def zero_out(task: Task) -> Scores:
    """``loss(h_j = 0) - loss`` of the targets, exact, in nats: one forward a unit and batch, so slow."""
    scores = {}
    with isolated_eval(task.model), torch.no_grad():
        before = mean_loss(task, task.targets)
        for layer in task.layers:
            gate = open_gates(task)[layer.name]
            own = torch.zeros(layer.units)
            with gated([layer], {layer.name: gate}):
                for unit in range(layer.units):
                    gate[unit] = 0
                    own[unit] = mean_loss(task, task.targets) - before
                    gate[unit] = 1
            scores[layer.name] = own
    return scores


def hidden_units(task: Task, batch: Any) -> dict[str, Tensor]:
    """One forward: the activations ``[positions, U]`` by layer name, over samples and tokens or space."""
    recorded: dict[str, list[Tensor]] = {layer.name: [] for layer in task.layers}

    def record(layer: HiddenLayer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden = args[0].detach().movedim(layer.unit_axis, -1)
            recorded[layer.name].append(hidden.reshape(-1, layer.units).float())

        return hook

    handles = [layer.module.register_forward_pre_hook(record(layer)) for layer in task.layers]
    try:
        task.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).cpu() for name, parts in recorded.items()}


def weight_norms(layer: HiddenLayer) -> Tensor:
    """``[U]`` norm of all weights that read each unit, adapters included."""
    norms: Tensor = torch.stack([weight.float().flatten(1).norm(dim=1) for weight in readers(layer)]).norm(dim=0)
    return norms.cpu()


def _sample_shares(
    task: Task, batches: Sequence[Batch], objective: Literal["loss", "margin"], signed: bool
) -> dict[str, Tensor]:
    """``[N, U]`` by layer, of all samples of all batches."""
    parts = [_effects(task, one, objective) for one in batches]
    effects = {layer.name: torch.cat([part[layer.name] for part in parts]) for layer in task.layers}
    return shares(effects, signed)


def _effects(task: Task, samples: Batch, objective: Literal["loss", "margin"]) -> dict[str, Tensor]:
    return attribute(lambda: task.loss(samples.batch), task.layers, samples.size, objective)


def _path_effects(task: Task, batches: Sequence[Batch], steps: int) -> dict[str, Tensor]:
    """``[N, U]`` by layer, in nats of the batch's mean loss, positive where the unit lowers it."""
    rows: dict[str, list[Tensor]] = {layer.name: [] for layer in task.layers}
    for batch, size in batches:
        sums = {name: gate.new_zeros(size, len(gate)) for name, gate in open_gates(task).items()}
        for step in range(steps):
            gates = {
                name: torch.full_like(total, (step + 0.5) / steps, requires_grad=True) for name, total in sums.items()
            }
            with gated(task.layers, gates), torch.enable_grad():
                slopes = torch.autograd.grad(task.loss(batch), list(gates.values()))
            for name, slope in zip(gates, slopes, strict=True):
                sums[name] -= slope / steps
        for name, effect in sums.items():
            rows[name].append(effect.cpu())
    return {name: torch.cat(own) for name, own in rows.items()}
