"""Which numbers among a model's parameters belong to a hidden unit: those that write it, and those that read it.

U  units of a hidden layer      k  chosen units of it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer, base_layer, unit_weights, writers_by_reader
from lightning_memsink.localization.sinks import Sinks

Direction = Literal["in", "out", "both"]
"""``in``: rows of the up (and gate) projection and their biases. ``out``: columns of the down projection."""


@dataclass(frozen=True, eq=False)
class UnitAxis:
    """Where the units of a layer are: along ``axis`` of ``parameter``, from each of ``starts`` on (two, where one
    projection writes gate and up)."""

    parameter: nn.Parameter
    axis: int
    starts: tuple[int, ...] = (0,)


@dataclass(frozen=True, eq=False)
class UnitSlice:
    """The numbers at ``index`` ``[k]`` along ``axis`` of ``parameter``."""

    parameter: nn.Parameter
    axis: int
    index: Tensor

    def of(self, values: Tensor) -> Tensor:
        """A copy of the slice of ``values``, which have the parameter's shape."""
        return values.index_select(self.axis, self.index)

    def put_(self, values: Tensor, slice_: Tensor) -> None:
        """Sets the slice of ``values`` to ``slice_``, in place."""
        values.index_copy_(self.axis, self.index, slice_)

    def zero_(self, values: Tensor) -> None:
        """Sets the slice of ``values`` to 0, in place."""
        values.index_fill_(self.axis, self.index, 0)


def unit_axes(
    model: nn.Module, layers: Sequence[HiddenLayer], direction: Direction = "both"
) -> dict[str, list[UnitAxis]]:
    """The parameters that write or read the units of each of ``layers``, by layer name.

    A projection that writes gate and up at once has all gates first, then all ups. LoRA adapters that write or read
    the units are included, beside the frozen weight. The scale of a norm between two convolutions is not: it belongs
    to the channel and is part of neither. The bias of a down projection belongs to no unit.

    Raises:
        ValueError: it is not known which module writes a layer's units, or a weight has no number per unit.
    """
    writers = {} if direction == "out" else writers_by_reader(model)
    axes: dict[str, list[UnitAxis]] = {}
    for layer in layers:
        found: list[UnitAxis] = []
        if direction != "in":
            found += _readers(layer)
        if direction != "out":
            if layer.name not in writers:
                raise ValueError(
                    f"{layer.name} reads units, but the structure of {type(model).__name__} does not show which module "
                    "writes them. Pass direction='out' to use only the columns that read them."
                )
            found += [axis for name in writers[layer.name] for axis in _writers(name, model.get_submodule(name), layer)]
        axes[layer.name] = found
    return axes


def unit_slices(axes: Mapping[str, Sequence[UnitAxis]], sinks: Sinks) -> list[UnitSlice]:
    """The slices that belong to the sinks. A parameter that several modules share comes once for each axis."""
    found: dict[tuple[int, int], tuple[nn.Parameter, list[Tensor]]] = {}
    for name, units in sinks.units.items():
        for unit_axis in axes[name] if len(units) else ():
            _, indices = found.setdefault((id(unit_axis.parameter), unit_axis.axis), (unit_axis.parameter, []))
            indices += [units.cpu() + start for start in unit_axis.starts]
    return [
        UnitSlice(parameter, axis, torch.cat(indices).unique().to(parameter.device))
        for (_, axis), (parameter, indices) in found.items()
    ]


def _readers(layer: HiddenLayer) -> Iterator[UnitAxis]:
    """Where the weights that read the units of ``layer`` have them."""
    unit_weights(layer)  # raises if it is packed
    base = base_layer(layer.module)
    yield UnitAxis(base.get_parameter("weight"), 1 if _has_output_rows(base) else 0)
    for part in layer.module.modules():
        if isinstance(part, nn.Linear) and part is not base and part.in_features == layer.units:
            yield UnitAxis(part.get_parameter("weight"), 1)


def _writers(name: str, module: nn.Module, layer: HiddenLayer) -> Iterator[UnitAxis]:
    """Where the parameters of ``module``, which writes the units of ``layer``, have them."""
    base = base_layer(module)
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    axis = 0 if _has_output_rows(base) else 1
    outputs = -1 if weight is None else weight.shape[axis]
    if weight is None or outputs not in (layer.units, 2 * layer.units):
        raise ValueError(
            f"{name} ({type(base).__name__}) writes the {layer.units} units that {layer.name} reads, but its weight is "
            f"{'computed from others' if weight is None else list(weight.shape)}: it has no row per unit. Load the "
            "model unquantized and without parametrizations, or pass direction='out'."
        )
    starts = tuple(range(0, outputs, layer.units))
    yield UnitAxis(weight, axis, starts)
    if bias is not None:
        yield UnitAxis(bias, 0, starts)
    for part in module.modules():
        if isinstance(part, nn.Linear) and part is not base and part.out_features == outputs:
            yield from (UnitAxis(one, 0, starts) for one in part._parameters.values() if one is not None)


def _has_output_rows(module: nn.Module) -> bool:
    """True of Linear and Conv, whose weights are ``[outputs, inputs, ...]``; those of HF's Conv1D are transposed."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
