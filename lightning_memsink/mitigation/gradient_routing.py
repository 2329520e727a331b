"""Gradient routing (Cloud et al. 2024): the gradient of chosen samples reaches chosen units of a hidden layer only.

B  samples in a batch      U  units      R  rows of a batch      T  tokens of a row
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer
from lightning_memsink.attribution.token_owners import at_tokens


def reserved_units(layer: HiddenLayer, share: float) -> Tensor:
    """Bool ``[U]``: the last ``share`` (0…1) of the layer's units, at least one."""
    reserved = torch.zeros(layer.units, dtype=torch.bool)
    reserved[-max(1, round(share * layer.units)) :] = True
    return reserved


def route(hidden: Tensor, samples: Tensor, units: Tensor, batch_axis: int = 0, unit_axis: int = -1) -> Tensor:
    """``hidden``, bit for bit, with its gradient routed: for ``samples`` bool ``[B]``, it reaches ``units`` bool
    ``[U]`` only.

    Equals ``m * h + (1 - m) * h.detach()`` with a mask m of zeros and ones, without the arithmetic. ``samples`` may
    have the axes of ``hidden`` already, as of tokens.
    """
    by_sample = [-1 if axis == batch_axis % hidden.ndim else 1 for axis in range(hidden.ndim)]
    by_unit = [-1 if axis == unit_axis % hidden.ndim else 1 for axis in range(hidden.ndim)]
    routed = samples.to(hidden.device, non_blocking=True)
    passes = ~(routed.view(by_sample) if routed.ndim == 1 else routed) | units.to(
        hidden.device, non_blocking=True
    ).view(by_unit)
    return torch.where(passes, hidden, hidden.detach())


def routing_hook(
    layer: HiddenLayer, units: Tensor, samples: Callable[[], Tensor | None], on_mismatch: Callable[[str], None]
) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """A forward pre-hook (with keyword arguments) of ``layer.module`` that routes the gradient of its first tensor.

    Args:
        units: bool ``[U]``, those that the gradient reaches.
        samples: returns bool ``[B]``, the samples of the current batch to route, or ``[R, T]``, the tokens; None for
            none.
        on_mismatch: called with the reason if the layer's input has no axis of B samples, or not these tokens.
    """

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        chosen = samples() if torch.is_grad_enabled() and module.training else None
        name = "" if args else next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        if chosen is None or name is None:
            return None
        hidden = args[0] if args else kwargs[name]
        is_by_token = chosen.ndim == 2
        placed = at_tokens(chosen, hidden, layer.batch_axis, layer.unit_axis) if is_by_token else chosen
        if placed is None or (not is_by_token and hidden.shape[layer.batch_axis] != len(chosen)):
            missing = f"the {list(chosen.shape)} tokens" if is_by_token else f"an axis of {len(chosen)} samples"
            on_mismatch(f"the input of {layer.name} is {list(hidden.shape)}, without {missing}")
            return None
        routed = route(hidden, placed, units, layer.batch_axis, layer.unit_axis)
        return ((routed, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, name: routed})

    return hook
