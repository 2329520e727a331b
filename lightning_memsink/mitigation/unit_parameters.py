"""Which numbers among a model's parameters belong to a hidden unit: those that make it, and those that read it.

U  units of a hidden layer      k  units of it that are meant
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
    """The units of a layer lie along ``axis`` of ``parameter``, from each of ``starts`` on (two, where one projection
    makes gate and up)."""

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

    def put_(self, values: Tensor, own: Tensor) -> None:
        values.index_copy_(self.axis, self.index, own)

    def zero_(self, values: Tensor) -> None:
        values.index_fill_(self.axis, self.index, 0)


def unit_axes(
    model: nn.Module, layers: Sequence[HiddenLayer], direction: Direction = "both"
) -> dict[str, list[UnitAxis]]:
    """Where the units of each of ``layers`` lie, by layer name.

    A projection that makes gate and up at once has all gates first, then all ups. LoRA adapters that make or read the
    units are among the rest, beside the frozen weight. The scale of a norm between two convolutions is not: it belongs
    to the channel and is no part of either. The bias of a down projection belongs to no unit.

    Raises:
        ValueError: it is not known which module makes a layer's units, or a weight has no number per unit.
    """
    writers = {} if direction == "out" else writers_by_reader(model)
    axes: dict[str, list[UnitAxis]] = {}
    for layer in layers:
        own: list[UnitAxis] = []
        if direction != "in":
            own += _reading(layer)
        if direction != "out":
            if layer.name not in writers:
                raise ValueError(
                    f"{layer.name} reads units, but which module makes them can't be told from the structure of "
                    f"{type(model).__name__}. Pass direction='out' to mean the columns that read them alone."
                )
            own += [axis for name in writers[layer.name] for axis in _making(name, model.get_submodule(name), layer)]
        axes[layer.name] = own
    return axes


def unit_slices(axes: Mapping[str, Sequence[UnitAxis]], sinks: Sinks) -> list[UnitSlice]:
    """What belongs to the sinks. A parameter that several modules share comes once for each axis."""
    found: dict[tuple[int, int], tuple[nn.Parameter, list[Tensor]]] = {}
    for name, units in sinks.units.items():
        for place in axes[name] if len(units) else ():
            _, indices = found.setdefault((id(place.parameter), place.axis), (place.parameter, []))
            indices += [units.cpu() + start for start in place.starts]
    return [
        UnitSlice(parameter, axis, torch.cat(indices).unique().to(parameter.device))
        for (_, axis), (parameter, indices) in found.items()
    ]


def _reading(layer: HiddenLayer) -> Iterator[UnitAxis]:
    unit_weights(layer)  # raises if it is packed
    base = base_layer(layer.module)
    yield UnitAxis(base.get_parameter("weight"), 1 if _is_row_a_made_unit(base) else 0)
    for part in layer.module.modules():
        if isinstance(part, nn.Linear) and part is not base and part.in_features == layer.units:
            yield UnitAxis(part.get_parameter("weight"), 1)


def _making(name: str, module: nn.Module, layer: HiddenLayer) -> Iterator[UnitAxis]:
    base = base_layer(module)
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    axis = 0 if _is_row_a_made_unit(base) else 1
    made = -1 if weight is None else weight.shape[axis]
    if weight is None or made not in (layer.units, 2 * layer.units):
        raise ValueError(
            f"{name} ({type(base).__name__}) makes the {layer.units} units that {layer.name} reads, but its weight is "
            f"{'computed from others' if weight is None else list(weight.shape)}: no number per unit. Load the model "
            "unquantized and without parametrizations, or pass direction='out'."
        )
    starts = tuple(range(0, made, layer.units))
    yield UnitAxis(weight, axis, starts)
    if bias is not None:
        yield UnitAxis(bias, 0, starts)
    for part in module.modules():
        if isinstance(part, nn.Linear) and part is not base and part.out_features == made:
            yield from (UnitAxis(one, 0, starts) for one in part._parameters.values() if one is not None)


def _is_row_a_made_unit(module: nn.Module) -> bool:
    """True of Linear and Conv, whose weights are ``[made, read, ...]``; HF's Conv1D has them the other way round."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
