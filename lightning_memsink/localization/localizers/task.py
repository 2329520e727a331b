"""The interface of a localizer: its task, its registration, and gates that act on a model without leaving a trace.

B  samples in a batch      N  target samples      U  units of a hidden layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

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
    """The question for a localizer: which units of ``model`` carry ``targets``, and not what is similar to them."""

    model: nn.Module
    layers: Sequence[HiddenLayer]
    """From `lightning_memsink.attribution.hidden_layers.find_hidden_layers`."""
    loss: Callable[[Any], Tensor]
    """The mean loss of a batch, a scalar with its graph; runs ``model``."""
    targets: Sequence[Batch]
    controls: Sequence[Batch] = ()
    """Never trained on, and otherwise like the targets. Methods that contrast need them to separate what is general
    from what is memorized; without, they score the targets alone."""

    def __post_init__(self) -> None:
        if not self.layers or not self.targets:
            raise ValueError(
                f"A task needs hidden layers and targets, but has {len(self.layers)} layers and "
                f"{len(self.targets)} batches of targets."
            )


Localizer = Callable[[Task], Scores]
L = TypeVar("L", bound=Callable[..., Scores])

METHODS: dict[str, Localizer] = {}
"""Localizers by name. All leave weights, gradients, modes and random generators bit-identical."""


def localizer(name: str, **options: Any) -> Callable[[L], L]:
    """Registers the decorated localizer in `METHODS`, to be called with ``options``.

    A function may have several names: the decorator next to it is registered first.
    """

    def register(function: L) -> L:
        METHODS[name] = partial(function, **options) if options else function
        return function

    return register


@contextmanager
def gated(layers: Sequence[HiddenLayer], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the units of each named layer are multiplied by its gate, ``[U]`` for all samples or ``[B, U]``.

    A gate may need a gradient: that of the loss with respect to it is the effect of its unit.
    """

    def multiply(layer: HiddenLayer, gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            shape = [1] * args[0].ndim
            shape[layer.unit_axis] = layer.units
            if gate.ndim == 2:
                shape[layer.batch_axis] = len(gate)
            return args[0] * gate.to(args[0].dtype).reshape(shape), *args[1:]

        return hook

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
