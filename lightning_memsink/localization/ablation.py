"""Ablation: zeroing hidden units for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer, unit_weights
from lightning_memsink.localization.sinks import Sinks


@contextmanager
def ablated(layers: Sequence[HiddenLayer], units: Sinks | Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the weights that read the units are zero, so the model computes as if the units were zero.

    Afterwards the weights are restored bit by bit. They are written in place: not between a forward and its backward. A
    weight that two modules share is zero for both. Adapters (LoRA) that read the same units are zeroed with the frozen
    weight.

    Args:
        layers: of the model, from `find_hidden_layers`; those that ``units`` does not name stay as they are.
        units: sinks, or masks bool ``[U]`` by layer name, true where a unit is to be zero.

    Raises:
        ValueError: before anything is changed, if a layer is not among ``layers`` or has another number of units.
    """
    masks = units.masks() if isinstance(units, Sinks) else units
    by_name = {layer.name: layer for layer in layers}
    _check(masks, by_name)
    selected = [(by_name[name], mask) for name, mask in masks.items() if bool(mask.any())]
    columns = [(weight, mask.to(weight.device)) for layer, mask in selected for weight in readers(layer)]
    # All are copied before one is changed: tied weights would otherwise be restored to zeros.
    before = [weight[mask].clone() for weight, mask in columns]
    try:
        with torch.no_grad():
            for weight, mask in columns:
                weight[mask] = 0
        yield
    finally:
        with torch.no_grad():
            for (weight, mask), kept in zip(columns, before, strict=True):
                weight[mask] = kept


def readers(layer: HiddenLayer) -> list[Tensor]:
    """Detached views ``[U, ...]`` of all weights that read the layer's units: its own, and those of its adapters."""
    own = unit_weights(layer).detach()
    adapters = [
        module.weight.detach().transpose(0, 1)
        for module in layer.module.modules()
        if isinstance(module, nn.Linear) and module.in_features == layer.units
    ]
    return [own, *(weight for weight in adapters if weight.data_ptr() != own.data_ptr())]


def _check(masks: Mapping[str, Tensor], by_name: Mapping[str, HiddenLayer]) -> None:
    for name, mask in masks.items():
        if name not in by_name:
            raise ValueError(
                f"Units of {name!r} can't be zeroed: the hidden layers are {', '.join(by_name)}. Sinks belong to the "
                "model they were located in, under its names."
            )
        if mask.dtype != torch.bool or mask.shape != (by_name[name].units,):
            raise ValueError(
                f"{name} has {by_name[name].units} units, so its mask is bool [{by_name[name].units}], but it is "
                f"{mask.dtype} {list(mask.shape)}."
            )
