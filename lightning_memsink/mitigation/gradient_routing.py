"""Which of a hidden layer's units a sample's gradient passes: gradient routing (Cloud et al. 2024).

B  samples in a batch      U  units
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer


def reserved_units(layer: HiddenLayer, share: float) -> Tensor:
    """Bool ``[U]``: the last ``share`` of the layer's units, one at least."""
    kept = torch.zeros(layer.units, dtype=torch.bool)
    kept[-max(1, round(share * layer.units)) :] = True
    return kept


def route(hidden: Tensor, samples: Tensor, units: Tensor, batch_axis: int = 0, unit_axis: int = -1) -> Tensor:
    """``hidden``, bit for bit, whose gradient comes back for ``samples`` bool ``[B]`` to ``units`` bool ``[U]`` only.

    It is ``m * h + (1 - m) * h.detach()`` for masks of zeros and ones, without the arithmetic.
    """
    by_sample = [-1 if axis == batch_axis % hidden.ndim else 1 for axis in range(hidden.ndim)]
    by_unit = [-1 if axis == unit_axis % hidden.ndim else 1 for axis in range(hidden.ndim)]
    passes = ~samples.to(hidden.device).view(by_sample) | units.to(hidden.device).view(by_unit)
    return torch.where(passes, hidden, hidden.detach())


def routing_hook(
    layer: HiddenLayer, units: Tensor, samples: Callable[[], Tensor | None], lost: Callable[[str], None]
) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """A pre-hook (with keyword arguments) of ``layer.module`` that routes its first tensor.

    Args:
        samples: those of the batch in hand, bool ``[B]``; None: nothing to route.
        lost: told why, if the layer's input has no axis of B samples.
    """

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        chosen = samples() if torch.is_grad_enabled() and module.training else None
        name = "" if args else next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        if chosen is None or name is None:
            return None
        hidden = args[0] if args else kwargs[name]
        if hidden.shape[layer.batch_axis] != len(chosen):
            lost(f"the input of {layer.name} is {list(hidden.shape)}, without an axis of {len(chosen)} samples")
            return None
        routed = route(hidden, chosen, units, layer.batch_axis, layer.unit_axis)
        return ((routed, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, name: routed})

    return hook
