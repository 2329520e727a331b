"""Recording the effect of hidden units on each sample's loss, in the user's own backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import HiddenLayer, base_layer
from lightning_memsink.attribution.module_hooks import ModuleCalls, first_tensor
from lightning_memsink.attribution.token_owners import TokenOwners, at_tokens
from lightning_memsink.attribution.unit_effects import divide_by_weights, document_effects, unit_effects


class UnitRecorder:
    """`unit_effects` of ``layers``, from `open` before a forward to `finish` after its backward.

    Each module call is reduced to ``[B, U]`` as its gradient arrives, and calls of one module add up. A second backward
    before `finish` adds to the first. Attach before the first compiled call. Where the reading weight is frozen, or
    autocast reads a copy, autograd frees the activation: there it is kept until its gradient comes, ``[B, T, U]``.

    Attributes:
        left_out: layers without effects at the last `finish`, each with its reason.
        owners: of the tokens, where rows hold several documents; set after `open` and before the backward. Effects are
            ``[D, U]`` then.
    """

    def __init__(self, layers: Sequence[HiddenLayer]) -> None:
        self.left_out: dict[str, str] = {}
        self.owners: TokenOwners | None = None
        self._layers = {layer.name: layer for layer in layers}
        self._effects: dict[str, Tensor] = {}
        self._kept_inputs: dict[str, list[Tensor]] = {}
        self._handles = [
            layer.module.register_forward_pre_hook(self._before_forward(layer), with_kwargs=True) for layer in layers
        ]
        self._calls = ModuleCalls({layer.name: layer.module for layer in layers}, "input", self._read_call)

    def open(self) -> None:
        """Records from the next forward on; what was recorded and not finished is dropped."""
        self._reset()
        self.left_out, self.owners = {}, None
        self._calls.open()

    def inputs(self) -> list[Tensor]:
        """The hidden activations of the forward so far, to differentiate another quantity down to."""
        return self._calls.inputs()

    def finish(self, batch_size: int, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Signed effects ``[B, U]`` by layer, in order; positive where the loss would rise without the unit.

        Args:
            weights: ``[B]`` each sample's weight in the differentiated loss (`sample_weights`). With them, the effects
                are nats of the sample's own mean loss; without, of the batch's loss. A sample of weight 0 gets zeros.
        """
        lost = self._calls.close()
        effects: dict[str, Tensor] = {}
        for name in self._layers:
            effect = self._effects.get(name)
            if name in self.left_out:
                continue
            if name in lost:
                self.left_out[name] = "its input was freed before its gradient came"
            elif effect is None:
                self.left_out[name] = "no gradient came to its input (not called, or frozen from there down)"
            elif len(effect) != batch_size:
                self.left_out[name] = f"its input has {len(effect)} rows where the batch has {batch_size} samples"
            else:
                effects[name] = effect if weights is None else divide_by_weights(effect, weights)
        self._reset()
        return effects

    def remove(self) -> None:
        """Removes the hooks; a second call does nothing."""
        self._calls.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reset()

    def _reset(self) -> None:
        self._effects.clear()
        self._kept_inputs.clear()

    def _before_forward(self, layer: HiddenLayer) -> Callable[[nn.Module, Any, Any], None]:
        weight = base_layer(layer.module).get_parameter("weight")

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            inputs = first_tensor(args, kwargs)
            if self._calls.is_open and inputs is not None and inputs.requires_grad and _is_freed(inputs, weight):
                self._kept_inputs.setdefault(layer.name, []).append(inputs)

        return hook

    def _read_call(self, name: str, hidden: Tensor, gradient: Tensor) -> None:
        layer = self._layers[name]
        axes_coincide = layer.unit_axis % hidden.ndim == layer.batch_axis % hidden.ndim
        if axes_coincide or hidden.shape[layer.unit_axis] != layer.units:
            self.left_out[name] = f"its input {list(hidden.shape)} has no batch axis"
            return
        kept = self._kept_inputs.get(name, [])
        self._kept_inputs[name] = [inputs for inputs in kept if inputs.data_ptr() != hidden.data_ptr()]
        effect = self._effect(layer, hidden, gradient)
        if effect is None:
            return
        before = self._effects.get(name)
        if before is not None and before.shape != effect.shape:
            self.left_out[name] = f"it was called on {len(before)} rows, then on {len(effect)}"
            return
        self._effects[name] = effect if before is None else before.add_(effect)

    def _effect(self, layer: HiddenLayer, hidden: Tensor, gradient: Tensor) -> Tensor | None:
        """``[B, U]``, or ``[D, U]`` of documents; None if the layer's tokens are not those of the rows."""
        if self.owners is None:
            return unit_effects(hidden, gradient, layer.batch_axis, layer.unit_axis)
        places = at_tokens(self.owners.owners, hidden, layer.batch_axis, layer.unit_axis)
        if places is None:
            tokens = "{} x {}".format(*self.owners.shape)
            self.left_out[layer.name] = f"its input {list(hidden.shape)} is not of the {tokens} tokens of the documents"
            return None
        return document_effects(hidden, gradient, places, self.owners.count, layer.unit_axis)


def _is_freed(inputs: Tensor, weight: Tensor) -> bool:
    """True if autograd frees the module's input, because the module's backward does not need it."""
    device = inputs.device.type
    is_copied = torch.is_autocast_enabled(device) and inputs.dtype != torch.get_autocast_dtype(device)
    return is_copied or not weight.requires_grad
