"""What every localizer is given, and how it may touch a model without leaving a trace.

B  samples in a batch      N  target samples      U  units of a hidden layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer

Scores = Mapping[str, Tensor]
"""``[U]`` by layer name, comparable between layers: the higher, the more a unit carries the targets."""


class Batch(NamedTuple):
    """A batch as the model's own code takes it, and how many samples are in it."""

    batch: Any
    size: int


@dataclass(frozen=True)
class Task:
    """Which units of ``model`` carry ``targets``, and not what is like them?"""

    model: nn.Module
    layers: Sequence[HiddenLayer]
    """From `lightning_memsink.attribution.hidden_layers.find_hidden_layers`."""
    loss: Callable[[Any], Tensor]
    """The mean loss of a batch, a scalar with its graph; runs ``model``."""
    targets: Sequence[Batch]
    controls: Sequence[Batch] = ()
    """Never trained on, and otherwise like the targets. Methods that contrast need them to tell what is general from
    what is memorized; without, they score the targets alone."""

    def __post_init__(self) -> None:
        if not self.layers or not self.targets:
            raise ValueError(
                f"A task needs hidden layers and targets, but has {len(self.layers)} layers and "
                f"{len(self.targets)} batches of targets."
            )


Localizer = Callable[[Task], Scores]


@contextmanager
def gated(layers: Sequence[HiddenLayer], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the units of each named layer are multiplied with its gate, ``[U]`` for all samples or ``[B, U]``.

    A gate may need a gradient: that of the loss with respect to it is what its unit does.
    """

    def multiply(layer: HiddenLayer, gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            shape = [1] * given[0].ndim
            shape[layer.unit_axis] = layer.units
            if gate.ndim == 2:
                shape[layer.batch_axis] = len(gate)
            return given[0] * gate.to(given[0].dtype).reshape(shape), *given[1:]

        return before

    handles = [
        layer.module.register_forward_pre_hook(multiply(layer, gates[layer.name]))
        for layer in layers
        if layer.name in gates
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_loss(task: Task, batches: Sequence[Batch]) -> Tensor:
    """Scalar: the mean over all samples of ``batches``, each batch's mean loss weighted by its size."""
    return torch.stack([task.loss(batch) * size for batch, size in batches]).sum() / sum(size for _, size in batches)


def open_gates(task: Task) -> dict[str, Tensor]:
    """Ones ``[U]`` by layer name, on the layer's device."""
    return {layer.name: torch.ones(layer.units, device=next(layer.module.parameters()).device) for layer in task.layers}
