"""Records what the units of hidden layers did for each sample, in the user's own backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer, base_layer
from lightning_memsink.attribution.module_hooks import ModuleCalls
from lightning_memsink.attribution.unit_effects import divide_by_weights, unit_effects


class UnitRecorder:
    """`unit_effects` of ``layers``, from `open` before a forward to `finish` after its backward.

    Each module call is reduced to ``[B, U]`` as its gradient arrives, and calls of one module add up. A second backward
    before `finish` adds to the first. Attach before the first compiled call. Where the reading weight is frozen, or
    autocast reads a copy, autograd lets the activation go: there it is kept until its gradient comes, ``[B, T, U]``.

    Attributes:
        left_out: layers without effects at the last `finish`, each with its reason.
    """

    def __init__(self, layers: Sequence[HiddenLayer]) -> None:
        self.left_out: dict[str, str] = {}
        self._layers = {layer.name: layer for layer in layers}
        self._effects: dict[str, Tensor] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._handles = [
            layer.module.register_forward_pre_hook(self._keep(layer), with_kwargs=True) for layer in layers
        ]
        self._calls = ModuleCalls({layer.name: layer.module for layer in layers}, "input", self._on_pair)

    def open(self) -> None:
        """From the next forward on; what was recorded and not finished is dropped."""
        self._forget()
        self.left_out = {}
        self._calls.open()

    def inputs(self) -> list[Tensor]:
        """The hidden activations of the forward so far, to differentiate something of one's own down to."""
        return self._calls.inputs()

    def finish(self, batch_size: int, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Signed effects ``[B, U]`` by layer, in order; positive where the loss would rise without the unit.

        Args:
            weights: ``[B]`` each sample's weight in the differentiated loss (`sample_weights`). Given, the effects are
                nats of the sample's own mean loss; without, of the batch's loss. A sample of weight 0 gets zeros.
        """
        lost = self._calls.close()
        effects: dict[str, Tensor] = {}
        for name in self._layers:
            effect = self._effects.get(name)
            if name in self.left_out:
                continue
            if name in lost:
                self.left_out[name] = "its input was gone when the gradient came"
            elif effect is None:
                self.left_out[name] = "no gradient came to its input (not called, or frozen from there down)"
            elif len(effect) != batch_size:
                self.left_out[name] = f"its input has {len(effect)} rows where the batch has {batch_size} samples"
            else:
                effects[name] = effect if weights is None else divide_by_weights(effect, weights)
        self._forget()
        return effects

    def remove(self) -> None:
        """Takes the hooks away; a second time does nothing."""
        self._calls.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._effects.clear()
        self._kept.clear()

    def _keep(self, layer: HiddenLayer) -> Callable[[nn.Module, Any, Any], None]:
        weight = base_layer(layer.module).get_parameter("weight")

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if self._calls.is_open and given is not None and given.requires_grad and _is_detached(given, weight):
                self._kept.setdefault(layer.name, []).append(given)

        return keep

    def _on_pair(self, name: str, hidden: Tensor, gradient: Tensor) -> None:
        layer = self._layers[name]
        spare = layer.unit_axis % hidden.ndim == layer.batch_axis % hidden.ndim
        if spare or hidden.shape[layer.unit_axis] != layer.units:
            self.left_out[name] = f"its input {list(hidden.shape)} has no batch axis"
            return
        kept = self._kept.get(name, [])
        self._kept[name] = [given for given in kept if given.data_ptr() != hidden.data_ptr()]
        effect = unit_effects(hidden, gradient, layer.batch_axis, layer.unit_axis)
        before = self._effects.get(name)
        if before is not None and before.shape != effect.shape:
            self.left_out[name] = f"it was called on {len(before)} rows, then on {len(effect)}"
            return
        self._effects[name] = effect if before is None else before.add_(effect)


def _is_detached(given: Tensor, weight: Tensor) -> bool:
    """True if the module's backward does without its input itself."""
    device = given.device.type
    is_copied = torch.is_autocast_enabled(device) and given.dtype != torch.get_autocast_dtype(device)
    return is_copied or not weight.requires_grad
